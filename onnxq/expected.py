"""What each format is expected to do to each layer of a calibrated model."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from onnxq.analysis.adjoint import Adjoint, output_powers
from onnxq.analysis.cost import layer_costs, tensor_shapes
from onnxq.analysis.sensitivity import (
    Part,
    Probe,
    Sensitivity,
    decibel,
    expected_effects,
    noise_of_input,
    noise_of_weight,
    output_power,
    weight_error,
)
from onnxq.calibrated import Calibrated
from onnxq.encoding import Encoding, Format
from onnxq.errors import OnnxqError
from onnxq.formats import weight_encoding
from onnxq.layer_inputs import LayerInputs
from onnxq.model import Layer, Model
from onnxq.pass_manager import Context
from onnxq.patches import supports
from onnxq.runtime import Session, cores
from onnxq.second_order import SecondOrder

__all__ = ["Expected", "Key", "expect"]

Key = tuple[Part, str]
_Effects = Mapping[str, Mapping[Hashable, float]]
# Samples and patches a layer that second moments come from, and samples that gradients do.
MOMENT_SAMPLES, PATCHES, GRADIENT_SAMPLES = 16, 2048, 32
# Directions at the outputs for each of these: as many as this many multiply-accumulates allow, and
# no more than a few.  One alone leaves terms between the rows of a weight to chance.
DIRECTION_MACS, DIRECTIONS = 5 << 30, 4
MEMORY_MB = 1024
UNREACHED = "never executed: no sample reached it"


@dataclass(eq=False)
class Expected:
    """What formats are expected to do to layers.

    Attributes:
        table: Layer -> part and format -> what it costs.
        encodings: Layer -> part and format -> how it was rounded for that.
        means: Layer -> mean patch of its input, [G, K].
        gains: Layer -> squared error of the outputs, relative to their power, for each unit of
            squared error of the layer's output, relative to its power.
        unknown: Layer -> why its effect is not known.
        unfit: Those of which nothing at all is known -> why.
        samples: How many samples there were, for each part.
        notes: What is left out, one sentence each.
    """

    table: dict[str, dict[Key, Sensitivity]] = field(default_factory=dict)
    encodings: dict[str, dict[Key, Encoding]] = field(default_factory=dict)
    means: dict[str, np.ndarray] = field(default_factory=dict)
    gains: dict[str, float] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def expect(
    calibrated: Calibrated,
    ctx: Context,
    weights: Sequence[str],
    activations: Sequence[str],
    seed: int,
) -> Expected:
    """The whole table: no layer is run on its own.

    Args:
        calibrated: The model.
        ctx: Where samples come from.
        weights: Formats of weights.
        activations: Formats of activations.
        seed: Of patches and directions.
    """
    model, found = calibrated.model, Expected()
    layers = []
    for layer in model.layers():
        if (why := _unfit(layer, calibrated)) is not None:
            found.unfit[layer.name] = why
        else:
            layers.append(layer)
    found.unknown |= found.unfit
    if not layers:
        return found
    inputs = LayerInputs(
        model,
        layers,
        ctx,
        rng=lambda index: np.random.default_rng([seed, index]),
        sequential=False,
        samples=MOMENT_SAMPLES,
        patches=PATCHES,
        memory_mb=MEMORY_MB,
    )
    probes, noises, powers = [], {}, {}
    for layer in layers:
        statistics = inputs.measure(layer)
        if statistics is None:
            found.unfit[layer.name] = found.unknown[layer.name] = UNREACHED
            continue
        power = output_power(layer, statistics)
        probe, noise = _rounded(layer, calibrated, statistics, weights, activations, found)
        probes.append(probe)
        noises[layer.name], powers[layer.name] = noise, power
    found.means = {p.layer.name: p.mean for p in probes}
    effects, adjoint = _effects(calibrated, ctx, probes, seed, found)
    for probe in probes:
        _fill(probe, noises[probe.layer.name], powers[probe.layer.name], effects, adjoint, found)
    return found


def _unfit(layer: Layer, calibrated: Calibrated) -> str | None:
    """Why nothing can be expected of a layer."""
    for tensor in (layer.x, layer.y):
        if tensor.name in calibrated.broken:
            side = "input" if tensor is layer.x else "output"
            return f"{calibrated.broken[tensor.name]} in its {side} {tensor.name}"
    if layer.weight.dtype != np.float32:
        return f"it computes in {layer.weight.dtype}, not in float32"
    if not np.isfinite(layer.weight).all():
        return "its weight holds NaN or infinity"
    if not layer.weight.size:
        return "its weight is empty"
    if not supports(layer):
        return f"{layer.op} of this kind is not estimated"
    seen = calibrated.statistics.get(layer.x.name)
    if seen is None or not seen.count:
        return UNREACHED
    return None


def _rounded(
    layer: Layer,
    calibrated: Calibrated,
    statistics: SecondOrder,
    weights: Sequence[str],
    activations: Sequence[str],
    found: Expected,
) -> tuple[Probe, dict[Key, float]]:
    """Errors of the weight in each format, and the noise that each key adds to the output."""
    encodings = found.encodings.setdefault(layer.name, {})
    errors: dict[Hashable, np.ndarray] = {}
    noise: dict[Key, float] = {}
    for text in weights:
        encoding = weight_encoding(
            layer, layer.weight, Format.parse(text), Format.parse(activations[0])
        )
        key: Key = ("weights", text)
        encodings[key] = encoding
        error = weight_error(layer, encoding)
        noise[key] = noise_of_weight(layer, error, statistics)
        errors[key] = error.astype(np.float32)
    roundings: dict[Hashable, Encoding] = {}
    seen = calibrated.statistics[layer.x.name]
    for text in activations:
        known = calibrated.encoding(layer.x.name, Format.parse(text).dtype)
        if known is not None:
            key = ("activations", text)
            encodings[key] = roundings[key] = known
            levels = known.qmax - known.qmin + 1
            noise[key] = seen.noise(known.low, known.high, levels)
    found.samples["second moments"] = MOMENT_SAMPLES
    return Probe(layer, statistics.mean, errors, roundings), noise


def _effects(
    calibrated: Calibrated, ctx: Context, probes: Sequence[Probe], seed: int, found: Expected
) -> tuple[_Effects, Adjoint | None]:
    """Effects at the outputs; none at all, and a note, where the adjoint cannot be made."""
    model = calibrated.model
    plain = Session(model.to_proto(), threads=1)
    feeds = [*ctx.spread(plain, GRADIENT_SAMPLES)]
    layers = [p.layer for p in probes]
    try:
        adjoint = Adjoint(model, layers, feeds[0])
    except OnnxqError as error:
        found.notes.append(f"effects on the outputs are not known: {error}")
        return {}, None
    fitting = [feed for feed in feeds if adjoint.fits(feed)]
    if len(fitting) < len(feeds):
        found.notes.append(
            f"gradients come from {len(fitting)} of {len(feeds)} samples, those of one shape"
        )
    powers = output_powers(plain, fitting)
    with ctx.progress.task("gradients", len(fitting)) as advance:
        rng = np.random.default_rng([seed, len(probes)])
        threads = min(ctx.threads, cores()) or cores()
        effects = expected_effects(
            adjoint,
            probes,
            fitting,
            powers,
            rng,
            directions=_directions(model, fitting),
            threads=threads,
            progress=advance,
        )
    found.samples["gradients"] = len(fitting)
    if not any(p > 0 for p in powers.values()):
        found.notes.append("no output is a finite floating-point number other than zero")
        return {}, None
    return effects, adjoint


def _directions(model: Model, feeds: Sequence[Mapping[str, np.ndarray]]) -> int:
    """How many directions at the outputs gradients are taken in, of each sample."""
    shapes = tensor_shapes(model, feeds[0])
    macs = sum(cost.macs or 0 for cost in layer_costs(model, shapes))
    return max(1, min(DIRECTIONS, DIRECTION_MACS // max(macs * len(feeds), 1)))


def _fill(
    probe: Probe,
    noise: Mapping[Key, float],
    power: float,
    effects: _Effects,
    adjoint: Adjoint | None,
    found: Expected,
) -> None:
    """One layer's row of the table, and its gain."""
    layer, name = probe.layer, probe.layer.name
    row = found.table.setdefault(name, {})
    note, why = _left_out(name, effects, adjoint)
    if why:
        found.unknown[name] = why
    for key, amount in noise.items():
        part, text = key
        at_layer = amount if part == "weights" else noise_of_input(layer, amount)
        effect = effects.get(name, {}).get(key)
        if effect is not None and (why or not math.isfinite(effect)):
            effect = None
        share = at_layer / power if power > 0 else None
        row[key] = Sensitivity(part, text, decibel(share), effect, note=why or note)
    known = [
        (noise[k], s.effect)
        for k, s in row.items()
        if k[0] == "weights" and s.effect is not None and noise[k] > 0
    ]
    if known and power > 0:
        largest, effect = max(known)  # the coarsest rounding says most
        found.gains[name] = effect * power / largest


def _left_out(name: str, effects: _Effects, adjoint: Adjoint | None) -> tuple[str, str]:
    """What an effect leaves out, and why there is none."""
    if adjoint is None:
        return "", "what it does to the outputs is not known"
    cut = adjoint.partial.get(name)
    through = "" if cut is None else f"what passes through {cut}: {adjoint.stopped[cut]}"
    if name not in effects:
        return "", f"unknown is {through}" if through else "no output depends on it"
    return (f"without {through}" if through else ""), ""
