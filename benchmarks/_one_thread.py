"""Keeps BLAS on one thread; to be imported before numpy.

A thread that waits for another's part of a small product spins, and that would count as processor
time.
"""

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"
