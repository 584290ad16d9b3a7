"""The noise of rounding as a function of the scales of channels, and the scales of least noise.

All of it is convex in the logarithms of the scales: sums of products of sums of exponentials.  A
maximum over channels counts as a norm of high order, which is smooth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["ActivationNoise", "Noise", "WeightNoise", "least_noise"]

# Order of the norm that stands for a maximum.
_ORDER = 8
# A step of a logarithm is this times that of the ratio of what falls with it to what rises.
_DAMPING = 0.1
# Stop when no step is larger.
_TOLERANCE = 1e-3


class Noise(Protocol):
    """One source of noise."""

    @property
    def classes(self) -> np.ndarray:
        """Class of each channel that it depends on, int64 [C]."""

    def terms(self, logs: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The noise at log scales [C], and by how much it rises and falls with each of them."""


@dataclass(frozen=True, eq=False)
class WeightNoise:
    """Rounding the rows of a weight, the step of each set by its largest magnitude.

    Args:
        classes: Class of each input channel, int64 [C].
        tops: Largest magnitude of each row, [R].
        powers: Magnitudes as shares of that, to the power of the norm, [R, C].
        variances: What a step of 1 in the weights of a channel costs, [C].
    """

    classes: np.ndarray
    tops: np.ndarray
    powers: np.ndarray
    variances: np.ndarray

    @classmethod
    def of(cls, classes: np.ndarray, magnitudes: np.ndarray, variances: np.ndarray) -> WeightNoise:
        """From magnitudes per row and channel, [R, C]; rows of zeros cost nothing."""
        magnitudes = magnitudes[magnitudes.max(axis=1, initial=0.0) > 0]
        tops = magnitudes.max(axis=1, initial=0.0)
        return cls(classes, tops, (magnitudes / tops[:, None]) ** _ORDER, variances)

    def terms(self, logs: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The noise at log scales [C], and by how much it rises and falls with each of them."""
        raised = np.exp(_ORDER * logs)
        norms = self.powers @ raised
        squares = self.tops**2 * norms ** (2 / _ORDER)
        left = self.variances * np.exp(-2 * logs)
        steps, noise = float(squares.sum()), float(left.sum())
        rising = 2 * noise * (squares / norms @ self.powers) * raised
        return steps * noise, rising, 2 * steps * left


@dataclass(frozen=True, eq=False)
class ActivationNoise:
    """Rounding a tensor, its step set by the channel of the largest range.

    Args:
        classes: Class of each channel, int64 [C].
        top: The largest range.
        powers: Ranges as shares of that, to the power of the norm, [C].
        gains: What a step of 1 in a channel costs, [C].
    """

    classes: np.ndarray
    top: float
    powers: np.ndarray
    gains: np.ndarray

    @classmethod
    def of(cls, classes: np.ndarray, ranges: np.ndarray, gains: np.ndarray) -> ActivationNoise:
        """From the range of each channel, [C]."""
        top = max(float(ranges.max(initial=0.0)), 1e-30)
        return cls(classes, top, (ranges / top) ** _ORDER, gains)

    def terms(self, logs: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """The noise at log scales [C], and by how much it rises and falls with each of them."""
        shares = self.powers * np.exp(-_ORDER * logs)
        norm = float(shares.sum()) + 1e-300
        square = self.top**2 * norm ** (2 / _ORDER)
        passed = self.gains * np.exp(2 * logs)
        noise = float(passed.sum())
        return square * noise, 2 * square * passed, 2 * square * noise * shares / norm


def least_noise(
    noises: Sequence[Noise], free: np.ndarray, rounds: int, largest: float
) -> tuple[np.ndarray, float, float]:
    """The log scales of classes at which the sum of noises is least.

    Args:
        noises: What adds up.
        free: Which classes may be scaled, bool [classes].
        rounds: At most so many steps.
        largest: Log scales stay between -largest and largest.

    Returns:
        Log scales, float64 [classes], 0 where nothing depends on one; the noise before; and after.
    """
    logs = np.zeros(free.size)
    best, first, least = logs, 0.0, np.inf
    for step in range(rounds + 1):
        total, rising, falling = 0.0, np.zeros(free.size), np.zeros(free.size)
        for noise in noises:
            value, up, down = noise.terms(logs[noise.classes])
            total += value
            np.add.at(rising, noise.classes, up)
            np.add.at(falling, noise.classes, down)
        first = total if step == 0 else first
        if total < least:
            best, least = logs, total
        known = free & (rising > 0) & (falling > 0)
        moves = np.zeros(free.size)
        moves[known] = _DAMPING * np.log(falling[known] / rising[known])
        moved = np.clip(logs + moves, -largest, largest)
        if np.abs(moved - logs).max(initial=0.0) < _TOLERANCE:
            break
        logs = moved
    return best, first, least
