"""What stands around a node where a rule looks."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq.analysis.qdq import dequantize_before, is_quantize
from onnxq.analysis.rewrites import Rewritten
from onnxq.analysis.rules import Rule

__all__ = ["absorber", "data", "dequantizes", "has_input", "quantizes"]


def has_input(node: gs.Node, index: int) -> bool:
    """Whether a node has an optional input."""
    return len(node.inputs) > index and bool(node.inputs[index].name)


def data(node: gs.Node, rule: Rule) -> list[tuple[int, gs.Tensor]]:
    """The inputs that have to come from a DQ, with their index."""
    chosen = {"first": slice(0, 1), "two": slice(0, 2), "choices": slice(1, 3)}
    found = [(i, t) for i, t in enumerate(node.inputs) if t.name]
    return found if rule.inputs == "all" else found[chosen[rule.inputs]]


def dequantizes(node: gs.Node, rule: Rule) -> list[gs.Node]:
    """The DQs in front of a node, in the order of its inputs."""
    found = [dequantize_before(t) for _, t in data(node, rule)]
    return [n for n in found if n is not None]


def absorber(node: gs.Node, graph: Rewritten) -> gs.Node | None:
    """The Relu or Clip behind a node that onnxruntime tries to take over with it."""
    readers = graph.readers(node.outputs[0])
    if len(readers) != 1 or readers[0].op not in ("Relu", "Clip"):
        return None
    after: gs.Node = readers[0]
    if len(graph.readers(after.outputs[0])) != 1 or graph.is_output(after.outputs[0]):
        return None
    return after


def quantizes(node: gs.Node, graph: Rewritten) -> list[gs.Node]:
    """The Qs behind a node, also behind the Relu or Clip that is taken over with it."""
    activation = absorber(node, graph)
    found = []
    for tensor in (node if activation is None else activation).outputs:
        found += [n for n in graph.readers(tensor) if is_quantize(n)]
    return found
