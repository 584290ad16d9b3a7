"""The moves of a tabu search over roundings, compiled: see `onnxq.kernels.tabu`."""

from __future__ import annotations

import numpy as np

from onnxq.kernels._jit import kernel

__all__ = ["SILENT", "descend", "walk"]

# Rows with so few open weights are solved by trying all choices.
EXHAUSTIVE = 12
# The change that a move makes which must not be made.
NEVER = np.float32(1e30)
# Changes that count, in units.
LEAST = 1e-6
# Columns with less of the mean diagonal are constant: they have no say.
SILENT = 1e-9


@kernel
def _follow(
    row: np.ndarray,
    step: np.float32,
    grain: np.float32,
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
        grain: What H is in.
        move: The step that is each weight's next.
        ease: 1 / H_kk.
        until: When each weight's rest ends.
        now: The time.
        places: 2^n - 1, not less than the last place.
        change: What each move changes; brought up to date.
    """
    twice = np.float32(2) * step * grain  # 2 alone would make it float64
    most = np.int32(0x7FFFFFFF)
    lowest = most
    for j in range(change.size):
        c = change[j] + twice * move[j] * np.float32(row[j])
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
    grain: np.float32,
    move: np.ndarray,
    places: np.int32,
    besides: np.int64,
    change: np.ndarray,
) -> np.int32:
    """The best move but one, were that made; the arguments are those of `_follow`."""
    twice = np.float32(2) * step * grain  # 2 alone would make it float64
    most = np.int32(0x7FFFFFFF)
    lowest = most
    for j in range(change.size):
        key = np.float32(change[j] + twice * move[j] * np.float32(row[j])).view(np.int32)
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
def _changes(
    gram: np.ndarray, grain: np.float32, move: np.ndarray, pull: np.ndarray, change: np.ndarray
) -> None:
    for k in range(move.size):
        change[k] = 2 * move[k] * pull[k] + grain * gram[k, k] if move[k] != 0 else NEVER


@kernel
def _enumerate(
    gram: np.ndarray,
    grain: np.float32,
    move: np.ndarray,
    change: np.ndarray,
    ease: np.ndarray,
    places: np.ndarray,
) -> float:
    """Take the best of all choices for the weights at `places`, in the order of a Gray code.

    Returns:
        What they change.
    """
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
        _follow(gram[k], step, grain, now, ease, until, np.int32(0), last, change)
        change[k] = -own
        if total < best:
            best = total
            move[:] = now
    return best


@kernel
def walk(
    gram: np.ndarray,
    grains: np.ndarray,
    each: int,
    begin: int,
    move: np.ndarray,
    pull: np.ndarray,
    streams: np.ndarray,
    gained: np.ndarray,
    sweeps: float,
    rest: int,
) -> None:
    """The best state that a tabu search sees from where each row is.

    Args:
        gram: H in units, float32 or, in grains, int16, [G, K, K].
        grains: What to multiply it by, float32 [G].
        each: Rows of a group.
        begin: The first row's number.
        move: The step that is each weight's next, +1, -1 or, for none, 0; float32 [R, K].
        pull: d H + g0, float32 [R, K].
        streams: The state of each row's random stream, uint64; goes on.
        gained: By how much each row's objective fell, float64, added to.
        sweeps: Moves per weight.
        rest: Moves that a weight rests, at least; up to twice that, at random.
    """
    columns = move.shape[1]
    change, ease = np.empty(columns, np.float32), np.ones(columns, np.float32)
    now, until = np.empty(columns, np.float32), np.empty(columns, np.int32)
    last = _places(columns)
    for r in range(move.shape[0]):
        h, grain = gram[(begin + r) // each], grains[(begin + r) // each]
        _changes(h, grain, move[r], pull[r], change)
        places = np.flatnonzero(move[r])
        if places.size <= EXHAUSTIVE:
            gained[begin + r] += _enumerate(h, grain, move[r], change, ease, places)
            continue
        for place in places:
            ease[place] = 1 / max(grain * h[place, place], SILENT)
        state = streams[begin + r]
        now[:], until[:] = move[r], 0
        least = min(rest, places.size // 3)
        total, best = 0.0, 0.0
        k = _follow(h[0], np.float32(0), grain, now, ease, until, np.int32(0), last, change)
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
            k = _follow(h[k], step, grain, now, ease, until, np.int32(i + 1), last, change)
            change[moved] = -own
        if total < best - LEAST:
            best = total
            move[r] = now
        gained[begin + r] += best
        streams[begin + r] = state


@kernel
def descend(
    gram: np.ndarray,
    grains: np.ndarray,
    each: int,
    begin: int,
    move: np.ndarray,
    pull: np.ndarray,
) -> None:
    """Single moves, then each move with its best partner, until nothing improves."""
    columns = move.shape[1]
    change, ease = np.empty(columns, np.float32), np.ones(columns, np.float32)
    until, last = np.zeros(columns, np.int32), _places(columns)
    for r in range(move.shape[0]):
        h, grain = gram[(begin + r) // each], grains[(begin + r) // each]
        now = move[r]
        _changes(h, grain, now, pull[r], change)
        first = _follow(h[0], np.float32(0), grain, now, ease, until, np.int32(0), last, change)
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
                partner = _answer(h[j], now[j], grain, now, last, j, change)
                answer = change[partner] + 2 * now[j] * now[partner] * grain * h[j, partner]
                if partner == j or own + answer >= -LEAST:
                    continue
            step = now[j]
            now[j] = -step
            until[j] = 1  # back is never the best, and what it changes is not yet right
            first = _follow(h[j], step, grain, now, ease, until, np.int32(0), last, change)
            until[j], change[j] = 0, -own
            tried, left = 0, left - 1
