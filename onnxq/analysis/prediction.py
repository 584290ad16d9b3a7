"""Which nodes of a model run in integers, predicted from onnxruntime's rules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.analysis.contract import broken_rule
from onnxq.analysis.qdq import is_qdq, is_quantize, quantized_by, typed
from onnxq.analysis.rewrites import Rewritten
from onnxq.analysis.rules import RULES, Why, computes_integers
from onnxq.model import Model

__all__ = ["Prediction", "float_work", "predict"]

_INTEGERS = frozenset({"int8", "uint8", "int16", "uint16", "int32"})


@dataclass(frozen=True)
class Prediction:
    """What is to become of one node.

    Args:
        name: Node name.
        op: Operator type.
        integer: Whether it runs in integers; None if nothing is left of it.
        kernel: What runs in its place; empty if nothing does.
        why: Why it does not run in integers; None if it does.
    """

    name: str
    op: str
    integer: bool | None
    kernel: str
    why: Why | None = None


def predict(model: Model, *, arm: bool = False) -> list[Prediction]:
    """What onnxruntime will do with each node that computes or moves what was float once.

    Args:
        model: A Q/DQ or QOperator model, as any tool writes it.
        arm: Whether int8 activations stay int8, as on ARM.
    """
    model = typed(model)
    graph = Rewritten(model, arm=arm)
    work = float_work(model)
    found: dict[str, Prediction] = {}
    for node in work:
        if node.name in graph.gone:
            found[node.name] = Prediction(node.name, node.op, None, "")
        elif node.name in graph.nodes:
            found[node.name] = _of(node, graph.nodes[node.name], graph)
    absorbed = _absorbed(graph, found)
    for node in work:
        name = node.name
        if name in absorbed:
            found[name] = Prediction(name, node.op, True, absorbed[name])
        elif name in graph.taken:
            found[name] = _taken(node, graph.taken[name], found)
    return [found[node.name] for node in work if node.name in found]


def float_work(model: Model) -> list[gs.Node]:
    """The nodes that compute or move floats, or the integers that stand for them, in graph order.

    Left out: Q and DQ, arithmetic on shapes and indices, what depends on constants alone.
    """
    constant: set[int] = set()
    quantized: set[int] = set()
    nodes = []
    for node in model.graph.nodes:
        data = [t for t in node.inputs if t.name]
        if data and all(isinstance(t, gs.Constant) or id(t) in constant for t in data):
            constant |= {id(t) for t in node.outputs}
            if not (is_qdq(node) and not is_quantize(node)):
                continue
        if is_quantize(node):
            quantized.add(id(node.outputs[0]))
        if is_qdq(node) or node.op in ops.SHAPES:
            continue
        if node.op == "Cast" and not _is_float(node.inputs[0]):  # indices, masks
            continue
        if computes_integers(node.op) or any(id(t) in quantized for t in node.inputs[:1]):
            quantized |= {id(t) for t in node.outputs}
            nodes.append(node)
        elif any(_is_float(t) for t in (*data, *node.outputs) if t.name):
            nodes.append(node)
    return nodes


def _is_float(tensor: gs.Tensor) -> bool:
    if isinstance(tensor, gs.Constant):
        return False
    kind = tensor.dtype
    return kind is None or (not isinstance(kind, int) and np.issubdtype(kind, np.floating))


def _of(given: gs.Node, node: gs.Node, graph: Rewritten) -> Prediction:
    if computes_integers(node.op) or _on_integers(node):
        return Prediction(given.name, given.op, True, node.op)
    why = broken_rule(node, graph)
    if why is not None:
        return Prediction(given.name, given.op, False, node.op, why)
    kernel = RULES[node.op].kernel or node.op
    if node.op == "MatMul" and not quantized_by(node.outputs[0]):
        readers = graph.readers(node.outputs[0])
        after = readers[0] if len(readers) == 1 and readers[0].op in ops.ACTIVATIONS else None
        if after is None or not quantized_by(after.outputs[0]):
            kernel = "MatMulIntegerToFloat"
    return Prediction(given.name, given.op, True, kernel)


def _on_integers(node: gs.Node) -> bool:
    """Whether a node reads and gives integers as it is written."""
    results = [t for t in node.outputs if t.name]
    kinds = [t.dtype for t in (*node.inputs[:1], *results)]
    return bool(results) and all(k is not None and str(np.dtype(k)) in _INTEGERS for k in kinds)


def _absorbed(graph: Rewritten, found: dict[str, Prediction]) -> dict[str, str]:
    """Relu and Clip behind layers in integers that saturate -> the kernel of the layer."""
    result = {}
    for name, node in graph.nodes.items():
        fused = found.get(name)
        if fused is None or not fused.integer or RULES.get(node.op) is None:
            continue
        readers = graph.readers(node.outputs[0]) if node.outputs else []
        if len(readers) == 1 and readers[0].op in ops.ACTIVATIONS:
            after = readers[0]
            if quantized_by(after.outputs[0]) and not graph.is_output(after.outputs[0]):
                result[after.name] = fused.kernel
    return result


def _taken(node: gs.Node, by: str, found: dict[str, Prediction]) -> Prediction:
    """What becomes of a node whose work another does: a Q, or the layer before it."""
    other = found.get(by)
    if other is None:  # a Q
        return Prediction(node.name, node.op, True, "QuantizeLinear")
    return Prediction(node.name, node.op, other.integer, other.kernel, other.why)
