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

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from onnxq.kernels._jit import kernel, read_only

__all__ = ["Choices", "choices", "objective", "tabu_search", "usual_sweeps"]

# Moves per weight by default: so many over K, within limits, which makes the time per weight the
# same for all layers.
MOVES, FEWEST, MOST = 6_000, 1.5, 200.0
# Rows of one piece of work.
ROWS = 16
# Rows with so few open weights are solved by trying all choices.
EXHAUSTIVE = 12
# Moves that a weight rests, round by round: at least, and at random up to twice that.  Long rests
# lead far away, short ones look around: so the search cools down.  Each round starts from the best
# state of those before, with g made anew.
RESTS = (16, 8, 4)
# Rows of no more columns end with a descent that tries pairs, which costs K^2; of no more than a
# quarter, every round does.
PAIRED = 2048
# Columns with less of the mean diagonal are constant: they have no say.
SILENT = 1e-9
# The change that a move makes which must not be made.
NEVER = np.float32(1e30)
# Changes that count, in units.
LEAST = 1e-6


def objective(error: np.ndarray, gram: np.ndarray, linear: np.ndarray | None = None) -> np.ndarray:
    """The objective d H d^T + 2 d g0 per row in float64, [O].

    Args:
        error: d, [O, K] or [G, O/G, K].
        gram: H, [K, K] or [G, K, K].
        linear: g0, as d; None for 0.
    """
    wide = error.astype(np.float64)
    pull = np.matmul(wide, gram)
    if linear is not None:
        pull += 2.0 * linear
    cost: np.ndarray = np.einsum("...k,...k->...", wide, pull)
    return cost.reshape(-1)


def usual_sweeps(columns: int) -> float:
    """Moves per weight of a row of so many that take about 3 us per weight on one core."""
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
        sweeps: Moves per weight; None for a number that takes about 3 us per weight on one core, 0
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
        self.gram = np.asarray(gram, np.float64).reshape(-1, columns, columns)
        self.weight = np.asarray(weight, np.float32).reshape(len(self.gram), -1, columns)
        self.scale, z = _columns(self.weight, scale, zero)
        self.linear = None if linear is None else linear.reshape(self.weight.shape)
        self.least, self.most = limits[0] - z, limits[1] - z
        grid = _steps(self.weight, self.scale, self.least, self.most)
        self.low, self.high, self.nearest = grid
        diagonal = np.diagonal(self.gram, axis1=1, axis2=2)
        self.unit = np.maximum(diagonal.mean(axis=1), 1e-300).reshape(-1, 1, 1)
        self.loud = (diagonal > SILENT * self.unit[:, :, 0])[:, None]
        self.quiet = self.nearest
        if self.linear is not None:  # a silent column decides by itself
            pulled = np.where(self.linear > 0, self.low, self.high)
            self.quiet = np.where(self.loud | (self.linear == 0), self.nearest, pulled)
        self.open = (self.low != self.high) & self.loud

    def cost(self, steps: np.ndarray) -> np.ndarray:
        return objective(self._error(steps), self.gram, self.linear)

    def _error(self, steps: np.ndarray) -> np.ndarray:
        values = (steps * self.scale).astype(np.float64)  # as they will be stored
        return np.asarray(values - self.weight)

    def _pull(self, steps: np.ndarray) -> np.ndarray:
        """The gradient's half, g = d H + g0, in units, float32 [G * R, K]."""
        pull: np.ndarray = np.matmul(self._error(steps), self.gram)
        if self.linear is not None:
            pull += self.linear
        pull /= self.scale * self.unit
        return pull.astype(np.float32).reshape(-1, pull.shape[-1])

    def search(
        self, first: np.ndarray, sweeps: float | None, pairs: bool, seed: int, threads: int
    ) -> np.ndarray:
        """Steps from zero that are about the best, from first ones."""
        groups, each, columns = self.weight.shape
        first = np.where(self.open, first, self.quiet)
        move = np.where(self.open, np.where(first == self.low, 1, -1), 0)
        move = np.ascontiguousarray(move, np.float32).reshape(-1, columns)
        gram = (self.gram / self.unit).astype(np.float32)
        if sweeps is None:
            sweeps = usual_sweeps(columns)
        states = _states(seed, len(move))

        def reached() -> np.ndarray:
            m = move.reshape(first.shape)
            return np.where(m > 0, self.low, np.where(m < 0, self.high, first))

        def shared(work: Callable[..., None], *rest: object) -> None:
            """Do the work on pieces of rows."""
            pull = self._pull(reached())

            def piece(begin: int) -> None:
                rows = slice(begin, begin + ROWS)
                work(read_only(gram), each, begin, move[rows], read_only(pull[rows]), *rest)

            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(piece, range(0, groups * each, ROWS)))

        for rest in RESTS if sweeps > 0 else ():
            shared(_search, states, sweeps / len(RESTS), rest)
            if pairs and columns <= (PAIRED if rest == RESTS[-1] else PAIRED // 4):
                shared(_descend)
        if sweeps == 0:
            shared(_descend)
        return reached()

    def widen(self, steps: np.ndarray) -> None:
        """Let each weight choose between where it is and its next step down the gradient."""
        down = self._pull(steps).reshape(steps.shape) > 0
        one = np.float32(1)
        self.low = np.maximum(np.where(down, steps - one, steps), self.least.astype(np.float32))
        self.high = np.minimum(np.where(down, steps, steps + one), self.most.astype(np.float32))
        self.open = (self.low != self.high) & self.loud


def _states(seed: int, rows: int) -> np.ndarray:
    """The start of each row's random stream, uint64 [rows], above 0."""
    mixed = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15 & 0xFFFFFFFF) + np.arange(
        1, rows + 1, dtype=np.uint64
    )
    mixed *= np.uint64(0x9E3779B97F4A7C15)  # splitmix64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray((mixed ^ (mixed >> np.uint64(31))) | np.uint64(1))


@kernel
def _follow(
    row: np.ndarray,
    step: np.float32,
    move: np.ndarray,
    ease: np.ndarray,
    until: np.ndarray,
    now: np.int32,
    places: np.int32,
    change: np.ndarray,
) -> np.int32:
    """Change what all moves change, once one is made, and find the best that rests no more.

    A move counts as its change where that is downhill; uphill it is the change by H_kk, or the
    search would get no further than the weights that hardly matter.  The least is found among
    integers, whose minimum alone is vectorized: the floats' order above, the place in the last
    bits, so that among changes which differ by less than about a thousandth any may be taken.

    Args:
        row: Of H, that of the weight which moves.
        step: The one it makes.
        move: The step that is each weight's next.
        ease: 1 / H_kk.
        until: When each weight's rest ends.
        now: The time.
        places: 2^n - 1, not less than the last place.
        change: What each move changes; brought up to date.
    """
    twice = np.float32(2) * step  # 2 alone would make it float64
    most = np.int32(0x7FFFFFFF)
    lowest = most
    for j in range(change.size):
        c = change[j] + twice * move[j] * row[j]
        change[j] = c
        key = np.float32(c * ease[j] if c > 0 else c).view(np.int32)
        key = np.int32(key ^ (np.int32(key >> np.int32(31)) & most))  # negative ones are reversed
        key = np.int32((key & ~places) | np.int32(j))
        lowest = min(lowest, np.int32(key if until[j] <= now else most))
    return np.int32(lowest & places)


@kernel
def _answer(
    row: np.ndarray,
    step: np.float32,
    move: np.ndarray,
    places: np.int32,
    besides: int,
    change: np.ndarray,
) -> np.int32:
    """The best move but one, were that made; the arguments are those of `_follow`."""
    twice = np.float32(2) * step  # 2 alone would make it float64
    most = np.int32(0x7FFFFFFF)
    lowest = most
    for j in range(change.size):
        key = np.float32(change[j] + twice * move[j] * row[j]).view(np.int32)
        key = np.int32(key ^ (np.int32(key >> np.int32(31)) & most))
        key = np.int32((key & ~places) | np.int32(j))
        lowest = min(lowest, np.int32(key if j != besides else most))
    return np.int32(lowest & places)


@kernel
def _places(columns: int) -> np.int32:
    """The least 2^n - 1 that is no less than the last place."""
    places = 1
    while places < columns - 1:
        places = 2 * places + 1
    return np.int32(places)


@kernel
def _changes(gram: np.ndarray, move: np.ndarray, pull: np.ndarray, change: np.ndarray) -> None:
    for k in range(move.size):
        change[k] = 2 * move[k] * pull[k] + gram[k, k] if move[k] != 0 else NEVER


@kernel
def _enumerate(
    gram: np.ndarray, move: np.ndarray, change: np.ndarray, ease: np.ndarray, places: np.ndarray
) -> None:
    """The best of all choices for the weights at `places`, in the order of a Gray code."""
    now, until = move.copy(), np.zeros(move.size, np.int32)
    last = _places(move.size)
    total, best = 0.0, 0.0
    for count in range(1, 1 << places.size):
        bit = 0
        while not (count >> bit) & 1:
            bit += 1
        k = places[bit]
        own, step = change[k], now[k]
        total += own
        now[k] = -step
        _follow(gram[k], step, now, ease, until, np.int32(0), last, change)
        change[k] = -own
        if total < best:
            best = total
            move[:] = now


@kernel
def _search(
    gram: np.ndarray,
    each: int,
    begin: int,
    move: np.ndarray,
    pull: np.ndarray,
    states: np.ndarray,
    sweeps: float,
    rest: int,
) -> None:
    """The best state that a tabu search sees from where each row is.

    Args:
        gram: H in units, float32 [G, K, K].
        each: Rows of a group.
        begin: The first row's number.
        move: The step that is each weight's next, +1, -1 or, for none, 0; float32 [R, K].
        pull: d H + g0, float32 [R, K].
        states: Of each row's random stream, uint64; go on.
        sweeps: Moves per weight.
        rest: Moves that a weight rests, at least; up to twice that, at random.
    """
    columns = move.shape[1]
    change, ease = np.empty(columns, np.float32), np.ones(columns, np.float32)
    now, until = np.empty(columns, np.float32), np.empty(columns, np.int32)
    last = _places(columns)
    for r in range(move.shape[0]):
        h = gram[(begin + r) // each]
        _changes(h, move[r], pull[r], change)
        places = np.flatnonzero(move[r])
        if places.size <= EXHAUSTIVE:
            _enumerate(h, move[r], change, ease, places)
            continue
        for k in places:
            ease[k] = 1 / h[k, k]
        state = states[begin + r]
        now[:], until[:] = move[r], 0
        least = min(rest, places.size // 3)
        total, best = 0.0, 0.0
        k = _follow(h[0], np.float32(0), now, ease, until, np.int32(0), last, change)
        for i in range(max(1, int(sweeps * places.size))):
            own = change[k]
            # only at the bottom of a descent, since keeping a state costs as much as a move
            if own >= 0 and total < best - LEAST:
                best = total
                move[r] = now
            state ^= state << np.uint64(13)  # xorshift64
            state ^= state >> np.uint64(7)
            state ^= state << np.uint64(17)
            until[k] = i + 1 + least + np.int32(state % np.uint64(least))
            total += own
            moved, step = k, now[k]
            now[k] = -step
            k = _follow(h[k], step, now, ease, until, np.int32(i + 1), last, change)
            change[moved] = -own
        if total < best - LEAST:
            move[r] = now
        states[begin + r] = state


@kernel
def _descend(gram: np.ndarray, each: int, begin: int, move: np.ndarray, pull: np.ndarray) -> None:
    """Single moves, then each move with its best partner, until nothing improves."""
    columns = move.shape[1]
    change, ease = np.empty(columns, np.float32), np.ones(columns, np.float32)
    until, last = np.zeros(columns, np.int32), _places(columns)
    for r in range(move.shape[0]):
        h, now = gram[(begin + r) // each], move[r]
        _changes(h, now, pull[r], change)
        first = _follow(h[0], np.float32(0), now, ease, until, np.int32(0), last, change)
        k, tried = np.int64(0), 0
        left = 100 * columns  # no more moves than that, should rounding make them go round
        while tried < columns and left > 0:
            j, own = np.int64(first), change[first]
            if own >= -LEAST:
                j, own = k, change[k]
                k = k + 1 if k + 1 < columns else np.int64(0)
                tried += 1
                if now[j] == 0:
                    continue
                partner = _answer(h[j], now[j], now, last, j, change)
                answer = change[partner] + 2 * now[j] * now[partner] * h[j, partner]
                if partner == j or own + answer >= -LEAST:
                    continue
            step = now[j]
            now[j] = -step
            until[j] = 1  # back is never the best, and what it changes is not yet right
            first = _follow(h[j], step, now, ease, until, np.int32(0), last, change)
            until[j], change[j] = 0, -own
            tried, left = 0, left - 1
