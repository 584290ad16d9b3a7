"""Sums over the patches that a convolution reads, without ever unfolding its input."""

from __future__ import annotations

import numpy as np

from onnxq.kernels._jit import kernel, read_only

__all__ = ["add_patch_products", "add_patch_sums", "gather_patches"]


def add_patch_sums(
    x: np.ndarray,
    window: tuple[int, int, int],
    strides: tuple[int, int, int],
    begin: tuple[int, int, int],
    dilations: tuple[int, int, int],
    positions: tuple[int, int, int],
    out: np.ndarray,
) -> None:
    """Add the sum of all patches of a batch.

    The patch at output position p holds, at window offset k, the value of the zero-padded input at
    ``p * strides + k * dilations - begin``.  One- and two-dimensional convolutions have leading
    axes of size 1.

    Args:
        x: Input, float32 [N, C, D, H, W].
        window: Window sizes.
        strides: Strides.
        begin: Zeros padded before each axis.
        dilations: Dilations.
        positions: Output sizes.
        out: Sums, float64 [C, *window], added to.
    """
    _add_patch_sums(read_only(x), window, strides, begin, dilations, positions, out)


@kernel(any_order=True)
def _add_patch_sums(
    x: np.ndarray,
    window: tuple[int, int, int],
    strides: tuple[int, int, int],
    begin: tuple[int, int, int],
    dilations: tuple[int, int, int],
    positions: tuple[int, int, int],
    out: np.ndarray,
) -> None:
    samples, channels, depth, height, width = x.shape
    row_sums = np.empty(window[2], np.float64)
    for n in range(samples):
        for c in range(channels):
            for d in range(depth):
                for h in range(height):
                    row = x[n, c, d, h]
                    for j in range(window[2]):
                        # the first and the last position whose value lies inside the row
                        shift = begin[2] - j * dilations[2]
                        first = max(0, -(-shift // strides[2]))
                        last = min(positions[2] - 1, (width - 1 + shift) // strides[2])
                        total = np.float32(0)
                        if strides[2] == 1:
                            for w in range(first - shift, last - shift + 1):
                                total += row[w]
                        else:
                            for p in range(first, last + 1):
                                total += row[p * strides[2] - shift]
                        row_sums[j] = total
                    for k in range(window[0]):
                        at = d + begin[0] - k * dilations[0]
                        if at < 0 or at % strides[0] or at // strides[0] >= positions[0]:
                            continue
                        for i in range(window[1]):
                            at = h + begin[1] - i * dilations[1]
                            if at < 0 or at % strides[1] or at // strides[1] >= positions[1]:
                                continue
                            for j in range(window[2]):
                                out[c, k, i, j] += row_sums[j]


def add_patch_products(
    x: np.ndarray,
    weights: np.ndarray,
    window: tuple[int, int, int],
    strides: tuple[int, int, int],
    begin: tuple[int, int, int],
    dilations: tuple[int, int, int],
    positions: tuple[int, int, int],
    out: np.ndarray,
) -> None:
    """Add the sums of all patches of each channel, weighed position by position.

    Args:
        x: Input, float32 [N, C, D, H, W].
        weights: What each patch is multiplied by, R of each channel, float32 [N, C, R, *positions].
        window: Window sizes.
        strides: Strides.
        begin: Zeros padded before each axis.
        dilations: Dilations.
        positions: Output sizes.
        out: Sums, float64 [C, R, *window], added to.
    """
    given = read_only(x), read_only(weights)
    _add_patch_products(*given, window, strides, begin, dilations, positions, out)


@kernel(any_order=True)
def _add_patch_products(
    x: np.ndarray,
    weights: np.ndarray,
    window: tuple[int, int, int],
    strides: tuple[int, int, int],
    begin: tuple[int, int, int],
    dilations: tuple[int, int, int],
    positions: tuple[int, int, int],
    out: np.ndarray,
) -> None:
    samples, channels, depth, height, width = x.shape
    for n in range(samples):
        for c in range(channels):
            for r in range(weights.shape[2]):
                for k in range(window[0]):
                    for i in range(window[1]):
                        for j in range(window[2]):
                            shift = begin[2] - j * dilations[2]
                            first = max(0, -(-shift // strides[2]))
                            last = min(positions[2] - 1, (width - 1 + shift) // strides[2])
                            if last < first:
                                continue
                            whole = np.float64(0)
                            for p in range(positions[0]):
                                d = p * strides[0] + k * dilations[0] - begin[0]
                                if d < 0 or d >= depth:
                                    continue
                                for q in range(positions[1]):
                                    h = q * strides[1] + i * dilations[1] - begin[1]
                                    if h < 0 or h >= height:
                                        continue
                                    row, by = x[n, c, d, h], weights[n, c, r, p, q]
                                    total = np.float32(0)
                                    if strides[2] == 1:
                                        for w in range(first, last + 1):
                                            total += by[w] * row[w - shift]
                                    else:
                                        for w in range(first, last + 1):
                                            total += by[w] * row[w * strides[2] - shift]
                                    whole += total
                            out[c, r, k, i, j] += whole


def gather_patches(
    x: np.ndarray,
    window: tuple[int, int, int],
    strides: tuple[int, int, int],
    begin: tuple[int, int, int],
    dilations: tuple[int, int, int],
    positions: tuple[int, int, int],
    picked: np.ndarray,
    out: np.ndarray,
) -> None:
    """Copy the patches at some output positions.

    Args:
        x: Input, float32 [N, C, D, H, W].
        window: Window sizes.
        strides: Strides.
        begin: Zeros padded before each axis.
        dilations: Dilations.
        positions: Output sizes.
        picked: Flat indices into [N, *positions], int64 [P].
        out: Patches, float32 [P, C * window size], in the order of a convolution's weight.
    """
    _gather_patches(
        read_only(x), window, strides, begin, dilations, positions, read_only(picked), out
    )


@kernel
def _gather_patches(
    x: np.ndarray,
    window: tuple[int, int, int],
    strides: tuple[int, int, int],
    begin: tuple[int, int, int],
    dilations: tuple[int, int, int],
    positions: tuple[int, int, int],
    picked: np.ndarray,
    out: np.ndarray,
) -> None:
    _, channels, depth, height, width = x.shape
    plane = positions[1] * positions[2]
    volume = positions[0] * plane
    for row in range(picked.size):
        n, rest = divmod(picked[row], volume)
        d, rest = divmod(rest, plane)
        h, w = divmod(rest, positions[2])
        at = 0
        for c in range(channels):
            for k in range(window[0]):
                z = d * strides[0] + k * dilations[0] - begin[0]
                for i in range(window[1]):
                    y = h * strides[1] + i * dilations[1] - begin[1]
                    for j in range(window[2]):
                        v = w * strides[2] + j * dilations[2] - begin[2]
                        inside = 0 <= z < depth and 0 <= y < height and 0 <= v < width
                        out[row, at] = x[n, c, z, y, v] if inside else np.float32(0)
                        at += 1
