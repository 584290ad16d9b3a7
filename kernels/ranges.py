"""Ranges of tensors from their histograms, and the noise that a quantizer adds.

A histogram is what `onnxq.kernels.observe` counts: int64 bins, the grid [minimum, maximum,
exponent, offset], and the number of exact zeros. Within a bin the values are taken as uniform,
except that exact zeros are exactly zero: they lie on every grid and cost nothing. Outer bins end at
the observed extremes. Every range [low, high] given back contains 0 and lies within the observed
values and 0.

A quantizer of that range has ``levels`` points, ``scale = (high - low) / (levels - 1)`` apart,
moved by at most half a step so that zero is one of them.
"""

from __future__ import annotations

from math import inf, log

import numpy as np

from onnxq.kernels._jit import kernel
from onnxq.kernels.observe import MIN_EXPONENT, merge

__all__ = ["entropy", "mse", "noise", "percentile"]

# Narrower parts of a bin count as points: integrals over them would be differences of equals.
_NARROW = 1 / 1024

# The search for the least error shrinks the extremes by this factor, which then tends to 1.
_STEP = 1.3
_STEPS = 17  # down to about a hundredth of the extremes
_REFINEMENTS = 7

_STRIDES = 16  # coarse steps in each direction of the search for the least divergence
_SMOOTH = 1e-4  # values that a level without any counts as holding


def percentile(
    bins: np.ndarray, grid: np.ndarray, zeros: int, percent: float
) -> tuple[float, float]:
    """The range that holds the middle `percent` of the values, as many cut off below as above.

    Right to a bin.

    Args:
        bins: int64 [n].
        grid: float64 [4].
        zeros: How many values are exactly zero.
        percent: From 0 to 100.
    """
    total = int(bins.sum())
    if total == 0:
        return 0.0, 0.0
    if percent >= 100.0:
        return min(float(grid[0]), 0.0), max(float(grid[1]), 0.0)
    cut = min((100.0 - percent) / 200.0, 0.5) * (total - 1)
    edges, _ = _edges(grid)
    below = np.concatenate([[0], np.cumsum(bins)])
    values = []
    for rank in (cut, total - 1 - cut):
        i = int(np.searchsorted(below, rank + 0.5, side="left")) - 1
        i = min(max(i, 0), edges.size - 2)
        exact = zeros if i == -int(grid[3]) else 0  # the zero bin starts at 0, and so do its values
        inner = max(rank + 0.5 - below[i] - exact, 0.0) / max(bins[i] - exact, 1)
        values.append(float(edges[i] + min(inner, 1.0) * (edges[i + 1] - edges[i])))
    return min(values[0], 0.0), max(values[1], 0.0)


def noise(
    bins: np.ndarray, grid: np.ndarray, zeros: int, low: float, high: float, levels: int
) -> float:
    """Expected squared error of quantizing one value: rounding within the range, clipping beyond.

    Args:
        bins: int64 [n].
        grid: float64 [4].
        zeros: How many values are exactly zero.
        low: Least value of the range, at most 0.
        high: Greatest value of the range, at least 0.
        levels: Number of grid points, at least 2.
    """
    total = int(bins.sum())
    if total == 0:
        return 0.0
    # plain numbers: others would have the kernel compiled anew
    weights = _weights(bins, grid, zeros)
    return _noise(*weights, float(low), float(high), int(levels)) / total


def mse(
    bins: np.ndarray, grid: np.ndarray, zeros: int, levels: int, symmetric: bool = False
) -> tuple[float, float]:
    """The range of the least expected squared error, never worse than the whole range.

    Both ends are searched, coarse to fine, over the noise that `noise` tells.

    Args:
        bins: int64 [n].
        grid: float64 [4].
        zeros: How many values are exactly zero.
        levels: Number of grid points, at least 2; odd ones for symmetric grids.
        symmetric: Whether the quantizer's range is [-m, m], m the larger magnitude given back.
    """
    if not bins.any():
        return 0.0, 0.0
    low, high, levels = min(float(grid[0]), 0.0), max(float(grid[1]), 0.0), int(levels)
    weights = _weights(bins, grid, zeros)
    if symmetric:
        bound = max(-low, high)
        _, bound = _least_noise(*weights, -bound, bound, levels, True)
        return max(-bound, low), min(bound, high)
    return _least_noise(*weights, low, high, levels, False)


def entropy(
    bins: np.ndarray, grid: np.ndarray, zeros: int, levels: int, symmetric: bool = False
) -> tuple[float, float]:
    """The range that loses least information: TensorRT's construction for two-sided histograms.

    The clipped histogram, outliers piled onto its ends, against the same slice without them,
    averaged over each of the quantizer's levels: the range with the least Kullback-Leibler
    divergence between the two. Exact zeros are left out. The range spans a bin per level or more.
    Unlike there, the slice is not scaled up to the mass of the whole: a slice of nothing but
    outliers would look perfect.

    Source: S. Migacz, 8-bit Inference with TensorRT, GTC 2017.

    Args:
        bins: int64 [n].
        grid: float64 [4].
        zeros: How many values are exactly zero.
        levels: Number of grid points, at least 2.
        symmetric: Whether the quantizer's range is [-m, m], m the larger magnitude given back.
    """
    if int(bins.sum()) == zeros:
        return 0.0, 0.0
    counts = np.zeros_like(bins)
    around = np.array([0.0, 0.0, MIN_EXPONENT, 0.0])
    merge(counts, around, bins, grid)  # bins from the least value to the greatest, and zero
    edges, _ = _edges(around)
    counts, zero = counts[: edges.size - 1], -int(around[3])
    counts[zero] -= zeros
    start, stop = _least_divergence(counts, zero, int(levels), bool(symmetric))
    return float(edges[start]), float(edges[stop])


def _edges(grid: np.ndarray) -> tuple[np.ndarray, float]:
    """Edges of the bins from the least to the greatest value, and the width of whole bins."""
    width = 2.0 ** grid[2]
    last = np.floor(grid[1] / width)
    edges = np.arange(grid[3], last + 2) * width
    edges[0], edges[-1] = grid[0], grid[1]
    return edges, width


def _weights(
    bins: np.ndarray, grid: np.ndarray, zeros: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The density of the values as weights of an antiderivative at the edges, and as points.

    The integral of ``density * error`` is a sum over bins of ``d[i] (F(e[i + 1]) - F(e[i]))``, and
    so a sum over edges of ``F(e[i]) (d[i - 1] - d[i])``: one F per edge.
    """
    edges, width = _edges(grid)
    mass = bins[: edges.size - 1].astype(np.float64)
    zero = -int(grid[3])
    if 0 <= zero < mass.size:
        mass[zero] -= zeros
    widths = np.diff(edges)
    narrow = widths < _NARROW * width
    points = edges[:-1][narrow] + widths[narrow] / 2
    masses = mass[narrow]
    density = np.where(narrow, 0.0, mass) / np.where(narrow, 1.0, widths)
    weights = np.diff(-density, prepend=0.0, append=0.0)
    return edges, weights, points, masses


@kernel(any_order=True)
def _noise(
    edges: np.ndarray,
    weights: np.ndarray,
    points: np.ndarray,
    masses: np.ndarray,
    low: float,
    high: float,
    levels: int,
) -> float:
    """Summed squared error on the grid that holds zero."""
    scale = (high - low) / (levels - 1)
    inverse = 1.0 / scale if scale > 0.0 else 0.0
    zero = min(max(np.rint(-low * inverse), 0.0), levels - 1.0)
    low, high = -zero * scale, (levels - 1.0 - zero) * scale
    total: float = 0.0
    for i in range(edges.size):
        x = edges[i]
        inside = min(max(x, low), high)
        beyond = x - inside
        u = inside * inverse
        k = np.rint(u)
        r = u - k
        # antiderivative of the squared error: rounding is periodic in the grid, clipping cubic
        f = scale * scale * scale * (k / 12.0 + r * r * r / 3.0) + beyond * beyond * beyond / 3.0
        total += weights[i] * f
    for i in range(points.size):
        x = points[i]
        inside = min(max(np.rint(x * inverse) * scale, low), high)
        total += masses[i] * (x - inside) ** 2
    return total


@kernel
def _least_noise(
    edges: np.ndarray,
    weights: np.ndarray,
    points: np.ndarray,
    masses: np.ndarray,
    low: float,
    high: float,
    levels: int,
    tied: bool,
) -> tuple[float, float]:
    """The ends, no wider than low <= 0 <= high, of the least noise; tied: low is -high."""
    rows = 1 if tied or low == 0.0 else _STEPS + 1
    columns = 1 if high == 0.0 else _STEPS + 1
    best, least, greatest = inf, low, high
    for row in range(rows):
        a = low * _STEP**-row if row < _STEPS else 0.0
        for column in range(columns):
            b = high * _STEP**-column if column < _STEPS else 0.0
            error = _noise(edges, weights, points, masses, -b if tied else a, b, levels)
            if error < best:
                best, least, greatest = error, -b if tied else a, b
    step = _STEP
    for _ in range(_REFINEMENTS):
        step = step**0.5
        a0, b0 = least, greatest
        for row in range(-1, 2):
            a = max(a0 * step**row, low)
            for column in range(-1, 2):
                b = min(b0 * step**column, high)
                error = _noise(edges, weights, points, masses, -b if tied else a, b, levels)
                if error < best:
                    best, least, greatest = error, -b if tied else a, b
    return least, greatest


@kernel
def _least_divergence(counts: np.ndarray, zero: int, levels: int, tied: bool) -> tuple[int, int]:
    """First bin, and one beyond the last, of the slice with the least divergence."""
    n = counts.size
    span = 2 * max(zero, n - zero) if tied else n
    if span <= levels:
        return 0, n
    mass = np.zeros(n + 1)  # up to each bin: values, bins with values, sum of p log p
    used = np.zeros(n + 1, np.int64)
    plogp = np.zeros(n + 1)
    for i in range(n):
        c = np.float64(counts[i])
        mass[i + 1] = mass[i] + c
        used[i + 1] = used[i] + (c > 0)
        plogp[i + 1] = plogp[i] + _xlogx(c)

    down, up = (span // 2, span // 2) if tied else (zero, n - zero)
    rows = 0 if tied else min(_STRIDES, down)
    columns = min(_STRIDES if rows > 0 else 8 * _STRIDES, up)
    best, below, above = inf, down, up
    for row in range(rows + 1):
        for column in range(columns + 1):
            b = up - up * column // max(columns, 1)
            a = b if tied else down - down * row // max(rows, 1)
            if a + b >= levels:
                found = _divergence(counts, mass, used, plogp, zero, a, b, levels)
                if found < best:
                    best, below, above = found, a, b
    stride = 1 + max(down // max(rows, 1), up // max(columns, 1))
    while stride > 1:
        stride = (stride + 1) // 2 if stride > 2 else 1
        a0, b0 = below, above
        for row in range(-1, 2):
            for column in range(-1, 2):
                b = min(max(b0 + column * stride, 0), up)
                a = b if tied else min(max(a0 + row * stride, 0), down)
                if a + b >= levels:
                    found = _divergence(counts, mass, used, plogp, zero, a, b, levels)
                    if found < best:
                        best, below, above = found, a, b
    return max(zero - below, 0), min(zero + above, n)


@kernel
def _divergence(
    counts: np.ndarray,
    mass: np.ndarray,
    used: np.ndarray,
    plogp: np.ndarray,
    zero: int,
    below: int,
    above: int,
    levels: int,
) -> float:
    """Divergence of the levels' averages from the histogram clipped around zero."""
    n = counts.size
    start, stop = max(zero - below, 0), min(zero + above, n)
    if mass[start] == mass[stop]:
        return inf
    left, right = mass[start], mass[n] - mass[stop]
    first, last = np.float64(counts[start]), np.float64(counts[stop - 1])
    entropy = plogp[stop] - plogp[start]
    if stop - start == 1:
        entropy += _xlogx(first + left + right) - _xlogx(first)
    else:
        entropy += _xlogx(first + left) - _xlogx(first) + _xlogx(last + right) - _xlogx(last)
    cross = 0.0
    for level in range(levels):
        i = max(zero - below + (below + above) * level // levels, start)
        j = min(zero - below + (below + above) * (level + 1) // levels, stop)
        if i >= j:
            continue
        q = mass[j] - mass[i]
        p, holders = q, used[j] - used[i]
        if i == start:
            p += left
            holders += left > 0.0 and first == 0.0
        if j == stop:
            p += right
            holders += right > 0.0 and last == 0.0
        if p > 0.0:
            cross += p * log(max(q, _SMOOTH) / holders)
    divergence: float = (entropy - cross) / mass[n]
    return divergence


@kernel
def _xlogx(x: float) -> float:
    return x * log(x) if x > 0.0 else 0.0
