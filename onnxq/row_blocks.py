"""Convolutions that step along a row, such as sound: neighbours become channels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Layer, Model, consumers, producer, rewire

__all__ = ["LEAST", "split_rows"]

# Joining shorter blocks takes the time that the convolution saves.
LEAST = 8
# Taps of a kernel filled up to whole blocks, at most this multiple of those that it has.
MOST_TAPS = 1.25
# What computes the parts of a row value by value.
BY_VALUE = frozenset({"DequantizeLinear", "Mul", "QuantizeLinear", "Sub"})


def split_rows(model: Model, layer: Layer) -> str:
    """Make channels of the neighbours in a row of which a Conv reads several parts, joined.

    The sums are the same, in the order that integer kernels want, channels last::

        x [N, 1, L] -> parts -> Concat [N, p, L] -> Conv(W), stride s

        x -> Reshape [N, L / b, b] -> parts -> Concat [N, L / b, p b] -> Transpose
          -> Conv(W'), stride s / b             W'[:, h b + j, i] = W[:, h, b i + j]

    Returns:
        What was done; empty where the convolution is another, or it would not pay.
    """
    join = producer(layer.x)
    if layer.op != "Conv" or layer.group != 1 or join is None or join.op != "Concat":
        return ""
    found = _parts(model, join) if join.attrs.get("axis") in (1, -2) else None
    block = 0 if found is None or consumers(layer.x) != [layer.node] else _block(layer, found[0])
    known = layer.weight_encoding
    if found is None or not block or known is None or known.axis not in (None, 0):
        return ""
    source, nodes = found
    batch, _, length = source.shape
    shape = [batch, length // block, block]
    rows = model.constant(f"{source.name}.rows", np.array([0, -1, block]))
    split = model.variable(f"{source.name}.split", source.dtype, shape)
    for node in nodes:
        rewire(node, source, split)
        node.outputs[0].shape = shape
    both = join.outputs[0]
    join.attrs["axis"] = 2
    both.shape = [*shape[:2], len(join.inputs) * block]
    turned = model.variable(f"{both.name}.blocks", both.dtype, [batch, both.shape[2], shape[1]])
    model.encodings.derive(turned.name, model.encodings[both.name])
    layer.set_weight(_in_blocks(layer.weight, block))
    model.encodings[layer.weight_tensor.name] = known
    attrs = layer.node.attrs
    attrs["strides"] = [attrs["strides"][0] // block]
    attrs["kernel_shape"] = [layer.weight_tensor.shape[2]]
    layer.node.inputs[0] = turned
    model.insert(
        [
            gs.Node("Reshape", f"{source.name}.split_rows", {}, [source, rows], [split]),
            gs.Node("Transpose", f"{both.name}.turn", {"perm": [0, 2, 1]}, [both], [turned]),
        ]
    )
    return f"{layer.name}: {block} neighbours in a row as channels"


def _parts(model: Model, join: gs.Node) -> tuple[gs.Tensor, list[gs.Node]] | None:
    """The row [N, 1, L] that all parts are made of, value by value, and the nodes that do."""
    sources: dict[int, gs.Tensor] = {}
    nodes: dict[int, gs.Node] = {id(join): join}
    rest = [*join.inputs]
    while rest:
        tensor = rest.pop()
        node = producer(tensor)
        if isinstance(tensor, gs.Constant):
            if len(tensor.shape):
                return None
        elif node is None or node.op not in BY_VALUE:
            sources[id(tensor)] = tensor
        elif id(node) not in nodes:
            nodes[id(node)] = node
            rest += node.inputs
    inside = [n.outputs[0] for n in nodes.values()]
    for tensor in inside[1:]:
        if model.is_output(tensor) or any(id(n) not in nodes for n in consumers(tensor)):
            return None
    if len(sources) != 1 or model.is_output(inside[0]):
        return None
    (source,) = sources.values()
    shape = source.shape
    row = shape is not None and len(shape) == 3 and shape[1] == 1 and isinstance(shape[2], int)
    return (source, [*nodes.values()]) if row else None


def _block(layer: Layer, source: gs.Tensor) -> int:
    """How many neighbours should become channels; 0 for none."""
    attrs: dict[str, Sequence[int]] = layer.node.attrs
    plain = attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and not layer.is_padded
    if not plain or any(d != 1 for d in attrs.get("dilations", ())):
        return 0
    stride, taps = attrs.get("strides", [1])[0], layer.weight_tensor.shape[2]
    fitting = [
        b
        for b in range(LEAST, stride + 1)
        if stride % b == 0 and source.shape[2] % b == 0 and -(-taps // b) * b <= MOST_TAPS * taps
    ]
    return max(fitting, default=0)


def _in_blocks(weight: np.ndarray, block: int) -> np.ndarray:
    """The weight [O, C, K], filled up with zeros, as [O, C * block, K / block]."""
    outputs, inputs, taps = weight.shape
    filled = np.pad(weight, ((0, 0), (0, 0), (0, -taps % block)))
    blocks = filled.reshape(outputs, inputs, -1, block)
    return blocks.transpose(0, 1, 3, 2).reshape(outputs, inputs * block, -1)
