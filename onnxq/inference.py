"""ONNX shape inference, kept from unrolling what is long."""

from __future__ import annotations

import math

import onnx

__all__ = ["inferred"]

# Integers of a tensor that inference may carry along, to compute shapes from: each takes some 200
# bytes.  Shapes and axes are short.
_LONGEST = 1 << 16


def inferred(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """The model with the element types and shapes that follow from its inputs; None if none do.

    Shapes that are computed are followed, unless the model holds a list of integers that is much
    longer than a shape: ONNX would write out every one of them.
    """
    try:
        plain = onnx.shape_inference.infer_shapes(proto)
        if any(_is_long(info) for info in (*plain.graph.value_info, *plain.graph.output)):
            return plain
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return None


def _is_long(info: onnx.ValueInfoProto) -> bool:
    kind = info.type.tensor_type
    if kind.elem_type not in (onnx.TensorProto.INT32, onnx.TensorProto.INT64):
        return False
    sizes = [d.dim_value for d in kind.shape.dim]
    return len(sizes) == 1 and math.prod(sizes) > _LONGEST
