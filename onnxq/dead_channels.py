"""Which channels of a model hold one value whatever the input, and which nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnxq.channels import ChannelWalk, Flow, broadcasts
from onnxq.errors import ModelError
from onnxq.model import Layer, Model
from onnxq.ops import FUNCTIONS
from onnxq.runtime import Session

__all__ = ["DeadChannels", "LayerChannels", "find_dead_channels"]


@dataclass(eq=False)
class LayerChannels:
    """What is known of the channels of one layer.

    Attributes:
        layer: The layer.
        absorbed: Whether an input channel is constant and the bias can take over what the weight
            makes of it, bool [I].
        bias: What is added to each output channel, float64 [O]; of a MatMul by an Add behind it.
        shift: What the absorbed channels add to each output channel, float64 [O].
        obstacle: Why not every constant can be absorbed.
        stuck: How many constants are read that cannot be absorbed.
        read: Whether anything depends on an output channel, bool [O].
    """

    layer: Layer
    absorbed: np.ndarray
    bias: np.ndarray
    shift: np.ndarray
    obstacle: str
    stuck: int
    read: np.ndarray


@dataclass
class DeadChannels:
    """What is known of the channels of a model.

    Attributes:
        layers: The layers whose weights can be edited, in graph order.
        values: Name of a tensor -> what each channel holds, float64; NaN where it varies.
        refused: Name of a layer whose weights cannot be edited -> the reason.
    """

    layers: list[LayerChannels] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def find_dead_channels(model: Model) -> DeadChannels:
    """Find the channels that are constant, and those that are not read.

    A weight of zero reads nothing, and zero times anything is zero.

    Args:
        model: The model, shapes inferred.
    """
    return _Finder(model).run()


# Leave a constant as it is.
_STILL = frozenset({"GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool"})
_COMBINING = frozenset({"Add", "Div", "Max", "Min", "Pow", "Sub", "Sum"})


class _Finder(ChannelWalk):
    """Follows values forwards and then, from what is read at the end, backwards."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.value = np.zeros(0)  # of each channel
        self.read = np.zeros(0, bool)
        self.backwards: list[Callable[[], None]] = []
        self.found = DeadChannels()
        self.rules |= {
            "AveragePool": self._average,
            "BatchNormalization": self._normalize,
            "Dropout": self._dropout,
            "Mul": self._multiply,
            "Pad": self._padding,
            "ReduceSum": partial(self._only_zeros, self._reduce),
            **dict.fromkeys(_COMBINING, self._combine),
            **dict.fromkeys(FUNCTIONS, self._function),
            **dict.fromkeys(_STILL, self.plain),
        }

    def run(self) -> DeadChannels:
        self.walk()
        for step in reversed(self.backwards):
            step()
        names = {id(t): t.name for t in self.model.tensors().values()}
        for tensor, flow in self.flows.items():
            if tensor in names:
                self.found.values[names[tensor]] = self.value[flow.ids]
        return self.found

    # -------------------------------------------------------------- channels

    def new(self, count: int) -> np.ndarray:
        return self._holding(np.full(count, np.nan))

    def zeros(self, count: int) -> np.ndarray:
        return self._holding(np.zeros(count))

    def foreign(self, count: int, why: str) -> np.ndarray:
        return self.new(count)

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        values = self.value[parts[0]]
        for part in parts[1:]:
            values = np.where(self.value[part] == values, values, np.nan)
        ids = self._holding(values)
        for part in parts:
            self._depend(ids, part)
        return ids

    def end(self, tensor: gs.Tensor, why: str) -> None:
        flow = self.flows.get(id(tensor))
        if flow is not None:
            self.read[flow.ids] = True

    def _holding(self, values: np.ndarray) -> np.ndarray:
        """New channels with these values; what is not finite counts as varying."""
        first = self.value.size
        self.value = np.concatenate([self.value, np.where(np.isfinite(values), values, np.nan)])
        self.read = np.concatenate([self.read, np.zeros(values.size, bool)])
        return np.arange(first, self.value.size)

    def _depend(
        self, results: np.ndarray, sources: np.ndarray, where: np.ndarray | bool = True
    ) -> None:
        """Note that what reads a result reads its source, too."""

        def step() -> None:
            self.read[sources[self.read[results] & where]] = True

        self.backwards.append(step)

    # -------------------------------------------------------------- layers

    def layer(
        self, layer: Layer, inputs: np.ndarray | None, outputs: np.ndarray | None, why: str
    ) -> None:
        why = why or _unfit(layer)
        if why or outputs is None:
            self.end(layer.x, why)
            self.found.refused[layer.name] = why or f"the rank of {layer.y.name} is not known"
            return
        values = np.full(layer.input_channels, np.nan) if inputs is None else self.value[inputs]
        known, zero = ~np.isnan(values), values == 0.0
        obstacle = _border(layer)
        steady = zero if obstacle else known  # what gives the same at every position
        bias, response = _bias(layer), _response(layer, np.where(steady, values, 0.0))
        addend = layer.addend
        added = bias if addend is None else self.model.array(addend[0].inputs[addend[1]])
        added = added.reshape(-1).astype(np.float64)
        if not all(np.isfinite(_stored(layer, r)).all() for r in (response, added + response)):
            obstacle = f"what {layer.name} makes of it passes the range of its type"
            steady, response = zero, np.zeros(response.size)
        connected = _connections(layer)
        varies = (connected & ~steady.reshape(layer.group, 1, -1)).any(2).reshape(-1)
        self.value[outputs] = np.where(varies, np.nan, _stored(layer, bias + response))

        absorbed = steady
        if layer.op == "MatMul" and addend is None:
            obstacle = obstacle or f"no Add of constants behind {layer.name} (MatMul) can take it"
            absorbed, response = zero, np.zeros(response.size)
        read = np.ones(varies.size, bool)
        found = LayerChannels(layer, absorbed, added, response, obstacle, 0, read)
        self.found.layers.append(found)

        def step() -> None:
            found.read = self.read[outputs]
            alive = found.read.reshape(layer.group, -1, 1)
            reads = (connected & alive).any(1).reshape(-1) & ~absorbed
            found.stuck = int((reads & known).sum())
            if inputs is not None:
                self.read[inputs[reads]] = True

        self.backwards.append(step)

    # -------------------------------------------------------------- what lies between

    def _result(
        self,
        node: gs.Node,
        flow: Flow,
        values: np.ndarray,
        *sources: tuple[Flow, np.ndarray | bool],
    ) -> bool:
        """Give the result new channels with these values, which depend on those of sources."""
        ids = self._holding(values)
        for source, where in sources:
            self._depend(ids, source.ids, where)
        return self.carry(node, Flow(ids, flow.axis, flow.rank))

    def _function(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        if any(t.name and not isinstance(t, gs.Constant) for t in node.inputs[1:]):
            return False
        known = ~np.isnan(self.value[flow.ids])
        return self._result(node, flow, self._evaluate(node, flow, known), (flow, True))

    def _combine(self, node: gs.Node) -> bool:
        widest = self.aligned(node)
        if widest is None:
            return False
        flows = [f for t in node.inputs if (f := self.flows.get(id(t))) is not None]
        known = np.all([~np.isnan(self.value[f.ids]) for f in flows], axis=0)
        values = self._evaluate(node, widest, known)
        return self._result(node, widest, values, *((f, True) for f in flows))

    def _multiply(self, node: gs.Node) -> bool:
        """A product with zero is zero, whatever the other factor."""
        flows = [self.flows.get(id(t)) for t in node.inputs]
        widest = max((f for f in flows if f is not None), key=lambda f: f.rank)
        known = np.ones(widest.ids.size, bool)
        zeros = []
        for tensor, flow in zip(node.inputs, flows, strict=True):
            if flow is not None:
                if (flow.from_end, flow.ids.size) != (widest.from_end, widest.ids.size):
                    return False
                known &= ~np.isnan(self.value[flow.ids])
                zeros.append(self.value[flow.ids] == 0.0)
            elif not broadcasts(tensor, widest):
                return False
            elif isinstance(tensor, gs.Constant):
                zeros.append(_zeros_per_channel(self.model.array(tensor), widest))
            else:
                known[:] = False
                zeros.append(known)
        left, right = zeros[0], zeros[1] & ~zeros[0]  # one zero holds the product
        values = self._evaluate(node, widest, known)
        values[left | right] = 0.0
        sources = zip(flows, (~right, ~left), strict=True)
        return self._result(node, widest, values, *((f, m) for f, m in sources if f is not None))

    def _normalize(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        if (
            flow.axis != 1
            or self.model.opset < 7
            or node.attrs.get("training_mode", 0)
            or not node.attrs.get("spatial", 1)
            or not all(isinstance(t, gs.Constant) for t in node.inputs[1:])
        ):
            return False
        scaled = self.model.array(node.inputs[1]) != 0.0
        known = ~scaled | ~np.isnan(self.value[flow.ids])
        return self._result(node, flow, self._evaluate(node, flow, known), (flow, scaled))

    def _dropout(self, node: gs.Node) -> bool:
        return len(node.inputs) < 3 and self.plain(node)  # with three it may be in training

    def _average(self, node: gs.Node) -> bool:
        attrs = node.attrs
        overlaps = (
            any(attrs.get("pads", ()))
            or attrs.get("auto_pad", "NOTSET").startswith("SAME")
            or attrs.get("ceil_mode", 0)
        )
        if overlaps and attrs.get("count_include_pad", 0):
            return self._only_zeros(self.plain, node)
        return self.plain(node)

    def _padding(self, node: gs.Node) -> bool:
        flow, pads = self.flows[id(node.inputs[0])], self.pads(node) or ()
        widens = any(n for i, n in enumerate(pads) if i % flow.rank != flow.axis)
        if widens and node.attrs.get("mode", "constant") == "constant":
            return self._only_zeros(self._pad, node)
        return self._pad(node)

    def _only_zeros(self, rule: Callable[[gs.Node], bool], node: gs.Node) -> bool:
        """Follow, but of all constants only zero stays one."""
        if not rule(node):
            return False
        flow = self.flows[id(node.outputs[0])]
        values = np.where(self.value[flow.ids] == 0.0, 0.0, np.nan)
        return self._result(node, flow, values, (flow, True))

    def _evaluate(self, node: gs.Node, flow: Flow, known: np.ndarray) -> np.ndarray:
        """What the runtime makes of known channels, NaN elsewhere, in the channels of a flow."""
        values = np.full(flow.ids.size, np.nan)
        if not known.any():
            return values
        inputs = {}
        for tensor in node.inputs:
            of = self.flows.get(id(tensor))
            if of is not None and tensor.dtype not in (None, np.float16, np.float32, np.float64):
                return values
            if of is not None:
                array = np.nan_to_num(self.value[of.ids]).reshape(_along(of))
                inputs[tensor.name] = array.astype(tensor.dtype or np.float32)
            elif tensor.name:
                inputs[tensor.name] = self.model.array(tensor)
        name = node.outputs[0].name
        held = [numpy_helper.from_array(array, n) for n, array in inputs.items()]
        output = helper.make_empty_tensor_value_info(name)
        graph = helper.make_graph([OnnxExporter.export_node(node)], "constant", [], [output], held)
        opset = helper.make_opsetid("", self.model.opset)
        proto = helper.make_model(graph, opset_imports=[opset], ir_version=10)
        try:
            result = Session(proto, threads=1, level="disabled").run({})[name]
        except ModelError:  # the runtime has no such operator for this type
            return values
        if result.size == values.size:  # else a constant differs from position to position
            values[known] = result.reshape(-1)[known]
        return values


def _along(flow: Flow) -> list[int]:
    """The shape of one value per channel."""
    return [-1 if axis == flow.axis else 1 for axis in range(flow.rank)]


def _zeros_per_channel(constant: np.ndarray, flow: Flow) -> np.ndarray:
    """Whether what a constant holds for a channel is zero everywhere."""
    zero = (constant == 0.0).reshape((1,) * (flow.rank - constant.ndim) + constant.shape)
    per_channel = zero.all(axis=tuple(i for i in range(flow.rank) if i != flow.axis))
    return np.broadcast_to(per_channel, flow.ids.shape)


# ---------------------------------------------------------------------- layers


def _unfit(layer: Layer) -> str:
    """Why nothing can be said of a layer whose weight could be edited; empty if something can."""
    bias = layer.bias
    if not layer.weight.size:
        return f"the weight of {layer.name} is empty"
    if not np.isfinite(layer.weight).all() or not (bias is None or np.isfinite(bias).all()):
        return f"the weights of {layer.name} are not finite"
    if bias is not None and bias.size > 1 and bias.shape[-1] != bias.size:
        return f"the bias of {layer.name} is not one value per channel"
    return ""


def _border(layer: Layer) -> str:
    """Why a constant input does not give the same at every position; empty if it does."""
    attrs = layer.node.attrs
    if layer.is_padded:
        return f"the zero-padded border of {layer.name} would change"
    if layer.op != "ConvTranspose":
        return ""
    window = (*layer.weight_tensor.shape[2:], *attrs.get("strides", ()))
    if (
        any(n != 1 for n in window)
        or any(attrs.get("output_padding", ()))
        or "output_shape" in attrs
    ):
        return f"{layer.name} (ConvTranspose) puts out a different sum at each position"
    return ""


def _connections(layer: Layer) -> np.ndarray:
    """Whether an output channel reads an input channel, bool [groups, O / group, I / group]."""
    group = layer.group
    shape = (group, layer.output_channels // group, layer.input_channels // group)
    return np.asarray(layer.magnitudes.reshape(shape) > 0.0)


def _response(layer: Layer, values: np.ndarray) -> np.ndarray:
    """What a layer makes of constant input channels, bias left out, float64 [O]."""
    if not values.any():
        return np.zeros(layer.output_channels)
    products = layer.weight.astype(np.float64) * layer.along_inputs(values)
    return layer.sum_over_inputs(products) * float(layer.node.attrs.get("alpha", 1.0))


def _stored(layer: Layer, values: np.ndarray) -> np.ndarray:
    """Values as the type of a weight holds them; infinite where they pass its range."""
    with np.errstate(over="ignore"):
        return values.astype(layer.weight.dtype)


def _bias(layer: Layer) -> np.ndarray:
    """What a layer adds, float64 [O]."""
    beta = float(layer.node.attrs.get("beta", 1.0))
    bias = np.zeros(1) if layer.bias is None else layer.bias.astype(np.float64) * beta
    return np.broadcast_to(bias.reshape(-1), layer.output_channels)
