"""Seconds and memory of calibration, here and in onnxruntime.quantization, over bare inference.

    ONNXQ_ZOO=PATH python benchmarks/calibration.py [--model NAME] [--samples N] [--rounds N]
    python benchmarks/calibration.py --model FILE.onnx --calib FOLDER

What is timed, samples in memory. Bare: the float model on the samples, one by one, on all cores.
Collection: fetch every tensor that gets an encoding, collect its statistics, choose its range.
Whole pass: all that `calibrate` does, placement and weights, too. onnxruntime: its calibrator with
default options, from the file of the same graph to the ranges. The bare model runs before each
measurement, and the best of the rounds counts: other work on the machine stretches what needs all
cores at once more than what does not. Processor time, which other work hardly changes, is compared
with that of the bare model on one thread. Peaks of memory are those of fresh processes that read
the samples from files, over again where there are too few.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import _zoo
from _memory import available, peak
from _zoo import Feed, Reader, stream
from onnxruntime.quantization import CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator

from onnxq.analysis.latency import NO_SPINNING
from onnxq.model import Model, load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Calibrate
from onnxq.recipe import load as load_recipe
from onnxq.runtime import Session, cores

# method -> onnxruntime's, where it has it; at most so many times bare inference
METHODS = {
    "minmax": (CalibrationMethod.MinMax, 1.5),
    "moving-average": (CalibrationMethod.MinMax, 2.0),
    "percentile": (CalibrationMethod.Percentile, 2.0),
    "entropy": (CalibrationMethod.Entropy, 2.0),
    "mse": (None, 2.0),
}
HISTOGRAM = ("percentile", "entropy", "mse")
# Measurements are repeated in every round as long as they have taken no more seconds in all.
PATIENCE = 20.0
# The memory that is to be there, over the bytes of all tensors, where a calibrator keeps them all.
ROOM = 2.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mobilenetv1_075", help="of the zoo, or an .onnx file")
    parser.add_argument("--calib", type=Path, help="folder of .npz samples for an .onnx file")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="8 samples, one round: does it run?")
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks of memory out")
    parser.add_argument("--peak", nargs=3, metavar=("WHO", "METHOD", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.quick:
        args.samples, args.rounds = 8, 1
    if args.calib is None:
        zoo = _zoo.folder()
        source, calib = zoo / "models" / f"{args.model}.onnx", _zoo.samples(zoo, args.model)
    else:
        source, calib = Path(args.model), args.calib
    if args.peak:
        who, method, count = args.peak
        print(json.dumps(consume(who, method, source, calib, int(count))))
        return
    times = seconds(source, calib, args.samples, args.rounds)
    print(f"{source.stem}, {args.samples} samples, {cores()} cores, {args.rounds} rounds")
    print(time_table(times))
    peaks = [] if args.no_memory else memory(source, calib, args.samples)
    if peaks:
        print(memory_table(peaks))
    _zoo.OUT.mkdir(exist_ok=True)
    facts = {"model": source.stem, "samples": args.samples, "cores": cores()}
    text = json.dumps({**facts, "seconds": times, "peaks": peaks}, indent=1)
    (_zoo.OUT / "calibration.json").write_text(text)


# ---------------------------------------------------------------------- time


def seconds(source: Path, calib: Path, count: int, rounds: int) -> dict[str, Any]:
    """(Seconds, processor seconds) of every measurement, by what was measured."""
    feeds = [*stream(calib, count)]
    model = prepared(source, feeds)
    names = encoded(model, feeds)
    bare = Session(source, config=NO_SPINNING)
    single = Session(source, threads=1)
    jobs: dict[str, Callable[[], object]] = {"single": lambda: infer(single, feeds)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        model.save(file)
        tensors = {"here": len(names), "onnxruntime": len(theirs(file, feeds[:1], "minmax"))}
        for method, (known, _) in METHODS.items():
            ours(model, names, feeds[:1], method)  # compiles its kernels, if need be
            jobs[f"here {method}"] = lambda m=method: ours(model, names, feeds, m)
            jobs[f"pass {method}"] = lambda m=method: whole(model, feeds, m)
            if known is not None:
                jobs[f"onnxruntime {method}"] = lambda m=method: theirs(file, feeds, m)
        taken: dict[str, list[tuple[float, float]]] = {"bare": []} | {name: [] for name in jobs}
        infer(bare, feeds)
        for _ in range(rounds):
            for name, job in jobs.items():
                if sum(wall for wall, _ in taken[name]) <= PATIENCE:
                    taken["bare"].append(timed(lambda: infer(bare, feeds)))
                    taken[name].append(timed(job))
    return {"tensors": tensors, "taken": taken}


def timed(job: Callable[[], object]) -> tuple[float, float]:
    start, processor = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - start, time.process_time() - processor


def infer(session: Session, feeds: list[Feed]) -> None:
    for feed in feeds:
        session.run_shared(feed)


def prepared(source: Path, feeds: Any) -> Model:
    """The model as it comes to calibration."""
    steps = takewhile(lambda p: not isinstance(p, Calibrate), load_recipe("default").passes)
    model, _ = PassManager(*steps)(load(source), feeds)
    return model


def encoded(model: Model, feeds: list[Feed]) -> list[str]:
    """The tensors whose statistics `calibrate` asks for."""
    ctx = Context(feeds[:1])
    Calibrate().apply(model.clone(), ctx)
    return [*(ctx.observed or ())]


def ours(model: Model, names: list[str], feeds: Any, method: Any) -> dict[str, Any]:
    found = Context(feeds).statistics(model, names, histogram=method in HISTOGRAM)
    return {name: found[name].range(method) for name in names}


def whole(model: Model, feeds: Any, method: Any) -> None:
    Calibrate(method=method).apply(model.clone(), Context(feeds))


def theirs(file: Path, feeds: Any, method: str) -> dict[str, Any]:
    """Ranges by onnxruntime's calibrator, which prints as it goes."""
    with contextlib.redirect_stdout(io.StringIO()):
        calibrator = create_calibrator(
            file,
            augmented_model_path=str(file.with_suffix(".augmented.onnx")),
            calibrate_method=METHODS[method][0],
            extra_options={"moving_average": True} if method == "moving-average" else {},
        )
        calibrator.collect_data(Reader(feeds))
        return dict(calibrator.compute_data().items())


def time_table(times: dict[str, Any]) -> str:
    tensors = times["tensors"]
    best = {
        name: [min(column) for column in zip(*t, strict=True)] for name, t in times["taken"].items()
    }
    bare, single = best["bare"][0], best["single"][1]
    lines = [
        f"| method | collection ({tensors['here']} tensors) | whole pass"
        f" | onnxruntime ({tensors['onnxruntime']} tensors) | collection at most |",
        "| --- | --- | --- | --- | --- |",
    ]

    def cell(name: str) -> str:
        if name not in best:
            return "has none"
        wall, processor = best[name]
        return f"{wall:.2f} s, {wall / bare:.2f}x, processor {processor / single:.2f}x"

    for method, (_, most) in METHODS.items():
        cells = [cell(f"{who} {method}") for who in ("here", "pass", "onnxruntime")]
        missed = "" if best[f"here {method}"][0] <= most * bare else " **missed**"
        lines.append(f"| {method} | {' | '.join(cells)} | {most}x{missed} |")
    slowest = max(wall for wall, _ in times["taken"]["bare"])
    lines.append(
        f"\nbare: {bare:.2f} s at best, {slowest:.2f} s at worst of {len(times['taken']['bare'])};"
        f" on one thread {best['single'][0]:.2f} s, processor {single:.2f} s"
    )
    return "\n".join(lines)


# ---------------------------------------------------------------------- memory


def memory(source: Path, calib: Path, count: int) -> list[dict[str, Any]]:
    """Peaks of fresh processes, for so many samples and ten times as many."""
    rows = [("bare", "inference"), ("here", "minmax"), ("here", "mse")]
    rows += [("onnxruntime", "minmax"), ("onnxruntime", "percentile")]
    peaks = []
    for who, method in rows:
        row: dict[str, Any] = {"who": who, "method": method}
        for n in (count, 10 * count):
            command = [sys.executable, __file__, "--peak", who, method, str(n)]
            command += ["--model", str(source), "--calib", str(calib)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row[str(n)] = json.loads(done.stdout)
        peaks.append(row)
    return peaks


def consume(who: str, method: str, source: Path, calib: Path, count: int) -> dict[str, float]:
    """Calibrate, and tell the peak of this process; or tell what would be needed."""
    feeds = lambda: stream(calib, count)  # noqa: E731
    if who == "bare":
        session = Session(source)
        for feed in feeds():
            session.run_shared(feed)
    elif who == "here":
        whole(prepared(source, feeds), feeds, method)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            prepared(source, feeds).save(file)
            if method in HISTOGRAM:  # keeps every tensor of every sample
                needed = ROOM * count * tensor_bytes(file, next(feeds()))
                if needed > available():
                    return {"needed": needed}
            theirs(file, feeds(), method)
    return {"peak": peak()}


def tensor_bytes(file: Path, feed: Feed) -> int:
    """Bytes of all tensors that nodes of the model put out."""
    model = load(file)
    names = [t.name for node in model.graph.nodes for t in node.outputs if t.name]
    return sum(a.nbytes for a in Session(file, outputs=names).run_shared(feed).values())


def memory_table(peaks: list[dict[str, Any]]) -> str:
    counts = [key for key in peaks[0] if key.isdigit()]
    lines = [
        f"| peak memory, MB | {' | '.join(f'{n} samples' for n in counts)} |",
        f"| --- |{' --- |' * len(counts)}",
    ]
    for row in peaks:
        cells = [
            f"{row[n]['peak'] / 1e6:.0f}"
            if "peak" in row[n]
            else f"not run: {row[n]['needed'] / 1e6:.0f} needed"
            for n in counts
        ]
        lines.append(f"| {row['who']} {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
