"""Annealing against trying all, and its promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.kernels.annealing import anneal, objective


def problem(rows, columns, seed, *, rank=None, linear=False, groups=None):
    """Weight, scale, zero, limits, H and g0: 4 bits, some weights beyond the grid."""
    rng = np.random.default_rng(seed)
    lead = () if groups is None else (groups,)
    weight = rng.normal(size=(*lead, rows, columns)).astype(np.float32)
    count = rows * (groups or 1)
    scale = rng.uniform(0.15, 0.5, count).astype(np.float32)
    zero = rng.integers(-3, 4, count).astype(np.int32)
    x = rng.normal(size=(*lead, rank or 3 * columns, columns)) + 1.0
    x *= rng.uniform(size=columns) > 0.1  # some are constantly 0
    gram = x.swapaxes(-1, -2) @ x / x.shape[-2]
    g0 = rng.normal(size=weight.shape).astype(np.float32) @ gram * 0.1 if linear else None
    return (weight, scale, zero, -8, 7, gram), g0 if g0 is None else g0.astype(np.float32)


def choices(weight, scale, zero, qmin, qmax, gram):
    """The values of both choices, and those of rounding to nearest."""
    s, z = (a.reshape(*weight.shape[:-1], 1) for a in (scale, zero))
    steps = weight.astype(np.float64) / s
    three = np.floor(steps), np.ceil(steps), np.rint(weight / s)
    return [(np.clip(q, qmin - z, qmax - z) * s).astype(np.float32) for q in three]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_small_rows_are_solved_exactly(rank, linear):
    args, g0 = problem(6, 9, 3, rank=rank, linear=linear)
    got = anneal(*args, g0)
    low, high, _ = choices(*args)
    least = np.full(6, np.inf)
    for bits in itertools.product([False, True], repeat=9):
        error = np.where(bits, high, low).astype(np.float64) - args[0]
        least = np.minimum(least, objective(error, args[-1], g0))
    cost = objective(got.astype(np.float64) - args[0], args[-1], g0)
    np.testing.assert_allclose(cost, least, rtol=1e-5, atol=1e-6)


@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(0, 99),
    st.integers(1, 30),
    st.booleans(),
    st.sampled_from([None, 1, 3]),
)
def test_no_row_is_worse_than_nearest(rows, columns, seed, rank, linear, groups):
    args, g0 = problem(rows, columns, seed, rank=rank, linear=linear, groups=groups)
    got = anneal(*args, g0, sweeps=20)
    low, high, nearest = choices(*args)
    assert got.dtype == np.float32
    assert np.all((got == low) | (got == high))
    cost, before = (
        objective(values.astype(np.float64) - args[0], args[-1], g0) for values in (got, nearest)
    )
    assert np.all(cost <= before)
