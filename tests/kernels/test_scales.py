"""Scales by output error against a plain search."""

import numpy as np
import pytest

from onnxq.kernels.objective import objective
from onnxq.kernels.scales import (
    output_scale,
    output_scales,
    refit_scale,
    refit_scales,
    searched_scales,
)
from onnxq.kernels.tabu import tabu_search


def problem(lead, seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(*lead, 9)).astype(np.float32)
    x = rng.normal(size=(*lead[:-1], 40, 9)) @ rng.normal(size=(9, 9))
    gram = x.swapaxes(-1, -2) @ x / 40
    linear = rng.normal(size=weight.shape).astype(np.float32)
    zero = rng.integers(-2, 3, int(np.prod(lead))).astype(np.int32)
    return weight, zero, gram, linear


@pytest.mark.parametrize("lead", [(6,), (3, 2)])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_scale_of_each_row_is_the_best_of_all_that_are_tried(lead, shifted):
    weight, zero, gram, linear = problem(lead, 1)
    if not shifted:
        linear = None
    base = np.linspace(0.3, 0.5, 6).astype(np.float32)
    got = output_scales(weight, zero, -8, 7, gram, linear, base=base, candidates=7, low=0.5)
    rows = weight.reshape(6, 9)
    grams = np.broadcast_to(gram.reshape(-1, 1, 9, 9), (len(gram.reshape(-1, 9, 9)), 6, 9, 9))
    grams = grams[:, : 6 // len(grams)].reshape(6, 9, 9)
    for o in range(6):
        costs = {}
        for share in np.linspace(0.5, 1, 7):
            s = np.float32(base[o] * share)
            q = np.clip(np.round(rows[o] / s) + zero[o], -8, 7) - zero[o]
            d = q * s - rows[o].astype(np.float64)
            costs[s] = d @ grams[o] @ d
            if shifted:
                costs[s] += 2 * d @ linear.reshape(6, 9)[o]
        assert got[o] == min(costs, key=costs.get)
    assert len({*(got / base).round(4)}) > 1


def test_one_scale_for_all_rows():
    weight, zero, gram, linear = problem((6,), 2)
    got = output_scale(weight, zero, -8, 7, gram, linear, base=0.5, candidates=9, low=0.3)
    sums = {}
    for share in np.linspace(0.3, 1, 9):
        s = np.float32(0.5 * share)
        q = np.clip(np.round(weight / s) + zero[:, None], -8, 7) - zero[:, None]
        sums[s] = objective(q * s - weight.astype(np.float64), gram, linear).sum()
    assert got == min(sums, key=sums.get)


def test_refitted_scales_are_where_the_slope_is_zero():
    weight, _, gram, linear = problem((6,), 3)
    codes = np.rint(weight / 0.4)
    rows = refit_scales(weight, codes, gram, linear).astype(np.float64)
    one = float(refit_scale(weight, codes, gram, linear))

    def cost(scale):
        return objective(codes * np.reshape(scale, (-1, 1)) - weight, gram, linear)

    for step in (-1e-3, 1e-3):
        assert np.all(cost(rows) < cost(rows + step))
        assert cost(np.full(6, one)).sum() < cost(np.full(6, one + step)).sum()


def test_rows_of_zeros_have_no_scale():
    weight, _, gram, _ = problem((6,), 3)
    codes = np.zeros_like(weight)
    np.testing.assert_array_equal(refit_scales(weight, codes, gram), 0)
    assert refit_scale(weight, codes, gram) == 0


@pytest.mark.parametrize("lead", [(6,), (3, 2)])
def test_searched_scales_are_those_of_the_best_rounding(lead):
    weight, zero, gram, linear = problem(lead, 4)
    around = np.full(6, 0.35, np.float32)
    shares = (1.0, 0.9, 1.2)
    got = searched_scales(weight, zero, -8, 7, gram, linear, around=around, shares=shares)

    def cost(scale):  # 9 weights a row: solved exactly
        values = tabu_search(weight, scale.astype(np.float32), zero, -8, 7, gram, linear)
        return objective(values.astype(np.float64) - weight, gram, linear)

    costs = np.array([cost(around * share) for share in shares])
    np.testing.assert_allclose(cost(got), costs.min(axis=0), rtol=1e-6, atol=1e-9)
    assert len(set(costs.argmin(axis=0))) > 1
