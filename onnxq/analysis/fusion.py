"""Which layers of a Q/DQ model run in integers, read off the graph that onnxruntime really runs.

For what is not here to be run, the target's contract has to do.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.analysis.cost import (
    Shapes,
    dequantized_type,
    element_type,
    layer_costs,
    mac_nodes,
    tensor_shapes,
)
from onnxq.model import Model, consumers, load, producer
from onnxq.runtime import Session
from onnxq.scratch import Scratch
from onnxq.targets import TARGETS, Target

__all__ = [
    "Fusion",
    "LayerFusion",
    "Optimized",
    "integer_share",
    "optimized_graph",
    "written_share",
]

_TARGET = TARGETS["ort-cpu"]
# Operators of onnxruntime that multiply integers.
_INTEGER = {
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}
# Those that multiply floats; the weights of the last may be integers, but not the activations.
_FLOAT = {*ops.LAYERS, "FusedConv", "FusedGemm", "FusedMatMul", "MatMulNBits"}
_MACS = _INTEGER | _FLOAT
_QDQ = ("QuantizeLinear", "DequantizeLinear")
# What a layer before it may take over, so that its own output is gone from the optimized graph.
_ABSORBED = {*_QDQ, *ops.ACTIVATIONS, "Add", "BatchNormalization", "LeakyRelu", "Mul", "Sigmoid"}


@dataclass(frozen=True)
class LayerFusion:
    """How onnxruntime runs one layer.

    Args:
        name: Node name.
        op: Operator type.
        macs: Multiply-accumulates per sample; None where a shape is not known.
        integer: Whether it runs in integers.
        kernel: The operator that onnxruntime runs in its place; empty if none was found.
        reason: Why it does not run in integers; empty if it does.
    """

    name: str
    op: str
    macs: int | None
    integer: bool
    kernel: str
    reason: str


@dataclass(frozen=True)
class Fusion:
    """How onnxruntime runs a model.

    Layers whose MACs are not known count in no sum of MACs.

    Args:
        layers: Every Conv, ConvTranspose, Gemm and MatMul, in graph order; subgraphs left out.
        operators: Operator type -> nodes in onnxruntime's optimized graph, or as written.
        target: By whose contract the model was looked at; None if onnxruntime's graph was.
    """

    layers: list[LayerFusion]
    operators: dict[str, int]
    target: Target | None = None

    @property
    def macs(self) -> int:
        """MACs of all layers, per sample."""
        return sum(n.macs or 0 for n in self.layers)

    @property
    def integer_macs(self) -> int:
        """MACs of the layers that run in integers, per sample."""
        return sum(n.macs or 0 for n in self.layers if n.integer)

    @property
    def possible_macs(self) -> int:
        """MACs of the layers whose operator has an integer kernel, per sample."""
        return sum(n.macs or 0 for n in self.layers if _possible(n.op, self.target))

    @property
    def share(self) -> float:
        """Share of all MACs that are in integers; 0 if there are none."""
        return self.integer_macs / self.macs if self.macs else 0.0

    @property
    def share_of_possible(self) -> float:
        """Share of the possible MACs that are in integers; 0 if there are none."""
        return self.integer_macs / self.possible_macs if self.possible_macs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "measured": self.target is None,
            "macs": self.macs,
            "integer_macs": self.integer_macs,
            "possible_macs": self.possible_macs,
            "share": self.share,
            "share_of_possible": self.share_of_possible,
            "integer_layers": sum(n.integer for n in self.layers),
            "float_layers": sum(not n.integer for n in self.layers),
            "quantize_nodes": self.operators.get("QuantizeLinear", 0),
            "dequantize_nodes": self.operators.get("DequantizeLinear", 0),
            "operators": self.operators,
            "layers": [dataclasses.asdict(n) for n in self.layers],
        }


def integer_share(
    model: Model | onnx.ModelProto, shapes: Shapes | None = None, *, arm: bool = False
) -> Fusion:
    """Which layers run in integers on onnxruntime's CPU provider, and why the others do not.

    Args:
        model: A Q/DQ model, as any tool writes it.
        shapes: Concrete shapes, as `tensor_shapes` gives them for this model or for its float
            version; None, and for shapes that are missing: sizes that are open count as 1.
        arm: Keep int8 activations, as onnxruntime does on ARM; on x64 it turns them into uint8.

    Raises:
        ModelError: onnxruntime cannot load the model.
    """
    model = model if isinstance(model, Model) else load(model)
    optimized = Optimized(optimized_graph(model, arm=arm))
    costs = _costs(model, shapes)
    layers = []
    for node in mac_nodes(model):
        found = optimized.find(node)
        kernel = "" if found is None else found.op_type
        integer = kernel in _INTEGER
        reason = "" if integer else _reason(model, node, kernel)
        layers.append(LayerFusion(node.name, node.op, costs[node.name], integer, kernel, reason))
    return Fusion(layers, dict(Counter(n.op_type for n in optimized.nodes).most_common()))


def written_share(model: Model, target: Target, shapes: Shapes | None = None) -> Fusion:
    """Which layers are written in integers that a target executes by its contract.

    Args:
        model: A Q/DQ model.
        target: What is to run it.
        shapes: Concrete shapes, as of `integer_share`.
    """
    costs = _costs(model, shapes)
    layers = []
    for node in mac_nodes(model):
        reason = _unwritten(model, node, target)
        kernel = node.op if reason else f"integer {node.op}"
        layers.append(LayerFusion(node.name, node.op, costs[node.name], not reason, kernel, reason))
    return Fusion(layers, dict(Counter(n.op for n in model.graph.nodes).most_common()), target)


def _unwritten(model: Model, node: gs.Node, target: Target) -> str:
    """Why a layer is not in integers by the contract; empty if it is."""
    if not _possible(node.op, target):
        return f"{target.name} has no integer {node.op}"
    if node.name in model.encodings.float_nodes:
        return f"left in float: {model.encodings.float_nodes[node.name]}"
    types = [_integer_type(t) for t in node.inputs[:2]]
    for tensor, kind in zip(node.inputs, types, strict=False):
        if kind is None:
            return f"its input {tensor.name} is not quantized"
    if tuple(types) not in target.pairs:
        return f"{target.name} has no integer {node.op} of {types[0]} and {types[1]}"
    return ""


def _costs(model: Model, shapes: Shapes | None) -> dict[str, int | None]:
    """MACs of each layer."""
    costs = {c.name: c.macs for c in layer_costs(model, shapes or {})}
    if None in costs.values():
        known = {n: s for n, s in (shapes or {}).items() if s is not None}
        inputs = {name: known[name] for name in model.inputs if name in known}
        costs = {
            c.name: c.macs for c in layer_costs(model, {**tensor_shapes(model, inputs), **known})
        }
    return costs


def _possible(op: str, target: Target | None = None) -> bool:
    operator = ops.PRODUCTS[op][0] if op in ops.PRODUCTS else op
    kernel = (target or _TARGET).kernels.get(operator)
    return kernel is not None and kernel.role == "layer"


def optimized_graph(model: Model, *, arm: bool = False) -> onnx.GraphProto:
    """The graph that onnxruntime runs, without its weights."""
    with Scratch() as folder:
        path = folder / "optimized.onnx"
        config = {
            "session.optimized_model_external_initializers_file_name": "weights",
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        }
        if arm:
            config["session.qdqisint8allowed"] = "1"
        # level all would add layouts of this very processor, and Transposes around them
        Session(model.to_proto(), threads=1, level="extended", optimized_path=path, config=config)
        return onnx.load(path, load_external_data=False).graph


class Optimized:
    """Onnxruntime's graph, searched for what became of a layer.

    Most fusions keep the name of the layer.  Those that make up a new one keep the tensor after
    what they took over, or at least the weight.

    Args:
        graph: The graph, as `optimized_graph` gives it.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes: list[onnx.NodeProto] = list(graph.node)
        self._producers: dict[str, onnx.NodeProto] = {
            name: n for n in self.nodes for name in n.output if name
        }
        self._names: dict[str, onnx.NodeProto] = {}
        self._weights: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            if node.op_type in _MACS:
                self._names[node.name] = node
                for name in node.input:
                    self._weights.setdefault(self._source(name), []).append(node)

    def find(self, layer: gs.Node) -> onnx.NodeProto | None:
        """The node that computes the layer; None if it is not to be found."""
        if layer.name in self._names:
            return self._names[layer.name]
        node: onnx.NodeProto | None
        for name in _results(layer):
            node = self._producers.get(name)
            if node is not None and node.op_type == "DequantizeLinear":
                node = self._producers.get(node.input[0])
            if node is not None and node.op_type in _MACS:
                return node
        for tensor in layer.inputs[:2]:
            source = _source(tensor)
            readers = self._weights.get(source.name, [])
            if _is_constant(source) and len(readers) == 1:
                return readers[0]
        return None

    def _source(self, name: str) -> str:
        """The tensor before the Q and DQ that lead to this one."""
        while (node := self._producers.get(name)) is not None and node.op_type in _QDQ:
            name = node.input[0]
        return name


def _source(tensor: gs.Tensor) -> gs.Tensor:
    while (node := producer(tensor)) is not None and node.op in _QDQ:
        tensor = node.inputs[0]
    return tensor


def _is_constant(tensor: gs.Tensor) -> bool:
    """Whether onnxruntime has the tensor as a constant, as it has what a Cast makes of one."""
    node = producer(tensor)
    unpacked = node is not None and node.op == "Cast" and isinstance(node.inputs[0], gs.Constant)
    return unpacked or isinstance(tensor, gs.Constant)


def _results(node: gs.Node) -> Iterator[str]:
    """The output of a layer, then the tensors after what the layer may take over."""
    tensor = node.outputs[0]
    while True:
        yield tensor.name
        readers = consumers(tensor)
        if len(readers) != 1 or readers[0].op not in _ABSORBED:
            return
        tensor = readers[0].outputs[0]


def _reason(model: Model, node: gs.Node, kernel: str) -> str:
    """Why a layer does not run in integers: the first of these that is true."""
    if not _possible(node.op):
        return f"onnxruntime has no integer {node.op}"
    if node.name in model.encodings.float_nodes:
        return f"left in float: {model.encodings.float_nodes[node.name]}"
    if kernel == "MatMulNBits":
        return "only its weight is in integers (MatMulNBits)"
    types = [_integer_type(t) for t in node.inputs[:2]]
    for tensor, kind in zip(node.inputs, types, strict=False):
        # a constant may be float: onnxruntime quantizes it
        if kind is None and not isinstance(tensor, gs.Constant):
            return f"its input {tensor.name} is not quantized"
    if None not in types and tuple(types) not in _TARGET.pairs:
        return f"onnxruntime has no integer {node.op} of {types[0]} and {types[1]}"
    if not _TARGET.kernels[node.op].float_output and (why := _read_in_float(model, node)):
        return why
    if not kernel:
        return "not found in onnxruntime's optimized graph"
    if kernel != node.op:
        return f"onnxruntime makes a float {kernel} of it and of what follows"
    return "Q/DQ around it did not fuse"


def _read_in_float(model: Model, node: gs.Node) -> str:
    """Why the result of a layer, or of the activation after it, is needed in float; or empty."""
    result = node.outputs[0]
    readers = consumers(result)
    if len(readers) == 1 and readers[0].op in ops.ACTIVATIONS and not model.is_output(result):
        result = readers[0].outputs[0]
        readers = consumers(result)
    if model.is_output(result):
        return "its result is an output of the model"
    floats = [n.name for n in readers if n.op != "QuantizeLinear"]
    return f"{floats[0]} reads its result in float" if floats else ""


def _integer_type(tensor: gs.Tensor) -> str | None:
    """The element type that a tensor is dequantized from; None if it is not."""
    before = producer(tensor)
    if before is None or before.op != "DequantizeLinear":
        return None
    return element_type(dequantized_type(before))
