"""Integers of four bits, two to a byte, as ONNX stores them."""

from __future__ import annotations

import numpy as np

__all__ = ["pack_nibbles"]


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """Two values a byte, the first in the lower half; an odd last one stands alone.

    Args:
        values: Integers from -8 to 15, any shape.

    Returns:
        uint8, half as many, rounded up.
    """
    flat = np.asarray(values).reshape(-1).astype(np.uint8) & 0xF  # two's complement
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[::2] | flat[1::2] << 4
