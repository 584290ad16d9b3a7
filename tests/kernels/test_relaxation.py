"""The relaxation against rounding to nearest, and its step against the slope of the loss."""

import numpy as np
import pytest

from onnxq.kernels._jit import read_only
from onnxq.kernels.objective import objective
from onnxq.kernels.relaxation import Relaxation, _rates, _step, relax, relax_activated
from onnxq.kernels.tabu import choices

SHORT = Relaxation(iterations=600)


def problem(rows, columns, seed):
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(2000, 6)) @ rng.normal(size=(6, columns)), 0)
    x = (x + 0.2 * rng.normal(size=x.shape)).astype(np.float32)
    weight = rng.normal(size=(rows, columns)).astype(np.float32)
    scale = (np.abs(weight).max(axis=1) / 6).astype(np.float32)
    return (weight, scale, np.zeros(rows, np.int32), -8, 7), x


def cost(values, weight, gram, linear=None):
    return objective(values.astype(np.float64) - weight, gram, linear)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("descend", [False, True])
def test_it_is_far_below_nearest(grouped, descend):
    grid, x = problem(12, 24, 1)
    gram = np.cov(x.T)
    if grouped:
        grid = (grid[0].reshape(3, 4, 24), *grid[1:])
        gram = np.stack([gram, 2 * gram, gram + np.eye(24)])
    low, high, nearest = choices(*grid)
    got = relax(*grid, gram, options=SHORT, descend=descend)
    assert got.dtype == np.float32
    assert np.all((got == low) | (got == high))
    assert cost(got, grid[0], gram).sum() < 0.7 * cost(nearest, grid[0], gram).sum()


def test_the_linear_term_counts():
    grid, x = problem(8, 16, 2)
    gram = np.cov(x.T)
    linear = 0.3 * np.random.default_rng(2).normal(size=(8, 16)).astype(np.float32)
    with_it = relax(*grid, gram, linear, options=SHORT)
    without = relax(*grid, gram, options=SHORT)
    assert cost(with_it, grid[0], gram, linear).sum() < cost(without, grid[0], gram, linear).sum()


def test_threads_change_nothing():
    grid, x = problem(9, 16, 3)
    gram = np.cov(x.T)
    few = Relaxation(iterations=50)
    one = relax(*grid, gram, options=few, descend=False)
    np.testing.assert_array_equal(relax(*grid, gram, options=few, descend=False, threads=2), one)


def test_a_step_follows_the_gradient():
    options = Relaxation(iterations=10, warm=0.0)
    rng = np.random.default_rng(4)
    v = rng.normal(size=(2, 5)).astype(np.float32)
    base, span, half = (rng.normal(size=(2, 5)).astype(np.float32) for _ in range(3))
    rates = np.array(_rates(options, 0), np.float32)
    beta = float(rates[3])
    assert beta == 20

    def loss(v):
        h = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
        return 2 * half * span * h + 0.01 * (1 - np.abs(2 * h - 1) ** beta)

    wide = v.astype(np.float64)
    slope = (loss(wide + 1e-5) - loss(wide - 1e-5)) / 2e-5
    first, second, error, moved = np.zeros_like(v), np.zeros_like(v), np.zeros_like(v), v.copy()
    fixed = (read_only(a) for a in (base, span, half))
    _step(*fixed, moved, first, second, error, read_only(rates))
    np.testing.assert_allclose(first, 0.1 * slope, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(moved - v, -0.01 * np.sign(slope), rtol=1e-2)  # Adam's first
    h = np.clip(1.2 / (1 + np.exp(-moved)) - 0.1, 0, 1)
    np.testing.assert_allclose(error, base + h * span, rtol=1e-5, atol=1e-6)


def test_the_exponent_falls_as_a_cosine_after_the_warm_start():
    options = Relaxation(iterations=100)
    weights, betas = zip(*[_rates(options, i)[2:4] for i in range(101)], strict=True)
    assert weights == (0.0,) * 20 + (0.01,) * 81
    assert betas[20] == 20
    assert betas[60] == pytest.approx(11)
    assert betas[100] == pytest.approx(2)


def test_what_the_activation_function_hides_costs_nothing():
    grid, x = problem(10, 16, 5)
    bias = np.linspace(-6, 2, 10).astype(np.float32)  # the first rows are hardly ever above 0
    noisy = np.round(x * 8) / np.float32(8)

    def miss(values):
        y, wanted = (np.clip(a, 0, 6) for a in (noisy @ values.T + bias, x @ grid[0].T + bias))
        return np.square(y - wanted, dtype=np.float64).sum(axis=0)

    got = relax_activated(*grid, x, noisy, bias, high=6.0, options=SHORT, batch=64)
    low, high, nearest = choices(*grid)
    assert np.all((got == low) | (got == high))
    assert np.all(miss(got) <= miss(nearest) * (1 + 1e-6))
    assert miss(got).sum() < 0.8 * miss(nearest).sum()
