"""The verbs of the command line, one module each: a few lines over the functions they call."""
