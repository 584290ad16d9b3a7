"""Which channels have to go together when one of them is taken out of a model.

A channel lies in the rows of the weights that put it out, in the columns of those that read it, and
in every constant between them.  Residual additions, depthwise convolutions and products of two
tensors tie channels of several layers to one another: they are one class, which stays or goes as a
whole.  Classes that lie in the same places are a group: what a group is cut to is one number.

Source: the dependency graph of Fang et al. 2023 (arXiv 2301.12900), channel by channel.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.channels import Flow, broadcasts
from onnxq.classes import ClassWalk, Side
from onnxq.model import Layer, Model, consumers, producer

__all__ = ["Dependencies", "Group", "Side", "find_groups", "is_depthwise"]


@dataclass(frozen=True, eq=False)
class Group:
    """Classes of channels that lie in the same places; any number of them can be taken out.

    Args:
        name: That of the first layer that puts them out.
        classes: Their numbers, in the order in which that layer has them.
        outputs: The layers that put them out, with the classes of all their outputs.
        inputs: The layers that read them, with the classes of all their inputs; depthwise ones,
            which only hand them on, are among both.
    """

    name: str
    classes: np.ndarray
    outputs: tuple[Side, ...]
    inputs: tuple[Side, ...]

    @property
    def readers(self) -> tuple[Side, ...]:
        """The layers that mix these channels with one another: all that read them but depthwise."""
        return tuple(s for s in self.inputs if not is_depthwise(s.layer))

    @cached_property
    def shares(self) -> tuple[dict[str, float], dict[str, float]]:
        """Of the outputs, and of the inputs, of each layer: the share that is the group's."""
        found = [
            {s.layer.name: float(np.isin(s.classes, self.classes).mean()) for s in sides}
            for sides in (self.outputs, self.inputs)
        ]
        return found[0], found[1]

    @property
    def members(self) -> list[str]:
        """The names of the layers that put the channels out."""
        return [side.layer.name for side in self.outputs]


@dataclass
class Dependencies:
    """The groups of a model.

    Attributes:
        groups: What can be cut, in graph order.
        flows: Name of a tensor -> its channels, by class.
        outputs: The layers with the classes of what they put out, in graph order.
        inputs: The layers with the classes of what they read, in graph order.
        count: How many classes there are.
        refused: Name of a layer none of whose outputs can be taken out -> the reason.
    """

    groups: list[Group] = field(default_factory=list)
    flows: dict[str, Flow] = field(default_factory=dict)
    outputs: dict[str, Side] = field(default_factory=dict)
    inputs: dict[str, Side] = field(default_factory=dict)
    count: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    def group(self, name: str) -> Group:
        """The group of a name."""
        return next(g for g in self.groups if g.name == name)


def find_groups(model: Model) -> Dependencies:
    """Find what can be taken out of a model.

    Args:
        model: A float model; its shapes are inferred.
    """
    model.infer()
    return _Walk(model).run()


def is_depthwise(layer: Layer) -> bool:
    """Whether each output of a convolution reads one channel, of a group of its own."""
    return layer.group > 1 and layer.group == layer.input_channels


# What computes each channel from the same channel of its first input.
_PLAIN = ops.FUNCTIONS | {
    "Cast",
    "Dropout",
    "Identity",
}
# The same, if channels run along axis 1.
_POOLING = (
    "AveragePool",
    "GlobalAveragePool",
    "GlobalLpPool",
    "GlobalMaxPool",
    "LpPool",
    "MaxPool",
)
_COMBINING = ("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Sum")


class _Walk(ClassWalk):
    """Joins the channels that have to go together."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.found = Dependencies()
        self.rules |= {
            "Shape": self._shape,
            "Size": lambda node: False,
            "SpaceToDepth": self._space_to_depth,
            "Unsqueeze": self._reshape,
            **dict.fromkeys(_COMBINING, self._combine),
            **dict.fromkeys(_PLAIN, self.plain),
            **dict.fromkeys(_POOLING, self._pool),
            **dict.fromkeys(("BatchNormalization", "InstanceNormalization"), self._normalize),
        }

    def run(self) -> Dependencies:
        self.walk()
        found = self.found
        number, found.count, fixed = self.numbered()
        names = {id(t): t.name for t in self.model.tensors().values()}
        found.flows = {
            names[t]: Flow(number[f.ids], f.axis, f.rank)
            for t, f in self.flows.items()
            if t in names
        }
        for sides in (found.outputs, found.inputs):
            for name, side in sides.items():
                sides[name] = Side(side.layer, number[side.classes])
        for name, side in found.outputs.items():
            reasons = [fixed.get(c) for c in side.classes.tolist()]
            if None not in reasons:
                found.refused[name] = str(reasons[0])
        found.groups = _grouped(found, fixed)
        return found

    def layer(
        self, layer: Layer, inputs: np.ndarray | None, outputs: np.ndarray | None, why: str
    ) -> None:
        if why:
            self.end(layer.y, why)
        if is_depthwise(layer) and outputs is not None:
            each = outputs.reshape(layer.group, -1)
            if inputs is None:
                self.end(layer.y, why or f"{layer.name} reads channels that cannot be taken out")
            else:
                self.join([inputs, *each.T])
        elif layer.group > 1:  # as many of each group have to stay
            for ids in (inputs, outputs):
                if ids is not None:
                    self.join([*ids.reshape(layer.group, -1)])
        if inputs is not None:
            self.found.inputs[layer.name] = Side(layer, inputs)
        if outputs is not None:
            self.found.outputs[layer.name] = Side(layer, outputs)

    # -------------------------------------------------------------- what lies between

    def _combine(self, node: gs.Node) -> bool:
        """Add and its like: operands of as many channels are tied, others are the same for all."""
        flows = [self.flows.get(id(t)) for t in node.inputs]
        widest = max((f for f in flows if f is not None), key=lambda f: (f.ids.size, f.rank))
        tied = []
        for tensor, flow in zip(node.inputs, flows, strict=True):
            if flow is None:
                per_channel = not isinstance(tensor, gs.Constant) and not _one(tensor, widest)
                if per_channel or not broadcasts(tensor, widest):
                    return False
            elif flow.from_end != widest.from_end:
                return False
            elif flow.ids.size == widest.ids.size:
                tied.append(flow.ids)
            elif flow.ids.size == 1:
                self.end(tensor, f"{node.name} ({node.op}) spreads it over channels")
            else:
                return False
        self.join(tied)
        return self.carry(node, widest)

    def _pool(self, node: gs.Node) -> bool:
        return self.flows[id(node.inputs[0])].axis == 1 and self.plain(node)

    def _normalize(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        sizes = {(*t.shape,) for t in node.inputs[1:] if isinstance(t, gs.Constant)}
        return flow.axis == 1 and sizes == {(flow.ids.size,)} and self.plain(node)

    def _pad(self, node: gs.Node) -> bool:
        flow, pads = self.flows[id(node.inputs[0])], self.pads(node)
        if pads is not None and not pads[flow.axis] and not pads[flow.rank + flow.axis]:
            return self.carry(node, flow)  # with whatever
        return super()._pad(node)

    def _slice(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        if not super()._slice(node):
            return False
        ids = self.flows[id(node.outputs[0])].ids
        first = np.flatnonzero(flow.ids == ids[0])[:1] if ids.size else np.zeros(1, int)
        if np.array_equal(flow.ids[int(first[0]) :][: ids.size], ids):
            return True
        del self.flows[id(node.outputs[0])]  # every second one, as it were
        return False

    def _space_to_depth(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        if flow.axis != 1:
            return False
        ids = np.tile(flow.ids, int(node.attrs["blocksize"]) ** 2)
        return self.carry(node, Flow(ids, flow.axis, flow.rank))

    def _reshape(self, node: gs.Node) -> bool:
        if not super()._reshape(node):
            return False
        if node.op != "Reshape" or isinstance(node.inputs[1], gs.Constant):
            return True
        if _is_inferred(self.model, node):
            return True
        del self.flows[id(node.outputs[0])]
        return False

    def _shape(self, node: gs.Node) -> bool:
        """A Shape of which all readers take sizes of other axes."""
        flow = self.flows[id(node.inputs[0])]
        if self.model.is_output(node.outputs[0]):
            return False
        for reader in consumers(node.outputs[0]):
            picked = reader.inputs[1] if reader.op == "Gather" else None
            if not isinstance(picked, gs.Constant) or node.attrs.get("start", 0):
                return False
            if np.any(self.model.array(picked) % flow.rank == flow.axis):
                return False
        return True


def _one(tensor: gs.Tensor, flow: Flow) -> bool:
    """Whether an operand is the same for all channels."""
    if tensor.shape is None:
        return False
    place = len(tensor.shape) - flow.from_end
    return place < 0 or tensor.shape[place] == 1


def _is_inferred(model: Model, node: gs.Node) -> bool:
    """Whether a Reshape to a computed shape leaves it to the runtime how many channels there are.

    That is a Concat of single sizes, the second one -1: `x.view(x.size(0), -1)` of torch.
    """
    source = producer(node.inputs[1])
    if source is None or source.op != "Concat" or len(source.inputs) < 2:
        return False
    if any(t.shape is None or [*t.shape] != [1] for t in source.inputs[:2]):
        return False
    second = source.inputs[1]
    return isinstance(second, gs.Constant) and model.array(second).tolist() == [-1]


# ---------------------------------------------------------------------- groups


def _grouped(found: Dependencies, fixed: dict[int, str]) -> list[Group]:
    """Classes that are not fixed, by the places that they lie in."""
    places: dict[int, Counter[tuple[str, bool]]] = {}
    for is_input, sides in enumerate((found.outputs, found.inputs)):
        for name, side in sides.items():
            for c in side.classes.tolist():
                if c not in fixed:
                    places.setdefault(c, Counter())[name, bool(is_input)] += 1
    members: dict[frozenset[tuple[tuple[str, bool], int]], list[int]] = {}
    for c, where in places.items():
        members.setdefault(frozenset(where.items()), []).append(c)
    taken: Counter[str] = Counter()
    groups = []
    for signature, classes in members.items():
        lie = {place for place, _ in signature}
        outputs = tuple(s for n, s in found.outputs.items() if (n, False) in lie)
        inputs = tuple(s for n, s in found.inputs.items() if (n, True) in lie)
        first = (outputs or inputs)[0].layer.name
        taken[first] += 1
        name = first if taken[first] == 1 else f"{first}#{taken[first]}"
        groups.append(Group(name, np.array(classes), outputs, inputs))
    return groups
