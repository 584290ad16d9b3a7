"""Rounding as a quadratic over {floor, ceil}^K per row, solved by simulated annealing.

For a row of a weight, d = s (q - z) - w is its rounding error and d H d^T + 2 d g0 the error of the
layer's output, H being the second moment of its input.  A move turns one weight, or two at once,
to the other rounding; with g = d H + g0 at hand its change of the objective costs O(1), and
following it costs one row of H.

All is done in units of a row's scale and of the mean of H's diagonal, where a move is a step of
+1 or -1: g +- H[k].
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from onnxq.kernels._jit import kernel, read_only

__all__ = ["anneal", "objective"]

# Rows of one piece of work.
ROWS = 16
# Rows with so few open weights are solved by trying all.
EXHAUSTIVE = 12
# Columns with less of the mean diagonal are constant: they have no say.
SILENT = 1e-9
# The change that a weight without a choice would make.
NEVER = np.float32(1e30)


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


def anneal(
    weight: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    gram: np.ndarray,
    linear: np.ndarray | None = None,
    start: np.ndarray | None = None,
    *,
    sweeps: int = 400,
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
        sweeps: Moves tried per weight.
        seed: Of the random moves; each row has a stream of its own.
        threads: Threads that share the rows.

    Returns:
        Values s (q - z), float32, shaped as the weight.
    """
    problem = _Problem(weight, scale, zero, qmin, qmax, gram, linear)
    best, least = problem.nearest, problem.cost(problem.nearest)
    first = best
    if start is not None:
        best, least = _better(best, least, start.reshape(best.shape), problem)
        first = best
    if not problem.open.any():
        return best.reshape(weight.shape)
    found = problem.solve(first, sweeps, seed, threads)
    best, least = _better(best, least, found, problem)
    return best.reshape(weight.shape)


def _better(
    best: np.ndarray, least: np.ndarray, other: np.ndarray, problem: _Problem
) -> tuple[np.ndarray, np.ndarray]:
    """Row by row the better one of two, and its objective."""
    cost = problem.cost(other)
    wins = (cost < least).reshape(*best.shape[:2], 1)
    return np.where(wins, other, best), np.minimum(cost, least)


class _Problem:
    """The weights, [G, R, K], with their two choices each."""

    def __init__(
        self,
        weight: np.ndarray,
        scale: np.ndarray,
        zero: np.ndarray,
        qmin: int,
        qmax: int,
        gram: np.ndarray,
        linear: np.ndarray | None,
    ) -> None:
        columns = weight.shape[-1]
        self.gram = np.asarray(gram, np.float64).reshape(-1, columns, columns)
        groups = len(self.gram)
        self.weight = np.asarray(weight, np.float32).reshape(groups, -1, columns)
        shape = (groups, self.weight.shape[1], 1)
        self.scale = np.asarray(scale, np.float32).reshape(shape)
        z = np.asarray(zero, np.int64).reshape(shape)
        self.linear = None if linear is None else linear.reshape(self.weight.shape)
        steps = self.weight.astype(np.float64) / self.scale
        low = np.clip(np.floor(steps), qmin - z, qmax - z)
        high = np.clip(np.ceil(steps), qmin - z, qmax - z)
        near = np.clip(np.rint(self.weight / self.scale), low, high)
        self.low, self.high, self.nearest = (
            q.astype(np.float32) * self.scale for q in (low, high, near)
        )
        diagonal = np.diagonal(self.gram, axis1=1, axis2=2)
        self.unit = np.maximum(diagonal.mean(axis=1), 1e-300).reshape(groups, 1, 1)
        loud = (diagonal > SILENT * self.unit[:, :, 0])[:, None]
        if self.linear is not None:  # a silent column decides by itself
            pulled = np.where(self.linear > 0, self.low, self.high)
            pulled = np.where(self.linear == 0, self.nearest, pulled)
            self.quiet = np.where(loud, self.nearest, pulled)
        else:
            self.quiet = self.nearest
        self.open = (self.low != self.high) & loud

    def cost(self, values: np.ndarray) -> np.ndarray:
        return objective(self.error(values), self.gram, self.linear)

    def error(self, values: np.ndarray) -> np.ndarray:
        error: np.ndarray = values.astype(np.float64) - self.weight
        return error

    def pull(self, values: np.ndarray) -> np.ndarray:
        """The gradient's half, g = d H + g0, in units, float32 [G * R, K]."""
        pull: np.ndarray = np.matmul(self.error(values), self.gram)
        if self.linear is not None:
            pull += self.linear
        pull /= self.scale * self.unit
        return pull.astype(np.float32).reshape(-1, pull.shape[-1])

    def solve(self, first: np.ndarray, sweeps: int, seed: int, threads: int) -> np.ndarray:
        groups, each, columns = self.weight.shape
        first = np.where(self.open, first, self.quiet)
        gram = (self.gram / self.unit).astype(np.float32)
        # the next move of each weight; 0 where there is none
        move = np.where(self.open, np.where(first == self.low, 1, -1), 0)
        move = move.astype(np.float32).reshape(-1, columns)
        pull = self.pull(first)
        spread = 1 / np.square(gram).mean(axis=(1, 2)) / columns**2  # (tr H / |H|)^2 / K
        pairs = float(np.clip(0.5 - spread.mean(), 0.05, 0.5))
        schedule = np.geomspace(0.1, 0.001, max(sweeps, 1)).astype(np.float32)

        states = _states(seed, len(move))

        def part(begin: int) -> None:
            rows = slice(begin, begin + ROWS)
            state = read_only(states[rows])
            _anneal(read_only(gram), each, begin, move[rows], pull[rows], schedule, pairs, state, 2)

        begins = range(0, groups * each, ROWS)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, begins))
        move = move.reshape(self.weight.shape)
        found = np.where(move > 0, self.low, np.where(move < 0, self.high, first))
        pull = self.pull(found)
        move = move.reshape(-1, columns)

        def finish(begin: int) -> None:
            rows = slice(begin, begin + ROWS)
            _descend(read_only(gram), each, begin, move[rows], pull[rows])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(finish, begins))
        move = move.reshape(self.weight.shape)
        return np.where(move > 0, self.low, np.where(move < 0, self.high, first))


def _states(seed: int, rows: int) -> np.ndarray:
    """The start of each row's random stream, uint64 [rows], above 0."""
    mixed = np.uint64(seed) + np.arange(1, rows + 1, dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) if shift == 30 else mixed
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray((mixed ^ (mixed >> np.uint64(31))) | np.uint64(1))


@kernel
def _random(state: np.uint64) -> np.uint64:
    state ^= state << np.uint64(13)
    state ^= state >> np.uint64(7)
    state ^= state << np.uint64(17)
    return state


@kernel
def _flip(gram: np.ndarray, k: int | np.integer, move: np.ndarray, pull: np.ndarray) -> None:
    """Follow the move of weight k."""
    sign, row = move[k], gram[k]
    move[k] = -sign
    for j in range(pull.size):
        pull[j] += sign * row[j]


@kernel
def _search(gram: np.ndarray, move: np.ndarray, pull: np.ndarray) -> None:
    """Single moves, then each with its best partner, until nothing improves."""
    columns = move.size
    least = np.float32(1e-6)
    improved = True
    rounds = 0
    while improved and rounds < 200:
        improved = False
        rounds += 1
        for k in range(columns):
            if move[k] != 0 and 2 * move[k] * pull[k] + gram[k, k] < -least:
                _flip(gram, k, move, pull)
                improved = True
        if improved:
            continue
        for k in range(columns):
            if move[k] == 0:
                continue
            row, twice = gram[k], 2 * move[k]
            own = twice * pull[k] + gram[k, k]
            lowest, partner = np.float32(0), k
            for j in range(columns):
                change = own + gram[j, j] + 2 * move[j] * pull[j] + twice * move[j] * row[j]
                if change < lowest and j != k and move[j] != 0:
                    lowest, partner = change, j
            if lowest < -least:
                _flip(gram, k, move, pull)
                _flip(gram, partner, move, pull)
                improved = True


@kernel
def _descend(gram: np.ndarray, each: int, begin: int, move: np.ndarray, pull: np.ndarray) -> None:
    for r in range(move.shape[0]):
        _search(gram[(begin + r) // each], move[r], pull[r])


@kernel
def _enumerate(gram: np.ndarray, move: np.ndarray, pull: np.ndarray, places: np.ndarray) -> None:
    """The best of all choices for the weights at `places`, in the order of a Gray code."""
    now = move.copy()
    total, best = 0.0, 0.0
    for count in range(1, 1 << places.size):
        bit = 0
        while not (count >> bit) & 1:
            bit += 1
        k = places[bit]
        total += 2 * now[k] * pull[k] + gram[k, k]
        _flip(gram, k, now, pull)
        if total < best:
            best = total
            move[:] = now


@kernel
def _anneal(
    gram: np.ndarray,
    each: int,
    begin: int,
    move: np.ndarray,
    pull: np.ndarray,
    schedule: np.ndarray,
    pairs: float,
    states: np.ndarray,
    restarts: int,
) -> None:
    rows, columns = move.shape
    chances = np.empty(4096, np.float32)
    for i in range(4096):
        chances[i] = -np.log((i + 0.5) / 4096)
    pair_below = np.uint64(pairs * 65536)
    own = np.empty(columns, np.float32)
    m = np.empty(columns, np.float32)
    g = np.empty(columns, np.float32)
    for r in range(rows):
        h = gram[(begin + r) // each]
        places = np.flatnonzero(move[r])
        if places.size <= EXHAUSTIVE:
            _enumerate(h, move[r], pull[r], places)
            continue
        state = states[r]
        for k in range(columns):
            own[k] = h[k, k] if move[r, k] != 0 else NEVER
        first_m, first_g = move[r].copy(), pull[r].copy()
        best = 0.0
        for _ in range(restarts):
            m[:] = first_m
            g[:] = first_g
            total = 0.0
            for t in range(schedule.size):
                temperature = schedule[t]
                for k in range(columns):
                    change = 2 * m[k] * g[k] + own[k]
                    state = _random(state)
                    limit = temperature * chances[state & np.uint64(4095)]
                    if change < limit:
                        _flip(h, k, m, g)
                        total += change
                    elif (state >> np.uint64(16)) & np.uint64(65535) < pair_below:
                        j = np.int64((state >> np.uint64(32)) % np.uint64(columns))
                        change += 2 * m[j] * g[j] + own[j] + 2 * m[k] * m[j] * h[k, j]
                        if change < limit and j != k:
                            _flip(h, k, m, g)
                            _flip(h, j, m, g)
                            total += change
                if total < best:
                    best = total
                    move[r] = m
                    pull[r] = g
