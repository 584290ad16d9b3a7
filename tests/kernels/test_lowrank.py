"""Low rank by output error, against plain linear algebra and against what the samples say."""

import numpy as np
import pytest

from onnxq.kernels.lowrank import (
    halved,
    low_rank,
    rank_errors,
    refit,
    spatial,
    spatial_errors,
)


def correlated(rng, size, count=400):
    """Samples that lie mostly along a few directions, and their second moment."""
    spread = rng.normal(size=(size, size)) * np.exp(-np.arange(size) / 3)
    x = rng.normal(size=(count, size)) @ spread.T
    return x, x.T @ x / count


def output_error(weight, made, moment):
    rows = (weight - made).reshape(len(weight), -1)
    whole = weight.reshape(len(weight), -1)
    return np.sum((rows @ moment) * rows) / np.sum((whole @ moment) * whole)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_low_rank_is_the_best_of_its_rank(shape):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape)
    x, moment = correlated(rng, shape[1])
    root = np.linalg.cholesky(moment + 1e-12 * np.eye(len(moment)))
    u, s, v = np.linalg.svd(weight @ root)
    errors = rank_errors(weight, moment)
    assert errors[0] == 1
    assert errors[-1] == 0
    for rank in range(1, min(shape)):
        made = low_rank(weight, moment, rank)
        assert np.linalg.matrix_rank(made) == rank
        known = (u[:, :rank] * s[:rank]) @ v[:rank]  # of W H^(1/2)
        np.testing.assert_allclose(made @ root, known, atol=1e-8)
        missed = np.sum((x @ (weight - made).T) ** 2) / np.sum((x @ weight.T) ** 2)
        assert errors[rank] == pytest.approx(missed, rel=1e-6)
        plain = low_rank(weight, None, rank)
        assert output_error(weight, made, moment) < output_error(weight, plain, moment)


def test_without_samples_it_is_the_plain_svd():
    weight = np.random.default_rng(1).normal(size=(6, 8))
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    np.testing.assert_allclose(low_rank(weight, None, 3), (u[:, :3] * s[:3]) @ v[:3], atol=1e-12)


def test_halves_are_of_one_size():
    weight = low_rank(np.random.default_rng(2).normal(size=(7, 10)), None, 3)
    left, right = halved(weight, 3)
    np.testing.assert_allclose(left @ right, weight, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1))


def test_refit_solves_for_what_is_wanted():
    rng = np.random.default_rng(3)
    x, moment = correlated(rng, 6)
    x += rng.normal(size=x.shape)
    moment = x.T @ x / len(x)
    wanted = x @ rng.normal(size=(6, 4)) + rng.normal(size=(len(x), 4))
    cross = wanted.T @ x / len(x)
    given = rng.normal(size=(4, 6))
    best = np.linalg.lstsq(x, wanted, rcond=None)[0].T
    np.testing.assert_allclose(refit(given, moment, cross, 0.0), best, atol=1e-6)
    np.testing.assert_allclose(refit(given, moment, cross, 1e9), given, atol=1e-6)
    apart = [
        np.linalg.norm(refit(given, moment, cross, ridge) - given) for ridge in (0.01, 0.1, 1, 10)
    ]
    assert apart == sorted(apart, reverse=True)


def test_refit_of_an_input_that_is_always_zero_keeps_the_weight():
    given = np.ones((2, 3))
    np.testing.assert_array_equal(refit(given, np.zeros((3, 3)), np.zeros((2, 3)), 0.1), given)


# ---------------------------------------------------------------------- kh x 1, then 1 x kw


def separable(rng, outputs, channels, height, width, rank):
    first = rng.normal(size=(rank, channels, height))
    second = rng.normal(size=(outputs, rank, width))
    return np.einsum("orj,rch->ochj", second, first)


@pytest.mark.parametrize("size", [(3, 3), (5, 2), (1, 3)])
@pytest.mark.parametrize("aware", [False, True])
def test_a_kernel_of_that_rank_is_found_again(size, aware):
    rng = np.random.default_rng(4)
    weight = separable(rng, 6, 4, *size, rank=3)
    moment = correlated(rng, weight[0].size)[1] + 0.1 * np.eye(weight[0].size)
    found = spatial(weight, moment if aware else None, 3)
    np.testing.assert_allclose(found, weight, atol=1e-6)


def test_its_rank_is_that_of_columns_and_rows():
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(6, 4, 3, 3))
    moment = correlated(rng, 36)[1]
    for given in (None, moment):
        made = spatial(weight, given, 5)
        assert np.linalg.matrix_rank(made.transpose(0, 3, 1, 2).reshape(18, 12)) == 5


@pytest.mark.parametrize("seed", range(4))
def test_samples_and_turns_lower_the_error(seed):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(8, 4, 3, 3))
    moment = correlated(rng, 36)[1]
    for rank in (2, 5, 8):
        errors = [
            output_error(weight, spatial(weight, given, rank, sweeps), moment)
            for given, sweeps in ((None, 0), (moment, 0), (moment, 1), (moment, 6))
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[1] < 0.8 * errors[0]


def test_the_plain_one_is_the_svd_of_columns_and_rows():
    weight = np.random.default_rng(6).normal(size=(5, 3, 3, 2))
    flat = weight.transpose(0, 3, 1, 2).reshape(10, 9)
    u, s, v = np.linalg.svd(flat, full_matrices=False)
    made = spatial(weight, None, 4).transpose(0, 3, 1, 2).reshape(10, 9)
    np.testing.assert_allclose(made, (u[:, :4] * s[:4]) @ v[:4], atol=1e-12)


def test_errors_are_those_before_any_turns():
    rng = np.random.default_rng(7)
    weight = rng.normal(size=(8, 4, 3, 2))
    moment = correlated(rng, 24)[1] + 0.05 * np.eye(24)
    ranks = [1, 4, 8, 12]
    for rank, error in zip(ranks, spatial_errors(weight, moment, ranks), strict=True):
        made = spatial(weight, moment, rank, sweeps=0)
        assert error == pytest.approx(output_error(weight, made, moment), abs=1e-6)
    assert list(spatial_errors(np.zeros((2, 2, 3, 3)), np.eye(18), [1])) == [0]
