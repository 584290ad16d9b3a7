"""Model and Layer: an onnx-graphsurgeon graph, and all that graphsurgeon drops or breaks."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.util.misc import SynchronizedList

from onnxq import ops
from onnxq.encoding import Encodings
from onnxq.errors import ModelError, UnsupportedError
from onnxq.model_io import (
    external_files,
    external_tensors,
    read_proto,
    stored_bytes,
    write_proto,
)

__all__ = ["BatchNormStatistics", "Layer", "Model", "load"]

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


@dataclass(frozen=True)
class BatchNormStatistics:
    """What a folded BatchNormalization knew: each channel is about N(beta, gamma^2).

    Args:
        gamma: Standard deviation per channel after the normalization, shape [C] (its scale).
        beta: Mean per channel after the normalization, shape [C] (its bias).
    """

    gamma: np.ndarray
    beta: np.ndarray


@dataclass
class _Extras:
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
        _normalize(proto, path)
        self._extras = _remember(proto)
        self.graph = gs.import_onnx(proto)
        if not self.graph.nodes:
            raise ModelError("the model has no operators", where=path)
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
                    "its values do not fit its shape and type", where=f"tensor {tensor.name}"
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
            producer = source.inputs[0]
            slot = _slot(producer.outputs, source)
            readers = list(source.outputs)
            node.inputs.clear()
            node.outputs.clear()
            for reader in readers:
                if reader is not node:
                    rewire(reader, source, result)
            producer.outputs[slot] = result
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
        """Bring the nodes into topological order, in linear time and as little as possible."""
        place = {id(n): i for i, n in enumerate(self.graph.nodes)}
        order: list[gs.Node] = []
        state: dict[int, int] = {}
        for root in self.graph.nodes:
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
        self.graph.nodes[:] = order

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
        old, given = self.opset, self.to_proto()
        try:
            proto = onnx.version_converter.convert_version(given, version)
        except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
            raise ModelError(
                f"cannot convert operator set {old} to {version}: {error}",
                where=self.path,
                fix=f"export the model with opset {version} or newer",
            ) from error
        proto.ir_version = max(proto.ir_version, self._extras.ir_version)
        if not proto.functions:  # the converter drops them; they import operator sets of their own
            proto.functions.extend(given.functions)
        self.__dict__.pop("_names", None)
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
        _restore(proto, self._extras)
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
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            return
        tensors = self.tensors()
        for info in (*inferred.graph.value_info, *inferred.graph.output):
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
                    tensor.dtype = tensor.shape = None  # sequences, maps: `_restore` knows them
                elif isinstance(tensor, gs.Constant) and isinstance(tensor._values, SparseValues):
                    tensor.values = _dense(tensor._values.tensor)
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


@dataclass(frozen=True, eq=False)
class Layer:
    """One operator with a constant weight: Conv, ConvTranspose, Gemm or MatMul.

    Args:
        model: The model that holds it.
        node: Its node.
        side: Input index of the weight.
    """

    model: Model
    node: gs.Node
    side: int

    @classmethod
    def of(cls, model: Model, node: gs.Node) -> Layer | None:
        """The layer that a node is; None if it is none."""
        spec = ops.LAYERS.get(node.op)
        if spec is None or node.domain not in (None, "", "ai.onnx") or len(node.inputs) < 2:
            return None
        side = spec.weight
        if node.op in ("MatMul", "Gemm"):
            left, right = (isinstance(t, gs.Constant) for t in node.inputs[:2])
            side = ops.matmul_weight((left, right))
            if side < 0 or (left and right):
                return None
        elif not isinstance(node.inputs[side], gs.Constant):
            return None
        return cls(model, node, side)

    @property
    def name(self) -> str:
        """The node's name."""
        return str(self.node.name)

    @property
    def op(self) -> str:
        """The operator type."""
        return str(self.node.op)

    @property
    def x(self) -> gs.Tensor:
        """The activation that it reads."""
        return self.node.inputs[1 - self.side]

    @property
    def y(self) -> gs.Tensor:
        """Its output."""
        return self.node.outputs[0]

    @property
    def result(self) -> gs.Tensor:
        """Its output, or that of the only Relu or Clip after it."""
        readers = self.y.outputs
        if len(readers) == 1 and readers[0].op in ops.ACTIVATIONS:
            return self.y if self.model.is_output(self.y) else readers[0].outputs[0]
        return self.y

    @property
    def weight(self) -> np.ndarray:
        """The weight as it is stored."""
        return self.model.array(self.node.inputs[self.side])

    @property
    def weight_tensor(self) -> gs.Constant:
        """The constant that holds the weight."""
        return self.node.inputs[self.side]

    @property
    def group(self) -> int:
        """Groups of a convolution; 1 elsewhere."""
        return int(self.node.attrs.get("group", 1)) if "Conv" in self.op else 1

    @property
    def channel_axis(self) -> int:
        """The axis of the weight along which one scale per output channel runs."""
        shape = tuple(self.weight_tensor.shape)
        return ops.channel_axis(self.op, self.node.attrs, shape, self.side)

    @property
    def bias_tensor(self) -> gs.Tensor | None:
        """The bias input; None where there is none."""
        index = ops.bias_input(self.op)
        if index is None or len(self.node.inputs) <= index or not self.node.inputs[index].name:
            return None
        return self.node.inputs[index]

    @property
    def bias(self) -> np.ndarray | None:
        """The constant bias; None where there is none or it is computed."""
        tensor = self.bias_tensor
        return self.model.array(tensor) if isinstance(tensor, gs.Constant) else None

    @property
    def owns_params(self) -> bool:
        """Whether no other node reads the weight or the bias."""
        tensors = [self.weight_tensor, self.bias_tensor]
        return all(len(t.outputs) == 1 for t in tensors if isinstance(t, gs.Constant))

    def set_weight(self, values: np.ndarray) -> None:
        """Give this layer a new weight; other readers of the old one keep it."""
        self.node.inputs[self.side] = self._replacement(self.weight_tensor, values)

    def set_bias(self, values: np.ndarray) -> None:
        """Give this layer a new constant bias; other readers of the old one keep it.

        Raises:
            ModelError: The operator takes no bias.
        """
        index = ops.bias_input(self.op)
        if index is None:
            raise ModelError(f"{self.op} takes no bias", where=f"node {self.name}")
        old = self.bias_tensor
        if isinstance(old, gs.Constant):
            self.node.inputs[index] = self._replacement(old, values)
            return
        while len(self.node.inputs) < index:
            self.node.inputs.append(gs.Variable.empty())
        new = self.model.constant(f"{self.name}.bias", values)
        if len(self.node.inputs) == index:
            self.node.inputs.append(new)
        else:
            self.node.inputs[index] = new

    def _replacement(self, old: gs.Tensor, values: np.ndarray) -> gs.Constant:
        if len(old.outputs) > 1 or self.model.is_output(old):
            return self.model.constant(f"{old.name}.{self.name}", values)
        return gs.Constant(old.name, np.asarray(values, order="C"))


def load(path: str | os.PathLike[str] | onnx.ModelProto | Model) -> Model:
    """Read an ONNX model.

    Args:
        path: A file, a ModelProto (copied), or a model (cloned).

    Raises:
        ModelError: The file is missing, broken, empty, or refers to weights outside its folder.
    """
    if isinstance(path, Model):
        return path.clone()
    if isinstance(path, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(path)
        if external := external_tensors(proto):
            raise ModelError(
                "the weights of a ModelProto must be inside it",
                where=f"tensor {external[0].name}",
                fix="give the path of the model, or load its external data first",
            )
        return Model(proto)
    return Model(read_proto(Path(path)), Path(path))


# ---------------------------------------------------------------------- graph helpers


def rewire(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Make every input of `node` that is `old` read `new`."""
    for index, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[index] = new


def has_subgraph(node: gs.Node) -> bool:
    """Whether the node holds a subgraph (If, Loop, Scan)."""
    return any(isinstance(value, gs.Graph) for value in node.attrs.values())


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that produces the tensor; None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def consumers(tensor: gs.Tensor) -> list[gs.Node]:
    """The nodes that read the tensor, each once."""
    seen: dict[int, gs.Node] = {id(n): n for n in tensor.outputs}
    return list(seen.values())


def _slot(items: Sequence[gs.Tensor], tensor: gs.Tensor) -> int:
    return next(i for i, t in enumerate(items) if t is tensor)


def _producers(node: gs.Node) -> Iterator[gs.Node]:
    for tensor in node.inputs:
        yield from tensor.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                yield from _producers(inner)


def _constant_value(node: gs.Node) -> np.ndarray | LazyValues | None:
    if node.op != "Constant" or node.domain not in (None, "", "ai.onnx"):
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


def _normalize(proto: onnx.ModelProto, path: Path | None) -> None:
    """Write the standard domain as "", and refuse attributes that graphsurgeon would lose."""
    for opset in proto.opset_import:
        opset.domain = "" if opset.domain == "ai.onnx" else opset.domain
    for graph in _graphs(proto.graph):
        for node in graph.node:
            if node.domain == "ai.onnx":
                node.domain = ""
            for attribute in node.attribute:
                if attribute.type in _LOST:
                    kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
                    raise UnsupportedError(
                        f"attribute {attribute.name} of {node.op_type} {node.name} is a {kind}",
                        where=path,
                        fix="export the model without it",
                    )


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and its subgraphs at all depths."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _write_once(graph: onnx.GraphProto, shared: set[str]) -> None:
    """Move constants of the main graph, which graphsurgeon copies into subgraphs, back to it."""
    main = {t.name: t for t in graph.initializer}
    for inner in _graphs(graph):
        for index in reversed(range(len(inner.initializer) if inner is not graph else 0)):
            tensor = inner.initializer[index]
            if tensor.name in shared and tensor.name not in main:
                graph.initializer.append(tensor)
                main[tensor.name] = graph.initializer[-1]
            if tensor.name in shared and main[tensor.name] == tensor:
                del inner.initializer[index]


def _dense(sparse: onnx.SparseTensorProto) -> np.ndarray:
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


# graphsurgeon leaves them out with no more than a line in the log
_LOST = {
    getattr(onnx.AttributeProto, kind + plural)
    for kind in ("SPARSE_TENSOR", "TYPE_PROTO", "TENSOR", "GRAPH")
    for plural in ("", "S")
} - {onnx.AttributeProto.TENSOR, onnx.AttributeProto.GRAPH}


def _remember(proto: onnx.ModelProto) -> _Extras:
    # Before IR 4 every initializer had to be an input, too: that says nothing about the model.
    constants = {t.name for t in proto.graph.initializer if proto.ir_version >= 4}
    return _Extras(
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


def _restore(proto: onnx.ModelProto, extras: _Extras) -> None:
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


def _ir_version(opset: int) -> int:
    table: dict[tuple[str, int], int] = onnx.helper.OP_SET_ID_VERSION_MAP
    newest = max(v for (domain, _), v in table.items() if domain == "ai.onnx")
    return table.get(("ai.onnx", opset), newest)
