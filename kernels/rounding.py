"""Rounding weights so that the layer's output, not the weight, changes least."""

from __future__ import annotations

import numpy as np

from onnxq.kernels._jit import kernel, read_only

__all__ = ["gptq", "inverse_diagonal", "inverse_factor", "shrink", "solved"]

# Rows of a large matrix that are worked on at once.
_ROWS = 256


def shrink(
    gram: np.ndarray, count: int, half: np.ndarray | None = None, other: np.ndarray | None = None
) -> np.ndarray:
    """A second moment drawn towards its diagonal by as much as its sampling noise deserves.

    The intensity is the one of least expected squared error: for normal data, or, where the same
    from two halves of the samples are given, by how far these differ, which holds for samples that
    depend on one another, such as patches of one picture, too.

    Args:
        gram: Second moments, float64 or float32 [K, K].
        count: Samples that it is the mean of.
        half: The same from half of the samples.
        other: The same from the other half.

    Source: Schaefer and Strimmer 2005, target D; Gaussian variance of the entries.
    """
    diagonal = np.diag(gram).astype(np.float64)
    signal = _off_diagonal(gram)
    if half is not None and other is not None:
        noise = _off_diagonal(half, other) / 4
    else:
        noise = (diagonal.sum() ** 2 - np.square(diagonal).sum() + signal) / max(count, 1)
    intensity = 1.0 if signal == 0 else min(1.0, noise / signal)
    shrunk: np.ndarray = gram * gram.dtype.type(1 - intensity)
    np.fill_diagonal(shrunk, diagonal)
    return shrunk


def _off_diagonal(gram: np.ndarray, other: np.ndarray | None = None) -> float:
    """The sum of squares beside the diagonal, of a matrix or of the difference of two."""
    total = 0.0
    for begin in range(0, len(gram), _ROWS):  # so that nothing as large is made on the way
        rows = gram[begin : begin + _ROWS].astype(np.float64)
        if other is not None:
            rows -= other[begin : begin + _ROWS]
        rows.flat[begin :: len(gram) + 1] = 0
        total += float(np.vdot(rows, rows))
    return total


def solved(gram: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The x with x H = w, by a factor of H, in H's precision, [R, K].

    In blocks, since most of the time for a large matrix is then that of products, which are many
    times faster than what LAPACK does by itself.

    Args:
        gram: H, positive definite, [K, K].
        wanted: w, [R, K].

    Raises:
        numpy.linalg.LinAlgError: H is not positive definite, in its precision.
    """
    factor, blocks, inverses = _factor(gram)
    x = wanted.astype(gram.dtype)
    for b, inverse in zip(blocks, inverses, strict=True):
        x[:, b] = (x[:, b] - x[:, : b.start] @ factor[b, : b.start].T) @ inverse.T
    for b, inverse in zip(blocks[::-1], inverses[::-1], strict=True):
        x[:, b] = (x[:, b] - x[:, b.stop :] @ factor[b.stop :, b]) @ inverse
    return x


def inverse_diagonal(gram: np.ndarray) -> np.ndarray:
    """The diagonal of H^-1, by the inverse of a factor of H in H's precision, float64 [K].

    Args:
        gram: H, positive definite, [K, K].

    Raises:
        numpy.linalg.LinAlgError: H is not positive definite, in its precision.
    """
    factor, blocks, inverses = _factor(gram)
    # L^-1 takes the place of L from above, rows of a block by those above it
    diagonal = np.zeros(len(gram))
    for b, inverse in zip(blocks, inverses, strict=True):
        factor[b, : b.start] = inverse @ -(factor[b, : b.start] @ factor[: b.start, : b.start])
        factor[b, b] = inverse
        diagonal[: b.stop] += np.square(factor[b, : b.stop], dtype=np.float64).sum(axis=0)
    return diagonal


def _factor(gram: np.ndarray) -> tuple[np.ndarray, list[slice], list[np.ndarray]]:
    """L with H = L L^T, its blocks, and the inverse of L's square on each.

    What L holds in these squares themselves is not L's.
    """
    blocks = [slice(k, min(k + _ROWS, len(gram))) for k in range(0, len(gram), _ROWS)]
    factor = np.tril(gram)
    inverses = []
    for b in blocks:
        left = factor[b.start :, : b.start]
        factor[b.start :, b] -= left @ left[:_ROWS].T
        inverses.append(np.linalg.inv(np.linalg.cholesky(factor[b, b])).astype(gram.dtype))
        factor[b.stop :, b] = factor[b.stop :, b] @ inverses[-1].T
    return factor, blocks, inverses


def inverse_factor(gram: np.ndarray, damping: float) -> np.ndarray:
    """The upper triangular U with (gram + damping * I)^-1 = U^T U, float32 [K, K].

    Raises:
        numpy.linalg.LinAlgError: The matrix is not positive definite, damping or not.
    """
    size = gram.shape[0]
    # With the order of rows and columns reversed, a lower Cholesky factor of the matrix becomes an
    # upper one; inverting a triangle is stabler than inverting the matrix first.
    lower = np.linalg.cholesky((gram + damping * np.eye(size))[::-1, ::-1])
    upper = lower[::-1, ::-1]
    return np.ascontiguousarray(np.linalg.solve(upper, np.eye(size)), np.float32)


def gptq(
    weight: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    factor: np.ndarray,
    out: np.ndarray,
) -> None:
    """Round each row column by column, the rest of the row making up for each column's error.

    Minimises (q - w) H (q - w)^T greedily, H being the second moment of the layer's input.

    Args:
        weight: float32 [O, K]; used as scratch.
        scale: float32 [O].
        zero: Zero points, int32 [O].
        qmin: Least integer.
        qmax: Greatest integer.
        factor: U with H^-1 = U^T U, upper triangular, float32 [K, K].
        out: Values on the grid, float32 [O, K].

    Source: Frantar et al. 2022 (arXiv 2210.17323).
    """
    _gptq(weight, read_only(scale), read_only(zero), qmin, qmax, read_only(factor), out)


@kernel
def _gptq(
    weight: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    qmin: int,
    qmax: int,
    factor: np.ndarray,
    out: np.ndarray,
) -> None:
    rows, columns = weight.shape
    for o in range(rows):
        row = weight[o]
        s = scale[o]
        for k in range(columns):
            q = min(max(np.rint(row[k] / s) + zero[o], qmin), qmax) - zero[o]
            value = np.float32(q * s)
            out[o, k] = value
            step = (row[k] - value) / factor[k, k]
            for j in range(k + 1, columns):
                row[j] -= step * factor[k, j]
