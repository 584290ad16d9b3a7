"""Layers that are finished, kept in a folder, so that a run that broke off goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.encoding import Encoding
from onnxq.errors import CalibrationError, OnnxqError
from onnxq.files import read_limited
from onnxq.model import Layer, Model
from onnxq.readers import Stored, read_npz
from onnxq.report import write_text
from onnxq.scratch import whole_file

__all__ = ["Checkpoint", "Results", "fingerprint"]

_LARGEST = 1 << 24  # bytes of what was found of a layer


def fingerprint(model: Model, *parts: object) -> str:
    """SHA-256 of a model, its encodings and what else decides about a result, in hexadecimal."""
    sha = hashlib.sha256(model.digest().encode())
    for name, encoding in sorted(model.encodings.tensors.items()):
        sha.update(f"{name} {encoding.dtype} {encoding.axis}".encode())
        sha.update(encoding.scale.tobytes())
        sha.update(encoding.zero_point.tobytes())
    for part in parts:
        sha.update(repr(part).encode())
    return sha.hexdigest()


class Checkpoint:
    """Weights, biases and scales of finished layers, one file each.

    Args:
        folder: Where they are kept, in a folder of its own for each key; made if need be.
        key: What the result depends on, see `fingerprint`: nothing else is taken up again.

    Raises:
        OnnxqError: The folder cannot be written.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = _made(folder, key)

    def restore(self, layer: Layer, index: int) -> bool:
        """Give a layer what was kept of it; False if nothing was."""
        path, fix = self._path(index), "delete it, and the layer is done again"
        if not path.exists():
            return False
        name = layer.weight_tensor.name
        encoding = layer.model.encodings.get(name)
        try:
            stored = read_npz(path)
            if not _fits(stored, layer, encoding):
                raise OnnxqError("does not hold this layer", where=path, fix=fix)
            found = {key: array.read().copy() for key, array in stored.items()}
        except CalibrationError as error:
            raise OnnxqError(f"cannot be read: {error.what}", where=path, fix=fix) from error
        if not all(np.isfinite(a).all() for a in found.values()) or (
            "scale" in found and found["scale"].min() <= 0
        ):
            raise OnnxqError("holds numbers that no layer has", where=path, fix=fix)
        layer.set_weight(found["weight"])
        if encoding is not None and "scale" in found:
            layer.model.encodings[name] = replace(encoding, scale=found["scale"])
        if "bias" in found:
            layer.set_bias(found["bias"])
        return True

    def keep(self, layer: Layer, index: int) -> None:
        """Keep a finished layer; the file appears whole or not at all.

        Raises:
            OnnxqError: It cannot be written.
        """
        path = self._path(index)
        arrays = {"weight": layer.weight}
        if (encoding := layer.model.encodings.get(layer.weight_tensor.name)) is not None:
            arrays["scale"] = encoding.scale
        if layer.bias is not None:
            arrays["bias"] = layer.bias
        try:
            with whole_file(path) as part, part.open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # of keywords alone
        except OSError as error:
            raise _unwritable(path, error) from error

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:04d}.npz"


def _fits(stored: Mapping[str, Stored], layer: Layer, encoding: Encoding | None) -> bool:
    """Whether arrays are, by their headers, what `Checkpoint.keep` writes of a layer."""
    wanted: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        "weight": (layer.weight.shape, layer.weight.dtype)
    }
    if encoding is not None:
        wanted["scale"] = (encoding.scale.shape, encoding.scale.dtype)
    if layer.bias is not None:
        wanted["bias"] = (layer.bias.shape, layer.bias.dtype)
    elif "bias" in stored:  # which it got
        wanted["bias"] = ((layer.output_channels,), layer.weight.dtype)
    return {name: (a.shape, a.dtype) for name, a in stored.items()} == wanted


class Results:
    """What was found of each layer, plain JSON, one file each.

    Args:
        folder: Where they are kept, in a folder of its own for each key; made if need be.
        key: What the results depend on: nothing else is taken up again.

    Raises:
        OnnxqError: The folder cannot be written.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder = _made(folder, key)

    def restore(self, index: int) -> Any:
        """What was kept of a layer; None if nothing was."""
        path = self._path(index)
        try:
            return json.loads(read_limited(path, _LARGEST))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise OnnxqError(
                "cannot be read", where=path, fix="delete it, and the layer is done again"
            ) from error

    def keep(self, index: int, found: Any) -> None:
        """Keep what was found; the file appears whole or not at all.

        Raises:
            OnnxqError: It cannot be written.
        """
        write_text(self._path(index), json.dumps(found))

    def refuse(self, index: int) -> OnnxqError:
        """What to say where that is not what was found of a layer."""
        return OnnxqError(
            "does not hold this layer",
            where=self._path(index),
            fix="delete it, and the layer is done again",
        )

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:04d}.json"


def _made(folder: Path, key: str) -> Path:
    """The folder for a key, made if need be."""
    found = folder / key[:16]
    try:
        found.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return found


def _unwritable(path: Path, error: OSError) -> OnnxqError:
    return OnnxqError(
        f"cannot be written: {error.strerror}", where=path, fix="give --resume another folder"
    )
