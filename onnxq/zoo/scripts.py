"""The scripts that the folder of the zoo brings: they make calibration samples and score models."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from onnxq.errors import OnnxqError
from onnxq.progress import Progress
from onnxq.whole_folder import whole_folder
from onnxq.zoo import files
from onnxq.zoo.catalog import Entry

__all__ = ["calibration_samples", "score"]


def calibration_samples(entry: Entry, folder: Path, to: Path, progress: Progress) -> Path:
    """A folder of calibration samples, inside of `to`; those that are there already are taken.

    Args:
        entry: The entry.
        folder: The folder of the zoo.
        to: Where results are kept.
        progress: Where progress is shown.

    Raises:
        OnnxqError: The script fails, or writes nothing.
    """
    data = entry.calibration
    made = to / "samples" / f"{entry.name}.{data.sha256[:8]}"
    if made.is_dir():
        return made
    files.made(made.parent)
    with whole_folder(made, force=False) as out, progress.task(f"samples of {entry.name}", None):
        places = {"model": folder / entry.model.file, "out": out, "samples": data.samples}
        _run(folder, data.command, places)
        if not any(out.iterdir()):
            raise OnnxqError("the script wrote no samples", where=folder / data.command[0])
    return made


def score(entry: Entry, folder: Path, model: Path, progress: Progress) -> float:
    """The metric of a model, as the entry's script measures it.

    Args:
        entry: The entry.
        folder: The folder of the zoo.
        model: What to score; its name starts like that of the float model.
        progress: Where progress is shown.

    Raises:
        OnnxqError: The script fails, or prints no such score.
    """
    found = entry.evaluation
    places = {"model": model, "float": folder / entry.model.file}
    with progress.task(f"score {model.name}", None):
        printed = _run(folder, found.command, places)
    try:
        value = float(json.loads(printed.splitlines()[-1])[found.metric])
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise OnnxqError(
            f"its last line is no JSON object with a number {found.metric!r}",
            where=folder / found.command[0],
            fix="take the script that the folder came with",
        ) from error
    if not math.isfinite(value):
        raise OnnxqError(f"{found.metric} is {value}", where=folder / found.command[0])
    return value


def _run(folder: Path, command: tuple[str, ...], places: Mapping[str, object]) -> str:
    """What a script of the folder prints, run by this interpreter."""
    script = folder / command[0]
    arguments = [part.format(**places) for part in command[1:]]
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},  # the folder stays as it is
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise OnnxqError(
            f"the script failed: {said[-1]}",
            where=script,
            fix=f"try it: python {' '.join([str(script), *arguments])}",
        )
    return done.stdout
