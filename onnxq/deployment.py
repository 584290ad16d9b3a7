"""A model as an app ships it: ONNX and ORT format, required operators, a manifest; verified."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from onnxq.analysis import cost, fusion
from onnxq.analysis.breaches import breaches
from onnxq.api import calibration, check_loads, is_quantized
from onnxq.calibration import Calibration
from onnxq.errors import CalibrationError, UnsupportedError
from onnxq.fixed_shapes import fix_shapes
from onnxq.model import Model, load
from onnxq.model_io import TWO_GB, external_files
from onnxq.ort_format import Verification, write_ort
from onnxq.pass_manager import Context
from onnxq.pictures import Preprocess
from onnxq.progress import Progress
from onnxq.readers import KINDS, find
from onnxq.report import write_text
from onnxq.runtime import Session, Style, versions
from onnxq.signature import TensorSpec
from onnxq.synthetic import synthesize
from onnxq.targets import Target, target_named
from onnxq.version import __version__
from onnxq.whole_folder import check_folder, whole_folder

__all__ = ["MANIFEST", "SAMPLES", "Deployment", "File", "deploy"]

MANIFEST = "manifest.json"
# Samples that an .ort file is verified on unless told otherwise.
SAMPLES = 8


@dataclass(frozen=True)
class File:
    """One file of the folder.

    Args:
        name: Its name in the folder.
        kind: ``onnx``, ``ort``, or ``operators``: what a custom build needs to run an .ort.
        bytes: Its size.
        sha256: Its digest, in hexadecimal.
        style: Of an .ort: ``fixed``, optimized; or ``runtime``, optimized as it is loaded.
        session: Session configuration entries to load it with.
    """

    name: str
    kind: Literal["onnx", "ort", "operators"]
    bytes: int
    sha256: str
    style: Style | None = None
    session: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Deployment:
    """A folder with a model as an app ships it.

    Args:
        folder: Where it is.
        model: The name of the model.
        target: What it is to run on.
        files: What lies in it, the manifest left out.
        inputs: What the model takes.
        outputs: What it gives.
        preprocess: How a picture becomes the input; None if that was not said.
        quantized: Whether it has operators of quantized models.
        macs: Multiply-adds a sample.
        integer_macs: Those in integers, as onnxruntime fuses the graph on ARM.
        recipe: The recipe that it was made by, as TOML; None if it does not hold one.
        versions: Versions of onnxq and of the libraries that decide about results.
        verified_on: Whether the samples of the verification were given or made up.
        verifications: How each .ort file compares with the .onnx.
        notes: What is good to know, one sentence each.
    """

    folder: Path
    model: str
    target: str
    files: list[File]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    preprocess: Preprocess | None
    quantized: bool
    macs: int
    integer_macs: int
    recipe: str | None
    versions: dict[str, str]
    verified_on: Literal["given", "made up"]
    verifications: list[Verification]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The manifest, as plain JSON types."""
        plain = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        del plain["folder"]
        return {"manifest": 1, **plain}


def deploy(
    source: str | os.PathLike[str] | Model,
    destination: str | os.PathLike[str],
    *,
    target: str | Target = "ort-cpu",
    shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    limit: int | None = None,
    preprocess: str | os.PathLike[str] | Preprocess | None = None,
    strict: bool = False,
    force: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Deployment:
    """Write a folder that an app ships: the model, its .ort files, a manifest.

    Each .ort file is loaded in a fresh session and compared with the .onnx. The folder appears
    whole or not at all.

    Args:
        source: The model, quantized or not; never changed.
        destination: The folder, which is made.
        target: What the model is to run on; what breaks its contract is noted.
        shapes: Sizes of inputs that are to be fixed.
        data: Samples to verify on, in any form that `Calibration` takes; None: made up.
        limit: Use at most so many of them; None: `SAMPLES`.
        preprocess: Preset or TOML file that turns pictures into inputs: goes into the manifest.
        strict: Whether a sample that cannot be read is an error, not left out and counted.
        force: Replace a folder that is not empty, once the new one is whole.
        threads: Threads for onnxruntime; 0 for all cores.
        progress: Where progress is shown.

    Raises:
        OnnxqError: Anything that the user can mend; nothing is left behind.
    """
    target = target_named(target)
    pictures = None if preprocess is None else Preprocess.of(preprocess)
    check_folder(Path(destination), force=force, reads=(source, data, preprocess))
    model = load(source)
    if model.nbytes > TWO_GB:
        raise UnsupportedError(
            "the ORT format holds 2 GB at most", where=model.path, fix="ship the .onnx file"
        )
    fix_shapes(model, shapes or {})
    session = check_loads(model)
    if pictures is not None:
        pictures = pictures.for_input(_picture(session.inputs))
    count = SAMPLES if limit is None else limit
    if data is None:
        made = synthesize(
            model, count=count, preprocess=pictures, threads=threads, progress=progress
        )
        samples = Calibration(made, limit=count)
    else:
        wanted = pictures if _are_pictures(data) else None
        samples = calibration(data, count, wanted, strict).limited(count)
    ctx = Context(samples, target=target, threads=threads, progress=progress)
    with whole_folder(Path(destination), force=force) as folder:
        origin = folder / ("model.onnx" if model.path is None else f"{model.path.stem}.onnx")
        if isinstance(source, Model) or shapes or external_files(model.path):
            model.save(origin)
        else:
            shutil.copyfile(source, origin)
            model.notes.clear()  # they tell of a model that is written anew
        result = _build(model, session, origin, ctx, pictures)
        write_text(folder / MANIFEST, json.dumps(result.to_dict(), indent=1) + "\n")
    return dataclasses.replace(result, folder=Path(destination))


def _build(
    model: Model, session: Session, origin: Path, ctx: Context, pictures: Preprocess | None
) -> Deployment:
    """Write and verify all files but the first and the manifest."""
    files = [_file(origin, "onnx")]
    samples = ctx.spread(session, 0)
    notes = [*model.notes, *_remarks(model, session.inputs, ctx.target), *ctx.report.notes]
    write = partial(write_ort, origin, samples=samples, threads=ctx.threads, progress=ctx.progress)
    written = [write("fixed")]
    try:
        other = write("runtime")
    except UnsupportedError as error:  # what the CPU provider runs is there
        notes.append(f"left out: {error.where}: {error.what}")
    else:
        if other.is_like(written[0]):
            other.remove()
        else:
            written.append(other)
    for ort in written:
        files.append(_file(ort.path, "ort", ort.style, ort.session))
        files.append(_file(ort.operators, "operators", ort.style))
    share = fusion.integer_share(model, cost.tensor_shapes(model, next(iter(samples))), arm=True)
    if "MatMulNBits" in share.operators:
        notes.append("some layers have nothing but their weights in integers (MatMulNBits)")
    if ctx.data is not None and ctx.data.skip_note is not None:
        notes.append(ctx.data.skip_note)
    return Deployment(
        folder=origin.parent,
        model=origin.stem,
        target=ctx.target.name,
        files=files,
        inputs=session.inputs,
        outputs=session.outputs,
        preprocess=pictures,
        quantized=is_quantized(model),
        macs=share.macs,
        integer_macs=share.integer_macs,
        recipe=model.metadata.get("onnxq.recipe"),
        versions={"onnxq": __version__, **versions()},
        verified_on="made up" if ctx.is_synthetic else "given",
        verifications=[v for ort in written for v in ort.verifications],
        notes=notes,
    )


# ---------------------------------------------------------------------- the model and its inputs


def _remarks(model: Model, inputs: Sequence[TensorSpec], target: Target) -> list[str]:
    """What the user may not expect of the model."""
    notes = []
    if not is_quantized(model):
        notes.append("the model is not quantized: it runs in float (onnxq quantize mends that)")
    dynamic = [s for s in inputs if s.shape is None or any(not isinstance(d, int) for d in s.shape)]
    if dynamic:
        notes.append(
            f"sizes are open ({'; '.join(map(str, dynamic))}): fine on the CPU, but XNNPACK, NNAPI"
            " and QNN want them fixed (--shape)"
        )
    for fault in breaches(model, target):
        where = f"{fault.node}: " if fault.node else ""
        notes.append(f"{where}{fault.what} ({fault.mend})")
    return notes


def _picture(inputs: Sequence[TensorSpec]) -> TensorSpec:
    found = [s for s in inputs if s.shape is not None and len(s.shape) == 4]
    if len(found) != 1:
        raise CalibrationError(
            f"preprocessing is for one input of pictures, and {len(found)} look like one",
            where="; ".join(map(str, inputs)),
            fix="leave it out",
        )
    return found[0]


def _are_pictures(data: Any) -> bool:
    """Whether samples are files of pictures: preprocessing is for nothing else."""
    if not isinstance(data, (str, os.PathLike)):
        return False
    path = Path(data)
    kind = find(path, pictures=True)[0] if path.is_dir() else KINDS.get(path.suffix.lower())
    return kind == "pictures"


# ---------------------------------------------------------------------- facts


def _file(
    path: Path,
    kind: Literal["onnx", "ort", "operators"],
    style: Style | None = None,
    session: Mapping[str, str] | None = None,
) -> File:
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return File(path.name, kind, path.stat().st_size, sha256, style, dict(session or {}))


def _plain(value: Any) -> Any:
    """Plain JSON types."""
    if isinstance(value, TensorSpec):
        kind = None if value.dtype is None else value.dtype.name
        shape = None if value.shape is None else list(value.shape)
        return {"name": value.name, "type": kind, "shape": shape}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return dict(value) if isinstance(value, Mapping) else value
