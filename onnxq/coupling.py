"""Which channels of a model hang together: scale one and all of its class have to be scaled.

A layer puts out channels and reads channels; what lies between may move them (Concat, Split,
Flatten), tie them to one another (Add), or stand in the way (Sigmoid, an output of the model).  A
class of channels is what can be multiplied by one positive number, undone in the weights of the
layers that read it, without changing the function of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.channels import broadcasts
from onnxq.classes import ClassWalk, Side
from onnxq.model import Layer, Model

__all__ = ["Ceiling", "Constant", "Coupling", "Side", "couple"]


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


class _Coupler(ClassWalk):
    """Gives channels that are scaled together one class."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.found = Coupling()
        self.rules |= {
            "Clip": self._clip,
            **dict.fromkeys(("Add", "Max", "Min", "Sub", "Sum"), self._combine),
            **dict.fromkeys(("Div", "Mul"), self._multiply),
            **dict.fromkeys(_PLAIN, self.plain),
        }

    def run(self) -> Coupling:
        self.walk()
        found = self.found
        number, found.count, found.fixed = self.numbered()
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

    def layer(
        self, layer: Layer, inputs: np.ndarray | None, outputs: np.ndarray | None, why: str
    ) -> None:
        if inputs is not None:
            self.found.inputs.append(Side(layer, inputs))
        if outputs is None:
            return
        if why:
            self.found.refused[layer.name] = why
            self.end(layer.y, why)
        else:
            self.found.outputs.append(Side(layer, outputs))

    # -------------------------------------------------------------- what lets a scale through

    def _clip(self, node: gs.Node) -> bool:
        flow = self.flows[id(node.inputs[0])]
        low, high = _bounds(self.model, node)
        if low != 0.0 or high is None or flow.axis != 1 or not self.carry(node, flow):
            return False
        if np.isfinite(high):
            self.found.ceilings.append(Ceiling(node, high, flow.ids, flow.rank))
        return True

    def _combine(self, node: gs.Node) -> bool:
        """Add and its like: all operands have the same scale, constants are scaled along."""
        widest = self.aligned(node)
        if widest is None or not self.carry(node, widest):
            return False
        flows = [self.flows.get(id(t)) for t in node.inputs]
        self.join([widest.ids, *(f.ids for f in flows if f is not None)])
        shape = (-1, *[1] * (widest.from_end - 1))
        self.found.constants += [
            Constant(node, index, widest.ids, shape) for index, f in enumerate(flows) if f is None
        ]
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
        return broadcasts(other, flow) and self.carry(node, flow)


def _bounds(model: Model, node: gs.Node) -> tuple[float | None, float | None]:
    """The bounds of a Clip; None where one is computed."""
    values: list[float | None] = [node.attrs.get("min", -np.inf), node.attrs.get("max", np.inf)]
    for index, tensor in enumerate(node.inputs[1:3]):
        if tensor.name:
            constant = isinstance(tensor, gs.Constant)
            values[index] = float(model.array(tensor).reshape(-1)[0]) if constant else None
    return values[0], values[1]
