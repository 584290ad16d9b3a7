"""Rounding as a quadratic over the integers around each weight, solved by search.

For a row of a weight, d = s (q - z) - w is its rounding error and d H d^T + 2 d g0 the error of the
layer's output, H being the second moment of its input.  A move takes one weight a step up or down.
With g = d H + g0 at hand the changes +-2 g_k + H_kk of all moves are known, and following one costs
one row of H: O(K), vectorized.

The search is a tabu search: always the best move, uphill too, that does not touch a weight moved
lately.  Where H is ill-conditioned, as for most first layers, a single move climbs a steep slope
and only the next one, which answers it, pays; moves drawn at random hardly find such pairs.

All is done in units of the row's scale and of the mean of H's diagonal.

Sources: Glover 1989 (tabu search), Nagel et al. 2020 (arXiv 2004.10568; the objective).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from onnxq.kernels._jit import read_only
from onnxq.kernels.moves import SILENT, descend, walk
from onnxq.kernels.objective import Objective, objective

__all__ = ["Choices", "choices", "short_search", "tabu_search", "usual_sweeps"]

# Moves per weight by default: so many over K, within limits, which makes the time per weight about
# the same for all layers.
MOVES, FEWEST, MOST = 12_000, 1.0, 200.0
# Rows of one piece of work.
ROWS = 16
# Moves that a weight rests, round by round: at least, and at random up to twice that.  Long rests
# lead far away, short ones look around: so the search cools down.  Each round starts from the best
# state of those before, with g made anew.
RESTS = (16, 8, 4)
# Rows of no more columns end with a descent that tries pairs, which costs K^2; of no more than a
# quarter, every round does.
PAIRED = 2048


def usual_sweeps(columns: int) -> float:
    """Moves per weight of a row of so many that take about 2 us per weight on one core."""
    return float(np.clip(MOVES / columns, FEWEST, MOST))


class Choices(NamedTuple):
    """The values that each weight may take: rounded down, up, and whichever of them is nearest."""

    low: np.ndarray
    high: np.ndarray
    nearest: np.ndarray


def choices(
    weight: np.ndarray, scale: np.ndarray, zero: np.ndarray, qmin: int, qmax: int
) -> Choices:
    """Values s (q - z), float32, for each weight; equal where it has no choice.

    Args:
        weight: float32 [..., K].
        scale: float32, one per row.
        zero: Zero points, int32, one per row.
        qmin: Least integer.
        qmax: Greatest integer.
    """
    s, z = _columns(weight, scale, zero)
    return Choices(*(q * s for q in _steps(weight, s, qmin - z, qmax - z)))


def tabu_search(
    weight: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    gram: np.ndarray,
    linear: np.ndarray | None = None,
    start: np.ndarray | None = None,
    *,
    sweeps: float | None = None,
    pairs: bool = True,
    reach: int = 0,
    seed: int = 0,
    threads: int = 1,
) -> np.ndarray:
    """Round each weight down or up so that the layer's output changes least.

    No row of the result is worse than rounding to nearest, nor than `start`.

    Args:
        weight: float32 [O, K], or [G, O/G, K] for G groups with an H each.
        scale: float32 [O].
        zero: Zero points, int32 [O].
        qmin: Least integer.
        qmax: Greatest integer.
        gram: H, the second moment of the layer's input, [K, K] or [G, K, K].
        linear: g0, shaped as the weight; None for 0.
        start: Values on the grid to start from, shaped as the weight.
        sweeps: Moves per weight; None for a number that takes about 2 us per weight on one core, 0
            for moves that improve alone.
        pairs: Whether rounds end with a descent that tries pairs of moves.
        reach: Further searches, each of which may take a weight a step beyond.  Lowers the
            objective, but fits the noise of H where that comes from few samples.
        seed: Of the random rests; each row has a stream of its own.
        threads: Threads that share the rows; the result does not depend on them.

    Returns:
        Values s (q - z), float32, shaped as the weight.
    """
    problem = _Problem(weight, scale, zero, (qmin, qmax), gram, linear)
    best, least = problem.nearest, problem.cost(problem.nearest)
    if start is not None:
        steps = np.rint(start.reshape(best.shape) / problem.scale)
        best, least = _better(best, least, steps, problem)
    for i in range(1 + reach):
        if i > 0:
            problem.widen(best)
        found = problem.search(best, sweeps, pairs, seed + i, threads)
        best, least = _better(best, least, found, problem)
    return np.asarray(best * problem.scale).reshape(weight.shape)


def short_search(
    weight: np.ndarray,
    scales: Iterable[np.ndarray],
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    gram: np.ndarray,
    linear: np.ndarray | None = None,
    *,
    sweeps: float,
    seed: int = 0,
    threads: int = 1,
) -> np.ndarray:
    """What a short search would reach under several scales of each row.

    Args:
        weight: float32 [O, K], or [G, O/G, K] for G groups with an H each.
        scales: One after the other, float32 [O].
        zero: Zero points, int32 [O].
        qmin: Least integer.
        qmax: Greatest integer.
        gram: H, [K, K] or [G, K, K].
        linear: g0, shaped as the weight; None for 0.
        sweeps: Moves per weight, from rounding to nearest.
        seed: Of the random rests.
        threads: Threads that share the rows; the result does not depend on them.

    Returns:
        The objective, good to a thousandth, float64 [number of scales, O].
    """
    given = iter(scales)
    problem = _Problem(weight, next(given), zero, (qmin, qmax), gram, linear)
    costs = [problem.glance(sweeps, seed, threads)]
    costs += [problem.scaled(scale).glance(sweeps, seed, threads) for scale in given]
    return np.stack(costs)


def _better(
    best: np.ndarray, least: np.ndarray, other: np.ndarray, problem: _Problem
) -> tuple[np.ndarray, np.ndarray]:
    """Row by row the better one of two, and its objective."""
    cost = problem.cost(other)
    wins = (cost < least).reshape(*best.shape[:2], 1)
    return np.where(wins, other, best), np.minimum(cost, least)


def _columns(
    weight: np.ndarray, scale: np.ndarray, zero: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    shape = (*weight.shape[:-1], 1)
    return np.asarray(scale, np.float32).reshape(shape), np.asarray(zero, np.int64).reshape(shape)


def _steps(
    weight: np.ndarray, scale: np.ndarray, least: np.ndarray, most: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole steps from zero, float32: rounded down, up and to nearest, within limits."""
    exact = weight.astype(np.float64) / scale
    low, high = (np.clip(f(exact), least, most).astype(np.float32) for f in (np.floor, np.ceil))
    return low, high, np.clip(np.rint(weight / scale), low, high)


class _Problem:
    """Rows of all groups, [G, R, K], as steps from zero, and what they may become."""

    def __init__(
        self,
        weight: np.ndarray,
        scale: np.ndarray,
        zero: np.ndarray,
        limits: tuple[int, int],
        gram: np.ndarray,
        linear: np.ndarray | None,
    ) -> None:
        columns = weight.shape[-1]
        gram = np.asarray(gram, np.float64).reshape(-1, columns, columns)
        self.weight = np.asarray(weight, np.float32).reshape(len(gram), -1, columns)
        self.linear = None if linear is None else linear.reshape(self.weight.shape)
        self.objective = Objective(gram, self.linear)
        z = _columns(self.weight, scale, zero)[1]
        self.least, self.most = limits[0] - z, limits[1] - z
        self.loud = (self.objective.diagonal > SILENT * self.objective.unit[:, :, 0])[:, None]
        self._lay(scale)

    def scaled(self, scale: np.ndarray) -> _Problem:
        """The same with another scale of each row."""
        other = copy.copy(self)
        other._lay(scale)
        return other

    def _lay(self, scale: np.ndarray) -> None:
        self.scale = np.asarray(scale, np.float32).reshape(*self.weight.shape[:2], 1)
        grid = _steps(self.weight, self.scale, self.least, self.most)
        self.low, self.high, self.nearest = grid
        self.quiet = self.nearest
        if self.linear is not None:  # a silent column decides by itself
            pulled = np.where(self.linear > 0, self.low, self.high)
            self.quiet = np.where(self.loud | (self.linear == 0), self.nearest, pulled)
        self.open = (self.low != self.high) & self.loud

    def cost(self, steps: np.ndarray) -> np.ndarray:
        return objective(self._error(steps), self.objective.gram, self.linear)

    def _error(self, steps: np.ndarray) -> np.ndarray:
        values = (steps * self.scale).astype(np.float64)  # as they will be stored
        return np.asarray(values - self.weight)

    def _pull(self, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gradient's half, g = d H + g0, in units, float32 [G * R, K], and the objective."""
        pull, cost = self.objective.pull(self._error(steps))
        pull /= self.scale
        return pull.astype(np.float32).reshape(-1, pull.shape[-1]), cost.reshape(-1)

    def search(
        self, first: np.ndarray, sweeps: float | None, pairs: bool, seed: int, threads: int
    ) -> np.ndarray:
        """Steps from zero that are about the best, from first ones."""
        columns = first.shape[-1]
        if sweeps is None:
            sweeps = usual_sweeps(columns)
        state = _State(self, first, seed, threads)
        for rest in RESTS if sweeps > 0 else ():
            state.walk(self._pull(state.steps())[0], sweeps / len(RESTS), rest)
            if pairs and columns <= (PAIRED if rest == RESTS[-1] else PAIRED // 4):
                state.descend(self._pull(state.steps())[0])
        if sweeps == 0:
            state.descend(self._pull(state.steps())[0])
        return state.steps()

    def glance(self, sweeps: float, seed: int, threads: int) -> np.ndarray:
        """The objective that a short search from nearest reaches, float64 [G * R]."""
        state = _State(self, self.nearest, seed, threads)
        pull, cost = self._pull(state.steps())
        state.walk(pull, sweeps, RESTS[-1])
        unit = np.repeat(self.objective.unit.reshape(-1), self.scale.shape[1])
        unit *= np.square(self.scale, dtype=np.float64).reshape(-1)
        return np.asarray(cost + state.gained * unit)

    def widen(self, steps: np.ndarray) -> None:
        """Let each weight choose between where it is and its next step down the gradient."""
        down = self._pull(steps)[0].reshape(steps.shape) > 0
        one = np.float32(1)
        self.low = np.maximum(np.where(down, steps - one, steps), self.least.astype(np.float32))
        self.high = np.minimum(np.where(down, steps, steps + one), self.most.astype(np.float32))
        self.open = (self.low != self.high) & self.loud


class _State:
    """Where the search is: each weight's next step, up, down or, where it has no choice, none.

    Args:
        problem: What is searched.
        first: Steps from zero to begin with, [G, R, K].
        seed: Of the random rests.
        threads: That share the rows.
    """

    def __init__(self, problem: _Problem, first: np.ndarray, seed: int, threads: int) -> None:
        self._low, self._high = problem.low, problem.high
        self._first = np.where(problem.open, first, problem.quiet)
        self._gram, self._grain = problem.objective.walked
        self._threads = threads
        move = np.where(problem.open, np.where(self._first == self._low, 1, -1), 0)
        self._move = np.ascontiguousarray(move, np.float32).reshape(-1, first.shape[-1])
        self._streams = _streams(seed, len(self._move))
        self.gained = np.zeros(len(self._move))  # by walks, in units

    def steps(self) -> np.ndarray:
        """Steps from zero, [G, R, K]."""
        move = self._move.reshape(self._first.shape)
        return np.where(move > 0, self._low, np.where(move < 0, self._high, self._first))

    def walk(self, pull: np.ndarray, sweeps: float, rest: int) -> None:
        """To the best state on a tabu search's way."""
        self._share(walk, pull, self._streams, self.gained, sweeps, rest)

    def descend(self, pull: np.ndarray) -> None:
        """Until neither a single move nor a pair improves."""
        self._share(descend, pull)

    def _share(self, work: Callable[..., None], pull: np.ndarray, *rest: object) -> None:
        """Do the work on pieces of rows."""
        rows = len(self._move)

        def piece(begin: int) -> None:
            part = slice(begin, begin + ROWS)
            each = rows // len(self._gram)
            given = read_only(self._gram), read_only(self._grain), each, begin
            work(*given, self._move[part], read_only(pull[part]), *rest)

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(piece, range(0, rows, ROWS)))


def _streams(seed: int, rows: int) -> np.ndarray:
    """The start of each row's random stream, uint64 [rows], above 0."""
    mixed = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15 & 0xFFFFFFFF) + np.arange(
        1, rows + 1, dtype=np.uint64
    )
    mixed *= np.uint64(0x9E3779B97F4A7C15)  # splitmix64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray((mixed ^ (mixed >> np.uint64(31))) | np.uint64(1))
