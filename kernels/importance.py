"""Which input channels layers can do without, once the others make up for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Reader", "eliminate"]

# As a share of H's diagonal, added to it where channels are weighed against one another.
RIDGE = 1e-3
# Of many channels this share goes at once: their costs hardly change in between.
_STEP = 1 / 48


@dataclass(frozen=True)
class Reader:
    """A matrix that reads blocks of columns, each of which stays or goes as a whole.

    Args:
        rows: The weight W, float64 [O, K].
        gram: H, the second moment of what it multiplies, float64 [K, K].
        blocks: The columns of each block, int64 [blocks, columns].
        power: What errors are a share of: that of the output, tr(W H W^T).
    """

    rows: np.ndarray
    gram: np.ndarray
    blocks: np.ndarray
    power: float

    def refitted(self, kept: np.ndarray) -> np.ndarray:
        """The weight on the columns that are left, bool [K], that makes up for the others best."""
        gram = _damped(self.gram, RIDGE)
        wanted = self.rows @ gram[:, kept]
        return np.asarray(np.linalg.solve(gram[np.ix_(kept, kept)], wanted.T).T)


def eliminate(readers: Sequence[Reader], stop: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Take out the block that costs least, over and over; the other columns make up for it.

    With P = H^-1 over the columns that are left, taking out the block j costs, and changes::

        tr(V_j P_jj^-1 V_j^T)      V -= V_j P_jj^-1 P_j,:      P -= P_:,j P_jj^-1 P_j,:

    Args:
        readers: What reads the blocks; costs are shares of each one's power, added up.
        stop: How many blocks are left at the end.

    Returns:
        The blocks in the order in which they go, int64 [G], and what all up to each one cost
        together, float64 [G].

    Source: the rank-one updates of Hassibi and Stork 1993 (optimal brain surgeon), block by block.
    """
    states = [_State.of(reader) for reader in readers]
    alive = np.arange(len(readers[0].blocks))
    order: list[int] = []
    costs: list[float] = []
    while alive.size > stop:
        most = min(max(1, int(alive.size * _STEP)), alive.size - stop)
        near = np.argsort(_costs(states, alive), kind="stable")[: 2 * most]
        picked = _cheapest([state.part(alive[near]) for state in states], most, costs)
        gone = near[picked]
        for state in states:
            state.remove(alive[gone])
        order += alive[gone].tolist()
        alive = np.delete(alive, gone)
    return np.array(order, np.int64), np.cumsum(costs)


def _cheapest(states: Sequence[_State], count: int, costs: list[float]) -> list[int]:
    """Take out some blocks one by one; which they were, what each one cost noted."""
    alive, gone = [*range(len(states[0].blocks))], []
    for _ in range(count):
        now = _costs(states, np.array(alive))
        least = int(np.argmin(now))
        costs.append(float(now[least]))
        gone.append(alive.pop(least))
        if len(gone) < count:
            for state in states:
                state.remove(np.array(gone[-1:]))
    return gone


def _costs(states: Sequence[_State], alive: np.ndarray) -> np.ndarray:
    return np.asarray(np.sum([state.costs(alive) for state in states], axis=0))


@dataclass(frozen=True)
class _State:
    """A reader with some of its blocks gone: V and P, changed in place."""

    weight: np.ndarray
    inverse: np.ndarray
    blocks: np.ndarray
    share: float

    @classmethod
    def of(cls, reader: Reader) -> _State:
        inverse = np.linalg.inv(_damped(reader.gram, RIDGE))
        share = 1.0 / reader.power if reader.power > 0 else 0.0
        return cls(reader.rows.copy(), inverse, reader.blocks, share)

    def part(self, blocks: np.ndarray) -> _State:
        """Some of the blocks: what taking one of them out does to the others needs no more."""
        columns = self.blocks[blocks].reshape(-1)
        inverse = self.inverse[np.ix_(columns, columns)]
        renumbered = np.arange(columns.size).reshape(len(blocks), -1)
        return _State(self.weight[:, columns], inverse, renumbered, self.share)

    def costs(self, alive: np.ndarray) -> np.ndarray:
        """What it costs to take out each of these blocks alone, [blocks]."""
        columns = self.blocks[alive]
        parts = self.weight[:, columns].transpose(1, 2, 0)  # [blocks, columns, O]
        inner = self.inverse[columns[:, :, None], columns[:, None, :]]
        solved = parts / inner if columns.shape[1] == 1 else np.linalg.solve(inner, parts)
        costs = np.einsum("bco,bco->b", parts, solved)
        return np.asarray(costs * self.share)

    def remove(self, blocks: np.ndarray) -> None:
        """Take out blocks, and let the other columns make up for them."""
        gone = self.blocks[blocks].reshape(-1)
        step = np.linalg.solve(self.inverse[np.ix_(gone, gone)], self.inverse[gone])
        np.subtract(self.weight, self.weight[:, gone] @ step, out=self.weight)
        np.subtract(self.inverse, self.inverse[:, gone] @ step, out=self.inverse)


def _damped(gram: np.ndarray, ridge: float) -> np.ndarray:
    """H with a share of its diagonal added to it, and a trace of its mean."""
    diagonal = np.diag(gram)
    found = gram.copy()
    found.flat[:: len(gram) + 1] += ridge * (diagonal + 1e-3 * diagonal.mean()) + 1e-30
    return found
