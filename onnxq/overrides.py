"""The TensorQuantOverrides of onnxruntime.quantization: tensors by name, a dict per channel.

::

    {"t": [{"quant_type": "QUInt8", "scale": 0.0185, "zero_point": 114}],
     "conv.weight": [{"quant_type": "QInt8", "scale": 0.01, "zero_point": 0, "axis": 0},
                     {"quant_type": "QInt8", "scale": 0.02, "zero_point": 0, "axis": 0}]}

In a file `quant_type` is text; `onnxruntime.quantization.static_quantize_runner` reads it so, and
from Python it is `QuantType.from_string` of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxq.encoding import Encoding, Encodings
from onnxq.entries import LARGEST_SCALE, check_keys, is_int, kind, scales, zero_points
from onnxq.errors import RecipeError, UnsupportedError

__all__ = ["looks_like_overrides", "read", "table"]

# onnxruntime's name of a type -> ours
_TYPES = {
    **{"QInt4": "int4", "QInt8": "int8", "QInt16": "int16"},
    **{"QUInt4": "uint4", "QUInt8": "uint8", "QUInt16": "uint16"},
}
_NAMES = {ours: theirs for theirs, ours in _TYPES.items()}
_KEYS = ("quant_type", "scale", "zero_point", "rmin", "rmax", "symmetric", "reduce_range", "axis")


def looks_like_overrides(document: dict[str, Any]) -> bool:
    """Whether a document holds lists of dicts by name, and nothing else."""
    return bool(document) and all(
        isinstance(v, list) and v and all(isinstance(e, dict) for e in v) for v in document.values()
    )


def table(encodings: Encodings) -> dict[str, list[dict[str, Any]]]:
    """Encodings as onnxruntime.quantization takes them.

    Raises:
        UnsupportedError: What it has no type or no place for; the tensor is named.
    """
    found = {}
    for name, encoding in encodings.items():
        written = _NAMES.get(encoding.dtype)
        if written is None or encoding.block:
            what = "scales in blocks" if encoding.block else encoding.dtype
            raise UnsupportedError(
                f"onnxruntime.quantization has no override for {what}",
                where=f"tensor {name}",
                fix="take version 2.0.0",
            )
        axis = {} if encoding.axis is None else {"axis": encoding.axis}
        pairs = zip(
            encoding.scale.astype(np.float64).reshape(-1).tolist(),
            encoding.zero_point.reshape(-1).tolist(),
            strict=True,
        )
        found[name] = [
            {"quant_type": written, "scale": scale, "zero_point": zero, **axis}
            for scale, zero in pairs
        ]
    return found


def read(document: dict[str, Any], where: object) -> Encodings:
    """The encodings of overrides that give scales, or ranges.

    Raises:
        RecipeError: An entry means nothing; the tensor is named.
        UnsupportedError: An entry leaves its range to calibration, or converts between types.
    """
    encodings = Encodings()
    for name, parts in document.items():
        place = name if where is None else f"{name} of {where}"
        for part in parts:
            if "convert" in part:
                raise UnsupportedError("an override that converts between types", where=place)
            check_keys(part, _KEYS, place)
        encodings[name] = _encoding(parts, place)
    return encodings


def _encoding(parts: list[dict[str, Any]], place: str) -> Encoding:
    first = parts[0]
    dtype = _TYPES.get(str(first.get("quant_type", "")))
    if dtype is None:
        raise RecipeError(
            f"quant_type: wanted {', '.join(_TYPES)}, got {first.get('quant_type')!r}", where=place
        )
    if any(p.get("quant_type", first["quant_type"]) != first["quant_type"] for p in parts):
        raise RecipeError("its channels are of different types", where=place)
    axis = first.get("axis")
    if axis is None and len(parts) > 1:
        raise RecipeError("several scales need the axis of their channels", where=place)
    if axis is not None and not is_int(axis):
        raise RecipeError(f"axis: wanted an integer, got {kind(axis)}", where=place)
    if all("scale" in p and "zero_point" in p for p in parts):
        scale = scales([_scalar(p["scale"]) for p in parts], place, "scale")
        zero = [_scalar(p["zero_point"]) for p in parts]
        zero_point = zero_points(zero, dtype, scale, place, "zero_point")
    elif all("rmin" in p and "rmax" in p for p in parts):
        made = [_of_range(p, dtype, place) for p in parts]
        scale = np.array([e.scale for e in made], np.float32)
        zero_point = np.array([e.zero_point for e in made], np.int32)
    else:
        raise UnsupportedError(
            "an override without scale and zero point, or range",
            where=place,
            fix="give both, or leave the tensor to calibration",
        )
    if axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return Encoding(dtype, scale, zero_point, axis)


def _of_range(part: dict[str, Any], dtype: str, place: str) -> Encoding:
    low, high = part["rmin"], part["rmax"]
    for end in (low, high):
        # not finite as a float32, or no number at all
        if (not is_int(end) and not isinstance(end, float)) or not abs(end) <= LARGEST_SCALE:
            raise RecipeError(f"rmin, rmax: wanted finite numbers, got {kind(end)}", where=place)
    if low > high:
        raise RecipeError("rmin is above rmax", where=place)
    return Encoding.of_range(low, high, dtype, symmetric=bool(part.get("symmetric")))


def _scalar(value: Any) -> Any:
    """A number, also of an array of one element, which onnxruntime's own tools have."""
    return value.item() if isinstance(value, (np.ndarray, np.generic)) else value
