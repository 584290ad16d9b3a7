"""Biases as they are written: int32, in steps of s_x * s_w, which must not overflow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.encoding import Encoding
from onnxq.graph import producer
from onnxq.model import Layer

__all__ = ["BIAS_LIMIT", "guard_bias", "least_scale", "written_bias"]

# Bias integers stay below 2^30, so that adding the products cannot overflow int32.
BIAS_LIMIT = float(1 << 30)


def written_bias(layer: Layer, end: gs.Tensor) -> np.ndarray:
    """The greatest magnitude of what is written as a layer's bias, per channel or for all.

    Args:
        layer: The layer; without a bias it has zeros.
        end: The tensor that has the encoding of its result.
    """
    bias = np.zeros(1) if layer.bias is None else layer.bias.reshape(-1)
    leaving, last = layer.model.encodings.get(end.name), producer(end)
    if leaving is not None and leaving.axis is not None:
        bias = bias + leaving.scale * leaving.zero_point
    elif leaving is not None and last is not None and last.op == "Min":
        bias = np.abs(bias) + leaving.high  # as far as a bound per channel may shift it
    return np.abs(np.asarray(bias, np.float64))


def least_scale(bias: np.ndarray, x_scale: float) -> np.ndarray:
    """The least weight scale at which an int32 bias stays below 2^30, shaped as the bias.

    Args:
        bias: One value per output channel, or one for all.
        x_scale: Scale of the layer's input.
    """
    needed = np.abs(np.asarray(bias, np.float64).reshape(-1)) / (x_scale * BIAS_LIMIT)
    return np.asarray(needed * (1 + 1e-6))


def guard_bias(encoding: Encoding, bias: np.ndarray, x_scale: float) -> Encoding:
    """Raise weight scales until the int32 bias, scale s_x * s_w, stays below 2^30.

    Args:
        encoding: Of the weight, per tensor or per channel.
        bias: One value per output channel, or one for all.
        x_scale: Scale of the layer's input.
    """
    needed = least_scale(bias, x_scale)
    if encoding.axis is None:
        needed = needed.max(initial=0.0)
    if np.all(needed <= encoding.scale):
        return encoding
    return replace(encoding, scale=np.maximum(encoding.scale, needed).astype(np.float32))
