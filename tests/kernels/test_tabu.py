"""Annealing against trying all, and its promises."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.kernels.objective import objective
from onnxq.kernels.quantize import fake_quantize
from onnxq.kernels.tabu import choices, short_search, tabu_search


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


def cost(values, args, g0):
    return objective(values.astype(np.float64) - args[0], args[-1], g0)


def test_the_objective_is_the_formula():
    args, g0 = problem(4, 7, 1, linear=True)
    d = np.random.default_rng(1).normal(size=(4, 7)).astype(np.float32)
    wanted = [e @ args[-1] @ e + 2 * e @ g for e, g in zip(d.astype(np.float64), g0, strict=True)]
    np.testing.assert_allclose(objective(d, args[-1], g0), wanted, rtol=1e-12)


def test_choices_are_the_quantizer_s():
    weight, scale, zero, qmin, qmax, _ = problem(5, 60, 8)[0]
    low, high, nearest = choices(weight, scale, zero, qmin, qmax)
    s, z = scale[:, None], zero[:, None]
    wanted = fake_quantize(weight, s, z, qmin, qmax)
    np.testing.assert_array_equal(nearest, wanted)
    inside = (weight > s * (qmin - z)) & (weight < s * (qmax - z))
    assert np.all((low <= weight) & (weight <= high) | ~inside)
    np.testing.assert_array_equal(low[~inside], high[~inside])
    np.testing.assert_allclose(
        (high - low)[inside], np.broadcast_to(s, low.shape)[inside], rtol=1e-5
    )
    assert 0 < np.mean(inside) < 1


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_small_rows_are_solved_exactly(rank, linear):
    args, g0 = problem(6, 9, 3, rank=rank, linear=linear)
    got = tabu_search(*args, g0)
    low, high, _ = choices(*args[:-1])
    least = np.full(6, np.inf)
    for bits in itertools.product([False, True], repeat=9):
        error = np.where(bits, high, low).astype(np.float64) - args[0]
        least = np.minimum(least, objective(error, args[-1], g0))
    np.testing.assert_allclose(cost(got, args, g0), least, rtol=1e-5, atol=1e-6)


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
    got = tabu_search(*args, g0, sweeps=20)
    low, high, nearest = choices(*args[:-1])
    assert got.dtype == np.float32
    assert np.all((got == low) | (got == high))
    assert np.all(cost(got, args, g0) <= cost(nearest, args, g0))


def relu_problem(rows, columns, seed):
    """Correlated inputs as behind a Relu."""
    rng = np.random.default_rng(seed)
    x = np.maximum(
        rng.normal(size=(4000, columns // 4)) @ rng.normal(size=(columns // 4, columns)), 0
    )
    x += 0.1 * rng.normal(size=x.shape)
    gram = np.cov(x.T)
    weight = rng.normal(size=(rows, columns)).astype(np.float32)
    scale = (np.abs(weight).max(axis=1) / 8).astype(np.float32)
    return weight, scale, np.zeros(rows, np.int32), -8, 7, gram


def test_wider_rows_come_near_the_best():
    args, g0 = problem(4, 16, 5, rank=6, linear=True)
    low, high, _ = choices(*args[:-1])
    found = cost(tabu_search(*args, g0), args, g0)
    open_ = low != high
    for row in range(4):
        places = np.flatnonzero(open_[row])
        bits = (np.arange(1 << places.size)[:, None] >> np.arange(places.size)) & 1
        error = np.repeat(low[row : row + 1], len(bits), axis=0).astype(np.float64)
        error[:, places] = np.where(bits, high[row, places], low[row, places])
        error -= args[0][row]
        least = objective(error, args[-1], np.repeat(g0[row : row + 1], len(bits), axis=0)).min()
        assert found[row] <= least + 0.02 * abs(least) + 1e-6


def test_it_beats_descent_by_far():
    args = relu_problem(24, 64, 9)
    descended, searched = (cost(tabu_search(*args, sweeps=s), args, None).sum() for s in (0, None))
    nearest = cost(choices(*args[:-1]).nearest, args, None).sum()
    assert descended < 0.8 * nearest
    assert searched < 0.85 * descended


def test_descent_ends_where_no_move_and_no_pair_improves():
    args, g0 = problem(5, 20, 11, rank=4, linear=True)
    got = tabu_search(*args, g0, sweeps=0)
    low, high, _ = choices(*args[:-1])
    before = cost(got, args, g0)
    for pair in itertools.combinations_with_replacement(range(20), 2):
        other = got.copy()
        for k in set(pair):
            other[:, k] = np.where(got[:, k] == low[:, k], high[:, k], low[:, k])
        assert np.all(cost(other, args, g0) >= before - 1e-4 * np.diag(args[-1]).mean())


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 99), st.sampled_from([0, 2.0]))
def test_no_row_is_worse_than_the_start(rows, columns, seed, sweeps):
    args, g0 = problem(rows, columns, seed, rank=3, linear=True)
    low, high, _ = choices(*args[:-1])
    start = np.where(np.random.default_rng(seed).random(low.shape) < 0.5, low, high)
    got = tabu_search(*args, g0, start, sweeps=sweeps)
    assert np.all(cost(got, args, g0) <= cost(start, args, g0))


def test_a_good_start_is_kept():
    args, g0 = problem(6, 40, 2, linear=True)
    good = tabu_search(*args, g0, sweeps=300)
    again = tabu_search(*args, g0, good, sweeps=1)
    assert np.all(cost(again, args, g0) <= cost(good, args, g0))


def test_threads_and_other_rows_change_nothing():
    args = relu_problem(40, 32, 4)
    one = tabu_search(*args, seed=3)
    np.testing.assert_array_equal(tabu_search(*args, seed=3, threads=3), one)
    weight, scale, zero, *rest = args
    few = tabu_search(weight[:20], scale[:20], zero[:20], *rest, seed=3)
    assert np.mean(few == one[:20]) > 0.99  # but for the order of sums in BLAS
    np.testing.assert_array_equal(tabu_search(*args, seed=3), one)


def test_the_seed_decides():
    args = relu_problem(8, 96, 4)
    first, second = (tabu_search(*args, seed=s, sweeps=2) for s in (3, 4))
    assert np.any(first != second)


def test_groups_are_layers_of_their_own():
    args, g0 = problem(3, 18, 6, linear=True, groups=4)
    weight, scale, zero, qmin, qmax, gram = args
    together = cost(tabu_search(*args, g0), args, g0).reshape(4, 3)
    for g in range(4):
        part = slice(3 * g, 3 * g + 3)
        alone = (weight[g], scale[part], zero[part], qmin, qmax, gram[g])
        apart = cost(tabu_search(*alone, g0[g]), alone, g0[g])
        np.testing.assert_allclose(together[g], apart, rtol=0.05, atol=1e-3)


def test_reach_goes_further_within_the_grid():
    args = relu_problem(16, 24, 13)
    near, far = tabu_search(*args), tabu_search(*args, reach=2)
    assert cost(far, args, None).sum() < cost(near, args, None).sum()
    steps = np.rint(far / args[1][:, None])
    np.testing.assert_allclose(steps * args[1][:, None], far, rtol=1e-6)
    assert steps.min() >= -8
    assert steps.max() <= 7
    assert np.abs(far - args[0]).max() > args[1].max()


def test_constant_inputs_leave_their_weights_at_nearest():
    args = list(relu_problem(6, 20, 1))
    args[-1][:, 5] = args[-1][5, :] = 0
    got = tabu_search(*args)
    np.testing.assert_array_equal(got[:, 5], choices(*args[:-1]).nearest[:, 5])


def test_an_input_that_is_always_zero():
    args = (*relu_problem(3, 20, 1)[:-1], np.zeros((20, 20)))
    np.testing.assert_array_equal(tabu_search(*args), choices(*args[:-1]).nearest)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_units_do_not_matter(scale):
    args = relu_problem(5, 30, 7)
    wanted = tabu_search(*args)
    np.testing.assert_array_equal(tabu_search(*args[:-1], args[-1] * scale), wanted)


def test_arguments_are_left_alone():
    args, g0 = problem(3, 14, 0, linear=True)
    kept = [np.copy(a) for a in (*args, g0)]
    tabu_search(*args, g0, threads=2)
    for before, after in zip(kept, (*args, g0), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("columns", [9, 80])
def test_short_searches_tell_what_they_reach(columns):
    """The start's objective and what the walk gains add up to that of the state it ends in."""
    (weight, scale, zero, qmin, qmax, gram), g0 = problem(24, columns, 2, linear=True)
    scales = [scale * share for share in (0.7, 1.0, 1.3)]
    got = short_search(weight, scales, zero, qmin, qmax, gram, g0, sweeps=0.5, threads=2)
    assert got.shape == (3, 24)
    for s, costs in zip(scales, got, strict=True):
        given = (weight, s.astype(np.float32), zero, qmin, qmax)
        near = objective(choices(*given).nearest.astype(np.float64) - weight, gram, g0)
        best = objective(
            tabu_search(*given, gram, g0, sweeps=50).astype(np.float64) - weight, gram, g0
        )
        assert (costs <= near + 1e-3 * np.abs(near)).all()
        assert costs.sum() < near.sum()
        assert costs.sum() > best.sum() - 1e-3 * abs(best.sum())
        if columns < 12:  # all choices are tried
            np.testing.assert_allclose(costs, best, rtol=1e-3, atol=1e-6 * near.max())


def test_long_rows_are_searched_as_well_in_whole_grains(monkeypatch):
    """H of long rows is read as int16."""
    args, _ = problem(40, 300, 4)
    plain = cost(tabu_search(*args, sweeps=2), args, None)
    monkeypatch.setattr("onnxq.kernels.objective.CACHED", 200)
    short = cost(tabu_search(*args, sweeps=2), args, None)
    assert (short != plain).any()  # another way
    assert short.sum() < 1.02 * plain.sum()
    assert cost(tabu_search(*args, sweeps=0), args, None).sum() < 1.3 * plain.sum()
