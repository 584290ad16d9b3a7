"""Latency of models, timed alternately so that a busy machine slows them alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from onnxq.runtime import Session

__all__ = ["alternate"]


def alternate(
    sessions: Sequence[Session],
    feed: Mapping[str, np.ndarray],
    *,
    seconds: float = 2.0,
    least: int = 10,
) -> tuple[float, ...]:
    """Median milliseconds of one run, session by session.

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
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[0]) < least:
        for session, row in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(feed)
            row.append((time.perf_counter() - start) * 1e3)
    return tuple(float(np.median(row)) for row in times)
