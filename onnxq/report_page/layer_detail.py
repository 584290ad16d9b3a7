"""What the page of an analysis says of one layer, in words and charts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from onnxq.analysis.error import LARGEST_SQNR_DB
from onnxq.analysis.findings import SPARED, Advice, LayerFindings, WeightFindings
from onnxq.analysis.sensitivity import Sensitivity, decibel
from onnxq.analysis.weight_ranges import ChannelRanges
from onnxq.report_page.content import Detail, Remedy, finite
from onnxq.report_page.layer_charts import activation, histogram, outlying, per_channel, reads

__all__ = ["METHODS", "SPARED_DB", "detail", "noise", "remedies", "sentence"]

# What layers that are cheap to compress keep at the outputs.
SPARED_DB = round(-10 * math.log10(SPARED))
# The methods of compression, each with a colour of its own.
METHODS = ("spatial-svd", "weight-svd", "channel-pruning")


def detail(layer: LayerFindings, points: int) -> Detail:
    """What the page shows of a layer when it is chosen.

    Args:
        layer: What was found of it.
        points: How many channels or bins a chart shows.
    """
    charts: dict[str, Any] = {"ranges": per_channel(_ranges(layer.weights), points)}
    charts["values"] = histogram(layer.weights.histogram, points)
    if layer.activation is not None:
        charts |= activation(layer.activation, points)
    else:
        why = "what it reads is not known" if layer.executed else "no sample reached this layer"
        charts["activation"] = {"text": why}
    charts["formats"] = _by_format(layer.sensitivities)
    if layer.compressions or layer.whole:
        charts["curves"] = _curves(layer)
    facts = tuple(_layer_facts(layer))
    return Detail(facts, _why(layer), remedies(layer.advice), charts)


def _layer_facts(layer: LayerFindings) -> Iterator[tuple[str, str]]:
    yield "operator", layer.op
    yield "noise", noise(layer)
    yield "weight", _shape(layer.weights.shape)
    read = layer.activation
    if layer.input_shape is not None or read is not None:
        shape = "" if layer.input_shape is None else _shape(layer.input_shape)
        yield "reads", ", ".join(p for p in ("" if read is None else read.tensor, shape) if p)
    if layer.output_shape is not None:
        yield "gives", _shape(layer.output_shape)
    yield "parameters", f"{layer.parameters:,}"
    if layer.macs is not None:
        yield "MACs a sample", f"{layer.macs:,}"
    yield "bytes in float", f"{layer.bytes:,}"
    if layer.gain is not None:
        yield "gain", f"{layer.gain:.3g}"
    if layer.left_in_float is not None:
        yield "SQNR with it in float", f"{decibel(layer.left_in_float):.1f} dB"
    if layer.weights.outliers:
        yield "outlier channels of weights", outlying(layer.weights.outliers)
    if read is not None:
        yield from reads(read)


def _ranges(weights: WeightFindings) -> ChannelRanges:
    low, high = (
        np.array([finite(v) for v in side], np.float64) for side in (weights.low, weights.high)
    )
    return ChannelRanges(low, high)


def _by_format(sensitivities: Sequence[Sensitivity]) -> dict[str, Any]:
    rows = [s for s in sensitivities if s.effect is not None or s.measured is not None]
    if not rows:
        return {"text": "; ".join(dict.fromkeys(s.note for s in sensitivities if s.note))}
    names = [f"{s.format} {s.part}" for s in rows]
    expected, measured = (
        [None if v is None else round(v, 1) for v in map(decibel, found)]
        for found in ([s.effect for s in rows], [s.measured for s in rows])
    )
    known = [f"{n} {e:.1f} dB" for n, e in zip(names, expected, strict=True) if e is not None]
    if any(v is not None for v in measured):
        known.append("diamonds: as measured")
    return {
        "text": ", ".join(known),
        "names": names,
        "expected": expected,
        "measured": measured,
    }


def _curves(layer: LayerFindings) -> dict[str, Any]:
    """SQNR at the outputs against the MACs that are kept, in per cent, by method."""
    methods: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for c in sorted(layer.compressions, key=lambda c: c.macs):
        sqnr = decibel(c.effect)
        if sqnr is not None and sqnr < LARGEST_SQNR_DB:
            methods[c.method].append([round(100 * c.kept, 1), round(sqnr, 1)])
    words = [
        _spared(layer, method) for method in dict.fromkeys(c.method for c in layer.compressions)
    ]
    words += [f"{method}: no, {why}" for method, why in layer.whole.items()]
    drawn = {"methods": methods} if any(methods.values()) else {}
    return {"text": "; ".join(words)} | drawn


def _spared(layer: LayerFindings, method: str) -> str:
    """What a method may take off at no more than a small error, in words."""
    found = layer.spared(method)
    if found is None:
        return f"{method}: nothing can go with {SPARED_DB} dB left"
    others = len(found.layers) - 1
    tied = f", of this layer and {others} tied to it" if others else ""
    return f"{method}: {100 * (1 - found.kept):.0f} % can go with {SPARED_DB} dB left{tied}"


def noise(layer: LayerFindings) -> str:
    """How much of all noise a layer adds, in words."""
    return "not known" if layer.share is None else f"{100 * layer.share:.1f} % of the noise"


def _why(layer: LayerFindings) -> str:
    unreached = "" if layer.executed else "no sample reached it"
    return sentence(layer.reason or unreached)


def sentence(words: str) -> str:
    """Words that begin with a capital letter and end with a stop."""
    return words and words[0].upper() + words[1:].rstrip(".") + "."


def remedies(advice: Sequence[Advice]) -> list[Remedy]:
    """What would help, in sentences."""
    return [
        Remedy(
            sentence(a.text),
            a.command,
            "" if a.removes is None else f"Takes away {100 * a.removes:.0f} % of all noise.",
        )
        for a in advice
    ]


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(str(n) for n in shape) or "scalar"
