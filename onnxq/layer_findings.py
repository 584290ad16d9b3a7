"""What is known of each layer, put together: cost, ranges, sensitivities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxq.analysis import cost
from onnxq.analysis.findings import ActivationFindings, Agreement, LayerFindings
from onnxq.analysis.sensitivity import Sensitivity, spearman
from onnxq.analysis.value_ranges import activation_findings, weight_findings
from onnxq.calibrated import Calibrated
from onnxq.encoding import Format
from onnxq.expected import Expected, Key
from onnxq.model import Layer
from onnxq.progress import Progress
from onnxq.trials import Outcome

__all__ = ["agreement", "layer_findings", "measured", "totals"]

_FLOAT_BITS = 32


def layer_findings(
    known: Calibrated,
    expected: Expected,
    feed: Mapping[str, np.ndarray],
    progress: Progress,
    formats: tuple[str, str],
) -> list[LayerFindings]:
    """The layers in graph order, without shares and reasons.

    Args:
        known: The model and its ranges.
        expected: What formats are expected to do.
        feed: A sample, for shapes.
        progress: Told which shapes stay unknown.
        formats: Of weights and of activations, by which layers are ranked.
    """
    model = known.model
    shapes = cost.tensor_shapes(model, feed, progress=progress)
    costs = {c.name: c for c in cost.layer_costs(model, shapes)}
    bits = [Format.parse(f).bits for f in formats]
    found = []
    for layer in model.layers():
        spent = costs[layer.name]
        row = expected.table.get(layer.name, {})
        plain = layer.name in model.encodings.float_nodes
        factors = (_FLOAT_BITS, _FLOAT_BITS) if plain else bits
        shape = spent.output_shape
        batch = _batch(feed)
        found.append(
            LayerFindings(
                name=layer.name,
                op=layer.op,
                input_shape=shapes.get(layer.x.name),
                output_shape=shape,
                parameters=spent.parameters,
                bytes=spent.nbytes,
                macs=spent.macs,
                bit_operations=None if spent.macs is None else spent.macs * math.prod(factors),
                activation_bytes=None
                if shape is None
                else math.prod(shape) * layer.weight.dtype.itemsize // batch,
                executed=not expected.unknown.get(layer.name, "").startswith("never executed"),
                weights=weight_findings(layer),
                activation=_activation(layer, known, formats[1]),
                sensitivities=tuple(row.values()),
                gain=expected.gains.get(layer.name),
            )
        )
    return found


def _batch(feed: Mapping[str, np.ndarray]) -> int:
    sizes = {array.shape[0] for array in feed.values() if array.ndim}
    return next(iter(sizes)) or 1 if len(sizes) == 1 else 1


def _activation(layer: Layer, known: Calibrated, written: str) -> ActivationFindings | None:
    seen = known.statistics.get(layer.x.name)
    encoding = known.encoding(layer.x.name, Format.parse(written).dtype)
    if seen is None or encoding is None or not seen.count:
        return None
    name = str(layer.x.name)
    return activation_findings(name, seen, encoding, is_input=name in known.model.inputs)


def measured(
    layers: Sequence[LayerFindings], outcomes: Mapping[str, Mapping[Key, Outcome]]
) -> list[LayerFindings]:
    """The layers with what formats did to the outputs, on data."""
    found = []
    for layer in layers:
        known = outcomes.get(layer.name, {})
        rows = [_with(s, known.get((s.part, s.format))) for s in layer.sensitivities]
        found.append(dataclasses.replace(layer, sensitivities=tuple(rows)))
    return found


def _with(found: Sensitivity, outcome: Outcome | None) -> Sensitivity:
    if outcome is None:
        return found
    note = "; ".join(filter(None, (found.note, outcome.note)))
    return dataclasses.replace(found, measured=outcome.effect, metric=outcome.metric, note=note)


def agreement(layers: Sequence[LayerFindings]) -> list[Agreement]:
    """How alike expected and measured effects rank the layers, for each format."""
    pairs: dict[Key, list[tuple[float, float]]] = {}
    for layer in layers:
        for s in layer.sensitivities:
            if s.effect is not None and s.measured is not None:
                pairs.setdefault((s.part, s.format), []).append((s.effect, s.measured))
    return [
        Agreement(part, written, len(both), spearman(*np.array(both).T))
        for (part, written), both in pairs.items()
    ]


def totals(layers: Sequence[LayerFindings]) -> dict[str, Any]:
    """Sums over the layers; what is not known of one is left out of them."""
    macs = [layer.macs for layer in layers if layer.macs is not None]
    spent = [layer.bit_operations for layer in layers if layer.bit_operations is not None]
    memory = [x.activation_bytes for x in layers if x.activation_bytes is not None]
    return {
        "layers": len(layers),
        "parameters": sum(layer.parameters for layer in layers),
        "bytes": sum(layer.bytes for layer in layers),
        "macs": sum(macs),
        "bit_operations": sum(spent),
        "float_bit_operations": sum(macs) * _FLOAT_BITS**2,
        "activation_bytes": sum(memory),
        "largest_activation_bytes": max(memory, default=0),
    }
