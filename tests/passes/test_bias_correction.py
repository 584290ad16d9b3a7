"""Bias correction: means of outputs are those of the float weights."""

import numpy as np
import pytest

from onnxq.encoding import Encoding
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import GPTQ, BiasCorrection, Calibrate
from tests.checks import reasons
from tests.models import parse
from tests.passes.test_gptq import LAYERS, coarse, differences, nearest, samples

BIASED = [n for n in LAYERS if n != "matmul"]


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8"])
@pytest.mark.parametrize("name", BIASED)
def test_means_are_restored(name, weights):
    proto = parse(LAYERS[name])
    data = samples(proto)
    model, ctx = coarse(proto, data, weights=weights)
    before = np.abs(differences(proto, nearest(model), data).mean(axis=0)).max()
    assert BiasCorrection(limit=0).apply(model, ctx)
    after = np.abs(differences(proto, nearest(model), data).mean(axis=0)).max()
    assert before > 1e-2
    assert after < 1e-3 * before


def test_weights_are_left_alone():
    proto = parse(LAYERS["conv"])
    model, ctx = coarse(proto, samples(proto))
    before = model.layers()[0].weight.copy()
    BiasCorrection().apply(model, ctx)
    np.testing.assert_array_equal(model.layers()[0].weight, before)


def test_a_shared_bias_is_corrected_for_each_layer():
    text = (
        "g (float[N,4,8,8] x) => (float[] y) <float[4,4,3,3] w, float[4] b, float[4,4,3,3] v>"
        "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v, b) }"
    )
    proto = parse(text)
    model, ctx = coarse(proto, samples(proto))
    BiasCorrection().apply(model, ctx)
    one, two = (layer.bias for layer in model.layers())
    assert not np.array_equal(one, two)


def test_what_it_declines():
    proto = parse(LAYERS["matmul"])
    model, ctx = coarse(proto, samples(proto))
    changes = BiasCorrection().apply(model, ctx)
    assert not changes
    assert reasons(changes) == {"MatMul_0": "MatMul takes no bias"}


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,4,5,5] x) => (float[] y) <float[4,3,2,2] w> { y = ConvTranspose(x, w) }",
        "g (float[6,N] x) => (float[] y) <float[6,5] w> { y = Gemm<transA=1>(x, w) }",
        "g (float[6,N] x) => (float[] y) <float[5,6] w> { y = Gemm(w, x) }",
    ],
)
def test_layers_of_other_kinds_are_declined(text):
    model = load(parse(text))
    [layer] = model.layers()
    model.encodings["w"] = Encoding.symmetric(np.array(9.0), "int8")
    changes = BiasCorrection().apply(model, Context([]))
    assert not changes
    assert reasons(changes) == {layer.name: f"{layer.op} of this kind is not corrected"}
    assert layer.bias is None


@pytest.mark.parametrize("step", [BiasCorrection(limit=0), GPTQ(samples=0)])
def test_factors_of_a_gemm_count(step):
    proto = parse(
        "g (float[N,8] x) => (float[] y) <float[8,6] w, float[1,6] b>"
        "{ y = Gemm<alpha=0.5, beta=4.0>(x, w, b) }"
    )
    data = samples(proto)
    model = load(proto)
    model.encodings["w"] = Encoding.symmetric(np.array(40.0), "int8")
    before = np.abs(differences(proto, nearest(model), data).mean(axis=0)).max()
    assert step.apply(model, Context(data))
    after = np.abs(differences(proto, nearest(model), data).mean(axis=0)).max()
    assert before > 1e-2
    assert after < 1e-3 * before


def test_excluded_layers_are_left_alone():
    proto = parse(LAYERS["conv"])
    model, ctx = load(proto), Context(samples(proto))
    Calibrate(exclude=("Conv",)).apply(model, ctx)
    assert not BiasCorrection().apply(model, ctx)


def test_the_limit_limits():
    proto = parse(LAYERS["conv"])
    data = samples(proto)
    biases = []
    for limit in (1, 0):
        model, ctx = coarse(proto, data)
        BiasCorrection(limit=limit).apply(model, ctx)
        biases.append(model.layers()[0].bias)
    assert not np.array_equal(*biases)
