"""Ranges of the inputs of gates."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.kernels.gates import gate_range


def silu(x):
    return x / (1 + np.exp(-np.clip(x, -60, 60)))


def hard_swish(x):
    return x * np.clip(x / 6 + 0.5, 0, 1)


def histogram(seed, mean, spread):
    values = np.random.default_rng(seed).normal(mean, spread, 4000)
    counts, edges = np.histogram(values, 256)
    return (edges[1:] + edges[:-1]) / 2, counts


def cost(centres, counts, low, high, gate, levels):
    step = (high - low) / (levels - 1)
    zero = np.rint(-low / step)
    grid = (np.clip(np.rint(centres / step) + zero, 0, levels - 1) - zero) * step
    return counts @ np.square(gate(grid) - gate(centres))


@given(
    st.integers(0, 99),
    st.floats(-10, 10),
    st.floats(0.1, 10),
    st.sampled_from([silu, hard_swish, np.tanh]),
    st.sampled_from([16, 256]),
)
def test_the_range_is_no_worse_than_the_full_one(seed, mean, spread, gate, levels):
    centres, counts = histogram(seed, mean, spread)
    low, high = min(centres.min(), 0.0), max(centres.max(), 0.0)
    got = gate_range(centres, counts, low, high, gate, levels)
    assert low <= got[0] <= 0 <= got[1] <= high
    assert got[0] < got[1]
    full = cost(centres, counts, low, high, gate, levels)
    assert cost(centres, counts, *got, gate, levels) <= full * (1 + 1e-9)


def test_steps_in_the_flat_part_are_given_up():
    centres, counts = histogram(0, -10, 8)
    low, high = centres.min(), max(centres.max(), 0.0)
    got = gate_range(centres, counts, low, high, silu, 256)
    assert got[0] > 0.5 * low
    full = cost(centres, counts, low, high, silu, 256)
    assert cost(centres, counts, *got, silu, 256) < 0.5 * full


@pytest.mark.parametrize(("low", "high"), [(0.0, 5.0), (-5.0, 0.0)])
def test_one_sided_ranges_stay_one_sided(low, high):
    centres = np.linspace(low, high, 50)
    got = gate_range(centres, np.ones(50, np.int64), low, high, silu, 256)
    assert low <= got[0] <= got[1] <= high
    assert (got[0] == 0) == (low == 0)
    assert (got[1] == 0) == (high == 0)


def test_nothing_but_zeros_keeps_the_range():
    assert gate_range(np.zeros(1), np.ones(1), 0.0, 0.0, silu, 256) == (0.0, 0.0)
