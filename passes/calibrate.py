"""Weight encodings from the weights, activation encodings from streamed statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.analysis.distribution import Distribution, propagate, statistics_of
from onnxq.analysis.unseen import UNSEEN, UNSEEN_CLASSES, class_scores, widened
from onnxq.biases import guard_bias, written_bias
from onnxq.encoding import Encoding, Format
from onnxq.errors import CalibrationError, ModelError
from onnxq.formats import LayerFormat, weight_encoding
from onnxq.kernels.gates import gate_range
from onnxq.kernels.observe import moments, tally
from onnxq.model import Layer, Model, consumers, producer
from onnxq.ops import bias_input
from onnxq.pass_manager import Changes, Context
from onnxq.placement import Ends, Placement, data_inputs, gate_factor, match_nodes, place
from onnxq.statistics import Method, TensorStatistics, check_method
from onnxq.targets import Target
from onnxq.weight_only import in_blocks, unfit

__all__ = ["Calibrate"]

# Sharing a Concat's scale may raise the noise that an input's other readers see by this factor.
SHARED_NOISE = 1.5
# Values from which on the range of a single channel is believed, and for each sample, so that
# results without positions, such as scores of classes, are not.
MANY_VALUES, MANY_A_SAMPLE = 100, 2
_FLOATS = (np.float16, np.float32, np.float64)
# Bins of a model input's histogram.
INPUT_BINS = 4096
# How many standard deviations a channel spans where batch normalization tells its range.
SIGMAS = 6.0
# So many tensors are named where nothing is known of them.
NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Propose an encoding for each weight and each activation that is to be in integers.

    Where integers flow is decided by `onnxq.placement`.  Activation ranges come from one pass over
    the samples::

        samples -> onnxruntime -> histogram per tensor -> range -> scale = (high - low) / 255
                                                                   zero point = round(-low / scale)

    1. A tensor that only moves data (Reshape, MaxPool, Pad...) has the encoding of its source.
    2. The inputs of a Concat take the encoding of its result, unless that would undo a Relu or
       Clip of theirs or coarsen them for their other readers; those are requantized instead.
       Its constants keep one of their own.
    3. The range after a Relu or Clip stays within its bounds, so that the runtime can drop it.
    4. The result of a Conv that only float nodes read (a model's output, a float activation) has a
       scale and zero point per channel: the runtime multiplies them into the weight's scales, so
       they cost nothing.  Before a gate such as SiLU the range ends where the gate is flat.
    5. A weight scale is raised where the int32 bias, whose scale is s_x * s_w, would overflow.
    6. Ranges that synthetic samples showed are widened by a tenth, those of class scores twofold
       and to both sides.

    Without samples, or with ``ranges="batch-norm"``, the histograms are those that batch
    normalization lets expect: behind it a channel is N(beta, gamma^2), and
    `onnxq.analysis.distribution` follows it through the graph.  What is not known so, as the
    model's inputs never are, still needs samples.

    Formats that are not given are the target's, and its rules hold: zero points of 0, results of a
    given scale (Softmax and Sigmoid on some), one scale for weights that may have no more.

    With ``activations="float"`` weights alone get an encoding, those that the target multiplies by
    floats, and no samples are read.  In blocks, neighbours along the inputs share a scale; a layer
    whose inputs are no multiple of the block has one scale per channel.

    Layers may have `formats` of their own, SELECTOR=FORMAT.  A selector is a glob on node names and
    operator types, or ``first`` (the layers that an input of the model reaches without another
    layer in between), ``last`` (those from which an output is reached so) or ``depthwise`` (the
    convolutions with a group per input channel).  Of entries that name the same layer the last one
    counts; layers that share a weight, and are not of the same format, get a copy each.

    Refused, and left in float: what the target has no integer kernel for, weights and biases that
    are computed, what `exclude` names.

    Args:
        weights: Format of weights, such as int8/channel, int4/channel or int4/block=32; none: the
            target's.
        activations: Format of activations, such as uint8, or float; none: the target's.
        formats: Formats of weights layer by layer, such as "first=int8/channel".
        activation_formats: Formats of some activations, such as "Softmax=uint16": by the name of
            the tensor, or as layers are selected, for what they put out.
        method: minmax, moving-average, percentile, entropy (KL divergence, as TensorRT) or mse
            (least expected squared error, as AIMET's tf-enhanced).
        percentile: Share of values inside the range, in percent, for method percentile.
        exclude: Globs on node names and operator types that stay in float.
        exits: Whether results of convolutions that only float nodes read have scales per "channel",
            as far as samples tell them, or one per "tensor".
        ranges: Where ranges come from, given samples: "samples", or "batch-norm" wherever that
            tells them.
        weight_only: With float activations, "fused": the weights that the target multiplies as they
            are; "all": the others, too, one scale per channel, which takes fewer bytes and more
            time, as each run makes floats of them.

    Source: Krishnamoorthi 2018 (arXiv 1806.08342); Migacz 2017 (entropy); Nagel et al. 2019
    (arXiv 1906.04721), section 5 (ranges from batch normalization).
    """

    name: ClassVar[str] = "calibrate"

    weights: str | None = None
    activations: str | None = None
    formats: tuple[str, ...] = ()
    activation_formats: tuple[str, ...] = ()
    method: Method = "mse"
    percentile: float = 99.999
    exclude: tuple[str, ...] = ()
    exits: Literal["channel", "tensor"] = "channel"
    ranges: Literal["samples", "batch-norm"] = "samples"
    weight_only: Literal["fused", "all"] = "fused"

    def __post_init__(self) -> None:
        for written in (self.weights, self.activations):
            if written is not None:
                Format.parse(written)
        for text in (*self.formats, *self.activation_formats):
            LayerFormat.parse(text)
        check_method(self.method, self.percentile)

    def apply(self, model: Model, ctx: Context) -> Changes:
        """Fill `model.encodings`."""
        target = ctx.target
        activations = self.activations or target.activations[0]
        weights = self.weights or str(target.weights_with(Format.parse(activations)))
        return replace(self, weights=weights, activations=activations)._encode(model, ctx)

    @property
    def _weights(self) -> Format:
        assert self.weights is not None
        return Format.parse(self.weights)

    @property
    def _activations(self) -> Format:
        assert self.activations is not None
        return Format.parse(self.activations)

    def _encode(self, model: Model, ctx: Context) -> Changes:
        changes = Changes()
        self._check_formats(ctx.target)
        model.raise_opset(13)  # the first with scales per axis
        ctx.target.check_opset(model.opset)
        formats = self._weight_formats(model, ctx.target, changes)
        if self._activations.dtype == "float":
            self._encode_weights_alone(model, ctx.target, formats, changes)
            return changes
        placement = place(model, ctx.target, self.exclude, self._activations.dtype)
        model.encodings.float_nodes = dict(placement.float_nodes)
        for layer in model.layers():
            if layer.name in placement.float_nodes:
                changes.skip(layer.name, placement.float_nodes[layer.name])
        _check_constants(model, placement)
        measured = _Activations(self, model, placement, ctx)
        activations = measured.encode()
        activations.update(self._encode_exits(measured))
        model.encodings.replace(activations)
        encoded = self._encode_constants(model, ctx.target, placement, formats, changes)
        changes.add(f"{len(activations)} activations: {self.activations} by {self.method}")
        if measured.known:
            estimates = sum(d.estimated for d in measured.known.values())
            how = f", {estimates} of them estimates" if estimates else ""
            changes.add(f"{len(measured.known)} ranges from batch normalization{how}")
        self._count_weights(encoded, changes)
        if ctx.is_synthetic:
            changes.add(
                f"ranges widened by {UNSEEN:g}, of class scores by {UNSEEN_CLASSES:g}:"
                " synthetic samples do not show all"
            )
        return changes

    def _check_formats(self, target: Target) -> None:
        activations = self._activations
        target.check(self._weights, activations)
        for entry in map(LayerFormat.parse, self.formats):
            target.check(entry.format, activations, f"--format {entry.selector}=")
        for entry in map(LayerFormat.parse, self.activation_formats):
            target.check(self._weights, entry.format)

    def _weight_formats(self, model: Model, target: Target, changes: Changes) -> dict[str, Format]:
        """Name of each layer -> the format of its weight."""
        formats = {layer.name: self._weights for layer in model.layers()}
        for entry in map(LayerFormat.parse, self.formats):
            names = entry.layers(model)
            formats.update(dict.fromkeys(names, entry.format))
            count = f"{len(names)} layers" if names else "the model has no such layer"
            changes.add(f"{entry}: {count}")
        for layer in model.layers():
            kernel, wanted = target.kernels.get(layer.op), formats[layer.name]
            if kernel and not kernel.per_channel and wanted.granularity == "channel":
                formats[layer.name] = Format(wanted.dtype)
                changes.skip(layer.name, f"one scale: {target.name} takes no more for {layer.op}")
        return formats

    def _count_weights(self, encoded: Sequence[Format], changes: Changes, how: str = "") -> None:
        """Say how many weights have which format."""
        wanted = self._weights
        changes.add(f"{encoded.count(wanted)} weights: {self.weights}{how}")
        for other in dict.fromkeys(encoded):
            if other != wanted:
                changes.add(f"{encoded.count(other)} weights: {other}{how}")

    def _encode_weights_alone(
        self, model: Model, target: Target, formats: Mapping[str, Format], changes: Changes
    ) -> None:
        excluded = match_nodes(model, self.exclude)
        encoded = []
        for layer in model.layers():
            wanted = formats[layer.name]
            block = wanted.block
            why = "excluded" if layer.name in excluded else unfit(layer, target)
            stored = why is not None and self.weight_only == "all" and layer.name not in excluded
            if why is not None and not (stored and layer.weight.dtype == np.float32):
                model.encodings.float_nodes[layer.name] = why
                changes.skip(layer.name, why)
                continue
            values = finite(model, layer.weight_tensor)
            whole = "it computes in float" if stored else in_blocks(layer, block) if block else None
            if block and whole is not None:
                changes.skip(layer.name, f"{whole}: one scale per channel")
            if block and whole is None:
                encoding = _blocks(layer, values, wanted)
            else:
                encoding = weight_encoding(layer, values, wanted, self._activations)
            if model.encodings.get(layer.weight_tensor.name, encoding) != encoding:
                layer.set_weight(values)  # a copy: it is read along another axis, or otherwise
            model.encodings[layer.weight_tensor.name] = encoding
            encoded.append(wanted)
        self._count_weights(encoded, changes, ", activations in float")

    def _encode_exits(self, measured: _Activations) -> dict[str, Encoding]:
        """Encodings per channel for results of convolutions that leave the integers."""
        found = {}
        for name in measured.exits:
            seen = measured.statistics[name].channels
            if name in measured.known:
                low, high = measured.known[name].extremes(SIGMAS)
            elif seen is not None and _many_values(measured.statistics[name], seen.shape[1]):
                low, high = _with_margin(*seen)
                if name in measured.gates:
                    low = _above_flat(low, high, measured.gates[name], 1 << measured.format.bits)
                if name in measured.unseen:
                    low, high = low * UNSEEN, high * UNSEEN
            else:
                continue
            found[name] = Encoding.of_ranges(low, high, measured.format.dtype, axis=1)
        return found

    def _encode_constants(
        self,
        model: Model,
        target: Target,
        placement: Placement,
        formats: Mapping[str, Format],
        changes: Changes,
    ) -> list[Format]:
        """Encode weights and operands; the formats that the weights were to have."""
        encoded = []
        ends = Ends(model, placement.float_nodes)
        for node in model.graph.nodes:
            if node.name not in placement.nodes:
                continue
            layer = Layer.of(model, node)
            if layer is not None:
                end = ends.of(layer.y, placement.nodes[node.name])
                wanted = formats[layer.name]
                self._encode_weight(model, target, layer, end, wanted)
                encoded.append(wanted)
                if layer.side == 0 and wanted != self._weights:
                    why = f"its weight is on the left: {self.activations}, not {wanted}"
                    changes.skip(layer.name, why)
                continue
            for index, tensor in enumerate(data_inputs(node, placement.nodes[node.name])):
                if isinstance(tensor, gs.Constant):
                    self._encode_operand(model, target, node, index, tensor)
        return encoded

    def _encode_operand(
        self, model: Model, target: Target, node: gs.Node, index: int, tensor: gs.Constant
    ) -> None:
        """Of a constant that is added, multiplied or joined: as activations are written."""
        values = finite(model, tensor)
        dtype, ends = self._activations.dtype, (values.min(initial=0), values.max(initial=0))
        encoding = Encoding.of_range(*ends, dtype, symmetric=target.symmetric)
        if model.encodings.get(tensor.name, encoding) != encoding:  # it is a weight, too
            tensor = node.inputs[index] = model.constant(f"{tensor.name}.{node.name}", values)
        model.encodings[tensor.name] = encoding

    def _encode_weight(
        self, model: Model, target: Target, layer: Layer, end: gs.Tensor, wanted: Format
    ) -> None:
        """Of the weight of a layer, given the tensor that has the encoding of its result."""
        values = finite(model, layer.weight_tensor)
        known = model.encodings.get(layer.weight_tensor.name)
        encoding = weight_encoding(
            layer, values, wanted, self._activations, symmetric=target.symmetric
        )
        if known is not None and (known.dtype, known.axis) != (encoding.dtype, encoding.axis):
            layer.set_weight(values)  # a copy: it is read along another axis, or in another format
            known = None
        if known is not None:
            encoding = replace(encoding, scale=np.maximum(encoding.scale, known.scale))
        x = model.encodings.get(layer.x.name)
        if x is not None and bias_input(layer.op) is not None and layer.bias is not None:
            finite(model, layer.bias_tensor)
        if x is not None and bias_input(layer.op) is not None and target.bias == "int32":
            encoding = guard_bias(encoding, written_bias(layer, end), float(x.scale))
        model.encodings[layer.weight_tensor.name] = encoding


def _blocks(layer: Layer, values: np.ndarray, wanted: Format) -> Encoding:
    """Of a weight whose neighbours along the inputs share a scale."""
    axis = 1 - layer.channel_axis
    shape = [*values.shape]
    shape[axis : axis + 1] = [shape[axis] // wanted.block, wanted.block]
    bound = np.abs(values.reshape(shape)).max(axis=axis + 1)
    return Encoding.symmetric(bound, wanted.dtype, axis, wanted.block)


def _many_values(known: TensorStatistics, channels: int) -> bool:
    """Whether the samples gave each channel enough values to believe its range.

    A class that no sample belongs to has shown none of its large logits.
    """
    return known.count >= max(MANY_VALUES, MANY_A_SAMPLE * known.batches) * channels


def _with_margin(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Channel ranges with room for what the samples did not show, within the tensor's range."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    room = (high - low) * 0.5
    return np.maximum(low - room, low.min()), np.minimum(high + room, high.max())


def _above_flat(
    low: np.ndarray, high: np.ndarray, gate: Callable[[np.ndarray], np.ndarray], levels: int
) -> np.ndarray:
    """Lower ends of ranges raised to where a gate gives less than half a step, as it does below.

    Far below zero SiLU is flat, so steps spent there are lost.
    """
    tried = low[:, None] * np.linspace(0, 1, levels + 1)[1:]
    half = (high[:, None] - tried) / (2 * (levels - 1))
    beyond = np.maximum.accumulate(np.abs(gate(tried))[:, ::-1], axis=1)[:, ::-1]
    flat = (beyond <= half) & (np.abs(gate(low))[:, None] <= half)
    first = np.where(flat.any(axis=1), flat.argmax(axis=1), levels - 1)
    return np.take_along_axis(tried, first[:, None], 1)[:, 0]


class _Activations:
    """Encodings of activations: statistics, shared groups, bounds."""

    def __init__(self, step: Calibrate, model: Model, placement: Placement, ctx: Context) -> None:
        self.step = step
        self.target = ctx.target
        self.format = step._activations
        self.placement = placement
        self.fixed = self._fixed(model)
        self.source = {name: name for name in placement.tensors}
        for name, result in placement.moves:
            self.source[result] = self.source[name]
        # a Concat of activations alone has the statistics of its inputs
        joined = {
            out
            for names, out in placement.joins
            if out not in placement.bounds and all(n in self.source for n in names)
        }
        roots = dict.fromkeys(self.source.values())
        observed = [n for n in roots if n not in joined]
        histogram = step.method in ("percentile", "entropy", "mse")
        self.formats = self._formats(model)
        self.exits = self._exits()
        self.known: dict[str, Distribution] = {}
        measured = self._statistics(model, ctx, observed, histogram)
        self.gates = {n: f for n, f in _gates(model).items() if n in self.source}
        self.readers = self._count_readers(model)
        self.statistics: dict[str, TensorStatistics] = {n: measured[n] for n in observed}
        for names, out in placement.joins:
            if out in joined:
                self.statistics[out] = _merged(self.statistics, [self.source[n] for n in names])
        self.inputs = self._input_ranges(model, ctx) if step.method == "mse" else {}
        self.tensors = model.tensors()
        self.unseen: set[str] = set()  # what the samples may not show all of
        if ctx.is_synthetic:  # what is made up for an input has the range that it is meant to have
            self.unseen = {n for n in roots if n not in model.inputs and not self._is_derived(n)}
        self.scores = class_scores(model, self.statistics, self.unseen)

    def _formats(self, model: Model) -> dict[str, Format]:
        """The formats of the tensors that have one of their own; of moved data, the source's."""
        found = {}
        for entry in map(LayerFormat.parse, self.step.activation_formats):
            for name in entry.activations(model, self.placement):
                found[self.source[name]] = entry.format
        return found

    def _is_derived(self, name: str) -> bool:
        """Whether batch normalization tells the range, of a Concat that of each input."""
        inputs = [names for names, out in self.placement.joins if out == name]
        if name in self.known or not inputs:
            return name in self.known
        return all(self.source[n] in self.known for n in inputs[0] if n in self.source)

    def _count_readers(self, model: Model) -> dict[str, int]:
        """How many read a tensor, or what is only moved from it; the model's outputs count."""
        nodes, tensors = self.placement.nodes, model.tensors()
        readers = dict.fromkeys(self.source.values(), 0)
        for name, root in self.source.items():
            readers[root] += model.is_output(tensors[name])
            for node in consumers(tensors[name]):
                kernel = nodes.get(node.name)
                readers[root] += kernel is None or kernel.role != "move"
        return readers

    def _statistics(
        self, model: Model, ctx: Context, names: Sequence[str], histogram: bool
    ) -> Mapping[str, TensorStatistics]:
        """From the samples, or as far as possible from batch normalization."""
        if self.step.ranges == "samples" and ctx.has_statistics(names, self.exits):
            return ctx.statistics(model, names, histogram=histogram, channels=self.exits)
        known, unknown = propagate(model)
        if ctx.has_statistics(names):  # samples, made-up ones, too, are worth more than estimates
            known = {n: d for n, d in known.items() if not d.estimated}
        lacking = [n for n in names if n not in known]
        exits = [n for n in self.exits if n in lacking]
        if lacking and not ctx.has_statistics(lacking, exits):
            says = "; ".join(f"{n}: {unknown[n]}" for n in lacking[:NAMED])
            more = f" and {len(lacking) - NAMED} more" if len(lacking) > NAMED else ""
            raise CalibrationError(
                f"this needs calibration samples: nothing is known of {says}{more}",
                fix="give data (--calib PATH), real or synthetic, or exclude the nodes",
            )
        measured = (
            ctx.statistics(model, lacking, histogram=histogram, channels=exits) if lacking else {}
        )
        self.known = {n: known[n] for n in names if n in known}
        return {**{n: statistics_of(d, SIGMAS) for n, d in self.known.items()}, **measured}

    def _exits(self) -> list[str]:
        """Results of convolutions that may have a range per channel."""
        if self.step.exits == "tensor":
            return []
        # onnxruntime on x64 makes int8 uint8, not per channel
        if self.format.dtype != "uint8" or not self.target.cpu:
            return []
        free = (0.0, np.inf)
        bounds = self.placement.bounds
        return [
            n for n in self.placement.exits if bounds.get(n, free) == free and n not in self.formats
        ]

    def _fixed(self, model: Model) -> dict[str, Encoding]:
        """Results whose scale and zero point the target gives."""
        found = {}
        for node in model.graph.nodes:
            kernel = self.placement.nodes.get(node.name)
            for dtype, scale, zero in () if kernel is None else kernel.results:
                if dtype == self.format.dtype:
                    given = np.array(scale, np.float32), np.array(zero, np.int32)
                    found[node.outputs[0].name] = Encoding(dtype, *given)
        return found

    def encode(self) -> dict[str, Encoding]:
        encodings = {n: self._encode(n) for n in dict.fromkeys(self.source.values())}
        for names, out in reversed(self.placement.joins):
            joint = encodings[self.source[out]]
            for root in dict.fromkeys(self.source[n] for n in names if n in self.source):
                if root not in self.fixed and self._may_share(root, encodings[root], joint):
                    encodings[root] = joint
        return {name: encodings[root] for name, root in self.source.items()}

    def _encode(self, name: str) -> Encoding:
        if name in self.fixed:
            return self.fixed[name]
        low, high = self._range(name)
        dtype = self.formats.get(name, self.format).dtype
        if name in self.unseen:
            tensor = self.tensors[name]
            low, high = widened(tensor, low, high, is_score=name in self.scores)
        bounds = self.placement.bounds.get(name)
        if bounds is not None:
            low, high = max(low, bounds[0]), min(high, bounds[1])
        if bounds is None or self.target.symmetric:  # then the Relu or Clip does its work itself
            return Encoding.of_range(low, high, dtype, symmetric=self.target.symmetric)
        return Encoding.of_range(low, high, dtype).within(*bounds)

    def _range(self, name: str) -> tuple[float, float]:
        known, bits = self.statistics[name], self.formats.get(name, self.format).bits
        if name in self.inputs:
            return self.inputs[name]
        gate = self.gates.get(name)
        if gate is not None and self.step.method == "mse" and known.bins is not None:
            width = 2.0**known.exponent
            centres = (known.offset + np.arange(len(known.bins)) + 0.5) * width
            low, high = min(known.minimum, 0.0), max(known.maximum, 0.0)
            return gate_range(centres, known.bins, low, high, gate, 1 << bits)
        return known.range(self.step.method, bits=bits, percentile=self.step.percentile)

    def _input_ranges(self, model: Model, ctx: Context) -> dict[str, tuple[float, float]]:
        """Ranges of the model's inputs of least error relative to each sample's power.

        Recordings differ in loudness by orders of magnitude; a plain mean would leave the quiet
        ones a handful of steps.
        """
        names = [n for n in model.inputs if n in self.statistics]
        known = {n: self.statistics[n] for n in names}
        edges = {
            n: np.linspace(min(k.minimum, 0.0), max(k.maximum, 0.0), INPUT_BINS + 1)
            for n, k in known.items()
            if k.minimum < k.maximum
        }
        weights = {n: np.zeros(INPUT_BINS) for n in edges}
        if not edges or ctx.data is None:
            return {}
        for feed in ctx.samples(model):
            for name, total in weights.items():
                seen = moments(feed[name])
                if seen.squares > 0 and not seen.strange:
                    total += tally(feed[name], edges[name]) / seen.squares
        levels = {n: 1 << self.formats.get(n, self.format).bits for n in edges}
        return {
            n: gate_range((e[1:] + e[:-1]) / 2, weights[n], e[0], e[-1], _same, levels[n])
            for n, e in edges.items()
            if weights[n].any()
        }

    def _may_share(self, name: str, own: Encoding, joint: Encoding) -> bool:
        """Whether a Concat input may take the encoding of the result."""
        if own.dtype != joint.dtype:
            return False
        bounds = None if self.target.symmetric else self.placement.bounds.get(name)
        if bounds is not None and (joint.low < bounds[0] or joint.high > bounds[1]):
            return False
        if self.readers[name] <= 1:
            return True  # rounding once, to the joint grid, beats rounding twice
        noise = [_noise(self.statistics[name], e) for e in (joint, own)]
        return noise[0] <= SHARED_NOISE * noise[1]


def _gates(model: Model) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Tensors that only a gate x * f(x) reads -> the gate as a function."""
    found: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    for node in model.graph.nodes:
        index = gate_factor(node)
        if index is None:
            continue
        x, gate = node.inputs[index], producer(node.inputs[1 - index])
        if len(consumers(x)) == 2 and gate is not None and not model.is_output(x):
            if gate.op == "Sigmoid":
                found[x.name] = _silu
            elif gate.op == "HardSigmoid":
                slope, offset = gate.attrs.get("alpha", 0.2), gate.attrs.get("beta", 0.5)
                found[x.name] = partial(_hard_swish, slope=slope, offset=offset)
    return found


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _silu(x: np.ndarray) -> np.ndarray:
    y: np.ndarray = x / (1 + np.exp(-np.clip(x, -60, 60)))
    return y


def _hard_swish(x: np.ndarray, *, slope: float, offset: float) -> np.ndarray:
    y: np.ndarray = x * np.clip(slope * x + offset, 0, 1)
    return y


def _check_constants(model: Model, placement: Placement) -> None:
    """Name a constant that is NaN before it shows in every activation.

    What runs in integers may not be infinite either; elsewhere, a mask of -inf means something.
    """
    for node in model.graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.dtype in _FLOATS:
                if node.name in placement.nodes:
                    finite(model, tensor)
                else:
                    refuse_nan(model, tensor)


def refuse_nan(model: Model, tensor: gs.Constant) -> None:
    """Name a constant that holds NaN.

    Raises:
        ModelError: A value is NaN.
    """
    values = model.array(tensor)
    if values.dtype.kind == "f" and (bad := int(np.isnan(values).sum())):
        raise _unhealthy(f"{bad} of {values.size} values are NaN", tensor)


def finite(model: Model, tensor: gs.Tensor) -> np.ndarray:
    """The values of a constant.

    Raises:
        ModelError: A value is NaN or infinite.
    """
    values = model.array(tensor)
    if not np.isfinite(values).all():
        bad = int(values.size - np.isfinite(values).sum())
        raise _unhealthy(f"{bad} of {values.size} values are NaN or infinite", tensor)
    return values


def _unhealthy(what: str, tensor: gs.Tensor) -> ModelError:
    return ModelError(
        what,
        where=f"weight {tensor.name}",
        fix="export the model again from a healthy checkpoint",
    )


def _merged(known: Mapping[str, TensorStatistics], names: list[str]) -> TensorStatistics:
    total = known[names[0]]
    for name in names[1:]:
        total = total.merge(known[name])
    return total


def _noise(statistics: TensorStatistics, encoding: Encoding) -> float:
    if statistics.bins is None:
        return float(encoding.scale) ** 2 / 12
    return statistics.noise(encoding.low, encoding.high, encoding.qmax - encoding.qmin + 1)
