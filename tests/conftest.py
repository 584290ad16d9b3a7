"""Settings of the whole suite."""

from hypothesis import settings

# A kernel's first call compiles it, which takes seconds: no deadline. The same examples at every
# run: a green run means the same thing everywhere.
settings.register_profile("onnxq", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("onnxq")
