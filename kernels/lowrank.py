"""Low rank by the error of outputs: the two factors that change what a weight puts out least.

With H the second moment of the patches x that a weight W meets, E|W x - Q x|^2 is
tr((W - Q) H (W - Q)^T).  Among all Q of rank r it is least where Q keeps, of the outputs, their r
directions of most power: Q = U U^T W, with U the leading eigenvectors of W H W^T.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["halved", "low_rank", "rank_errors", "refit", "spatial", "spatial_errors"]

# Steps of conjugate gradients for the first factor between two solutions of the second.
_STEPS = 5
# Of the mean of a moment's diagonal, added to it where it is solved with.
_TINY = 1e-9


def low_rank(rows: np.ndarray, moment: np.ndarray | None, rank: int) -> np.ndarray:
    """The matrix of a rank whose outputs come nearest to those of a matrix.

    Args:
        rows: W, float64 [O, K].
        moment: H, float64 [K, K]; None for that of white noise: the plain SVD.
        rank: At most so many dimensions.

    Returns:
        float64 [O, K].
    """
    kept = _directions(rows, moment)[1][:, :rank]
    return np.asarray(kept @ (kept.T @ rows))


def rank_errors(rows: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """The relative error of `low_rank` at every rank from 0 on, float64 [min(O, K) + 1]."""
    powers = np.maximum(_directions(rows, moment)[0], 0.0)
    left = np.append(np.cumsum(powers[::-1])[::-1], 0.0)[: min(rows.shape) + 1]
    left[-1] = 0.0
    return np.asarray(left / left[0] if left[0] > 0 else np.zeros_like(left))


def halved(rows: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Two factors of a matrix of that rank: [O, rank] of columns as large as rows of [rank, K]."""
    u, s, v = np.linalg.svd(rows, full_matrices=False)
    root = np.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


def refit(rows: np.ndarray, moment: np.ndarray, cross: np.ndarray, ridge: float) -> np.ndarray:
    """The matrix that makes of x' what is wanted, by least squares, drawn towards a given one.

    Least of E|Q x' - t|^2 + ridge |Q - W|^2, in units of the mean of H's diagonal.

    Args:
        rows: W, float64 [O, K].
        moment: H = E[x' x'^T], float64 [K, K].
        cross: E[t x'^T], float64 [O, K].
        ridge: How strongly.
    """
    missed = cross - rows @ moment
    return np.asarray(rows + _solve(moment, missed, ridge))


# ---------------------------------------------------------------------- kh x 1, then 1 x kw


def spatial(
    weight: np.ndarray, moment: np.ndarray | None, rank: int, sweeps: int = 4
) -> np.ndarray:
    """The kernel nearest in its outputs to a kernel, made of kh x 1 to `rank` maps, then 1 x kw.

    The first factor begins as the best for single columns of the kernel's outputs.  Then the
    second one is solved for by least squares on what the first one delivers, and the first one
    for the second, in turns.

    Args:
        weight: float64 [O, C, kh, kw].
        moment: Of the patches, float64 [C * kh * kw, C * kh * kw]; None for white noise: the plain
            SVD, for which there is nothing to do in turns.
        rank: Maps between the two.
        sweeps: How many turns.

    Returns:
        float64 [O, C, kh, kw].

    Source: Jaderberg et al. 2014 (arXiv 1405.3866), scheme 2; Zhang et al. 2016 (arXiv 1505.06798).
    """
    by_column = _by_column(weight)
    outputs, width, inputs = by_column.shape
    if moment is None:
        made = low_rank(by_column.reshape(-1, inputs), None, rank)
        return _as_kernel(made.reshape(by_column.shape), weight.shape)
    gram = _moment_by_column(moment, weight.shape)
    first = _first_factor(by_column, gram)[:rank]
    wanted = by_column.reshape(outputs, -1) @ gram.reshape(width * inputs, -1)
    second = _second_factor(wanted, gram, first)
    for _ in range(sweeps):
        first = _improved(by_column, gram, first, second)
        second = _second_factor(wanted, gram, first)
    made = np.einsum("ojr,ra->oja", second, first, optimize=True)
    return _as_kernel(made, weight.shape)


def spatial_errors(weight: np.ndarray, moment: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    """The relative error of `spatial` at some ranks, before any turns, float64."""
    by_column = _by_column(weight)
    outputs, width, inputs = by_column.shape
    gram = _moment_by_column(moment, weight.shape)
    first = _first_factor(by_column, gram)[: max(ranks, default=0)]
    wanted = by_column.reshape(outputs, -1) @ gram.reshape(width * inputs, -1)
    power = float(np.sum(wanted * by_column.reshape(outputs, -1)))
    inner, cross = _through(gram, first), _across(wanted, first, width)
    found = []
    for rank in ranks:
        part = inner[:, :rank, :, :rank].reshape(width * rank, -1)
        seen = cross[:, :, :rank].reshape(outputs, -1)
        kept = float(np.sum(_solve(part, seen, 0.0) * seen))
        found.append(max(1.0 - kept / power, 0.0) if power > 0 else 0.0)
    return np.array(found)


def _by_column(weight: np.ndarray) -> np.ndarray:
    """[O, C, kh, kw] as [O, kw, C * kh]."""
    columns = np.moveaxis(weight, 3, 1)
    return np.ascontiguousarray(columns).reshape(*columns.shape[:2], -1)


def _as_kernel(by_column: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    outputs, channels, height, width = shape
    return np.moveaxis(by_column.reshape(outputs, width, channels, height), 1, 3)


def _moment_by_column(moment: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The moment of patches in the order of `_by_column`, [kw, C * kh, kw, C * kh]."""
    _, channels, height, width = shape
    apart = moment.reshape(channels * height, width, channels * height, width)
    return np.ascontiguousarray(apart.transpose(1, 0, 3, 2))


def _first_factor(by_column: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """The best first factors of all ranks, one row each, for columns that know not of each other.

    Args:
        by_column: [O, kw, A].
        gram: [kw, A, kw, A].
    """
    rows = by_column.reshape(-1, by_column.shape[2])
    mean = np.einsum("jajb->ab", gram) / len(gram)
    kept = _directions(rows, mean)[1][:, : min(rows.shape)]
    return np.asarray(kept.T @ rows)


def _second_factor(wanted: np.ndarray, gram: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The second factor that makes most of the first, [O, kw, r]; `wanted` is W H, [O, kw * A]."""
    width, rank = len(gram), len(first)
    inner = _through(gram, first).reshape(width * rank, -1)
    cross = _across(wanted, first, width)
    return _solve(inner, cross.reshape(len(wanted), -1), 0.0).reshape(cross.shape)


def _through(gram: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The moment of what the first factor delivers to the columns, [kw, r, kw, r]."""
    width, inputs = gram.shape[:2]
    half = first @ gram.reshape(width, inputs, -1)  # [kw, r, kw * A]
    return np.asarray(half.reshape(width, len(first), width, inputs) @ first.T)


def _across(wanted: np.ndarray, first: np.ndarray, width: int) -> np.ndarray:
    """The cross moment of the outputs with what the first factor delivers, [O, kw, r]."""
    return np.asarray(wanted.reshape(len(wanted), width, -1) @ first.T)


def _improved(
    by_column: np.ndarray, gram: np.ndarray, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """A better first factor for a second one, by a few steps of conjugate gradients."""
    outputs, width, inputs = by_column.shape
    flat = gram.reshape(width * inputs, -1)
    tall = second.reshape(outputs * width, -1)

    def normal(made: np.ndarray) -> np.ndarray:
        missed = made.reshape(outputs, -1) @ flat
        return np.asarray(tall.T @ missed.reshape(outputs * width, inputs))

    left = normal(by_column - (tall @ first).reshape(by_column.shape))
    step, size = left, float(np.sum(left * left))
    for _ in range(_STEPS):
        turned = normal(tall @ step)
        curve = float(np.sum(step * turned))
        if curve <= 0.0 or size == 0.0:
            break
        first = first + size / curve * step
        left = left - size / curve * turned
        before, size = size, float(np.sum(left * left))
        step = left + size / before * step
    return first


# ---------------------------------------------------------------------- linear algebra


def _directions(rows: np.ndarray, moment: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The powers of the outputs along their principal directions, falling, and these as columns."""
    power = rows @ rows.T if moment is None else rows @ moment @ rows.T
    values, vectors = np.linalg.eigh((power + power.T) / 2)
    return values[::-1], vectors[:, ::-1]


def _solve(moment: np.ndarray, right: np.ndarray, ridge: float) -> np.ndarray:
    """X with X (H + ridge) = right, in units of the mean of H's diagonal."""
    size = len(moment)
    scale = float(np.trace(moment)) / max(size, 1)
    if scale <= 0.0:
        return np.zeros_like(right)
    loaded = moment + (ridge + _TINY) * scale * np.eye(size)
    return np.asarray(np.linalg.solve(loaded, right.T).T)
