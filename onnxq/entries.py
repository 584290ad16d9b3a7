"""What every schema of encodings has: names, integers, scales and zero points, checked as read."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxq.encoding import DTYPES, limits
from onnxq.errors import RecipeError, did_you_mean

__all__ = [
    "LARGEST_SCALE",
    "check_keys",
    "element_type",
    "float_nodes",
    "is_int",
    "kind",
    "name_of",
    "numbers",
    "scales",
    "zero_points",
]

LARGEST_SCALE = float(np.finfo(np.float32).max)


def name_of(entry: Any, place: str) -> str:
    """The name that an entry of a list gives.

    Raises:
        RecipeError: It is no object, or has no name.
    """
    if not isinstance(entry, dict):
        raise RecipeError(f"wanted an object, got {kind(entry)}", where=place)
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise RecipeError("an encoding without a name", where=place)
    return name


def check_keys(table: dict[str, Any], keys: tuple[str, ...], where: object) -> None:
    """Refuse keys that mean nothing."""
    for key in table:
        if key not in keys:
            hint = did_you_mean(key, keys, f"keys are {', '.join(keys)}")
            raise RecipeError(f"no key {key!r}", where=where, fix=hint)


def element_type(dtype: Any, place: str) -> str:
    """An integer type that encodings may have."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RecipeError(
            f"no integer type {dtype!r}",
            where=place,
            fix="types are int2 to int16, uint2 to uint16 and int32",
        )
    return dtype


def numbers(value: Any) -> tuple[list[Any], tuple[int, ...]]:
    """What nested lists hold, and their shape; of ragged lists, lists."""
    items, shape = [value], []
    while items and all(isinstance(i, list) for i in items):
        if len({len(i) for i in items}) > 1:
            break
        shape.append(len(items[0]))
        items = [number for item in items for number in item]
    return items, tuple(shape)


def scales(value: Any, place: str, key: str) -> np.ndarray:
    """Scales as float32, in the shape of the lists that hold them."""
    found, shape = numbers(value)
    if not found:
        raise RecipeError(f"{key} holds no scale", where=place)
    for number in found:
        if not is_int(number) and not isinstance(number, float):
            raise RecipeError(f"{key}: wanted a number, got {kind(number)}", where=place)
        # decided with the float32 that is kept: 1e-50 would be 0, and 1e39 infinite
        if not 0 < number <= LARGEST_SCALE or np.float32(number) == 0:
            raise RecipeError(f"{key}: wanted a finite float32 above 0, got {number}", where=place)
    return np.array(found, np.float32).reshape(shape)


def zero_points(value: Any, dtype: str, scale: np.ndarray, place: str, key: str) -> np.ndarray:
    """Zero points as int32 in the shape of the scales; one may stand for all."""
    found, shape = numbers(value)
    if shape and shape != scale.shape:
        raise RecipeError(
            f"{key} has {len(found)} values, the scale has {scale.size}"
            + (" and is no list" if not scale.ndim else "" if scale.ndim == 1 else ", in lists"),
            where=place,
        )
    low, high = limits(dtype)
    for number in found:
        if not is_int(number):
            raise RecipeError(f"{key}: wanted an integer, got {kind(number)}", where=place)
        if not low <= number <= high:
            raise RecipeError(
                f"{key}: wanted {low} to {high} for {dtype}, got {number}", where=place
            )
    return np.broadcast_to(np.array(found, np.int32).reshape(shape), scale.shape).copy()


def float_nodes(document: dict[str, Any], where: object) -> dict[str, str]:
    """The nodes that stay in float, an addition of onnxq to every schema."""
    value = document.get("float_nodes", {})
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise RecipeError("float_nodes: wanted an object of node: reason", where=where)
    return dict(value)


def is_int(value: Any) -> bool:
    """Whether a value of JSON is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def kind(value: Any) -> str:
    """What a value of JSON is, in words."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        float: "a number",
    }
    if value is None:
        return "nothing"
    return kinds.get(type(value), "an integer" if isinstance(value, int) else type(value).__name__)
