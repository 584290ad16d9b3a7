"""AIMET's encodings of version 2: a flat list in the words of QuantizeLinear.

::

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
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxq.encoding import Encoding, Encodings
from onnxq.entries import check_keys, element_type, float_nodes, is_int, kind, name_of
from onnxq.entries import scales as scales_of
from onnxq.entries import zero_points as zero_points_of
from onnxq.errors import RecipeError, UnsupportedError

__all__ = ["read", "sections"]

_KEYS = ("version", "producer", "encodings", "float_nodes")
_ENTRY_KEYS = ("name", "output_dtype", "y_scale", "y_zero_point", "axis", "block_size")
_TWO_LEVELS = ("per_block_int_scale", "per_channel_float_scale")
_OLD_KEYS = ("bw", "bitwidth", "enc_type", "is_sym", "is_symmetric", "offset", "scale")


def sections(encodings: Encodings) -> dict[str, list[dict[str, Any]]]:
    """Encodings as what stands in a file of version 2."""
    return {"encodings": [_entry(name, e) for name, e in encodings.items()]}


def read(document: dict[str, Any], where: object) -> Encodings:
    """The encodings of a file of version 2.

    Raises:
        RecipeError: An entry means nothing; it is named.
        UnsupportedError: Scales of blocks that are integers themselves.
    """
    check_keys(document, _KEYS, where)
    entries = document.get("encodings")
    if not isinstance(entries, list):
        raise RecipeError(f"wanted a list of encodings, got {kind(entries)}", where=where)
    encodings = Encodings()
    for index, entry in enumerate(entries):
        place = f"encoding {index + 1}" + ("" if where is None else f" of {where}")
        name = name_of(entry, place)
        place = f"{name}, {place}"
        if name in encodings or name in encodings.float_tensors:
            raise RecipeError("a second encoding of the same name", where=place)
        dtype = entry.get("output_dtype")
        if isinstance(dtype, str) and dtype.startswith(("float", "bfloat")):
            encodings.float_tensors[name] = dtype
        else:
            encodings[name] = _encoding(entry, place)
    encodings.float_nodes = float_nodes(document, where)
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
            fix="export the encodings anew, all in one version",
        )
    check_keys(entry, _ENTRY_KEYS, place)
    for key in ("output_dtype", "y_scale"):
        if key not in entry:
            raise RecipeError(f"{key} is missing", where=place)
    dtype = element_type(entry["output_dtype"], place)
    scale = scales_of(entry["y_scale"], place, "y_scale")
    axis, block = entry.get("axis"), entry.get("block_size")
    if block is not None and (not is_int(block) or block < 2):
        raise RecipeError(f"block_size: wanted an integer above 1, got {block!r}", where=place)
    if (block is None) != (scale.ndim < 2):
        got = "lists of scales without a block_size" if block is None else "a block_size"
        raise RecipeError(got, where=place, fix="blocks need nested lists of scales, and a size")
    if axis is not None and not is_int(axis):
        raise RecipeError(f"axis: wanted an integer, got {kind(axis)}", where=place)
    if (axis is None) != (scale.ndim == 0):
        got = "one scale with an axis" if axis is not None else "a list of scales without an axis"
        raise RecipeError(got, where=place, fix="a list of scales needs an axis, one scale none")
    zero = zero_points_of(entry.get("y_zero_point", 0), dtype, scale, place, "y_zero_point")
    return Encoding(dtype, scale, zero, axis, block or 0)
