"""The power of values, and of how far others are from them."""

from __future__ import annotations

import numpy as np

from onnxq.kernels._jit import kernel, read_only

__all__ = ["powers"]


def powers(wanted: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Sum of the squares of values, and of the squares of the differences to others, in float64.

    NaN or infinite where a value is.

    Args:
        wanted: Any floats.
        got: As many.
    """
    flat = [read_only(np.ascontiguousarray(a, np.float32).reshape(-1)) for a in (wanted, got)]
    signal, noise = _powers(*flat)
    return float(signal), float(noise)


@kernel(any_order=True)
def _powers(wanted: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    signal = 0.0
    noise = 0.0
    for i in range(wanted.size):
        x = np.float64(wanted[i])
        difference = x - np.float64(got[i])
        signal += x * x
        noise += difference * difference
    return signal, noise
