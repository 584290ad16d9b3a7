"""How far a model is from its float version, and how fast."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxq.analysis import error
from onnxq.analysis.error import OutputError
from onnxq.analysis.latency import NO_SPINNING, Latency, pair
from onnxq.api import calibration
from onnxq.errors import OnnxqError
from onnxq.model import load
from onnxq.model_io import file_bytes
from onnxq.pass_manager import Context
from onnxq.progress import Progress
from onnxq.runtime import Session

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """How far a model is from its float version.

    Args:
        outputs: Errors per output.
        bytes: File sizes: float, other.
        latency: Milliseconds per sample of both, and their ratio; None if not timed.
        samples: How many samples were compared.
        threads: Threads of onnxruntime while timing; 0 for all cores.
        notes: What was given up when loading the samples.
    """

    outputs: list[OutputError]
    bytes: tuple[int, int]
    latency: Latency | None
    samples: int
    threads: int
    notes: list[str]

    @property
    def latency_ms(self) -> tuple[float, ...]:
        """Median milliseconds per sample: float, other; empty if not timed."""
        timed = self.latency
        return () if timed is None else (timed.reference_ms.median, timed.other_ms.median)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "outputs": [o.to_dict() for o in self.outputs],
            "bytes": {"float": self.bytes[0], "other": self.bytes[1]},
            "latency_ms": dict(zip(("float", "other"), self.latency_ms, strict=False)),
            "latency": None if self.latency is None else self.latency.to_dict(),
            "samples": self.samples,
            "threads": self.threads,
            "notes": self.notes,
        }


def compare(
    reference: str | os.PathLike[str],
    other: str | os.PathLike[str],
    data: Any,
    *,
    limit: int | None = None,
    preprocess: Any = None,
    strict: bool = False,
    threads: int = 0,
    timed: bool = True,
    runs: int | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two models output by output on the same samples.

    Args:
        reference: The float model.
        other: What should give the same.
        data: Samples in any form that `Calibration` takes.
        limit: Use at most so many samples.
        preprocess: Preset or TOML file that turns pictures into inputs.
        strict: Whether a sample that cannot be read is an error, not left out and counted.
        threads: Threads for onnxruntime; 0 for all cores.
        timed: Whether to time both, in turns, on the first sample.
        runs: Timed runs of each; None: as many as there are in about two seconds, at least ten.
        progress: Where progress is shown.

    Raises:
        OnnxqError: A model or a sample cannot be read, or their signatures differ.
    """
    ctx = Context(calibration(data, limit, preprocess, strict), threads=threads, progress=progress)
    paths = [Path(p) for p in (reference, other)]
    if runs is not None and runs < 1:
        raise OnnxqError(f"runs: wanted 1 or more, got {runs}")
    sessions = [Session(load(p).to_proto(), threads=threads, config=NO_SPINNING) for p in paths]
    samples = ctx.spread(sessions[0], 0)
    with ctx.progress.task("compare", samples.length) as advance:
        outputs = error.compare(sessions[0], sessions[1], samples, advance)
    times: Latency | None = None
    if timed:
        with ctx.progress.task("time", None):
            times = pair(sessions[0], sessions[1], next(iter(samples)), count=runs)
    sizes = (file_bytes(paths[0]), file_bytes(paths[1]))
    count = outputs[0].samples if outputs else 0
    return Comparison(outputs, sizes, times, count, threads, ctx.finish().notes)
