"""Arrays in, arrays out: the arithmetic of onnxq in numpy and numba, one file per theme."""
