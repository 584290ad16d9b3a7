"""What simulation costs a picture, beside the float model and aimet-onnx.

    ONNXQ_ZOO=PATH python benchmarks/simulation.py [MODEL...] [--threads N] [--seconds N] [--quick]
    python benchmarks/simulation.py FILE.onnx --calib FOLDER

Models run in turn on one sample, in an order drawn anew each time. Shown are median milliseconds
and quartiles, and ratios of lower quartiles. "integers" is the default simulation, on the kernels
that will be deployed; "floats" that without optimizations, to the bit; "fast floats" that at level
all.

aimet-onnx lives in an environment of its own: ONNXQ_AIMET=PYTHON names the Python that has it. Its
simulation of the same float model runs there with the same encodings, timed by its own clock.
Encodings are exchanged both ways: lines below the table say how many tensors each side took over
from the other's file, and by how much the ends of their ranges differ, in steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _zoo
import numpy as np
from _zoo import Feed, spread, stream

import onnxq
from onnxq.analysis.latency import NO_SPINNING, WARM_UP, runs
from onnxq.encoding import Encodings
from onnxq.runtime import Session

MODELS = ("cifar_resnet20", "cifar_vit", "mobilenetv1_075")
NAMES = ("float", "integers", "floats", "fast floats", "aimet-onnx")
Ranges = Mapping[str, Sequence[Sequence[float]]]


def main(arguments: Sequence[str] | None = None) -> None:
    _zoo.timed(measure, table, __doc__, arguments, MODELS)


def measure(source: Path, calib: Path, count: int, threads: int, seconds: float) -> dict[str, Any]:
    feeds = [*stream(calib, count)]
    sim = onnxq.QuantizationSimModel(source, threads=threads)
    sim.compute_encodings(feeds)
    with tempfile.TemporaryDirectory() as folder:
        files = sim.export(folder, "model")
        sessions: dict[str, Any] = {
            "float": Session(files.model, threads=threads, config=NO_SPINNING),
            "integers": Simulation(sim),
        }
        for name, level in (("floats", "disabled"), ("fast floats", "all")):
            other = onnxq.QuantizationSimModel(
                files.model, threads=threads, arithmetic="float", level=level
            )
            other.load_encodings(files.encodings)
            sessions[name] = Simulation(other)
        peer = os.environ.get("ONNXQ_AIMET")
        if peer:
            sessions["aimet-onnx"] = Aimet(peer, files, feeds, Path(folder), threads)
        times = runs([*sessions.values()], feeds[0], seconds=seconds)
        found = dict(zip(sessions, times, strict=True))
        exchange = None
        if peer:
            with sessions["aimet-onnx"] as theirs:
                found["aimet-onnx"] = np.array(theirs.ms[WARM_UP:])
                exchange = {
                    "there": matched(theirs.ranges, sim.encodings),
                    "back": back(theirs, Path(folder)),
                }
    return {
        "model": source.stem,
        "threads": threads,
        "runs": len(found["float"]),
        "ms": {n: np.percentile(row, [25, 50, 75]).tolist() for n, row in found.items()},
        "exchange": exchange,
    }


class Simulation:
    """A simulation, as what is timed runs."""

    def __init__(self, sim: onnxq.QuantizationSimModel) -> None:
        self._session = sim.session

    def run(self, feed: Feed) -> Any:
        return self._session.run(None, feed)


# ---------------------------------------------------------------------- aimet-onnx


class Aimet:
    """Their simulation of the exported float model with our encodings, in a process of its own."""

    def __init__(
        self, python: str, files: Any, feeds: Sequence[Feed], folder: Path, threads: int
    ) -> None:
        samples = folder / "samples.npz"
        arrays = {
            f"{i}/{name}": array for i, feed in enumerate(feeds) for name, array in feed.items()
        }
        np.savez(samples, **arrays)
        script = Path(__file__).with_name("_aimet.py")
        given = (files.model, files.encodings, samples, folder, threads)
        self._log = (folder / "aimet.log").open("w+")
        self._process = subprocess.Popen(
            [python, str(script), *map(str, given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.ranges: Ranges = self._answer()
        self.ms: list[float] = []

    def run(self, feed: Feed) -> None:
        """Run the first sample there."""
        self.ms.append(self._ask(""))

    def calibrate(self) -> Ranges:
        """Compute encodings there, and export them; the ranges."""
        ranges: Ranges = self._ask("calibrate")
        return ranges

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"aimet-onnx failed:\n{self._log.read()[-2000:]}")
        return json.loads(line)

    def __enter__(self) -> Aimet:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()  # type: ignore[union-attr]  # of a pipe
        self._log.close()


def matched(theirs: Ranges, ours: Encodings) -> dict[str, float]:
    """How many tensors have a quantizer there and an encoding here, and how far they are apart."""
    apart, both = 0.0, 0
    for name, encoding in ours.items():
        if name not in theirs:
            continue
        both += 1
        for got, steps in zip(theirs[name], (encoding.qmin, encoding.qmax), strict=True):
            wanted = (steps - encoding.zero_point.astype(np.float64)) * encoding.scale
            apart = max(
                apart, float(np.max(np.abs(np.array(got) - wanted.reshape(-1)) / encoding.scale))
            )
    return {"ours": len(ours), "theirs": len(theirs), "both": both, "apart": apart}


def back(theirs: Aimet, folder: Path) -> dict[str, float]:
    """The same of encodings that they compute and we load."""
    ranges = theirs.calibrate()
    sim = onnxq.QuantizationSimModel(folder / "theirs.onnx")
    sim.load_encodings(folder / "theirs.encodings")
    return matched(ranges, sim.encodings)


# ---------------------------------------------------------------------- tables


def table(rows: list[dict[str, Any]]) -> str:
    ratios = [
        *((name, "float") for name in ("integers", "floats", "fast floats")),
        *(("aimet-onnx", name) for name in ("integers", "floats", "fast floats")),
    ]
    heads = ["model", *(f"{n} ms" for n in NAMES), *(f"{a} / {b}" for a, b in ratios)]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for row in rows:
        ms = row["ms"]
        cells = [spread(ms.get(name), "not installed") for name in NAMES]
        cells += [f"{ms[a][0] / ms[b][0]:.2f}" if a in ms else "" for a, b in ratios]
        lines.append(f"| {row['model']} | {' | '.join(cells)} |")
    for row in rows:
        for way, found in (row["exchange"] or {}).items():
            what = "our encodings there" if way == "there" else "their encodings here"
            lines.append(
                f"\n{row['model']}, {what}: {found['both']} tensors matched, of {found['ours']}"
                f" here and {found['theirs']} there; ends of ranges within {found['apart']:.1e}"
                " steps"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
