"""Quantization by onnxq and by other tools: the same models, samples and scores, in one run.

    ONNXQ_ZOO=PATH ONNXQ_PEERS=PATH python benchmarks/peers.py [MODEL...] [--env NAME=PYTHON]...
    python benchmarks/peers.py FILE.onnx --calib FOLDER

Every tool runs in a process and an environment of its own: the interpreter is that of --env, or
NAME/bin/python in the folder that ONNXQ_PEERS names (README.md beside this script tells how to make
it); onnxq and onnxruntime.quantization have this one otherwise, and other tools are not measured.
Settings are those that each tool's documentation begins with, 8 bits, scales per channel; --more
adds others, some of them meant to be more accurate. Scores are those of the zoo's eval.py, on
onnxruntime's kernels as it loads the files, also for tools that simulate integers and export Q/DQ.
Seconds, from samples in memory to the file, stand beside bare float inference of the same samples,
and processor seconds, which other work on the machine hardly changes, beside those of inference on
one thread; what a tool does once after it is installed, such as compiling kernels, is done before.
Memory is the peak of the process; latency that of one sample on one thread, lower quartile, over
the float model's; the share of multiply-adds in integers is what onnxruntime runs. The tables tell
where onnxq, without options, is not better, and by how much.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _zoo
import numpy as np
from _peer_tables import Row, quantized_table, simplified_table, tool_table
from _text import last_line
from _zoo import Feed, run, stream

import onnxq
from onnxq.analysis.latency import NO_SPINNING, runs
from onnxq.runtime import Session, cores

HERE = Path(__file__).resolve().parent
# model -> task and metric of eval.py
MODELS = {
    "cifar_resnet20": ("cifar10", "top1"),
    "mobilenetv1_075": ("imagenet", "top1"),
    "vww_mobilenetv1_025": ("vww", "top1"),
    "espnet_camvid": ("camvid", "miou"),
    "m5_speech": ("speech", "top1"),
}
OWN = ("onnxq", "onnxruntime")
AIMET = {"config": "default_config_per_channel"}
# tool -> what a row is called -> settings of its adapter; the first row of onnxq is compared with
QUANTIZERS: dict[str, dict[str, dict[str, Any]]] = {
    "onnxq": {"no options": {}},
    "onnxruntime": {"min-max": {"method": "MinMax"}},
    "nncf": {"default": {}},
    "quark": {"min-max": {"method": "MinMax"}},
    "aimet": {
        "min-max": {"scheme": "min_max", **AIMET},
        "tf-enhanced": {"scheme": "tf_enhanced", **AIMET},
    },
    "onnxsim": {
        "quantize_static": {"full_graph": False},
        "the whole graph": {"full_graph": True},
    },
}
# Those of --more.
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "onnxq": {"recipe accurate": {"recipe": "accurate"}},
    "onnxruntime": {"entropy": {"method": "Entropy"}},
    "nncf": {"full bias correction": {"fast_bias_correction": False}},
    "quark": {"A8W8, per tensor": {"name": "A8W8"}},
    "aimet": {"equalized": {"scheme": "tf_enhanced", "equalize": True, **AIMET}},
}
SIMPLIFIERS: dict[str, dict[str, dict[str, Any]]] = {
    "onnxq": {
        "clean, fold-batch-norm": {"task": "simplify", "fold": True},
        "clean": {"task": "simplify", "fold": False},
    },
    "onnxsim": {"simplify": {"task": "simplify"}},
}
# Starts of a tool, the fastest of which counts; seconds after which a task is given up.
STARTS, PATIENCE = 2, 900


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="of the zoo, or an .onnx file")
    parser.add_argument("--calib", type=Path, help="folder of .npz samples for an .onnx file")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--more", action="store_true", help="settings, much slower ones, too")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, each model")
    args = parser.parse_args(arguments)
    if args.calib is not None and not args.models:
        parser.error("--calib is for .onnx files: name some")
    zoo = None if args.calib else _zoo.folder()
    if zoo is not None and (unknown := [m for m in args.models if m not in MODELS]):
        parser.error(f"no model {unknown[0]}; there are {', '.join(MODELS)}")
    tools = interpreters(args.env, parser.error)
    if zoo is None:
        pairs = [(Path(name).resolve(), args.calib.resolve()) for name in args.models]
    else:
        names = args.models or MODELS
        found = [(zoo / "models" / f"{name}.onnx", _zoo.samples(zoo, name)) for name in names]
        pairs = [(source.resolve(), calib.resolve()) for source, calib in found]
    known = {t: s | (MORE.get(t, {}) if args.more else {}) for t, s in QUANTIZERS.items()}
    about = {name: describe(name, tools[name], known[name], *pairs[0]) for name in tools}
    rows: dict[str, list[Row]] = {"quantized": [], "simplified": []}
    _zoo.OUT.mkdir(exist_ok=True)
    for source, calib in pairs:
        with tempfile.TemporaryDirectory() as folder:
            rows["quantized"] += quantized(
                installed(tools, known), source, calib, zoo, args.seconds, Path(folder)
            )
            rows["simplified"] += simplified(tools, source, calib, args.seconds, Path(folder))
        text = json.dumps({"tools": about, **rows}, indent=1)
        (_zoo.OUT / "peers.json").write_text(text)
    counts = {len([*calib.glob("*.npz")]) for _, calib in pairs}
    print(f"{cores()} cores; samples: {', '.join(map(str, sorted(counts)))}")
    print(f"{tool_table(about)}\n\n{quantized_table(rows['quantized'])}\n")
    print(simplified_table(rows["simplified"]))


# ---------------------------------------------------------------------- processes


def interpreters(given: Sequence[str], wrong: Callable[[str], object]) -> dict[str, Path | None]:
    """The interpreter of each tool; None for those that are not installed."""
    found: dict[str, Path | None] = dict.fromkeys(QUANTIZERS)
    found |= dict.fromkeys(OWN, Path(sys.executable))
    if "ONNXQ_PEERS" in os.environ:
        for name in found:
            python = Path(os.environ["ONNXQ_PEERS"]) / name / "bin" / "python"
            if python.exists():
                found[name] = python
    for entry in given:
        name, _, path = entry.partition("=")
        if name not in found:
            wrong(f"--env: no tool {name}; there are {', '.join(found)}")
        if not Path(path).is_file():
            wrong(f"--env: {name}: {path or 'nothing'} is no interpreter: NAME=PATH/bin/python")
        found[name] = Path(path)
    return found


def adapter(name: str, python: Path, *arguments: object) -> Row:
    """What the tool's adapter tells; or the error that it ended with."""
    command = [python, HERE / "_adapter.py", name, *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if name == "onnxq":  # that of this checkout, wherever it is installed from
        environment["PYTHONPATH"] = str(HERE.parent)
    with tempfile.TemporaryDirectory() as folder:  # some leave files where they run
        try:
            done = subprocess.run(
                [*map(str, command)],
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                cwd=folder,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {PATIENCE} s"}
    if done.returncode:
        return {"error": last_line(done.stderr) or f"status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def describe(
    name: str,
    python: Path | None,
    settings: dict[str, dict[str, Any]],
    source: Path,
    calib: Path,
) -> Row | None:
    """Version, size and start of a tool, which then is warm; None if it is not installed."""
    if python is None:
        return None
    print(f"{name}: {python}", file=sys.stderr, flush=True)
    starts = [adapter(name, python) for _ in range(STARTS)]
    if any("error" in s for s in starts):
        return next(s for s in starts if "error" in s)
    with tempfile.TemporaryDirectory() as folder:
        for given in settings.values():  # compiles what it compiles at first use
            target = Path(folder) / "out.onnx"
            adapter(name, python, source, calib, target, json.dumps(given))
    return {**starts[0], "import_s": min(s["import_s"] for s in starts)}


# ---------------------------------------------------------------------- measurements


def quantized(
    tools: list[tuple[str, dict[str, dict[str, Any]], Path]],
    source: Path,
    calib: Path,
    zoo: Path | None,
    seconds: float,
    folder: Path,
) -> list[Row]:
    """A row for each tool and setting, and one of the float model before them."""
    feeds = [*stream(calib, len([*calib.glob("*.npz")]))]
    name = source.stem
    first: Row = {"model": name, "tool": "float", "setting": "", "file": source}
    rows, single = [first], inference(source, feeds, 1)[1]
    for tool, settings, python in tools:
        for setting, given in settings.items():
            target = folder / f"{name}.{len(rows)}.onnx"
            bare = inference(source, feeds, 0)[0]  # before each: other work comes and goes
            row = adapter(tool, python, source, calib, target, json.dumps(given))
            row |= {"model": name, "tool": tool, "setting": setting, "file": target}
            row |= {"bare": bare, "bare_processor": single}
            rows.append(row)
            told = row.get("error") or f"{row['seconds']:.1f} s"
            print(f"{name} {tool} {setting}: {told}", file=sys.stderr, flush=True)
    for row in rows:
        if "error" not in row:
            judge(row, zoo, feeds)
    timed([row for row in rows if "error" not in row], feeds[0], seconds)
    for row in rows:
        del row["file"]
    return rows


def installed(
    tools: dict[str, Path | None], known: dict[str, dict[str, dict[str, Any]]]
) -> list[tuple[str, dict[str, dict[str, Any]], Path]]:
    """The tools that there are, with their settings."""
    return [(t, s, python) for t, s in known.items() if (python := tools[t]) is not None]


def inference(source: Path, feeds: list[Feed], threads: int) -> tuple[float, float]:
    """Seconds and processor seconds of the float model for all samples, the best of three."""
    session = Session(source, threads=threads, config=NO_SPINNING)
    taken, worked = [], []
    for _ in range(3):
        start, processor = time.perf_counter(), time.process_time()
        for feed in feeds:
            session.run_shared(feed)
        taken.append(time.perf_counter() - start)
        worked.append(time.process_time() - processor)
    return min(taken), min(worked)


def judge(row: Row, zoo: Path | None, feeds: list[Feed]) -> None:
    """Add score, bytes and the share of multiply-adds in integers of a row's file."""
    row["file_bytes"] = row["file"].stat().st_size
    task, metric = MODELS.get(row["model"], ("", ""))
    try:
        if row["tool"] != "float":
            view = onnxq.doctor(row["file"], data=feeds[:1]).views[0]
            row["share"] = view.share("measured", macs=True)
        if zoo is not None:
            row["score"] = float(json.loads(run(zoo / "eval.py", task, row["file"]))[metric])
    except onnxq.OnnxqError as error:
        row["error"] = last_line(str(error))
    except subprocess.CalledProcessError as error:
        row["error"] = last_line(error.stderr)


def timed(rows: list[Row], feed: Feed, seconds: float) -> None:
    """Add the latency of each row's file, over that of the first."""
    sessions = [Session(row["file"], threads=1, config=NO_SPINNING) for row in rows]
    times = runs(sessions, feed, seconds=seconds)
    low = [float(np.percentile(t, 25)) for t in times]
    for row, ms in zip(rows, low, strict=True):
        row |= {"ms": ms, "latency": ms / low[0]}


def simplified(
    tools: dict[str, Path | None], source: Path, calib: Path, seconds: float, folder: Path
) -> list[Row]:
    """A row for each tool that simplifies, and one of the model before them."""
    feed = next(stream(calib, 1))
    rows: list[Row] = [{"model": source.stem, "tool": "none", "setting": "", "file": source}]
    for tool, settings, python in installed(tools, SIMPLIFIERS):
        for setting, given in settings.items():
            target = folder / f"{source.stem}.simple.{len(rows)}.onnx"
            row = adapter(tool, python, source, calib, target, json.dumps(given))
            rows.append({**row, "model": source.stem, "tool": tool, "setting": setting})
            rows[-1]["file"] = target
    good = [row for row in rows if "error" not in row]
    wanted = Session(source, level="disabled").run(feed)
    for row in good:
        row["nodes"] = len(onnxq.load(row["file"]).graph.nodes)
        got = Session(row["file"], level="disabled").run(feed)
        size = max(float(np.abs(v).max()) for v in wanted.values())
        row["apart"] = max(float(np.abs(got[k] - wanted[k]).max()) for k in wanted) / size
    timed(good, feed, seconds)
    for row in rows:
        del row["file"]
    return rows


if __name__ == "__main__":
    main()
