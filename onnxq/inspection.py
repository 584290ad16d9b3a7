"""What a model consists of."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.analysis import cost
from onnxq.analysis.storage import Storage, storage
from onnxq.analysis.weight_ranges import channel_ranges
from onnxq.model import Layer, Model, load
from onnxq.runtime import Session

__all__ = ["Inspection", "LayerFacts", "inspect"]


@dataclass(frozen=True)
class LayerFacts:
    """One layer of a model: its cost and the range of its weight."""

    cost: cost.LayerCost
    weight_shape: tuple[int, ...]
    low: float
    high: float
    spread: float


@dataclass(frozen=True)
class Inspection:
    """What a model consists of."""

    path: str
    opset: int
    inputs: list[str]
    outputs: list[str]
    operators: dict[str, int]
    nbytes: int
    storage: list[Storage]
    layers: list[LayerFacts]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = dataclasses.asdict(self)
        plain["storage"] = [s.to_dict() for s in self.storage]
        plain["layers"] = [
            {**layer.cost.to_dict(), "weight_shape": list(layer.weight_shape)}
            | {"low": layer.low, "high": layer.high}
            | {"spread": layer.spread if np.isfinite(layer.spread) else None}
            for layer in self.layers
        ]
        return plain


def inspect(
    source: str | os.PathLike[str] | Model, *, shapes: Mapping[str, Sequence[int]] | None = None
) -> Inspection:
    """Layers, parameters, bytes, MACs and weight ranges of a model.

    Args:
        source: The model.
        shapes: Concrete shapes of dynamic inputs; unknown sizes count as 1.
    """
    model = load(source)
    session = Session(model.to_proto(), threads=1, level="disabled")
    concrete = cost.tensor_shapes(model, dict(shapes or {}))
    by_name = {layer.name: layer for layer in model.layers()}
    facts = [
        LayerFacts(c, *_weight_facts(by_name[c.name]))
        for c in cost.layer_costs(model, concrete)
        if c.name in by_name
    ]
    operators: dict[str, int] = {}
    for node in model.graph.nodes:
        operators[node.op] = operators.get(node.op, 0) + 1
    return Inspection(
        path=str(model.path or ""),
        opset=model.opset,
        inputs=[str(i) for i in session.inputs],
        outputs=[str(o) for o in session.outputs],
        operators=dict(sorted(operators.items(), key=lambda item: -item[1])),
        nbytes=model.nbytes,
        storage=storage(model),
        layers=facts,
        notes=model.notes,
    )


def _weight_facts(layer: Layer) -> tuple[tuple[int, ...], float, float, float]:
    ranges = channel_ranges(layer.weight, layer.channel_axis)
    low, high = float(ranges.low.min(initial=0)), float(ranges.high.max(initial=0))
    return layer.weight.shape, low, high, ranges.spread
