"""Which layers are fragile, why, and what would help: from numbers to sentences and commands."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Sequence

import numpy as np

from onnxq.analysis.findings import Advice, LayerFindings
from onnxq.analysis.sensitivity import Sensitivity
from onnxq.encoding import Format

__all__ = ["explained", "with_shares"]

# From these on a number is worth a reason: times the median channel, times the typical weight,
# range over root mean square, times the median gain.
WIDE, CRESTED, SPARSE, LOUD = 4.0, 6.0, 24.0, 4.0
# Layers of a smaller share of the noise need no help.
WORTH = 0.02
# A layer excluded from the integers has to spare so much of all noise.
NOTICED = 0.005


def with_shares(
    layers: Sequence[LayerFindings], weights: str, activations: str
) -> list[LayerFindings]:
    """The layers with their share of the noise in these formats, and their place.

    Args:
        layers: What is known of them.
        weights: Format of weights.
        activations: Format of activations.
    """
    effects = [_effect(layer, weights, activations) for layer in layers]
    total = sum(e for e in effects if e is not None)
    known = [i for i, e in enumerate(effects) if e is not None]
    order = sorted(known, key=lambda i: -(effects[i] or 0.0))
    places = {i: place for place, i in enumerate(order, 1)}
    return [
        dataclasses.replace(
            layer,
            share=None if effect is None else effect / total if total > 0 else 0.0,
            fragility=places.get(i),
        )
        for i, (layer, effect) in enumerate(zip(layers, effects, strict=True))
    ]


def explained(
    layers: Sequence[LayerFindings],
    weights: str,
    activations: str,
    *,
    depthwise: Iterable[str],
    unknown: dict[str, str],
    command: Sequence[str],
) -> list[LayerFindings]:
    """The layers with the reason why they are fragile, and what would help.

    Args:
        layers: The layers `with_shares`.
        weights: Format of weights by which they are ranked.
        activations: Format of activations.
        depthwise: Names of the depthwise convolutions among them.
        unknown: Layer -> why its effect is not known.
        command: The words of a command that quantizes the model, to which options are added.
    """
    gains = [layer.gain for layer in layers if layer.gain is not None]
    median = float(np.median(gains)) if gains else 0.0
    single = {*depthwise}
    found = []
    for layer in layers:
        if layer.share is None:
            why = unknown.get(layer.name, "what it does to the outputs is not known")
            found.append(dataclasses.replace(layer, reason=why))
            continue
        parts = _parts(layer, weights, activations)
        reason = _reason(layer, *parts, weights, layer.name in single, median)
        advice: tuple[Advice, ...] = ()
        if layer.share >= WORTH:
            advice = tuple(_advice(layer, *parts, weights, command))
        found.append(dataclasses.replace(layer, reason=reason, advice=advice))
    return found


def _effect(layer: LayerFindings, weights: str, activations: str) -> float | None:
    weight, activation = _parts(layer, weights, activations)
    known = [s.effect for s in (weight, activation) if s is not None and s.effect is not None]
    return sum(known) if known else None


def _parts(
    layer: LayerFindings, weights: str, activations: str
) -> tuple[Sensitivity | None, Sensitivity | None]:
    return layer.sensitivity("weights", weights), layer.sensitivity("activations", activations)


def _amount(found: Sensitivity | None) -> float:
    return 0.0 if found is None or found.effect is None else found.effect


# ---------------------------------------------------------------------- why


def _reason(
    layer: LayerFindings,
    weight: Sensitivity | None,
    activation: Sensitivity | None,
    written: str,
    depthwise: bool,
    median: float,
) -> str:
    """One sentence: what makes the noise, and what carries it on."""
    of_weight = _amount(weight) >= _amount(activation)
    cause = _weight_cause(layer, written, depthwise) if of_weight else _input_cause(layer)
    carried = ""
    if layer.gain is not None and median > 0 and layer.gain >= LOUD * median:
        times = layer.gain / median
        carried = f"its noise counts {times:.0f} times as much at the outputs as a usual layer's"
    if not cause:
        cause = _costs_most(layer, "weight" if of_weight else "input", weight, activation)
        return f"{cause}, and {carried}" if carried else f"{cause}; nothing else stands out"
    return f"{cause}, and {carried}" if carried else cause


def _costs_most(
    layer: LayerFindings, source: str, weight: Sensitivity | None, activation: Sensitivity | None
) -> str:
    """Which rounding costs most, where no cause is known."""
    seen = layer.activation
    if source == "input" and seen is not None:
        return (
            f"rounding its input costs most, {seen.clip_low:.3g} to {seen.clip_high:.3g} where the"
            f" typical value is {seen.rms:.3g}"
        )
    found = weight if source == "weight" else activation
    sqnr = None if found is None else found.layer_sqnr_db
    power = "" if sqnr is None else f", {sqnr:.0f} dB below its output"
    return f"rounding its {source} costs most{power}"


def _weight_cause(layer: LayerFindings, written: str, depthwise: bool) -> str:
    weight = layer.weights
    if Format.parse(written).granularity == "tensor" and (weight.spread or 0.0) >= WIDE:
        return (
            f"one channel of its weight is {weight.spread:.0f} times the median one and sets the"
            " scale of all"
        )
    if depthwise:
        count = int(np.prod(weight.shape[2:]))
        return (
            f"depthwise: each output sums only {count} products, so that the rounding of its"
            " weight does not average out"
        )
    if (weight.crest or 0.0) >= CRESTED:
        return (
            f"single values set the scales of its weight, {weight.crest:.0f} times as large as the"
            " typical one"
        )
    return ""


def _input_cause(layer: LayerFindings) -> str:
    seen = layer.activation
    if seen is None:
        return ""
    if seen.outliers:
        first = seen.outliers[0]
        return (
            f"channel {first.channel} of its input is {first.times:.0f} times the median one and"
            " sets the scale of all"
        )
    span = seen.clip_high - seen.clip_low
    reads = "reads the model's input, which" if seen.is_input else "its input"
    if seen.rms > 0 and span >= SPARSE * seen.rms:
        return (
            f"{reads} spans {seen.clip_low:.3g} to {seen.clip_high:.3g},"
            f" {span / seen.rms:.0f} times its typical value, so that most values share few steps"
        )
    return "reads the model's input, whose rounding all layers inherit" if seen.is_input else ""


# ---------------------------------------------------------------------- what helps


def _advice(
    layer: LayerFindings,
    weight: Sensitivity | None,
    activation: Sensitivity | None,
    written: str,
    command: Sequence[str],
) -> list[Advice]:
    """What would help, the cheapest first."""
    of_weight, of_input = _amount(weight), _amount(activation)
    total = (of_weight + of_input) / layer.share if layer.share else 0.0
    name, found = layer.name, []

    def told(*options: str) -> str:
        return shlex.join([*command, *options])

    finer = layer.sensitivity("weights", "int8/channel")
    if written != "int8/channel" and finer is not None and finer.effect is not None and total:
        spared = (of_weight - finer.effect) / total
        if spared >= NOTICED and "=" not in name:
            text = "give its weight eight bits and a scale per channel"
            options = ("--format", f"{name}=int8/channel")
            found.append(Advice(text, told(*options), spared))
    outlying = layer.activation is not None and bool(layer.activation.outliers)
    if of_input > of_weight and outlying:
        text = "even its channels out before they are rounded (noise-equalization)"
        found.append(Advice(text, told("--recipe", "accurate"), None))
    elif of_weight >= of_input and written != "int16/channel":
        text = "round its weight by the error of its output (AdaRound), layer after layer"
        found.append(Advice(text, told("--recipe", "accurate"), None))
    if layer.share is not None and layer.share >= NOTICED:
        text = "leave it in float"
        found.append(Advice(text, told("--exclude", name), layer.share))
    return found
