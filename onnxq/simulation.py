"""A float model that computes as its integer version will: what it will round is rounded."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.encoding import Encoding
from onnxq.graph import consumers, producer, rewire
from onnxq.model import Layer, Model
from onnxq.placement import data_inputs, integer_nodes, written_activations
from onnxq.targets import Kernel, Target

__all__ = ["simulated"]


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
    integers = model.variable(f"{name}.integers", np.dtype(encoding.dtype), tensor.shape)
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
    return [
        gs.Node("QuantizeLinear", f"{name}.quantize", attrs, [tensor, *grid], [integers]),
        gs.Node("DequantizeLinear", f"{name}.dequantize", attrs, [integers, *grid], [rounded]),
    ]


def _grid(model: Model, name: str, encoding: Encoding) -> list[gs.Tensor]:
    return [
        model.constant(f"{name}.scale", encoding.scale.astype(np.float32)),
        model.constant(f"{name}.zero_point", encoding.zero_point.astype(encoding.dtype)),
    ]


def input_name(model: Model, layer: Layer) -> str:
    """The name of the tensor that the layer of this name reads in a simulated model."""
    node = next(n for n in model.graph.nodes if n.name == layer.name)
    return str(node.inputs[1 - layer.side].name)
