"""Sums of two products in 16 bits, as VPMADDUBSW adds uint8 times int8."""

from __future__ import annotations

import numpy as np

from onnxq.kernels._jit import kernel, read_only

__all__ = ["add_overflows"]


def add_overflows(
    x: np.ndarray,
    first: np.ndarray,
    weights: np.ndarray,
    counts: np.ndarray,
    excess: np.ndarray,
) -> None:
    """Count how often sums of two neighbouring products leave int16, and by how much.

    Args:
        x: Integers that rows multiply, int16 [P, K].
        first: Index along K of the first of each pair, int64 [F].
        weights: Both weights of each pair, int16 [F, 2].
        counts: How often each pair's sum left int16, int64 [F], added to.
        excess: Sum of the squares of what is cut off, float64 [F], added to.
    """
    _add_overflows(read_only(x), read_only(first), read_only(weights), counts, excess)


@kernel
def _add_overflows(
    x: np.ndarray,
    first: np.ndarray,
    weights: np.ndarray,
    counts: np.ndarray,
    excess: np.ndarray,
) -> None:
    for p in range(x.shape[0]):
        row = x[p]
        for f in range(first.size):
            k = first[f]
            total = np.int32(row[k]) * weights[f, 0] + np.int32(row[k + 1]) * weights[f, 1]
            if total > 32767 or total < -32768:
                beyond = np.float64(total - 32767 if total > 0 else total + 32768)
                counts[f] += 1
                excess[f] += beyond * beyond
