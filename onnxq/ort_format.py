"""A model in onnxruntime's own format, as apps ship it: written, loaded again, compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onnxq.analysis import error
from onnxq.analysis.error import OutputError
from onnxq.calibration import Samples
from onnxq.errors import ModelError, OnnxqError, UnsupportedError
from onnxq.progress import Progress
from onnxq.runtime import (
    KEEP_INT8,
    REPLAY,
    SAVED_ONLY,
    Level,
    Session,
    Style,
    required_operators,
    save_ort,
)

__all__ = ["OrtFile", "Verification", "write_ort"]

# An .ort file that differs more from its .onnx, both optimized alike, does not compute the same.
LEAST_SQNR_DB = 60.0
LEAST_EQUAL = 0.999  # share of equal integers
SUFFIXES: dict[Style, str] = {"fixed": "", "runtime": ".with_runtime_opt"}
# How a file may be loaded, and how the .onnx has to be optimized to compute the same, to the bit: a
# fusion that only one of them has could turn a tie of the quantization, and all that follows. The
# last way is the one that the file was made for.
LOADS: dict[Style, list[tuple[Mapping[str, str], Level, Mapping[str, str]]]] = {
    "fixed": [({}, "extended", {})],
    "runtime": [({}, "basic", {}), (REPLAY, "extended", SAVED_ONLY)],
}


@dataclass(frozen=True)
class Verification:
    """How an .ort file, loaded in a fresh session, compares with the .onnx.

    Args:
        file: The name of the .ort file.
        session: Session configuration entries that it was loaded with.
        level: How far the .onnx was optimized, which is what the file holds.
        outputs: The error of each output; 200 dB: every bit is the same.
    """

    file: str
    session: Mapping[str, str]
    level: Level
    outputs: list[OutputError]


@dataclass(frozen=True)
class OrtFile:
    """An .ort file and what a build of onnxruntime needs to run it.

    Args:
        path: The file.
        style: How it is optimized, see `onnxq.runtime.save_ort`.
        operators: The file that ``--include_ops_by_config`` of such a build reads.
        needs: What stands in it.
        session: Session configuration entries to load it with.
        verifications: How it compares with the .onnx, for each way to load it.
    """

    path: Path
    style: Style
    operators: Path
    needs: str
    session: Mapping[str, str]
    verifications: list[Verification]

    def is_like(self, other: OrtFile) -> bool:
        """Whether both hold the same, as where there is nothing to optimize.

        onnxruntime writes it in an order of its own each time, so that bytes tell nothing.
        """
        sizes = {file.path.stat().st_size for file in (self, other)}
        return len(sizes) == 1 and self.needs == other.needs

    def remove(self) -> None:
        """Remove the files."""
        self.path.unlink()
        self.operators.unlink()


def write_ort(
    model: Path, style: Style, samples: Samples, *, threads: int = 0, progress: Progress
) -> OrtFile:
    """Write a model in ORT format beside the .onnx file, load it again and compare the two.

    Args:
        model: The .onnx file.
        style: How it is optimized, see `onnxq.runtime.save_ort`.
        samples: What both are run on.
        threads: Threads for onnxruntime; 0 for all cores.
        progress: Where progress is shown.

    Raises:
        UnsupportedError: onnxruntime cannot write the file, or does not load what it wrote.
        ModelError: The file does not compute what the .onnx computes.
    """
    path = model.with_name(f"{model.stem}{SUFFIXES[style]}.ort")
    found = []
    try:
        save_ort(model, path, style)
        for config, level, alike in LOADS[style]:
            other = _loaded(path, config, threads)
            optimized = {**KEEP_INT8, **alike}
            reference = Session(model, threads=threads, level=level, config=optimized)
            with progress.task(f"verify {path.name}", samples.length) as advance:
                outputs = error.compare(reference, other, samples, advance)
            _check(outputs, path.name)
            found.append(Verification(path.name, config, level, outputs))
        needs, typed = required_operators(path, config)
    except OnnxqError:
        path.unlink(missing_ok=True)
        raise
    kind = "required_operators_and_types" if typed else "required_operators"
    listed = model.with_name(f"{model.stem}.{kind}{SUFFIXES[style]}.config")
    listed.write_text(f"# {path.name}\n{needs}", encoding="utf-8")
    return OrtFile(path, style, listed, needs, config, found)


def _loaded(path: Path, config: Mapping[str, str], threads: int) -> Session:
    try:
        return Session(path, threads=threads, config=config)
    except ModelError as failure:
        why = failure.what.removeprefix("onnxruntime cannot load the model: ")
        raise UnsupportedError(
            f"onnxruntime does not load the .ort file that it wrote: {why}",
            where=path.name,
            fix="ship the .onnx file, with the full package of onnxruntime",
        ) from failure


def _check(outputs: list[OutputError], name: str) -> None:
    """Refuse a file whose outputs are others."""
    for output in outputs:
        sqnr, equal = output.sqnr_db, output.equal
        if sqnr is not None and sqnr < LEAST_SQNR_DB:
            got = f"SQNR {sqnr:.1f} dB, max |error| {output.max_abs_error:.3g}"
        elif equal is not None and equal < LEAST_EQUAL:
            got = f"{equal:.1%} of its values are equal"
        else:
            continue
        raise ModelError(
            f"the .ort file does not compute what the .onnx computes: output {output.name}: {got}",
            where=name,
            fix="ship the .onnx file, with the full package of onnxruntime",
        )
