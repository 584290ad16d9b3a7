"""What a run did, what it declined and why, and what that cost."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxq.errors import OnnxqError
from onnxq.scratch import whole_file

__all__ = [
    "Changes",
    "PassRecord",
    "Report",
    "Skip",
    "error_line",
    "megabytes",
    "millions",
    "weight_only_share",
    "write_text",
]

# The operator of onnxruntime that multiplies float activations by integer weights.
WEIGHT_ONLY = "MatMulNBits"


@dataclass(frozen=True)
class Skip:
    """One thing that a pass declined.

    Args:
        layer: The node or tensor.
        why: The reason, one sentence.
    """

    layer: str
    why: str


@dataclass
class Changes:
    """What a pass did and what it declined; truthy when something changed."""

    done: list[str] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def add(self, what: str) -> None:
        """Note one change."""
        self.done.append(what)

    def skip(self, layer: str, why: str) -> None:
        """Note one refusal with its reason."""
        self.skipped.append(Skip(layer, why))

    def extend(self, other: Changes) -> None:
        """Take over the notes of another pass."""
        self.done += other.done
        self.skipped += other.skipped

    def __bool__(self) -> bool:
        return bool(self.done)


@dataclass(frozen=True)
class PassRecord:
    """One pass of a run.

    Args:
        name: Its name.
        options: Its options by name.
        seconds: Wall time.
        nbytes: Bytes of the model's constants after it.
        changes: What it did and declined.
    """

    name: str
    options: dict[str, Any]
    seconds: float
    nbytes: int
    changes: Changes


@dataclass
class Report:
    """Everything that a run did.

    Attributes:
        passes: One record per pass, in order.
        notes: What was changed or given up when loading the model and the samples.
        facts: Measured results by name (bytes, share of MACs in integers, SQNR in dB...).
    """

    passes: list[PassRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Wall time of all passes."""
        return sum(p.seconds for p in self.passes)

    @property
    def skipped(self) -> list[tuple[str, Skip]]:
        """Every refusal with the name of the pass."""
        return [(p.name, s) for p in self.passes for s in p.changes.skipped]

    @property
    def in_float(self) -> list[tuple[str, str, str]]:
        """Layers that onnxruntime does not run in integers: name, operator, reason.

        Those whose weights alone were to be in integers, and are, are not among them.  Where the
        run was to write no integers, there are none.
        """
        if "compression" in self.facts and all(p.name != "insert-qdq" for p in self.passes):
            return []
        found = self.facts["integers"]["layers"]
        layers = {n["name"]: n for n in found if not n["integer"] and n["kernel"] != WEIGHT_ONLY}
        return [(n["name"], n["op"], n["reason"]) for n in layers.values()]

    @property
    def left_alone(self) -> list[tuple[str, str, str]]:
        """What else passes declined: name, pass, reason."""
        told = {name for name, _, _ in self.in_float}
        return [(s.layer, p, s.why) for p, s in self.skipped if s.layer not in told]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            **self.facts,
            "notes": self.notes,
            "passes": [
                {
                    "name": p.name,
                    "options": p.options,
                    "seconds": round(p.seconds, 4),
                    "bytes": p.nbytes,
                    "done": p.changes.done,
                    "skipped": [{"layer": s.layer, "why": s.why} for s in p.changes.skipped],
                }
                for p in self.passes
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as JSON; the file appears whole or not at all."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")


def weight_only_share(report: Report) -> float:
    """Share of the MACs that multiply floats by integer weights."""
    integers = report.facts["integers"]
    macs = sum(n["macs"] or 0 for n in integers["layers"] if n["kernel"] == WEIGHT_ONLY)
    return macs / integers["macs"] if macs else 0.0


def error_line(output: dict[str, Any]) -> str:
    """One output's error in a line."""
    parts = []
    if output.get("sqnr_db") is not None:
        parts.append(f"SQNR {output['sqnr_db']:.1f} dB")
    if output.get("cosine") is not None:
        parts.append(f"cosine {output['cosine']:.5f}")
    if output.get("top1_agreement") is not None:
        parts.append(f"top-1 agreement {100 * output['top1_agreement']:.1f} %")
    if output.get("equal") is not None:
        parts.append(f"equal {100 * output['equal']:.1f} %")
    if output["left_out"]:
        parts.append(f"{output['left_out']} values that are NaN or infinite in both left out")
    return ", ".join(parts) + f" on {output['samples']} samples"


def megabytes(count: int) -> str:
    """Bytes for people: MB are millions of bytes."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def millions(count: int) -> str:
    """A large count for people."""
    return f"{count / 1e6:.1f} million" if count >= 1e6 else f"{count:,}"


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its destination, then rename it into place.

    Raises:
        OnnxqError: The file cannot be written.
    """
    try:
        with whole_file(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OnnxqError(
            f"cannot be written: {error.strerror}",
            where=path,
            fix="check the folder's permissions and the space on the disk",
        ) from error
