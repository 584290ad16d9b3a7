"""From one operator set to a newer one, and what onnx's own converter gets wrong."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import helper, numpy_helper

from onnxq.errors import ModelError
from onnxq.well_formed import graphs

__all__ = ["convert"]

# Resize of operator set 10 knew one mode of coordinates; from 11 on the default is another one.
_RESIZE_MODES = 11


def convert(given: onnx.ModelProto, old: int, version: int) -> onnx.ModelProto:
    """A model in a newer operator set.

    Args:
        given: The model.
        old: Its operator set.
        version: The operator set that is wanted.

    Raises:
        ModelError: onnx cannot convert an operator.
    """
    if 18 <= old < 21 <= version:
        for node in _nodes(given, "GroupNormalization"):  # onnx keeps its scales
            raise _unable(old, version, f"{node.name} would need its scales per channel")
    try:
        proto: onnx.ModelProto = onnx.version_converter.convert_version(given, version)
    except (
        *(RuntimeError, ValueError, onnx.checker.ValidationError),
        onnx.version_converter.ConvertError,
    ) as error:
        says = str(error).rpartition("failed: ")[2]  # after the place in the C++ source
        raise _unable(old, version, says) from error
    if not proto.functions:  # the converter drops them; they import operator sets of their own
        proto.functions.extend(given.functions)
    _restore_names(given.graph, proto.graph)
    if old < _RESIZE_MODES <= version:
        for node in _nodes(proto, "Resize"):
            modes = {"coordinate_transformation_mode": "asymmetric"}
            if not any(a.name == "mode" and a.s == b"linear" for a in node.attribute):
                nearest = _nearest_mode(proto, node)
                if nearest is None:
                    why = f"whether {node.name} (Resize) enlarges or reduces is not known"
                    raise _unable(old, version, why)
                modes["nearest_mode"] = nearest
            node.attribute.extend(helper.make_attribute(k, v) for k, v in modes.items())
        _type_limits(proto)
    return proto


def _type_limits(proto: onnx.ModelProto) -> None:
    """Give the limits of Clip, attributes before operator set 11, the type of what is clipped."""
    clips = [n for n in proto.graph.node if n.op_type == "Clip"]
    if not clips:
        return
    known = onnx.shape_inference.infer_shapes(proto).graph
    infos = (*known.input, *known.value_info, *known.output)
    types = {i.name: i.type.tensor_type.elem_type for i in infos}
    types |= {t.name: t.data_type for t in proto.graph.initializer}
    made = {n.output[0]: n for n in _nodes(proto, "Constant")}
    for node in clips:
        wanted = types.get(node.input[0])
        for limit in (made[name] for name in node.input[1:] if name in made):
            for value in (a for a in limit.attribute if a.name == "value"):
                if wanted not in (None, 0, value.t.data_type):
                    array = numpy_helper.to_array(value.t)
                    dtype = helper.tensor_dtype_to_np_dtype(wanted)
                    value.t.CopyFrom(numpy_helper.from_array(array.astype(dtype)))


def _restore_names(old: onnx.GraphProto, new: onnx.GraphProto) -> None:
    """Call tensors what they were called: the converter gives results of what it replaces a number.

    A result has the name of what its reader read in its place.
    """
    before = {name: node for node in old.node for name in node.output if name}
    given = {*before, *(i.name for i in old.input), *(t.name for t in old.initializer)}
    there = {name for node in new.node for name in node.output}
    renamed: dict[str, str] = {}
    for node in reversed(new.node):  # readers first: their names are known then
        node.output[:] = [renamed.get(name, name) for name in node.output]
        was = before.get(node.output[0]) if node.output else None
        for name, read in zip(node.input, was.input if was is not None else (), strict=False):
            lost = read in before and read not in there and read not in renamed.values()
            if lost and name in there and name not in given:
                renamed[name] = read
    for graph in graphs(new):
        for node in graph.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]


def _nearest_mode(proto: onnx.ModelProto, node: onnx.NodeProto) -> str | None:
    """How onnxruntime rounds positions of operator set 10: down to enlarge, up to reduce."""
    name = node.input[2] if len(node.input) > 2 else ""
    known = [t for graph in graphs(proto.graph) for t in graph.initializer if t.name == name]
    made = (n for n in _nodes(proto, "Constant") if n.output[0] == name)
    known += [a.t for n in made for a in n.attribute if a.name == "value"]
    if not known:
        return None
    scales = numpy_helper.to_array(known[0])
    return "floor" if (scales >= 1).all() else "ceil" if (scales <= 1).all() else None


def _nodes(proto: onnx.ModelProto, op: str) -> Iterator[onnx.NodeProto]:
    """The nodes of a standard operator, those of subgraphs, too."""
    for graph in graphs(proto.graph):
        yield from (n for n in graph.node if n.op_type == op and n.domain in ("", "ai.onnx"))


def _unable(old: int, version: int, why: str) -> ModelError:
    return ModelError(
        f"cannot convert operator set {old} to {version}: {why}",
        fix=f"export the model with opset {version} or newer",
    )
