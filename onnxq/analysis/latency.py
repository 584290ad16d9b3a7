"""Latency of models, timed alternately so that a busy machine slows them alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq.runtime import Session

__all__ = ["NO_SPINNING", "WARM_UP", "Latency", "Spread", "pair", "runs"]

# Runs of each model before the clock counts: memory is allocated and caches are filled by then.
WARM_UP = 2
# Session configuration: threads of one model must not spin on while another one is timed.
NO_SPINNING = {"session.force_spinning_stop": "1"}


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        """That of values."""
        low, median, high = np.percentile(values, [25, 50, 75])
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True)
class Latency:
    """Two models timed in turns.

    Args:
        reference_ms: Milliseconds of a run of the reference.
        other_ms: Those of the other model.
        speedup: How many times faster the other one is, round by round.
        runs: Timed runs of each; `WARM_UP` before them are left out.
        threads: Threads within an operator; 0 for all cores.
        provider: The execution provider of onnxruntime.
    """

    reference_ms: Spread
    other_ms: Spread
    speedup: Spread
    runs: int
    threads: int
    provider: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        plain = dataclasses.asdict(self)
        return {"float_ms": plain.pop("reference_ms"), **plain, "warm_up": WARM_UP}


def pair(
    reference: Session,
    other: Session,
    feed: Mapping[str, np.ndarray],
    *,
    count: int | None = None,
) -> Latency:
    """Time a model and its reference; `count` rounds, or about two seconds.

    Medians and quartiles stand side by side with the ratio of each round: what slows the machine
    for longer than a round hardly moves it.
    """
    sessions = (reference, other)
    given = runs(sessions, feed) if count is None else runs(sessions, feed, seconds=0, least=count)
    first, second = given
    return Latency(
        Spread.of(first),
        Spread.of(second),
        Spread.of(first / second),
        len(first),
        other.threads,
        other.provider,
    )


def runs(
    sessions: Sequence[Session],
    feed: Mapping[str, np.ndarray],
    *,
    seconds: float = 2.0,
    least: int = 10,
) -> list[np.ndarray]:
    """Milliseconds of every run, session by session.

    Each round runs every session once, in an order of its own: which model ran before decides what
    is left in the caches.

    Args:
        sessions: The models; all take the same feed.
        feed: One sample.
        seconds: How long to go on, about.
        least: Runs of each at least.
    """
    for session in sessions:
        for _ in range(WARM_UP):
            session.run(feed)
    times: list[list[float]] = [[] for _ in sessions]
    rng = np.random.default_rng(0)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[0]) < least:
        for i in rng.permutation(len(sessions)):
            start = time.perf_counter()
            sessions[i].run(feed)
            times[i].append((time.perf_counter() - start) * 1e3)
    return [np.array(row) for row in times]
