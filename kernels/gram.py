"""Sums of outer products of many short vectors: the Gram matrices of depthwise layers."""

from __future__ import annotations

import numpy as np

from onnxq.kernels._jit import kernel, read_only

__all__ = ["add_outer_products"]


def add_outer_products(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """Add the sum over n of a[n] b[n]^T to `out`, group by group.

    A product of matrices per group would first have to gather each group's values.

    Args:
        a: float32 [N, G, K].
        b: float32 [N, G, K].
        out: float32 [G, K, K].
    """
    _add_outer_products(read_only(a), read_only(b), out)


@kernel
def _add_outer_products(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    count, groups, columns = a.shape
    for g in range(groups):
        total = out[g]
        for n in range(count):
            for i in range(columns):
                left = a[n, g, i]
                for j in range(columns):
                    total[i, j] += left * b[n, g, j]
