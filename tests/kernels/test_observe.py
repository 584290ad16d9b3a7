from math import floor, inf, ldexp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.kernels import observe as kernels

SMALL = 16  # bins: growth and merging happen all the time

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
everyday = st.floats(-8, 8, width=32)
tiny = st.floats(-(2.0**-125), 2.0**-125, width=32, allow_subnormal=True)
spiky = st.sampled_from([0.0, -0.0, 1.0, -1.0, 6.0, 0.5, 1e-45, -1e-45, 3e38])
lengths = st.integers(0, 50)


quietly = np.errstate(invalid="ignore")  # run as Python, kernels warn of inf - inf


def vectors(elements):
    return hnp.arrays(np.float32, lengths, elements=elements)


anything = st.one_of(*(vectors(e) for e in (finite, everyday, tiny, spiky, st.just(3.25))))


def histogram(*parts, bins=SMALL):
    counts, grid = np.zeros(bins, np.int64), kernels.empty_grid()
    for part in parts:
        kernels.observe(part, counts, grid)
    return counts, grid


def reference(x, bins=SMALL):
    """Counts and grid from the definition, in float64, which holds every product exactly."""
    x = x.astype(np.float64)
    low, high = float(x.min()) + 0.0, float(x.max()) + 0.0
    exponent = kernels.MIN_EXPONENT
    while True:
        first, last = floor(ldexp(low, -exponent)), floor(ldexp(high, -exponent))
        if last - first < bins and max(-first, last) <= 1 << 24:
            break
        exponent += 1
    index = np.floor(np.ldexp(x, -exponent)).astype(np.int64) - first
    return np.bincount(index, minlength=bins), np.array([low, high, exponent, first])


def assert_same(a, b):
    np.testing.assert_array_equal(a[1], b[1])
    np.testing.assert_array_equal(a[0], b[0])


@given(anything)
def test_moments_match_numpy(x):
    found = kernels.moments(x)
    assert found.size == x.size
    assert found.minimum == x.min(initial=inf)
    assert found.maximum == x.max(initial=-inf)
    assert found.zeros == np.count_nonzero(x == 0)
    assert found.strange == 0
    wide = x.astype(np.float64)
    assert found.total == pytest.approx(wide.sum(), rel=1e-12, abs=1e-12 * np.abs(wide).sum())
    assert found.squares == pytest.approx((wide * wide).sum(), rel=1e-12)


@given(anything)
def test_moments_are_those_of_the_histogram(x):
    counts, grid = np.zeros(SMALL, np.int64), kernels.empty_grid()
    assert kernels.observe(x, counts, grid) == kernels.moments(x)
    assert counts.sum() == x.size


@given(anything.filter(len), st.sampled_from([2, 3, SMALL, kernels.BINS]))
def test_histogram_matches_its_definition(x, bins):
    assert_same(histogram(x, bins=bins), reference(x, bins))


@given(anything, st.randoms(use_true_random=False), st.lists(lengths, max_size=3))
def test_neither_order_nor_splitting_matters(x, random, cuts):
    shuffled = x.copy()
    random.shuffle(shuffled)
    assert_same(histogram(*np.split(shuffled, sorted(cuts))), histogram(x))


@given(anything, anything, anything)
def test_merging_is_counting_it_all(x, y, z):
    counts, grid = histogram(x)
    kernels.merge(counts, grid, *histogram(y, z))
    assert_same((counts, grid), histogram(np.concatenate([x, y, z])))


def test_merging_leaves_the_other_alone():
    counts, grid = histogram(np.float32([1, 2]))
    other = histogram(np.float32([-100]))
    before = other[0].copy(), other[1].copy()
    kernels.merge(counts, grid, *other)
    assert_same(other, before)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 70_000])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e6])
def test_blocks(size, spread):
    rng = np.random.default_rng(size)
    x = (np.maximum(rng.normal(size=size), -0.5) * spread).astype(np.float32)
    x[:: max(size // 7, 2)] = 0
    found = kernels.moments(x)
    wide = x.astype(np.float64)
    assert found.total == pytest.approx(wide.sum(), rel=1e-9)
    assert found.squares == pytest.approx((wide * wide).sum(), rel=1e-12)
    assert_same(histogram(x, bins=kernels.BINS), reference(x, kernels.BINS))


def test_growing_data():
    x = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
    x = np.concatenate([x, -x])
    parts = [x[i : i + 1] for i in range(x.size)]
    assert_same(histogram(*parts), reference(x))
    assert_same(histogram(*parts[::-1]), reference(x))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -7.5, 1e-45, -1e-45, 3.4e38, -3.4e38])
def test_constant(value):
    x = np.full(5000, value, np.float32)
    counts, grid = histogram(x)
    assert_same((counts, grid), reference(x))
    assert counts[0] == x.size  # one bin, and it begins at or just below the value
    assert ldexp(grid[3], int(grid[2])) <= float(x[0]) < ldexp(grid[3] + 1, int(grid[2]))


def test_negative_values_too_small_for_the_bins_stay_negative():
    counts, grid = histogram(np.float32([-1e-45, 1e-45, 1e30, -1e30]))
    zero = -int(grid[3])
    assert counts[zero - 1] == 1
    assert counts[zero] == 1


def test_empty_array():
    counts, grid = histogram(np.empty((0, 3), np.float32))
    assert not counts.any()
    np.testing.assert_array_equal(grid, kernels.empty_grid())
    assert kernels.moments(np.empty(0, np.float32)).size == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
@pytest.mark.parametrize("size", [0, 1, 200_000])
def test_other_types_are_taken_as_float32(dtype, size):
    x = np.random.default_rng(0).normal(size=size).astype(dtype)
    expected, found = kernels.moments(x.astype(np.float32)), kernels.moments(x)
    assert found == pytest.approx(expected, rel=1e-12)
    assert_same(histogram(x), histogram(x.astype(np.float32)))


def test_layouts():
    x = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
    frozen = x.copy()
    frozen.flags.writeable = False
    for view in (x.T, x[::-1], np.asfortranarray(x), frozen):
        assert_same(histogram(view), histogram(x))
    assert_same(histogram(x[:, ::2]), histogram(x[:, ::2].copy()))


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 4999, 9999])
@quietly
def test_values_that_are_not_finite_are_counted(bad, where):
    x = np.ones(10_000, np.float32)
    x[where] = bad
    assert kernels.moments(x).strange == 1
    assert kernels.observe(x, np.zeros(SMALL, np.int64), kernels.empty_grid()).strange == 1


@quietly
def test_float64_beyond_float32_is_not_finite():
    assert kernels.moments(np.array([1.0, 1e300, -1e300])).strange == 2


@given(anything.filter(len), anything, st.sampled_from([1, 2, 7, 4096]))
@quietly
def test_tally_is_the_histogram_of_numpy(x, y, bins):
    low, high = float(x.min()), float(x.max())
    edges = np.linspace(low, high if low < high else 2 * abs(low) + 1, bins + 1)
    with np.errstate(over="ignore"):  # the edge beyond the greatest float32
        every = np.concatenate([x, y, edges.astype(np.float32)])
    np.testing.assert_array_equal(kernels.tally(every, edges), np.histogram(every, edges)[0])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_tally_of_many_values(dtype):
    x = np.random.default_rng(0).normal(size=(3, 50_000)).astype(dtype)[:, ::2]
    edges = np.linspace(-2, 3, 4097)
    wanted = np.histogram(x.astype(np.float32), edges)[0]
    np.testing.assert_array_equal(kernels.tally(x, edges), wanted)


def test_tally_leaves_out_what_is_no_number():
    x = np.array([np.nan, -np.inf, np.inf, 0.5, 1, 0], np.float32)
    np.testing.assert_array_equal(kernels.tally(x, np.array([0.0, 0.5, 1.0])), [1, 2])
