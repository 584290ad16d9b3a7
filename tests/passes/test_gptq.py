"""GPTQ: outputs on the samples get no worse than by rounding to nearest, and keep their means."""

import numpy as np
import pytest

from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import GPTQ, Calibrate
from tests import models
from tests.checks import reasons, run
from tests.models import parse

# name -> a model of one layer
LAYERS = {
    "conv": "g (float[N,4,9,9] x) => (float[] y) <float[6,4,3,3] w, float[6] b>"
    "{ y = Conv<pads=[1,0,2,1], strides=[2,1]>(x, w, b) }",
    "no-bias": "g (float[N,4,9,9] x) => (float[] y) <float[6,4,3,3] w> { y = Conv(x, w) }",
    "grouped": "g (float[N,4,9,9] x) => (float[] y) <float[6,2,3,3] w, float[6] b>"
    "{ y = Conv<group=2, dilations=[2,2]>(x, w, b) }",
    "depthwise": "g (float[N,4,9,9] x) => (float[] y) <float[4,1,3,3] w, float[4] b>"
    "{ y = Conv<group=4, pads=[1,1,1,1]>(x, w, b) }",
    "conv-1d": "g (float[N,4,20] x) => (float[] y) <float[6,4,3] w> { y = Conv(x, w) }",
    "same-upper": "g (float[N,4,7,8] x) => (float[] y) <float[6,4,3,2] w>"
    '{ y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w) }',
    "same-lower": "g (float[N,4,7,8] x) => (float[] y) <float[6,4,3,2] w>"
    '{ y = Conv<auto_pad="SAME_LOWER", strides=[2,1]>(x, w) }',
    "valid": "g (float[N,4,7,8] x) => (float[] y) <float[6,4,3,2] w>"
    '{ y = Conv<auto_pad="VALID", strides=[2,2]>(x, w) }',
    "conv-3d": "g (float[N,2,5,6,4] x) => (float[] y) <float[4,2,2,3,2] w, float[4] b>"
    "{ y = Conv<pads=[1,0,1,0,2,0]>(x, w, b) }",
    "gemm": "g (float[N,8] x) => (float[] y) <float[8,6] w, float[6] b> { y = Gemm(x, w, b) }",
    "gemm-transposed": "g (float[N,8] x) => (float[] y) <float[6,8] w, float[6] b>"
    "{ y = Gemm<transB=1>(x, w, b) }",
    "gemm-alpha": "g (float[N,8] x) => (float[] y) <float[8,6] w> { y = Gemm<alpha=0.5>(x, w) }",
    "matmul": "g (float[N,5,8] x) => (float[] y) <float[8,6] w> { y = MatMul(x, w) }",
}


def samples(proto, count=12, offset=1.0):
    """Correlated inputs with a mean that is far from zero."""
    found = []
    for seed in range(count):
        feed = models.feeds(proto, seed=seed, batch=2)
        x = feed["x"]
        feed["x"] = (x + np.roll(x, 1, axis=-1) + offset).astype(np.float32)
        found.append(feed)
    return found


def coarse(proto, data, factor=40.0, **options):
    """Encodings so coarse that rounding shows, as few bits would be; inputs stay exact."""
    model = load(proto)
    ctx = Context(data)
    Calibrate(**options).apply(model, ctx)
    for layer in model.layers():
        name = layer.weight_tensor.name
        old = model.encodings[name]
        scale = (old.scale * np.float32(factor)).astype(np.float32)
        model.encodings[name] = type(old)(old.dtype, scale, old.zero_point, old.axis)
    return model, ctx


def nearest(model):
    other = model.clone()
    for layer in other.layers():
        values = layer.model.encodings[layer.weight_tensor.name].fake_quantize(layer.weight)
        layer.set_weight(values)
    return other


def differences(proto, model, data):
    """Differences of the outputs, channels last: [values, channels]."""
    parts = []
    for feed in data:
        error = (run(model, feed)["y"] - run(proto, feed)["y"]).astype(np.float64)
        if proto.graph.node[0].op_type == "Conv":
            error = np.moveaxis(error, 1, -1)
        parts.append(error.reshape(-1, error.shape[-1]))
    return np.concatenate(parts)


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_no_worse_than_by_rounding_to_nearest(name, weights):
    proto = parse(LAYERS[name])
    data = samples(proto)
    model, ctx = coarse(proto, data, weights=weights)
    plain = np.square(differences(proto, nearest(model), data)).mean()
    GPTQ(samples=0).apply(model, ctx)
    got = np.square(differences(proto, model, data)).mean()
    assert got <= plain * (1 + 1e-6)
    assert got < 0.9 * plain


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "matmul"])
def test_means_of_outputs_are_kept(name):
    proto = parse(LAYERS[name])
    data = samples(proto)
    model, ctx = coarse(proto, data)
    before = np.abs(differences(proto, nearest(model), data).mean(axis=0)).max()
    GPTQ(samples=0).apply(model, ctx)
    after = np.abs(differences(proto, model, data).mean(axis=0)).max()
    assert after < 1e-3 * max(before, 1e-2)


@pytest.mark.parametrize("weights", ["int8/channel", "uint8"])
@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_on_their_grid(name, weights):
    proto = parse(LAYERS[name])
    data = samples(proto)
    model, ctx = coarse(proto, data, weights=weights)
    GPTQ().apply(model, ctx)
    layer = model.layers()[0]
    on_grid = model.encodings[layer.weight_tensor.name].fake_quantize(layer.weight)
    np.testing.assert_array_equal(on_grid, layer.weight)


@pytest.mark.parametrize("name", LAYERS)
def test_a_single_sample_does_no_harm_to_others(name):
    proto = parse(LAYERS[name])
    data = samples(proto, 20)
    model, _ = coarse(proto, data)
    plain = np.square(differences(proto, nearest(model), data[1:])).mean()
    GPTQ().apply(model, Context(data[:1]))
    layer = model.layers()[0]
    assert np.isfinite(layer.weight).all()
    got = np.square(differences(proto, model, data[1:])).mean()
    assert got < 1.5 * plain


def test_constant_samples():
    proto = parse(LAYERS["conv"])
    data = [{"x": np.full((1, 4, 9, 9), 2, np.float32)}]
    model, ctx = coarse(proto, data)
    GPTQ().apply(model, ctx)
    assert np.abs(differences(proto, model, data).mean(axis=0)).max() < 1e-3


def test_samples_of_zeros():
    proto = parse(LAYERS["conv"])
    data = [{"x": np.zeros((1, 4, 9, 9), np.float32)}]
    model, ctx = coarse(proto, data)
    GPTQ().apply(model, ctx)
    assert np.isfinite(model.layers()[0].weight).all()
    assert np.abs(differences(proto, model, data)).max() < 1e-6


def test_what_it_declines():
    text = (
        "g (float[N,4,8,8] x) => (float[] y) <float[4,4,3,3] w, float[4,4,1,1] v>"
        "{ c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, w)"
        " y = Conv(d, v) }"
    )
    proto = parse(text)
    for node, name in zip(proto.graph.node, ("one", "relu", "two", "three"), strict=True):
        node.name = name
    model, ctx = load(proto), Context(samples(proto))
    Calibrate(exclude=("three",)).apply(model, ctx)
    changes = GPTQ().apply(model, ctx)
    assert set(reasons(changes)) == {"one", "two"}
    assert all("shared" in why for why in reasons(changes).values())
    assert not changes


def test_a_weight_on_the_left_is_declined():
    proto = parse("g (float[N,6,8] x) => (float[] y) <float[5,6] w> { y = MatMul(w, x) }")
    model, ctx = load(proto), Context([models.feeds(proto)])
    Calibrate().apply(model, ctx)
    changes = GPTQ().apply(model, ctx)
    assert [*reasons(changes)] == ["MatMul_0"]


def test_without_encodings_nothing_happens():
    proto = parse(LAYERS["conv"])
    model = load(proto)
    assert not GPTQ().apply(model, Context())
    assert model.to_proto() == load(proto).to_proto()


def test_the_same_seed_gives_the_same_weights():
    proto = parse(LAYERS["conv"])
    data = samples(proto)
    found = []
    for seed in (0, 0, 1):
        model, _ = coarse(proto, data)
        GPTQ(patches=40).apply(model, Context(data, seed=seed))
        found.append(model.layers()[0].weight)
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
