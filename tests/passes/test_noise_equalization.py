"""Channels scaled for the least noise of rounding: same function, smaller error once rounded."""

import numpy as np
import pytest

import onnxq
from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Calibrate, InsertQDQ, NoiseEqualization
from tests import models
from tests.checks import assert_same_function, ops, reasons, run
from tests.models import parse
from tests.passes.test_cross_layer_equalization import CHAINS, spread, wild

PAIR = (
    "g (float[N,6,8,8] x) => (float[] y) <float[12,6,1,1] w, float[12] b, float[8,12,3,3] v,"
    " float[8] c, float[4,8,1,1] u>"
    "{ k = Conv(x, w, b) r = Relu(k) l = Conv(r, v, c) s = Relu(l) y = Conv(s, u) }"
)


def uneven():
    """Layers whose input channels differ in weight and, the other way about, in variance."""
    return parse(
        PAIR,
        w=spread((12, 6, 1, 1), 1),
        v=spread((8, 12, 3, 3), 2, axis=1),
        u=spread((4, 8, 1, 1), 3, axis=1),
    )


def samples(proto, count, seed=0):
    return [models.feeds(proto, seed=seed + i) for i in range(count)]


def sqnr_db(wanted, given):
    return 10 * np.log10(np.square(wanted).sum() / np.square(wanted - given).sum())


@pytest.mark.parametrize("name", CHAINS)
def test_the_function_stays(name):
    proto = wild(CHAINS[name])
    data = samples(proto, 4)
    model = load(proto)
    changes = NoiseEqualization(samples=0).apply(model, Context(data))
    model.check()
    assert changes
    assert_same_function(proto, model)


@pytest.mark.parametrize("weights", ["int4/channel", "int3/channel"])
def test_rounding_costs_less(weights):
    proto = uneven()
    data = samples(proto, 8)
    unseen = samples(proto, 4, seed=9)
    calibrate = Calibrate(weights=weights)
    found = []
    for steps in ([], [NoiseEqualization(weights=weights)]):
        small, _ = PassManager(*steps, calibrate, InsertQDQ())(proto, data)
        outputs = [(run(proto, f)["y"], run(small, f)["y"]) for f in unseen]
        found.append(np.mean([sqnr_db(*pair) for pair in outputs]))
    assert found[1] > found[0] + 3.0


def test_relu6_gets_bounds_per_channel():
    proto = parse(
        "g (float[N,3,8,8] x) => (float[] y) <float[6,3,1,1] w, float[6] b, float[4,6,1,1] v,"
        " float low = {0}, float high = {6}>"
        "{ k = Conv(x, w, b) r = Clip(k, low, high) y = Conv(r, v) }",
        w=8 * spread((6, 3, 1, 1), 4),
        v=spread((4, 6, 1, 1), 5, axis=1),
    )
    model = load(proto)
    NoiseEqualization(weights="int4/channel").apply(model, Context(samples(proto, 4)))
    assert ops(model) == ["Conv", "Relu", "Min", "Conv"]
    assert_same_function(proto, model)


def test_scales_per_tensor_are_left_to_cross_layer_equalization():
    changes = NoiseEqualization(weights="int8/tensor").apply(load(uneven()), Context())
    assert not changes
    assert reasons(changes) == {"all layers": "this is for a scale per channel, not int8"}


def test_what_is_refused_has_a_reason():
    proto = parse(
        "g (float[N,3,8,8] x) => (float[] y) <float[6,3,1,1] w, float[4,6,1,1] v>"
        "{ k = Conv(x, w) r = Sigmoid(k) y = Conv(r, v) }"
    )
    model = load(proto)
    changes = NoiseEqualization().apply(model, Context(samples(proto, 2)))
    assert not changes
    assert reasons(changes) == {
        "Conv_0": "Sigmoid_1 (Sigmoid) reads it",
        "Conv_2": "y is an output of the model",
    }
    assert_same_function(proto, model)


def test_models_without_layers_are_left_alone():
    proto = parse("g (float[N,3] x) => (float[] y) { y = Relu(x) }")
    assert not NoiseEqualization().apply(load(proto), Context(samples(proto, 2)))


def test_the_formats_of_the_command_reach_it():
    proto = uneven()
    small, _ = onnxq.quantize(
        proto, None, samples(proto, 4), recipe="accurate", weights="int4/channel"
    )
    _, _, after = small.metadata["onnxq.recipe"].partition('"noise-equalization"')
    assert 'weights = "int4/channel"' in after.partition("[[pass]]")[0]
