"""Layers of which the weight alone is in integers: the runtime multiplies it by floats."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.encoding import Encoding
from onnxq.model import Layer, Model, consumers
from onnxq.targets import Kernel, Target

__all__ = ["in_blocks", "unfit", "weight_only", "write"]


def unfit(layer: Layer, target: Target) -> str | None:
    """Why the target has no kernel for a layer's weight in integers and floats; None if it has."""
    node = layer.node
    if layer.weight.dtype != np.float32:
        return "does not compute in float32"
    if layer.op not in target.weight_only:
        return f"{target.name} has no {layer.op} of integer weights and float activations"
    if layer.side != 1:
        return "its weight is on the left side"
    if layer.weight.ndim != 2:
        return "its weight is not a matrix"
    if layer.op == "Gemm":
        if node.attrs.get("transA", 0):
            return "its input is transposed"
        if float(node.attrs.get("alpha", 1.0)) != 1.0 or float(node.attrs.get("beta", 1.0)) != 1.0:
            return "its alpha or beta is not 1"
        if layer.bias_tensor is not None and layer.bias is None:
            return "its bias is computed, not constant"
        if layer.bias is not None and layer.bias.size not in (1, layer.output_channels):
            return "its bias is not one value per output channel"
    return None


def in_blocks(layer: Layer, block: int) -> str | None:
    """Why the inputs of a layer cannot share scales in blocks; None if they can."""
    if layer.weight.ndim != 2 or layer.side != 1:
        return "its weight is not a matrix on the right side"
    if layer.input_channels % block:
        return f"its {layer.input_channels} inputs are no multiple of {block}"
    return None


def weight_only(model: Model, nodes: Mapping[str, Kernel]) -> list[Layer]:
    """The layers whose weights have an encoding, and whose inputs have none.

    Args:
        model: The model with its encodings.
        nodes: Name of each node that runs in integers -> its kernel.
    """
    return [
        layer
        for layer in model.layers()
        if layer.weight_encoding is not None
        and layer.name not in nodes
        and layer.x.name not in model.encodings
    ]


def write(layer: Layer, *, packed: bool) -> list[gs.Node]:
    """Give a layer integers for a weight, in the form that onnxruntime fuses to MatMulNBits.

    Each layer has its own, as no weight is fused that two read.

    Args:
        layer: The layer, whose weight has an encoding.
        packed: Whether 4 bits and fewer take half a byte.

    Returns:
        The nodes to insert, its DequantizeLinear first.
    """
    model, node, tensor = layer.model, layer.node, layer.weight_tensor
    encoding = model.encodings[tensor.name]
    values = encoding.quantize(layer.weight)
    added: list[gs.Node] = []
    if layer.op in ("MatMul", "Gemm") and layer.side == 1 and values.ndim == 2:
        added = _part_from_bounds(layer)
        encoding = _per_channel(encoding, layer)
    if layer.op == "Gemm":
        if layer.bias is not None and layer.bias.size in (1, layer.output_channels):
            bias = layer.bias.reshape(-1)
            layer.set_bias(np.broadcast_to(bias, layer.output_channels).copy())
        if layer.side == 1 and node.attrs.get("transB", 0):  # the kernel takes K x N
            node.attrs["transB"] = 0
            values, encoding = values.T, encoding.transposed
    name = f"{tensor.name}_{layer.name}"
    inputs = [
        model.integers(f"{name}_quantized", values, encoding.dtype, packed=packed),
        model.constant(f"{name}_scale", encoding.scale.astype(np.float32)),
    ]
    if encoding.zero_point.any():
        zero = f"{name}_zero_point"
        inputs.append(model.integers(zero, encoding.zero_point, encoding.dtype, packed=packed))
    attrs = {} if encoding.axis is None else {"axis": encoding.axis}
    if encoding.block:
        attrs["block_size"] = encoding.block
    result = model.variable(f"{name}_DequantizeLinear_Output", np.float32, values.shape)
    node.inputs[layer.side] = result
    dequantize = f"{name}_DequantizeLinear"
    return [gs.Node("DequantizeLinear", dequantize, attrs, inputs, [result]), *added]


def _per_channel(encoding: Encoding, layer: Layer) -> Encoding:
    """The encoding with a scale per channel, where it has a single one.

    onnxruntime makes one constant of equal scalars, and fuses no scale that two weights read.
    """
    if encoding.axis is not None:
        return encoding
    scale, zero = (
        np.broadcast_to(a, layer.output_channels).copy()
        for a in (encoding.scale, encoding.zero_point)
    )
    return Encoding(encoding.dtype, scale, zero, layer.channel_axis)


def _part_from_bounds(layer: Layer) -> list[gs.Node]:
    """Write a Relu or Clip that follows otherwise: as LeakyRelu of slope 0, as Max and Min.

    onnxruntime 1.32 takes them for part of an integer layer, finds no QuantizeLinear behind them,
    and leaves the weight in float.

    Returns:
        The node to insert, if there is one.
    """
    result = layer.addend[0].outputs[0] if layer.addend is not None else layer.y
    readers = consumers(result)
    if len(readers) != 1 or layer.model.is_output(result):
        return []
    node = readers[0]
    if node.op == "Relu":
        node.op, node.attrs = "LeakyRelu", {"alpha": 0.0}
    if node.op != "Clip" or node.inputs[0] is not result:
        return []
    low, high = ([t for t in node.inputs[i : i + 1] if t.name] for i in (1, 2))
    end = node.outputs[0]
    if low and high:
        raised = layer.model.variable(f"{end.name}_raised", np.float32, end.shape)
        node.op, node.inputs, node.outputs = "Max", [result, *low], [raised]
        return [gs.Node("Min", f"{node.name}.min", {}, [raised, *high], [end])]
    if low or high:
        node.op, node.inputs = ("Max" if low else "Min"), [result, *low, *high]
    return []
