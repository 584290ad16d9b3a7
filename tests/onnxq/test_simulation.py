"""A simulated model computes as the written one does."""

import numpy as np
import pytest
from onnx import numpy_helper

from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import Calibrate, InsertQDQ
from onnxq.simulation import input_name, simulated
from onnxq.targets import target_named
from tests import models
from tests.checks import ops, run
from tests.models import parse
from tests.passes.test_gptq import samples

TARGET = target_named("ort-cpu")
NETS = {
    "chain": "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[5,4,1,1] v>"
    "{ a = Conv(x, w) b = Relu(a) y = Conv(b, v) }",
    "residual": "g (float[N,4,8,8] x) => (float[] y) <float[4,4,3,3] w, float[4,4,3,3] v>"
    "{ a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, v) d = Add(b, c)"
    " e = Relu(d) y = MaxPool<kernel_shape=[2,2]>(e) }",
    "padded": "g (float[N,4,8,8] x) => (float[] y) <float[4,4,3,3] w, int64[8] p, float[3,4,2,2] v>"
    "{ a = Conv(x, w) b = Pad(a, p) y = Conv(b, v) }",
    "island": "g (float[N,4,8,8] x) => (float[] y) <float[4,4,3,3] w, float[4,4,3,3] v>"
    "{ a = Conv(x, w) b = Sqrt(a) c = Relu(b) y = Conv(c, v) }",
    "matmul": "g (float[N,4,8] x) => (float[] y) <float[8,8] w, float[8,6] v, float[8] b>"
    "{ a = MatMul(x, w) c = Add(a, b) d = Relu(c) y = MatMul(d, v) }",
    "concat": "g (float[N,4,8,8] x) => (float[] y)"
    "<float[4,4,3,3] w, float[4,4,3,3] v, float[3,8,1,1] u>"
    "{ a = Conv(x, w) b = Conv(x, v) c = Concat<axis=1>(a, b) y = Conv(c, u) }",
}


def quantized(name, **options):
    proto = parse(NETS[name], p=np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    data = samples(proto)
    if name == "island":
        data = [{"x": np.abs(f["x"])} for f in data]
        for tensor in proto.graph.initializer:
            tensor.CopyFrom(_absolute(tensor))
    model, ctx = load(proto), Context(data)
    Calibrate(**options).apply(model, ctx)
    return proto, data, model, ctx


def _absolute(tensor):
    return numpy_helper.from_array(np.abs(numpy_helper.to_array(tensor)), tensor.name)


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8"])
@pytest.mark.parametrize("name", NETS)
def test_it_computes_as_the_written_model(name, weights):
    _, data, model, ctx = quantized(name, weights=weights)
    copy = simulated(model, TARGET)
    written = model.clone()
    InsertQDQ().apply(written, ctx)
    steps = {t: float(np.max(e.scale)) for t, e in model.encodings.items()}
    for feed in data:
        got, wanted = run(copy, feed)["y"], run(written, feed)["y"]
        # the same but for biases rounded to int32, and ties
        assert np.abs(got - wanted).max() <= max(steps.values()) * 1.01 + 1e-4
        assert np.abs(got - wanted).mean() <= 0.05 * max(steps.values()) + 1e-4


def test_the_model_stays_as_it_is():
    _, _, model, _ = quantized("residual")
    before = model.to_proto()
    simulated(model, TARGET)
    assert model.to_proto() == before


def test_weights_are_rounded_under_their_names():
    _, _, model, _ = quantized("chain")
    copy = simulated(model, TARGET)
    for layer, twin in zip(model.layers(), copy.layers(), strict=True):
        name = layer.weight_tensor.name
        assert twin.weight_tensor.name == name
        np.testing.assert_array_equal(
            twin.weight, model.encodings[name].fake_quantize(layer.weight)
        )


def test_what_a_layer_reads():
    _, data, model, _ = quantized("chain")
    copy = simulated(model, TARGET)
    first, second = model.layers()
    assert (input_name(copy, first), input_name(copy, second)) == ("x.rounded", "b.rounded")
    assert ops(copy) == [
        *("QuantizeLinear", "DequantizeLinear", "Conv", "Relu"),
        *("QuantizeLinear", "DequantizeLinear", "Conv", "QuantizeLinear", "DequantizeLinear"),
    ]
    feed = data[0]
    names = ["x.rounded", "b.rounded"]
    got = run(load(copy.to_proto()).to_proto(names), feed)
    np.testing.assert_array_equal(got["x.rounded"], model.encodings["x"].fake_quantize(feed["x"]))
    on_grid = model.encodings["b"].fake_quantize(got["b.rounded"])
    np.testing.assert_array_equal(got["b.rounded"], on_grid)


def test_float_readers_of_a_float_tensor_see_it_whole():
    """Sqrt gives b in float: only what runs in integers reads it rounded."""
    proto = parse(
        "g (float[N,4,8,8] x) => (float[] y, float[] z) <float[4,4,3,3] w>"
        "{ a = Exp(x) y = Conv(a, w) z = Neg(a) }"
    )
    data = [models.feeds(proto, seed=s) for s in range(4)]
    model = load(proto)
    Calibrate().apply(model, Context(data))
    copy = simulated(model, TARGET)
    got, wanted = run(copy, data[0]), run(proto, data[0])
    np.testing.assert_array_equal(got["z"], wanted["z"])
    assert not np.array_equal(got["y"], wanted["y"])
