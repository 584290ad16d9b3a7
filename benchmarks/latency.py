"""Latency of float models, of onnxq's int8 models and of those of onnxruntime.quantization.

    ONNXQ_ZOO=PATH python benchmarks/latency.py [MODEL...] [--threads N] [--seconds N] [--quick]
    python benchmarks/latency.py FILE.onnx --calib FOLDER

Models run in turn in one process on one sample, in an order drawn anew each time. Shown are median
milliseconds and quartiles; the ratios are those of lower quartiles, which other work on the machine
hardly moves. onnxq: no options. onnxruntime: quant_pre_process, then quantize_static
to Q/DQ with uint8 activations and int8 weights per channel, min-max; where a step of it fails, the
row says so.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _zoo
import numpy as np
from _zoo import Feed, Reader, spread, stream
from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process, quantize_static

import onnxq
from onnxq.analysis.latency import NO_SPINNING, runs
from onnxq.runtime import Session

# Differences of latency up to this share are those of measuring.
TOLERANCE = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    _zoo.timed(measure, table, __doc__, arguments)


def measure(source: Path, calib: Path, count: int, threads: int, seconds: float) -> dict[str, Any]:
    feeds = [*stream(calib, count)]
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": source, "onnxq": Path(folder) / "onnxq.onnx"}
        onnxq.quantize(source, files["onnxq"], feeds)
        notes = theirs(source, Path(folder), feeds)
        if (Path(folder) / "theirs.onnx").exists():
            files["onnxruntime"] = Path(folder) / "theirs.onnx"
        sessions = [Session(f, threads=threads, config=NO_SPINNING) for f in files.values()]
    times = runs(sessions, feeds[0], seconds=seconds)
    quartiles = [np.percentile(row, [25, 50, 75]).tolist() for row in times]
    return {
        "model": source.stem,
        "threads": threads,
        "runs": len(times[0]),
        "ms": dict(zip(files, quartiles, strict=True)),
        "notes": notes,
    }


def theirs(source: Path, folder: Path, feeds: list[Feed]) -> list[str]:
    """Write theirs.onnx by onnxruntime.quantization, if it can; say what it could not do."""
    source, failures = source.resolve(), []
    for what, options in (
        ("pre-processing", {}),
        ("without symbolic shapes", {"skip_symbolic_shape": True}),
        ("without pre-processing", None),
    ):
        start = source if options is None else folder / "prepared.onnx"
        try:
            with quiet() as said, contextlib.chdir(folder):  # it leaves files where it runs
                if options is not None:
                    quant_pre_process(source, start, **options)
                quantize_static(
                    start,
                    folder / "theirs.onnx",
                    Reader(feeds),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
        except Exception as error:  # whatever it is, it is what the row tells
            failures.append(f"{what}: {first_line(error)}")
            continue
        if "Optimization Failed" in said.getvalue():
            failures.append(f"{what}: its optimization failed")
        return failures
    return failures


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:100]


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """What is printed and logged, kept from the terminal."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        with contextlib.redirect_stdout(said):
            yield said
    finally:
        root.removeHandler(handler)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | float ms | onnxq ms | onnxruntime ms | onnxq / float | onnxruntime / float"
        " | onnxq / onnxruntime | remarks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ms = row["ms"]
        cells = [spread(ms.get(name), "fails") for name in ("float", "onnxq", "onnxruntime")]
        for top, under in (("onnxq", "float"), ("onnxruntime", "float"), ("onnxq", "onnxruntime")):
            known = top in ms and under in ms
            cells.append(f"{ms[top][0] / ms[under][0]:.2f}" if known else "")
        lines.append(f"| {row['model']} | {' | '.join(cells)} | {'; '.join(row['notes'])} |")
    slower = [
        row["model"]
        for row in rows
        if "onnxruntime" in row["ms"]
        and row["ms"]["onnxq"][0] > (1 + TOLERANCE) * row["ms"]["onnxruntime"][0]
    ]
    lines.append(
        f"\nslower than onnxruntime by over {TOLERANCE:.0%}: {', '.join(slower) or 'none'}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
