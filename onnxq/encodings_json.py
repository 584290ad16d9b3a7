"""Encodings as JSON: AIMET's schema 2.0.0, plus the nodes that stay in float.

A flat list in the words of QuantizeLinear::

    {"version": "2.0.0",
     "producer": {"package": "onnxq", "version": "0.1.0"},
     "encodings": [
      {"name": "input", "output_dtype": "uint8", "y_scale": 0.0185, "y_zero_point": 114},
      {"name": "conv.weight", "output_dtype": "int8", "y_scale": [0.01, 0.02], "axis": 0},
      {"name": "fc.weight", "output_dtype": "int4", "y_scale": [[0.1, 0.2]], "axis": 0,
       "block_size": 32}],
     "float_nodes": {"Softmax_7": "its result is an output of the model"}}

`y_zero_point` is left out where every zero point is 0, `axis` where there is one scale per tensor.
With `block_size`, so many neighbours along `axis` share a scale.
`float_nodes` is an addition of onnxq; other programs ignore it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.encoding import DTYPES, Encoding, Encodings, limits
from onnxq.errors import RecipeError, UnsupportedError, did_you_mean
from onnxq.report import write_text
from onnxq.version import __version__

__all__ = ["VERSION", "dumps", "load", "loads", "save"]

VERSION = "2.0.0"

_KEYS = ("version", "producer", "encodings", "float_nodes")
_ENTRY_KEYS = ("name", "output_dtype", "y_scale", "y_zero_point", "axis", "block_size")
_TWO_LEVELS = ("per_block_int_scale", "per_channel_float_scale")
_LARGEST = float(np.finfo(np.float32).max)
_OLD_KEYS = ("bw", "bitwidth", "enc_type", "is_sym", "is_symmetric", "offset", "scale")


def save(encodings: Encodings, path: str | os.PathLike[str]) -> None:
    """Write encodings; the file appears whole or not at all.

    Raises:
        OnnxqError: The file cannot be written.
    """
    write_text(Path(path), dumps(encodings))


def load(path: str | os.PathLike[str]) -> Encodings:
    """Read the encodings that `save`, or another program in schema 2.0.0, wrote.

    Raises:
        RecipeError: The file cannot be read, or an entry means nothing; the entry is named.
        UnsupportedError: Scales of blocks that are integers themselves.
    """
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise RecipeError("no such file", where=path, fix="check the path") from error
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=path) from error
    return loads(text, where=path)


def dumps(encodings: Encodings) -> str:
    """Encodings as JSON text, one entry a line; float32 scales survive exactly.

    Those of tensors that passes derived after calibration are left out.
    """
    producer = {"package": "onnxq", "version": __version__}
    kept = [(n, e) for n, e in encodings.items() if n not in encodings.derived]
    entries = ",\n".join(json.dumps(_entry(n, e)) for n, e in kept)
    return (
        f'{{"version": "{VERSION}",\n'
        f' "producer": {json.dumps(producer)},\n'
        f' "encodings": [\n{entries}],\n'
        f' "float_nodes": {json.dumps(encodings.float_nodes, indent=1)}}}\n'
    )


def loads(text: str | bytes, *, where: object = None) -> Encodings:
    """Encodings from JSON text.

    Args:
        text: The JSON, UTF-8 if in bytes.
        where: What to call it in errors, such as its path.

    Raises:
        RecipeError: Not JSON, another version, or an entry that means nothing; the entry is named.
        UnsupportedError: Scales of blocks that are integers themselves.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"not JSON: {error.msg} in line {error.lineno}, column {error.colno}", where=where
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, huge integers; nested too deeply
        raise RecipeError(f"not JSON: {error}", where=where) from error
    if not isinstance(document, dict):
        raise RecipeError(f"wanted an object with encodings, got {_kind(document)}", where=where)
    version = document.get("version")
    if version != VERSION:
        raise RecipeError(
            f"encodings of version {version!r}, wanted {VERSION!r}",
            where=where,
            fix=f"export them in version {VERSION}",
        )
    _known(document, _KEYS, where)
    entries = document.get("encodings")
    if not isinstance(entries, list):
        raise RecipeError(f"wanted a list of encodings, got {_kind(entries)}", where=where)
    encodings = Encodings()
    for index, entry in enumerate(entries):
        name, place = _place(entry, index, where)
        if name in encodings:
            raise RecipeError("a second encoding of the same name", where=place)
        encodings[name] = _encoding(entry, place)
    encodings.float_nodes = _float_nodes(document.get("float_nodes", {}), where)
    return encodings


def _entry(name: str, encoding: Encoding) -> dict[str, Any]:
    # float64 holds every float32, and json writes the digits that bring a float64 back
    entry: dict[str, Any] = {"name": name, "output_dtype": encoding.dtype}
    entry["y_scale"] = encoding.scale.astype(np.float64).tolist()
    if np.any(encoding.zero_point):
        entry["y_zero_point"] = encoding.zero_point.tolist()
    if encoding.axis is not None:
        entry["axis"] = encoding.axis
    if encoding.block:
        entry["block_size"] = encoding.block
    return entry


def _place(entry: Any, index: int, where: object) -> tuple[str, str]:
    """The name of an entry, and how errors call the entry."""
    place = f"encoding {index + 1}" + ("" if where is None else f" of {where}")
    if not isinstance(entry, dict):
        raise RecipeError(f"wanted an object, got {_kind(entry)}", where=place)
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise RecipeError("an encoding without a name", where=place)
    return name, f"{name}, {place}"


def _encoding(entry: dict[str, Any], place: str) -> Encoding:
    if levels := [k for k in entry if k in _TWO_LEVELS]:
        raise UnsupportedError(
            f"scales in two levels ({levels[0]})",
            where=place,
            fix="give one float scale per block or per channel",
        )
    if old := [k for k in entry if k in _OLD_KEYS]:
        raise RecipeError(
            f"{old[0]!r} belongs to an older version of the schema",
            where=place,
            fix=f"export the encodings in version {VERSION}",
        )
    _known(entry, _ENTRY_KEYS, place)
    for key in ("output_dtype", "y_scale"):
        if key not in entry:
            raise RecipeError(f"{key} is missing", where=place)
    dtype = entry["output_dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RecipeError(
            f"no integer type {dtype!r}", where=place, fix=f"types are {', '.join(DTYPES)}"
        )
    scale = _scale(entry["y_scale"], place)
    axis, block = entry.get("axis"), entry.get("block_size")
    if block is not None and (not _is_int(block) or block < 2):
        raise RecipeError(f"block_size: wanted an integer above 1, got {block!r}", where=place)
    if (block is None) != (scale.ndim < 2):
        got = "lists of scales without a block_size" if block is None else "a block_size"
        raise RecipeError(got, where=place, fix="blocks need nested lists of scales, and a size")
    if axis is not None and not _is_int(axis):
        raise RecipeError(f"axis: wanted an integer, got {_kind(axis)}", where=place)
    if (axis is None) != (scale.ndim == 0):
        got = "one scale with an axis" if axis is not None else "a list of scales without an axis"
        raise RecipeError(got, where=place, fix="a list of scales needs an axis, one scale none")
    zero_point = _zero_point(entry.get("y_zero_point", 0), dtype, scale, place)
    return Encoding(dtype, scale, zero_point, axis, block or 0)


def _numbers(value: Any) -> tuple[list[Any], tuple[int, ...]]:
    """What nested lists hold, and their shape; of ragged lists, lists."""
    items, shape = [value], []
    while items and all(isinstance(i, list) for i in items):
        if len({len(i) for i in items}) > 1:
            break
        shape.append(len(items[0]))
        items = [number for item in items for number in item]
    return items, tuple(shape)


def _scale(value: Any, place: str) -> np.ndarray:
    numbers, shape = _numbers(value)
    if not numbers:
        raise RecipeError("y_scale holds no scale", where=place)
    for number in numbers:
        if not _is_int(number) and not isinstance(number, float):
            raise RecipeError(f"y_scale: wanted a number, got {_kind(number)}", where=place)
        # decided with the float32 that is kept: 1e-50 would be 0, and 1e39 infinite
        if not 0 < number <= _LARGEST or np.float32(number) == 0:
            raise RecipeError(
                f"y_scale: wanted a finite float32 above 0, got {number}", where=place
            )
    return np.array(numbers, np.float32).reshape(shape)


def _zero_point(value: Any, dtype: str, scale: np.ndarray, place: str) -> np.ndarray:
    numbers, shape = _numbers(value)
    if shape and shape != scale.shape:
        raise RecipeError(
            f"y_zero_point has {len(numbers)} values, y_scale has {scale.size}"
            + (" and is no list" if not scale.ndim else "" if scale.ndim == 1 else ", in lists"),
            where=place,
        )
    low, high = limits(dtype)
    for number in numbers:
        if not _is_int(number):
            raise RecipeError(f"y_zero_point: wanted an integer, got {_kind(number)}", where=place)
        if not low <= number <= high:
            raise RecipeError(
                f"y_zero_point: wanted {low} to {high} for {dtype}, got {number}", where=place
            )
    return np.broadcast_to(np.array(numbers, np.int32).reshape(shape), scale.shape).copy()


def _float_nodes(value: Any, where: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise RecipeError("float_nodes: wanted an object of node: reason", where=where)
    return dict(value)


def _known(table: dict[str, Any], keys: tuple[str, ...], where: object) -> None:
    for key in table:
        if key not in keys:
            hint = did_you_mean(key, keys, f"keys are {', '.join(keys)}")
            raise RecipeError(f"no key {key!r}", where=where, fix=hint)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
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
