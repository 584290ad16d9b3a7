"""One read of a tensor: extremes, sums, exact zeros, and a histogram that grows by powers of two.

The histogram of a tensor has bins of width ``w = 2**exponent``; bin ``i`` counts the values with
``floor(x / w) == offset + i``. The grid follows from the extremes seen so far and nothing else: the
exponent is the smallest that fits them into the bins, the offset is ``floor(minimum / w)``.
Widening a bin merges neighbours exactly, since ``floor(floor(x / w) / 2) == floor(x / (2 w))``. So
the counts depend neither on the order of the data nor on how it was split.

A value is read from memory once: a block that fits the first-level cache is summed up, turned into
bin numbers by vector instructions, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import floor, frexp, inf, ldexp
from typing import NamedTuple

import numpy as np

from onnxq.kernels._jit import kernel, read_only

__all__ = [
    "BINS",
    "MIN_EXPONENT",
    "Moments",
    "empty_grid",
    "merge",
    "moments",
    "observe",
    "tally",
]

BINS = 2048

# w stays a normal float32 with a normal inverse, and bin numbers stay exact in float32
MIN_EXPONENT = -126
_MAX_INDEX = 1 << 24
_LEAST = 2.0**-200  # below every float32

_BLOCK = 1024  # values; with their bin numbers and all counters 16 KiB
_SPARE = 16  # bins that take the zeros
_FLUSH = 1 << 30  # values after which the counters, of 32 bits, are emptied
_CONVERT = 1 << 16  # values converted to float32 at a time

# Numba adds and masks at 64 bits unless every result is cast; at 32 twice as many fit a vector.
_SIGN = np.int32(31)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_ZERO = np.float32(0)
_NONE = np.int32(0)
_BELOW = np.int32(-1)
_LOWEST_INT = np.int32(-0x80000000)

_Numbers = tuple[int, float, float, float, float, int, int]  # the fields of Moments


class Moments(NamedTuple):
    """What one read of a tensor finds besides the histogram.

    Args:
        size: Number of values.
        minimum: Least value; +inf where there is none.
        maximum: Greatest value; -inf where there is none.
        total: Sum of the values, added up in float64.
        squares: Sum of the squares.
        zeros: How many values are exactly zero.
        strange: How many are NaN or infinite. If any is, the other fields mean nothing.
    """

    size: int
    minimum: float
    maximum: float
    total: float
    squares: float
    zeros: int
    strange: int


def empty_grid() -> np.ndarray:
    """Of a histogram without values: float64 [minimum, maximum, exponent, offset]."""
    return np.array([inf, -inf, MIN_EXPONENT, 0.0])


_NO_GRID = empty_grid()


def observe(x: np.ndarray, bins: np.ndarray, grid: np.ndarray) -> Moments:
    """Read a tensor once and count its values into a histogram.

    Args:
        x: float16, float32 or float64, any shape; taken as float32.
        bins: int64 [n], n >= 2, updated in place; [0] counts nothing.
        grid: float64 [4] as `empty_grid` gives it, updated in place.
    """
    parts = [Moments(*_observe(part, bins, grid)) for part in _float32(x)]
    return parts[0] if len(parts) == 1 else _joined(parts)


def moments(x: np.ndarray) -> Moments:
    """Read a tensor once, without a histogram: `observe` with no bins."""
    return observe(x, np.empty(0, np.int64), _NO_GRID)


def merge(bins: np.ndarray, grid: np.ndarray, other: np.ndarray, other_grid: np.ndarray) -> None:
    """Add another histogram to one of as many bins, in place, as if it had counted all the data."""
    if other_grid[0] <= other_grid[1]:
        _include(bins, grid, other_grid[0], other_grid[1])
        _add(bins, grid, other, other_grid)


def tally(x: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count values between edges as `np.histogram` does, in a tenth of its time.

    Args:
        x: float16, float32 or float64, any shape; taken as float32. Values beyond the edges, NaN
            among them, are left out.
        edges: float64 [n + 1], rising, about as far apart as `np.linspace` puts them.

    Returns:
        int64 [n].
    """
    counts = np.zeros(edges.size - 1, np.int64)
    for part in _float32(x):
        _tally(part, read_only(edges), counts)
    return counts


def _float32(x: np.ndarray) -> Iterator[np.ndarray]:
    """The values as float32 vectors of the one layout that kernels are compiled for."""
    flat = x.reshape(-1)
    if flat.dtype == np.float32:
        yield flat if flat.flags.carray else flat.copy()
    else:
        for start in range(0, max(flat.size, 1), _CONVERT):
            with np.errstate(over="ignore"):  # becomes inf, and is counted as such
                yield flat[start : start + _CONVERT].astype(np.float32)


def _joined(parts: list[Moments]) -> Moments:
    sizes, minima, maxima, totals, squares, zeros, strange = zip(*parts, strict=True)
    return Moments(
        sum(sizes), min(minima), max(maxima), sum(totals), sum(squares), sum(zeros), sum(strange)
    )


@kernel
def _observe(x: np.ndarray, bins: np.ndarray, grid: np.ndarray) -> _Numbers:
    bits = x.view(np.int32)
    low, high = inf, -inf
    total, squares = 0.0, 0.0
    zeros, strange = 0, 0
    index = np.empty(_BLOCK, np.uint32)
    counts = np.zeros(bins.size + _SPARE, np.uint32)
    for start in range(0, x.size, _BLOCK):
        stop = min(start + _BLOCK, x.size)
        block = x[start:stop]
        least, greatest, s, q, z = _summary(block, bits[start:stop])
        if greatest >= _INFINITY or least < -_INFINITY:
            strange += _count_strange(bits[start:stop])
            continue
        a, b = _value(least), _value(greatest)
        if bins.size:
            grows = a < grid[0] or b > grid[1]
            if grows or start % _FLUSH == 0:
                _flush(counts, bins)
            if grows:
                _include(bins, grid, a, b)
            inverse = np.float32(ldexp(1.0, -int(grid[2])))
            _index(block, bits[start:stop], inverse, int(grid[3]), bins.size, index)
            for i in range(stop - start):
                counts[index[i]] += np.uint32(1)
            if z:
                counts[-int(grid[3])] += np.uint32(z)
        low = min(low, a)
        high = max(high, b)
        total += s
        squares += q
        zeros += int(z)
    _flush(counts, bins)
    return x.size, low, high, total, squares, zeros, strange


@kernel
def _tally(x: np.ndarray, edges: np.ndarray, counts: np.ndarray) -> None:
    last = counts.size - 1
    low, high = edges[0], edges[last + 1]
    inverse = counts.size / (high - low)
    for i in range(x.size):
        v = np.float64(x[i])
        if low <= v <= high:
            k = min(int((v - low) * inverse), last)
            while v < edges[k]:  # rounding may have led one bin too far
                k -= 1
            while k < last and v >= edges[k + 1]:
                k += 1
            counts[k] += 1


@kernel(any_order=True)
def _summary(x: np.ndarray, bits: np.ndarray) -> tuple[np.int32, np.int32, float, float, np.int32]:
    """Extremes as ordered integers, sum, sum of squares and zeros of one block."""
    least, greatest = _MAGNITUDE, _LOWEST_INT
    total, squares = 0.0, 0.0
    zeros = _NONE
    for i in range(x.size):
        b = bits[i]
        # integers that are in the order of the floats: exact and vectorized, NaN beyond infinity
        key = np.int32(b ^ np.int32(np.int32(b >> _SIGN) & _MAGNITUDE))
        least = np.int32(min(least, key))
        greatest = np.int32(max(greatest, key))
        zeros = np.int32(zeros + np.int32(np.int32(b & _MAGNITUDE) == _NONE))
        v = np.float64(x[i])
        total += v
        squares += v * v
    return least, greatest, total, squares, zeros


@kernel
def _value(key: np.int32) -> float:
    """The float of an ordered integer."""
    bits = np.empty(1, np.int32)
    bits[0] = key ^ ((key >> _SIGN) & _MAGNITUDE)
    return np.float64(bits.view(np.float32)[0]) + 0.0  # no negative zero


@kernel
def _count_strange(bits: np.ndarray) -> int:
    count = 0
    for i in range(bits.size):
        count += (bits[i] & _INFINITY) == _INFINITY
    return count


@kernel
def _index(
    x: np.ndarray, bits: np.ndarray, inverse: np.float32, offset: int, bins: int, index: np.ndarray
) -> None:
    """Bin numbers of a block; zeros go to the spare bins in turn.

    Zeros are counted already. Left to one bin, a mixture of zeros and others stalls the processor,
    which cannot foresee which increments touch the same address.
    """
    first, spare = np.int32(offset), np.int32(bins)
    for i in range(x.size):
        v = x[i]
        k = np.int32(np.floor(v * inverse))
        if v < _ZERO and k == _NONE:  # the product was too small for a float32
            k = _BELOW
        k = np.int32(k - first)
        if np.int32(bits[i] & _MAGNITUDE) == _NONE:  # to the bit, also where floats flush to zero
            k = np.int32(spare + np.int32(i % _SPARE))
        index[i] = np.uint32(k)


@kernel
def _flush(counts: np.ndarray, bins: np.ndarray) -> None:
    for i in range(bins.size):
        bins[i] += counts[i]
    counts[:] = 0


@kernel
def _include(bins: np.ndarray, grid: np.ndarray, low: float, high: float) -> None:
    """Widen the grid to hold low <= high, and move the counts."""
    before = grid.copy()
    grid[0] = min(grid[0], low)
    grid[1] = max(grid[1], high)
    exponent = _exponent(grid[0], grid[1], bins.size)
    grid[2] = exponent
    grid[3] = floor(ldexp(grid[0], -exponent))
    if before[0] <= before[1] and (before[2] != grid[2] or before[3] != grid[3]):
        counted = bins.copy()
        bins[:] = 0
        _add(bins, grid, counted, before)


@kernel
def _exponent(low: float, high: float, bins: int) -> int:
    """The least exponent whose bins hold low <= high."""
    largest = max(abs(low), abs(high), _LEAST)
    step = max((high - low) / bins, _LEAST)
    exponent = max(frexp(largest)[1] - 25, frexp(step)[1] - 2, MIN_EXPONENT)
    while True:
        a, b = floor(ldexp(low, -exponent)), floor(ldexp(high, -exponent))
        if b - a < bins and a >= -_MAX_INDEX and b <= _MAX_INDEX:
            return exponent
        exponent += 1


@kernel
def _add(bins: np.ndarray, grid: np.ndarray, other: np.ndarray, other_grid: np.ndarray) -> None:
    """Add counts of a grid that is as fine or finer, and lies within."""
    offset, other_offset = int(grid[3]), int(other_grid[3])
    shift = min(int(grid[2]) - int(other_grid[2]), 62)
    for i in range(other.size):
        if other[i]:
            bins[((other_offset + i) >> shift) - offset] += other[i]
