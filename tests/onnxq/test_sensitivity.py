"""Expected effects against what rounding does, in closed form and in onnxruntime."""

import numpy as np
import pytest

from onnxq.analysis.adjoint import Adjoint
from onnxq.analysis.error import LARGEST_SQNR_DB
from onnxq.analysis.sensitivity import (
    Probe,
    decibel,
    expected_effects,
    noise_of_input,
    noise_of_weight,
    output_power,
    spearman,
    weight_error,
)
from onnxq.encoding import Encoding, Format
from onnxq.formats import weight_encoding
from onnxq.model import load
from onnxq.second_order import collect, input_session, rows_of
from tests import models
from tests.checks import run
from tests.models import parse
from tests.passes.test_gptq import LAYERS

TWO = (
    "g (float[N,3,8,8] x) => (float[] y)"
    "<float[6,3,3,3] w, float[6] b, float[5,6,3,3] v, float[5] d>"
    "{ c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) y = Conv(r, v, d) }"
)


def statistics(model, feeds):
    return collect(
        model.layers(),
        input_session(model, model.layers(), 1),
        feeds,
        expected=len(feeds),
        rng=np.random.default_rng(0),
        patches=10**6,
    )


@pytest.mark.parametrize("text", LAYERS.values(), ids=LAYERS)
def test_noise_at_the_layer_is_that_of_its_output(text):
    model = load(parse(text))
    feeds = [models.feeds(model.to_proto(), seed=s) for s in range(3)]
    layer = model.layers()[0]
    known = statistics(model, feeds)[layer.name]
    encoding = weight_encoding(
        layer, layer.weight, Format.parse("int4/channel"), Format.parse("uint8")
    )
    rounded = model.clone()
    rounded.layers()[0].set_weight(encoding.fake_quantize(layer.weight))
    name = layer.y.name
    pairs = [[run(m.to_proto([name]), f)[name] for m in (model, rounded)] for f in feeds]
    axis = 1 if "Conv" in layer.op else -1
    signal, change = (
        np.concatenate([np.moveaxis(p, axis, -1).reshape(-1, layer.output_channels) for p in part])
        for part in ([a for a, _ in pairs], [b - a for a, b in pairs])
    )
    if layer.op != "MatMul":  # a bias makes up for the mean
        change = change - change.mean(axis=0)
    error = weight_error(layer, encoding)
    np.testing.assert_allclose(
        noise_of_weight(layer, error, known), np.square(change).sum(axis=1).mean(), rtol=2e-3
    )
    np.testing.assert_allclose(
        output_power(layer, known), np.square(signal).sum(axis=1).mean(), rtol=1e-3
    )
    square = float(np.square(rows_of(layer).astype(np.float64)).sum())
    alpha = float(layer.node.attrs.get("alpha", 1.0))
    np.testing.assert_allclose(noise_of_input(layer, 0.5), 0.5 * square * alpha**2)


def effects(model, feeds, fmt, scale, repeats):
    """Expected effects of a weight format and an input scale on each layer of the model."""
    known = statistics(model, feeds)
    probes = []
    for layer in model.layers():
        encoding = weight_encoding(layer, layer.weight, Format.parse(fmt), Format.parse("uint8"))
        coarse = Encoding("int16", np.array(scale, np.float32), np.array(0, np.int32))
        probes.append(
            Probe(
                layer, known[layer.name].mean, {"w": weight_error(layer, encoding)}, {"x": coarse}
            )
        )
    adjoint = Adjoint(model, model.layers(), feeds[0])
    clean = [run(model, f)["y"].astype(np.float64) for f in feeds]
    power = {"y": sum(np.square(c).sum() for c in clean) / len(feeds)}
    found = expected_effects(
        adjoint, probes, feeds * repeats, power, np.random.default_rng(0), threads=2
    )
    return found, probes, clean, power["y"]


def measured(model, layer, probe, feeds, clean, power, coarse=None):
    """The effect of the probe's error of a layer, its bias corrected, in onnxruntime."""
    copy = model.clone()
    twin = next(x for x in copy.layers() if x.name == layer.name)
    rows = rows_of(layer) + probe.errors["w"]
    twin.set_weight(rows.reshape(layer.weight.shape).astype(np.float32))
    shift = np.einsum("grk,gk->gr", probe.errors["w"], probe.mean).reshape(-1)
    twin.set_bias((layer.bias - shift).astype(np.float32))
    got = [run(copy, f)["y"] for f in feeds]
    return sum(np.square(a - b).sum() for a, b in zip(got, clean, strict=True)) / len(feeds) / power


def test_expected_effects_of_weights_are_those_that_come_about():
    model = load(parse(TWO))
    feeds = [models.feeds(model.to_proto(), seed=s, batch=1) for s in range(6)]
    found, probes, clean, power = effects(model, feeds, "int8/channel", 1e-3, 40)
    for layer, probe in zip(model.layers(), probes, strict=True):
        wanted = measured(model, layer, probe, feeds, clean, power)
        assert 0.7 < found[layer.name]["w"] / wanted < 1.4


def test_expected_effects_of_inputs_are_those_that_come_about():
    model = load(parse(TWO))
    feeds = [models.feeds(model.to_proto(), seed=s, batch=1) for s in range(6)]
    scale = 0.02
    found, _, clean, power = effects(model, feeds, "int8/channel", scale, 10)
    first = model.layers()[0]
    rounded = [{"x": (np.rint(f["x"] / scale) * scale).astype(np.float32)} for f in feeds]
    got = [run(model, f)["y"] for f in rounded]
    error = sum(np.square(a - b).sum() for a, b in zip(got, clean, strict=True)) / len(feeds)
    assert 0.7 < found[first.name]["x"] / (error / power) < 1.4


def test_layers_that_no_output_depends_on_have_no_effect():
    text = TWO.replace(
        "y = Conv(r, v, d)",
        "h = Conv(r, v, d) k = Shape(h) z = Cast<to=1>(k)"
        " e = Conv(x, w) s = ReduceMean<keepdims=0>(e) y = Add(z, s)",
    )
    model = load(parse(text))
    feeds = [models.feeds(model.to_proto(), batch=1)]
    known = statistics(model, feeds)
    probes = [Probe(x, known[x.name].mean, {}, {}) for x in model.layers()]
    adjoint = Adjoint(model, model.layers(), feeds[0])
    found = expected_effects(adjoint, probes, feeds, {"y": 1.0}, np.random.default_rng(0))
    assert {*found} == {model.layers()[2].name}


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / np.sqrt(4.5 * 5)),  # ranks 1, 2.5, 2.5, 4
        ([1, 1, 1], [1, 2, 3], None),
        ([1, 2], [1, 2], None),
    ],
)
def test_spearman(a, b, wanted):
    found = spearman(np.array(a), np.array(b))
    assert found == (None if wanted is None else pytest.approx(wanted))


def test_decibels():
    assert decibel(None) is None
    assert decibel(0.01) == pytest.approx(20)
    assert decibel(0.0) == LARGEST_SQNR_DB
    assert decibel(np.inf) == -LARGEST_SQNR_DB
