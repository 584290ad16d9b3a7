"""Normal variables that are clipped: their moments in closed form, and mixtures as histograms.

A variable x ~ N(mu, sigma^2) clipped to [low, high] keeps its density between the bounds and has
what lies beyond as points on them.  With the standard normal density p and distribution P,

    E[(z + u)+]     = p(u) + u P(u)                    the excess of z ~ N(0, 1) over -u
    E[((z + u)+)^2] = (u^2 + 1) P(u) + u p(u)

All differences are taken about the point of [low, high] that is next to mu, so that only tails are
subtracted from one another: a sigma of 1e-30 and a bound a thousand sigma away do no harm.
"""

from __future__ import annotations

from math import erfc, exp, pi, sqrt

import numpy as np

from onnxq.kernels._jit import kernel

__all__ = ["clipped_moments", "largest_of", "mixture", "square_shortfall"]

# of sigma: below, the density between the bounds counts as even
_NARROW = 1e-4
# exp(-u^2 / 2) is no normal float64 beyond
_FAR = 37.0
_SQRT_HALF = sqrt(0.5)
_DENSITY = 1.0 / sqrt(2.0 * pi)


@kernel
def clipped_moments(
    mu: np.ndarray, sigma: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of normal variables clipped to [low, high].

    Args:
        mu: Means before, float64 [C].
        sigma: Standard deviations before, at least 0, float64 [C].
        low: Lower bounds, -inf for none, float64 [C].
        high: Upper bounds, at least `low`, inf for none, float64 [C].
    """
    mean, std = np.empty_like(mu), np.empty_like(mu)
    for i in range(mu.size):
        mean[i], std[i] = _clipped(float(mu[i]), float(sigma[i]), float(low[i]), float(high[i]))
    return mean, std


@kernel
def square_shortfall(mu: np.ndarray, sigma: np.ndarray, level: np.ndarray) -> np.ndarray:
    """E[((level - x)+)^2]: the squared error of lifting x ~ N(mu, sigma^2) to a level, [C].

    Args:
        mu: Means, float64 [C].
        sigma: Standard deviations, at least 0, float64 [C].
        level: Levels, float64 [C].
    """
    square = np.empty_like(mu)
    for i in range(mu.size):
        gap = level[i] - mu[i]
        if sigma[i] > 0.0:
            square[i] = sigma[i] * sigma[i] * _square_excess(gap / sigma[i])
        else:
            square[i] = max(gap, 0.0) ** 2
    return square


@kernel
def mixture(
    mu: np.ndarray,
    sigma: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    edges: np.ndarray,
) -> tuple[np.ndarray, float]:
    """How much of a mixture of clipped normal variables, in equal parts, lies below each edge.

    Args:
        mu: Means before they are clipped, float64 [C].
        sigma: Standard deviations before, float64 [C].
        low: Lower bounds, finite, float64 [C].
        high: Upper bounds, finite, at least `low`, float64 [C].
        edges: Ascending, float64 [n].

    Returns:
        The probability of x < edge, float64 [n], and that of x = 0 exactly.
    """
    below = np.zeros_like(edges)
    zero = 0.0
    for i in range(mu.size):
        for j in range(edges.size):
            if edges[j] > high[i]:
                below[j] += 1.0
            elif edges[j] > low[i]:
                below[j] += _below((edges[j] - mu[i]) / sigma[i])
        if low[i] == 0.0 and high[i] == 0.0:
            zero += 1.0
        elif low[i] == 0.0:
            zero += _below(-mu[i] / sigma[i])
        elif high[i] == 0.0:
            zero += _below(mu[i] / sigma[i])
    return below / mu.size, zero / mu.size


@kernel
def largest_of(count: float) -> tuple[float, float]:
    """Mean and standard deviation of the largest of `count` independent N(0, 1), real count >= 1.

    By the trapezoid rule, which for smooth densities is right to rounding.
    """
    step, total, mean, square = 1.0 / 64, 0.0, 0.0, 0.0
    for i in range(-640, 641):
        z = i * step
        weight = _density(z) * _below(z) ** (count - 1.0)
        total += weight
        mean += weight * z
        square += weight * z * z
    mean /= total
    return mean, sqrt(max(square / total - mean * mean, 0.0))


@kernel
def _clipped(mu: float, sigma: float, low: float, high: float) -> tuple[float, float]:
    if not (sigma > 0.0 and low < high):
        return min(max(mu, low), high), 0.0
    sign = 1.0
    if mu > high:  # mirrored, so that mu lies between the bounds or below
        mu, low, high, sign = -mu, -high, -low, -1.0
    a, b = (low - mu) / sigma, (mu - high) / sigma
    if high - low < _NARROW * sigma:
        mean, std = _between(low, high, _below(a), _below(b))
        return sign * mean, std
    right = sigma * _excess(b)
    if a <= 0.0:
        nearest = mu
        shift = sigma * _excess(a) - right
        square = sigma * sigma * (1.0 - _cut(a) - _cut(b))
    else:
        nearest = low
        shift = sigma * _excess(-a) - right
        square = sigma * sigma * (_square_excess(-a) - _square_excess(b))
        if right > 0.0:
            square -= 2.0 * (high - low) * right
    mean = min(max(nearest + shift, low), high)
    # no variable between two bounds varies more than the one that takes only them
    room = (mean - low) * (high - mean)
    return sign * mean, sqrt(max(min(square - shift * shift, room), 0.0))


@kernel
def _between(low: float, high: float, below: float, above: float) -> tuple[float, float]:
    """Moments where the bounds are so near one another that the density between them is even."""
    middle, width, inside = 0.5 * (low + high), high - low, max(1.0 - below - above, 0.0)
    shift = 0.5 * width * (above - below)
    square = 0.25 * width * width * (below + above + inside / 3.0)
    return middle + shift, sqrt(max(square - shift * shift, 0.0))


@kernel
def _density(u: float) -> float:
    return _DENSITY * exp(-0.5 * u * u)


@kernel
def _below(u: float) -> float:
    return 0.5 * erfc(-_SQRT_HALF * u)


@kernel
def _excess(u: float) -> float:
    """E[(z + u)+] for u <= 0."""
    return max(_density(u) + u * _below(u), 0.0) if u > -_FAR else 0.0


@kernel
def _square_excess(u: float) -> float:
    """E[((z + u)+)^2]."""
    return max((u * u + 1.0) * _below(u) + u * _density(u), 0.0) if u > -_FAR else 0.0


@kernel
def _cut(u: float) -> float:
    """E[z^2 - u^2; z < u] for u <= 0: what clipping z at u takes off E[z^2]."""
    return (1.0 - u * u) * _below(u) - u * _density(u) if u > -_FAR else 0.0
