"""Encodings as JSON: AIMET's versions 0.6.1, 1.0.0 and 2.0.0, and onnxruntime's overrides.

What the versions look like is said where they are read and written: `encodings_v1`,
`encodings_v2`, `overrides`.  To each of AIMET's onnxq adds `float_nodes`, the nodes that stay in
float and why; other programs ignore it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from onnxq import encodings_v1, encodings_v2, overrides
from onnxq.encoding import Encodings
from onnxq.encodings_v1 import Channels
from onnxq.entries import kind
from onnxq.errors import RecipeError, did_you_mean
from onnxq.files import read_limited
from onnxq.report import write_text
from onnxq.version import __version__

__all__ = ["OLD", "OVERRIDES", "VERSION", "VERSIONS", "Channels", "dumps", "load", "loads", "save"]

VERSION = "2.0.0"
OVERRIDES = "overrides"
# those that keep weights apart, and do not say along which axis scales run
OLD = ("0.6.1", "1.0.0")
# what is written; 2.1.0, which adds types of float only, is read, too
_LARGEST = 1 << 28  # bytes of a file: a million scales take some 20 MB
VERSIONS = (*OLD, VERSION, OVERRIDES)


def save(
    encodings: Encodings,
    path: str | os.PathLike[str],
    version: str = VERSION,
    weights: Collection[str] | None = None,
) -> None:
    """Write encodings; the file appears whole or not at all.

    Args:
        encodings: The encodings.
        path: The file.
        version: One of `VERSIONS`.
        weights: See `dumps`.

    Raises:
        OnnxqError: The file cannot be written, or the version has no words for an encoding.
    """
    write(dumps(encodings, version, weights), path)


def write(text: str, path: str | os.PathLike[str]) -> None:
    """Write what `dumps` made; the file appears whole or not at all."""
    write_text(Path(path), text)


def load(path: str | os.PathLike[str], channels: Mapping[str, Channels] | None = None) -> Encodings:
    """Read the encodings that `save`, or another program, wrote.

    Args:
        path: The file.
        channels: See `loads`.

    Raises:
        RecipeError: The file cannot be read, or an entry means nothing; the entry is named.
        UnsupportedError: Valid encodings that onnxq does not know.
    """
    try:
        text = read_limited(path, _LARGEST)
    except FileNotFoundError as error:
        raise RecipeError("no such file", where=path, fix="check the path") from error
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=path) from error
    return loads(text, where=path, channels=channels)


def dumps(
    encodings: Encodings, version: str = VERSION, weights: Collection[str] | None = None
) -> str:
    """Encodings as JSON text, one entry a line; float32 scales survive exactly.

    Those of tensors that passes derived after calibration are left out.

    Args:
        encodings: The encodings.
        version: One of `VERSIONS`.
        weights: Names of the model's constants, which versions before 2 keep apart.

    Raises:
        RecipeError: No such version, or one that needs to know which tensors are weights.
        UnsupportedError: The version has no words for an encoding; the tensor is named.
    """
    kept = Encodings({n: e for n, e in encodings.items() if n not in encodings.derived})
    if version not in VERSIONS:
        fix = did_you_mean(version, VERSIONS, f"versions are {', '.join(VERSIONS)}")
        raise RecipeError(f"no version {version!r} of encodings", fix=fix)
    if version == OVERRIDES:
        return _lines(overrides.table(kept))
    if version == VERSION:
        sections: dict[str, Any] = encodings_v2.sections(kept)
    elif weights is None:
        raise RecipeError(
            f"version {version} keeps weights and activations apart",
            fix="give the model that the encodings belong to",
        )
    else:
        sections = encodings_v1.sections(kept, version, weights)
    head = {"version": version, "producer": {"package": "onnxq", "version": __version__}}
    return _lines({**head, **sections, "float_nodes": encodings.float_nodes})


def loads(
    text: str | bytes, *, where: object = None, channels: Mapping[str, Channels] | None = None
) -> Encodings:
    """Encodings from JSON text of any version.

    Args:
        text: The JSON, UTF-8 if in bytes.
        where: What to call it in errors, such as its path.
        channels: Axis and number of channels of the model's weights, which versions before 2 do
            not say.

    Raises:
        RecipeError: Not JSON, no known version, or an entry that means nothing; the entry is named.
        UnsupportedError: Valid encodings that onnxq does not know.
    """
    try:
        document = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"not JSON: {error.msg} in line {error.lineno}, column {error.colno}", where=where
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, huge integers; nested too deeply
        raise RecipeError(f"not JSON: {error}", where=where) from error
    if not isinstance(document, dict):
        raise RecipeError(f"wanted an object with encodings, got {kind(document)}", where=where)
    if "version" not in document and overrides.looks_like_overrides(document):
        return overrides.read(document, where)
    version = document.get("version")
    if version in (VERSION, "2.1.0"):
        return encodings_v2.read(document, where)
    if version in OLD:
        return encodings_v1.read(document, version, channels, where)
    raise RecipeError(
        f"encodings of version {version!r}, wanted {', '.join(VERSIONS[:-1])}",
        where=where,
        fix=f"export them in version {VERSION}",
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand there once each: of two, readers disagree about which counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(k for k, count in Counter(k for k, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


def _lines(document: dict[str, Any]) -> str:
    """JSON with an entry of a list or a table a line."""
    parts = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "]"
        elif isinstance(value, dict) and value and key != "producer":
            rows = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            text = "{\n" + ",\n".join(rows) + "}"
        else:
            text = json.dumps(value)
        parts.append(f"{json.dumps(key)}: {text}")
    return "{" + ",\n ".join(parts) + "}\n"
