"""Ranges for the input of a gate y = x * f(x): the error that counts is that of y."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["gate_range"]

# Shares of the observed range that are tried on either side.
SHARES = np.concatenate([np.linspace(0.05, 0.5, 10), np.linspace(0.55, 1.0, 10)])


def gate_range(
    centres: np.ndarray,
    counts: np.ndarray,
    low: float,
    high: float,
    gate: Callable[[np.ndarray], np.ndarray],
    levels: int,
) -> tuple[float, float]:
    """The range of x for which the gate's result has the least expected squared error.

    Far below zero SiLU is flat, so steps spent there are lost.

    Args:
        centres: Centres of the histogram's bins, float64 [B].
        counts: Values per bin, [B].
        low: Least value, at most 0.
        high: Greatest value, at least 0.
        gate: y as a function of x.
        levels: Points of the grid.
    """
    seen = counts > 0
    x, weight = centres[seen], counts[seen].astype(np.float64)
    exact = gate(x)
    lows = low * SHARES if low < 0 else np.zeros(1)
    highs = high * SHARES[SHARES >= 0.5] if high > 0 else np.zeros(1)
    best, chosen = np.inf, (low, high)
    for b in highs[::-1]:
        for a in lows[::-1]:
            if b <= a:
                continue
            step = (b - a) / (levels - 1)
            zero = np.rint(-a / step)
            q = np.clip(np.rint(x / step) + zero, 0, levels - 1)
            error = gate((q - zero) * step) - exact
            cost = float(weight @ np.square(error))
            if cost < best:
                best, chosen = cost, (float(a), float(b))
    return chosen
