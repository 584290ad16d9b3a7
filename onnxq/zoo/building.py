"""Quantized models of the zoo, from the float model and its samples on disk."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxq import api
from onnxq.errors import OnnxqError, did_you_mean
from onnxq.progress import Progress, Silent
from onnxq.report import write_text
from onnxq.zoo import files, scripts
from onnxq.zoo.catalog import Entry, Format, entry

__all__ = ["Built", "build", "chosen", "folder_for", "quantized"]


@dataclass(frozen=True)
class Built:
    """A quantized model, and what is known of it without a score.

    Args:
        name: Of the entry.
        format: Such as W8A8.
        file: The model.
        options: Of `onnxq.quantize`.
        sha256: Of the file.
        bytes: Size of the float model and of this one.
        share: Of the multiply-adds, how many run in integers.
        share_of_possible: The same, of those that onnxruntime has integer kernels for.
        sqnr_db: Of each output, on calibration samples.
        seconds: That it took.
        versions: Of what it was made with.
        samples: The folder of calibration samples.
    """

    name: str
    format: str
    file: Path
    options: dict[str, Any]
    sha256: str
    bytes: tuple[int, int]
    share: float
    share_of_possible: float
    sqnr_db: tuple[float | None, ...]
    seconds: float
    versions: dict[str, str]
    samples: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = dataclasses.asdict(self) | {"file": self.file.name, "samples": self.samples.name}
        return plain | {"bytes": {"float": self.bytes[0], "quantized": self.bytes[1]}}


def build(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    to: str | os.PathLike[str] = "zoo",
    *,
    formats: Iterable[str] = (),
    download: str | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> list[Built]:
    """Quantize a model of the zoo as its entry says.

    Writes `NAME.FORMAT.onnx` into `to`, and beside it what was measured, as JSON.

    Args:
        name: Of the entry.
        folder: The folder of the zoo, with models, data and scripts; None: where downloads are
            kept.
        to: Where results go; made if need be.
        formats: Such as W8A8; none: all of the entry.
        download: Address of a copy of the folder; what the folder lacks is fetched from there.
        threads: Threads of onnxruntime; 0 for all cores.
        progress: Where progress is shown.

    Raises:
        OnnxqError: A file is missing or is not what it should be; or anything that
            `onnxq.quantize` refuses.
    """
    found, shown = entry(name), progress or Silent()
    wanted = chosen(found, formats)
    source, target = folder_for(folder, download), Path(to)
    if download is not None:
        files.fetch(found, source, download, shown, found.calibration)
    files.check(found, source, found.calibration)
    files.made(target)
    return [quantized(found, f, source, target, threads=threads, progress=shown) for f in wanted]


def folder_for(folder: str | os.PathLike[str] | None, download: str | None) -> Path:
    """The folder of the zoo.

    Raises:
        OnnxqError: It does not exist, and nothing is to be fetched.
    """
    path = files.cache_folder() if folder is None else Path(folder)
    if download is None and not path.is_dir():
        raise OnnxqError(
            "no such folder", where=path, fix="give the zoo's with --from, or take --download URL"
        )
    return path


def chosen(found: Entry, formats: Iterable[str]) -> list[Format]:
    """Formats of an entry by name; none: all.

    Raises:
        OnnxqError: It has no such format.
    """
    names = tuple(dict.fromkeys(formats)) or tuple(found.formats)
    for name in names:
        if name not in found.formats:
            known = f"there are {', '.join(found.formats)}"
            raise OnnxqError(
                f"no format {name!r}",
                where=found.name,
                fix=did_you_mean(name, found.formats, known),
            )
    return [found.formats[name] for name in names]


def quantized(
    found: Entry, form: Format, folder: Path, to: Path, *, threads: int, progress: Progress
) -> Built:
    """Quantize a model whose files were checked; see `build`."""
    samples = scripts.calibration_samples(found, folder, to, progress)
    file = to / f"{found.name}.{form.name}.onnx"
    source = folder / found.model.file
    progress.say(f"{found.name} {form.name}")
    _, report = api.quantize(
        source, file, samples, threads=threads, progress=progress, **form.options
    )
    facts = report.facts
    built = Built(
        name=found.name,
        format=form.name,
        file=file,
        options=form.options,
        sha256=files.digest(file),
        bytes=(facts["bytes"]["before"], facts["bytes"]["after"]),
        share=facts["integers"]["share"],
        share_of_possible=facts["integers"]["share_of_possible"],
        sqnr_db=tuple(o["sqnr_db"] for o in facts["outputs"]),
        seconds=facts["seconds"],
        versions=facts["versions"],
        samples=samples,
    )
    write_text(file.with_suffix(".json"), json.dumps(built.to_dict(), indent=1) + "\n")
    return built
