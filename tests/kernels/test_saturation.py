"""Sums of two products against numpy's clip."""

import numpy as np

from onnxq.kernels.saturation import add_overflows


def test_counts_and_what_is_cut_off():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (200, 10)).astype(np.int16)
    first = rng.integers(0, 5, 40) * 2
    weights = rng.integers(-128, 128, (40, 2)).astype(np.int16)
    counts, excess = np.ones(40, np.int64), np.full(40, 0.5)
    add_overflows(x, first, weights, counts, excess)
    wide = x.astype(np.int64)
    sums = wide[:, first] * weights[:, 0] + wide[:, first + 1] * weights[:, 1]
    cut = sums - np.clip(sums, -32768, 32767)
    assert (cut != 0).sum() > 100
    np.testing.assert_array_equal(counts, 1 + (cut != 0).sum(axis=0))
    np.testing.assert_array_equal(excess, 0.5 + (cut.astype(np.float64) ** 2).sum(axis=0))


def test_the_ends_themselves_are_in_range():
    x = np.array([[255, 255], [128, 129]], np.int16)
    weights = np.array([[64, 64], [65, 64], [-64, -64], [-128, -128]], np.int16)
    counts, excess = np.zeros(4, np.int64), np.zeros(4)
    add_overflows(x, np.zeros(4, np.int64), weights, counts, excess)
    # 32640 and 33, 32895 - 32767 = 128; 255 * 128 * 2 = 65280, and 257 * 128 = 32896
    assert counts.tolist() == [0, 1, 0, 2]
    assert excess.tolist() == [0, 128.0**2, 0, (65280 - 32768.0) ** 2 + 128.0**2]
