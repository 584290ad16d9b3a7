from itertools import pairwise
from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.kernels import observe, ranges

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
everyday = st.floats(-8, 8, width=32)
spiky = st.sampled_from([0.0, 1.0, -1.0, 6.0, 0.5, 1e-45, -1e-45, 3e38])
anything = st.one_of(
    hnp.arrays(np.float32, st.integers(1, 60), elements=e) for e in (finite, everyday, spiky)
)
levels = st.sampled_from([3, 4, 15, 16, 255, 256, 65536])


def draw(kind, size=20_000):
    rng = np.random.default_rng(1)
    x = rng.normal(size=size)
    match kind:
        case "relu":
            x = np.maximum(x, 0)
        case "relu6":
            x = np.clip(4 * x, 0, 6)
        case "swish":
            x = 3 * x / (1 + np.exp(-3 * x))
        case "outliers":
            x = np.concatenate([x, [40, 80]])
        case "laplace":
            x = rng.laplace(0.4, 1, size)
        case "negative":
            x = -np.abs(x) - 3
        case "far":
            x = 1000 + x
        case "few":
            x = rng.integers(-2, 6, size) / 4
    return x.astype(np.float32)


KINDS = ("normal", "relu", "relu6", "swish", "outliers", "laplace", "negative", "far", "few")


def histogram(x, bins=observe.BINS):
    counts, grid = np.zeros(bins, np.int64), observe.empty_grid()
    return counts, grid, observe.observe(x, counts, grid).zeros


def on_grid(x, low, high, levels):
    """The values on the grid of a range that holds zero, from the definition."""
    scale = (high - low) / (levels - 1)
    if scale == 0:
        return np.zeros_like(x)
    zero = np.clip(np.rint(-low / scale), 0, levels - 1)
    return scale * np.clip(np.rint(x / scale), -zero, levels - 1 - zero)


def error(x, low, high, levels):
    x = x.astype(np.float64)
    return np.mean((on_grid(x, low, high, levels) - x) ** 2)


def spread(bins, grid, zeros, per_bin=501):
    """Values that stand for a histogram: evenly spread in each bin, zeros at zero; and weights."""
    width = 2.0 ** grid[2]
    values, weights = [0.0], [float(zeros)]
    for i in np.flatnonzero(bins):
        low, high = (grid[3] + i) * width, (grid[3] + i + 1) * width
        low, high = max(low, grid[0]), min(high, grid[1])
        count = bins[i] - (zeros if grid[3] + i == 0 else 0)
        values.extend(low + (np.arange(per_bin) + 0.5) / per_bin * (high - low))
        weights.extend([count / per_bin] * per_bin)
    return np.array(values), np.array(weights)


# ------------------------------------------------------------------ noise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins", [64, 2048])
def test_noise_is_the_integral_over_the_histogram(kind, bins):
    counts, grid, zeros = histogram(draw(kind), bins)
    x, weights = spread(counts, grid, zeros)
    low, high = min(grid[0], 0), max(grid[1], 0)
    for a, b in ((low, high), (low / 2, high), (0.7 * low, 0.3 * high), (0.0, 0.0)):
        for n in (2, 16, 256):
            squares = (on_grid(x, a, b, n) - x) ** 2
            expected = np.sum(weights * squares) / counts.sum()
            assert ranges.noise(counts, grid, zeros, a, b, n) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "few"])
def test_noise_predicts_the_error_on_the_values(kind):
    x = draw(kind)
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    for shrink in (1.0, 0.5):
        for n in (16, 256):
            found = ranges.noise(*histogram(x), shrink * low, shrink * high, n)
            assert found == pytest.approx(error(x, shrink * low, shrink * high, n), rel=0.03)


def test_exact_zeros_cost_nothing():
    x = np.zeros(1000, np.float32)
    assert ranges.noise(*histogram(x), -1.0, 2.0, 4) == 0
    x[0] = 1  # on the grid, too
    assert ranges.noise(*histogram(x), -1.0, 2.0, 4) == 0
    x[0] = 0.5
    assert ranges.noise(*histogram(x), -1.0, 2.0, 4) == pytest.approx(0.25 / 1000)


def test_clipping_is_exact():
    x = np.array([10.0, 0.0, 0.0, 0.0], np.float32)
    assert ranges.noise(*histogram(x), 0.0, 4.0, 256) == 36 / 4


def test_no_values():
    empty = np.zeros(16, np.int64), observe.empty_grid(), 0
    assert ranges.noise(*empty, -1.0, 1.0, 16) == 0
    assert ranges.mse(*empty, 16) == (0, 0)
    assert ranges.entropy(*empty, 16) == (0, 0)
    assert ranges.percentile(*empty, 99) == (0, 0)


# ------------------------------------------------------------------ all of them


@given(anything, levels, st.sampled_from([16, 2048]))
def test_ranges_hold_zero_and_stay_within_the_values(x, n, bins):
    data = histogram(x, bins)
    found = [ranges.percentile(*data, p) for p in (50, 99.9, 100)]
    for symmetric in (False, True):
        found.append(ranges.mse(*data, n - symmetric, symmetric))
        found.append(ranges.entropy(*data, n - symmetric, symmetric))
    for low, high in found:
        assert min(x.min(), 0) <= low <= 0 <= high <= max(x.max(), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [-90, -3, 40, 110])
def test_powers_of_two_scale_the_ranges(kind, power):
    x = draw(kind, 2000)
    one, other = histogram(x), histogram(np.ldexp(x, power))
    for n in (16, 255):
        for method in (ranges.mse, ranges.entropy):
            expected = np.ldexp(method(*one, n, n % 2 == 1), power)
            np.testing.assert_allclose(method(*other, n, n % 2 == 1), expected, rtol=1e-6)
    expected = np.ldexp(ranges.percentile(*one, 99), power)
    np.testing.assert_array_equal(ranges.percentile(*other, 99), expected)


# ------------------------------------------------------------------ percentile


@given(anything, st.floats(1, 100))
def test_percentile_matches_numpy_to_a_bin(x, percent):
    counts, grid, zeros = histogram(x)
    width = 2.0 ** grid[2]
    cut = (100 - percent) / 2
    low, high = ranges.percentile(counts, grid, zeros, percent)
    wide = x.astype(np.float64)
    for found, at, clip in ((low, cut, np.minimum), (high, 100 - cut, np.maximum)):
        lower = clip(np.percentile(wide, max(at - 1e-9, 0), method="lower"), 0)
        higher = clip(np.percentile(wide, min(at + 1e-9, 100), method="higher"), 0)
        assert lower - width <= found <= higher + width


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_the_values(kind):
    x = draw(kind)
    expected = min(x.min(), 0), max(x.max(), 0)
    assert ranges.percentile(*histogram(x), 100) == expected


def test_percentile_keeps_the_zero_spike_at_zero():
    x = draw("relu")
    low, high = ranges.percentile(*histogram(np.concatenate([x, 0 * x])), 40)
    assert low == high == 0


# ------------------------------------------------------------------ mse


@given(anything, levels, st.booleans())
def test_mse_is_never_worse_than_all_of_the_values(x, n, symmetric):
    n -= symmetric and n % 2 == 0
    data = histogram(x)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    least, greatest = ranges.mse(*data, n, symmetric)
    if symmetric:
        bound, found = max(-low, high), max(-least, greatest)
        low, high, least, greatest = -bound, bound, -found, found
    all_of_it = ranges.noise(*data, low, high, n)
    assert ranges.noise(*data, least, greatest, n) <= all_of_it * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [4, 16, 256])
def test_mse_is_about_the_best(kind, n):
    data = histogram(draw(kind))
    low, high = min(data[1][0], 0.0), max(data[1][1], 0.0)
    shares = np.linspace(0, 1, 41)
    best = min(ranges.noise(*data, low * a, high * b, n) for a in shares for b in shares)
    assert ranges.noise(*data, *ranges.mse(*data, n), n) <= 1.03 * best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [15, 255])
def test_symmetric_mse_is_about_the_best(kind, n):
    data = histogram(draw(kind))
    bound = max(-data[1][0], data[1][1])
    best = min(ranges.noise(*data, -bound * a, bound * a, n) for a in np.linspace(0, 1, 201))
    low, high = ranges.mse(*data, n, True)
    found = max(-low, high)
    assert ranges.noise(*data, -found, found, n) <= 1.01 * best


# ------------------------------------------------------------------ entropy


def divergence(counts, start, stop, slices):
    """TensorRT's construction, word for word: the reference clipped, against its averages."""
    p = counts[start:stop].astype(np.float64)
    q = np.zeros_like(p)
    p[0] += counts[:start].sum()
    p[-1] += counts[stop:].sum()
    for a, b in slices:
        holders = np.flatnonzero(p[a:b])
        if holders.size:
            q[a:b][holders] = max(counts[start + a : start + b].sum(), 1e-4) / holders.size
    q /= p.sum()
    p /= p.sum()
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@given(st.data())
def test_divergence_matches_its_definition(data):
    counts = data.draw(hnp.arrays(np.int64, 40, elements=st.sampled_from([0, 0, 1, 2, 50])))
    zero = data.draw(st.integers(0, 39))
    below, above = data.draw(st.integers(0, zero)), data.draw(st.integers(1, 40 - zero))
    n = data.draw(st.integers(2, 20))
    start, stop = zero - below, zero + above
    mass = np.concatenate([[0.0], np.cumsum(counts)])
    used = np.concatenate([[0], np.cumsum(counts > 0)])
    plogp = np.concatenate([[0.0], np.cumsum([c * log(c) if c else 0 for c in counts])])
    found = ranges._divergence(counts, mass, used, plogp, zero, below, above, n)
    if not counts[start:stop].any():
        assert found == np.inf
    else:
        ends = [(stop - start) * i // n for i in range(n + 1)]
        slices = pairwise(ends)
        expected = divergence(counts, start, stop, slices)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_entropy_drops_lonely_outliers():
    low, high = ranges.entropy(*histogram(draw("outliers", 100_000)), 256)
    assert -6 < low < -3
    assert 3 < high < 40


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_entropy_keeps_most_of_the_values(kind, symmetric):
    x = draw(kind)
    low, high = ranges.entropy(*histogram(x), 256 - symmetric, symmetric)
    assert np.mean((x >= low) & (x <= high)) > 0.97


def test_more_levels_than_bins_keep_everything():
    x = draw("normal")
    assert ranges.entropy(*histogram(x), 65536) == (x.min(), x.max())
