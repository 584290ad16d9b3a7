"""Latency of models, timed alternately so that a busy machine slows them alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from onnxq.runtime import Session

__all__ = ["alternate", "runs"]


def alternate(
    sessions: Sequence[Session],
    feed: Mapping[str, np.ndarray],
    *,
    seconds: float = 2.0,
    least: int = 10,
) -> tuple[float, ...]:
    """Median milliseconds of one run, session by session; the arguments are those of `runs`."""
    rows = runs(sessions, feed, seconds=seconds, least=least)
    return tuple(float(np.median(row)) for row in rows)


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
        session.run(feed)
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
