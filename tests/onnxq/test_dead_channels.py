"""What is said to be constant has that value at every position, whatever the input."""

import numpy as np
import pytest
from hypothesis import given

from onnxq.dead_channels import find_dead_channels
from onnxq.model import load
from tests import models
from tests.checks import run
from tests.models import parse

_ = np.nan  # varies
# Of the four channels of c the third varies, the others are 2, 0 and -1.5.
C = (
    "g (float[N,3,8,8] x) => (float[] y) <float[4,3,1,1] w, float[4] b = {2.0, 0.0, 0.3, -1.5}, %s>"
    "{ c = Conv(x, w, b) %s }"
)
W = np.random.default_rng(0).normal(size=(4, 3, 1, 1)) * np.reshape([0, 0, 1, 0], (4, 1, 1, 1))


def facts(proto):
    """The facts of a model, the values held against what it computes."""
    model = load(proto)
    model.infer()
    found = find_dead_channels(model)
    arrays = run(model.to_proto([*found.values]), models.feeds(proto))
    for name, values in found.values.items():
        array = arrays[name].astype(np.float64)
        axis = 1 if array.ndim != 3 or array.shape[1] == values.size else 2
        rows = np.moveaxis(array, axis, 0).reshape(values.size, -1)
        known = ~np.isnan(values)
        assert np.isfinite(values[known]).all()
        np.testing.assert_allclose(
            rows[known], np.broadcast_to(values[known, None], rows[known].shape), 1e-5, 1e-5
        )
    return found


FUNCTIONS = {
    "Relu(c)": [2, 0, _, 0],
    "LeakyRelu<alpha=0.5>(c)": [2, 0, _, -0.75],
    "PRelu(c, slopes)": [2, 0, _, -6],
    "Clip(c, minus, one)": [1, 0, _, -1],
    "Clip(c, , one)": [1, 0, _, -1.5],
    "Sigmoid(c)": [0.880797, 0.5, _, 0.182426],
    "HardSigmoid(c)": [0.9, 0.5, _, 0.2],
    "HardSwish(c)": [5 / 3, 0, _, -0.375],
    "Tanh(c)": [0.964028, 0, _, -0.905148],
    "Elu(c)": [2, 0, _, -0.77687],
    "Softplus(c)": [2.126928, 0.693147, _, 0.201413],
    "Erf(c)": [0.995322, 0, _, -0.966105],
    "Abs(c)": [2, 0, _, 1.5],
    "Neg(c)": [-2, 0, _, 1.5],
    "Identity(c)": [2, 0, _, -1.5],
    "Dropout(c)": [2, 0, _, -1.5],
    "Reciprocal(c)": [0.5, _, _, -2 / 3],
    "Log(c)": [0.693147, _, _, _],
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_go_through_functions(function):
    slopes = np.reshape([1, 2, 3, 4], (4, 1, 1))
    text = C % (
        "float[4,1,1] slopes, float minus = {-1}, float one = {1}",
        f"r = {function} y = Relu(r)",
    )
    with np.errstate(all="ignore"):
        found = facts(parse(text, w=W, slopes=slopes))
    np.testing.assert_allclose(found.values["r"], FUNCTIONS[function], 1e-5)


MOVES = {
    "MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)": [2, 0, _, -1.5],
    "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)": [2, 0, _, -1.5],
    "AveragePool<kernel_shape=[3,3], count_include_pad=1>(c)": [2, 0, _, -1.5],
    "AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(c)": [_, 0, _, _],
    'AveragePool<kernel_shape=[3,3], auto_pad="SAME_UPPER", count_include_pad=1>(c)': [_, 0, _, _],
    "GlobalAveragePool(c)": [2, 0, _, -1.5],
    "GlobalMaxPool(c)": [2, 0, _, -1.5],
    "ReduceMean<axes=[2,3], keepdims=0>(c)": [2, 0, _, -1.5],
    "ReduceMax<axes=[-1]>(c)": [2, 0, _, -1.5],
    "ReduceSum(c, axes)": [_, 0, _, _],
    "Transpose<perm=[2,1,0,3]>(c)": [2, 0, _, -1.5],
    "Concat<axis=1>(c, x, c)": [2, 0, _, -1.5, _, _, _, 2, 0, _, -1.5],
    "Concat<axis=3>(c, d)": [2, 0, _, _],
    "Slice(c, one, three, one)": [0, _],
    "Slice(c, one, three, axes)": [2, 0, _, -1.5],
    "Pad(c, channels)": [0, 2, 0, _, -1.5, 0],
    "Pad(c, border)": [_, 0, _, _],
    'Pad<mode="edge">(c, border)': [2, 0, _, -1.5],
    "DepthToSpace<blocksize=2>(c)": [_],
    "DepthToSpace<blocksize=2>(e)": [2],
    'Resize<mode="linear">(c, , scales)': [2, 0, _, -1.5],
    "Reshape(c, shape)": [2, 0, _, -1.5],
}


@pytest.mark.parametrize("move", MOVES)
def test_values_go_along_with_channels(move):
    text = C % (
        "float[4,3,1,1] v, float[4,3,1,1] zero, float[4] f = {2.0, 0.0, 0.3, 1.0},"
        "float[4] h = {2,2,2,2},"
        "int64[1] axes = {2}, int64[1] one = {1}, int64[1] three = {3}, int64[3] shape = {0,4,64},"
        "int64[8] channels = {0,1,0,0,0,1,0,0}, int64[8] border = {0,0,1,1,0,0,1,1},"
        "float[4] scales = {1,1,2,2}",
        f"d = Conv(x, v, f) e = Conv(x, zero, h) r = {move} y = Relu(r)",
    )
    found = facts(parse(text, w=W, v=W[[0, 1, 3, 2]], zero=0.0))
    np.testing.assert_allclose(found.values["r"], MOVES[move], 1e-5)


def test_parts_have_the_values_of_their_channels():
    text = C % ("int64[2] s = {1,3}", "p, q = Split<axis=1>(c, s) y = Concat<axis=1>(q, p)")
    found = facts(parse(text, w=W))
    np.testing.assert_allclose(found.values["p"], [2])
    np.testing.assert_allclose(found.values["q"], [0, _, -1.5])
    np.testing.assert_allclose(found.values["y"], [0, _, -1.5, 2])


SUMS = {
    "Add(c, d)": [3, 4, _, _],  # d: 1, 4, 0.5, varies
    "Add(c, c)": [4, 0, _, -3],
    "Sub(half, c)": [-1.5, 0.5, _, 2],
    "Add(c, row)": [3, 2, _, 2.5],
    "Add(c, picture)": [_, _, _, _],
    "Max(c, d)": [2, 4, _, _],
    "Sum(c, d, row)": [4, 6, _, _],
    "Div(c, d)": [2, 0, _, _],
    "Pow(c, half)": [2**0.5, 0, _, _],
    "Mul(c, d)": [2, 0, _, _],
    "Mul(c, mask)": [0, 0, 0, -1.5],
    "Mul(mask, c)": [0, 0, 0, -1.5],
    "Mul(c, picture)": [_, 0, _, _],
    "Mul(c, g)": [_, 0, _, _],  # by something that is not followed
    "Mul(c, p)": [2, 0, _, _],  # by one value per picture and channel
}


@pytest.mark.parametrize("operation", SUMS)
def test_values_meet(operation):
    text = C % (
        "float[4] f = {1.0, 4.0, 0.5, 0.0}, float[4,3,1,1] v, float half = {0.5},"
        "float[4,1,1] row, float[4,1,1] mask, float[8,8] picture",
        "d = Conv(x, v, f) p = GlobalAveragePool(d) m = ReduceMax<axes=[1]>(x) g = Sigmoid(m)"
        f"r = {operation} y = Relu(r)",
    )
    v = W[[0, 1, 3, 2]]
    row, mask = np.reshape([[1, 2, 3, 4], [0, 1, 0, 1]], (2, 4, 1, 1))
    with np.errstate(all="ignore"):
        found = facts(parse(text, w=W, v=v, row=row, mask=mask))
    np.testing.assert_allclose(found.values["r"], SUMS[operation], 1e-5)


def test_normalization_makes_constants_of_constants_and_without_a_scale_of_anything():
    text = C % (
        "float[4] gamma, float[4] beta, float[4] mean, float[4] var",
        "r = BatchNormalization<epsilon=0.0>(c, gamma, beta, mean, var) y = Relu(r)",
    )
    values = {"gamma": [1, 2, 0, 3], "beta": [0, 1, 7, 2], "mean": 1, "var": 4}
    found = facts(parse(text, w=W, **values))
    np.testing.assert_allclose(found.values["r"], [0.5, 0, 7, -1.75])


LAYERS = {
    # a depthwise convolution with two outputs per channel; the third input varies
    "Conv<group=4>(c, pairs, b8)": [7, -1, 2, 3, _, _, -2, 7],
    "Conv<group=4, pads=[1,1,1,1]>(c, pairs, b8)": [_, _, 2, 3, _, _, _, _],
    'Conv<group=4, auto_pad="SAME_UPPER">(c, pairs, b8)': [_, _, 2, 3, _, _, _, _],
    # two outputs read the first two channels, two the others
    "Conv<group=2>(c, grouped)": [2, 4, _, -3],
    "ConvTranspose<group=4>(c, upwards, b4)": [_, 2, _, _],
    "ConvTranspose<group=4>(c, point, b4)": [3, 2, _, 2.5],
    "ConvTranspose<group=4, strides=[2,2]>(c, point, b4)": [_, 2, _, _],
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_make_constants_of_constants(layer):
    text = C % (
        "float[8,1,3,3] pairs, float[8] b8 = {1, 1, 2, 3, 4, 5, 1, 1}, float[4,2,1,1] grouped,"
        "float[4,1,2,2] upwards, float[4,1,1,1] point, float[4] b4 = {1, 2, 3, 4}",
        f"r = {layer} y = Relu(r)",
    )
    pairs = np.zeros((8, 1, 3, 3))
    pairs[:, 0, 0, 1] = [3, -1, 5, 6, 7, 8, 2, -4]
    grouped = np.reshape([[1, 9], [2, 9], [1, 1], [0, 2]], (4, 2, 1, 1))
    found = facts(parse(text, w=W, pairs=pairs, grouped=grouped, point=1.0))
    np.testing.assert_allclose(found.values["r"], LAYERS[layer], 1e-5)


def test_what_lies_along_the_last_axis():
    text = (
        "g (float[N,5,3] x) => (float[] y) <float[3,4] w, float[4] b, float[4,2] v>"
        "{ m = MatMul(x, w) a = Add(m, b) r = Relu(a) y = MatMul(r, v) }"
    )
    w = np.ones((3, 4)) * [0, 1, 0, 1]
    v = np.reshape([[1, 2], [0, 1], [1, 1], [0, 1]], (4, 2))
    found = facts(parse(text, w=w, b=[2, 0, -1, 0], v=v))
    np.testing.assert_allclose(found.values["m"], [0, _, 0, _])
    np.testing.assert_allclose(found.values["r"], [2, _, 0, _])
    np.testing.assert_allclose(found.values["y"], [2, _])


def test_a_flattened_channel_is_constant_at_every_position():
    text = (
        "g (float[N,3,4,4] x) => (float[] y)"
        "<float[2,3,3,3] w, float[2] b, float[8,3] v, float[3] d>"
        "{ c = Conv(x, w, b) f = Flatten(c) y = Gemm<alpha=0.5, beta=2.0>(f, v, d) }"
    )
    w = np.random.default_rng(0).normal(size=(2, 3, 3, 3))
    w[0] = 0
    v = np.zeros((8, 3))
    v[:4, 0], v[4:, 1] = [1, 2, 3, 4], 1
    found = facts(parse(text, w=w, b=[3, 1], v=v, d=[1, 2, 3]))
    np.testing.assert_allclose(found.values["f"], [3] * 4 + [_] * 4)
    np.testing.assert_allclose(found.values["y"], [0.5 * 30 + 2, _, 6])


def test_channels_are_lost_where_the_batch_takes_some_of_them():
    text = C % ("int64[4] shape = {-1,4,8,4}", "r = Reshape(c, shape) y = Relu(r)")
    found = facts(parse(text, w=W))
    assert "c" in found.values
    assert "r" not in found.values


@given(models.chains_with_dead_channels())
def test_values_of_random_chains_are_what_they_compute(proto):
    facts(proto)


def test_a_value_beyond_the_range_of_the_type_is_not_known():
    text = (
        "g (float[N,2] x) => (float[] y) <float[2,1] w, float[1] b, float[1,1] v>"
        "{ c = Gemm(x, w, b) r = Exp(c) y = Gemm(r, v) }"
    )
    found = facts(parse(text, w=0.0, b=[80.0], v=1e30))
    assert found.values["r"] == pytest.approx(np.exp(80.0))
    assert np.isnan(found.values["y"])
    assert "range" in found.layers[1].obstacle
