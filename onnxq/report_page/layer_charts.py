"""What the charts of the chosen layer draw: plain numbers, few enough for a page.

Each is a dictionary with `text`, what it shows in words, or why there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from onnxq.analysis.findings import ActivationFindings, Histogram, Outlier
from onnxq.analysis.weight_ranges import ChannelRanges, binned

__all__ = ["activation", "bars", "histogram", "outlying", "per_channel", "points_for", "reads"]

# Points of a chart of each layer: with many layers fewer, so that they make no large page.
ALL_POINTS = 16_000
MOST_POINTS, FEWEST_POINTS = 128, 12


def points_for(layers: int) -> int:
    """How many channels or bins a chart of each layer shows if there are so many layers."""
    return min(max(ALL_POINTS // max(layers, 1), FEWEST_POINTS), MOST_POINTS)


def per_channel(ranges: ChannelRanges, points: int) -> dict[str, Any]:
    """Ranges per channel, drawn as bars from the least to the greatest value.

    Args:
        ranges: The ranges.
        points: Neighbouring channels share a bar where there are more.
    """
    count = ranges.low.size
    if not count:
        return {"text": "no channels"}
    if not ranges.finite:
        return {"text": "holds values that are not finite"}
    shown = binned(ranges, points)
    edges = np.arange(shown.low.size + 1) * count // shown.low.size
    return {
        "text": f"{count} channels, {ranges.low.min():.3g} to {ranges.high.max():.3g}",
        "low": _short(shown.low),
        "high": _short(shown.high),
        "edges": edges.tolist(),
    }


def bars(low: float, high: float, counts: Sequence[int], points: int) -> dict[str, Any]:
    """A histogram as shares of all values in per cent.

    Args:
        low: Where the first bin begins.
        high: Where the last one ends.
        counts: How many values each of the bins, which are equally wide, holds.
        points: Neighbours are put together where there are more bins.
    """
    held = np.array(counts, np.float64)
    total = held.sum()
    while held.size > points and held.size % 2 == 0:
        held = held.reshape(-1, 2).sum(axis=1)
    return {
        "text": f"{total:,.0f} values, {low:.3g} to {high:.3g}",
        "low": low,
        "high": high,
        "share": _short(100 * held / max(total, 1)),
    }


def histogram(found: Histogram | None, points: int) -> dict[str, Any]:
    """A histogram that was found; None: of values that are not finite."""
    if found is None:
        return {"text": "holds values that are not finite"}
    return bars(found.low, found.high, found.counts, points)


def activation(found: ActivationFindings, points: int) -> dict[str, dict[str, Any]]:
    """What a layer reads: its histogram with the range that was chosen, and its channels."""
    charts: dict[str, dict[str, Any]] = {"activation": {"text": "no histogram was kept"}}
    if found.histogram is not None:
        clip = [found.clip_low, found.clip_high]
        bounded = all(map(math.isfinite, clip))
        drawn = histogram(found.histogram, points)
        charts["activation"] = drawn | {"clip": clip if bounded else None}
    if found.channel_low:
        ranges = ChannelRanges(np.array(found.channel_low), np.array(found.channel_high))
        charts["channels"] = per_channel(ranges, points)
    return charts


def reads(found: ActivationFindings) -> Iterator[tuple[str, str]]:
    """What a layer reads, as facts."""
    yield "values", f"{found.low:.4g} to {found.high:.4g}"
    yield "range chosen", f"{found.clip_low:.4g} to {found.clip_high:.4g}"
    yield "clipped", f"{100 * found.clipped:.2g} % of values"
    yield "zeros", f"{100 * found.zeros:.2g} % of values"
    if found.outliers:
        yield "outlier channels of inputs", outlying(found.outliers)


def outlying(outliers: Sequence[Outlier]) -> str:
    """Outlier channels in words, the largest first."""
    most = sorted(outliers, key=lambda o: -o.times)[:4]
    more = f" and {len(outliers) - 4} more" if len(outliers) > 4 else ""
    return ", ".join(f"{o.channel} ({o.times:.1f} times the median)" for o in most) + more


def _short(values: np.ndarray) -> list[float]:
    """Numbers of three digits: as many as a chart shows."""
    return [float(f"{v:.3g}") for v in values]
