"""Scale channels so that rounding weights and activations costs the least, without retraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from onnxq.coupling import Coupling, couple
from onnxq.encoding import Format, limits
from onnxq.kernels.rounding import inverse_diagonal
from onnxq.layer_inputs import moments
from onnxq.model import Layer, Model
from onnxq.noise import ActivationNoise, Noise, WeightNoise, least_noise
from onnxq.pass_manager import Changes, Context
from onnxq.rescale import rescale
from onnxq.second_order import SecondOrder, rows_of, supports

__all__ = ["NoiseEqualization"]

# Columns of a layer's input beyond which their moments are inverted in float32.
_WIDE = 1024


@dataclass(frozen=True, kw_only=True)
class NoiseEqualization:
    r"""Scale channels so that the expected noise of rounding weights and activations is least.

    A channel may be divided by s where it is put out and multiplied by s where it is read.  Behind
    a layer with a scale per output channel the division is free.  In front of one it moves noise
    about: a large weight sets the step of its whole row, and a channel of little variance bears
    steps that others do not::

        noise of a layer  =    sum_o (max_i |W[o, i]| s_i / L)^2 / 12  *  sum_i v_i / s_i^2
                             + (max_i r_i / s_i / 255)^2 / 12  *  sum_oi (W[o, i] s_i)^2

    r_i is the range of an input channel, v_i its variance, where other channels tell part of it the
    geometric mean with what they leave: searched roundings use that.  As shares of the power
    of each layer's output, the sum over all layers is convex in log s.

    Which channels hang together, and what becomes of Clip(0, 6), is as in
    `cross-layer-equalization`.

    Refused, with the reason: channels that something else reads (Sigmoid, an output of the model, a
    subgraph), shared or computed weights.

    Args:
        weights: The format that weights will have, with a scale per channel; `onnxq quantize` fills
            it in.
        activations: The format that activations will have; "float" leaves their noise out.
        samples: Use at most so many samples, spread evenly; 0 uses all.
        patches: Patches of inputs to measure each layer on, about.
        rounds: At most so many steps.
        largest: Scales stay between 1 / largest and largest.
    """

    name: ClassVar[str] = "noise-equalization"

    weights: str = "int8/channel"
    activations: str = "uint8"
    samples: int = 64
    patches: int = 4096
    rounds: int = 300
    largest: float = 12.0

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Scale weights, biases, bounds and what is known of the channels."""
        changes = Changes()
        weights, activations = Format.parse(self.weights), Format.parse(self.activations)
        if weights.granularity != "channel":
            changes.skip("all layers", f"this is for a scale per channel, not {weights}")
            return changes
        coupling = couple(model)
        for name, why in coupling.refused.items():
            changes.skip(name, why)
        for side in coupling.outputs:
            if why := coupling.reason(side.classes):
                changes.skip(side.layer.name, why)
        read = {s.layer.name: s.classes for s in coupling.inputs}
        layers = [s.layer for s in coupling.inputs if supports(s.layer)]
        if not layers:
            return changes
        levels = limits(weights.dtype)[1] - limits(weights.dtype)[0] >> 1
        steps = 0.0 if activations.dtype == "float" else float((1 << activations.bits) - 1)
        known = moments(
            model, layers, ctx, rng=ctx.rng(self), samples=self.samples, patches=self.patches
        )
        tensors = [layer.x.name for layer in layers]
        tensors += [c.node.inputs[0].name for c in coupling.ceilings]
        ranges = ctx.channel_ranges(model, list(dict.fromkeys(tensors)))
        noises: list[Noise] = []
        for layer in layers:
            if layer.name in known:
                noises += _noises(
                    layer,
                    read[layer.name],
                    known[layer.name],
                    ranges.get(layer.x.name),
                    levels=float(levels),
                    steps=steps,
                )
        free = ~coupling.is_fixed(np.arange(coupling.count)) & _is_read(coupling)
        logs, before, after = least_noise(noises, free, self.rounds, float(np.log(self.largest)))
        moved = np.abs(logs) > 1e-3
        if not moved.any():
            return changes
        rescale(model, coupling, np.where(moved, np.exp(logs), 1.0), ranges, changes)
        pairs = sum(bool(moved[s.classes].any()) for s in coupling.outputs)
        gain = 10 * np.log10(before / after)
        changes.add(f"channels of {pairs} layers scaled, {gain:.1f} dB less noise expected")
        return changes


def _is_read(coupling: Coupling) -> np.ndarray:
    """Classes that some layer puts out: only those have weights to undo a scale in, bool."""
    found = np.zeros(coupling.count, bool)
    for side in coupling.outputs:
        found[side.classes] = True
    return found


def _noises(
    layer: Layer,
    classes: np.ndarray,
    statistics: SecondOrder,
    ranges: tuple[np.ndarray, np.ndarray] | None,
    *,
    levels: float,
    steps: float,
) -> list[Noise]:
    """What rounding costs a layer, as shares of the power of its output."""
    rows = rows_of(layer).astype(np.float64)
    covariance = statistics.covariance
    power = float(np.vdot(rows @ covariance, rows))
    if not power > 0:
        return []
    groups, count, columns = rows.shape
    width = classes.size // groups
    parts = rows.reshape(groups, count, width, columns // width)  # a window for each channel
    noises: list[Noise] = []
    for g in range(
        groups if width > 1 else 0
    ):  # of one channel, its scale leaves nothing to choose
        variance = _variances(covariance[g]).reshape(width, -1).sum(axis=1)
        largest = np.abs(parts[g]).max(axis=2)
        part = classes[g * width : (g + 1) * width]
        noises.append(WeightNoise.of(part, largest, variance / (12 * levels**2 * power)))
    if steps and ranges is not None and ranges[0].size == classes.size:
        span = np.maximum(ranges[1], 0) - np.minimum(ranges[0], 0)
        gains = np.square(parts).sum(axis=(1, 3)).reshape(-1)
        noises.append(ActivationNoise.of(classes, span, gains / (12 * steps**2 * power)))
    return noises


def _variances(covariance: np.ndarray) -> np.ndarray:
    """Between the variance of each entry and what the others leave of it, [K]."""
    ridge = 0.01 * float(np.trace(covariance)) / len(covariance) + 1e-30
    # the ridge bounds the condition
    damped: np.ndarray = covariance.astype(np.float32 if len(covariance) > _WIDE else np.float64)
    damped.flat[:: len(damped) + 1] += ridge
    try:
        left = inverse_diagonal(damped)
    except np.linalg.LinAlgError:
        left = inverse_diagonal(damped.astype(np.float64))
    return np.asarray(np.sqrt(np.diag(damped) / left))
