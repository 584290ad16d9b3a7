"""The float model and the encodings that a Q/DQ model is made of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.encoding import DTYPES, Encoding, Encodings
from onnxq.errors import ModelError, UnsupportedError
from onnxq.fitting import share_moves
from onnxq.model import Layer, Model, consumers, producer
from onnxq.placement import data_inputs, integer_nodes
from onnxq.simulation import encoding_of
from onnxq.targets import Kernel, Target, target_named

__all__ = ["unquantized"]

# How onnxruntime.quantization and onnxq call the integers of a weight.
_SUFFIX = "_quantized"
# Scales that were one differ by no more once they were divided by others and multiplied again.
ROUNDING = 2.5e-7


def unquantized(model: Model, target: str | Target = "ort-cpu") -> tuple[Model, Encodings]:
    """A Q/DQ model without its QuantizeLinear and DequantizeLinear, and what they said.

    Integer weights become the floats that they stand for, under the name that they had before
    ``_quantized``; int32 biases become floats without an encoding.  Inputs and outputs keep their
    names.  Where the result of a convolution has scales per channel, these are taken out of its
    weight again::

        W / s -> Conv -> Q(1) -> DQ(s)     =>     W -> Conv

    Args:
        model: The Q/DQ model, of any program; left alone.
        target: What it runs on: nodes of which an input is no DequantizeLinear there stay in float.

    Raises:
        ModelError: It has no QuantizeLinear or DequantizeLinear.
        UnsupportedError: Integers that are computed with otherwise than moved or clipped.
    """
    copy = model.clone()
    found = Encodings()
    nodes = [n for n in copy.graph.nodes if n.op == "DequantizeLinear"]
    if not nodes:
        raise ModelError(
            "the model has no DequantizeLinear", where=model.path, fix="give a Q/DQ model"
        )
    kernels = target_named(target).kernels
    floats = {
        n.name for n in copy.graph.nodes if n.op in kernels and _reads_floats(n, kernels[n.op])
    }
    weights: dict[int, gs.Constant] = {}
    for node in nodes:
        if _stored(node) is not None:
            _constant(copy, node, found, weights)
    ends: _Ends = {}
    for node in nodes:
        if _stored(node) is None:
            encoding = encoding_of(copy, node)
            last = _unflattened(copy, node)
            source = _source(copy, node, encoding, ends)
            end = _bypass(copy, last, source)
            ends[id(source)] = end, encoding
    copy.cleanup()
    for end, encoding in ends.values():
        found[end.name] = encoding
    _take_out_scales(copy, found)
    _rename(copy, found)
    copy.check()
    copy.encodings = found.copy()
    share_moves(copy, copy.encodings, target_named(target))
    for name in integer_nodes(copy, target_named(target)).keys() & floats:
        found.float_nodes[name] = "it reads floats in the Q/DQ model"
    copy.encodings = Encodings()
    return copy, found


def _reads_floats(node: gs.Node, kernel: Kernel) -> bool:
    """Whether something that a node computes on is no integers."""
    sources = [producer(t) for t in data_inputs(node, kernel) if t.name]
    return any(
        s is None or s.op not in ("DequantizeLinear", "QuantizeLinear", "Pad") for s in sources
    )


def _stored(node: gs.Node) -> gs.Constant | None:
    """The integers that a node dequantizes, if they are constant, packed or not."""
    tensor = node.inputs[0]
    before = producer(tensor)
    if before is not None and before.op == "Cast":
        tensor = before.inputs[0]
    return tensor if isinstance(tensor, gs.Constant) else None


def _constant(model: Model, node: gs.Node, found: Encodings, known: dict[int, gs.Constant]) -> None:
    """Put floats in the place of a constant of integers."""
    stored, result = _stored(node), node.outputs[0]
    assert stored is not None
    integers = model.array(stored)
    encoding = encoding_of(model, node)
    if str(integers.dtype) in DTYPES:  # packed: the Cast behind it hides the type
        encoding = replace(encoding, dtype=str(integers.dtype))
    if id(stored) not in known:
        name = stored.name.removesuffix(_SUFFIX) or result.name
        values = encoding.dequantize(integers.astype(np.int32))
        known[id(stored)] = model.constant(name, values)
        if encoding.dtype != "int32":
            found[known[id(stored)].name] = encoding
    for reader in [*result.outputs]:
        for index, tensor in enumerate(reader.inputs):
            if tensor is result:
                reader.inputs[index] = known[id(stored)]
    node.outputs.clear()


_Ends = dict[int, tuple[gs.Tensor, Encoding]]  # id of a tensor that was quantized -> what it became


def _source(model: Model, node: gs.Node, encoding: Encoding, ends: _Ends) -> gs.Tensor:
    """The floats that a DequantizeLinear gives back, taken out of what is between."""
    before = producer(node.inputs[0])
    if before is not None and before.op == "Pad":  # zero is its zero point
        before.inputs = before.inputs[:2]
        inner = before.inputs[0] = _source(model, before, encoding, ends)
        ends.setdefault(id(inner), (inner, encoding))
        padded: gs.Variable = before.outputs[0]
        padded.dtype = np.dtype(np.float32)
        padded.name = model.free_name(padded.name.removesuffix(_SUFFIX))
        return padded
    if before is not None and before.op == "Clip":
        before = producer(before.inputs[0])
    if before is None or before.op != "QuantizeLinear":
        what = "an input of the model" if before is None else f"{before.name} ({before.op})"
        raise UnsupportedError(
            f"{node.name} dequantizes what {what} gives, not a QuantizeLinear",
            where=model.path,
            fix="give a model whose integers lie between QuantizeLinear and DequantizeLinear",
        )
    given = encoding_of(model, before)
    same = given.axis == encoding.axis and np.array_equal(given.scale, encoding.scale)
    unit = given.axis is None and float(given.scale) == 1 and encoding.axis is not None
    if not same and not (unit and Layer.of(model, _conv(before) or before) is not None):
        raise UnsupportedError(
            f"{before.name} and {node.name} have different scales", where=model.path
        )
    source: gs.Tensor = before.inputs[0]
    return source


def _conv(node: gs.Node) -> gs.Node | None:
    """The convolution whose result, or the Relu of it, a node reads."""
    before = producer(node.inputs[0])
    if before is not None and before.op in ("Relu", "Clip"):
        before = producer(before.inputs[0])
    return before if before is not None and before.op == "Conv" else None


def _unflattened(model: Model, node: gs.Node) -> gs.Node:
    """What gives the floats of a DequantizeLinear: itself, or the Reshape back from [N, C, L].

    The Reshape of the integers to [N, C, L], before scales per channel, is taken out.
    """
    flat, back = producer(node.inputs[0]), consumers(node.outputs[0])
    if flat is None or flat.op != "Reshape" or [n.op for n in back] != ["Reshape"]:
        return node
    if not isinstance(flat.inputs[1], gs.Constant):
        return node
    if model.array(flat.inputs[1]).tolist() != [0, 0, -1]:
        return node
    node.inputs[0] = flat.inputs[0]
    return back[0]


def _bypass(model: Model, node: gs.Node, source: gs.Tensor) -> gs.Tensor:
    """Let the readers of a DequantizeLinear read floats; returns what the floats are called."""
    result = node.outputs[0]
    node.inputs = [source]
    if model.is_output(result) and not model.can_bypass(node):
        node.op, node.attrs = "Identity", {}
        return source
    renamed = model.is_output(result)
    model.bypass(node)
    return result if renamed else source


def _take_out_scales(model: Model, found: Encodings) -> None:
    """Undo what scales per channel of a convolution's result did to its weight and bias."""
    for layer in model.layers():
        end = layer.y
        readers = consumers(end)
        if end.name not in found and len(readers) == 1 and readers[0].op in ("Relu", "Clip"):
            end = readers[0].outputs[0]
        leaving = found.get(end.name)
        if layer.op != "Conv" or leaving is None or leaving.axis is None:
            continue
        weight = found.pop(layer.weight_tensor.name)
        scale = leaving.scale.astype(np.float64)
        shift = scale * leaving.zero_point
        layer.scale_outputs(scale)
        if layer.bias is not None:
            layer.set_bias((layer.bias - shift).astype(np.float32))
        scales: np.ndarray = (weight.scale * leaving.scale).astype(np.float32)
        whole = replace(weight, scale=scales)
        if scales.max() <= scales.min() * (1 + ROUNDING) and np.ptp(weight.zero_point) == 0:
            whole = Encoding(weight.dtype, scales[0].copy(), weight.zero_point[0].copy())
        found[layer.weight_tensor.name] = whole


def _rename(model: Model, found: Encodings) -> None:
    """Take the name of the layer off a weight that was written for it alone."""
    taken = {*model.tensors()}
    for layer in model.layers():
        weight = layer.weight_tensor
        name = weight.name.removesuffix(f"_{layer.name}")
        if name != weight.name and name not in taken and weight.name in found:
            found[name] = found.pop(weight.name)
            weight.name = name
            taken.add(name)
