"""Models that reduce tensors to one number per channel, inside onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxq.model import Model

__all__ = ["pooled", "ranks", "with_moments", "with_ranges"]


def ranks(model: Model, names: Sequence[str]) -> dict[str, int]:
    """The ranks of those tensors that have a channel axis."""
    return {
        n: len(t.shape)
        for n, t in model.tensors().items()
        if n in names and t.shape is not None and len(t.shape) >= 2
    }


def with_ranges(model: Model, ranks: Mapping[str, int]) -> onnx.ModelProto:
    """The model with ReduceMin and ReduceMax of tensors as its outputs."""
    proto = _without_outputs(model)
    halves = _halves(model)
    for name, rank in ranks.items():
        source = _widened(proto, name) if name in halves else name
        for op, suffix in (("ReduceMin", "min"), ("ReduceMax", "max")):
            _reduce(proto, model.opset, op, source, f"{name}/{suffix}", rank)
            _put_out(proto, f"{name}/{suffix}")
    return proto


def with_moments(model: Model, ranks: Mapping[str, int]) -> onnx.ModelProto:
    """The model with the means of tensors, and squares about them, as its outputs."""
    proto = _without_outputs(model)
    halves = _halves(model)
    for name, rank in ranks.items():
        mean, rest = f"{name}/mean", f"{name}/rest"
        source = _widened(proto, name) if name in halves else name
        _reduce(proto, model.opset, "ReduceMean", source, mean, rank, keepdims=1)
        _node(proto, "Sub", [source, mean], rest)
        _reduce(proto, model.opset, "ReduceSumSquare", rest, f"{name}/squares", rank)
        _node(proto, "Size", [name], f"{name}/size")
        for suffix in ("mean", "squares", "size"):
            _put_out(proto, f"{name}/{suffix}")
    return proto


def _without_outputs(model: Model) -> onnx.ModelProto:
    proto = model.to_proto()
    del proto.graph.output[:]
    return proto


def _put_out(proto: onnx.ModelProto, name: str) -> None:
    proto.graph.output.add().name = name  # onnxruntime infers its type


def _halves(model: Model) -> set[str]:
    """Tensors whose type holds neither their sums nor the squares of their values."""
    return {n for n, t in model.tensors().items() if t.dtype is not None and _is_half(t.dtype)}


def _is_half(dtype: Any) -> bool:
    return dtype in (np.float16, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def _widened(proto: onnx.ModelProto, name: str) -> str:
    """A tensor in float32."""
    _node(proto, "Cast", [name], f"{name}/float", to=onnx.TensorProto.FLOAT)
    return f"{name}/float"


def _node(
    proto: onnx.ModelProto, op: str, inputs: Sequence[str], result: str, **attrs: Any
) -> onnx.NodeProto:
    node: onnx.NodeProto = proto.graph.node.add()
    node.CopyFrom(onnx.helper.make_node(op, inputs, [result], f"onnxq/{result}", **attrs))
    return node


def _reduce(
    proto: onnx.ModelProto,
    opset: int,
    op: str,
    name: str,
    result: str,
    rank: int,
    keepdims: int = 0,
) -> None:
    """Reduce a tensor to its channels, axis 1."""
    axes = [i for i in range(rank) if i != 1]
    node = _node(proto, op, [name], result, keepdims=keepdims)
    if opset < 18:
        node.attribute.append(onnx.helper.make_attribute("axes", axes))
        return
    constant = f"{result}/axes"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(axes, np.int64), constant))
    node.input.append(constant)


def pooled(
    a: tuple[float, np.ndarray, np.ndarray], b: tuple[float, np.ndarray, np.ndarray]
) -> tuple[float, np.ndarray, np.ndarray]:
    """Count, mean and squares about the mean of two parts together (Chan et al. 1979)."""
    count = a[0] + b[0]
    step = b[1] - a[1]
    part = b[0] / count if count else 0.0
    return count, a[1] + step * part, a[2] + b[2] + step**2 * (a[0] * part)
