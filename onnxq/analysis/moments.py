"""Channels as clipped normal variables, and what operators make of their moments."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from onnxq.analysis.movement import Moved
from onnxq.kernels import normals

__all__ = ["Distribution"]

# Neighbouring values are alike: k of them are worth k^LIKENESS independent ones.  0 would make them
# equal, 1 independent.  Averages over all positions of five trained networks gave 0.36 to 0.39, and
# once 1; this is on the side of the wider range.
LIKENESS = 1 / 3


@dataclass(frozen=True, eq=False)
class Distribution:
    """What is known of the channels of one tensor, all float64 [C].

    A channel is taken for a normal variable, clipped to its bounds.

    Args:
        mean: Mean of each channel, over all samples and positions.
        std: Standard deviation of each channel.
        low: Values that none is below; -inf where there is no bound.
        high: Values that none is above; inf where there is no bound.
        axis: The axis that the channels run along.
        estimated: Whether an assumption was needed on the way from the normalization, such as that
            of independent channels.
        before: Mean and standard deviation before clipping; None: nothing was clipped.
    """

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    axis: int = 1
    estimated: bool = False
    before: tuple[np.ndarray, np.ndarray] | None = None

    @classmethod
    def normal(
        cls, mean: np.ndarray, std: np.ndarray, axis: int = 1, *, estimated: bool = False
    ) -> Distribution:
        """Channels without bounds; of the deviations only the magnitude counts."""
        mean, std = np.asarray(mean, np.float64), np.abs(np.asarray(std, np.float64))
        open_ = np.full(mean.shape, np.inf)
        return cls(mean, std, -open_, open_, axis, estimated)

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return self.mean.size

    @property
    def unclipped(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the normal variables whose clipping the channels are."""
        return (self.mean, self.std) if self.before is None else self.before

    def extremes(self, sigmas: float) -> tuple[np.ndarray, np.ndarray]:
        """The ends of mu - sigmas * sigma to mu + sigmas * sigma, within the bounds, [C] each."""
        mu, sigma = self.unclipped
        ends = (mu - sigmas * sigma, mu + sigmas * sigma)
        low, high = (np.clip(end, self.low, self.high) for end in ends)
        return low, high

    def clipped(self, low: float | np.ndarray, high: float | np.ndarray) -> Distribution:
        """After min(max(x, low), high); of crossed bounds the upper one wins, as in ONNX."""
        least = np.asarray(np.minimum(np.maximum(self.low, low), high))
        low, high = least, np.asarray(np.maximum(np.minimum(self.high, high), least))
        mu, sigma = self.unclipped
        mean, std = normals.clipped_moments(mu, sigma, low, high)
        same = (low == self.low) & (high == self.high)
        mean, std = np.where(same, self.mean, mean), np.where(same, self.std, std)
        return replace(self, mean=mean, std=std, low=low, high=high, before=(mu, sigma))

    def affine(self, scale: float | np.ndarray, shift: float | np.ndarray) -> Distribution:
        """After scale * x + shift."""
        with np.errstate(invalid="ignore"):  # 0 * inf: a channel that a factor of 0 kills
            ends = np.stack([scale * self.low, scale * self.high])
        ends[np.isnan(ends)] = 0.0
        mu, sigma = self.unclipped
        return replace(
            self,
            mean=scale * self.mean + shift,
            std=np.abs(scale) * self.std,
            low=ends.min(axis=0) + shift,
            high=ends.max(axis=0) + shift,
            before=None if self.before is None else (scale * mu + shift, np.abs(scale) * sigma),
        )

    def leaky(self, slope: np.ndarray) -> Distribution:
        """After x where x > 0, slope * x elsewhere."""
        above, below = self.clipped(0.0, np.inf), self.clipped(-np.inf, 0.0)
        mean = above.mean + slope * below.mean
        # the two are never both other than zero: E[above * below] = 0
        covariance = -above.mean * below.mean
        variance = above.std**2 + slope**2 * below.std**2 + 2 * slope * covariance
        with np.errstate(invalid="ignore"):
            ends = np.where(slope == 0, 0.0, slope * [below.low, below.high])
        low = np.minimum(above.low, ends.min(axis=0))
        high = np.maximum(above.high, ends.max(axis=0))
        std = np.sqrt(np.maximum(variance, 0.0))
        return self._where(self.low >= 0, replace(self, mean=mean, std=std, low=low, high=high))

    def plus(self, other: Distribution) -> Distribution:
        """The sum of two tensors whose channels are independent of one another."""
        return Distribution(
            self.mean + other.mean,
            np.hypot(self.std, other.std),
            self.low + other.low,
            self.high + other.high,
            self.axis,
            estimated=True,
        )

    def averaged(self, count: float, share: float = 1.0, square: float = 1.0) -> Distribution:
        """The average of neighbouring values, whose variance shrinks as `LIKENESS` says.

        Args:
            count: How many values are averaged.
            share: Which part of these is real, on average; the others are zeros from padding.
            square: The mean square of that part.
        """
        outer = (np.minimum(self.low, 0), np.maximum(self.high, 0))
        low, high = (self.low, self.high) if share == 1 else outer
        variance = square * self.std**2 * count**-LIKENESS + (square - share**2) * self.mean**2
        mean, std = share * self.mean, np.sqrt(variance)
        return Distribution(mean, std, low, high, self.axis, estimated=True)

    def largest(self, count: float) -> Distribution:
        """The largest of neighbouring values, as many of them independent as `LIKENESS` says."""
        mean, std = normals.largest_of(count**LIKENESS)
        mu, sigma = self.unclipped
        top = Distribution.normal(mu + sigma * mean, sigma * std, self.axis, estimated=True)
        return top.clipped(self.low, self.high)

    def moved(self, moved: Moved, *others: Distribution) -> Distribution:
        """After data movement; a channel that has several sources is their mixture."""
        parts = (self, *others)
        zero = np.zeros(1)
        values = {
            name: np.concatenate([*(getattr(p, name) for p in parts), zero])
            for name in ("mean", "std", "low", "high")
        }
        before = [
            np.concatenate([*n, zero]) for n in zip(*(p.unclipped for p in parts), strict=True)
        ]
        estimated = any(p.estimated for p in parts)
        if moved.whole is not None:
            mu, sigma = (b[moved.whole] for b in before)
            found = {name: v[moved.whole] for name, v in values.items()}
            return Distribution(**found, axis=moved.axis, estimated=estimated, before=(mu, sigma))
        target, picked = moved.target, {n: v[moved.source] for n, v in values.items()}
        mean, variance = np.zeros((2, moved.channels))
        np.add.at(mean, target, moved.share * picked["mean"])
        about = picked["std"] ** 2 + (picked["mean"] - mean[target]) ** 2
        np.add.at(variance, target, moved.share * about)
        low, high = np.full(moved.channels, np.inf), np.full(moved.channels, -np.inf)
        np.minimum.at(low, target, picked["low"])
        np.maximum.at(high, target, picked["high"])
        return Distribution(mean, np.sqrt(variance), low, high, moved.axis, estimated)

    def _where(self, kept: np.ndarray, other: Distribution) -> Distribution:
        """These channels where `kept`, those of the other elsewhere."""
        names = ("mean", "std", "low", "high")
        parts = {n: np.where(kept, getattr(self, n), getattr(other, n)) for n in names}
        (mu, sigma), before = self.unclipped, (other.mean, other.std)
        return replace(
            other,
            **parts,
            before=(np.where(kept, mu, before[0]), np.where(kept, sigma, before[1])),
        )
