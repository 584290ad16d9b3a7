"""Patch sums and gathered patches against windows taken with plain numpy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.kernels.patches import add_patch_products, add_patch_sums, gather_patches


def windows(x, size, strides, begin, end, dilations):
    """All patches [N * positions, C, *size], in the order of flat output positions."""
    pads = [(0, 0), (0, 0), *zip(begin, end, strict=True)]
    padded = np.pad(x, pads)
    extent = [d * (k - 1) + 1 for k, d in zip(size, dilations, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(padded, extent, axis=(2, 3, 4))
    steps = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
    inner = (Ellipsis, *(slice(None, None, d) for d in dilations))
    views = views[steps][inner]
    positions = views.shape[2:5]
    patches = views.transpose(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, x.shape[1], *size)
    return patches, positions


@st.composite
def geometries(draw):
    """A window on one, two or three axes; the leading ones have size 1."""
    rank = draw(st.integers(1, 3))
    axes = [(1, 1, 1, 0, 0, 1)] * (3 - rank)
    for _ in range(rank):
        length, size = draw(st.integers(1, 7)), draw(st.integers(1, 4))
        stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        begin, end = draw(st.integers(0, 4)), draw(st.integers(0, 4))
        extent = dilation * (size - 1) + 1
        end += max(0, extent - length - begin - end)
        axes.append((length, size, stride, begin, end, dilation))
    return tuple(zip(*axes, strict=True))


@given(geometries(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_sums_and_patches_are_those_of_sliding_windows(geometry, samples, channels, seed):
    length, size, strides, begin, end, dilations = geometry
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, channels, *length)).astype(np.float32)
    wanted, positions = windows(x, size, strides, begin, end, dilations)
    total = np.full((channels, *size), 7.0)
    add_patch_sums(x, size, strides, begin, dilations, positions, total)
    np.testing.assert_allclose(total, 7.0 + wanted.sum(axis=0, dtype=np.float64), atol=1e-4)
    picked = rng.integers(0, len(wanted), 9)
    got = np.empty((9, channels * int(np.prod(size))), np.float32)
    gather_patches(x, size, strides, begin, dilations, positions, picked, got)
    np.testing.assert_array_equal(got, wanted[picked].reshape(9, -1))


@given(geometries(), st.integers(1, 2), st.integers(1, 3), st.integers(1, 2), st.integers(0, 99))
def test_products_are_sums_of_weighed_windows(geometry, samples, channels, rows, seed):
    length, size, strides, begin, end, dilations = geometry
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, channels, *length)).astype(np.float32)
    patches, positions = windows(x, size, strides, begin, end, dilations)
    weights = rng.normal(size=(samples, channels, rows, *positions)).astype(np.float32)
    by = weights.reshape(samples, channels, rows, -1)
    patches = patches.reshape(samples, -1, channels, *size)
    total = np.full((channels, rows, *size), 7.0)
    add_patch_products(x, weights, size, strides, begin, dilations, positions, total)
    wanted = 7.0 + np.einsum("ncrp,npcxyz->crxyz", by.astype(np.float64), patches)
    np.testing.assert_allclose(total, wanted, atol=1e-4)


def test_sums_add_up_over_batches():
    x = np.random.default_rng(0).normal(size=(4, 2, 1, 5, 6)).astype(np.float32)
    geometry = (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), (1, 5, 6)
    whole, parts = np.zeros((2, 1, 3, 3)), np.zeros((2, 1, 3, 3))
    add_patch_sums(x, *geometry, whole)
    for sample in x:
        add_patch_sums(sample[None], *geometry, parts)
    np.testing.assert_allclose(whole, parts, atol=1e-5)


def test_a_window_wholly_in_the_padding_reads_zeros():
    x = np.ones((1, 1, 1, 1, 2), np.float32)
    geometry = (1, 1, 2), (1, 1, 1), (0, 0, 3), (1, 1, 1), (1, 1, 6)
    out = np.full((6, 2), np.nan, np.float32)
    gather_patches(x, *geometry, np.arange(6), out)
    np.testing.assert_array_equal(out, [[0, 0], [0, 0], [0, 1], [1, 1], [1, 0], [0, 0]])
    total = np.zeros((1, 1, 1, 2))
    add_patch_sums(x, *geometry, total)
    np.testing.assert_array_equal(total.ravel(), [2, 2])


@pytest.mark.parametrize("layout", ["strided", "transposed"])
def test_sums_take_arrays_of_any_memory_order(layout):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
    given_ = np.repeat(x, 2, axis=4)[..., ::2] if layout == "strided" else np.asfortranarray(x)
    geometry = (2, 2, 2), (1, 1, 1), (0, 0, 0), (1, 1, 1), (3, 4, 5)
    got, wanted = np.zeros((3, 2, 2, 2)), np.zeros((3, 2, 2, 2))
    add_patch_sums(given_, *geometry, got)
    for k in itertools.product(range(2), repeat=3):
        part = x[:, :, k[0] : k[0] + 3, k[1] : k[1] + 4, k[2] : k[2] + 5]
        wanted[(slice(None), *k)] = part.sum(axis=(0, 2, 3, 4))
    np.testing.assert_allclose(got, wanted, atol=1e-4)
