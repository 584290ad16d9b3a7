"""onnxruntime behind a small typed face: the only file that imports it."""

from __future__ import annotations

import difflib
import importlib.metadata
import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort

from onnxq.errors import CalibrationError, ModelError, OnnxqError, UnsupportedError
from onnxq.model_io import TWO_GB, serialized_size
from onnxq.scratch import Scratch
from onnxq.signature import TensorSpec

__all__ = [
    "EXTERNAL_FOLDER",
    "KEEP_INT8",
    "REPLAY",
    "SAVED_ONLY",
    "Level",
    "Session",
    "Style",
    "cores",
    "required_operators",
    "save_ort",
    "versions",
]

# What onnxruntime says where it is the file that it cannot write.
_UNWRITTEN = "Failed to (write|save)|[Ss]erializ"

Style = Literal["fixed", "runtime"]
Level = Literal["disabled", "basic", "extended", "all"]

_LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

# onnxruntime's names of the element types that numpy has, too
_DTYPES: dict[str, np.dtype] = {"tensor(float)": np.dtype("f4"), "tensor(double)": np.dtype("f8")}
_DTYPES |= {
    f"tensor({name})": np.dtype(name)
    for name in (
        *("bool", "float16", "complex64", "complex128"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
}

# The session configuration entry: where external data of a serialized model lies
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
# Others: int8 activations stay int8, as on ARM, where x64 would make them uint8; optimizations that
# an .ort file of the style `runtime` holds are applied as it is loaded; an .onnx gets these alone
KEEP_INT8 = {"session.qdqisint8allowed": "1"}
REPLAY = {"session.enable_saved_runtime_optimizations": "1"}
SAVED_ONLY = {"optimization.minimal_build_optimizations": "apply"}
_SAVE_ORT = {"session.save_model_format": "ORT"}
# A place in onnxruntime's source: file and line, then the name or the whole signature of a function
_SOURCE = re.compile(
    r"(?:/\S*/)?\w+\.(?:cc|h):\d+ "
    r"(?:[^()]*[\w>]\((?:[^()]|\([^()]*\))*\)(?:\([^()]*\))?"
    r"(?: const)?(?: \[with [^\]]*\])? |\w+ )?"
)
_FATAL = 4  # onnxruntime prints what it raises, too; what it raises is enough


class Session:
    """A model ready to run on the CPU.

    Runs may overlap: any number of threads may call `run` at the same time.

    Args:
        model: A ModelProto, serialized or not, or the path of an .onnx or .ort file.
        outputs: Names of the tensors to fetch, in order: graph outputs or any tensor that a node of
            the main graph puts out. None fetches the graph outputs.
        threads: Threads within an operator; 0 lets onnxruntime take every core.
        level: How far onnxruntime optimizes the graph.
        optimized_path: Where to write the optimized model; None does not write it.
        config: Session configuration entries of onnxruntime, such as
            ``{"session.intra_op.allow_spinning": "0"}``.

    Raises:
        ModelError: The model cannot be read, is not valid, or has no tensor of a wanted name.
    """

    def __init__(
        self,
        model: bytes | str | os.PathLike[str] | onnx.ModelProto,
        *,
        outputs: Sequence[str] | None = None,
        threads: int = 0,
        level: Level = "all",
        optimized_path: str | os.PathLike[str] | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(model, onnx.ModelProto):
            if serialized_size(model) > TWO_GB:  # protobuf cannot serialize it: by way of a file
                scratch = Scratch()
                scratch.lasts(self)
                model = _spilled(model, os.fspath(scratch.path))
            else:
                model = model.SerializeToString()
        self._where = None if isinstance(model, bytes) else os.fspath(model)
        self.threads = threads
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = threads
        options.graph_optimization_level = _LEVELS[level]
        if optimized_path is not None:
            options.optimized_model_filepath = os.fspath(optimized_path)
        for key, value in (config or {}).items():
            options.add_session_config_entry(key, value)

        source = model if isinstance(model, bytes) else os.fspath(model)
        if outputs is not None:
            source = _exposed(source, outputs)
            if self._where is not None and isinstance(source, bytes):
                # bytes do not say where their external data lies
                folder = os.path.dirname(os.path.abspath(self._where))
                options.add_session_config_entry(EXTERNAL_FOLDER, folder)
        self._session = self._load(source, options)
        nodes = {o.name: o for o in self._session.get_outputs()}
        self._names = list(dict.fromkeys(nodes if outputs is None else outputs))
        for name in self._names:
            if name not in nodes:
                raise _unknown(name, nodes)
        self.inputs = [_spec(i) for i in self._session.get_inputs()]
        self.outputs = [_spec(nodes[name]) for name in self._names]

    @property
    def provider(self) -> str:
        """The execution provider that nodes run on first."""
        return str(self._session.get_providers()[0])

    def _load(self, source: bytes | str, options: ort.SessionOptions) -> Any:
        try:
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no other base
            if self._where is not None and not Path(self._where).is_file():
                raise ModelError(
                    "no such model", where=self._where, fix="check the path"
                ) from error
            if options.optimized_model_filepath and re.search(_UNWRITTEN, says := _message(error)):
                raise OnnxqError(
                    f"cannot be written: {says}",
                    where=options.optimized_model_filepath,
                    fix="check the folder and the space on the disk; temporary files lie in TMPDIR",
                ) from error
            raise ModelError(
                f"onnxruntime cannot load the model: {_message(error)}",
                where=self._where,
                fix="check it with onnx.checker, or export it again",
            ) from error

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model on one feed; the arrays are the caller's, to keep or to overwrite.

        Outputs that are no tensors (sequences, maps, absent optionals) are left out.

        Raises:
            CalibrationError: The feed does not fit the model's inputs.
            ModelError: The model failed on a feed that fits.
        """
        return {
            name: array if array.flags.owndata else array.copy()
            for name, array in self.run_shared(feed).items()
        }

    def run_shared(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Like `run`, but the arrays are views of onnxruntime's memory wherever it shares it.

        Each array keeps its memory alive, beyond the session if need be. When the last one goes,
        the memory returns to the session's arena, and the next run pays neither for copies nor for
        page faults: drop them soon.
        """
        if not self._names:  # onnxruntime would take an empty list for all outputs
            return {}
        try:
            arrays = self._session.run(self._names, dict(feed))
        except Exception as error:  # onnxruntime's exceptions share no other base
            raise self._diagnosis(feed, error) from error
        return {
            name: array
            for name, array in zip(self._names, arrays, strict=True)
            if isinstance(array, np.ndarray)
        }

    def _diagnosis(self, feed: Mapping[str, np.ndarray], error: Exception) -> OnnxqError:
        """What a failed run stumbled over: the feed, where that can be told, or the model."""
        wanted = {spec.name: spec for spec in self.inputs}
        says = "; ".join(str(spec) for spec in self.inputs)
        for name, spec in wanted.items():
            if name not in feed:
                got = ", ".join(map(repr, feed)) or "nothing"
                return CalibrationError(
                    f"no array for input {name!r}", where=got, fix=f"feed {says}"
                )
            array = np.asarray(feed[name])
            if (spec.dtype is not None and array.dtype != spec.dtype) or not spec.accepts(
                array.shape
            ):
                got = str(TensorSpec(name, array.dtype, array.shape))
                return CalibrationError(
                    "the array does not fit the input", where=got, fix=f"feed {says}"
                )
        if unknown := [name for name in feed if name not in wanted]:
            return CalibrationError(f"the model has no input {unknown[0]!r}", fix=f"feed {says}")
        return ModelError(
            f"the model failed: {_message(error)}",
            where=self._where,
            fix="check the model, and that it takes samples of this size",
        )


def _spilled(model: onnx.ModelProto, folder: str) -> str:
    """The path of a copy of the model in this folder, weights beside it."""
    path = os.path.join(folder, "model.onnx")
    try:
        onnx.save_model(model, path, save_as_external_data=True, location="model.data")
    except OSError as error:
        raise OnnxqError(
            f"a model of more than 2 GB goes by way of a file: {error.strerror}",
            where=folder,
            fix="point TMPDIR to a folder with more room",
        ) from error
    # saving took the weights out of the model: put them back
    onnx.load_external_data_for_model(model, folder)
    return path


def _exposed(model: bytes | str, names: Sequence[str]) -> bytes | str:
    """The model with these tensors as graph outputs: itself if they are outputs already."""
    try:
        data = model if isinstance(model, bytes) else Path(model).read_bytes()
        proto = onnx.ModelProto.FromString(data)
    except Exception:  # no such file, or no ONNX: .ort, perhaps; onnxruntime says what is wrong
        return model
    given = {output.name for output in proto.graph.output}
    made = given | {name for node in proto.graph.node for name in node.output if name}
    hidden = [name for name in dict.fromkeys(names) if name not in given]
    for name in hidden:
        if name not in made and made:  # onnxruntime knows more to say of an empty graph
            raise _unknown(name, made)
        proto.graph.output.add().name = name  # onnxruntime infers its type
    return proto.SerializeToString() if hidden else model


def _unknown(name: str, names: Collection[str]) -> ModelError:
    near = difflib.get_close_matches(name, names, n=1)
    fix = f"did you mean {near[0]!r}?" if near else "take the name of a node's output"
    return ModelError(f"no node puts out a tensor {name!r}", fix=fix)


def _spec(node: Any) -> TensorSpec:
    dtype = _DTYPES.get(node.type)
    known = node.type.startswith("tensor(") and node.shape is not None
    return TensorSpec(
        node.name, dtype, tuple(None if d == "" else d for d in node.shape) if known else None
    )


def _message(error: Exception) -> str:
    """The first line of an onnxruntime message, without error numbers and C++ source positions."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return _SOURCE.sub("", text).strip().rstrip(".")


def save_ort(
    model: str | os.PathLike[str], path: str | os.PathLike[str], style: Style = "fixed"
) -> None:
    """Write a model in onnxruntime's own format, for processors of any kind.

    Level EXTENDED is the last one that knows nothing of this machine: blocks of channels (NCHWc)
    come after it. Channels-last for integer convolutions comes after it, too; onnxruntime adds that
    as it loads the file. int8 activations stay int8.

    Args:
        model: The path of the .onnx file.
        path: Where the .ort file is written.
        style: ``fixed``: optimized, for the CPU provider. ``runtime``: as ONNX defines it, with the
            optimizations beside it (`REPLAY`), for providers that take nodes as they load a model,
            such as NNAPI and XNNPACK.

    Raises:
        UnsupportedError: onnxruntime cannot write the model so.
        OnnxqError: The file cannot be written.
    """
    config = KEEP_INT8 | _SAVE_ORT
    if style == "runtime":
        config |= {"optimization.minimal_build_optimizations": "save"}
    try:
        Session(model, threads=1, level="extended", optimized_path=path, config=config)
    except ModelError as error:
        why = error.what.removeprefix("onnxruntime cannot load the model: ")
        raise UnsupportedError(
            f"onnxruntime cannot write the ORT format: {why}",
            where=Path(model).name,
            fix="ship the .onnx file",
        ) from error


def required_operators(
    path: str | os.PathLike[str], config: Mapping[str, str] | None = None
) -> tuple[str, bool]:
    """What a build of onnxruntime needs for an .ort file, as its ``--include_ops_by_config`` reads.

    Args:
        path: The file.
        config: Session configuration entries that it is loaded with.

    Returns:
        A line per operator set: the operators of the file, and those that loading makes of them;
        and whether they stand with their element types.
    """
    processor, new_usage = _ort_tools()
    with Scratch() as folder:
        loaded = folder / "loaded.ort"
        Session(path, threads=1, optimized_path=loaded, config={**(config or {}), **_SAVE_ORT})

        def found(usage: Any) -> dict[str, dict[int, set[str]]]:
            operators: dict[str, dict[int, set[str]]] = {}
            for file in (os.fspath(path), os.fspath(loaded)):
                with warnings.catch_warnings(category=ResourceWarning, action="ignore"):
                    reader = processor(file, operators, usage)  # does not close the file
                reader.process()
            return operators

        usage = new_usage()
        try:
            operators = found(usage)
        except (KeyError, ValueError, RuntimeError):  # an element type that the tool has no name of
            usage, operators = None, found(None)
    lines = []
    for domain, sets in sorted(operators.items()):
        for version, names in sorted(sets.items()):
            types = [usage.get_config_entry(domain, n) if usage else None for n in sorted(names)]
            texts = [n + (t or "") for n, t in zip(sorted(names), types, strict=True)]
            lines.append(f"{domain};{version};{','.join(texts)}\n")
    return "".join(lines), usage is not None


def _ort_tools() -> tuple[Any, Any]:
    """Onnxruntime's readers of .ort files; importing them touches the root logger and sys.path."""
    root = logging.getLogger()
    handlers, folders = root.handlers[:], sys.path[:]
    try:
        from onnxruntime.tools import ort_format_model as tools
    finally:
        root.handlers[:], sys.path[:] = handlers, folders
    return tools.OrtFormatModelProcessor, tools.OperatorTypeUsageManager


def cores() -> int:
    """Number of processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide about results."""
    names = ("numpy", "numba", "onnx", "onnx-graphsurgeon", "onnxruntime")
    return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}
