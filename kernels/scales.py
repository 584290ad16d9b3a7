"""Scales of weights by the error of the layer's output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq.kernels.objective import Objective, objective
from onnxq.kernels.tabu import short_search

__all__ = ["output_scale", "output_scales", "refit_scale", "refit_scales", "searched_scales"]

# Moves per weight that compare scales: so many over K, within limits.
COMPARED, SWEEPS = 256, (0.1, 0.5)


def output_scales(
    weight: np.ndarray,
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    gram: np.ndarray,
    linear: np.ndarray | None = None,
    *,
    base: np.ndarray,
    candidates: int = 40,
    low: float = 0.4,
) -> np.ndarray:
    """The scale of each row under which rounding to nearest changes the output least.

    Args:
        weight: float32 [O, K], or [G, O/G, K] for G groups with an H each.
        zero: Zero points, int32 [O].
        qmin: Least integer.
        qmax: Greatest integer.
        gram: H, the second moment of the layer's input, [K, K] or [G, K, K].
        linear: g0 of the objective d H d^T + 2 d g0, shaped as the weight; None for 0.
        base: The greatest scale that is tried, float32 [O].
        candidates: How many are tried.
        low: The least, as a share of the greatest.

    Returns:
        float32 [O].
    """
    tried, costs = _costs(weight, zero, qmin, qmax, gram, linear, base, candidates, low)
    return np.asarray(tried[costs.argmin(axis=0), np.arange(tried.shape[1])])


def output_scale(
    weight: np.ndarray,
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    gram: np.ndarray,
    linear: np.ndarray | None = None,
    *,
    base: float,
    candidates: int = 40,
    low: float = 0.4,
) -> np.float32:
    """The one scale of all rows, otherwise as `output_scales`."""
    rows = np.full(np.size(zero), base, np.float32)
    tried, costs = _costs(weight, zero, qmin, qmax, gram, linear, rows, candidates, low)
    return np.float32(tried[costs.sum(axis=1).argmin(), 0])


def _costs(
    weight: np.ndarray,
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    gram: np.ndarray,
    linear: np.ndarray | None,
    base: np.ndarray,
    candidates: int,
    low: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Scales, float32 [candidates, O], from the greatest on, and the objective of each."""
    shares = np.linspace(1.0, low, candidates)
    tried = (np.asarray(base, np.float64) * shares[:, None]).astype(np.float32)
    columns = weight.shape[-1]
    grams = np.asarray(gram, np.float64).reshape(-1, columns, columns)
    rows = np.asarray(weight, np.float32).reshape(len(grams), -1, columns)
    cost = Objective(grams, None if linear is None else linear.reshape(rows.shape))
    shape = (*rows.shape[:2], 1)
    z = np.asarray(zero, np.float32).reshape(shape)
    costs = np.empty(tried.shape)
    for i, scale in enumerate(tried.reshape(-1, *shape)):
        q = np.clip(np.rint(rows / scale) + z, qmin, qmax) - z
        costs[i] = cost(q * scale - rows)
    return tried, costs


def searched_scales(
    weight: np.ndarray,
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    gram: np.ndarray,
    linear: np.ndarray | None = None,
    *,
    around: np.ndarray,
    shares: Sequence[float] = (1.0, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15),
    sweeps: float | None = None,
    seed: int = 0,
    threads: int = 1,
) -> np.ndarray:
    """The scale of each row under which a short search of roundings changes the output least.

    Rounding to nearest prefers scales that a search does not: on 4-bit layers these leave about an
    eighth less error, on samples that were not used too.

    Args:
        weight: float32 [O, K], or [G, O/G, K] for G groups with an H each.
        zero: Zero points, int32 [O].
        qmin: Least integer.
        qmax: Greatest integer.
        gram: H, [K, K] or [G, K, K].
        linear: g0, shaped as the weight; None for 0.
        around: Scales to try others around, as those of `output_scales`, float32 [O].
        shares: What is tried, as shares of these.
        sweeps: Moves per weight for each; None for a number that is enough to compare them.
        seed: Of the search.
        threads: Threads that share the rows.

    Returns:
        float32 [O].
    """
    if sweeps is None:
        sweeps = float(np.clip(COMPARED / weight.shape[-1], *SWEEPS))
    tried = np.asarray(np.multiply.outer(shares, np.asarray(around, np.float64)), np.float32)
    costs = short_search(
        weight, tried, zero, qmin, qmax, gram, linear, sweeps=sweeps, seed=seed, threads=threads
    )
    return np.asarray(tried[costs.argmin(axis=0), np.arange(tried.shape[1])])


def refit_scales(
    weight: np.ndarray, codes: np.ndarray, gram: np.ndarray, linear: np.ndarray | None = None
) -> np.ndarray:
    """The scale of each row that serves given integers best, q (H w - g0) / (q H q).

    Args:
        weight: float32 [O, K], or [G, O/G, K] for G groups with an H each.
        codes: q - z, shaped as the weight.
        gram: H, [K, K] or [G, K, K].
        linear: g0, shaped as the weight; None for 0.

    Returns:
        float32 [O]; not above 0 where no scale that is serves the row: keep the old one there.
    """
    above, below = _fit(weight, codes, gram, linear)
    return np.asarray(
        np.divide(above, below, out=np.zeros_like(above), where=below > 0), np.float32
    )


def refit_scale(
    weight: np.ndarray, codes: np.ndarray, gram: np.ndarray, linear: np.ndarray | None = None
) -> np.float32:
    """The one scale of all rows that serves given integers best; otherwise as `refit_scales`."""
    above, below = (part.sum() for part in _fit(weight, codes, gram, linear))
    return np.float32(above / below if below > 0 else 0.0)


def _fit(
    weight: np.ndarray, codes: np.ndarray, gram: np.ndarray, linear: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    q = codes.astype(np.float64)
    pull = np.matmul(weight.astype(np.float64), gram)
    if linear is not None:
        pull -= linear
    above = np.einsum("...k,...k->...", q, pull).reshape(-1)
    return above, objective(q, gram)
