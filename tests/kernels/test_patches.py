"""Patch sums and patches against numpy's sliding windows; rounding by output error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.kernels.gates import gate_range
from onnxq.kernels.patches import add_patch_sums, gather_patches
from onnxq.kernels.rounding import gptq, inverse_factor, shrink
from onnxq.ops import conv_window


def unfolded(x, window):
    """[positions, C, k, k] patches of a batch [N, C, H, W]."""
    after = [
        max(0, (p - 1) * s + d * (k - 1) + 1 - n - b)
        for p, s, d, k, n, b in zip(
            window.positions, window.strides, window.dilations, window.size, x.shape[2:],
            window.begin, strict=True,
        )
    ]  # fmt: skip
    pads = [(0, 0), (0, 0), *zip(window.begin, after, strict=True)]
    padded = np.pad(x, pads)
    extent = [d * (k - 1) + 1 for d, k in zip(window.dilations, window.size, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(padded, extent, axis=(2, 3))
    views = views[:, :, :: window.strides[0], :: window.strides[1]]
    views = views[:, :, : window.positions[0], : window.positions[1]]
    views = views[..., :: window.dilations[0], :: window.dilations[1]]
    return views.transpose(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1], *window.size)


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 2),
    st.tuples(*[st.integers(0, 2)] * 4), st.integers(5, 9), st.integers(0, 100),
)  # fmt: skip
def test_patches_match_sliding_windows(size, stride, dilation, pads, side, seed):
    x = np.random.default_rng(seed).standard_normal((2, 3, side, side + 1)).astype(np.float32)
    attrs = {"strides": [stride] * 2, "dilations": [dilation] * 2, "pads": list(pads)}
    window = conv_window(attrs, x.shape[2:], (size, size))
    geometry = [
        (1, *window.size), (1, *window.strides), (0, *window.begin), (1, *window.dilations),
        (1, *window.positions),
    ]  # fmt: skip
    wanted = unfolded(x, window)
    sums = np.zeros((3, 1, size, size))
    add_patch_sums(x[:, :, None], *geometry, sums)
    np.testing.assert_allclose(sums[:, 0], wanted.sum(0), rtol=1e-4, atol=1e-4)
    picked = np.arange(len(wanted))
    out = np.empty((len(wanted), 3 * size * size), np.float32)
    gather_patches(x[:, :, None], *geometry, picked, out)
    np.testing.assert_array_equal(out, wanted.reshape(len(wanted), -1))


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_auto_pad(auto):
    window = conv_window({"auto_pad": auto, "strides": [2, 2]}, (7, 8), (3, 3))
    assert window.positions == ((3, 3) if auto == "VALID" else (4, 4))


def test_rounding_by_output_error_beats_nearest():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 6)) @ rng.standard_normal((6, 40)) + 0.1 * rng.standard_normal(
        (4000, 40)
    )
    h = shrink(x.T @ x / len(x), len(x))
    np.testing.assert_allclose(np.diag(h), np.diag(x.T @ x / len(x)))
    factor = inverse_factor(h, 1e-6)
    np.testing.assert_allclose(
        factor.T @ factor, np.linalg.inv(h + 1e-6 * np.eye(40)), rtol=1e-2, atol=1e-2
    )
    weight = rng.standard_normal((8, 40)).astype(np.float32)
    scale = np.full(8, 0.3, np.float32)
    out = np.empty_like(weight)
    gptq(weight.copy(), scale, np.zeros(8, np.int32), -8, 7, factor, out)
    steps = out / scale[:, None]
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-5)
    assert steps.min() >= -8
    assert steps.max() <= 7
    nearest = np.clip(np.rint(weight / 0.3), -8, 7) * 0.3
    errors = [np.square(x @ (w - weight).T).mean() for w in (out, nearest)]
    assert errors[0] < errors[1] / 2


def test_gate_range_ignores_the_flat_side():
    def silu(x):
        return x / (1 + np.exp(-np.clip(x, -60, 60)))

    centres = np.linspace(-100, 10, 500)
    low, high = gate_range(centres, np.ones(500, np.int64), -100.0, 10.0, silu, 256)
    assert low > -60
    assert high > 8
