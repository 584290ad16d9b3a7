"""Which channels of a model hang together: scale one and all of its class have to be scaled.

A layer puts out channels and reads channels; what lies between may move them (Concat, Split,
Flatten), tie them to one another (Add), or stand in the way (Sigmoid, an output of the model).  A
class of channels is what can be multiplied by one positive number, undone in the weights of the
layers that read it, without changing the function of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Layer, Model, consumers, has_subgraph

__all__ = ["Ceiling", "Constant", "Coupling", "Side", "couple"]


@dataclass(frozen=True, eq=False)
class Side:
    """The output or input channels of one layer.

    Args:
        layer: The layer.
        classes: Class of each of its channels, int64 [channels].
    """

    layer: Layer
    classes: np.ndarray


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant that is added to channels, and so has to be scaled along.

    Args:
        node: The node that adds it.
        index: Its input index.
        classes: Class of each channel, int64 [channels].
        shape: Shape of one value per channel that broadcasts over the result.
    """

    node: gs.Node
    index: int
    classes: np.ndarray
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Ceiling:
    """A Clip from 0 to a bound, as in ReLU6: scaled channels need bounds of their own.

    Args:
        node: The Clip.
        bound: Its upper bound.
        classes: Class of each channel, int64 [channels].
        rank: Axes of the tensor, channels along axis 1.
    """

    node: gs.Node
    bound: float
    classes: np.ndarray
    rank: int


@dataclass
class Coupling:
    """The classes of channels of a model.

    Attributes:
        count: How many classes there are.
        fixed: Class -> why it cannot be scaled.
        tensors: Name of a tensor -> class of each channel.
        outputs: The layers with the classes of what they put out, in graph order.
        inputs: The layers with the classes of what they read, in graph order.
        constants: What is added on the way.
        ceilings: Where channels are cut off from above.
        refused: Name of a layer that neither takes nor gives a scale -> the reason.
    """

    count: int = 0
    fixed: dict[int, str] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: list[Side] = field(default_factory=list)
    inputs: list[Side] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    ceilings: list[Ceiling] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def is_fixed(self, classes: np.ndarray) -> np.ndarray:
        """Whether each class is fixed, bool, same shape."""
        mask = np.zeros(self.count, bool)
        mask[[*self.fixed]] = True
        return np.asarray(mask[classes])

    def reason(self, classes: np.ndarray) -> str:
        """Why the first fixed one of these classes is fixed; empty if none is."""
        return next((self.fixed[c] for c in classes.tolist() if c in self.fixed), "")


def couple(model: Model) -> Coupling:
    """Find the classes of channels of a model."""
    model.infer()
    return _Coupler(model).run()


@dataclass(frozen=True, eq=False)
class _Flow:
    """The channels of a tensor.

    Args:
        ids: One per channel; those of one class are tied later.
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


# f(s x) = s f(x) for s > 0, channel by channel, whatever the spatial axes.
_PLAIN = frozenset(
    {
        "Abs",
        "AveragePool",
        "Dropout",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "Identity",
        "LeakyRelu",
        "MaxPool",
        "Neg",
        "PRelu",
        "Relu",
    }
)
# Read nothing but the shape.
_SHAPES = frozenset({"Shape", "Size"})
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})


class _Coupler:
    """Walks the graph once, forwards."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.flows: dict[int, _Flow] = {}  # by the identity of the tensor
        self.parent: list[int] = []
        self.why: dict[int, str] = {}
        self.found = Coupling()
        self.rules: dict[str, Callable[[gs.Node], bool]] = {
            "Clip": self._clip,
            "Concat": self._concat,
            "DepthToSpace": self._depth_to_space,
            "Div": self._multiply,
            "Flatten": self._reshape,
            "Mul": self._multiply,
            "Pad": self._pad,
            "Reshape": self._reshape,
            "Resize": self._resize,
            "Slice": self._slice,
            "Split": self._split,
            "Squeeze": self._reshape,
            "Transpose": self._transpose,
            **dict.fromkeys(("Add", "Max", "Min", "Sub", "Sum"), self._combine),
            **dict.fromkeys(_REDUCTIONS, self._reduce),
            **dict.fromkeys(_PLAIN, self._plain),
        }

    def run(self) -> Coupling:
        main = {id(n) for n in self.model.graph.nodes}
        for node in self.model.graph.nodes:
            layer = Layer.of(self.model, node)
            standard = node.domain in (None, "", "ai.onnx") and not has_subgraph(node)
            if layer is not None and standard:
                self._layer(layer)
            elif standard and node.op in _SHAPES:
                continue
            elif not (standard and node.op in self.rules and self.rules[node.op](node)):
                self._stop(node)
        for tensor in self.model.tensors().values():
            if any(id(n) not in main for n in consumers(tensor)):
                self._fix(tensor, "a subgraph reads it")
        for tensor in self.model.graph.outputs:
            self._fix(tensor, f"{tensor.name} is an output of the model")
        return self._result()

    # -------------------------------------------------------------- classes

    def _new(self, count: int) -> np.ndarray:
        first = len(self.parent)
        self.parent += range(first, first + count)
        return np.arange(first, first + count)

    def _root(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def _tie(self, a: np.ndarray, b: np.ndarray) -> None:
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            first, second = sorted((self._root(i), self._root(j)))
            self.parent[second] = first

    def _fix(self, tensor: gs.Tensor, why: str) -> None:
        flow = self.flows.get(id(tensor))
        if flow is not None:
            for i in flow.ids.tolist():
                self.why.setdefault(i, why)

    def _stop(self, node: gs.Node) -> None:
        for tensor in node.inputs:
            self._fix(tensor, f"{node.name} ({node.op}) reads it")

    def _result(self) -> Coupling:
        roots = np.array([self._root(i) for i in range(len(self.parent))], np.int64)
        kept, number = np.unique(roots, return_inverse=True)
        found = self.found
        found.count = kept.size
        for i, why in sorted(self.why.items()):
            found.fixed.setdefault(int(number[i]), why)
        names = {id(t): t.name for t in self.model.tensors().values()}
        found.tensors = {names[t]: number[f.ids] for t, f in self.flows.items() if t in names}
        found.outputs = [Side(s.layer, number[s.classes]) for s in found.outputs]
        found.inputs = [Side(s.layer, number[s.classes]) for s in found.inputs]
        found.constants = [
            Constant(c.node, c.index, number[c.classes], c.shape) for c in found.constants
        ]
        found.ceilings = [
            Ceiling(c.node, c.bound, number[c.classes], c.rank) for c in found.ceilings
        ]
        return found

    # -------------------------------------------------------------- layers

    def _layer(self, layer: Layer) -> None:
        flow = self.flows.get(id(layer.x))
        convolution = "Conv" in layer.op
        rank = layer.weight.ndim if convolution else _rank(layer.y)
        why = layer.unscalable or (
            "" if layer.owns_params else f"{layer.name} shares its parameters"
        )
        if layer.node.attrs.get("transA", 0):
            why = f"{layer.name} reads its input transposed"
        if flow is not None:
            axis = 1 if convolution else flow.rank - 1
            if why or flow.axis != axis or flow.ids.size != layer.input_channels:
                self._fix(layer.x, why or f"{layer.name} reads it along another axis")
            else:
                self.found.inputs.append(Side(layer, flow.ids))
        for tensor in layer.node.inputs:
            if tensor is not layer.x:
                self._fix(tensor, f"{layer.name} reads it as a parameter")
        if rank is None:
            return
        ids = self._new(layer.output_channels)
        self.flows[id(layer.y)] = _Flow(ids, 1 if convolution else rank - 1, rank)
        if why:
            self.found.refused[layer.name] = why
            self._fix(layer.y, why)
        else:
            self.found.outputs.append(Side(layer, ids))

    # -------------------------------------------------------------- what lies between

    def _pass(self, node: gs.Node, flow: _Flow) -> bool:
        """Let the first output carry a flow; False if its known shape says otherwise."""
        result = node.outputs[0]
        size = None if result.shape is None else result.shape[flow.axis]
        if isinstance(size, int) and size != flow.ids.size:
            return False
        if any(t.name for t in node.outputs[1:]):
            return False
        self.flows[id(result)] = flow
        return True

    def _of(self, node: gs.Node) -> _Flow | None:
        return self.flows.get(id(node.inputs[0]))

    def _plain(self, node: gs.Node) -> bool:
        flow = self._of(node)
        if node.op == "PRelu" and not isinstance(node.inputs[1], gs.Constant):
            return False
        return flow is None or self._pass(node, flow)

    def _clip(self, node: gs.Node) -> bool:
        flow = self._of(node)
        if flow is None:
            return True
        low, high = _bounds(self.model, node)
        if low != 0.0 or high is None or flow.axis != 1 or not self._pass(node, flow):
            return False
        if np.isfinite(high):
            self.found.ceilings.append(Ceiling(node, high, flow.ids, flow.rank))
        return True

    def _combine(self, node: gs.Node) -> bool:
        """Add and its like: all operands have the same scale, constants are scaled along."""
        flows = [self.flows.get(id(t)) for t in node.inputs]
        known = [f for f in flows if f is not None]
        if not known:
            return True
        widest = max(known, key=lambda f: f.rank)
        constants = []
        for index, (tensor, flow) in enumerate(zip(node.inputs, flows, strict=True)):
            if flow is not None:
                if flow.from_end != widest.from_end or flow.ids.size != widest.ids.size:
                    return False
            elif isinstance(tensor, gs.Constant):
                rank = len(tensor.shape)
                if rank > widest.rank:
                    return False
                shape = (-1, *[1] * (widest.from_end - 1))
                constants.append(Constant(node, index, widest.ids, shape))
            else:
                return False
        if not self._pass(node, widest):
            return False
        for flow in known:
            self._tie(flow.ids, widest.ids)
        self.found.constants += constants
        return True

    def _multiply(self, node: gs.Node) -> bool:
        """A product has the scale of its only scaled factor."""
        left, right = (self.flows.get(id(t)) for t in node.inputs[:2])
        if node.op == "Div" and right is not None:
            return False
        if left is not None and right is not None:
            return False
        flow, other = (left, node.inputs[1]) if right is None else (right, node.inputs[0])
        if flow is None:
            return True
        rank = len(other.shape) if other.shape is not None else None
        return rank is not None and rank <= flow.rank and self._pass(node, flow)

    def _concat(self, node: gs.Node) -> bool:
        flows = [self.flows.get(id(t)) for t in node.inputs]
        known = [f for f in flows if f is not None]
        if not known:
            return True
        rank, axis = known[0].rank, int(node.attrs["axis"])
        axis += rank if axis < 0 else 0
        if any((f.rank, f.axis) != (rank, known[0].axis) for f in known):
            return False
        if axis != known[0].axis:  # the same channels side by side
            if len(known) < len(flows) or not self._pass(node, known[0]):
                return False
            for flow in known[1:]:
                self._tie(flow.ids, known[0].ids)
            return True
        parts = []
        for tensor, part in zip(node.inputs, flows, strict=True):
            if part is None:
                size = None if tensor.shape is None else tensor.shape[axis]
                if not isinstance(size, int):
                    return False
                why = f"{node.name} joins it with {tensor.name}"
                parts.append(self._new(size))
                self.why.update((int(i), why) for i in parts[-1])
            else:
                parts.append(part.ids)
        return self._pass(node, _Flow(np.concatenate(parts), axis, rank))

    def _split(self, node: gs.Node) -> bool:
        flow = self._of(node)
        if flow is None:
            return True
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
            self.flows[id(tensor)] = _Flow(ids, flow.axis, flow.rank)
        return True

    def _pad(self, node: gs.Node) -> bool:
        flow = self._of(node)
        if flow is None:
            return True
        pads = node.attrs.get("pads")
        if len(node.inputs) > 1:
            if not isinstance(node.inputs[1], gs.Constant) or len(node.inputs) > 3:
                return False
            pads = self.model.array(node.inputs[1]).tolist()
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
        ids = np.concatenate([self._new(before), flow.ids, self._new(after)])  # zeros scale freely
        return self._pass(node, _Flow(ids, flow.axis, flow.rank))

    def _slice(self, node: gs.Node) -> bool:
        flow = self._of(node)
        if flow is None:
            return True
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
        return self._pass(node, _Flow(ids, flow.axis, flow.rank))

    def _resize(self, node: gs.Node) -> bool:
        flow = self._of(node)
        if flow is None:
            return True
        result = node.outputs[0]
        if result.shape is None or result.shape[flow.axis] != flow.ids.size:
            return False
        return node.attrs.get("coordinate_transformation_mode") != (
            "tf_crop_and_resize"
        ) and self._pass(node, flow)

    def _transpose(self, node: gs.Node) -> bool:
        flow = self._of(node)
        if flow is None:
            return True
        order = node.attrs.get("perm") or [*reversed(range(flow.rank))]
        return self._pass(node, _Flow(flow.ids, [*order].index(flow.axis), flow.rank))

    def _reduce(self, node: gs.Node) -> bool:
        flow = self._of(node)
        if flow is None:
            return True
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
            return self._pass(node, flow)
        axis = flow.axis - sum(a < flow.axis for a in gone)
        return self._pass(node, _Flow(flow.ids, axis, flow.rank - len(gone)))

    def _reshape(self, node: gs.Node) -> bool:
        """Channels stay an axis of their own, or each fills as many columns as it has positions."""
        flow = self._of(node)
        if flow is None:
            return True
        old, new = node.inputs[0].shape, node.outputs[0].shape
        if old is None or new is None or flow.axis != 1 or len(new) < 2:
            return False
        inner = list(old[2:])
        if new[1] == flow.ids.size and _same(old[0], new[0]):
            return self._pass(node, _Flow(flow.ids, 1, len(new)))
        if len(new) != 2 or not all(isinstance(n, int) for n in inner):
            return False
        positions = int(np.prod(inner, initial=1))
        if new[1] not in (flow.ids.size * positions, None) and isinstance(new[1], int):
            return False
        return self._pass(node, _Flow(np.repeat(flow.ids, positions), 1, 2))

    def _depth_to_space(self, node: gs.Node) -> bool:
        """The channels that become one have to have one scale."""
        flow = self._of(node)
        if flow is None:
            return True
        block = int(node.attrs["blocksize"]) ** 2
        by_column = node.attrs.get("mode", "DCR") == "CRD"
        ids = flow.ids.reshape((-1, block) if by_column else (block, -1))
        ids = ids if by_column else ids.T
        for column in ids.T[1:]:
            self._tie(column, ids[:, 0])
        return self._pass(node, _Flow(ids[:, 0], flow.axis, flow.rank))


def _rank(tensor: gs.Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


def _same(a: object, b: object) -> bool:
    """Whether two batch sizes may be the same."""
    return not (isinstance(a, int) and isinstance(b, int)) or a == b


def _bounds(model: Model, node: gs.Node) -> tuple[float | None, float | None]:
    """The bounds of a Clip; None where one is computed."""
    values: list[float | None] = [node.attrs.get("min", -np.inf), node.attrs.get("max", np.inf)]
    for index, tensor in enumerate(node.inputs[1:3]):
        if tensor.name:
            constant = isinstance(tensor, gs.Constant)
            values[index] = float(model.array(tensor).reshape(-1)[0]) if constant else None
    return values[0], values[1]
