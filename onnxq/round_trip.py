"""What onnx-graphsurgeon drops between reading and writing a file: remembered and restored."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import external_data_helper, numpy_helper

from onnxq.errors import ModelError, UnsupportedError
from onnxq.model_io import TWO_GB
from onnxq.well_formed import attributes, graphs

__all__ = ["Extras", "dense", "normalize", "remember", "restore"]

# graphsurgeon leaves them out with no more than a line in the log
_LOST = {
    getattr(onnx.AttributeProto, kind + plural)
    for kind in ("SPARSE_TENSOR", "TYPE_PROTO", "TENSOR", "GRAPH")
    for plural in ("", "S")
} - {onnx.AttributeProto.TENSOR, onnx.AttributeProto.GRAPH}
# Of a model that has no standard operators yet: the version that Q/DQ per channel needs.
_FIRST_STANDARD = 13
_TYPES = frozenset(onnx.helper.get_all_tensor_dtypes())


@dataclass
class Extras:
    """What onnx-graphsurgeon does not carry from one ONNX file to the next."""

    ir_version: int = 8
    producer: tuple[str, str] = ("", "")
    domain: str = ""
    model_version: int = 0
    doc_string: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    graph_metadata: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)
    initializer_inputs: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    no_tensors: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    annotations: list[onnx.TensorAnnotation] = field(default_factory=list)


def normalize(proto: onnx.ModelProto, path: Path | None) -> None:
    """Write the standard domain as "", and refuse what graphsurgeon would lose or stumble over.

    Raises:
        ModelError: A tensor or an attribute of no known type.
        UnsupportedError: An attribute that graphsurgeon cannot carry.
    """
    for tensor in external_data_helper._get_all_tensors(proto):
        if tensor.data_type not in _TYPES:
            raise _untyped(f"tensor {tensor.name}", path)
    for opset in proto.opset_import:
        opset.domain = "" if opset.domain == "ai.onnx" else opset.domain
    if not any(o.domain == "" for o in proto.opset_import):  # graphsurgeon would guess one
        proto.opset_import.add(domain="", version=_FIRST_STANDARD)
    for graph in graphs(proto.graph):
        for info in (*graph.input, *graph.output, *graph.value_info):
            if info.type.tensor_type.elem_type not in (0, *_TYPES):
                raise _untyped(f"tensor {info.name}", path)
        for node in graph.node:
            if node.domain == "ai.onnx":
                node.domain = ""
            for place, attribute in attributes(node):
                if attribute.type == onnx.AttributeProto.UNDEFINED:
                    raise _untyped(place, path)
                if (kind := _not_carried(attribute)) is not None:
                    raise UnsupportedError(
                        f"{place} is {kind}", where=path, fix="export the model without it"
                    )


def _untyped(place: str, path: Path | None) -> ModelError:
    return ModelError(f"{place} has no known type", where=path, fix="export the model again")


def _not_carried(attribute: onnx.AttributeProto) -> str | None:
    """What keeps graphsurgeon from writing an attribute that it has read; None if nothing does."""
    kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
    if attribute.type in _LOST:
        return f"a {kind}"
    if attribute.ref_attr_name:
        return None
    if kind in ("FLOATS", "INTS", "STRINGS") and not getattr(attribute, kind.lower()):
        return "an empty list"
    try:
        for text in (attribute.s, *attribute.strings):
            text.decode()
    except UnicodeDecodeError:
        return "not text"
    return None


def remember(proto: onnx.ModelProto) -> Extras:
    """What graphsurgeon will drop of the file."""
    # Before IR 4 every initializer had to be an input, too: that says nothing about the model.
    constants = {t.name for t in proto.graph.initializer if proto.ir_version >= 4}
    return Extras(
        ir_version=proto.ir_version,
        producer=(proto.producer_name, proto.producer_version),
        domain=proto.domain,
        model_version=proto.model_version,
        doc_string=proto.doc_string,
        metadata={p.key: p.value for p in proto.metadata_props},
        graph_metadata={p.key: p.value for p in proto.graph.metadata_props},
        nodes={
            n.name: (n.doc_string, {p.key: p.value for p in n.metadata_props})
            for n in proto.graph.node
            if n.name and (n.doc_string or n.metadata_props)
        },
        initializer_inputs={i.name: i for i in proto.graph.input if i.name in constants},
        no_tensors={
            i.name: i
            for i in (*proto.graph.input, *proto.graph.output)
            if i.type.WhichOneof("value") not in (None, "tensor_type")
        },
        constants={t.name for t in proto.graph.initializer}
        | {n.output[0] for n in proto.graph.node if n.op_type == "Constant"},
        annotations=list(proto.graph.quantization_annotation),
    )


def restore(proto: onnx.ModelProto, extras: Extras) -> None:
    """Write what was remembered into the file that graphsurgeon made."""
    opsets = [o for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    needed = max((_ir_version(o.version) for o in opsets), default=4)
    # From IR 4 on, initializers need not be inputs too; new ones are not.
    proto.ir_version = max(extras.ir_version, needed, 4)
    proto.producer_name, proto.producer_version = extras.producer
    proto.domain, proto.model_version = extras.domain, extras.model_version
    proto.doc_string = extras.doc_string
    onnx.helper.set_model_props(proto, extras.metadata)
    for key, value in extras.graph_metadata.items():
        proto.graph.metadata_props.add(key=key, value=value)
    _write_once(proto.graph, extras.constants)
    for node in proto.graph.node:
        doc, props = extras.nodes.get(node.name, ("", {}))
        if doc:
            node.doc_string = doc
        for key, value in props.items():
            node.metadata_props.add(key=key, value=value)
    kinds = {t.name: (t.data_type, tuple(t.dims)) for t in proto.graph.initializer}
    for name, info in extras.initializer_inputs.items():
        kind = info.type.tensor_type
        if kinds.get(name) == (kind.elem_type, tuple(d.dim_value for d in kind.shape.dim)):
            proto.graph.input.append(info)
    for info in (*proto.graph.input, *proto.graph.output):
        if info.name in extras.no_tensors:
            info.CopyFrom(extras.no_tensors[info.name])
    present = {t for n in proto.graph.node for t in (*n.input, *n.output)}
    proto.graph.quantization_annotation.extend(
        a for a in extras.annotations if a.tensor_name in present
    )


def dense(sparse: onnx.SparseTensorProto) -> np.ndarray:
    """A sparse tensor in full.

    Raises:
        ModelError: Its parts do not fit together, or it would be too large to be written.
    """
    place, fix = f"sparse tensor {sparse.values.name}", "export the model again"
    try:
        values, indices = (
            numpy_helper.to_array(sparse.values),
            numpy_helper.to_array(sparse.indices),
        )
        shape = tuple(sparse.dims)
        if min(shape, default=0) < 0 or math.prod(shape) * values.itemsize > TWO_GB:
            raise ModelError("in full it would take more than 2 GB", where=place, fix=fix)
        array = np.zeros(shape, values.dtype)
        if indices.ndim == 1:
            array.reshape(-1)[indices] = values
        else:
            array[tuple(indices.T)] = values
    except (IndexError, TypeError, ValueError) as error:
        raise ModelError("its indices and values do not fit", where=place, fix=fix) from error
    return array


def _write_once(graph: onnx.GraphProto, shared: set[str]) -> None:
    """Move constants of the main graph, which graphsurgeon copies into subgraphs, back to it."""
    main = {t.name: t for t in graph.initializer}
    for inner in graphs(graph):
        for index in reversed(range(len(inner.initializer) if inner is not graph else 0)):
            tensor = inner.initializer[index]
            if tensor.name in shared and tensor.name not in main:
                graph.initializer.append(tensor)
                main[tensor.name] = graph.initializer[-1]
            if tensor.name in shared and main[tensor.name] == tensor:
                del inner.initializer[index]


def _ir_version(opset: int) -> int:
    table: dict[tuple[str, int], int] = onnx.helper.OP_SET_ID_VERSION_MAP
    newest = max(v for (domain, _), v in table.items() if domain == "ai.onnx")
    return table.get(("ai.onnx", opset), newest)
