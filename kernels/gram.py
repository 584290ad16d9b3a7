"""Sums of outer products of many short vectors: the Gram matrices of depthwise layers."""

from __future__ import annotations

import numpy as np

from onnxq.kernels._jit import kernel, read_only

__all__ = ["add_outer_products"]


def add_outer_products(
    a: np.ndarray, b: np.ndarray, centre: np.ndarray, other: np.ndarray, out: np.ndarray
) -> None:
    """Add the sum over n of (a[n] - centre) (b[n] - other)^T to `out`, group by group.

    A product of matrices per group would first have to gather each group's values.

    Args:
        a: float32 [N, G, K].
        b: float32 [N, G, K].
        centre: float32 [G, K].
        other: float32 [G, K].
        out: float32 [G, K, K].
    """
    _add_outer_products(read_only(a), read_only(b), read_only(centre), read_only(other), out)


@kernel
def _add_outer_products(
    a: np.ndarray, b: np.ndarray, centre: np.ndarray, other: np.ndarray, out: np.ndarray
) -> None:
    count, groups, columns = a.shape
    right = np.empty(columns, np.float32)
    for g in range(groups):
        total = out[g]
        for n in range(count):
            for j in range(columns):
                right[j] = b[n, g, j] - other[g, j]
            for i in range(columns):
                left = a[n, g, i] - centre[g, i]
                for j in range(columns):
                    total[i, j] += left * right[j]
