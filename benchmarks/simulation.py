"""What simulation costs a picture, beside the float model, the integer model and aimet-onnx.

    ONNXQ_ZOO=PATH python benchmarks/simulation.py [MODEL...] [--threads N] [--seconds N] [--quick]
    python benchmarks/simulation.py FILE.onnx --calib FOLDER

Models run in turn in one process on one sample, in an order drawn anew each time. Shown are median
milliseconds and quartiles, and lower quartiles over those of the float model. "exact" is the
simulation to the bit, "fast" that at level all. Where aimet-onnx can be imported its simulation of
the same float model runs, too, with the same encodings. They are exchanged both ways: lines below
the table say how many tensors each side took over from the other's file, and by how much the ends
of their ranges differ, in steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _zoo
import numpy as np
import onnx
from _zoo import Feed, spread, stream

import onnxq
from onnxq.analysis.latency import NO_SPINNING, runs
from onnxq.encoding import Encodings
from onnxq.runtime import Session

MODELS = ("cifar_resnet20", "cifar_vit", "mobilenetv1_075")
NAMES = ("float", "integers", "exact", "fast", "aimet-onnx")


def main(arguments: Sequence[str] | None = None) -> None:
    _zoo.timed(measure, table, __doc__, arguments, MODELS)


def measure(source: Path, calib: Path, count: int, threads: int, seconds: float) -> dict[str, Any]:
    feeds = [*stream(calib, count)]
    sim = onnxq.QuantizationSimModel(source, threads=threads)
    sim.compute_encodings(feeds)
    with tempfile.TemporaryDirectory() as folder:
        files = sim.export(folder, "model")
        fast = onnxq.QuantizationSimModel(files.model, threads=threads, level="all")
        fast.load_encodings(files.encodings)
        sessions: dict[str, Any] = {
            "float": Session(files.model, threads=threads, config=NO_SPINNING),
            "integers": Session(files.qdq, threads=threads, config=NO_SPINNING),
            "exact": Runner(sim.session),
            "fast": Runner(fast.session),
        }
        exchange = None
        if (theirs := aimet(files, threads)) is not None:
            sessions["aimet-onnx"] = Runner(theirs.session)
            exchange = {
                "there": matched(theirs, sim.encodings),
                "back": back(theirs, feeds, Path(folder)),
            }
    times = runs([*sessions.values()], feeds[0], seconds=seconds)
    quartiles = [np.percentile(row, [25, 50, 75]).tolist() for row in times]
    return {
        "model": source.stem,
        "threads": threads,
        "runs": len(times[0]),
        "ms": dict(zip(sessions, quartiles, strict=True)),
        "exchange": exchange,
    }


class Runner:
    """A session of onnxruntime's face, as what is timed runs."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def run_shared(self, feed: Feed) -> Any:
        return self._session.run(None, feed)

    run = run_shared


# ---------------------------------------------------------------------- aimet-onnx


def aimet(files: Any, threads: int) -> Any:
    """Their simulation of the exported float model with our encodings; None if not installed."""
    try:
        from aimet_onnx import QuantizationSimModel
        from aimet_onnx.quantsim import load_encodings_to_sim
    except ImportError:
        return None
    options = {"intra_op_num_threads": threads}
    theirs = QuantizationSimModel(onnx.load(files.model), session_options_kwargs=options)
    load_encodings_to_sim(theirs, str(files.encodings), strict=False)
    return theirs


def matched(theirs: Any, ours: Encodings) -> dict[str, float]:
    """How many tensors have a quantizer there and an encoding here, and how far they are apart."""
    quantizers = {n: q for n, q in theirs.qc_quantize_op_dict.items() if q.enabled}
    apart, both = 0.0, 0
    for name, encoding in ours.items():
        if name not in quantizers:
            continue
        known, both = quantizers[name].get_encodings(), both + 1
        for end, steps in (("min", encoding.qmin), ("max", encoding.qmax)):
            wanted = (steps - encoding.zero_point.astype(np.float64)) * encoding.scale
            got = np.array([getattr(e, end) for e in known])
            apart = max(apart, float(np.max(np.abs(got - wanted.reshape(-1)) / encoding.scale)))
    return {"ours": len(ours), "theirs": len(quantizers), "both": both, "apart": apart}


def back(theirs: Any, feeds: list[Feed], folder: Path) -> dict[str, float]:
    """The same of encodings that they compute and we load."""
    theirs.compute_encodings(feeds)
    theirs.export(str(folder), "theirs")
    sim = onnxq.QuantizationSimModel(folder / "theirs.onnx")
    sim.load_encodings(folder / "theirs.encodings")
    return matched(theirs, sim.encodings)


# ---------------------------------------------------------------------- tables


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| model | {' | '.join(f'{name} ms' for name in NAMES)} | exact / float | fast / float"
        " | aimet-onnx / float | aimet-onnx / exact |",
        f"| {' | '.join(['---'] * (5 + len(NAMES)))} |",
    ]
    for row in rows:
        ms = row["ms"]
        cells = [spread(ms.get(name), "not installed") for name in NAMES]
        for top, under in (
            *((name, "float") for name in ("exact", "fast", "aimet-onnx")),
            ("aimet-onnx", "exact"),
        ):
            cells.append(f"{ms[top][0] / ms[under][0]:.2f}" if top in ms else "")
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
