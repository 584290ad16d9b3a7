"""Ranges of weights per channel, against numpy, and watched over a run."""

import numpy as np
import pytest
from onnx import numpy_helper

import onnxq
from onnxq.analysis.weight_ranges import ChannelRanges, WeightRanges, binned, channel_ranges
from onnxq.encoding import Encoding
from onnxq.model import load
from onnxq.passes import Clean, CrossLayerEqualization, FoldBatchNorm
from onnxq.recipe import Recipe, loads
from tests import models

FOLDED = (
    "g (float[N,3,8,8] x) => (float[] y)"
    " <float[6,3,3,3] w, float[6] s, float[6] b, float[6] m, float[6] var, float[5,6,1,1] v>"
    "{ c = Conv(x, w) n = BatchNormalization(c, s, b, m, var) r = Relu(n) y = Conv(r, v) }"
)
PLAIN = "g (float[N,4] x) => (float[] y) <float[4,3] w> { y = Gemm(x, w) }"


def data(text, count=4):
    return [models.feeds(models.parse(text), seed=seed) for seed in range(count)]


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_ranges_are_those_of_numpy(axis):
    weight = np.random.default_rng(0).normal(size=(4, 3, 5, 2)).astype(np.float32)
    found = channel_ranges(weight, axis)
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    np.testing.assert_array_equal(found.low, rows.min(axis=1))
    np.testing.assert_array_equal(found.high, rows.max(axis=1))
    bound = np.abs(rows).max(axis=1).astype(np.float64)
    assert found.spread == bound.max() / np.median(bound)


def test_spread_and_what_has_none():
    assert ChannelRanges(np.array([-8.0, -1, 0]), np.array([2.0, 2, 1])).spread == 4
    for low in ([0.0, 0, 5], [np.nan, 1, 1], [np.inf, 1, 1]):
        ranges = ChannelRanges(np.array(low), np.array(low))
        assert ranges.spread == np.inf
        assert ranges.to_dict()["spread"] is None
    assert channel_ranges(np.zeros((3, 0)), 0).spread == np.inf
    assert channel_ranges(np.array([1.0, -3, 2]), 0).low.tolist() == [1, -3, 2]


@pytest.mark.parametrize(("count", "most"), [(10, 10), (10, 4), (97, 96), (1000, 96), (3, 96)])
def test_bins_hold_each_channel_once_in_order(count, most):
    low = -np.arange(1.0, count + 1)
    found = binned(ChannelRanges(low, -low), most)
    assert found.low.size == min(count, most)
    ends = -found.low.astype(int)  # the last channel of each bin
    starts = [0, *ends[:-1]]
    assert ends[-1] == count
    sizes = ends - starts
    assert sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(found.high, ends)


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor"])
def test_before_is_folded_and_after_is_what_the_file_holds(weights):
    proto = models.parse(FOLDED)
    names = ["conv", "norm", "relu", "head"]
    for node, name in zip(proto.graph.node, names, strict=True):
        node.name = name
    model, report = onnxq.quantize(load(proto), calib=data(FOLDED), weights=weights)
    arrays = {t.name: array_of(t) for t in proto.graph.initializer}
    factor = arrays["s"] / np.sqrt(arrays["var"] + 1e-5)
    folded = arrays["w"] * factor[:, None, None, None]
    first, second = report.facts["weights"]
    assert [first["name"], second["name"]] == ["conv", "head"]
    assert first["quantized"]
    bound = np.abs(folded).max(axis=(1, 2, 3))
    assert first["before"]["channels"] == 6
    assert first["before"]["low"] == pytest.approx(folded.min(), rel=1e-6)
    assert first["before"]["high"] == pytest.approx(folded.max(), rel=1e-6)
    assert first["before"]["spread"] == pytest.approx(bound.max() / np.median(bound), rel=1e-6)
    written = written_weight(model, "conv")
    bound = np.abs(written).max(axis=(1, 2, 3))
    assert first["after"]["low"] == pytest.approx(written.min(), rel=1e-6)
    assert first["after"]["high"] == pytest.approx(written.max(), rel=1e-6)
    assert first["after"]["spread"] == pytest.approx(bound.max() / np.median(bound), rel=1e-6)
    # with a scale per channel the largest magnitude of each is on its grid
    changed = first["after"]["spread"] != first["before"]["spread"]
    assert changed == (weights == "int8/tensor")


def array_of(tensor):
    return numpy_helper.to_array(tensor).astype(np.float64)


def written_weight(model, name):
    """The weight of a layer as its DequantizeLinear gives it."""
    node = next(n for n in model.graph.nodes if n.name == name)
    source = node.inputs[1].inputs[0]
    assert source.op == "DequantizeLinear"
    integers, scale, zero = (np.asarray(t.values, np.float64) for t in source.inputs)
    shape = (-1, *[1] * (integers.ndim - 1))
    return (integers - zero.reshape(shape)) * scale.reshape(shape)


def test_equalization_lies_between_before_and_after():
    scale = np.array([1.0, 30, 1, 1, 1, 0.05]).reshape(-1, 1, 1, 1)
    proto = models.parse(FOLDED, w=np.random.default_rng(0).normal(size=(6, 3, 3, 3)) * scale)
    recipe = Recipe(passes=(Clean(), FoldBatchNorm(), CrossLayerEqualization()))
    _, report = onnxq.run(recipe, load(proto))
    first = report.facts["weights"][0]
    assert not first["quantized"]
    assert first["before"]["spread"] > 10
    assert first["after"]["spread"] < first["before"]["spread"] / 3


def test_without_a_fold_the_loaded_model_is_before():
    text = '[[pass]]\nname = "calibrate"\nmethod = "minmax"\n[[pass]]\nname = "insert-qdq"\n'
    proto = models.parse(PLAIN)
    _, report = onnxq.run(loads(text), load(proto), calib=data(PLAIN))
    [layer] = report.facts["weights"]
    weight = array_of(proto.graph.initializer[0])
    assert (layer["before"]["low"], layer["before"]["high"]) == (weight.min(), weight.max())
    assert (layer["op"], layer["quantized"]) == ("Gemm", True)


def test_an_encoding_that_was_not_written_changes_nothing():
    proto = models.parse(PLAIN)
    model = load(proto)
    ranges = WeightRanges(model)
    [layer] = model.layers()
    grid = Encoding.symmetric(np.array(0.1), "int8")
    model.encodings[layer.weight_tensor.name] = grid
    ranges.see(model)
    weight = array_of(proto.graph.initializer[0])
    [found] = ranges.finish(model)
    assert not found.quantized
    np.testing.assert_array_equal(found.after.high, weight.max(axis=0))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_encoded_ends_are_those_of_the_encoded_weight(axis):
    model = load(models.parse(PLAIN))
    ranges = WeightRanges(model)
    [layer] = model.layers()
    bound = np.array(1.0) if axis is None else np.linspace(0.5, 1, layer.weight.shape[axis])
    encoding = Encoding.symmetric(bound, "int8", axis)
    model.encodings[layer.weight_tensor.name] = encoding
    ranges.see(model)
    values = encoding.fake_quantize(layer.weight)
    seen = ranges._after[layer.name]
    np.testing.assert_array_equal(seen.low, values.min(axis=0))
    np.testing.assert_array_equal(seen.high, values.max(axis=0))
