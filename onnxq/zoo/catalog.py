"""The entries of the zoo: real models with their data, recipes and expected scores, as TOML."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from onnxq.errors import OnnxqError, did_you_mean

__all__ = [
    "LIMITS",
    "Calibration",
    "Data",
    "Entry",
    "Evaluation",
    "Format",
    "Source",
    "entries",
    "entry",
]

# Loss of the metric, relative to float, beyond which a format has missed its aim.
LIMITS = {"W8A8": 0.01, "W4A8": 0.03}

_HOME = Path(__file__).parent


@dataclass(frozen=True)
class Source:
    """The float model.

    Args:
        file: Where it lies below the folder of the zoo.
        bytes: Its size.
        sha256: Its checksum, in hexadecimal.
        repository: Where it comes from, as owner/name on GitHub.
        path: The file there that it was made from.
        licence: Of the model.
    """

    file: str
    bytes: int
    sha256: str
    repository: str
    path: str
    licence: str


@dataclass(frozen=True)
class Data:
    """Samples, and the script that works on them.

    Args:
        what: What they are.
        source: Where they come from.
        licence: Of the samples.
        path: A file or a folder below the folder of the zoo.
        sha256: Checksum of the file, or of the list of files, see `onnxq.zoo.files.digest`.
        command: A script of the folder and its arguments; `{model}`, `{float}`, `{out}` and
            `{samples}` stand for the model to work on, the float model, the folder to write, and
            how many samples.
    """

    what: str
    source: str
    licence: str
    path: str
    sha256: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Calibration(Data):
    """Samples to calibrate with; the script makes inputs of them.

    Args:
        samples: How many to take, at most.
    """

    samples: int


@dataclass(frozen=True)
class Evaluation(Data):
    """Samples with labels; the last line that the script prints is a JSON object.

    Args:
        metric: The key of the score in it; the larger, the better.
        unit: Of the score.
        score: Of the float model.
        tolerance: How far from it a measured score may be.
    """

    metric: str
    unit: str
    score: float
    tolerance: float


@dataclass(frozen=True)
class Format:
    """One way to quantize the model.

    Args:
        name: What it is called, such as W4A8: 4-bit weights, 8-bit activations.
        options: Of `onnxq.quantize`.
        score: What is to be expected.
        tolerance: How far from it a measured score may be.
    """

    name: str
    options: dict[str, Any]
    score: float
    tolerance: float

    @property
    def arguments(self) -> tuple[str, ...]:
        """The options as the command line takes them."""
        found: list[str] = []
        for key, value in self.options.items():
            flag = "--format" if key == "formats" else f"--{key}"
            for each in [value] if isinstance(value, str) else value:
                found += [flag, each]
        return tuple(found)


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Args:
        name: Its name; the name of its file starts like it.
        title: What it is.
        task: What it is good for.
        input: Its inputs.
        preprocessing: How samples become inputs.
        model: The float model.
        calibration: What it is calibrated with.
        evaluation: What it is scored on.
        formats: How it is quantized, by name.
    """

    name: str
    title: str
    task: str
    input: str
    preprocessing: str
    model: Source
    calibration: Calibration
    evaluation: Evaluation
    formats: dict[str, Format]


@cache
def entries() -> dict[str, Entry]:
    """All entries by name, in alphabetical order."""
    found = (_read(file) for file in sorted(_HOME.glob("*.toml")))
    return {e.name: e for e in found}


def entry(name: str) -> Entry:
    """An entry by its name.

    Raises:
        OnnxqError: There is none; says which there are.
    """
    known = entries()
    if name not in known:
        fix = did_you_mean(name, known, f"there are {', '.join(known)}")
        raise OnnxqError(f"the zoo has no entry {name!r}", fix=fix)
    return known[name]


def _read(file: Path) -> Entry:
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    for part in ("calibration", "evaluation"):
        table[part]["command"] = tuple(table[part]["command"])
    formats = {
        name: Format(name, given.pop("options", {}), **given)
        for name, given in table.pop("formats").items()
    }
    return Entry(
        model=Source(**table.pop("model")),
        calibration=Calibration(**table.pop("calibration")),
        evaluation=Evaluation(**table.pop("evaluation")),
        formats=formats,
        **table,
    )
