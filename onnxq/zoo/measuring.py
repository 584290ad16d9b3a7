"""The table of results: scores, bytes, integers and latency of every entry, row by row."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxq.comparison import compare
from onnxq.errors import OnnxqError
from onnxq.progress import Progress, Silent
from onnxq.report import write_text
from onnxq.runtime import versions
from onnxq.version import __version__
from onnxq.zoo import files, scripts
from onnxq.zoo.building import chosen, folder_for, quantized
from onnxq.zoo.catalog import LIMITS, Entry, Evaluation, Format, entries, entry

__all__ = ["Result", "Row", "results"]


@dataclass(frozen=True)
class Row:
    """What was measured of a quantized model.

    Args:
        format: Such as W8A8.
        score: Of the entry's metric.
        bytes: Of the file.
        share: Of the multiply-adds, how many run in integers.
        share_of_possible: The same, of those that onnxruntime has integer kernels for.
        sqnr_db: Of each output, on calibration samples.
        latency: Milliseconds of a run, quantized over float, on one thread; the median of rounds.
        seconds: That quantization took.
    """

    format: str
    score: float
    bytes: int
    share: float
    share_of_possible: float
    sqnr_db: tuple[float | None, ...]
    latency: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """What was measured of an entry.

    Args:
        entry: The entry.
        score: Of the float model.
        rows: Of its formats.
    """

    entry: Entry
    score: float
    rows: tuple[Row, ...]

    def loss(self, row: Row) -> float:
        """Share of the float score that a format loses; negative: it wins."""
        return (self.score - row.score) / self.score

    def kept(self, row: Row) -> bool:
        """Whether a format loses no more than it may."""
        return self.loss(row) <= LIMITS[row.format] + 1e-9

    def surprises(self) -> list[str]:
        """Scores that are not as the entry expects them."""
        known: dict[str, Evaluation | Format] = {"float": self.entry.evaluation}
        known |= self.entry.formats
        scores = {"float": self.score} | {r.format: r.score for r in self.rows}
        return [
            f"{self.entry.name}, {name}: expected {known[name].score:g} +-"
            f" {known[name].tolerance:g}, got {score:g}"
            for name, score in scores.items()
            if abs(score - known[name].score) > known[name].tolerance + 1e-9
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        found = self.entry
        rows = [
            {**dataclasses.asdict(r), "loss": self.loss(r), "limit": LIMITS[r.format]}
            | {"kept": self.kept(r), "expected": found.formats[r.format].score}
            for r in self.rows
        ]
        return {
            "name": found.name,
            "task": found.task,
            "metric": found.evaluation.metric,
            "unit": found.evaluation.unit,
            "score": self.score,
            "expected": found.evaluation.score,
            "bytes": found.model.bytes,
            "formats": rows,
        }


def results(
    folder: str | os.PathLike[str] | None = None,
    to: str | os.PathLike[str] = "zoo",
    *,
    names: Iterable[str] = (),
    formats: Iterable[str] = (),
    download: str | None = None,
    anew: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> list[Result]:
    """Build and score entries; rows that were measured before are taken up again.

    Args:
        folder: The folder of the zoo, with models, data and scripts; None: where downloads are
            kept.
        to: Where models and finished rows are kept; made if need be.
        names: Of entries; none: all.
        formats: Such as W8A8; none: all of each entry.
        download: Address of a copy of the folder; what the folder lacks is fetched from there.
        anew: Measure all rows, also those that are kept.
        threads: Threads of onnxruntime while quantizing; 0 for all cores. Timing takes one.
        progress: Where progress is shown.

    Raises:
        OnnxqError: A file is missing or is not what it should be; a script of the folder fails; or
            anything that `onnxq.quantize` refuses.
    """
    shown, asked = progress or Silent(), tuple(formats)
    found = [entry(name) for name in (tuple(dict.fromkeys(names)) or entries())]
    wanted = [chosen(e, asked) for e in found]
    source = folder_for(folder, download)
    if download is not None:
        for each in found:
            files.fetch(each, source, download, shown, each.calibration, each.evaluation)
    for each in found:  # before any work is done
        files.check(each, source, each.calibration, each.evaluation)
    kept = Rows(Path(to), anew=anew)
    return [
        _result(each, forms, source, kept, threads=threads, progress=shown)
        for each, forms in zip(found, wanted, strict=True)
    ]


class Rows:
    """Finished rows, a file each, under a key of all that decides about them.

    Args:
        to: The folder for them.
        anew: Take none of those that are there.

    Raises:
        OnnxqError: The folder cannot be made.
    """

    def __init__(self, to: Path, *, anew: bool) -> None:
        self.to = to
        self._rows = files.made(to / "rows")
        self._anew = anew

    def get(self, name: str, key: str) -> dict[str, Any] | None:
        """A row, if it was kept under the same key."""
        path = self._path(name)
        if self._anew or not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            row: dict[str, Any] = found["row"]
            return row if found["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OnnxqError(
                "is no kept row", where=path, fix="delete it, or take --anew"
            ) from error

    def keep(self, name: str, key: str, row: dict[str, Any]) -> None:
        """Write a row, whole or not at all."""
        write_text(self._path(name), json.dumps({"key": key, "row": row}, indent=1) + "\n")

    def _path(self, name: str) -> Path:
        return self._rows / f"{name}.json"


def _result(
    found: Entry, forms: list[Format], folder: Path, kept: Rows, *, threads: int, progress: Progress
) -> Result:
    source = folder / found.model.file
    data, labels = found.calibration, found.evaluation
    # they import one another, so a change of any counts
    code = [files.digest(folder / p.command[0]) for p in (data, labels)]
    base = (found.model.sha256, labels.sha256, labels.command, labels.metric, code, versions())
    plain = kept.get(f"{found.name}.float", _key(*base))
    if plain is None:
        plain = {"score": scripts.score(found, folder, source, progress)}
        if plain["score"] <= 0:
            raise OnnxqError(
                f"{labels.metric} of the float model is {plain['score']:g}",
                where=folder / labels.command[0],
                fix="take the script that the folder came with",
            )
        kept.keep(f"{found.name}.float", _key(*base), plain)
    basis = (*base, data.sha256, data.command, data.samples, __version__)
    rows = []
    for form in forms:
        name = f"{found.name}.{form.name}"
        key = _key(*basis, sorted(form.options.items()))
        row = kept.get(name, key)
        if row is None:
            measured = _row(found, form, folder, kept.to, threads=threads, progress=progress)
            row = dataclasses.asdict(measured)
            kept.keep(name, key, row)
        rows.append(Row(**{**row, "sqnr_db": tuple(row["sqnr_db"])}))
    return Result(found, plain["score"], tuple(rows))


def _row(
    found: Entry, form: Format, folder: Path, to: Path, *, threads: int, progress: Progress
) -> Row:
    built = quantized(found, form, folder, to, threads=threads, progress=progress)
    source = folder / found.model.file
    timed = compare(source, built.file, built.samples, limit=1, threads=1).latency
    assert timed is not None  # as asked for
    return Row(
        format=form.name,
        score=scripts.score(found, folder, built.file, progress),
        bytes=built.bytes[1],
        share=built.share,
        share_of_possible=built.share_of_possible,
        sqnr_db=built.sqnr_db,
        latency=1 / timed.speedup.median,
        seconds=built.seconds,
    )


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
