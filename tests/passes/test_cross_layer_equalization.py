"""Channels of neighbouring layers evened out, the function kept."""

import numpy as np
import pytest
from hypothesis import given, settings

from onnxq.coupling import couple
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import CrossLayerEqualization, FoldBatchNorm
from tests import models
from tests.checks import assert_same_function, ops, reasons
from tests.models import parse

X = "g (float[N,3,9,9] x) => (float[] y)"


def spread(shape, seed, axis=0):
    """A weight whose channels along an axis differ in size by up to a thousand."""
    rng = np.random.default_rng(seed)
    by = 10.0 ** rng.uniform(-1.5, 1.5, shape[axis])
    values = rng.normal(size=shape) * by.reshape(
        [-1 if i == axis else 1 for i in range(len(shape))]
    )
    return values.astype(np.float32)


def equalized(proto, data=None, **options):
    model = load(proto)
    changes = CrossLayerEqualization(**options).apply(model, Context(data))
    model.check()
    return model, changes


def imbalance(model):
    """Largest |log(r1 / r2)| over the classes between two layers, r as shares of the layer."""
    coupling = couple(model)
    rows, columns = np.zeros((2, coupling.count))
    for sides, found, axis in ((coupling.outputs, rows, 1), (coupling.inputs, columns, 0)):
        for side in sides:
            matrix = side.layer.magnitudes
            largest = matrix.max(axis=axis)
            if axis == 0 and side.layer.group > 1:
                grouped = matrix.reshape(side.layer.group, -1, matrix.shape[1])
                largest = grouped.max(axis=1).reshape(-1)
            np.maximum.at(found, side.classes, largest / matrix.max())
    both = (rows > 0) & (columns > 0) & ~coupling.is_fixed(np.arange(coupling.count))
    assert both.any()
    return np.abs(np.log(rows[both] / columns[both])).max()


CHAINS = {
    "pair": f"{X} <float[5,3,3,3] w, float[5] b, float[4,5,1,1] v>"
    "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }",
    "depthwise": f"{X} <float[6,3,1,1] w, float[6] b, float[6,1,3,3] d, float[6] e,"
    " float[4,6,1,1] v>"
    "{ c = Conv(x, w, b) r = Relu(c) k = Conv<group=6, pads=[1,1,1,1]>(r, d, e) q = Relu(k)"
    " y = Conv(q, v) }",
    "residual": f"{X} <float[4,3,1,1] w, float[4,4,3,3] d, float[4] b, float[2,4,1,1] v>"
    "{ c = Conv(x, w) k = Conv<pads=[1,1,1,1]>(c, d, b) a = Add(c, k) r = Relu(a) y = Conv(r, v) }",
    "concat": f"{X} <float[4,3,1,1] w, float[2,3,1,1] u, float[3,6,1,1] v>"
    "{ a = Conv(x, w) b = Conv(x, u) j = Concat<axis=1>(a, b) r = LeakyRelu(j) y = Conv(r, v) }",
    "split": f"{X} <float[6,3,1,1] w, float[3,2,1,1] v, float[3,4,1,1] u, int64[2] s = {{2,4}}>"
    "{ c = Conv(x, w) a, b = Split<axis=1>(c, s) d = Conv(a, v) e = Conv(b, u) y = Add(d, e) }",
    "prelu-pool": f"{X} <float[4,3,2,2] w, float[4,1,1] p, float[3,4,2,2] v>"
    "{ c = Conv(x, w) r = PRelu(c, p) m = MaxPool<kernel_shape=[2,2]>(r)"
    " a = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1]>(m) y = Conv(a, v) }",
    "flatten": f"{X} <float[4,3,3,3] w, float[4] b, float[196,5] v>"
    "{ c = Conv(x, w, b) r = Relu(c) f = Flatten(r) y = Gemm(f, v) }",
    "grouped-transposed": f"{X} <float[4,3,1,1] w, float[4,3,2,2] t, float[6] b, float[2,6,1,1] v>"
    "{ c = Conv(x, w) r = Relu(c) k = ConvTranspose<group=2, strides=[2,2]>(r, t, b)"
    " q = Relu(k) y = Conv(q, v) }",
    "one-dimensional": "g (float[N,3,20] x) => (float[] y) <float[4,3,3] w, float[2,4,5] v>"
    "{ c = Conv(x, w) r = Relu(c) y = Conv(r, v) }",
    "three-dimensional": "g (float[N,2,4,4,4] x) => (float[] y) <float[4,2,2,2,2] w,"
    " float[2,4,1,1,1] v> { c = Conv(x, w) r = Relu(c) y = Conv(r, v) }",
    "matmul": "g (float[N,7,8] x) => (float[] y) <float[8,6] w, float[6] b, float[6,5] v>"
    "{ c = MatMul(x, w) a = Add(c, b) r = Relu(a) y = MatMul(r, v) }",
    "gemm": "g (float[N,8] x) => (float[] y) <float[6,8] w, float[6] b, float[6,5] v>"
    "{ c = Gemm<transB=1, beta=0.5>(x, w, b) r = Relu(c) y = Gemm<alpha=2.0>(r, v) }",
    "pixel-shuffle": f"{X} <float[8,3,1,1] w, float[3,2,1,1] v>"
    '{ c = Conv(x, w) r = Relu(c) d = DepthToSpace<blocksize=2, mode="CRD">(r) y = Conv(d, v) }',
}


def wild(text):
    """The model with weights whose channels differ widely."""
    proto = parse(text)
    for index, tensor in enumerate(proto.graph.initializer):
        if len(tensor.dims) >= 2 and tensor.data_type == 1:
            values = spread(tuple(tensor.dims), index)
            tensor.ClearField("float_data")
            tensor.raw_data = values.tobytes()
    return proto


@pytest.mark.parametrize("name", CHAINS)
def test_ranges_meet_and_the_function_stays(name):
    proto = wild(CHAINS[name])
    before = imbalance(load(proto))
    model, changes = equalized(proto)
    assert changes
    assert imbalance(model) < 0.01 < before
    assert_same_function(proto, model, tol=1e-5)


def test_a_pair_meets_at_the_square_root():
    model, _ = equalized(wild(CHAINS["pair"]))
    first, second = (layer.magnitudes for layer in model.layers())
    rows, columns = first.max(axis=1), second.max(axis=0)
    assert np.allclose(rows / rows.max(), columns / columns.max(), rtol=1e-2)


def test_the_depthwise_triple_meets_at_the_cube_root():
    """Equation of three layers: s1 = r1 / cbrt(r1 r2 r3), s2 = cbrt(r1 r2 r3) / r3."""
    proto = wild(CHAINS["depthwise"])
    first, middle, last = (layer.magnitudes for layer in load(proto).layers())
    r1, r2, r3 = first.max(axis=1), middle[:, 0], last.max(axis=0)
    model, _ = equalized(proto, tolerance=1e-6)
    a, b, c = (layer.magnitudes for layer in model.layers())
    wanted = np.cbrt(r1 * r2 * r3)
    for got in (a.max(axis=1), b[:, 0], c.max(axis=0)):
        assert np.allclose(got / got.max(), wanted / wanted.max(), rtol=1e-3)


@settings(max_examples=60, deadline=None)
@given(models.chains())
def test_random_chains_keep_their_function(proto):
    model = load(proto)
    FoldBatchNorm(standalone="conv").apply(model, Context())
    folded = model.to_proto()
    CrossLayerEqualization().apply(model, Context())
    model.check()
    assert_same_function(folded, model, tol=1e-4)


RELU6 = (
    f"{X} <float[5,3,3,3] w, float[5] b, float zero = {{0}}, float six = {{6}}, float[4,5,1,1] v>"
    "{ c = Conv(x, w, b) r = Clip(c, zero, six) y = Conv(r, v) }"
)


def test_relu6_keeps_a_bound_per_channel():
    proto = wild(RELU6)
    model, changes = equalized(proto, [models.feeds(proto)])
    assert ops(model) == ["Conv", "Relu", "Min", "Conv"]
    assert_same_function(proto, model, tol=1e-5)
    assert "bound per channel" in changes.done[0]


def test_a_bound_that_no_channel_reaches_goes():
    proto = wild(RELU6.replace("{6}", "{6000}"))
    model, changes = equalized(proto, [models.feeds(proto)])
    assert ops(model) == ["Conv", "Relu", "Conv"]
    assert_same_function(proto, model, tol=1e-5)
    assert "no channel reaches" in changes.done[0]


def test_bounds_can_be_left_alone():
    proto = wild(RELU6)
    model, changes = equalized(proto, ceilings="keep")
    assert not changes
    assert ops(model) == ["Conv", "Clip", "Conv"]
    assert "(Clip)" in reasons(changes)[model.layers()[0].name]


BLOCKED = {
    "sigmoid": (
        f"{X} <float[4,3,1,1] w, float[3,4,1,1] v>"
        "{ c = Conv(x, w) r = Sigmoid(c) y = Conv(r, v) }",
        "(Sigmoid) reads it",
    ),
    "output": (
        "g (float[N,3,9,9] x) => (float[] y, float[] c) <float[4,3,1,1] w, float[3,4,1,1] v>"
        "{ c = Conv(x, w) y = Conv(c, v) }",
        "is an output of the model",
    ),
    "shared": (
        f"{X} <float[3,3,1,1] w> {{ c = Conv(x, w) r = Relu(c) y = Conv(r, w) }}",
        "shares its parameters",
    ),
    "computed": (
        "g (float[N,3,9,9] x, float[4] b) => (float[] y) <float[4,3,1,1] w, float[3,4,1,1] v>"
        "{ c = Conv(x, w, b) y = Conv(c, v) }",
        "is computed",
    ),
    "channels-that-the-batch-takes": (
        f"{X} <float[4,3,1,1] w, int64[4] s = {{-1,4,9,3}}, float[3,4,1,1] v>"
        "{ c = Conv(x, w) r = Reshape(c, s) y = Conv(r, v) }",
        "(Reshape) reads it",
    ),
    "added-to-the-input": (
        f"{X} <float[3,3,1,1] w, float[3,3,1,1] v>"
        "{ c = Conv(x, w) a = Add(c, x) y = Conv(a, v) }",
        "(Add) reads it",
    ),
}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_stands_in_the_way_is_named(name):
    text, why = BLOCKED[name]
    _, changes = equalized(parse(text))
    assert not changes
    assert any(why in reason for reason in reasons(changes).values()), reasons(changes)


def test_dead_channels_do_no_harm():
    proto = wild(CHAINS["depthwise"])
    model = load(proto)
    first, middle, _ = model.layers()
    weight = first.weight.copy()
    weight[1] = 0.0
    first.set_weight(weight)
    weight = middle.weight.copy()
    weight[3] *= 1e-30
    middle.set_weight(weight)
    changed = model.to_proto()
    after, _ = equalized(changed)
    assert all(np.isfinite(layer.weight).all() for layer in after.layers())
    assert_same_function(changed, after, tol=1e-5)


ZOO = [
    *("cifar_resnet20", "cifar_resnet56", "cifar_vit", "espcn_x3", "espnet_camvid", "m5_speech"),
    *("magika", "mobilenetv1_075", "mobilenetv2", "silero_vad", "simplepose"),
    *("ultraface_rfb320", "vww_mobilenetv1_025", "yolox_nano"),
]


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_zoo_models_keep_their_function(name):
    model = load(models.zoo(name))
    FoldBatchNorm(standalone="conv").apply(model, Context())
    folded = model.to_proto()
    CrossLayerEqualization().apply(model, Context())
    feed = models.feeds(folded, size=576 if name == "silero_vad" else 16)  # the past, and a frame
    assert_same_function(folded, model, tol=1e-4, feed=feed, levels=("all",))
