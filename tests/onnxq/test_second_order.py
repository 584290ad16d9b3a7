"""Moments of patches against unfolding with numpy."""

import numpy as np
import pytest

from onnxq.model import load
from onnxq.runtime import Session
from onnxq.second_order import collect, rows_of, supports, weight_of
from tests import models
from tests.checks import run
from tests.models import parse
from tests.passes.test_gptq import LAYERS


def collected(proto, data, patches=10**6, seed=0, expected=None):
    model = load(proto)
    inner = [n for n in {layer.x.name for layer in model.layers()} if n not in model.inputs]
    session = Session(model.to_proto(inner), outputs=inner or None, threads=1)
    found = collect(
        model.layers(),
        session,
        data,
        expected=len(data) if expected is None else expected,
        rng=np.random.default_rng(seed),
        patches=patches,
    )
    return model, found


def samples(proto, count=5):
    return [{n: a + 1 for n, a in models.feeds(proto, seed=s).items()} for s in range(count)]


@pytest.mark.parametrize("name", LAYERS)
def test_rows_and_weights_are_inverse(name):
    layer = load(parse(LAYERS[name])).layers()[0]
    rows = rows_of(layer)
    assert rows.ndim == 3
    np.testing.assert_array_equal(weight_of(layer, rows), layer.weight)


@pytest.mark.parametrize("name", LAYERS)
def test_moments_predict_the_error_of_outputs(name):
    """E|dW x|^2 = tr(dW H dW^T) and E[dW x] = dW m, for any change of the weight."""
    proto = parse(LAYERS[name])
    data = samples(proto)
    model, found = collected(proto, data)
    layer = model.layers()[0]
    moments = found[layer.name]
    change = np.random.default_rng(9).normal(size=layer.weight.shape).astype(np.float32)
    rows = rows_of(layer)
    layer.set_weight(layer.weight + change)
    delta = (rows_of(model.layers()[0]) - rows).astype(np.float64)
    errors = []
    for feed in data:
        error = (run(model, feed)["y"] - run(proto, feed)["y"]).astype(np.float64)
        error = np.moveaxis(error, 1, -1) if layer.op == "Conv" else error
        errors.append(error.reshape(-1, error.shape[-1]))
    error = np.concatenate(errors) / float(layer.node.attrs.get("alpha", 1.0))
    assert moments.sampled == len(error)
    wanted = np.einsum("gok,gkl,gol->go", delta, moments.moment, delta).reshape(-1)
    np.testing.assert_allclose(np.square(error).mean(axis=0), wanted, rtol=1e-3)
    mean = np.einsum("gok,gk->go", delta, moments.mean).reshape(-1)
    np.testing.assert_allclose(error.mean(axis=0), mean, atol=1e-4 * np.abs(error).max())
    spread = np.einsum("gok,gkl,gol->go", delta, moments.covariance, delta).reshape(-1)
    np.testing.assert_allclose(error.var(axis=0), spread, rtol=1e-2)


def test_fewer_patches_estimate_the_same():
    proto = parse(LAYERS["conv"])
    data = samples(proto, 40)
    whole = collected(proto, data)[1]["Conv_0"]
    part = collected(proto, data, patches=300)[1]["Conv_0"]
    assert part.sampled < whole.sampled
    np.testing.assert_array_equal(part.mean, whole.mean)
    assert np.abs(part.moment - whole.moment).mean() < 0.3 * np.abs(whole.moment).mean()


def test_layers_with_the_same_input_and_window_share():
    text = (
        "g (float[N,4,8,8] x) => (float[] y, float[] z, float[] q) <float[6,4,3,3] w,"
        "float[2,4,3,3] v, float[2,4,3,3] u>"
        "{ y = Conv(x, w) z = Conv(x, v) q = Conv<strides=[2,2]>(x, u) }"
    )
    proto = parse(text)
    _, found = collected(proto, samples(proto))
    assert found["Conv_0"] is found["Conv_1"]
    assert found["Conv_2"] is not found["Conv_0"]


def test_no_samples_give_nothing():
    assert collected(parse(LAYERS["conv"]), [], expected=0)[1] == {}


def test_what_is_supported():
    texts = {
        True: [*LAYERS.values()],
        False: [
            "g (float[N,6,8] x) => (float[] y) <float[5,6] w> { y = MatMul(w, x) }",
            "g (float[6,N] x) => (float[] y) <float[6,5] w> { y = Gemm<transA=1>(x, w) }",
            "g (float[N,4,5,5] x) => (float[] y) <float[4,3,2,2] w> { y = ConvTranspose(x, w) }",
            "g (float[2,6,8] x) => (float[] y) <float[2,8,5] w> { y = MatMul(x, w) }",
        ],
    }
    for wanted, group in texts.items():
        for text in group:
            assert supports(load(parse(text)).layers()[0]) is wanted, text
