"""GPTQ's parts against plain numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.kernels.rounding import gptq, inverse_diagonal, inverse_factor, shrink, solved


def moment(size, count, seed):
    """A second moment of correlated data, of less than full rank where count < size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)
    return x.T @ x / count


def rounded(weight, scale, zero, limits, factor):
    out = np.empty_like(weight)
    gptq(weight.copy(), scale, zero, *limits, factor, out)
    return out


def reference(weight, scale, zero, limits, factor):
    """The formula of the paper, all rows at once."""
    w, out = weight.astype(np.float64), np.empty_like(weight, np.float64)
    for k in range(w.shape[1]):
        q = np.clip(np.rint(w[:, k] / scale) + zero, *limits) - zero
        out[:, k] = q * scale
        w[:, k + 1 :] -= np.outer((w[:, k] - out[:, k]) / factor[k, k], factor[k, k + 1 :])
    return out


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 99), st.floats(1e-2, 10))
def test_the_factor_squared_is_the_inverse(size, count, seed, damping):
    gram = moment(size, count, seed)
    factor = inverse_factor(gram, damping).astype(np.float64)
    assert np.array_equal(factor, np.triu(factor))
    inverse = np.linalg.inv(gram + damping * np.eye(size))
    np.testing.assert_allclose(factor.T @ factor, inverse, atol=1e-4 * np.abs(inverse).max())


def test_the_factor_of_what_is_not_positive_definite_is_refused():
    with pytest.raises(np.linalg.LinAlgError):
        inverse_factor(np.diag([1.0, -5.0]), 1e-3)


@given(
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(0, 99),
    st.sampled_from([(-128, 127), (0, 255), (-8, 7)]),
)
def test_values_never_leave_the_grid(rows, columns, seed, limits):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(rows, columns)).astype(np.float32) * 10
    scale = rng.uniform(0.01, 0.1, rows).astype(np.float32)  # so fine that many values are clipped
    zero = rng.integers(limits[0], limits[1] + 1, rows).astype(np.int32)
    factor = inverse_factor(moment(columns, 5, seed), 1e-2)
    got = rounded(weight, scale, zero, limits, factor)
    steps = got / scale[:, None]
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
    integers = np.rint(steps) + zero[:, None]
    assert integers.min() >= limits[0]
    assert integers.max() <= limits[1]


def test_it_is_the_formula_of_the_paper():
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(8, 10)).astype(np.float32)
    scale = np.abs(weight).max(axis=1) / np.float32(7)
    zero = np.zeros(8, np.int32)
    factor = inverse_factor(moment(10, 50, 5), 1e-2)
    got = rounded(weight, scale, zero, (-8, 7), factor)
    wanted = reference(weight, scale.astype(np.float64), zero, (-8, 7), factor.astype(np.float64))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_uncorrelated_inputs_round_to_nearest():
    weight = np.random.default_rng(6).normal(size=(4, 9)).astype(np.float32)
    scale = np.full(4, 0.1, np.float32)
    factor = inverse_factor(np.diag(np.arange(1.0, 10.0)), 0.1)
    got = rounded(weight, scale, np.zeros(4, np.int32), (-128, 127), factor)
    np.testing.assert_allclose(got, np.rint(weight / scale[:, None]) * scale[:, None], atol=1e-6)


def test_correlated_inputs_lose_less_than_by_rounding_to_nearest():
    weight = np.random.default_rng(7).normal(size=(32, 24)).astype(np.float32)
    scale = np.full(32, 0.5, np.float32)
    gram = moment(24, 500, 7)
    got = rounded(weight, scale, np.zeros(32, np.int32), (-8, 7), inverse_factor(gram, 1e-3))
    nearest = np.clip(np.rint(weight / 0.5), -8, 7) * 0.5
    costs = [np.einsum("ok,kl,ol->", e, gram, e) for e in (got - weight, nearest - weight)]
    assert costs[0] < 0.7 * costs[1]


@given(st.integers(1, 10), st.integers(0, 99), st.sampled_from([0, 1, 10, 10**9]))
def test_shrinking_keeps_the_diagonal_and_scales_the_rest(size, seed, count):
    gram = moment(size, 20, seed)
    got = shrink(gram, count)
    np.testing.assert_array_equal(np.diag(got), np.diag(gram))
    assert np.all(np.abs(got) <= np.abs(gram) + 1e-12)
    np.linalg.cholesky(got + 1e-9 * np.trace(gram) * np.eye(size))
    if count <= 1:
        np.testing.assert_array_equal(got, np.diag(np.diag(gram)))
    if count == 10**9:
        np.testing.assert_allclose(got, gram, rtol=1e-5, atol=1e-8 * np.abs(gram).max())


def test_shrinking_leaves_the_argument_alone():
    gram = moment(5, 20, 0)
    kept = gram.copy()
    shrink(gram, 3)
    np.testing.assert_array_equal(gram, kept)


def test_shrinking_of_zeros_is_zeros():
    np.testing.assert_array_equal(shrink(np.zeros((3, 3)), 4), np.zeros((3, 3)))


@pytest.mark.parametrize("columns", [1, 40, 256, 600])
def test_solving_in_blocks_is_solving(columns):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2 * columns + 3, columns))
    gram, wanted = x.T @ x, rng.normal(size=(5, columns))
    got = solved(gram, wanted)
    np.testing.assert_allclose(got, np.linalg.solve(gram, wanted.T).T, rtol=1e-8, atol=1e-12)
    short = solved(gram.astype(np.float32), wanted)
    assert short.dtype == np.float32
    np.testing.assert_allclose(short, got, atol=1e-3 * np.abs(got).max())
    with pytest.raises(np.linalg.LinAlgError):
        solved(gram - 10 * np.trace(gram) * np.eye(columns), wanted)


@pytest.mark.parametrize("columns", [1, 40, 256, 257, 600])
def test_the_diagonal_of_an_inverse(columns):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2 * columns + 3, columns))
    gram = x.T @ x
    kept, wanted = gram.copy(), np.diag(np.linalg.inv(gram))
    np.testing.assert_allclose(inverse_diagonal(gram), wanted, rtol=1e-9)
    np.testing.assert_allclose(inverse_diagonal(gram.astype(np.float32)), wanted, rtol=1e-3)
    np.testing.assert_array_equal(gram, kept)
    with pytest.raises(np.linalg.LinAlgError):
        inverse_diagonal(gram - 10 * np.trace(gram) * np.eye(columns))
