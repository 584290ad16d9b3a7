"""A float model that computes as its integer version will: what it will round is rounded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.encoding import Encoding
from onnxq.errors import UnsupportedError
from onnxq.graph import consumers, producer, rewire
from onnxq.model import Layer, Model
from onnxq.placement import data_inputs, integer_nodes, written_activations
from onnxq.targets import Kernel, Target
from onnxq.widths import saturate

__all__ = ["encoding_of", "fold_dequantized", "simulated"]


def simulated(model: Model, target: Target) -> Model:
    """A copy of the model in which every encoded tensor is rounded to its grid.

    Activations pass through QuantizeLinear and DequantizeLinear where the written model will have
    them; weights and other constants of nodes that run in integers are rounded to nearest and stay
    constants of their names.

    Args:
        model: A float model with encodings.
        target: What the model is to run on.
    """
    copy = model.clone()
    copy.raise_opset(copy.encodings.opset)
    nodes = integer_nodes(copy, target)
    kernels = {id(n): nodes[n.name] for n in copy.graph.nodes if n.name in nodes}
    _round_constants(copy, kernels)
    added: list[gs.Node] = []
    for tensor, everyone in written_activations(copy, kernels).values():
        added += _round_trip(copy, tensor, kernels, everyone=everyone)
    copy.insert(added)
    return copy


def fold_dequantized(model: Model) -> int:
    """Make constants of integer constants behind a DequantizeLinear; returns how many.

    The floats are those that onnxruntime computes, to the bit, each time the model runs.
    """
    folded = 0
    for node in model.graph.nodes:
        if node.op != "DequantizeLinear" or not isinstance(node.inputs[0], gs.Constant):
            continue
        encoding, result = encoding_of(model, node), node.outputs[0]
        node.outputs.clear()
        result.to_constant(encoding.dequantize(model.array(node.inputs[0])))
        folded += 1
    model.cleanup()
    return folded


def encoding_of(model: Model, node: gs.Node) -> Encoding:
    """What a QuantizeLinear or DequantizeLinear says of its tensor.

    Raises:
        UnsupportedError: Its scale or zero point is computed.
    """
    grid = node.inputs[1:3]
    if not all(isinstance(t, gs.Constant) for t in grid):
        raise UnsupportedError("a scale or zero point that is computed", where=f"node {node.name}")
    scale = model.array(grid[0])
    given = grid[1] if len(grid) > 1 else None
    zero = np.zeros(scale.shape) if given is None else model.array(given)
    if given is None:
        kind = node.inputs[0].dtype if node.op == "DequantizeLinear" else np.uint8
    else:
        kind = zero.dtype
    if scale.size == 1 and "axis" not in node.attrs:
        scale, zero = scale.reshape(()), zero.reshape(())
    return Encoding(
        str(np.dtype(kind)),
        scale.astype(np.float32),
        zero.astype(np.int32),
        int(node.attrs.get("axis", 1)) if scale.ndim else None,
        int(node.attrs.get("block_size", 0)),
    )


def _round_constants(model: Model, kernels: Mapping[int, Kernel]) -> None:
    done = set()
    for node in model.graph.nodes:
        kernel = kernels.get(id(node))
        if kernel is None:
            continue
        for tensor in data_inputs(node, kernel):
            if isinstance(tensor, gs.Constant) and tensor.name not in done:
                done.add(tensor.name)
                values = model.array(tensor)
                tensor.values = model.encodings[tensor.name].fake_quantize(values)


def _round_trip(
    model: Model, tensor: gs.Tensor, kernels: Mapping[int, Kernel], *, everyone: bool
) -> list[gs.Node]:
    name = tensor.name
    encoding = model.encodings[name]
    readers = [
        node
        for node in consumers(tensor)
        if everyone
        or (id(node) in kernels and any(t is tensor for t in data_inputs(node, kernels[id(node)])))
    ]
    is_output = everyone and model.is_output(tensor)
    if not readers and not is_output:
        return []
    integers = model.variable(f"{name}.integers", encoding.storage, tensor.shape)
    rounded: gs.Tensor = model.variable(f"{name}.rounded", np.float32, tensor.shape)
    if is_output:  # it keeps its name, and its producer gets another
        raw, source = model.variable(f"{name}.float", np.float32, tensor.shape), producer(tensor)
        assert source is not None
        source.outputs[next(i for i, t in enumerate(source.outputs) if t is tensor)] = raw
        tensor, rounded = raw, tensor
    else:
        for reader in readers:
            rewire(reader, tensor, rounded)
    grid = _grid(model, name, encoding)
    attrs = {} if encoding.axis is None else {"axis": encoding.axis}
    tensor, made, clip = saturate(model, name, tensor, integers, encoding)
    return [
        gs.Node("QuantizeLinear", f"{name}.quantize", attrs, [tensor, *grid], [made]),
        *clip,
        gs.Node("DequantizeLinear", f"{name}.dequantize", attrs, [integers, *grid], [rounded]),
    ]


def _grid(model: Model, name: str, encoding: Encoding) -> list[gs.Tensor]:
    return [
        model.constant(f"{name}.scale", encoding.scale.astype(np.float32)),
        model.constant(f"{name}.zero_point", encoding.zero_point.astype(encoding.storage)),
    ]


def input_name(model: Model, layer: Layer) -> str:
    """The name of the tensor that the layer of this name reads in a simulated model."""
    node = next(n for n in model.graph.nodes if n.name == layer.name)
    return str(node.inputs[1 - layer.side].name)
