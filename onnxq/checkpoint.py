"""Layers that are finished, kept in a folder, so that a run that broke off goes on from there."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.errors import OnnxqError
from onnxq.model import Layer, Model
from onnxq.report import write_text
from onnxq.scratch import whole_file

__all__ = ["Checkpoint", "Results", "fingerprint"]


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
        path = self._path(index)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                found = {name: kept[name] for name in kept.files}
        except FileNotFoundError:
            return False
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise OnnxqError(
                "cannot be read", where=path, fix="delete it, and the layer is done again"
            ) from error
        name = layer.weight_tensor.name
        layer.set_weight(found["weight"])
        if "scale" in found:
            encoding = layer.model.encodings[name]
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
            return json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OnnxqError(
                "cannot be read", where=path, fix="delete it, and the layer is done again"
            ) from error

    def keep(self, index: int, found: Any) -> None:
        """Keep what was found; the file appears whole or not at all.

        Raises:
            OnnxqError: It cannot be written.
        """
        write_text(self._path(index), json.dumps(found))

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
