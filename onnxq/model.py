"""Model: an onnx-graphsurgeon graph that can be read, edited safely, checked and written."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from onnxq.conversion import convert
from onnxq.encoding import DTYPES, Encodings, in_bytes
from onnxq.errors import ModelError
from onnxq.graph import consumers, has_subgraph, is_standard, producer, rewire, topological
from onnxq.inference import inferred
from onnxq.kernels.pack import pack_nibbles
from onnxq.layer import Layer
from onnxq.model_io import (
    external_files,
    external_tensors,
    read_proto,
    stored_bytes,
    write_proto,
)
from onnxq.round_trip import dense, normalize, remember, restore
from onnxq.well_formed import check_well_formed

__all__ = [
    "BatchNormStatistics",
    "Layer",
    "Model",
    "consumers",
    "has_subgraph",
    "is_standard",
    "load",
    "producer",
    "rewire",
]


# onnxruntime has the operators of 7 on; Min and Max take bounds per channel of 8 on.
LEAST_OPSET = 8


@dataclass(frozen=True)
class BatchNormStatistics:
    """What a folded BatchNormalization knew: each channel is about N(beta, gamma^2).

    Args:
        gamma: Standard deviation per channel after the normalization, shape [C] (its scale).
        beta: Mean per channel after the normalization, shape [C] (its bias).
    """

    gamma: np.ndarray
    beta: np.ndarray


class Model:
    """An ONNX model that passes edit in place.

    Attributes:
        graph: The onnx-graphsurgeon graph.
        encodings: Which tensors are to be written in integers, and how.
        batch_norms: Tensor name -> statistics of the BatchNormalization folded before it.
        path: The file that it came from, None if there is none.
        notes: What was changed or given up when loading, one sentence each.
        revision: Counts edits; statistics of an older revision are stale.
    """

    def __init__(self, proto: onnx.ModelProto, path: Path | None = None) -> None:
        self.path = path
        self.notes: list[str] = []
        self.encodings = Encodings()
        self.batch_norms: dict[str, BatchNormStatistics] = {}
        self.revision = 0
        normalize(proto, path)
        self._extras = remember(proto)
        self.graph = gs.import_onnx(proto)
        if not self.graph.nodes:
            raise ModelError("the model has no operators", where=path, fix="export it again")
        if not self.graph.outputs:
            raise ModelError("the model has no outputs", where=path, fix="export it again")
        self._lift_constants()
        self._simplify_tensors()
        self._name_nodes()
        if self._extras.initializer_inputs:
            names = ", ".join(self._extras.initializer_inputs)
            self.notes.append(f"taken as constants, because they have default values: {names}")
        nested = [n.name for n in self.graph.nodes if has_subgraph(n)]
        if nested:
            self.notes.append(f"left alone: the subgraphs of {', '.join(nested)}")

    # ------------------------------------------------------------------ reading

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return int(self.graph.opset)

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs that a caller has to feed."""
        return [t.name for t in self.graph.inputs]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return [t.name for t in self.graph.outputs]

    def is_output(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor is an output of the model."""
        return any(t is tensor for t in self.graph.outputs)

    def is_nested(self, node: gs.Node) -> bool:
        """Whether a node is part of a subgraph: left alone, so that one look is enough."""
        if not hasattr(self, "_nested"):
            graphs = self.graph.subgraphs(recursive=True)
            self._nested = {id(n) for graph in graphs for n in graph.nodes}
        return id(node) in self._nested

    def tensors(self) -> dict[str, gs.Tensor]:
        """Every tensor by name, subgraphs left out."""
        found: dict[str, gs.Tensor] = {t.name: t for t in self.graph.inputs}
        for node in self.graph.nodes:
            for tensor in (*node.inputs, *node.outputs):
                if tensor.name:
                    found[tensor.name] = tensor
        return found

    def layers(self) -> list[Layer]:
        """The layers in graph order: operators that multiply an activation by a constant weight."""
        return [layer for node in self.graph.nodes if (layer := Layer.of(self, node)) is not None]

    def array(self, tensor: gs.Tensor) -> np.ndarray:
        """The value of a constant; 4-bit types unpacked, the graph left as it is.

        Raises:
            ModelError: The tensor is not constant.
        """
        if not isinstance(tensor, gs.Constant):
            raise ModelError("expected a constant", where=f"tensor {tensor.name}")
        values = tensor._values
        if isinstance(values, LazyValues):
            try:
                array: np.ndarray = numpy_helper.to_array(values.tensor)
            except (TypeError, ValueError) as error:
                raise ModelError(
                    "its values do not fit its shape and type",
                    where=f"tensor {tensor.name}",
                    fix="export the model again",
                ) from error
            return array
        return np.asarray(values)

    @property
    def nbytes(self) -> int:
        """Bytes of all constants, as stored."""
        constants = {id(t): t for t in self.tensors().values() if isinstance(t, gs.Constant)}
        return sum(_constant_bytes(t) for t in constants.values())

    # ------------------------------------------------------------------ editing

    def constant(self, name: str, values: np.ndarray) -> gs.Constant:
        """A new constant with a free name made from `name`."""
        return gs.Constant(self.free_name(name), np.asarray(values, order="C"))

    def integers(
        self, name: str, values: np.ndarray, dtype: str, *, packed: bool = False
    ) -> gs.Constant:
        """A new constant of integers with a free name made from `name`.

        Args:
            name: What to call it.
            values: The integers.
            dtype: Their type, a key of `onnxq.encoding.DTYPES`.
            packed: Whether types of 4 bits and fewer take half a byte each (INT4 or UINT4), not
                one.
        """
        bits, signed = DTYPES[dtype]
        if bits > 4 or not packed:
            return self.constant(name, values.astype(in_bytes(dtype)))
        kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
        free, raw = self.free_name(name), pack_nibbles(values).tobytes()
        tensor = onnx.helper.make_tensor(free, kind, values.shape, raw, raw=True)
        return gs.Constant(free, LazyValues(tensor))

    def variable(self, name: str, dtype: Any = np.float32, shape: Any = None) -> gs.Variable:
        """A new tensor with a free name made from `name`."""
        return gs.Variable(self.free_name(name), dtype=dtype, shape=shape)

    def free_name(self, name: str) -> str:
        """`name`, or `name` with a number if a tensor or a node has it already."""
        if not hasattr(self, "_names"):
            self._names = set(self.tensors()) | {n.name for n in self.graph.nodes}
            for graph in self.graph.subgraphs(recursive=True):
                self._names |= set(graph.tensors())
        free, count = name, 0
        while free in self._names:
            count += 1
            free = f"{name}_{count}"
        self._names.add(free)
        return free

    def bypass(self, node: gs.Node) -> None:
        """Remove a node whose first output equals its first input; output names stay."""
        source, result = node.inputs[0], node.outputs[0]
        if self.is_output(result):
            before = source.inputs[0]
            slot = _slot(before.outputs, source)
            readers = list(source.outputs)
            node.inputs.clear()
            node.outputs.clear()
            for reader in readers:
                if reader is not node:
                    rewire(reader, source, result)
            before.outputs[slot] = result
            if source.name in self.batch_norms:
                self.batch_norms[result.name] = self.batch_norms.pop(source.name)
        else:
            for reader in list(result.outputs):
                rewire(reader, result, source)
            node.inputs.clear()
            node.outputs.clear()
        self._drop(node)

    def can_bypass(self, node: gs.Node) -> bool:
        """Whether `bypass` keeps every name: an output cannot become an input or another output."""
        source, result = node.inputs[0], node.outputs[0]
        if not self.is_output(result):
            return True
        return bool(source.inputs) and not self.is_output(source)

    def _drop(self, node: gs.Node) -> None:
        self.graph.nodes[:] = [n for n in self.graph.nodes if n is not node]

    def insert(self, nodes: Sequence[gs.Node]) -> None:
        """Add nodes and bring the graph into topological order."""
        for node in nodes:
            node.name = self.free_name(node.name or node.op)
        self.graph.nodes.extend(nodes)
        self.sort()

    def sort(self) -> None:
        """Bring the nodes into topological order, moving as few as possible."""
        self.graph.nodes[:] = topological(self.graph.nodes)

    def cleanup(self) -> int:
        """Remove nodes that no output needs, subgraphs left alone; returns how many."""
        before = len(self.graph.nodes)
        self.graph.cleanup(recurse_subgraphs=False, recurse_functions=False)
        return before - len(self.graph.nodes)

    def raise_opset(self, version: int) -> None:
        """Convert to a newer operator set where the model is older.

        Raises:
            ModelError: onnx cannot convert an operator.
        """
        if self.opset >= version:
            return
        old = self.opset
        try:
            proto = convert(self.to_proto(), old, version)
        except ModelError as error:
            raise ModelError(error.what, where=self.path, fix=error.fix) from error
        proto.ir_version = max(proto.ir_version, self._extras.ir_version)
        self.__dict__.pop("_names", None)
        self.__dict__.pop("_nested", None)
        encodings, batch_norms = self.encodings, self.batch_norms
        notes, extras = self.notes, self._extras
        self.__init__(proto, self.path)  # type: ignore[misc]
        self.encodings, self.batch_norms = encodings, batch_norms
        self._extras, self.notes = extras, [*notes, f"operator set raised from {old} to {version}"]
        self.revision += 1

    def set_metadata(self, key: str, value: str) -> None:
        """Set one metadata property of the file."""
        self._extras.metadata[key] = value

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata properties of the file (a copy)."""
        return dict(self._extras.metadata)

    def digest(self) -> str:
        """SHA-256 of the model as ONNX, in hexadecimal."""
        proto = self.to_proto()
        sha = hashlib.sha256()
        for tensor in proto.graph.initializer:  # apart, for models that protobuf cannot serialize
            sha.update(tensor.SerializeToString())
        del proto.graph.initializer[:]
        sha.update(proto.SerializeToString(deterministic=True))
        return sha.hexdigest()

    def clone(self) -> Model:
        """An independent copy.  Arrays are shared: passes replace them, never write into them."""
        other = copy.copy(self)
        other.__dict__.pop("_names", None)
        other.__dict__.pop("_nested", None)
        other.graph = self.graph.copy()
        other.graph.import_domains = copy.deepcopy(self.graph.import_domains)
        for node, twin in zip(self.graph.nodes, other.graph.nodes, strict=True):
            twin.domain = node.domain
        other.encodings = self.encodings.copy()
        other.batch_norms = dict(self.batch_norms)
        other.notes = list(self.notes)
        other._extras = copy.deepcopy(self._extras)
        return other

    # ------------------------------------------------------------------ checking and writing

    def check(self) -> None:
        """Check the structure of the graph.

        Raises:
            ModelError: A duplicate name, a tensor without producer, a cycle.
        """
        known = {t.name: t for t in self.graph.inputs}
        for node in self.graph.nodes:
            for tensor in node.inputs:
                if not tensor.name:
                    continue
                if isinstance(tensor, gs.Constant):
                    if known.setdefault(tensor.name, tensor) is not tensor:
                        raise ModelError(f"two tensors are called {tensor.name}", where=node.name)
                    continue
                if known.get(tensor.name) is not tensor:
                    raise ModelError(
                        f"tensor {tensor.name} is read before anything produces it",
                        where=f"node {node.name}",
                    )
            for tensor in node.outputs:
                if tensor.name and tensor.name in known:
                    raise ModelError(f"two tensors are called {tensor.name}", where=node.name)
                known[tensor.name] = tensor
        for tensor in self.graph.outputs:
            if tensor.name not in known and not isinstance(tensor, gs.Constant):
                raise ModelError("nothing produces the output", where=tensor.name)
        seen: set[str] = set()
        for node in self.graph.nodes:
            if node.name in seen:
                raise ModelError(f"two nodes are called {node.name}")
            seen.add(node.name)

    def to_proto(self, extra_outputs: Sequence[str] = ()) -> onnx.ModelProto:
        """The model as ONNX.

        Args:
            extra_outputs: Tensors to add to the outputs, for looking inside.
        """
        proto: onnx.ModelProto = gs.export_onnx(self.graph, do_type_check=False)
        restore(proto, self._extras)
        have = {o.name for o in proto.graph.output}
        for name in extra_outputs:
            if name not in have:
                proto.graph.output.append(onnx.ValueInfoProto(name=name))
                have.add(name)
        return proto

    def infer(self) -> None:
        """Fill in element types and shapes by ONNX shape inference, weights left out for size.

        What onnx cannot infer stays unknown.
        """
        proto = self.to_proto()
        kept, inputs = [], {i.name for i in proto.graph.input}
        for tensor in proto.graph.initializer:
            if np.prod(tensor.dims) <= 64:  # shapes and axes: inference reads these
                kept.append(tensor)
            else:
                info = onnx.helper.make_tensor_value_info(
                    tensor.name, tensor.data_type, list(tensor.dims)
                )
                if tensor.name not in inputs:
                    proto.graph.input.append(info)
        small = [onnx.TensorProto.FromString(t.SerializeToString()) for t in kept]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(small)
        found = inferred(proto)
        if found is None:
            return
        tensors = self.tensors()
        for info in (*found.graph.value_info, *found.graph.output):
            tensor = tensors.get(info.name)
            if isinstance(tensor, gs.Variable) and info.type.HasField("tensor_type"):
                known = OnnxImporter.import_tensor(info)
                tensor.dtype = known.dtype if known.dtype is not None else tensor.dtype
                tensor.shape = known.shape if known.shape is not None else tensor.shape

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model; the file appears whole or not at all.

        Weights go into a second file beside it where the model passes 2 GB.

        Raises:
            ModelError: The graph is not valid ONNX, or the file cannot be written.
        """
        self.check()
        if any(t.shape is None for t in self.graph.outputs):  # onnx.checker wants them
            self.infer()
        write_proto(self.to_proto(), Path(path), protected=external_files(self.path))

    # ------------------------------------------------------------------ loading

    def _lift_constants(self) -> None:
        """Constant nodes become constants, so that passes meet one kind only."""
        kept = []
        for node in self.graph.nodes:
            values = _constant_value(node)
            if values is None or self.is_output(node.outputs[0]):
                kept.append(node)
                continue
            tensor = node.outputs[0]
            node.outputs.clear()
            tensor.to_constant(values)
        self.graph.nodes[:] = kept

    def _simplify_tensors(self) -> None:
        """Bring tensors into forms that graphsurgeon can write."""
        for graph in (self.graph, *self.graph.subgraphs(recursive=True)):
            for tensor in graph.tensors().values():
                if isinstance(tensor, gs.Variable) and tensor.type != "tensor_type":
                    tensor.dtype = tensor.shape = None  # sequences, maps: `restore` knows them
                elif isinstance(tensor, gs.Constant) and isinstance(tensor._values, SparseValues):
                    tensor.values = dense(tensor._values.tensor)
                    self.notes.append(f"sparse weight {tensor.name} is written in full")

    def _name_nodes(self) -> None:
        """Every node gets a name of its own: exclusion, reports and onnxruntime go by names."""
        seen: set[str] = set()
        given = {n.name for n in self.graph.nodes if n.name}
        renamed = 0
        for index, node in enumerate(self.graph.nodes):
            base = node.name or f"{node.op}_{index}"
            name, count = base, 0
            while name in seen or (name in given and name != node.name):
                count += 1
                name = f"{base}_{count}"
            renamed += bool(node.name) and name != node.name
            node.name = name
            seen.add(name)
        if renamed:
            self.notes.append(f"{renamed} nodes shared their name with another and got a number")


def load(path: str | os.PathLike[str] | onnx.ModelProto | Model) -> Model:
    """Read an ONNX model; one of an operator set that onnxruntime has left behind is converted.

    Args:
        path: A file, a ModelProto (copied), or a model (cloned).

    Raises:
        ModelError: The file is missing, broken, empty, refers to weights outside its folder, or
            cannot be converted.
    """
    if isinstance(path, Model):
        return path.clone()
    if isinstance(path, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(path)
        check_well_formed(proto, None)
        if external := external_tensors(proto):
            raise ModelError(
                "the weights of a ModelProto must be inside it",
                where=f"tensor {external[0].name}",
                fix="give the path of the model, or load its external data first",
            )
        model = Model(proto)
    else:
        model = Model(read_proto(Path(path)), Path(path))
    model.raise_opset(LEAST_OPSET)
    return model


def _slot(items: Sequence[gs.Tensor], tensor: gs.Tensor) -> int:
    return next(i for i, t in enumerate(items) if t is tensor)


def _constant_value(node: gs.Node) -> np.ndarray | LazyValues | None:
    if node.op != "Constant" or not is_standard(node):
        return None
    attrs = node.attrs
    if isinstance(attrs.get("value"), gs.Constant):
        return attrs["value"]._values
    for key, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if key in attrs and not isinstance(attrs[key], gs.Node.AttributeRef):
            return np.array(attrs[key], dtype)
    return None


def _constant_bytes(tensor: gs.Constant) -> int:
    values = tensor._values
    if isinstance(values, LazyValues):
        proto = values.tensor
        if isinstance(proto, onnx.TensorProto):
            return stored_bytes(proto)
        return int(values.nbytes)
    return int(np.asarray(values).nbytes)
