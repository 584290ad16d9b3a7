"""What a budget costs: the least expected error of a model for each share of it that is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxq.selection import Budget, Candidate, Choice, Search, least_share, select

__all__ = ["AUTO", "Point", "Tradeoff", "tradeoff"]

AUTO = "auto"
# Budgets that are tried for each method, from the smallest that can be met to all.
_BUDGETS = 12


@dataclass(frozen=True)
class Point:
    """A model that could be made.

    Args:
        method: The only one that it takes, or auto for the better one of each layer.
        kept: What it costs, as a share of what the model costs now.
        error: Expected squared error of its outputs, relative to their power.
    """

    method: str
    kept: float
    error: float


@dataclass(frozen=True)
class Tradeoff:
    """What can be had for a budget, and what was taken.

    Args:
        of: What is kept: macs or bytes.
        chosen: What was taken.
        points: Method by method, by what is kept; none costs as much as another of its method, and
            has no less error.
    """

    of: Literal["macs", "bytes"]
    chosen: Point
    points: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self) | {"points": [dataclasses.asdict(p) for p in self.points]}


def tradeoff(
    choices: Sequence[Choice],
    total: int,
    of: Literal["macs", "bytes"],
    chosen: Mapping[str, Candidate],
    search: Search = "optimal",
    *,
    reserve: int = 0,
) -> Tradeoff:
    """Choose for a dozen budgets, with all methods together and with each alone.

    Args:
        choices: What may become of each layer.
        total: What the whole model costs.
        of: What budgets are of.
        chosen: What was taken of the choices.
        search: How it was chosen, see `onnxq.selection.select`.
        reserve: What is added to the cost of a model of which anything changes.
    """
    methods = sorted({c.method for choice in choices for c in choice.candidates})
    mixed = AUTO if len(methods) > 1 else methods[0]

    def at(method: str, found: Mapping[str, Candidate]) -> Point:
        taken = [(choice, found[choice.name]) for choice in choices if choice.name in found]
        saved = sum(getattr(choice, of) - getattr(c, of) for choice, c in taken)
        kept = (total + reserve - saved) / total if taken else 1.0
        return Point(method, kept, sum((choice.loss(c) for choice, c in taken), 0.0))

    def curve(method: str, possible: Sequence[Choice], *others: Point) -> list[Point]:
        least = least_share(possible, total, of, reserve)
        # what one method does, all do no worse: that shows only if they are asked for as much
        shares = {*np.linspace(least, 1.0, _BUDGETS), *(min(p.kept + 1e-9, 1.0) for p in others)}
        budgets = [Budget(of, float(share)) for share in shares]
        return [at(method, select(possible, total, b, search, reserve=reserve)) for b in budgets]

    was = at(mixed, chosen)
    alone = [_best(curve(m, _only(m, choices))) for m in methods if m != mixed]
    singles = [point for points in alone for point in points]
    return Tradeoff(of, was, (*_best([was, *curve(mixed, choices, *singles)]), *singles))


def _only(method: str, choices: Iterable[Choice]) -> list[Choice]:
    return [
        dataclasses.replace(c, candidates=tuple(k for k in c.candidates if k.method == method))
        for c in choices
    ]


def _best(points: Iterable[Point]) -> list[Point]:
    """Those that no other point beats, by what is kept."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.kept, p.error)):
        if not found or point.error < found[-1].error:
            found.append(point)
    return found
