"""What benchmarks share: the model zoo and the samples that its models are calibrated with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np

OUT = Path(__file__).parent / "out"
# Status of a benchmark that has nothing to measure; `make bench` goes on after it.
SKIPPED = 77

Feed = dict[str, np.ndarray]


def folder() -> Path:
    """The zoo: a folder with models/, eval.py and calib.py."""
    if "ONNXQ_ZOO" not in os.environ:
        print("not measured: set ONNXQ_ZOO to the folder of the model zoo", file=sys.stderr)
        sys.exit(SKIPPED)
    return Path(os.environ["ONNXQ_ZOO"])


def samples(zoo: Path, name: str) -> Path:
    """A folder of up to 100 calibration samples of a model."""
    calib = OUT / "calib" / name
    if not calib.exists():
        half = calib.with_name(f"{name}.part")
        source = zoo / "models" / f"{name}.onnx"
        run(zoo / "calib.py", source, half, "--limit", "100")
        half.rename(calib)
    return calib


def stream(calib: Path, count: int) -> Iterator[Feed]:
    """So many samples of a folder of .npz files, over again where there are fewer."""
    files = sorted(calib.glob("*.npz"))
    if not files:
        sys.exit(f"no .npz files in {calib}")
    for file in islice(cycle(files), count):
        with np.load(file) as arrays:
            yield dict(arrays)


class Reader:
    """Samples as onnxruntime.quantization reads them."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def run(script: Path, *args: object) -> str:
    command = [sys.executable, str(script), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
