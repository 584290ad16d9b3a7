"""Facts about a graph: what it costs, how far two models are apart, what fuses."""
