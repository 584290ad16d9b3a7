"""What a model file has to be before anything reads it: text where text belongs, whole nodes.

protobuf reads much that is no model.  Names come as bytes where they are not UTF-8, a tensor may be
absent that an attribute says is there, and a node may have any number of inputs.  onnxruntime would
refuse such files, but it comes later, or never.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import Message

from onnxq.errors import ModelError

__all__ = ["LARGEST_EXPANSION", "attributes", "check_well_formed", "graphs"]

# Nodes that local functions may become where they are called, and again in what these call.
LARGEST_EXPANSION = 1_000_000

_Attribute = onnx.AttributeProto
# Type of an attribute -> the field that has to be there
_VALUES = {_Attribute.TENSOR: "t", _Attribute.GRAPH: "g", _Attribute.SPARSE_TENSOR: "sparse_tensor"}
_STANDARD = ("", "ai.onnx")
_Function = tuple[str, str, str]  # domain, name, overload


def check_well_formed(proto: onnx.ModelProto, path: Path | None) -> None:
    """Refuse what is no model, whatever the numbers in it are.

    Raises:
        ModelError: Names what is wrong, and where.
    """
    _check_text(proto, path)
    versions = {o.domain: o.version for o in proto.opset_import}
    standard = versions.get("", versions.get("ai.onnx", 0))
    for graph in graphs(proto.graph):
        for node in graph.node:
            _check_node(node, standard, path)
    for function in proto.functions:
        own = {o.domain: o.version for o in function.opset_import}
        for node in function.node:
            _check_node(node, own.get("", standard), path)
    _check_expansion(proto, path)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and its subgraphs at all depths."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == _Attribute.GRAPH:
                yield from graphs(attribute.g)


def attributes(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.AttributeProto]]:
    """The attributes of a node, and what to call each in an error."""
    for attribute in node.attribute:
        yield f"attribute {attribute.name} of {node.op_type} {node.name}", attribute


def _check_text(message: Message, path: Path | None) -> None:
    """Refuse text that is not UTF-8: it would come as bytes."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in (value,) if isinstance(value, Message) else value:
                _check_text(inner, path)
        elif field.type == field.TYPE_STRING:
            for text in (value,) if isinstance(value, (str, bytes)) else value:
                if not isinstance(text, str):
                    what = f"{field.name} of a {message.DESCRIPTOR.name} is not text: {text[:40]!r}"
                    raise _broken(what, path)


def _check_node(node: onnx.NodeProto, opset: int, path: Path | None) -> None:
    """Refuse attributes without their value, and inputs and outputs that the operator lacks."""
    for place, attribute in attributes(node):
        field = _VALUES.get(attribute.type)
        if field is not None and not attribute.ref_attr_name and not attribute.HasField(field):
            kind = _Attribute.AttributeType.Name(attribute.type)
            raise _broken(f"{place} says that it is a {kind}, and is none", path)
    if node.domain not in _STANDARD:
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except (onnx.defs.SchemaError, TypeError):  # no such operator or version: onnxruntime says so
        return
    for what, given, least, most, first in (
        ("inputs", node.input, schema.min_input, schema.max_input, schema.inputs),
        ("outputs", node.output, schema.min_output, schema.max_output, schema.outputs),
    ):
        needed = [s for s in first if s.option == onnx.defs.OpSchema.FormalParameterOption.Single]
        absent = not all(given[: min(least, len(needed))])
        if not least <= len(given) <= most or absent:
            raise _broken(f"{node.op_type} {node.name} has no valid {what}", path)
    for place, attribute in attributes(node):
        known = schema.attributes.get(attribute.name)
        wanted: Any = None if known is None else known.type
        if wanted is not None and attribute.type not in (wanted.value, _Attribute.UNDEFINED):
            raise _broken(f"{place} is not of the type {wanted.name}", path)


def _check_expansion(proto: onnx.ModelProto, path: Path | None) -> None:
    """Refuse local functions that call themselves, or one another more often than can be held."""
    called = {(f.domain, f.name, f.overload): _calls(_all_nodes(f.node)) for f in proto.functions}
    sizes: dict[_Function, int] = {}
    try:
        for key in TopologicalSorter(called).static_order():
            calls = called.get(key)  # None: an operator
            sizes[key] = 1 if calls is None else _expanded(calls, sizes)
    except CycleError as error:
        raise _broken(f"function {error.args[1][0][1]} calls itself", path) from error
    if called and _expanded(_calls(_all_nodes(proto.graph.node)), sizes) > LARGEST_EXPANSION:
        raise _broken(f"its functions become more than {LARGEST_EXPANSION:,} nodes", path)


def _expanded(calls: Mapping[_Function, int], sizes: Mapping[_Function, int]) -> int:
    total = sum(times * sizes.get(key, 1) for key, times in calls.items())
    return min(total, LARGEST_EXPANSION + 1)


def _calls(nodes: Iterable[onnx.NodeProto]) -> dict[_Function, int]:
    found: dict[_Function, int] = defaultdict(int)
    for node in nodes:
        found[node.domain, node.op_type, node.overload] += 1
    return found


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those of the subgraphs in them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == _Attribute.GRAPH:
                yield from _all_nodes(attribute.g.node)


def _broken(what: str, path: Path | None) -> ModelError:
    return ModelError(what, where=path, fix="export the model again")
