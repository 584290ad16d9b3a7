"""Accuracy and latency against multiply-accumulates, for every method of compression.

    ONNXQ_ZOO=PATH python benchmarks/compression.py [MODEL...] [--shares 0.8 0.6] [--multiple 8]

Each method gets the same budget, and chooses layers by itself. "plain" has the same ranks and the
plain SVD; "fitted" has weights by the error of outputs, layer after layer. No training. Scores are
those of the zoo's eval.py; latency is that of one sample on one thread, timed in turn with the
float model, as a ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import _zoo
import numpy as np
from _zoo import run

import onnxq
from onnxq.analysis.latency import NO_SPINNING, runs
from onnxq.passes import Clean, Compress, FoldBatchNorm, FoldDeadChannels
from onnxq.runtime import Session

# model -> task and metric of eval.py, and shares of multiply-accumulates
MODELS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "cifar_resnet20": ("cifar10", "top1", (0.8, 0.7, 0.6, 0.5)),
    "cifar_resnet56": ("cifar10", "top1", (0.8, 0.7, 0.6, 0.5)),
    "mobilenetv1_075": ("imagenet", "top1", (0.9, 0.8, 0.7, 0.6)),
    "espnet_camvid": ("camvid", "miou", (0.9, 0.8, 0.7, 0.6)),
}
METHODS = {
    "spatial-svd": ("spatial-svd",),
    "weight-svd": ("weight-svd",),
    "auto": ("spatial-svd", "weight-svd"),
}
PREPARE = (Clean(), FoldBatchNorm(), FoldDeadChannels())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=[*MODELS])
    parser.add_argument("--shares", nargs="*", type=float, help="in place of each model's own")
    parser.add_argument("--multiple", type=int, default=8, help="ranks are multiples of this")
    parser.add_argument("--calib", type=Path, help="samples, in place of the zoo's")
    parser.add_argument("--seconds", type=float, default=3.0, help="to time each model for")
    args = parser.parse_args(arguments)
    zoo = None if args.calib else _zoo.folder()
    _zoo.OUT.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows += measure(zoo, name, args)
        (_zoo.OUT / "compression.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))


def measure(zoo: Path | None, name: str, args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """A row for each share and method; a file as a model is not scored."""
    source = Path(name) if zoo is None else zoo / "models" / f"{name}.onnx"
    calib = args.calib or _zoo.samples(zoo, name)
    shares = args.shares or MODELS[name][2]
    feed = next(_zoo.stream(calib, 1))
    float_score = score(zoo, name, source)
    for method, methods in METHODS.items():
        kept = _zoo.OUT / f"{source.stem}.{method}.{args.multiple}.json"
        kept.unlink(missing_ok=True)  # of other code, perhaps
        for share in shares:
            row: dict[str, Any] = {"model": source.stem, "method": method, "share": share}
            row["float"] = float_score
            for way, reconstruct in (("plain", "none"), ("fitted", "all")):
                step = Compress(
                    share=share,
                    methods=methods,
                    multiple=args.multiple,
                    sensitivities=str(kept),
                    reconstruct=reconstruct,
                )
                start = time.perf_counter()
                try:
                    small, report = onnxq.PassManager(*PREPARE, step)(source, calib)
                except onnxq.OnnxqError as error:
                    row["note"] = str(error)
                    break
                result = _zoo.OUT / f"{source.stem}.small.onnx"
                small.save(result)
                macs = report.facts["compression"]["macs"]
                row["macs"] = macs["after"] / macs["before"]
                row[way] = score(zoo, name, result)
                row["seconds"] = time.perf_counter() - start
                if way == "fitted":
                    pair = [Session(p, threads=1, config=NO_SPINNING) for p in (source, result)]
                    before, after = runs(pair, feed, seconds=args.seconds)
                    row["latency"] = float(np.median(after) / np.median(before))
            print(row, file=sys.stderr, flush=True)
            yield row


def score(zoo: Path | None, name: str, path: Path) -> float | None:
    if zoo is None:
        return None
    task, metric, _ = MODELS[name]
    return float(json.loads(run(zoo / "eval.py", task, path))[metric])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; a fitted model that is no better than the plain one is marked."""
    lines = [
        "| model | float | method | MACs | plain | fitted | latency |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        head = f"| {row['model']} | {_number(row['float'])} | {row['method']}"
        if "fitted" not in row:
            lines.append(f"{head} | {row['share']:.2f} | {row['note']} | | |")
            continue
        missed = row["fitted"] is not None and row["fitted"] <= row["plain"]
        lines.append(
            f"{head} | {row['macs']:.3f} | {_number(row['plain'])} | {_number(row['fitted'])}"
            f"{' **missed**' if missed else ''} | {row['latency']:.2f} |"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
