"""AIMET's encodings of versions 0.6.1 and 1.0.0: activations and parameters apart.

0.6.1 has tensors by name, and an entry per channel; 1.0.0 has lists::

    {"version": "0.6.1",
     "activation_encodings": {"t": [{"bitwidth": 8, "dtype": "int", "is_symmetric": "False",
       "min": -2.1, "max": 2.6, "scale": 0.0185, "offset": -114}]},
     "param_encodings": {"conv.weight": [{...}, {...}]}}

    {"version": "1.0.0",
     "activation_encodings": [{"name": "t", "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 8,
       "is_sym": false, "scale": [0.0185], "offset": [-114]}],
     "param_encodings": [{"name": "conv.weight", "enc_type": "PER_CHANNEL", ...}]}

Offsets are negative and count from the unsigned grid, x = (q + offset) * scale with q from 0, also
where `is_sym` says that the type is signed.  The axis of the channels is not in the file: it is
that of the operator that reads the weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.encoding import DTYPES, Encoding, Encodings
from onnxq.entries import element_type, float_nodes, is_int, kind, name_of, scales, zero_points
from onnxq.errors import RecipeError, UnsupportedError

__all__ = ["Channels", "read", "sections"]

_SECTIONS = ("activation_encodings", "param_encodings")
_NEEDED = {"0.6.1": ("scale", "offset", "is_symmetric"), "1.0.0": ("scale", "offset", "is_sym")}
_FOREIGN = {
    "0.6.1": ("bw", "enc_type", "is_sym", "output_dtype", "y_scale", "y_zero_point"),
    "1.0.0": ("bitwidth", "is_symmetric", "output_dtype", "y_scale", "y_zero_point"),
}


@dataclass(frozen=True)
class Channels:
    """Which axis of a weight its channels run along, and how many there are."""

    axis: int
    count: int


def sections(encodings: Encodings, version: str, weights: Collection[str]) -> dict[str, Any]:
    """Encodings as what stands in a file of a version 1.

    Args:
        encodings: The encodings.
        version: 0.6.1 or 1.0.0.
        weights: Names of the tensors that are constants of the model.

    Raises:
        UnsupportedError: Scales in blocks, which 0.6.1 does not know.
    """
    make = _entry if version == "1.0.0" else _entries
    found: dict[str, dict[str, Any]] = {key: {} for key in _SECTIONS}
    for name, encoding in encodings.items():
        found[_SECTIONS[name in weights]][name] = make(name, encoding)
    if version == "0.6.1":
        return found
    return {key: list(entries.values()) for key, entries in found.items()}


def read(
    document: dict[str, Any],
    version: str,
    channels: Mapping[str, Channels] | None,
    where: object,
) -> Encodings:
    """The encodings of a file of a version 1.

    Args:
        document: What the file holds.
        version: 0.6.1 or 1.0.0.
        channels: What the model says of its weights; None if there is no model.
        where: What to call the file in errors.

    Raises:
        RecipeError: An entry means nothing, or is of another layout; it is named.
        UnsupportedError: Scales in two levels, or zero points between integers.
    """
    encodings = Encodings()
    for section in _SECTIONS:
        for name, parts, place in _items(document, section, version, where):
            if name in encodings or name in encodings.float_tensors:
                raise RecipeError("a second encoding of the same name", where=place)
            kinds = {str(p.get("dtype")) for p in parts}
            if len(kinds) > 1:
                raise RecipeError("its channels are of different types", where=place)
            written = str(kinds.pop()).lower()
            if written == "float":
                bits = parts[0].get("bw" if version == "1.0.0" else "bitwidth")
                encodings.float_tensors[name] = f"float{bits}"
            elif written == "int":
                axis = 1 if section == _SECTIONS[0] else None
                known = (channels or {}).get(name, None if axis is None else Channels(axis, 0))
                encodings[name] = _encoding(parts, version, known, place)
            else:
                raise RecipeError(
                    f"dtype: wanted int or float, got {parts[0].get('dtype')!r}", where=place
                )
    encodings.float_nodes = float_nodes(document, where)
    return encodings


# ---------------------------------------------------------------------- reading


def _items(
    document: dict[str, Any], section: str, version: str, where: object
) -> Iterator[tuple[str, list[dict[str, Any]], str]]:
    """Name, entries (one, or one per channel) and place of each encoding of a section."""
    entries = document.get(section)
    if not isinstance(entries, dict if version == "0.6.1" else list):
        wanted = "an object of entries by name" if version == "0.6.1" else "a list of entries"
        raise RecipeError(
            f"{section}: wanted {wanted} in version {version}, got {kind(entries)}", where=where
        )
    pairs: Any = entries.items() if isinstance(entries, dict) else enumerate(entries)
    for key, entry in pairs:
        place = f"{section}" + ("" if where is None else f" of {where}")
        if version == "0.6.1":
            name, parts = key, entry
            place = f"{name}, {place}"
            if not isinstance(parts, list) or not parts:
                raise RecipeError(f"wanted a list of channels, got {kind(parts)}", where=place)
            for part in parts:
                if not isinstance(part, dict):
                    raise RecipeError(f"wanted an object, got {kind(part)}", where=place)
        else:
            name, parts = name_of(entry, f"entry {key + 1}, {place}"), [entry]
            place = f"{name}, {place}"
        for part in parts:
            if other := [k for k in part if k in _FOREIGN[version]]:
                raise RecipeError(
                    f"{other[0]!r} is no key of version {version}",
                    where=place,
                    fix="export the encodings anew, all in one version",
                )
        yield name, parts, place


def _encoding(
    parts: list[dict[str, Any]], version: str, channels: Channels | None, place: str
) -> Encoding:
    for key in _NEEDED[version]:
        if any(key not in p for p in parts):
            raise RecipeError(f"{key} is missing", where=place)
    first, old = parts[0], version == "0.6.1"
    bits, signed = first.get("bitwidth" if old else "bw"), first[_NEEDED[version][2]]
    signed = {"True": True, "False": False}.get(signed, signed) if old else signed
    if not isinstance(bits, int) or not isinstance(signed, bool):
        raise RecipeError(
            f"wanted a number of bits and a symmetry, got {bits!r} and {signed!r}", where=place
        )
    for part in parts[1:]:
        if any(part.get(k) != first.get(k) for k in ("bitwidth", "is_symmetric")):
            raise RecipeError("its channels are of different types", where=place)
    dtype = element_type(f"int{bits}" if signed else f"uint{bits}", place)
    if any(p.get("zero_point_shift") for p in parts):
        raise UnsupportedError("zero points between integers (zero_point_shift)", where=place)
    scale = scales([p["scale"] for p in parts] if old else first["scale"], place, "scale")
    offset = [p["offset"] for p in parts] if old else first["offset"]
    zero = zero_points(_shifted(offset, bits if signed else 0), dtype, scale, place, "-offset")
    scale, zero = scale.reshape(-1), zero.reshape(-1)
    granularity = first.get("enc_type", "PER_CHANNEL" if scale.size > 1 else "PER_TENSOR")
    if granularity == "PER_TENSOR":
        if scale.size > 1:
            raise RecipeError(f"PER_TENSOR with {scale.size} scales", where=place)
        return Encoding(dtype, scale.reshape(()), zero.reshape(()))
    if granularity not in ("PER_CHANNEL", "PER_BLOCK"):
        raise UnsupportedError(f"encodings of type {granularity}", where=place)
    if channels is None:
        raise RecipeError(
            f"version {version} does not say along which axis its scales run",
            where=place,
            fix="give the model that the file belongs to",
        )
    if granularity == "PER_CHANNEL":
        return Encoding(dtype, scale, zero, channels.axis)
    return _blocks(Encoding(dtype, scale, zero, 0), first.get("block_size"), channels, place)


def _shifted(offset: Any, bits: int) -> Any:
    """Zero points of offsets: integers where they are whole, as AIMET writes floats."""
    if isinstance(offset, list):
        return [_shifted(o, bits) for o in offset]
    if isinstance(offset, float) and offset.is_integer():
        offset = int(offset)
    return -offset - (1 << bits - 1 if bits else 0) if is_int(offset) else offset


def _blocks(flat: Encoding, size: Any, channels: Channels, place: str) -> Encoding:
    """Of a matrix: the file has the scales of a channel side by side, whichever axis that is."""
    if not is_int(size) or size < 2:
        raise RecipeError(f"block_size: wanted an integer above 1, got {size!r}", where=place)
    if channels.axis not in (0, 1) or not channels.count or flat.scale.size % channels.count:
        raise RecipeError(
            f"{flat.scale.size} scales in blocks for {channels.count} channels", where=place
        )
    scale, zero = (a.reshape(channels.count, -1) for a in (flat.scale, flat.zero_point))
    if channels.axis == 1:
        scale, zero = np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T)
    return Encoding(flat.dtype, scale, zero, 1 - channels.axis, size)


# ---------------------------------------------------------------------- writing


def _offsets(encoding: Encoding) -> np.ndarray:
    """Offsets, which count from the unsigned grid."""
    bits, signed = DTYPES[encoding.dtype]
    return -encoding.zero_point.astype(np.int64) - (1 << bits - 1 if signed else 0)


def _entry(name: str, encoding: Encoding) -> dict[str, Any]:
    scale, offset = encoding.scale.astype(np.float64), _offsets(encoding)
    if encoding.block and encoding.axis == 0:
        scale, offset = scale.T, offset.T
    granularity = "PER_TENSOR" if encoding.axis is None else "PER_CHANNEL"
    entry = {
        "name": name,
        "dtype": "INT",
        "enc_type": "PER_BLOCK" if encoding.block else granularity,
        "bw": encoding.bits,
        "is_sym": DTYPES[encoding.dtype][1],
        "scale": scale.reshape(-1).tolist(),
        "offset": offset.reshape(-1).tolist(),
    }
    return {**entry, "block_size": encoding.block} if encoding.block else entry


def _entries(name: str, encoding: Encoding) -> list[dict[str, Any]]:
    if encoding.block:
        raise UnsupportedError(
            "version 0.6.1 knows no scales in blocks", where=name, fix="take version 2.0.0"
        )
    bits, signed = DTYPES[encoding.dtype]
    top = (1 << bits) - 1
    pairs = zip(
        encoding.scale.astype(np.float64).reshape(-1).tolist(),
        _offsets(encoding).reshape(-1).tolist(),
        strict=True,
    )
    return [
        {
            "bitwidth": bits,
            "dtype": "int",
            "is_symmetric": str(signed),
            "min": scale * offset,
            "max": scale * (top + offset),
            "scale": scale,
            "offset": offset,
        }
        for scale, offset in pairs
    ]
