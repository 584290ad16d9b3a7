"""Expected effects of number formats beside measured ones: rank correlation and time.

    ONNXQ_ZOO=PATH python benchmarks/sensitivity.py [MODEL...] [--samples N] [--quick]
    python benchmarks/sensitivity.py FILE.onnx --calib FOLDER

Measured: one layer at a time in the format, all else in float, squared error of the outputs on
--samples samples. Expected: from second-order statistics and gradients, no layer run on its own.
Shown are the rank correlation (Spearman) of the two over the layers for each format, that of all
layers' noise at int8/channel and uint8 together, the median of expected over measured in dB, and
wall and processor seconds of the expectation, without calibration, and of the measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import _zoo
import numpy as np

import onnxq
from onnxq import analyzing
from onnxq.analysis.findings import Analysis
from onnxq.analysis.sensitivity import spearman

MODELS = (
    *("cifar_resnet20", "mobilenetv1_075", "vww_mobilenetv1_025", "simplepose", "espnet_camvid"),
)
# What the correlation at eight bits is held to.
WANTED = 0.9


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="of the zoo, or an .onnx file")
    parser.add_argument("--calib", type=Path, help="folder of .npz samples for an .onnx file")
    parser.add_argument("--samples", type=int, default=32, help="to measure on")
    parser.add_argument("--quick", action="store_true", help="2 samples: does it run?")
    args = parser.parse_args(arguments)
    if args.quick:
        args.samples = 2
    if args.calib is not None:
        if not args.models:
            parser.error("--calib is for .onnx files: name some")
        pairs = [(Path(name), args.calib) for name in args.models]
    else:
        zoo = _zoo.folder()
        names = args.models or MODELS
        pairs = [(zoo / "models" / f"{name}.onnx", _zoo.samples(zoo, name)) for name in names]
    rows = []
    for source, calib in pairs:
        rows.append(measure(source, calib, args.samples))
        print(rows[-1]["model"], file=sys.stderr)
    print(table(rows))
    low = [r["model"] for r in rows if (r["together"] or 0.0) < WANTED]
    print(f"\nrank correlation at 8 bits below {WANTED}: {', '.join(low) or 'none'}")
    _zoo.OUT.mkdir(exist_ok=True)
    (_zoo.OUT / "sensitivity.json").write_text(json.dumps(rows, indent=1))


def measure(source: Path, calib: Path, count: int) -> dict[str, Any]:
    spent: dict[str, float] = {}
    with mock.patch.object(analyzing, "expect", timed(analyzing.expect, spent)):
        result = onnxq.analyze(source, calib, measure="one-at-a-time", trial_samples=count)
    pairs = [
        (s.effect, s.measured)
        for layer in result.layers
        for s in layer.sensitivities
        if s.effect and s.measured
    ]
    return {
        "model": source.stem,
        "layers": len(result.layers),
        "spearman": {f"{a.part} {a.format}": a.spearman for a in result.agreement},
        "together": together(result),
        "ratio_db": float(np.median([10 * math.log10(a / b) for a, b in pairs])),
        "expected_s": result.seconds["expected effects"],
        "expected_cpu_s": spent["cpu"],
        "measured_s": result.seconds["measured"],
    }


def timed(function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    """The function, its processor seconds noted."""

    def run(*args: Any) -> Any:
        start = time.process_time()
        found = function(*args)
        spent["cpu"] = time.process_time() - start
        return found

    return run


def together(result: Analysis) -> float | None:
    """Rank correlation of the noise of weights and inputs at eight bits."""
    rows = []
    for layer in result.layers:
        found = [
            layer.sensitivity("weights", "int8/channel"),
            layer.sensitivity("activations", "uint8"),
        ]
        known = [(s.effect, s.measured) for s in found if s and s.effect and s.measured]
        if known:
            rows.append(np.sum(known, axis=0))
    return spearman(*np.array(rows).T) if rows else None


def table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["spearman"]))
    shown = [name.removeprefix("weights ").removeprefix("activations ") for name in names]
    lines = [
        f"| model | layers | {' | '.join(shown)} | 8 bits together | expected / measured dB"
        " | expected s | processor s | measured s |",
        "| --- |" + " --- |" * (len(names) + 6),
    ]
    for row in rows:
        cells = [number(row["spearman"].get(name)) for name in names]
        lines.append(
            f"| {row['model']} | {row['layers']} | {' | '.join(cells)} | {number(row['together'])}"
            f" | {row['ratio_db']:+.1f} | {row['expected_s']:.1f} | {row['expected_cpu_s']:.1f}"
            f" | {row['measured_s']:.1f} |"
        )
    return "\n".join(lines)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
