"""Which layers give up how much, so that a model meets a budget with the least error.

What each layer can become, at what cost and with what error, is a `Choice`; a table of them says
how sensitive a model is, and is kept in a file.  Errors of layers add up at the output, each
weighed by what noise of this layer does there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnxq.errors import OnnxqError, RecipeError
from onnxq.files import read_limited
from onnxq.report import write_text

__all__ = ["Budget", "Candidate", "Choice", "Search", "Sensitivities", "least_share", "select"]

Search = Literal["optimal", "greedy"]
# Steps into which what has to be saved is cut for the dynamic program.
_STEPS = 4000
_VERSION = 1


@dataclass(frozen=True)
class Candidate:
    """What one layer, or one group of channels, may become.

    Args:
        layer: Name of the layer or group.
        method: Name of the pass that makes it.
        ratio: The share that is kept, as the pass takes it in its option `ratios`.
        rank_or_channels: The rank, or the number of channels, that this is.
        macs: Multiply-accumulates per sample afterwards of all layers that it concerns.
        bytes: Bytes of their parameters afterwards.
        error: Expected squared error of their outputs, relative to the power of these, both weighed
            by what they do to the outputs of the model where that is known.
    """

    layer: str
    method: str
    ratio: float
    rank_or_channels: int
    macs: int
    bytes: int
    error: float


@dataclass(frozen=True)
class Choice:
    """What may become of one layer or group; at most one of the candidates comes about.

    Args:
        name: Of the layer or group.
        covers: The layers whose cost changes.  No two choices that have one in common are made
            together.
        macs: Multiply-accumulates per sample of these as they are.
        bytes: Bytes of their parameters.
        candidates: What may become of it.
        effect: Squared error of the model's outputs, relative to their power, for each unit of the
            candidates' error.
    """

    name: str
    covers: tuple[str, ...]
    macs: int
    bytes: int
    candidates: tuple[Candidate, ...]
    effect: float = 1.0

    def loss(self, candidate: Candidate) -> float:
        """What a candidate adds to the error of the output."""
        return self.effect * candidate.error


@dataclass(frozen=True)
class Budget:
    """What a model may cost afterwards.

    Args:
        of: macs or bytes.
        share: Of what it costs now, in (0, 1].

    Raises:
        RecipeError: The share is none.
    """

    of: Literal["macs", "bytes"]
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise RecipeError(f"{self.of}: wanted a share in (0, 1], got {self.share:g}")


def select(
    choices: Sequence[Choice],
    total: int,
    budget: Budget,
    search: Search = "optimal",
    *,
    reserve: int = 0,
) -> dict[str, Candidate]:
    """The candidates that meet a budget with the least error.

    Args:
        choices: What may become of each layer.
        total: What the whole model costs, in what the budget is of.
        budget: What it may cost.
        search: greedy takes, step by step, what adds least error for what it saves; optimal solves
            the knapsack by dynamic programming, among choices that do not exclude one another.
        reserve: What will be added to the model's cost whatever is chosen.

    Returns:
        Name -> candidate, of what is to change.

    Raises:
        OnnxqError: The budget cannot be met; says what can.
    """
    needed = total + reserve - math.floor(budget.share * total) if budget.share < 1 else 0
    if needed <= 0:
        return {}
    options = [_Options.of(choice, budget) for choice in choices]
    found = _greedy(options, needed)
    if found is None:
        most = _most(options)
        least = math.ceil(1000 * (1 + (reserve - most) / max(total, 1))) / 1000
        raise OnnxqError(
            f"{budget.of}: a share of {budget.share:g} cannot be met",
            fix=f"{least:.3f} can, with what may be compressed"
            if most
            else "no layer can be compressed",
        )
    if search == "optimal":
        used = [o for o in options if o.choice.name in found]
        free = _apart([*used, *(o for o in options if o.choice.name not in found)])
        better = _optimal(free, needed)
        if better is not None and _loss(options, better) < _loss(options, found):
            found = better
    return {
        o.choice.name: o.candidates[found[o.choice.name]] for o in options if o.choice.name in found
    }


def least_share(
    choices: Sequence[Choice], total: int, of: Literal["macs", "bytes"], reserve: int = 0
) -> float:
    """The smallest budget that choices which do not exclude one another meet.

    Args:
        choices: What may become of each layer.
        total: What the whole model costs.
        of: What the budget is of.
        reserve: What will be added to the model's cost whatever is chosen.
    """
    most = _most([_Options.of(choice, Budget(of, 1.0)) for choice in choices])
    return min(1.0, (total + reserve - most) / total + 1e-9)  # rounding must not ask for more


def _most(options: Sequence[_Options]) -> int:
    """What all of them together save, about, where some exclude others."""
    big = sorted((o for o in options if o.candidates), key=lambda o: -int(o.saved[-1]))
    return sum(int(o.saved[-1]) for o in _apart(big))


@dataclass(frozen=True)
class _Options:
    """The candidates of a choice that save something, from the one that saves least on."""

    choice: Choice
    candidates: list[Candidate]
    saved: np.ndarray
    loss: np.ndarray

    @classmethod
    def of(cls, choice: Choice, budget: Budget) -> _Options:
        whole = getattr(choice, budget.of)
        saves = sorted(
            (whole - getattr(c, budget.of), -choice.loss(c), i)
            for i, c in enumerate(choice.candidates)
        )
        kept: list[Candidate] = []
        least = math.inf
        for saved, loss, index in reversed(saves):  # what saves less and loses more is no option
            if saved > 0 and -loss < least:
                least = -loss
                kept.insert(0, choice.candidates[index])
        return cls(
            choice,
            kept,
            np.array([whole - getattr(c, budget.of) for c in kept], np.int64),
            np.array([choice.loss(c) for c in kept], np.float64),
        )


def _apart(options: Iterable[_Options]) -> list[_Options]:
    """Those that save something, without what excludes one before it."""
    taken: set[str] = set()
    found = []
    for option in options:
        if option.candidates and taken.isdisjoint(option.choice.covers):
            taken |= {*option.choice.covers}
            found.append(option)
    return found


def _loss(options: Iterable[_Options], found: Mapping[str, int]) -> float:
    return sum(float(o.loss[found[o.choice.name]]) for o in options if o.choice.name in found)


def _greedy(options: Sequence[_Options], needed: int) -> dict[str, int] | None:
    """Index of the option taken, by name; None if all together do not save enough."""
    if not any(option.candidates for option in options):
        return None
    # the candidates of all in one row, with the option that each is of, and its index there
    counts = [len(option.candidates) for option in options]
    owner = np.repeat(np.arange(len(options)), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    saves = np.concatenate([option.saved for option in options])
    losses = np.concatenate([option.loss for option in options])
    at = np.full(len(options), -1)
    now, lost = np.zeros(len(options), np.int64), np.zeros(len(options))
    free = np.ones(len(options), bool)
    saved = 0
    while saved < needed:
        left = np.flatnonzero(free[owner] & (place > at[owner]))
        if not left.size:
            return None
        of = owner[left]
        more = np.minimum(saves[left] - now[of], needed - saved)
        best = left[np.argmin((losses[left] - lost[of]) / more)]
        taken = owner[best]
        saved += int(saves[best] - now[taken])
        at[taken], now[taken], lost[taken] = place[best], saves[best], losses[best]
        covers = options[taken].choice.covers
        free &= [o is options[taken] or {*covers}.isdisjoint(o.choice.covers) for o in options]
    return {o.choice.name: int(i) for o, i in zip(options, at, strict=True) if i >= 0}


def _optimal(options: Sequence[_Options], needed: int) -> dict[str, int] | None:
    """The multiple-choice knapsack, what is saved in whole steps: it is never overestimated."""
    step = max(1, needed // _STEPS)
    goal = -(-needed // step)
    least = np.full(goal + 1, np.inf)  # error at which at least so many steps are saved
    least[0] = 0.0
    taken = []
    for option in options:
        before, best = least, least.copy()
        which = np.full(goal + 1, -1)
        for index, (saved, loss) in enumerate(zip(option.saved // step, option.loss, strict=True)):
            shifted = before[np.maximum(np.arange(goal + 1) - int(saved), 0)] + loss
            better = shifted < best
            best = np.where(better, shifted, best)
            which[better] = index
        least = best
        taken.append(which)
    if not np.isfinite(least[goal]):
        return None
    found: dict[str, int] = {}
    at = goal
    for option, which in zip(reversed(options), reversed(taken), strict=True):
        index = int(which[at])
        if index >= 0:
            found[option.choice.name] = index
            at = max(at - int(option.saved[index] // step), 0)
    return found


# ---------------------------------------------------------------------- kept in a file


@dataclass(frozen=True)
class Sensitivities:
    """What every layer of a model may become, with cost and error.

    Args:
        model: SHA-256 of the model, see `Model.digest`.
        options: What else they depend on, as text: methods, multiples, samples.
        macs: Multiply-accumulates per sample of the whole model.
        bytes: Bytes of all its constants.
        choices: Of its layers.
        refused: Layer -> why nothing can become of it.
    """

    model: str
    options: str
    macs: int
    bytes: int
    choices: tuple[Choice, ...]
    refused: Mapping[str, str]

    def save(self, path: Path) -> None:
        """Write them as JSON; the file appears whole or not at all.

        Raises:
            OnnxqError: It cannot be written.
        """
        write_text(path, json.dumps({"version": _VERSION, **dataclasses.asdict(self)}, indent=1))

    @classmethod
    def load(cls, path: Path, model: str, options: str) -> Sensitivities:
        """Read them.

        Args:
            path: The file.
            model: What it has to belong to.
            options: The same.

        Raises:
            OnnxqError: It cannot be read, or belongs to something else.
        """
        fix = "delete the file, and it is made again"
        try:
            table = json.loads(read_limited(path, 1 << 28))
            if table.pop("version") != _VERSION:
                raise ValueError("another version")
            found = cls(**table | {"choices": tuple(_choice(c) for c in table["choices"])})
            if not _is_size(found.macs, found.bytes):
                raise ValueError("a cost is no count")
        except OSError as error:
            raise OnnxqError(f"cannot be read: {error.strerror}", where=path) from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise OnnxqError("is no table of sensitivities", where=path, fix=fix) from error
        if found.model != model:
            raise OnnxqError("the sensitivities belong to another model", where=path, fix=fix)
        if found.options != options:
            raise OnnxqError(
                f"the sensitivities were made with other options: {found.options}",
                where=path,
                fix=fix,
            )
        return found


def _choice(table: dict[str, Any]) -> Choice:
    candidates = tuple(Candidate(**c) for c in table["candidates"])
    made = Choice(**table | {"candidates": candidates, "covers": tuple(table["covers"])})
    numbers = [made.effect, *(c.error for c in candidates), *(c.ratio for c in candidates)]
    if not all(isinstance(n, (int, float)) and math.isfinite(n) and n >= 0 for n in numbers):
        raise ValueError("an error is no number")
    if not all(_is_size(c.macs, c.bytes) for c in candidates) or not _is_size(
        made.macs, made.bytes
    ):
        raise ValueError("a cost is no count")
    return made


def _is_size(*values: object) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)
