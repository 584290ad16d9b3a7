"""Integers of any width from 2 to 16 bits, exact, where ONNX has types of 8 and 16 bits only.

They lie in the next wider type, and a Clip keeps them within their own limits: of 8 bits behind
QuantizeLinear, of 16 bits, which onnxruntime does not clip, before it.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.encoding import Encoding
from onnxq.errors import UnsupportedError
from onnxq.model import Model

__all__ = ["saturate"]


def saturate(
    model: Model, name: str, x: gs.Tensor, integers: gs.Tensor, encoding: Encoding
) -> tuple[gs.Tensor, gs.Tensor, list[gs.Node]]:
    """What QuantizeLinear is to read and write so that `integers` stay within the encoding's width.

    Args:
        model: The model.
        name: Begin of the names of what is new.
        x: What is quantized.
        integers: What the readers get.
        encoding: How x is written.

    Returns:
        The input and the output of QuantizeLinear, and the nodes to insert beside it.

    Raises:
        UnsupportedError: From 9 to 15 bits with scales per channel.
    """
    if encoding.fills_storage:
        return x, integers, []
    if encoding.storage.itemsize == 1:
        ends = np.array([encoding.qmin, encoding.qmax], encoding.storage)
        wide = model.variable(f"{name}_wide", encoding.storage, integers.shape)
        return x, wide, [_clip(model, name, wide, ends, integers)]
    if encoding.axis is not None:
        raise UnsupportedError(
            f"activations of {encoding.bits} bits with scales per channel",
            where=f"tensor {name}",
            fix="take one scale per tensor, or 8 or 16 bits",
        )
    ends = encoding.dequantize(np.array([encoding.qmin, encoding.qmax], encoding.storage))
    bounded = model.variable(f"{name}_bounded", np.float32, x.shape)
    return bounded, integers, [_clip(model, name, x, ends, bounded)]


def _clip(model: Model, name: str, x: gs.Tensor, ends: np.ndarray, result: gs.Tensor) -> gs.Node:
    low, high = (
        model.constant(f"{name}_{end}", np.array(value))
        for end, value in zip(("least", "greatest"), ends, strict=True)
    )
    return gs.Node("Clip", f"{name}_Clip", {}, [x, low, high], [result])
