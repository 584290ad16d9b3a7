"""What benchmarks share: the model zoo and the samples that its models are calibrated with."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np

from onnxq.progress import Silent
from onnxq.runtime import versions
from onnxq.zoo import calibration_samples, entry
from onnxq.zoo import score as entry_score

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
    return calibration_samples(entry(name), zoo, OUT, Silent())


def score(zoo: Path, name: str, path: Path) -> float:
    """The metric of a model that was made from one of the zoo."""
    return entry_score(entry(name), zoo, path, Silent())


def stream(calib: Path, count: int) -> Iterator[Feed]:
    """So many samples of a folder of .npz files, over again where there are fewer."""
    files = sorted(calib.glob("*.npz"))
    if not files:
        sys.exit(f"no .npz files in {calib}")
    for file in islice(cycle(files), count):
        with np.load(file) as arrays:
            yield dict(arrays)


def timed(
    measure: FunctionType,
    table: Callable[[list[dict[str, Any]]], str],
    doc: str | None,
    arguments: Sequence[str] | None,
    models: Sequence[str] = (),
) -> None:
    """A benchmark that times models: its options, its table, its file of results.

    Args:
        measure: Of model, samples, how many of them, threads and seconds, to a row.
        table: Of rows, to what is printed.
        doc: The benchmark's docstring, which begins what it prints as help.
        arguments: Of the command line; None for those of the process.
        models: Those of the zoo that are measured unless some are named; none: all.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="of the zoo, or an .onnx file")
    parser.add_argument("--calib", type=Path, help="folder of .npz samples for an .onnx file")
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime; 0 for all cores")
    parser.add_argument("--samples", type=int, default=32, help="to calibrate with")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, each model")
    parser.add_argument(
        "--quick", action="store_true", help="8 samples, hardly timed: does it run?"
    )
    args = parser.parse_args(arguments)
    if args.quick:
        args.samples, args.seconds = 8, 0.2
    if args.calib is not None:
        if not args.models:
            parser.error("--calib is for .onnx files: name some")
        pairs = [(Path(name), args.calib) for name in args.models]
    else:
        zoo = folder()
        names = args.models or models or sorted(f.stem for f in (zoo / "models").glob("*.onnx"))
        pairs = [(zoo / "models" / f"{name}.onnx", samples(zoo, name)) for name in names]
    rows = [measure(*pair, args.samples, args.threads, args.seconds) for pair in pairs]
    threads = args.threads or "all cores"
    print(
        f"batch 1, threads: {threads}, onnxruntime {versions()['onnxruntime']}; median (quartiles)"
    )
    print(table(rows))
    OUT.mkdir(exist_ok=True)
    name = Path(measure.__code__.co_filename).stem
    (OUT / f"{name}.json").write_text(json.dumps(rows, indent=1))


def spread(quartiles: list[float] | None, missing: str) -> str:
    """Median and quartiles; or what is said where there are none."""
    if quartiles is None:
        return missing
    low, median, high = quartiles
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


class Reader:
    """Samples as onnxruntime.quantization reads them."""

    def __init__(self, feeds: Iterable[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        return next(self._feeds, None)


def run(script: Path, *args: object) -> str:
    command = [sys.executable, str(script), *map(str, args)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
