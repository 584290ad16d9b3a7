"""What of a model runs in integers, what does not, and why: the report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from onnxq.analysis.error import OutputError
from onnxq.analysis.layer_faults import Fault
from onnxq.analysis.saturation import Saturation
from onnxq.regridding import Mend
from onnxq.runtime import Level

__all__ = ["Agreement", "Diagnosis", "Kind", "Mended", "NodeState", "View"]

Kind = Literal["Q/DQ", "QOperator", "float"]


@dataclass(frozen=True)
class NodeState:
    """What becomes of one node.

    Args:
        name: Node name.
        op: Operator type.
        macs: Multiply-accumulates a sample; 0 for nodes that are no layers, None where not known.
        predicted: Whether it is to run in integers; None if nothing is left of it.
        measured: Whether it does; None if nothing is left of it, or it was not measured.
        kernel: What runs in its place, as measured where it was.
        code: The rule that keeps it in float, in a word; empty if none does.
        reason: Why it stays in float, in one sentence; empty if it does not.
        mend: What to do about it, in another.
    """

    name: str
    op: str
    macs: int | None
    predicted: bool | None
    measured: bool | None
    kernel: str
    code: str = ""
    reason: str = ""
    mend: str = ""

    @property
    def agrees(self) -> bool:
        """Whether prediction and measurement say the same, as far as both say something."""
        return None in (self.predicted, self.measured) or self.predicted == self.measured


@dataclass(frozen=True)
class View:
    """How one kind of processor runs the model.

    Args:
        name: ``x86-64`` or ``ARM``.
        nodes: The nodes that compute or move floats, or integers in their place, in graph order.
        operators: Operator type -> nodes in onnxruntime's optimized graph; empty if that failed.
    """

    name: str
    nodes: list[NodeState]
    operators: dict[str, int]

    def share(self, what: Literal["predicted", "measured"], *, macs: bool) -> float | None:
        """The share of MACs or of nodes in integers; None where there are none, or no answer."""
        states = [(getattr(n, what), (n.macs or 0) if macs else 1) for n in self.nodes]
        if what == "measured" and not self.operators:
            return None
        if macs:  # a layer that vanished is not in integers
            total = sum(weight for _, weight in states)
        else:
            total = sum(weight for state, weight in states if state is not None)
        return sum(weight for state, weight in states if state) / total if total else None

    @property
    def in_float(self) -> list[NodeState]:
        """The nodes that stay in float, layers of most MACs first."""
        states = [n for n in self.nodes if (n.predicted if n.measured is None else n.measured)
                  is False]  # fmt: skip
        return sorted(states, key=lambda n: -(n.macs or 0))

    @property
    def disagreements(self) -> list[NodeState]:
        """The nodes for which prediction and measurement differ."""
        return [n for n in self.nodes if not n.agrees]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        shares = {
            f"{unit}_in_integers_{what}": self.share(what, macs=unit == "macs")
            for unit in ("macs", "nodes")
            for what in ("predicted", "measured")
        }
        return {
            **dataclasses.asdict(self),
            "macs": sum(n.macs or 0 for n in self.nodes),
            **shares,
            "disagreements": [n.name for n in self.disagreements],
        }


@dataclass(frozen=True)
class Agreement:
    """How far a model, optimized, is from what ONNX defines.

    Args:
        level: How far onnxruntime optimized it.
        outputs: The error of each output, against nothing optimized.
        steps: Largest error of each output that ends in a DQ, in steps of its grid.
        failure: Why it did not run; empty if it did.
    """

    level: Level
    outputs: list[OutputError] = field(default_factory=list)
    steps: dict[str, float] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class Mended:
    """A mended copy.

    Args:
        path: Where it is.
        views: How each kind of processor runs it.
        outputs: How far its outputs are from those of the model, nothing optimized.
    """

    path: str
    views: list[View]
    outputs: list[OutputError]


@dataclass(frozen=True)
class Diagnosis:
    """What of a model runs in integers, what does not, and why.

    Args:
        path: The file.
        target: The contract that it is held against.
        kind: ``Q/DQ``, ``QOperator`` or ``float``.
        opset: Version of the standard operator set.
        runtime: Version of onnxruntime.
        bytes: Bytes of the constants.
        storage: How weights lie in the file.
        views: How each kind of processor runs it.
        faults: What is wrong or wasteful besides.
        agreement: How far levels of optimization agree.
        saturation: What pairs of products do on x86-64 without VNNI, layer by layer; empty where
            no samples were given.
        samples: Samples that this was measured on.
        samples_made_up: Whether they were made up.
        mends: What `fix` mended.
        mended: What became of that; None if nothing was mended.
        notes: What is good to know, one sentence each.
    """

    path: str
    target: str
    kind: Kind
    opset: int
    runtime: str
    bytes: int
    storage: list[str]
    views: list[View]
    faults: list[Fault]
    agreement: list[Agreement]
    saturation: list[Saturation]
    samples: int
    samples_made_up: bool
    mends: list[Mend]
    mended: Mended | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = dataclasses.asdict(self)
        plain["views"] = [v.to_dict() for v in self.views]
        if self.mended is not None:
            plain["mended"]["views"] = [v.to_dict() for v in self.mended.views]
        return plain
