"""ONNX files in and out: external data kept inside the folder, outputs whole or not at all."""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper

from onnxq.errors import ModelError
from onnxq.limits import memory
from onnxq.scratch import Scratch, alone, claim, retire, synced, whole_file
from onnxq.well_formed import check_well_formed

__all__ = [
    "TWO_GB",
    "external_files",
    "external_tensors",
    "file_bytes",
    "is_ort",
    "read_proto",
    "serialized_size",
    "stored_bytes",
    "write_proto",
]

# protobuf refuses messages of 2 GiB; some room for names and structure.
TWO_GB = (1 << 31) - (1 << 24)
_LARGEST = (1 << 31) - 1  # bytes of a file that protobuf reads


def read_proto(path: Path) -> onnx.ModelProto:
    """Read a model file and the external data that it refers to.

    Raises:
        ModelError: The file is missing, is no ONNX model, or refers to data outside its folder.
    """
    try:
        mode, size = (found := os.stat(path)).st_mode, found.st_size
        if not stat.S_ISREG(mode):  # a pipe or a device could only be read once, or never ends
            kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
            raise ModelError(f"is a {kind}, not a model", where=path, fix="give the .onnx file")
        if size > _LARGEST:
            raise ModelError(
                f"is of {size >> 30} GiB, and an ONNX file has less than 2",
                where=path,
                fix="export it with external data",
            )
        proto = onnx.load(os.fspath(path), format="protobuf", load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError("no such file", where=path, fix="check the path") from error
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=path) from error
    except (DecodeError, ValueError, UnicodeDecodeError) as error:
        if is_ort(path):
            raise ModelError(
                "is a model in ORT format", where=path, fix="give the .onnx that it was made from"
            ) from error
        raise ModelError(
            "is not an ONNX model, or is cut off", where=path, fix="export or copy it again"
        ) from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError("holds no ONNX graph", where=path, fix="export the model again")
    check_well_formed(proto, path)
    if (total := sum(_check_external(t, path) for t in external_tensors(proto))) > memory():
        raise ModelError(
            f"its external data take {total >> 30} GiB, more than there is memory", where=path
        )
    try:
        external_data_helper.load_external_data_for_model(proto, os.fspath(path.parent or "."))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(f"external data cannot be read: {error}", where=path) from error
    return proto


def is_ort(path: Path) -> bool:
    """Whether a file is in onnxruntime's own format."""
    with path.open("rb") as stream:
        return stream.read(8)[4:] == b"ORTM"


def external_tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The tensors whose values lie in another file."""
    tensors = external_data_helper._get_all_tensors(proto)
    return [t for t in tensors if external_data_helper.uses_external_data(t)]


def _check_external(tensor: onnx.TensorProto, path: Path) -> int:
    """Refuse data that lies outside the model's folder or is not there; its bytes."""
    info = {e.key: e.value for e in tensor.external_data}
    location = info.get("location", "")
    folder = path.parent.resolve()
    where = f"tensor {tensor.name} of {path}"
    try:
        target = (folder / location).resolve()
        there = target.stat().st_size if target.is_file() else None
    except (OSError, ValueError, RuntimeError) as error:  # too long, with a zero byte, a link loop
        raise ModelError(
            "external data has no valid path", where=where, fix="export the model again"
        ) from error
    if not location or os.path.isabs(location) or not target.is_relative_to(folder):
        raise ModelError(
            f"external data {location!r} lies outside the model's folder",
            where=where,
            fix="put the data beside the model",
        )
    if there is None:
        raise ModelError(
            f"external data {location} is missing", where=where, fix="copy it beside the model"
        )
    try:
        start, length = int(info.get("offset", 0)), int(info.get("length", 0))
    except ValueError as error:
        raise ModelError(
            "external data has no valid offset or length", where=where, fix="export the model again"
        ) from error
    if start < 0 or length < 0 or max(length, stored_bytes(tensor)) > there - start:
        raise ModelError(f"external data {location} is cut off", where=where, fix="copy it again")
    return length or there - start


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that the values of a tensor take; 0 if its type is not known."""
    kind = tensor.data_type
    if kind not in onnx.helper.get_all_tensor_dtypes():
        return 0
    name = onnx.TensorProto.DataType.Name(kind)
    bits = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.get(name)
    bits = bits or 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    return int(-(-math.prod(tensor.dims) * bits // 8))


def file_bytes(path: Path) -> int:
    """The size of a model file and of the external data that it refers to."""
    return path.stat().st_size + sum(f.stat().st_size for f in external_files(path))


def external_files(path: Path | None) -> set[Path]:
    """The external data files that a model file refers to, resolved."""
    if path is None or not path.is_file():
        return set()
    try:
        proto = onnx.load(os.fspath(path), format="protobuf", load_external_data=False)
    except (OSError, DecodeError, ValueError):  # something else has taken its place
        return set()
    files = set()
    for tensor in external_tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                with suppress(OSError, ValueError, RuntimeError):  # no path: refused when read
                    files.add((path.parent / entry.value).resolve())
    return files


def serialized_size(proto: onnx.ModelProto) -> int:
    """Bytes of the weights, an estimate of the file that does not serialize it."""
    return sum(
        len(t.raw_data) or 8 * (len(t.float_data) + len(t.int64_data) + len(t.int32_data))
        for t in external_data_helper._get_all_tensors(proto)
    )


def write_proto(proto: onnx.ModelProto, path: Path, *, protected: Collection[Path] = ()) -> None:
    """Write a model beside its destination, check it, then rename it into place.

    Args:
        proto: The model.  Its weights move to the external file if it is larger than 2 GB.
        path: Where the model is to appear.
        protected: Files that must not be overwritten (the input's external data).

    Raises:
        ModelError: It is not valid ONNX or cannot be written.
    """
    folder = path.parent
    if not folder.is_dir():
        raise ModelError("no such folder", where=folder, fix="create it first")
    try:
        if serialized_size(proto) > TWO_GB:
            _write_in_two(proto, path, protected)
        else:
            with whole_file(path) as part:
                part.write_bytes(proto.SerializeToString())
                _check(part, proto)
    except OSError as error:
        raise ModelError(
            f"cannot be written: {error.strerror or error}",
            where=path,
            fix="check the folder's permissions and the space on the disk",
        ) from error


def _write_in_two(proto: onnx.ModelProto, path: Path, protected: Collection[Path]) -> None:
    """Write a model and its weights; the file that refers to them is what puts both into place.

    So the weights take a name that is free, and those of the model that is replaced go last.
    """
    with Scratch(path.parent) as scratch:
        part = scratch / path.name
        data = next(
            d for d in _data_files(path) if d.resolve() not in protected and claim(scratch, part, d)
        )
        onnx.save_model(proto, os.fspath(part), save_as_external_data=True, location=data.name)
        _check(part, proto)
        synced(scratch / data.name)
        synced(part)
        os.replace(scratch / data.name, data)
        with alone(path.parent):
            for old in external_files(path) - {*protected}:
                if old.parent == path.parent.resolve() and _is_data_of(path, old):
                    retire(scratch, part, old)
            os.replace(part, path)


def _data_files(path: Path) -> Iterator[Path]:
    """The names that the weights of a model file may have, in order."""
    yield path.with_name(f"{path.name}.data")
    yield from (path.with_name(f"{path.name}.{i}.data") for i in count(1))


def _is_data_of(path: Path, data: Path) -> bool:
    return re.fullmatch(re.escape(path.name) + r"(\.[0-9]+)?\.data", data.name) is not None


def _is_text(name: str) -> bool:
    """Whether a path is text, not bytes that only the file system understands."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def _check(path: Path, proto: onnx.ModelProto) -> None:
    """Refuse what is not valid ONNX.

    A shape may be missing where a rank is not known, whatever onnx.checker says of the inputs and
    outputs of a graph.
    """
    known = proto
    ends = [i.type.tensor_type for i in (*proto.graph.input, *proto.graph.output) if _is_tensor(i)]
    if not all(end.HasField("shape") for end in ends):
        known = onnx.ModelProto()
        known.CopyFrom(proto)
        for info in filter(_is_tensor, (*known.graph.input, *known.graph.output)):
            info.type.tensor_type.shape.SetInParent()
    name = os.fspath(path)
    try:
        if known is not proto:
            onnx.checker.check_model(known)
        else:
            # a name that is no text cannot be handed on; data beside the model must be found by one
            onnx.checker.check_model(name if _is_text(name) else path.read_bytes())
    except onnx.checker.ValidationError as error:
        line = str(error).strip().splitlines()[0]
        raise ModelError(f"the result is not valid ONNX: {line}", where=path.name) from error


def _is_tensor(info: onnx.ValueInfoProto) -> bool:
    return bool(info.type.HasField("tensor_type"))
