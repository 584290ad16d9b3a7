"""Which nodes of a model run in integers, read off the graph that onnxruntime really runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.analysis.cost import element_type
from onnxq.analysis.fusion import Optimized, optimized_graph
from onnxq.analysis.prediction import float_work
from onnxq.analysis.qdq import typed
from onnxq.analysis.rules import computes_integers
from onnxq.model import Model
from onnxq.ops import is_movement

__all__ = ["Measured", "Measurement", "measure"]

_QDQ = ("QuantizeLinear", "DequantizeLinear")
_INTEGERS = frozenset({"int8", "uint8", "int16", "uint16"})


@dataclass(frozen=True)
class Measured:
    """What became of one node.

    Args:
        name: Node name.
        integer: Whether it runs in integers; None if nothing is left of it.
        kernel: What runs in its place; empty if nothing does.
    """

    name: str
    integer: bool | None
    kernel: str


@dataclass(frozen=True)
class Measurement:
    """What onnxruntime runs.

    Args:
        nodes: What became of each node, by name.
        operators: Operator type -> nodes in the optimized graph.
    """

    nodes: dict[str, Measured]
    operators: dict[str, int]


def measure(model: Model, *, arm: bool = False) -> Measurement:
    """What became of the nodes of a model, as `onnxq.analysis.prediction.predict` lists them.

    Args:
        model: A Q/DQ or QOperator model, as any tool writes it.
        arm: Keep int8 activations, as onnxruntime does on ARM.

    Raises:
        ModelError: onnxruntime cannot load the model.
    """
    model = typed(model)
    graph = optimized_graph(model, arm=arm)
    found = _Graph(graph)
    nodes = {node.name: found.outcome(node) for node in float_work(model)}
    return Measurement(nodes, dict(Counter(n.op_type for n in graph.node).most_common()))


class _Graph:
    """onnxruntime's graph, searched for what became of a node.

    Most fusions keep the name of the node that they replace.  Others keep the tensor behind it, or
    one further on.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._names = {n.name: n for n in graph.node}
        self._producers: dict[str, onnx.NodeProto] = {
            name: n for n in graph.node for name in n.output if name
        }
        self._layers = Optimized(graph)
        self._integers = {i.name for i in graph.input if _is_integer(i.type.tensor_type.elem_type)}
        self._integers |= {t.name for t in graph.initializer if _is_integer(t.data_type)}
        for node in graph.node:
            self._follow(node)

    def _follow(self, node: onnx.NodeProto) -> None:
        """Note whether integers come out: types of new tensors are not in the file."""
        quantizes = node.op_type == "QuantizeLinear" or node.op_type.startswith("QLinear")
        if node.op_type == "QGemm":  # with scale and zero point of its result, or none of them
            quantizes = len(node.input) > 7
        moves = node.op_type not in ("Cast", "DequantizeLinear", "MatMulNBits")
        on_integers = bool(node.input) and node.input[0] in self._integers
        if quantizes or (moves and on_integers and not computes_integers(node.op_type)):
            self._integers |= set(node.output)

    def outcome(self, node: gs.Node) -> Measured:
        """What became of a node."""
        kept = self._layers.find(node) if node.op in ops.LAYERS else None
        kept = kept or self._names.get(node.name)
        if kept is None or kept.op_type in _QDQ:
            kept = self._successor(node)
        if kept is None:
            return Measured(node.name, None, "")
        if kept.op_type in _QDQ:
            if node.op in ops.ACTIVATIONS:  # saturation does its work
                return Measured(node.name, True, kept.op_type)
            return Measured(node.name, None, "")
        return Measured(node.name, self._is_integer(kept), kept.op_type)

    def _is_integer(self, node: onnx.NodeProto) -> bool:
        if computes_integers(node.op_type):
            return True
        return bool(node.input) and node.input[0] in self._integers

    def _successor(self, node: gs.Node) -> onnx.NodeProto | None:
        """The node that puts out the first tensor behind a node that is left of the model."""
        if is_movement(node.op, node.attrs) and node.op not in ("MaxPool", "Resize"):
            return None  # moved elsewhere, or out of the way
        for name in _behind(node):
            found = self._producers.get(name)
            if found is not None:
                return found
        return None


def _is_integer(kind: int) -> bool:
    return kind in onnx.helper.get_all_tensor_dtypes() and element_type(kind) in _INTEGERS


def _behind(node: gs.Node) -> Iterator[str]:
    """The result of a node, then the tensors behind it, breadth first."""
    waiting, seen = [t for t in node.outputs if t.name], set()
    while waiting:
        tensor = waiting.pop(0)
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        yield tensor.name
        waiting += [t for n in tensor.outputs for t in n.outputs if t.name]
