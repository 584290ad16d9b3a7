"""Ranges, histograms and outlying channels of weights and activations."""

from __future__ import annotations

import numpy as np

from onnxq.analysis.findings import ActivationFindings, Histogram, Outlier, WeightFindings
from onnxq.analysis.weight_ranges import ChannelRanges, channel_ranges
from onnxq.encoding import Encoding
from onnxq.model import Layer
from onnxq.statistics import TensorStatistics

__all__ = ["OUTLYING", "activation_findings", "histogram", "outliers", "weight_findings"]

# Bins of histograms: enough to see a shape.
BINS = 64
# Times the median channel from which on a channel is an outlier: three bits of eight are lost.
OUTLYING = 8.0
# Outliers that are listed.
LISTED = 16


def weight_findings(layer: Layer) -> WeightFindings:
    """What there is to see of a layer's weight."""
    weight = layer.weight
    ranges = channel_ranges(weight, layer.channel_axis)
    spread = ranges.spread
    finite = bool(np.isfinite(weight).all())
    return WeightFindings(
        shape=tuple(int(n) for n in weight.shape),
        low=_plain(ranges.low),
        high=_plain(ranges.high),
        histogram=histogram(weight) if finite and weight.size else None,
        spread=spread if np.isfinite(spread) else None,
        crest=_crest(weight, layer.channel_axis) if finite and weight.size else None,
        outliers=outliers(ranges),
    )


def activation_findings(
    name: str, statistics: TensorStatistics, encoding: Encoding, *, is_input: bool
) -> ActivationFindings:
    """What there is to see of an activation, and of the range chosen for it.

    Args:
        name: The tensor.
        statistics: Its values.
        encoding: The range, per tensor.
        is_input: Whether it is an input of the model.
    """
    known = statistics.channels
    ranges = None if known is None else ChannelRanges(*known.astype(np.float64))
    count = max(statistics.count, 1)
    return ActivationFindings(
        tensor=name,
        is_input=is_input,
        low=statistics.minimum,
        high=statistics.maximum,
        histogram=_coarse(statistics),
        clip_low=encoding.low,
        clip_high=encoding.high,
        clipped=_outside(statistics, encoding) / count,
        zeros=statistics.zeros / count,
        rms=float(np.sqrt(statistics.sum_squares / count)),
        channel_low=() if ranges is None else tuple(ranges.low.tolist()),
        channel_high=() if ranges is None else tuple(ranges.high.tolist()),
        outliers=() if ranges is None else outliers(ranges),
    )


def outliers(ranges: ChannelRanges) -> tuple[Outlier, ...]:
    """The channels that are much larger than the median one, the largest first."""
    bound = np.maximum(np.abs(ranges.low), np.abs(ranges.high))
    if not bound.size or not ranges.finite:
        return ()
    median = float(np.median(bound))
    if not median > 0:
        return ()
    times = bound / median
    order = np.argsort(-times, kind="stable")[:LISTED]
    return tuple(Outlier(int(c), float(times[c])) for c in order if times[c] >= OUTLYING)


def _plain(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(float(v) if np.isfinite(v) else None for v in values)


def histogram(values: np.ndarray) -> Histogram:
    """A histogram of finite values."""
    counts, edges = np.histogram(values, BINS)
    return Histogram(float(edges[0]), float(edges[-1]), tuple(counts.tolist()))


def _crest(weight: np.ndarray, axis: int) -> float:
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64)
    power = np.sqrt(np.square(rows).mean(axis=1))
    largest = np.abs(rows).max(axis=1)
    alive = power > 0
    return float(np.median(largest[alive] / power[alive])) if alive.any() else 1.0


def _edges(statistics: TensorStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Counts of a histogram, and where its bins begin and end, [n + 1]."""
    assert statistics.bins is not None
    width = 2.0**statistics.exponent
    return statistics.bins, (statistics.offset + np.arange(statistics.bins.size + 1)) * width


def _coarse(statistics: TensorStatistics) -> Histogram | None:
    """Its histogram in a few bins from the least to the greatest value."""
    if statistics.bins is None or not statistics.count:
        return None
    low, high = statistics.minimum, statistics.maximum
    if not low < high:
        return Histogram(low, high, (statistics.count,))
    counts, edges = _edges(statistics)
    total = np.concatenate([[0], np.cumsum(counts)])
    wanted = np.linspace(low, high, BINS + 1)
    below = np.interp(wanted, edges, total)
    below[0], below[-1] = 0, total[-1]
    return Histogram(low, high, tuple(np.diff(np.rint(below)).astype(int).tolist()))


def _outside(statistics: TensorStatistics, encoding: Encoding) -> float:
    """About how many values lie outside of a range."""
    if statistics.bins is None or not statistics.count:
        return 0.0
    counts, edges = _edges(statistics)
    total = np.concatenate([[0], np.cumsum(counts)])
    half = float(encoding.scale) / 2  # what is rounded to the ends is not clipped
    low, high = encoding.low - half, encoding.high + half
    below = np.interp(low, edges, total) if low > statistics.minimum else 0.0
    upto = np.interp(high, edges, total) if high < statistics.maximum else total[-1]
    return float(below + total[-1] - upto)
