"""What a model costs: parameters, bytes, multiply-accumulates (MACs), bit operations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq import ops
from onnxq.errors import ModelError, OnnxqError
from onnxq.inference import inferred
from onnxq.model import Model, is_standard, producer
from onnxq.progress import Progress, Silent
from onnxq.runtime import Session

__all__ = ["LayerCost", "Shapes", "input_shapes", "layer_costs", "tensor_shapes"]

# Tensor name -> its concrete shape; None, or no entry, where it is not known.
Shapes = Mapping[str, tuple[int, ...] | None]

_QDQ = ("QuantizeLinear", "DequantizeLinear")
# What a constant passes on its way to a layer; Cast where 4-bit integers are unpacked.
_CARRIERS = (*_QDQ, "Cast")
# Shape inference reads shapes, axes and the like, never tensors larger than this.
_WEIGHT_SIZE = 64


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Args:
        name: Node name.
        op: Operator type.
        parameters: Values of its constant weight and bias; a shared one counts in each layer.
        nbytes: Their bytes, as stored.
        macs: Multiply-accumulates per sample; None where a shape is not known.
        output_shape: Concrete shape of its output, batch included; None where not known.
        weight_bits: Bits of one weight, or of one value of the second input of a MatMul.
        activation_bits: Bits of one value of the activation that it reads.
    """

    name: str
    op: str
    parameters: int
    nbytes: int
    macs: int | None
    output_shape: tuple[int, ...] | None
    weight_bits: int = 32
    activation_bits: int = 32

    @property
    def bit_operations(self) -> int | None:
        """MACs times the bits of both factors; None where the MACs are not known."""
        return None if self.macs is None else self.macs * self.weight_bits * self.activation_bits

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = dataclasses.asdict(self) | {"bit_operations": self.bit_operations}
        plain["output_shape"] = None if self.output_shape is None else list(self.output_shape)
        return plain


def layer_costs(model: Model, shapes: Shapes, *, batch: int | None = None) -> list[LayerCost]:
    """The cost of every Conv, ConvTranspose, Gemm and MatMul, in graph order.

    Products of two activations are among them.  A ConvTranspose multiplies each of its inputs by
    the whole window, also where padding then cuts the product off.  In a Q/DQ model weights are
    found behind their DequantizeLinear.  Bits come from the model's encodings, from the Q/DQ around
    the layer, or else from its element types.

    Args:
        model: The model; float or Q/DQ.
        shapes: Concrete shapes, as `tensor_shapes` gives them.
        batch: Samples that the shapes hold; None: the size of the first axis that all inputs share,
            1 if they share none.
    """
    known = _spread(model, shapes)
    batch = _batch(model, known) if batch is None else batch
    return [_cost(model, node, known, batch) for node in mac_nodes(model)]


def mac_nodes(model: Model) -> list[gs.Node]:
    """The nodes that carry the MACs, in graph order; subgraphs left out."""
    return [n for n in model.graph.nodes if factors(n) is not None]


def factors(node: gs.Node) -> tuple[str, gs.Tensor, gs.Tensor] | None:
    """The layer that a node is, and the two tensors that it multiplies; None if it is none.

    Integer operators and those of onnxruntime count as the layer that they are a form of.
    """
    if node.op in ops.LAYERS and is_standard(node):
        return str(node.op), node.inputs[0], node.inputs[1]
    if node.op in ops.PRODUCTS:
        layer, left, right = ops.PRODUCTS[node.op]
        return layer, node.inputs[left], node.inputs[right]
    return None


def _cost(model: Model, node: gs.Node, known: Shapes, batch: int) -> LayerCost:
    found = factors(node)
    assert found is not None
    layer, *pair = found
    bias = ops.LAYERS[layer].bias
    third = node.inputs[bias : bias + 1] if node.op in ops.LAYERS and bias is not None else []
    constants = [c for t in (*pair, *third) if (c := _constant(t)) is not None]
    total = _macs(node, layer, [_shape(t, known) for t in (*pair, node.outputs[0])])
    left, right = (_constant(t) is not None for t in pair)
    weight = 0 if left and not right else 1
    return LayerCost(
        name=node.name,
        op=node.op,
        parameters=sum(math.prod(c.shape) for c in constants),
        nbytes=sum((math.prod(c.shape) * _stored_bits(c.dtype) + 7) // 8 for c in constants),
        macs=None if total is None else total // batch,
        output_shape=_shape(node.outputs[0], known),
        weight_bits=_bits(model, node, pair[weight]),
        activation_bits=_bits(model, node, pair[1 - weight]),
    )


def _macs(node: gs.Node, layer: str, shapes: Sequence[tuple[int, ...] | None]) -> int | None:
    left, right, out = shapes
    if layer == "ConvTranspose":
        return None if left is None or right is None else math.prod(left) * math.prod(right[1:])
    if out is None:
        return None
    if layer == "Conv":
        return None if right is None else math.prod(out) * math.prod(right[1:])
    if node.op == "MatMulNBits":
        return math.prod(out) * int(node.attrs["K"])
    # the axis that is summed over, from whichever side is known
    if left is not None:
        return math.prod(out) * left[0 if node.attrs.get("transA", 0) else -1]
    if right is not None:
        last = len(right) == 1 or node.attrs.get("transB", 0)
        return math.prod(out) * right[-1 if last else -2]
    return None


def _bits(model: Model, node: gs.Node, tensor: gs.Tensor) -> int:
    before = producer(tensor)
    if before is not None and before.op == "DequantizeLinear":
        unpacked = producer(before.inputs[0])
        if unpacked is not None and unpacked.op == "Cast":
            return _stored_bits(unpacked.inputs[0].dtype)
        return _stored_bits(dequantized_type(before))
    if tensor.name in model.encodings and node.name not in model.encodings.float_nodes:
        return model.encodings[tensor.name].bits
    if node.op in ops.PRODUCTS:
        if isinstance(tensor, gs.Constant) and "bits" in node.attrs:
            return int(node.attrs["bits"])
        floats = node.op.startswith("Fused") or node.op == "MatMulNBits"
        return 32 if floats else 8
    # all of them have one element type, where it is known
    types = [t.dtype for t in (*node.inputs[:2], node.outputs[0]) if t.dtype is not None]
    return _stored_bits(types[0]) if types else 32


def _factors(node: gs.Node) -> Sequence[gs.Tensor]:
    found = factors(node)
    return () if found is None else found[1:]


def dequantized_type(node: gs.Node) -> Any:
    """The element type that a DequantizeLinear reads."""
    for tensor in (node.inputs[0], *node.inputs[2:]):
        if tensor.dtype is not None:
            return tensor.dtype
    return np.dtype(np.uint8)  # what QuantizeLinear writes without a zero point


def element_type(dtype: Any) -> str:
    """The name of a numpy or ONNX element type, such as int4."""
    return str(_numpy_type(dtype).name)


def _numpy_type(dtype: Any) -> np.dtype:
    return np.dtype(
        onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else dtype
    )


def _stored_bits(dtype: Any) -> int:
    """Bits of one value of a numpy or ONNX element type."""
    name = element_type(dtype)
    for bits in (2, 4):  # these have storage of a byte in numpy, and are packed in ONNX
        if name in (f"int{bits}", f"uint{bits}") or name.startswith(f"float{bits}_"):
            return bits
    return 8 * _numpy_type(dtype).itemsize


def _constant(tensor: gs.Tensor) -> gs.Constant | None:
    """The constant that a tensor is, possibly behind Q/DQ or unpacked."""
    while not isinstance(tensor, gs.Constant):
        node = producer(tensor)
        if node is None or node.op not in _CARRIERS:
            return None
        tensor = node.inputs[0]
    return tensor


# ---------------------------------------------------------------------- shapes


def tensor_shapes(
    model: Model,
    given: Mapping[str, np.ndarray | Sequence[int]] | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, tuple[int, ...] | None]:
    """Concrete shapes of tensors: those of all layers, and of others where they come for free.

    First by ONNX shape inference.  Where that leaves shapes of layers open, the model runs once:
    on what is given, zeros for the rest.

    Args:
        model: The model.
        given: Input name -> an array (a feed) or a shape; what is left open counts as 1.
        progress: Told which shapes stay unknown, and why.

    Returns:
        Tensor name -> shape; None for a tensor of a layer whose shape stays unknown, because the
        model cannot run on zeros.

    Raises:
        ModelError: `given` does not fit the inputs, or the model failed on a whole feed.
        CalibrationError: A whole feed that does not fit the model.
    """
    given = dict(given or {})
    shapes: dict[str, tuple[int, ...] | None] = dict(input_shapes(model, given))
    shapes |= _inferred(model, shapes)
    missing = {
        t.name: None
        for node in mac_nodes(model)
        for t in (*_factors(node), node.outputs[0])
        if not isinstance(t, gs.Constant) and t.name not in shapes
    }
    if not missing:
        return shapes
    try:
        shapes |= _measured(model, [n for n in missing if n not in model.inputs], given, shapes)
    except OnnxqError as error:
        if all(isinstance(given.get(name), np.ndarray) for name in model.inputs):
            raise  # a feed of the user's own, no guess
        shapes |= missing
        (progress or Silent()).say(
            f"the shapes of {len(missing)} tensors stay unknown: the model does not run on zeros:"
            f" {error}"
        )
    return shapes


def input_shapes(
    model: Model, given: Mapping[str, np.ndarray | Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs whose rank is known, those given checked against the model.

    Raises:
        ModelError: `given` does not fit the inputs.
    """
    for name in given:
        if name not in model.inputs:
            raise ModelError(f"no input {name!r}", fix=f"inputs are {', '.join(model.inputs)}")
    shapes = {}
    for tensor in model.graph.inputs:
        wanted = tensor.shape
        if tensor.name in given:
            value = given[tensor.name]
            shape = value.shape if isinstance(value, np.ndarray) else tuple(value)
            fits = wanted is None or (
                len(shape) == len(wanted)
                and all(
                    g >= 0 and (w == g or not isinstance(w, int))
                    for w, g in zip(wanted, shape, strict=True)
                )
            )
            if not fits:
                says = " x ".join(str(d) for d in wanted) or "a scalar"
                got = " x ".join(map(str, shape)) or "a scalar"
                raise ModelError(f"input {tensor.name}: wanted {says}, got {got}")
            shapes[tensor.name] = shape
        elif wanted is not None:
            shapes[tensor.name] = tuple(d if isinstance(d, int) and d >= 0 else 1 for d in wanted)
    return shapes


def _inferred(model: Model, inputs: Shapes) -> dict[str, tuple[int, ...]]:
    proto = model.to_proto()
    graph = proto.graph
    _drop_weights(graph)
    del graph.value_info[:]  # of other sizes, perhaps
    for info in graph.output:
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    for info in graph.input:
        shape = inputs.get(info.name)
        if shape is not None:
            info.type.tensor_type.shape.ClearField("dim")
            for size in shape:
                info.type.tensor_type.shape.dim.add().dim_value = size
    known = inferred(proto)
    if known is None:
        return {}
    found = {}
    for info in (*known.graph.value_info, *known.graph.output):
        kind = info.type.tensor_type
        sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
        if (
            info.type.HasField("tensor_type")
            and kind.HasField("shape")
            and min(sizes, default=0) >= 0
        ):
            found[info.name] = tuple(sizes)
    return found


def _drop_weights(graph: onnx.GraphProto) -> None:
    """Large constants become inputs: 2 GB are the limit, and inference needs only their shapes."""
    inputs = {i.name for i in graph.input}
    kept = []
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _WEIGHT_SIZE:
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            kept.append(copy)
        elif tensor.name not in inputs:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            graph.input.append(info)
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _measured(
    model: Model,
    names: list[str],
    given: Mapping[str, np.ndarray | Sequence[int]],
    shapes: Shapes,
) -> dict[str, tuple[int, ...] | None]:
    session = Session(model.to_proto(), outputs=names, threads=1, level="disabled")
    feed = {}
    for spec in session.inputs:
        value, shape = given.get(spec.name), shapes.get(spec.name)
        if isinstance(value, np.ndarray):
            feed[spec.name] = value
        elif spec.dtype is None or shape is None:
            raise ModelError(f"no zeros can be made for input {spec.name}")
        else:
            feed[spec.name] = np.zeros(shape, spec.dtype)
    found = session.run_shared(feed)
    return {name: found[name].shape if name in found else None for name in names}


def _spread(model: Model, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes, taken along Q, DQ and activations to tensors that are not among them."""
    known = {name: shape for name, shape in shapes.items() if shape is not None}
    same = [
        (node.inputs[0], node.outputs[0])
        for node in model.graph.nodes
        if node.op in _QDQ or node.op in ops.ACTIVATIONS
    ]
    for before, after in same:
        if (shape := _shape(before, known)) is not None:
            known.setdefault(after.name, shape)
    for before, after in reversed(same):
        if after.name in known:
            known.setdefault(before.name, known[after.name])
    return known


def _shape(tensor: gs.Tensor, known: Shapes) -> tuple[int, ...] | None:
    if isinstance(tensor, gs.Constant):
        return tuple(tensor.shape)
    return known.get(tensor.name)


def _batch(model: Model, known: Shapes) -> int:
    """The size of the first axis that all inputs share."""
    shapes = [known.get(name) for name in model.inputs]
    sizes = {shape[0] for shape in shapes if shape}
    return next(iter(sizes)) or 1 if len(sizes) == 1 else 1
