import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from onnxq.kernels.quantize import dequantize, fake_quantize, quantize
from onnxq.runtime import Session

TYPES = {
    "uint8": (TensorProto.UINT8, np.uint8),
    "int8": (TensorProto.INT8, np.int8),
    "uint16": (TensorProto.UINT16, np.uint16),
    "int16": (TensorProto.INT16, np.int16),
}


def onnxruntime(x, scale, zero_point, dtype, axis=None):
    """What QuantizeLinear, and DequantizeLinear after it, give."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis or 0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis or 0),
    ]
    kind, numpy_type = TYPES[dtype]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [
            helper.make_tensor_value_info("q", kind, None),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor("s", TensorProto.FLOAT, np.shape(scale), np.ravel(scale)),
            helper.make_tensor("z", kind, np.shape(zero_point), np.ravel(zero_point)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    out = Session(model.SerializeToString(), threads=1, level="disabled").run({"x": x})
    assert out["q"].dtype == numpy_type
    return out["q"], out["y"]


def assert_matches(x, scale, zero_point, dtype, axis=None):
    expected, back = onnxruntime(x, scale, zero_point, dtype, axis)
    info = np.iinfo(dtype)
    if axis is not None:
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    q = quantize(x, scale, zero_point, info.min, info.max, dtype=dtype)
    np.testing.assert_array_equal(q, expected, strict=True)
    for found in (
        dequantize(q, scale, zero_point),
        fake_quantize(x, scale, zero_point, info.min, info.max),
    ):
        np.testing.assert_array_equal(found.view(np.int32), back.view(np.int32), strict=True)


@pytest.mark.parametrize("dtype", TYPES)
def test_random_values_match_onnxruntime(dtype):
    rng = np.random.default_rng(0)
    info = np.iinfo(dtype)
    for scale in (0.01, 1 / 3, 7.0, 1e-30, 1e30):
        zero = int(rng.integers(info.min, info.max + 1))
        span = scale * (info.max - info.min)
        x = rng.normal(scale=span / 2, size=4000).astype(np.float32)
        assert_matches(x, np.float32(scale), zero, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_halves_match_onnxruntime(dtype):
    info = np.iinfo(dtype)
    for zero in (info.min, 0, 3, info.max):
        for scale in (np.float32(1), np.float32(0.1), np.float32(0.02)):
            x = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * scale
            x = np.concatenate([x, np.nextafter(x, np.float32(9e9)), np.nextafter(x, -x)])
            assert_matches(x, scale, zero, dtype)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axes_match_onnxruntime(axis):
    rng = np.random.default_rng(axis)
    x = rng.normal(size=(3, 5, 4)).astype(np.float32)
    scale = rng.uniform(0.001, 0.1, x.shape[axis]).astype(np.float32)
    zero = rng.integers(-20, 20, x.shape[axis])
    assert_matches(x, scale, zero, "int8", axis)


def test_extremes_match_onnxruntime():
    x = np.float32([0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, np.inf, -np.inf])
    assert_matches(x, np.float32(1e-3), 10, "int8")


def test_rounds_half_to_even():
    x = np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    np.testing.assert_array_equal(quantize(x, 1, 0, -8, 7), [-2, -2, 0, 0, 2, 2])


def test_four_bits():
    x = np.float32([-100, -0.3, 0.3, 100])
    np.testing.assert_array_equal(quantize(x, 0.5, 0, -8, 7, dtype=np.int8), [-8, -1, 1, 7])


def test_limits_beyond_float32():
    x = np.float32([-3e38, -1, 1, 3e38])
    low, high = -(2**31), 2**31 - 1
    for zero in (0, 5, -5):
        q = quantize(x, 1, zero, low, high)
        np.testing.assert_array_equal(q, [low, zero - 1, zero + 1, high])
        wanted = (q.astype(np.int64) - zero).astype(np.float32)
        np.testing.assert_array_equal(dequantize(q, 1, zero), wanted)
        np.testing.assert_array_equal(fake_quantize(x, 1, zero, low, high), wanted)


def test_blocks():
    x = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    scale = np.float32([[1, 2], [4, 8]])[..., None]
    expected = np.rint(x / scale) * scale
    np.testing.assert_array_equal(fake_quantize(x, scale, 0, -8, 7), expected)


def test_scalars_and_empty_arrays():
    assert quantize(np.array(2.6, np.float32), 1, 0, 0, 255) == 3
    assert fake_quantize(np.array(2.6, np.float32), 1, 0, 0, 255) == 3
    assert dequantize(np.array(3), 0.5, 1) == 1
    assert quantize(np.empty((0, 3), np.float32), np.ones(3), np.zeros(3), 0, 9).size == 0


@given(
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements=st.floats(-1e6, 1e6, width=32)),
    st.floats(2**-20, 2**10, width=32),
    st.integers(-128, 127),
)
def test_properties(x, scale, zero):
    before = x.copy()
    q = quantize(x, scale, zero, -128, 127)
    y = dequantize(q, scale, zero)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(y, fake_quantize(x, scale, zero, -128, 127))
    np.testing.assert_array_equal(quantize(y, scale, zero, -128, 127), q)  # idempotent
    inside = (q > -128) & (q < 127)
    assert np.all(np.abs(y - x)[inside] <= 0.50001 * scale + 1e-6 * np.abs(x[inside]))
