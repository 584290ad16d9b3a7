"""Objectives in float32 where that is enough, against float64."""

import numpy as np
import pytest

from onnxq.kernels.objective import Objective, objective


def problem(groups, rows, columns, rank, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, 4 * columns, rank)) @ rng.normal(size=(groups, rank, columns))
    x += 1e-5 * rng.normal(size=x.shape)
    error = rng.normal(size=(groups, rows, columns))
    return error, np.matmul(x.swapaxes(1, 2), x), 10 * rng.normal(size=error.shape)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("has_linear", [False, True])
def test_float32_is_good_to_a_thousandth(groups, has_linear):
    error, gram, linear = problem(groups, 5, 40, 40)
    g0 = linear if has_linear else None
    quick = Objective(gram, g0)
    pull, cost = quick.pull(error)
    assert pull.dtype == np.float32
    wanted = objective(error, gram, g0)
    np.testing.assert_allclose(cost.reshape(-1), wanted, rtol=1e-4)
    np.testing.assert_array_equal(quick(error), cost.reshape(-1))
    exact = np.matmul(error, gram) + (linear if has_linear else 0)
    np.testing.assert_allclose(pull * quick.unit, exact, atol=1e-5 * np.abs(exact).max())


def test_what_cancels_in_float32_is_done_in_float64():
    """An error that H hardly sees: float32 is left with nothing but its own rounding."""
    _, gram, _ = problem(1, 1, 60, 3)
    error = np.linalg.eigh(gram[0])[1][None, :, :20].swapaxes(1, 2)
    pull, cost = Objective(gram, None).pull(error)
    assert pull.dtype == np.float64
    np.testing.assert_allclose(cost.reshape(-1), objective(error, gram), rtol=1e-6)
