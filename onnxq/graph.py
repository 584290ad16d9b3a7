"""What onnx-graphsurgeon's graphs lack: who reads and produces a tensor, rewiring, node order."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.util.misc import SynchronizedList

from onnxq.errors import ModelError

__all__ = ["consumers", "has_subgraph", "is_standard", "producer", "rewire", "topological"]

logging.getLogger("ONNX-GraphSurgeon").setLevel(logging.ERROR)
gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.ERROR


def _unlink(self: SynchronizedList, tensor: gs.Tensor) -> None:
    """Take one link away, by identity.

    graphsurgeon compares nodes by name, attributes, inputs and outputs: that takes most of the time
    where many nodes read one constant, and mixes up nodes of two branches that look the same.
    """
    links = getattr(tensor, self.field_name)
    index = next(i for i, node in enumerate(links) if node is self.parent_obj)
    list.__delitem__(links, index)


SynchronizedList._remove_from_elem = _unlink


def rewire(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Make every input of `node` that is `old` read `new`."""
    for index, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[index] = new


def has_subgraph(node: gs.Node) -> bool:
    """Whether the node holds a subgraph (If, Loop, Scan)."""
    return any(isinstance(value, gs.Graph) for value in node.attrs.values())


def is_standard(node: gs.Node) -> bool:
    """Whether the operator is one of ONNX itself, not of another domain."""
    return node.domain in (None, "", "ai.onnx")


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that produces the tensor; None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read the tensor, each once."""
    seen: dict[int, gs.Node] = {id(n): n for n in tensor.outputs}
    return list(seen.values())


def topological(nodes: Sequence[gs.Node]) -> list[gs.Node]:
    """The nodes in topological order, in linear time and moved as little as possible.

    Raises:
        ModelError: There is a cycle.
    """
    place = {id(n): i for i, n in enumerate(nodes)}
    order: list[gs.Node] = []
    state: dict[int, int] = {}
    for root in nodes:
        stack = [(root, iter(_producers(root)))] if id(root) not in state else []
        if stack:
            state[id(root)] = 1
        while stack:
            node, sources = stack[-1]
            for source in sources:
                if id(source) not in place:
                    continue
                mark = state.get(id(source))
                if mark == 1:
                    raise ModelError("the graph has a cycle", where=f"node {source.name}")
                if mark is None:
                    state[id(source)] = 1
                    stack.append((source, iter(_producers(source))))
                    break
            else:
                state[id(node)] = 2
                order.append(node)
                stack.pop()
    return order


def _producers(node: gs.Node) -> Iterator[gs.Node]:
    for tensor in node.inputs:
        yield from tensor.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from _producers(inner)
