"""What can be done with files of encodings: export, convert, apply, compare."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import api, encodings_json
from onnxq.completion import completed
from onnxq.encoding import Encoding, Encodings
from onnxq.errors import CalibrationError
from onnxq.fitting import channels, constants, without_moves
from onnxq.model import Model, load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Calibrate, FoldBatchNorm, InsertQDQ, LoadEncodings
from onnxq.progress import Progress
from onnxq.recipe import Recipe
from onnxq.report import Report
from onnxq.targets import Target, target_named
from onnxq.unquantize import unquantized

__all__ = ["Difference", "Differences", "apply", "convert", "diff", "export", "read"]

_Path = str | os.PathLike[str]


def read(source: _Path, model: Model | None = None) -> Encodings:
    """The encodings of a JSON file, or of a Q/DQ model (.onnx).

    Args:
        source: The file.
        model: The float model, for versions of the JSON that do not say which axis scales run
            along.

    Raises:
        OnnxqError: The file cannot be read, or holds no encodings.
    """
    if Path(source).suffix.lower() == ".onnx":
        return unquantized(load(source))[1]
    return encodings_json.load(source, None if model is None else channels(model))


def export(
    source: _Path,
    destination: _Path,
    *,
    version: str = encodings_json.VERSION,
    float_model: _Path | None = None,
    target: str | Target = "ort-cpu",
    complete: Any = None,
    limit: int | None = None,
    preprocess: Any = None,
    strict: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> tuple[Encodings, list[str]]:
    """Write the encodings that a Q/DQ model is made of.

    Args:
        source: The Q/DQ model, of any program.
        destination: The JSON file.
        version: Of the JSON.
        float_model: Where to write the model without QuantizeLinear and DequantizeLinear, whose
            tensors the encodings name; None: nowhere.
        target: What the Q/DQ model is for.
        complete: Samples, in any form that `Calibration` takes, for ranges of what AIMET's default
            configuration rounds and the Q/DQ model does not; None: nothing is added.
        limit: Use at most so many samples.
        preprocess: Preset or TOML file that turns pictures into inputs.
        strict: Whether a sample that cannot be read is an error, not left out and counted.
        threads: Threads for onnxruntime; 0 for all cores.
        progress: Where progress is shown.

    Returns:
        What was written; and what was left out, one sentence each.

    Raises:
        OnnxqError: Anything that the user can mend; no file is written then.
    """
    model, found = unquantized(load(source), target)
    notes: list[str] = []
    if complete is None:
        text = _text(found, version, model, target)
    else:
        data = api.calibration(complete, limit, preprocess, strict)
        ctx = Context(data, target=target, threads=threads, progress=progress)
        found, notes = completed(model, found, ctx)
        text = encodings_json.dumps(found, version, constants(model))
    if float_model is not None:
        model.save(float_model)
    encodings_json.write(text, destination)
    return found, notes


def convert(
    source: _Path, destination: _Path, *, version: str, model: _Path | None = None
) -> Encodings:
    """Write encodings in another version of the JSON.

    Args:
        source: A JSON file, or a Q/DQ model.
        destination: The JSON file.
        version: Of the destination.
        model: The float model, which versions before 2 need on either side: they do not say which
            axis scales run along, and keep weights apart.

    Raises:
        OnnxqError: Anything that the user can mend; no file is written then.
    """
    known = None if model is None else load(model)
    found = read(source, known)
    encodings_json.write(_text(found, version, known, "ort-cpu"), destination)
    return found


def _text(encodings: Encodings, version: str, model: Model | None, target: str | Target) -> str:
    """The JSON, with what a version needs to know of the model."""
    if model is None:
        return encodings_json.dumps(encodings, version)
    if version in encodings_json.OLD:
        encodings = without_moves(model, encodings, target_named(target))
    return encodings_json.dumps(encodings, version, constants(model))


def apply(
    source: _Path | Model,
    encodings: _Path,
    destination: _Path | None = None,
    calib: Any = None,
    *,
    complete: bool = False,
    exclude: tuple[str, ...] = (),
    target: str | Target = "ort-cpu",
    limit: int | None = None,
    preprocess: Any = None,
    strict: bool = False,
    report: _Path | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> tuple[Model, Report]:
    """Quantize a float model as a file of encodings says.

    BatchNormalization is folded first where the file names nothing that goes with it.

    Args:
        source: The float model; never changed.
        encodings: A JSON file, AIMET's or onnxruntime's.
        destination: Where the Q/DQ model is written; None: nowhere.
        calib: Samples, in any form that `Calibration` takes, to complete and to measure.
        complete: Whether tensors that the file leaves out are calibrated; else what needs them
            stays in float.
        exclude: Globs on node names and operator types that stay in float.
        target: What the model is to run on.
        limit: Use at most so many samples.
        preprocess: Preset or TOML file that turns pictures into inputs.
        strict: Whether a sample that cannot be read is an error, not left out and counted.
        report: A file for the report as a page (HTML).
        seed: Seed of every random choice.
        threads: Threads for onnxruntime; 0 for all cores.
        progress: Where progress is shown.

    Raises:
        OnnxqError: Anything that the user can mend; nothing is written then.
    """
    if complete and calib is None:
        raise CalibrationError(
            "ranges of what the file leaves out need samples", fix="give some (--calib PATH)"
        )
    model = load(source)
    named = encodings_json.load(encodings, channels(model))
    data = None if calib is None else api.calibration(calib, limit, preprocess, strict)
    steps: list[Any] = [FoldBatchNorm()] if _survives_folding(model, named) else []
    if complete:
        steps.append(Calibrate(exclude=exclude))
    load_file = LoadEncodings(path=os.fspath(encodings), exclude=exclude)
    steps += [replace(load_file, missing="keep") if complete else load_file, InsertQDQ()]
    recipe = Recipe(name="encodings", passes=tuple(steps))
    return api.run(
        recipe,
        source,
        destination,
        data,
        target=target,
        report=report,
        seed=seed,
        threads=threads,
        progress=progress,
    )


def _survives_folding(model: Model, named: Encodings) -> bool:
    """Whether BatchNormalization can be folded, and every tensor that is named is still there."""
    if all(n.op != "BatchNormalization" for n in model.graph.nodes):
        return False
    folded, _ = PassManager(FoldBatchNorm())(model)
    before, after = model.tensors(), folded.tensors()
    return all(name in after for name in named if name in before)


# ---------------------------------------------------------------------- differences


@dataclass(frozen=True)
class Difference:
    """How the encodings of a tensor differ.

    Args:
        name: The tensor.
        first: The first encoding, in words.
        second: The second one.
        steps: The largest distance between the ends of the ranges, in steps of the first.
    """

    name: str
    first: str
    second: str
    steps: float


@dataclass(frozen=True)
class Differences:
    """How two sets of encodings differ.

    Args:
        equal: How many tensors have the same encoding in both.
        different: Those that have not, farthest apart first.
        only_first: Tensors that only the first names.
        only_second: Tensors that only the second names.
    """

    equal: int
    different: list[Difference] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def diff(first: _Path, second: _Path, model: _Path | None = None) -> Differences:
    """Compare two files of encodings, or Q/DQ models, tensor by tensor.

    Args:
        first: A JSON file, or a Q/DQ model.
        second: The other one.
        model: The float model, see `read`.

    Raises:
        OnnxqError: A file cannot be read.
    """
    known = None if model is None else load(model)
    one, other = (read(path, known) for path in (first, second))
    both = [name for name in one if name in other]
    different = [
        Difference(name, _words(one[name]), _words(other[name]), _apart(one[name], other[name]))
        for name in both
        if one[name] != other[name]
    ]
    return Differences(
        len(both) - len(different),
        sorted(different, key=lambda d: -d.steps),
        [name for name in one if name not in other],
        [name for name in other if name not in one],
    )


def _words(encoding: Encoding) -> str:
    low, high = (f"{end:.6g}" for end in (encoding.low, encoding.high))
    count = f", {encoding.scale.size} scales" if encoding.scale.ndim else ""
    return f"{encoding.dtype} [{low}, {high}]{count}"


def _apart(one: Encoding, other: Encoding) -> float:
    """The largest distance between the ends of two ranges, in steps of the first."""
    if one.scale.shape != other.scale.shape:
        ends = abs(one.low - other.low), abs(one.high - other.high)
        return float(max(ends) / one.scale.max())
    steps = []
    for end in ("qmin", "qmax"):
        a, b = ((getattr(e, end) - e.zero_point.astype(np.float64)) * e.scale for e in (one, other))
        steps.append(np.abs(a - b) / one.scale)
    return float(np.max(steps))
