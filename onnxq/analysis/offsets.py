"""Where a constant per channel, taken off what a layer puts out, can be given back.

From the output of a layer the constant c goes with its channels: through data movement and pooling
as it is, through an Add from one operand into the sum, through Relu and its like as long as
x > c > 0, where f(x - c) = f(x) - c, to the layers that read it and whose biases take W c.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.analysis.cost import Shapes
from onnxq.analysis.movement import follow, is_followed
from onnxq.model import Layer, Model, consumers, has_subgraph, is_standard

__all__ = ["RECTIFIERS", "Carried", "Offsets", "Reach", "per_channel", "trace"]

# What leaves x - c as it is while x > c > 0.
RECTIFIERS = frozenset({"Clip", "LeakyRelu", "PRelu", "Relu"})


@dataclass(frozen=True, eq=False)
class Reach:
    """Where the channels of a tensor lie, float64 [C] each.

    Args:
        mean: Their means.
        std: Their standard deviations.
        low: What they hardly ever fall below.
        top: What they hardly ever rise above.
    """

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    top: np.ndarray

    def minus(self, shift: np.ndarray) -> Reach:
        """The same channels with a constant taken off each."""
        return Reach(self.mean - shift, self.std, self.low - shift, self.top - shift)


@dataclass(frozen=True, eq=False)
class Carried:
    """A tensor that the channels of the layer have come to.

    Args:
        tensor: The tensor.
        source: Channel of the layer that each of its channels carries, -1 for none, int64 [C].
        axis: The axis that the channels run along.
        plain: Whether its values lie where those of the layer lie: nothing was added to them.
    """

    tensor: gs.Tensor
    source: np.ndarray
    axis: int
    plain: bool = True

    def spread(self, values: np.ndarray) -> np.ndarray:
        """One value per channel of the layer as one per channel of the tensor, 0 for others."""
        return np.asarray(np.append(values, 0.0)[self.source])


@dataclass(eq=False)
class Offsets:
    """What may be taken off the output of one layer.

    Attributes:
        limit: At most so much per channel, float64 [C].
        top: What the channels hardly ever rise above where they are read, float64 [C].
        carried: The tensors that it is then missing from, the layer's output first.
        readers: The layers that can give it back, with what they read.
        bounds: Min nodes on the way, with the index of their bounds: these move along.
        reasons: Why channels are limited.
    """

    limit: np.ndarray
    top: np.ndarray
    carried: list[Carried] = field(default_factory=list)
    readers: list[tuple[Layer, Carried]] = field(default_factory=list)
    bounds: list[tuple[gs.Node, int, Carried]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def trace(model: Model, layer: Layer, reaches: dict[str, Reach], shapes: Shapes) -> Offsets:
    """Find out where the output of a layer goes.

    Args:
        model: The model.
        layer: A layer whose output channels are known.
        reaches: Where the channels of tensors lie, by name; that of the layer's output is needed.
        shapes: Concrete shapes by name.
    """
    return _Trace(model, layer, reaches, shapes).run()


class _Trace:
    """Walks from a layer to the end, forwards.

    Rules give what each output carries, or say why the channels that come in cannot be moved.
    """

    def __init__(
        self, model: Model, layer: Layer, reaches: dict[str, Reach], shapes: Shapes
    ) -> None:
        self.model = model
        self.layer = layer
        self.reaches = reaches
        self.shapes = shapes
        reach = reaches[layer.y.name]
        self.found = Offsets(np.maximum(reach.low, 0.0), reach.top.copy())
        self.flows: dict[int, Carried] = {}
        self.rules: dict[str, Callable[[gs.Node, Carried], list[Carried] | str]] = {
            "Add": self._add,
            "AveragePool": self._average_pool,
            "Dropout": self._same,
            "GlobalAveragePool": self._same,
            "GlobalMaxPool": self._same,
            "Identity": self._same,
            "MaxPool": self._same,
            "Min": self._minimum,
            "ReduceMean": self._reduce,
            "Resize": self._resize,
            "Sub": self._add,
            "Sum": self._add,
            **dict.fromkeys(RECTIFIERS, self._rectify),
            "Clip": self._clip,
        }

    def run(self) -> Offsets:
        rank = len(self.shapes.get(self.layer.y.name) or ())
        axis = 1 if "Conv" in self.layer.op else rank - 1
        self._carry(Carried(self.layer.y, np.arange(self.found.limit.size), axis))
        nodes = self.model.graph.nodes
        start = next(i for i, n in enumerate(nodes) if n is self.layer.node)
        main = {id(n) for n in nodes}
        for node in nodes[start + 1 :]:
            read = [self.flows[id(t)] for t in node.inputs if id(t) in self.flows]
            if not read or node.op in ops.SHAPES:
                continue
            result = self._through(node, read)
            if isinstance(result, str):
                for flow in read:
                    self._limit(flow, 0.0, result)
            else:
                for flow in result:
                    self._carry(flow)
        for flow in self.found.carried:
            if self.model.is_output(flow.tensor):
                self._limit(flow, 0.0, f"{flow.tensor.name} is an output of the model")
            if any(id(n) not in main for n in consumers(flow.tensor)):
                self._limit(flow, 0.0, "a subgraph reads it")
        return self.found

    def _carry(self, flow: Carried) -> None:
        if flow.tensor.name and (flow.source >= 0).any():
            self.flows[id(flow.tensor)] = flow
            self.found.carried.append(flow)

    def _limit(self, flow: Carried, values: float | np.ndarray, why: str) -> None:
        """Allow the channels no more than this."""
        source = flow.source[flow.source >= 0]
        values = np.broadcast_to(values, flow.source.shape)[flow.source >= 0]
        if (values < self.found.limit[source]).any():
            np.minimum.at(self.found.limit, source, values)
            self.found.reasons.append(why)

    def _through(self, node: gs.Node, read: Sequence[Carried]) -> list[Carried] | str:
        if not is_standard(node) or has_subgraph(node):
            return f"{node.name} ({node.op}) reads it"
        layer = Layer.of(self.model, node)
        if layer is not None:
            return self._read(layer, read)
        if is_followed(node):
            return self._move(node)
        if len(read) > 1:
            return f"it meets itself in {node.name} ({node.op})"
        rule = self.rules.get(node.op)
        return f"{node.name} ({node.op}) reads it" if rule is None else rule(node, read[0])

    # ---------------------------------------------------------------- layers

    def _read(self, layer: Layer, read: Sequence[Carried]) -> list[Carried] | str:
        flow = read[0]
        if layer.op == "ConvTranspose":
            return f"what {layer.name} (ConvTranspose) adds up differs from position to position"
        if why := layer.unscalable:
            return why
        if layer.op == "MatMul":
            return f"{layer.name} (MatMul) takes no bias"
        axis = 1 if layer.op == "Conv" else 0 if layer.node.attrs.get("transA", 0) else 1
        if layer.x is not flow.tensor or len(read) > 1 or flow.axis != axis:
            return f"{layer.name} ({layer.op}) reads it as a parameter, or along another axis"
        if flow.source.size != layer.input_channels:
            return f"{layer.name} ({layer.op}) reads other channels"
        self.found.readers.append((layer, flow))
        return []

    # ---------------------------------------------------------------- what lies between

    def _to(
        self, node: gs.Node, flow: Carried, axis: int | None = None, *, plain: bool = True
    ) -> list[Carried]:
        axis = flow.axis if axis is None else axis
        return [Carried(node.outputs[0], flow.source, axis, flow.plain and plain)]

    def _same(self, node: gs.Node, flow: Carried) -> list[Carried] | str:
        return self._to(node, flow)

    def _rectify(self, node: gs.Node, flow: Carried) -> list[Carried] | str:
        """f(x - c) = f(x) - c as long as x > c > 0."""
        if flow.tensor is not node.inputs[0]:
            return f"{node.name} ({node.op}) reads it as a parameter"
        if flow.plain:
            return self._to(node, flow)
        reach = self._reach(flow)
        if reach is None:
            return f"nothing is known of {flow.tensor.name}"
        why = f"it falls below zero before {node.name} ({node.op})"
        self._limit(flow, np.maximum(reach.low, 0.0), why)
        return self._to(node, flow)

    def _reach(self, flow: Carried) -> Reach | None:
        reach = self.reaches.get(flow.tensor.name)
        return reach if reach is not None and reach.low.size == flow.source.size else None

    def _clip(self, node: gs.Node, flow: Carried) -> list[Carried] | str:
        """As Relu where no channel reaches the upper bound."""
        bounds = [node.attrs.get("min", -np.inf), node.attrs.get("max", np.inf)]
        for index, tensor in enumerate(node.inputs[1:3]):
            if tensor.name and not isinstance(tensor, gs.Constant):
                return f"a bound of {node.name} is computed"
            if tensor.name:
                bounds[index] = float(self.model.array(tensor).reshape(-1)[0])
        if bounds[0] > 0:
            return f"{node.name} (Clip) has a lower bound above zero"
        result = self._rectify(node, flow)
        if not isinstance(result, str):
            reach = self._reach(flow)
            top = flow.spread(self.found.top) if reach is None else reach.top
            reached = top >= bounds[1]
            why = f"it reaches the bound of {node.name} (Clip), which all channels share"
            self._limit(flow, np.where(reached, 0.0, np.inf), why)
            self._lower_top(flow, bounds[1])
        return result

    def _lower_top(self, flow: Carried, bound: float | np.ndarray) -> None:
        bounds = np.broadcast_to(bound, flow.source.shape)[flow.source >= 0]
        np.minimum.at(self.found.top, flow.source[flow.source >= 0], bounds)

    def _minimum(self, node: gs.Node, flow: Carried) -> list[Carried] | str:
        """min(x, b) - c = min(x - c, b - c), which still is the bound of a value above zero."""
        if len(node.inputs) != 2:
            return f"{node.name} (Min) compares more than it with a constant"
        index = 1 if node.inputs[0] is flow.tensor else 0
        bounds = per_channel(self.model, node.inputs[index], flow, self.shapes)
        if bounds is None:
            return f"{node.name} (Min) compares it with no constant per channel"
        self._limit(flow, np.maximum(bounds, 0.0), f"the bound of {node.name} (Min) is below")
        self._lower_top(flow, bounds)
        self.found.bounds.append((node, index, flow))
        return self._to(node, flow)

    def _add(self, node: gs.Node, flow: Carried) -> list[Carried] | str:
        if node.op == "Sub" and node.inputs[0] is not flow.tensor:
            return f"{node.name} (Sub) takes it away"
        before, after = (self.shapes.get(t.name) for t in (flow.tensor, node.outputs[0]))
        if before is None or after is None:
            return f"the shape of {node.outputs[0].name} is not known"
        axis = flow.axis + len(after) - len(before)
        if after[axis] != flow.source.size:
            return f"{node.name} ({node.op}) spreads it over several channels"
        return self._to(node, flow, axis, plain=False)

    def _average_pool(self, node: gs.Node, flow: Carried) -> list[Carried] | str:
        spatial = (self.shapes.get(flow.tensor.name) or ())[2:]
        window = ops.conv_window(dict(node.attrs), spatial, tuple(node.attrs["kernel_shape"]))
        counted = node.attrs.get("count_include_pad", 0)
        if counted and (not spatial or (ops.conv_coverage(window, spatial) < 1).any()):
            return f"{node.name} (AveragePool) counts the padded border"
        return self._to(node, flow)

    def _reduce(self, node: gs.Node, flow: Carried) -> list[Carried] | str:
        axes, shape = node.attrs.get("axes"), self.shapes.get(flow.tensor.name)
        if len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
            axes = self.model.array(node.inputs[1]).tolist()
        if shape is None or not axes:
            return f"the axes that {node.name} (ReduceMean) takes the mean over are not known"
        gone = {a % len(shape) for a in axes}
        if flow.axis in gone:
            return f"{node.name} (ReduceMean) takes the mean over channels"
        kept = node.attrs.get("keepdims", 1)
        return self._to(node, flow, flow.axis - (0 if kept else sum(a < flow.axis for a in gone)))

    def _resize(self, node: gs.Node, flow: Carried) -> list[Carried] | str:
        """Interpolation takes weighted means."""
        shape = self.shapes.get(node.outputs[0].name)
        if shape is None or shape[flow.axis] != flow.source.size:
            return f"the shape that {node.name} (Resize) gives is not known"
        if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
            return f"{node.name} (Resize) fills in values of its own"
        return self._to(node, flow)

    def _move(self, node: gs.Node) -> list[Carried] | str:
        inputs = list(node.inputs if node.op == "Concat" else node.inputs[:1])
        flows = [self.flows.get(id(t)) for t in inputs]
        axes = {f.axis for f in flows if f is not None}
        if len(axes) != 1:
            return f"{node.name} ({node.op}) reads it along another axis"
        [axis] = axes
        moves = follow(self.model, node, [axis] * len(inputs), self.shapes)
        if isinstance(moves, str):
            return moves
        sources = [
            f.source if f is not None else np.full((self.shapes[t.name] or ())[axis], -1)
            for t, f in zip(inputs, flows, strict=True)
        ]
        source = np.append(np.concatenate(sources), -1)
        plain = all(f.plain for f in flows if f is not None)
        results = []
        for tensor, moved in zip(node.outputs, moves, strict=True):
            if moved.whole is None:
                return f"{node.name} ({node.op}) mixes channels, or zeros into them"
            results.append(Carried(tensor, source[moved.whole], moved.axis, plain))
        return results


def per_channel(
    model: Model, tensor: gs.Tensor, flow: Carried, shapes: Shapes
) -> np.ndarray | None:
    """A constant as one value per channel; None if it is none."""
    shape = shapes.get(flow.tensor.name)
    if not isinstance(tensor, gs.Constant) or shape is None:
        return None
    values = np.asarray(model.array(tensor), np.float64)
    padded = (1,) * (len(shape) - values.ndim) + values.shape
    if values.size != 1 and not (
        len(padded) == len(shape) and padded[flow.axis] == values.size == flow.source.size
    ):
        return None
    return np.broadcast_to(values.reshape(-1), flow.source.shape)
