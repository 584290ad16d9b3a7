"""Follow channels through a graph, from the layers that put them out to whatever reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.model import Layer, Model, consumers, has_subgraph, is_standard

__all__ = ["ChannelWalk", "Flow", "broadcasts"]

# The rules of all others look at their first input alone.
_OF_SEVERAL = frozenset({"Add", "Concat", "Div", "Max", "Min", "Mul", "Sub", "Sum"})
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})


@dataclass(frozen=True, eq=False)
class Flow:
    """The channels of a tensor.

    Args:
        ids: One number per channel, int64 [channels]; a channel keeps it where it is only moved.
        axis: The axis that the channels run along.
        rank: Axes of the tensor.
    """

    ids: np.ndarray
    axis: int
    rank: int

    @property
    def from_end(self) -> int:
        """The axis counted from the last, which is what broadcasting goes by."""
        return self.rank - self.axis


class ChannelWalk(ABC):
    """Walks a graph once, forwards.

    The rules for operators that move channels are here.  A subclass adds to `rules` those for what
    it is after, each of which answers whether it could follow, and says in the methods below what
    layers, dead ends and joined channels mean to it.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.flows: dict[int, Flow] = {}  # by the identity of the tensor
        self.rules: dict[str, Callable[[gs.Node], bool]] = {
            "Concat": self._concat,
            "DepthToSpace": self._depth_to_space,
            "Flatten": self._reshape,
            "Pad": self._pad,
            "Reshape": self._reshape,
            "Resize": self._resize,
            "Slice": self._slice,
            "Split": self._split,
            "Squeeze": self._reshape,
            "Transpose": self._transpose,
            **dict.fromkeys(_REDUCTIONS, self._reduce),
        }

    def walk(self) -> None:
        """Follow the channels of every layer."""
        main = {id(n) for n in self.model.graph.nodes}
        for node in self.model.graph.nodes:
            layer = Layer.of(self.model, node)
            standard = is_standard(node) and not has_subgraph(node)
            if layer is not None and standard:
                self._layer(layer)
            elif standard and node.op in ops.SHAPES and node.op not in self.rules:
                continue  # how many channels there are means nothing
            elif not (standard and node.op in self.rules and self._follows(node)):
                for tensor in node.inputs:
                    self.end(tensor, f"{node.name} ({node.op}) reads it")
        for tensor in self.model.tensors().values():
            if any(id(n) not in main for n in consumers(tensor)):
                self.end(tensor, "a subgraph reads it")
        for tensor in self.model.graph.outputs:
            self.end(tensor, f"{tensor.name} is an output of the model")

    # -------------------------------------------------------------- what a subclass says

    @abstractmethod
    def new(self, count: int) -> np.ndarray:
        """So many new channels."""

    @abstractmethod
    def zeros(self, count: int) -> np.ndarray:
        """So many new channels that hold nothing but zeros."""

    @abstractmethod
    def foreign(self, count: int, why: str) -> np.ndarray:
        """So many new channels that come from somewhere that is not followed."""

    @abstractmethod
    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """One channel for those that stand at the same place of each part."""

    @abstractmethod
    def end(self, tensor: gs.Tensor, why: str) -> None:
        """Something reads a tensor, and what it makes of the channels is not known."""

    @abstractmethod
    def layer(
        self, layer: Layer, inputs: np.ndarray | None, outputs: np.ndarray | None, why: str
    ) -> None:
        """A layer reads channels and puts out others; None where they are not followed.

        Args:
            layer: The layer.
            inputs: What it reads along its input channels.
            outputs: What it puts out.
            why: Why its weight and bias cannot be edited channel by channel; empty if they can.
        """

    # -------------------------------------------------------------- layers

    def _layer(self, layer: Layer) -> None:
        flow = self.flows.get(id(layer.x))
        convolution = "Conv" in layer.op
        rank = layer.weight.ndim if convolution else rank_of(layer.y)
        why = layer.unscalable or (
            "" if layer.owns_params else f"{layer.name} shares its parameters"
        )
        if layer.node.attrs.get("transA", 0):
            why = f"{layer.name} reads its input transposed"
        inputs = outputs = None
        if flow is not None:
            axis = 1 if convolution else flow.rank - 1
            if why or flow.axis != axis or flow.ids.size != layer.input_channels:
                self.end(layer.x, why or f"{layer.name} reads it along another axis")
            else:
                inputs = flow.ids
        for tensor in layer.node.inputs:
            if tensor is not layer.x:
                self.end(tensor, f"{layer.name} reads it as a parameter")
        if rank is not None:
            outputs = self.new(layer.output_channels)
            self.flows[id(layer.y)] = Flow(outputs, 1 if convolution else rank - 1, rank)
        self.layer(layer, inputs, outputs, why)

    # -------------------------------------------------------------- for rules

    def of(self, node: gs.Node) -> Flow | None:
        """The channels of the first input."""
        return self.flows.get(id(node.inputs[0]))

    def carry(self, node: gs.Node, flow: Flow) -> bool:
        """Let the first output have these channels; False if its known shape says otherwise."""
        result = node.outputs[0]
        size = None if result.shape is None else result.shape[flow.axis]
        if isinstance(size, int) and size != flow.ids.size:
            return False
        if any(t.name for t in node.outputs[1:]):
            return False
        self.flows[id(result)] = flow
        return True

    def plain(self, node: gs.Node) -> bool:
        """The rule for what works channel by channel, with constant parameters if any."""
        flow = self.of(node)
        if any(t.name and not isinstance(t, gs.Constant) for t in node.inputs[1:]):
            return False
        return flow is None or self.carry(node, flow)

    def aligned(self, node: gs.Node) -> Flow | None:
        """The widest operand; None if one has other channels, or unknown ones and no constant."""
        flows = [self.flows.get(id(t)) for t in node.inputs]
        widest = max((f for f in flows if f is not None), key=lambda f: f.rank)
        for tensor, flow in zip(node.inputs, flows, strict=True):
            if flow is not None:
                if flow.from_end != widest.from_end or flow.ids.size != widest.ids.size:
                    return None
            elif not isinstance(tensor, gs.Constant) or not broadcasts(tensor, widest):
                return None
        return widest

    def pads(self, node: gs.Node) -> list[int] | None:
        """What a Pad adds before and after each axis; None if it is computed, or of some axes."""
        if len(node.inputs) < 2:
            return [*node.attrs["pads"]] if "pads" in node.attrs else None
        if not isinstance(node.inputs[1], gs.Constant) or len(node.inputs) > 3:
            return None
        return [*map(int, self.model.array(node.inputs[1]))]

    # -------------------------------------------------------------- what moves channels

    def _follows(self, node: gs.Node) -> bool:
        known = [id(t) in self.flows for t in node.inputs]
        if node.op not in _OF_SEVERAL and any(known[1:]):
            return False
        return not any(known) or self.rules[node.op](node)

    def _concat(self, node: gs.Node) -> bool:
        flows = [self.flows.get(id(t)) for t in node.inputs]
        known = [f for f in flows if f is not None]
        rank, axis = known[0].rank, int(node.attrs["axis"])
        axis += rank if axis < 0 else 0
        if any((f.rank, f.axis) != (rank, known[0].axis) for f in known):
            return False
        if axis != known[0].axis:  # the same channels side by side
            if len(known) < len(flows) or any(f.ids.size != known[0].ids.size for f in known):
                return False
            return self.carry(node, Flow(self.join([f.ids for f in known]), known[0].axis, rank))
        parts = []
        for tensor, part in zip(node.inputs, flows, strict=True):
            if part is None:
                size = None if tensor.shape is None else tensor.shape[axis]
                if not isinstance(size, int):
                    return False
                parts.append(self.foreign(size, f"{node.name} joins it with {tensor.name}"))
            else:
                parts.append(part.ids)
        return self.carry(node, Flow(np.concatenate(parts), axis, rank))

    def _split(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        axis = int(node.attrs.get("axis", 0)) % flow.rank
        if axis != flow.axis:
            self.flows.update((id(t), flow) for t in node.outputs)
            return True
        sizes = node.attrs.get("split")
        if len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
            sizes = self.model.array(node.inputs[1]).tolist()
        if sizes is None:
            if len(node.inputs) > 1 or flow.ids.size % len(node.outputs):
                return False
            sizes = [flow.ids.size // len(node.outputs)] * len(node.outputs)
        parts = np.split(flow.ids, np.cumsum(sizes)[:-1])
        for tensor, ids in zip(node.outputs, parts, strict=True):
            self.flows[id(tensor)] = Flow(ids, flow.axis, flow.rank)
        return True

    def _pad(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        pads = self.pads(node)
        value = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        constant = node.attrs.get("mode", "constant") == "constant"
        if value is not None and not isinstance(value, gs.Constant):
            return False
        filler = node.attrs.get("value", 0.0) if value is None else self.model.array(value)
        if pads is None or (constant and np.any(filler)):
            return False
        before, after = pads[flow.axis], pads[flow.rank + flow.axis]
        if min(before, after) < 0 or (not constant and (before or after)):
            return False
        ids = np.concatenate([self.zeros(before), flow.ids, self.zeros(after)])
        return self.carry(node, Flow(ids, flow.axis, flow.rank))

    def _slice(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        names = ("starts", "ends", "axes", "steps")
        parts = [node.attrs.get(n) for n in names]
        for index, tensor in enumerate(node.inputs[1:]):
            if tensor.name and not isinstance(tensor, gs.Constant):
                return False
            parts[index] = self.model.array(tensor).tolist() if tensor.name else None
        starts, ends, axes, steps = parts
        if starts is None or ends is None:
            return False
        axes = list(range(len(starts))) if axes is None else [a % flow.rank for a in axes]
        steps = [1] * len(starts) if steps is None else steps
        ids = flow.ids
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            if axis == flow.axis:
                if step < 0:
                    return False
                ids = ids[start:end:step]
        return self.carry(node, Flow(ids, flow.axis, flow.rank))

    def _resize(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        result = node.outputs[0]
        if result.shape is None or result.shape[flow.axis] != flow.ids.size:
            return False
        return node.attrs.get("coordinate_transformation_mode") != (
            "tf_crop_and_resize"
        ) and self.carry(node, flow)

    def _transpose(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        order = node.attrs.get("perm") or [*reversed(range(flow.rank))]
        return self.carry(node, Flow(flow.ids, [*order].index(flow.axis), flow.rank))

    def _reduce(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        axes = node.attrs.get("axes")
        if len(node.inputs) > 1:
            if not isinstance(node.inputs[1], gs.Constant):
                return False
            axes = self.model.array(node.inputs[1]).tolist()
        if not axes:
            return False
        gone = {a % flow.rank for a in axes}
        if flow.axis in gone:
            return False
        if node.attrs.get("keepdims", 1):
            return self.carry(node, flow)
        axis = flow.axis - sum(a < flow.axis for a in gone)
        return self.carry(node, Flow(flow.ids, axis, flow.rank - len(gone)))

    def _reshape(self, node: gs.Node) -> bool:
        """Channels stay an axis of their own, or each fills as many columns as it has positions."""
        flow = self.flows[id(node.inputs[0])]
        old, new = node.inputs[0].shape, node.outputs[0].shape
        if old is None or new is None or flow.axis != 1 or len(new) < 2:
            return False
        inner, after = list(old[2:]), list(new[2:])
        known = all(isinstance(n, int) for n in (*inner, *after))
        if known and new[1] == flow.ids.size and np.prod(inner) != np.prod(after):
            return False  # the batch takes the rest
        if new[1] == flow.ids.size and _same(old[0], new[0]):
            return self.carry(node, Flow(flow.ids, 1, len(new)))
        if len(new) != 2 or not all(isinstance(n, int) for n in inner):
            return False
        positions = int(np.prod(inner, initial=1))
        if new[1] not in (flow.ids.size * positions, None) and isinstance(new[1], int):
            return False
        return self.carry(node, Flow(np.repeat(flow.ids, positions), 1, 2))

    def _depth_to_space(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        if flow.axis != 1:
            return False
        block = int(node.attrs["blocksize"]) ** 2
        by_column = node.attrs.get("mode", "DCR") == "CRD"
        ids = flow.ids.reshape((-1, block) if by_column else (block, -1))
        parts = [*(ids.T if by_column else ids)]
        return self.carry(node, Flow(self.join(parts), flow.axis, flow.rank))


def rank_of(tensor: gs.Tensor) -> int | None:
    """Axes of a tensor; None if not known."""
    return None if tensor.shape is None else len(tensor.shape)


def broadcasts(tensor: gs.Tensor, flow: Flow) -> bool:
    """Whether an operand without channels leaves rank and channels of a result as in a flow."""
    if tensor.shape is None or len(tensor.shape) > flow.rank:
        return False
    place = len(tensor.shape) - flow.from_end
    size = 1 if place < 0 else tensor.shape[place]
    return size in (1, flow.ids.size) if isinstance(size, int) else flow.ids.size > 1


def _same(a: object, b: object) -> bool:
    """Whether two batch sizes may be the same."""
    return not (isinstance(a, int) and isinstance(b, int)) or a == b
