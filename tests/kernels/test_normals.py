"""Clipped normal variables against brute-force integration."""

from math import erf, inf, sqrt

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onnxq.kernels.normals import clipped_moments, largest_of, mixture, square_shortfall


def moments(mu, sigma, low, high):
    arrays = (np.array([float(v)]) for v in (mu, sigma, low, high))
    mean, std = clipped_moments(*arrays)
    return mean[0], std[0]


def integral(mu, sigma, f, n=400_001):
    """E[f(x)] by the trapezoid rule over 12 standard deviations on either side."""
    z = np.linspace(-12, 12, n)
    density = np.exp(-0.5 * z * z)
    return (density @ f(mu + sigma * z)) / density.sum()


def brute(mu, sigma, low, high):
    # about the nearest point of the range, as far differences would lose digits
    about = min(max(mu, low), high)

    def shifted(x):
        return np.clip(x, low, high) - about

    mean = integral(mu, sigma, shifted)
    square = integral(mu, sigma, lambda x: (shifted(x) - mean) ** 2)
    return about + mean, sqrt(square)


numbers = st.floats(-8, 8)


@given(numbers, st.floats(0.05, 8), numbers, st.floats(0, 8) | st.just(inf), st.booleans())
@example(mu=-7.0, sigma=0.5, low=0.0, width=6.0, below=False)
@example(mu=7.0, sigma=0.5, low=0.0, width=6.0, below=False)
@example(mu=3.0, sigma=1.0, low=0.0, width=6.0, below=True)
def test_moments_against_integration(mu, sigma, low, width, below):
    low, high = (-inf, low) if below else (low, low + width)
    mean, std = moments(mu, sigma, low, high)
    wanted_mean, wanted_std = brute(mu, sigma, low, high)
    assert mean == pytest.approx(wanted_mean, abs=1e-5 * sigma)
    assert std == pytest.approx(wanted_std, rel=1e-3, abs=1e-5 * sigma)
    assert low <= mean <= high


def test_relu_by_the_formula_of_the_paper():
    mu, sigma = 0.7, 1.3
    density = np.exp(-0.5 * (mu / sigma) ** 2) / sqrt(2 * np.pi)
    below = 0.5 * (1 + erf(-mu / sigma / sqrt(2)))
    assert moments(mu, sigma, 0, inf)[0] == pytest.approx(sigma * density + mu * (1 - below))


@given(numbers, st.floats(0.01, 8), numbers, st.floats(0, 8))
def test_mirrored_bounds_mirror_the_moments(mu, sigma, low, width):
    mean, std = moments(mu, sigma, low, low + width)
    mirrored, same = moments(-mu, sigma, -low - width, -low)
    assert mirrored == pytest.approx(-mean, abs=1e-12)
    assert same == pytest.approx(std, rel=1e-6, abs=1e-9)


def test_without_bounds_nothing_changes():
    assert moments(1.5, 2.5, -inf, inf) == (1.5, 2.5)


@pytest.mark.parametrize("sigma", [0.0, 1e-300, 1e-30, 1e-12])
@pytest.mark.parametrize(("mu", "value"), [(-3.0, 0.0), (2.0, 2.0), (9.0, 6.0), (1e30, 6.0)])
def test_tiny_deviations(mu, value, sigma):
    mean, std = moments(mu, sigma, 0, 6)
    assert mean == value
    assert std == pytest.approx(sigma if value == 2.0 else 0.0, rel=1e-6)


def test_a_bound_at_the_mean_of_a_tiny_deviation():
    mean, std = moments(0.0, 1e-30, 0, 6)
    assert mean == pytest.approx(1e-30 / sqrt(2 * np.pi))
    assert std == pytest.approx(1e-30 * sqrt(0.5 - 0.5 / np.pi))


def test_far_tails_keep_their_digits():
    """E[(z - u)+] ~ p(u) / u^2 (1 - 3 / u^2 + 15 / u^4 - 105 / u^6)."""
    u = 20.0
    mean, _ = moments(-u, 1, 0, inf)
    density = np.exp(-0.5 * u * u) / sqrt(2 * np.pi)
    series = 1 - 3 / u**2 + 15 / u**4 - 105 / u**6
    assert mean == pytest.approx(density / u**2 * series, rel=1e-5)
    assert moments(-60, 1, 0, inf) == (0, 0)


def test_a_narrow_range_in_a_wide_variable():
    mean, std = moments(0.0, 1e9, -1, 1)
    assert mean == pytest.approx(0, abs=1e-6)
    assert std == pytest.approx(1, rel=1e-6)


@given(numbers, st.floats(0.05, 8), numbers)
def test_shortfall_against_integration(mu, sigma, level):
    got = square_shortfall(np.array([mu]), np.array([sigma]), np.array([level]))
    wanted = integral(mu, sigma, lambda x: np.maximum(level - x, 0) ** 2)
    assert got[0] == pytest.approx(wanted, rel=1e-4, abs=1e-6 * sigma**2)


def test_shortfall_of_a_constant():
    arrays = (np.array([1.0, 5.0]), np.zeros(2), np.full(2, 3.0))
    assert square_shortfall(*arrays).tolist() == [4.0, 0.0]


def test_the_largest_of_a_few():
    assert largest_of(1.0) == pytest.approx((0, 1), abs=1e-9)
    assert largest_of(2.0) == pytest.approx((1 / sqrt(np.pi), sqrt(1 - 1 / np.pi)))
    assert largest_of(3.0)[0] == pytest.approx(1.5 / sqrt(np.pi))
    drawn = np.random.default_rng(0).normal(size=(100_000, 9)).max(axis=1)
    assert largest_of(9.0) == pytest.approx((drawn.mean(), drawn.std()), abs=0.01)


def test_a_mixture_against_samples():
    mu, sigma = np.array([-1.0, 0.5, 4.0, 2.0]), np.array([1.0, 2.0, 3.0, 0.0])
    low, high = np.array([0.0, -2.0, 0.0, 2.0]), np.array([3.0, 3.0, 6.0, 2.0])
    rng = np.random.default_rng(0)
    x = np.clip(rng.normal(size=(200_000, 4)) * sigma + mu, low, high)
    edges = np.linspace(-3, 7, 41)
    below, zero = mixture(mu, sigma, low, high, edges)
    wanted = np.array([(x < e).mean() for e in edges])
    assert np.abs(below - wanted).max() < 2e-3
    assert zero == pytest.approx((x == 0).mean(), abs=2e-3)


def test_zeros_of_a_mixture():
    one = np.ones(1)
    cases = ((0.0, 0.0, 1.0), (0.0, 5.0, 0.5), (-5.0, 0.0, 0.5), (-5.0, 5.0, 0.0))
    for low, high, share in cases:
        _, zero = mixture(0 * one, one, low * one, high * one, one)
        assert zero == pytest.approx(share)
