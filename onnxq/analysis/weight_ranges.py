"""Least and greatest weight per channel of each layer, before and after a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.encoding import Encoding
from onnxq.model import Layer, Model
from onnxq.ops import LAYERS

__all__ = ["ChannelRanges", "LayerRanges", "WeightRanges", "binned", "channel_ranges"]


@dataclass(frozen=True, eq=False)
class ChannelRanges:
    """Range of a weight per channel.

    Args:
        low: Least value of each channel, float64 [C].
        high: Greatest value of each channel, float64 [C].
    """

    low: np.ndarray
    high: np.ndarray

    @property
    def spread(self) -> float:
        """Largest magnitude of a channel over that of the median channel; inf if it has none."""
        bound = np.maximum(np.abs(self.low), np.abs(self.high))
        median = np.median(bound) if bound.size and self.finite else 0.0
        return float(bound.max() / median) if median > 0 else float("inf")

    @property
    def finite(self) -> bool:
        """Whether no channel holds NaN or infinity."""
        return bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; None for what is not finite."""
        found = {"low": self.low.min(), "high": self.high.max(), "spread": self.spread}
        plain = {k: float(v) if np.isfinite(v) else None for k, v in found.items()}
        return {"channels": self.low.size, **plain}


@dataclass(frozen=True, eq=False)
class LayerRanges:
    """What a run did to the weight of one layer.

    Args:
        name: Its node.
        op: Its operator type.
        before: Its ranges in the float model; None where a pass made the layer.
        after: Its ranges as they are written.
        quantized: Whether they are written in integers.
    """

    name: str
    op: str
    before: ChannelRanges | None
    after: ChannelRanges
    quantized: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "name": self.name,
            "op": self.op,
            "quantized": self.quantized,
            "before": None if self.before is None else self.before.to_dict(),
            "after": self.after.to_dict(),
        }


class WeightRanges:
    """Ranges of all layers, watched over a run: show it the model after each pass.

    Args:
        model: The float model; its weights are those before the run until `start` is called.
    """

    def __init__(self, model: Model) -> None:
        self._before: dict[str, ChannelRanges] = {}
        self._after: dict[str, ChannelRanges] = {}
        self.start(model)

    def start(self, model: Model) -> None:
        """Take the weights of a model as those before the run."""
        self._before = {layer.name: r for layer, r in _ranges(model)}
        self._after = dict(self._before)

    def see(self, model: Model) -> None:
        """Take what the encodings of a model make of its weights as those after the run.

        Layers whose weights are integers already keep what was seen last.
        """
        self._after |= {layer.name: r for layer, r in _ranges(model, encoded=True)}

    def finish(self, model: Model) -> list[LayerRanges]:
        """The layers of the model that a run gave, in its order."""
        # what is still a layer kept its floats, whatever encoding was proposed for it
        in_float = {layer.name: r for layer, r in _ranges(model)}
        found = []
        for node in model.graph.nodes:
            before = self._before.get(node.name)
            after = in_float.get(node.name, self._after.get(node.name))
            if node.op in LAYERS and after is not None:
                quantized = node.name not in in_float
                found.append(LayerRanges(node.name, node.op, before, after, quantized))
        return found


def _ranges(model: Model, *, encoded: bool = False) -> Iterator[tuple[Layer, ChannelRanges]]:
    for layer in model.layers():
        weight, axis = layer.weight, layer.channel_axis
        if weight.size:
            encoding = layer.weight_encoding if encoded else None
            yield layer, _written(weight, axis, encoding)


def _written(weight: np.ndarray, axis: int, encoding: Encoding | None) -> ChannelRanges:
    if encoding is None:
        return channel_ranges(weight, axis)
    if encoding.axis is not None and encoding.axis % weight.ndim != axis:
        return channel_ranges(encoding.fake_quantize(weight), axis)
    ends = channel_ranges(weight, axis)  # rounding keeps the order, so the ends are enough
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    low, high = (
        encoding.fake_quantize(v.astype(np.float32).reshape(shape)).reshape(-1)
        for v in (ends.low, ends.high)
    )
    return ChannelRanges(low.astype(np.float64), high.astype(np.float64))


def channel_ranges(weight: np.ndarray, axis: int) -> ChannelRanges:
    """The ranges of an array along an axis; an array without values has ranges of 0."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    if not weight.size:
        nothing = np.zeros(weight.shape[axis])
        return ChannelRanges(nothing, nothing)
    low, high = weight.min(axis=others), weight.max(axis=others)
    return ChannelRanges(
        np.atleast_1d(low).astype(np.float64), np.atleast_1d(high).astype(np.float64)
    )


def binned(ranges: ChannelRanges, most: int) -> ChannelRanges:
    """At most so many ranges in order, each from least to greatest of neighbouring channels."""
    count = ranges.low.size
    if count <= most:
        return ranges
    starts = np.arange(most) * count // most
    return ChannelRanges(
        np.minimum.reduceat(ranges.low, starts), np.maximum.reduceat(ranges.high, starts)
    )
