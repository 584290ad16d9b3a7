"""Quantize and dequantize, to the bit as onnxruntime's QuantizeLinear and DequantizeLinear do.

Plain numpy: these are bound by memory.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

__all__ = ["dequantize", "fake_quantize", "quantize"]


def quantize(
    x: np.ndarray,
    scale: ArrayLike,
    zero_point: ArrayLike,
    qmin: int,
    qmax: int,
    *,
    dtype: DTypeLike = np.int32,
) -> np.ndarray:
    """Round x / scale half to even, add the zero point, saturate.

    Args:
        x: Any shape; taken as float32, and without NaN.
        scale: float32, above 0; any shape that broadcasts against x.
        zero_point: Integers; any shape that broadcasts against x.
        qmin: Least integer, at least -2**31.
        qmax: Greatest integer, below 2**31.
        dtype: Type of the result.

    Returns:
        Integers from qmin to qmax, of the shape of x.
    """
    zero = np.asarray(zero_point, np.int32)
    steps = _steps(x, np.asarray(scale, np.float32), zero, qmin, qmax)
    q: np.ndarray = steps.astype(np.int32 if steps.dtype == np.float32 else np.int64)
    q += zero
    return q.astype(dtype, copy=False)


def dequantize(q: np.ndarray, scale: ArrayLike, zero_point: ArrayLike) -> np.ndarray:
    """(q - zero point) * scale as float32; the arguments are those of `quantize`."""
    steps: np.ndarray = q.astype(np.int32 if q.dtype.itemsize < 4 else np.int64)
    steps -= np.asarray(zero_point, np.int32)
    x: np.ndarray = steps.astype(np.float32)
    x *= np.asarray(scale, np.float32)
    return x


def fake_quantize(
    x: np.ndarray, scale: ArrayLike, zero_point: ArrayLike, qmin: int, qmax: int
) -> np.ndarray:
    """What `dequantize` makes of `quantize`, to the bit, without the integers between."""
    scale, zero = np.asarray(scale, np.float32), np.asarray(zero_point, np.int32)
    steps = _steps(x, scale, zero, qmin, qmax)
    steps += 0.0  # integers know no negative zero
    x_hat: np.ndarray = steps.astype(np.float32, copy=False)
    x_hat *= scale
    return x_hat


def _steps(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, qmin: int, qmax: int) -> np.ndarray:
    """Whole steps from zero, saturated: float32, or float64 where the limits need it."""
    with np.errstate(over="ignore"):  # beyond float32 is beyond the limits
        steps: np.ndarray = np.asarray(np.asarray(x, np.float32) / scale)
    np.rint(steps, out=steps)
    low, high = qmin - zero.astype(np.int64), qmax - zero.astype(np.int64)
    if max(-low.min(initial=0), high.max(initial=0)) > 1 << 24:
        steps = steps.astype(np.float64)
    np.clip(steps, low.astype(steps.dtype), high.astype(steps.dtype), out=steps)
    return steps
