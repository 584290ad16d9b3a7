"""Facts about a graph: cost, weight ranges, how far two models are apart, what fuses."""
