"""ONNX files in and out: external data kept inside the folder, outputs whole or not at all."""

from __future__ import annotations

import math
import os
import stat
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper

from onnxq.errors import ModelError

__all__ = [
    "TWO_GB",
    "external_files",
    "external_tensors",
    "is_ort",
    "read_proto",
    "serialized_size",
    "stored_bytes",
    "write_proto",
]

# protobuf refuses messages of 2 GiB; some room for names and structure.
TWO_GB = (1 << 31) - (1 << 24)


def read_proto(path: Path) -> onnx.ModelProto:
    """Read a model file and the external data that it refers to.

    Raises:
        ModelError: The file is missing, is no ONNX model, or refers to data outside its folder.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # a pipe or a device could only be read once, or never ends
            kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
            raise ModelError(f"is a {kind}, not a model", where=path, fix="give the .onnx file")
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
    for tensor in external_tensors(proto):
        _check_external(tensor, path)
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


def _check_external(tensor: onnx.TensorProto, path: Path) -> None:
    """Refuse data that lies outside the model's folder or is not there."""
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


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes that the values of a tensor take; 0 if its type is not known."""
    kind = tensor.data_type
    if kind not in onnx.helper.get_all_tensor_dtypes():
        return 0
    name = onnx.TensorProto.DataType.Name(kind)
    bits = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.get(name)
    bits = bits or 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    return int(-(-math.prod(tensor.dims) * bits // 8))


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
    data = path.with_name(path.name + ".data")
    count = 0
    while data.resolve() in protected:
        count += 1
        data = path.with_name(f"{path.name}.{count}.data")
    try:
        with tempfile.TemporaryDirectory(prefix=".onnxq-", dir=folder) as scratch:
            part = Path(scratch) / path.name
            if serialized_size(proto) > TWO_GB:
                onnx.save_model(
                    proto, os.fspath(part), save_as_external_data=True, location=data.name
                )
            else:
                part.write_bytes(proto.SerializeToString())
            _check(part, proto)
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
            if (part.parent / data.name).exists():
                os.replace(part.parent / data.name, data)
            os.replace(part, path)
    except OSError as error:
        raise ModelError(
            f"cannot be written: {error.strerror or error}",
            where=path,
            fix="check the folder's permissions and the space on the disk",
        ) from error


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
    try:
        onnx.checker.check_model(os.fspath(path) if known is proto else known)
    except onnx.checker.ValidationError as error:
        line = str(error).strip().splitlines()[0]
        raise ModelError(f"the result is not valid ONNX: {line}", where=path.name) from error


def _is_tensor(info: onnx.ValueInfoProto) -> bool:
    return str(info.type.WhichOneof("value")) == "tensor_type"
