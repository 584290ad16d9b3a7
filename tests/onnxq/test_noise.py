"""The noise of rounding against its definition, and scales at which it is least."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.noise import ActivationNoise, WeightNoise, least_noise


def drawn(seed, channels=5, rows=4):
    rng = np.random.default_rng(seed)
    classes = rng.permutation(channels)
    weights = np.abs(rng.normal(size=(rows, channels))) * 10.0 ** rng.uniform(-1, 1, channels)
    variances = 10.0 ** rng.uniform(-2, 1, channels)
    ranges, gains = 10.0 ** rng.uniform(-1, 1, (2, channels))
    noises = [
        WeightNoise.of(classes, weights, variances),
        ActivationNoise.of(classes, ranges, 1e-2 * gains),
    ]
    return noises, (classes, weights, variances, ranges, 1e-2 * gains)


@given(seed=st.integers(0, 10**6))
def test_noise_is_that_of_its_definition(seed):
    noises, (_, weights, variances, ranges, gains) = drawn(seed)
    logs = np.random.default_rng(seed).uniform(-1, 1, 5)
    scale = np.exp(logs)
    largest = np.square((weights * scale).max(axis=1)).sum() * (variances / scale**2).sum()
    coarsest = (ranges / scale).max() ** 2 * (gains * scale**2).sum()
    for noise, exact in zip(noises, (largest, coarsest), strict=True):
        # a norm of order 8 over 5 channels lies at most 5^(1/8) above the maximum, here squared
        assert exact * (1 - 1e-9) <= noise.terms(logs)[0] <= exact * 5 ** (2 / 8) * (1 + 1e-9)


@given(seed=st.integers(0, 10**6))
def test_rises_and_falls_are_the_derivative(seed):
    noises, _ = drawn(seed)
    logs = np.random.default_rng(seed).uniform(-1, 1, 5)
    for noise in noises:
        _, rising, falling = noise.terms(logs)
        for c in range(5):
            step = np.zeros(5)
            step[c] = 1e-5
            slope = (noise.terms(logs + step)[0] - noise.terms(logs - step)[0]) / 2e-5
            assert slope == pytest.approx(rising[c] - falling[c], rel=1e-5, abs=1e-7)
        assert (rising >= 0).all()
        assert (falling >= 0).all()


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_no_other_scales_are_better(seed):
    noises, _ = drawn(seed)
    free = np.ones(5, bool)
    logs, before, after = least_noise(noises, free, 400, 3.0)
    assert before == pytest.approx(sum(n.terms(np.zeros(5))[0] for n in noises))
    rng = np.random.default_rng(seed)
    for size in (1e-2, 1e-1, 1.0):
        other = np.clip(logs + rng.normal(size=5) * size, -3.0, 3.0)
        there = sum(n.terms(other[n.classes])[0] for n in noises)
        assert there >= after * (1 - 1e-3)  # convex: no worse near by is no worse anywhere


def test_classes_that_are_not_free_stay():
    noises, _ = drawn(3)
    free = np.array([True, False, True, False, True])
    logs, _, _ = least_noise(noises, free, 100, 3.0)
    assert (logs[~free] == 0).all()
    assert (logs[free] != 0).any()


def test_rows_of_zeros_and_channels_of_nothing():
    magnitudes = np.array([[0.0, 0.0], [1.0, 0.0]])
    noises = [
        WeightNoise.of(np.arange(2), magnitudes, np.array([1.0, 0.0])),
        ActivationNoise.of(np.arange(2), np.zeros(2), np.zeros(2)),
    ]
    logs, before, after = least_noise(noises, np.ones(2, bool), 100, 3.0)
    assert np.isfinite([*logs, before, after]).all()
    assert after <= before
