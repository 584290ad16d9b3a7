"""The error of a layer's output, d H d^T + 2 d g0, for errors d of its weight."""

from __future__ import annotations

from functools import cached_property

import numpy as np

__all__ = ["Objective", "objective"]

# What float32 may get wrong of an objective, as a share of it, where it is compared.
TOLERANCE = 1e-3
# Columns of an H that the cache holds in float32.
CACHED = 2048


def objective(error: np.ndarray, gram: np.ndarray, linear: np.ndarray | None = None) -> np.ndarray:
    """The objective d H d^T + 2 d g0 per row in float64, [O].

    Args:
        error: d, [O, K] or [G, O/G, K].
        gram: H, [K, K] or [G, K, K].
        linear: g0, as d; None for 0.
    """
    wide = error.astype(np.float64)
    pull = np.matmul(wide, gram)
    if linear is not None:
        pull += 2.0 * linear
    cost: np.ndarray = np.einsum("...k,...k->...", wide, pull)
    return cost.reshape(-1)


class Objective:
    """The same for many errors of the rows of all groups, in float32 where that is good enough.

    H is divided by the mean of its diagonal, the unit, so that float32 holds it.

    Args:
        gram: H, float64 [G, K, K].
        linear: g0, [G, R, K]; None for 0.
    """

    def __init__(self, gram: np.ndarray, linear: np.ndarray | None) -> None:
        self.gram = gram
        self.linear = linear
        self.diagonal = np.diagonal(gram, axis1=1, axis2=2)
        self.unit = np.maximum(self.diagonal.mean(axis=1), 1e-300).reshape(-1, 1, 1)

    @cached_property
    def walked(self) -> tuple[np.ndarray, np.ndarray]:
        """H in units for walks, and what to multiply it by, float32 [G].

        Where rows are so long that H does not fit into the cache, int16, or reading it takes most
        of the time; walks start from exact pulls.
        """
        grain = np.ones(len(self.gram), np.float32)
        if self.gram.shape[-1] <= CACHED:
            return self.single, grain
        most = np.maximum(np.abs(self.diagonal).max(axis=1), 1e-300)  # of all, as H is of moments
        grain = (most / self.unit[:, 0, 0] / 32767).astype(np.float32)
        short = np.empty(self.gram.shape, np.int16)
        for out, h, step in zip(short, self.single, grain, strict=True):
            for begin in range(0, len(h), 256):  # so that nothing as large is made on the way
                rows = slice(begin, begin + 256)
                out[rows] = np.rint(h[rows] / step)
        return short, grain

    @cached_property
    def single(self) -> np.ndarray:
        """H in units, float32 [G, K, K]."""
        out = np.empty(self.gram.shape, np.float32)
        np.divide(self.gram, self.unit, out=out, casting="same_kind")
        return out

    def pull(self, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """G = d H + g0 in units, [G, R, K], and the objective d H d^T + 2 d g0, float64 [G, R].

        A float32 product of terms of either sign is wrong by about 2^-24 sqrt(K) of their size;
        where all rows' objectives together are not a thousand times that, they are float64.
        """
        columns = error.shape[-1]
        short = error.astype(np.float32)
        pull = np.matmul(short, self.single)
        given = None
        if self.linear is not None:
            given = (self.linear / self.unit).astype(np.float32)
            pull += given
        cost = _dot(short, pull if given is None else pull + given)
        size = np.square(short) @ (self.diagonal[..., None] / self.unit).astype(np.float32)
        noise = 2.0**-22 * np.sqrt(columns) * size[..., 0].sum(dtype=np.float64)
        if noise > TOLERANCE * abs(cost.sum()):
            pull = np.matmul(error.astype(np.float64), self.gram)
            if self.linear is not None:
                pull += self.linear
            pull /= self.unit
            wide = pull if self.linear is None else pull + self.linear / self.unit
            cost = _dot(error, wide)
        return pull, cost * self.unit[..., 0]

    def __call__(self, error: np.ndarray) -> np.ndarray:
        """The objective of each row, float64 [G * R]."""
        return self.pull(error)[1].reshape(-1)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product of each row with another, summed in float64."""
    return np.asarray(np.einsum("gok,gok->go", a, b, dtype=np.float64))
