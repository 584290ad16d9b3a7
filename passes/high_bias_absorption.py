"""Move what a channel never falls below into the biases of the layers that read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from onnxq.analysis.cost import Shapes
from onnxq.analysis.distribution import propagate, shapes_of
from onnxq.analysis.offsets import RECTIFIERS, Offsets, Reach, per_channel, trace
from onnxq.errors import RecipeError
from onnxq.kernels import normals
from onnxq.model import BatchNormStatistics, Layer, Model
from onnxq.ops import conv_window, window_sums
from onnxq.pass_manager import Changes, Context

__all__ = ["HighBiasAbsorption"]

# A channel is taken to stay below its mean plus so many standard deviations.
TOP = 6.0
# Less than this share of a standard deviation is not worth moving.
LEAST = 1e-3
# Ranges that are tried in weighing.
TRIALS = 64


@dataclass(frozen=True, kw_only=True)
class HighBiasAbsorption:
    r"""Absorb high biases into the layers that follow.

    Equalization can leave large biases, and with them activations that never come near zero and
    waste the range of their tensor.  What a channel is always above may be taken off it and given
    back by those who read it, since relu(x - c) = relu(x) - c as long as x > c > 0::

        Conv(W1, b1) -> Relu -> Conv(W2, b2)  =  Conv(W1, b1 - c) -> Relu -> Conv(W2, b2 + W2 c)

        c = max(0, beta - 3 |gamma|)        W2 c summed over the window

    beta and gamma are those of the BatchNormalization folded into the first layer; where there was
    none, mean and standard deviation of the channel over the samples, if those are real.  The
    constant goes through Relu, LeakyRelu, PRelu, pooling, data movement, Concat, and Add, whose sum
    lacks it.  The bounds of a Min move by c along with their channels; through a Clip goes what
    stays below its bound.

    Two things go wrong.  A channel that does fall below c is lifted to it.  And at a border that is
    padded with zeros the reading layer gives W2 c back for its whole window, while a part of that
    window never held c.  With ``amount="weighed"`` only the channels that reach highest are
    lowered, and so far that the sum of three expected errors is least: these two, and that of
    rounding what the readers read to `bits` bits, which a smaller range makes finer.
    ``amount="whole"`` takes all of c, and declines where a reader is padded.

    Refused, with the reason: what anything else reads (Sigmoid, an output of the model, a padding
    of zeros, ConvTranspose, MatMul, which has no bias), layers of which nothing is known, and
    biases that are computed.

    Args:
        sigmas: How many standard deviations below its mean a channel is taken never to fall.
        amount: How much of c is absorbed: "weighed" or "whole", as above.
        bits: Of the activations, for weighing.
        limit: Use at most so many samples where there was no normalization.

    Source: Nagel et al. 2019 (arXiv 1906.04721), section 4.1.3.
    """

    name: ClassVar[str] = "high-bias-absorption"

    sigmas: float = 3.0
    amount: Literal["weighed", "whole"] = "weighed"
    bits: int = 8
    limit: int = 64

    def __post_init__(self) -> None:
        if not self.sigmas >= 0:
            raise RecipeError(f"sigmas: wanted 0 or more, got {self.sigmas}")
        if self.bits < 2:
            raise RecipeError(f"bits: wanted 2 or more, got {self.bits}")
        if self.limit < 0:
            raise RecipeError(f"limit: wanted 0 or more samples, got {self.limit}")

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Move constants from biases to biases."""
        changes = Changes()
        model.infer()
        shapes = shapes_of(model)
        reaches = self._reaches(model, ctx)
        for layer in model.layers():
            why = self._absorb(model, layer, reaches, shapes, changes)
            if why:
                changes.skip(layer.name, why)
        return changes

    def _reaches(self, model: Model, ctx: Context) -> dict[str, Reach]:
        """Where channels lie: by normalization, else on the samples, else by estimate."""
        known, _ = propagate(model)
        found = {
            name: Reach(d.mean, d.std, d.mean - self.sigmas * d.std, d.extremes(TOP)[1])
            for name, d in known.items()
        }
        layers = model.layers()
        for layer in layers:  # by an estimate nothing is taken off, only less than otherwise
            if layer.y.name in known and known[layer.y.name].estimated:
                del found[layer.y.name]
        if ctx.data is None or ctx.is_synthetic:  # what is made up does not tell what never occurs
            return found
        wanted = [t.name for layer in layers for t in (layer.x, layer.y)]
        wanted += [n.inputs[0].name for n in model.graph.nodes if n.op in RECTIFIERS]
        open_ = [n for n in dict.fromkeys(wanted) if n not in known or known[n].estimated]
        for name, (mean, std) in ctx.channel_moments(model, open_, self.limit).items():
            found[name] = Reach(mean, std, mean - self.sigmas * std, mean + TOP * std)
        return found

    def _absorb(
        self,
        model: Model,
        layer: Layer,
        reaches: dict[str, Reach],
        shapes: Shapes,
        changes: Changes,
    ) -> str | None:
        """Absorb what one layer puts out; why not, if it does not."""
        reach = reaches.get(layer.y.name)
        if layer.op == "MatMul":
            return "MatMul takes no bias"
        if why := layer.unscalable:
            return why
        if reach is None or reach.low.size != layer.output_channels:
            return f"nothing is known of {layer.y.name} without samples"
        least = LEAST * reach.std
        if not (reach.low > least).any():
            return "no channel is always above zero"
        offsets = trace(model, layer, reaches, shapes)
        if not offsets.readers:
            offsets.limit[:] = 0.0
            offsets.reasons.append("no layer reads it")
        shift = np.where(offsets.limit > least, offsets.limit, 0.0)
        if not shift.any():
            return offsets.reasons[0]
        if self.amount == "weighed":
            shift = self._weighed(offsets, shift, reaches, shapes)
        elif padded := [r.name for r, _ in offsets.readers if r.is_padded]:
            return f"{padded[0]} pads it with zeros"
        if not shift.any():
            return "finer steps would win less than is lost below, or at padded borders"
        move = _Move(model, layer, offsets, shift, shapes)
        move.biases()
        move.bounds()
        move.statistics(reaches)
        names = ", ".join(reader.name for reader, _ in offsets.readers)
        changes.add(
            f"{layer.name}: {np.count_nonzero(shift)} channels, at most {shift.max():.3g}, "
            f"into {names}"
        )
        return None

    def _weighed(
        self, offsets: Offsets, limit: np.ndarray, reaches: dict[str, Reach], shapes: Shapes
    ) -> np.ndarray:
        """As much of the limit as makes the sum of all errors least."""
        y, top = offsets.carried[0].tensor.name, offsets.top
        lowest, highest = float((top - limit).max()), float(top.max())
        trials = [np.clip(top - t, 0.0, limit) for t in np.linspace(highest, lowest, TRIALS)]
        power = [_power(reader) for reader, _ in offsets.readers]

        def error(shift: np.ndarray) -> float:
            lifted = normals.square_shortfall(reaches[y].mean, reaches[y].std, shift)
            total = 0.0
            for (reader, flow), squares in zip(offsets.readers, power, strict=True):
                own = reaches.get(flow.tensor.name)
                tops = flow.spread(top) if own is None else own.top
                given = flow.spread(shift)
                step = (tops - given).max() / (2**self.bits - 1)
                total += squares @ (flow.spread(np.where(shift > 0, lifted, 0.0)) + step**2 / 12)
                total += _border_error(reader, given, shapes)
            return total

        return min(trials, key=error)


def _power(layer: Layer) -> np.ndarray:
    """Squared weights that each input channel meets, summed, [I]."""
    squares = np.square(layer.weight * layer.node.attrs.get("alpha", 1.0), dtype=np.float64)
    channel = layer.along_inputs(np.arange(layer.input_channels))
    index = np.broadcast_to(channel, squares.shape).reshape(-1)
    return np.bincount(index, squares.reshape(-1), layer.input_channels)


def _border_error(layer: Layer, shift: np.ndarray, shapes: Shapes) -> float:
    """Squared error, summed over output channels, of giving W c back where taps are padded.

    The mean over all positions.
    """
    if not layer.is_padded:
        return 0.0
    spatial = (shapes.get(layer.x.name) or ())[2:]
    window = conv_window(dict(layer.node.attrs), spatial, tuple(layer.weight.shape[2:]))
    held = (layer.weight * layer.along_inputs(shift)).sum(axis=1)  # [O, *size]
    given, share = window_sums(held, window, spatial)
    lost = held.reshape(len(held), -1).sum(axis=1).reshape(-1, *[1] * share.ndim) - given
    return float((np.square(lost).sum(axis=0) * share).sum())


@dataclass(frozen=True, eq=False)
class _Move:
    """Takes constants off one layer's output and gives them to its readers."""

    model: Model
    layer: Layer
    offsets: Offsets
    shift: np.ndarray
    shapes: Shapes

    def biases(self) -> None:
        """b1 - c, b2 + W2 c."""
        layer = self.layer
        layer.set_bias((layer.take_bias() - self.shift).astype(layer.weight.dtype))
        for reader, flow in self.offsets.readers:
            given = reader.along_inputs(flow.spread(self.shift))
            extra = reader.sum_over_inputs(reader.weight * given)
            extra *= float(reader.node.attrs.get("alpha", 1.0))  # of a Gemm
            reader.set_bias((reader.take_bias() + extra).astype(reader.weight.dtype))

    def bounds(self) -> None:
        """The bounds of Min, lower by c."""
        for node, index, flow in self.offsets.bounds:
            old = node.inputs[index]
            values = per_channel(self.model, old, flow, self.shapes) - flow.spread(self.shift)
            rank = len(self.shapes[flow.tensor.name] or ())
            along = [-1 if i == flow.axis else 1 for i in range(rank)]
            values = values.reshape(along).astype(self.model.array(old).dtype)
            node.inputs[index] = self.model.constant(f"{node.name}.bounds", values)

    def statistics(self, reaches: dict[str, Reach]) -> None:
        """What is known of the tensors that c is now missing from."""
        for flow in self.offsets.carried:
            name, shift = flow.tensor.name, flow.spread(self.shift)
            norm, reach = self.model.batch_norms.get(name), reaches.get(name)
            if norm is not None and norm.beta.size == shift.size:
                beta = (norm.beta - shift).astype(np.float32)
                self.model.batch_norms[name] = BatchNormStatistics(norm.gamma, beta)
            if reach is not None and reach.low.size == shift.size:
                reaches[name] = reach.minus(shift)
