"""Q/DQ models give back the float model and the encodings that they are made of."""

import numpy as np
import pytest

from onnxq.encoding import Encoding, Encodings
from onnxq.errors import ModelError, UnsupportedError
from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Calibrate, InsertQDQ
from onnxq.targets import target_named
from onnxq.unquantize import unquantized
from tests import models
from tests.checks import ops, run
from tests.models import parse

NETS = {
    "chain": "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[4] b, float[5,4,1,1] v>"
    "{ a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }",
    "residual": "g (float[N,4,8,8] x) => (float[] y, float[] d)"
    "<float[4,4,3,3] w, float[4,4,3,3] v>"
    "{ a = Conv<pads=[1,1,1,1]>(x, w) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, v) d = Add(b, c)"
    " e = Relu(d) y = MaxPool<kernel_shape=[2,2]>(e) }",
    "padded": "g (float[N,4,8,8] x) => (float[] y) <float[4,4,3,3] w, int64[8] p, float[3,4,2,2] v>"
    "{ a = Conv(x, w) b = Pad(a, p) y = Conv(b, v) }",
    "padded input": "g (float[N,4,8,8] x) => (float[] y) <int64[8] p, float[3,4,2,2] v>"
    "{ b = Pad(x, p) y = Conv(b, v) }",
    "island": "g (float[N,4,8,8] x) => (float[] y) <float[4,4,3,3] w, float[4,4,3,3] v>"
    "{ a = Conv(x, w) b = Tanh(a) y = Conv(b, v) }",
    "matmul": "g (float[N,4,8] x) => (float[] y) <float[8,8] w, float[8,6] v, float[8] b>"
    "{ a = MatMul(x, w) c = Add(a, b) d = Relu(c) y = MatMul(d, v) }",
    "concat": "g (float[N,4,8,8] x) => (float[] y)"
    "<float[4,4,3,3] w, float[4,4,3,3] v, float[3,8,1,1] u>"
    "{ a = Conv(x, w) b = Conv(x, v) c = Concat<axis=1>(a, b) y = Conv(c, u) }",
    "shared": "g (float[N,4,8] x) => (float[] y) <float[8,8] w>"
    "{ a = MatMul(x, w) y = MatMul(a, w) }",
}


def quantized(name, **options):
    proto = parse(NETS[name], p=np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    feeds = [models.feeds(proto, seed=s) for s in range(4)]
    model, ctx = load(proto), Context(feeds, target=target_named("ort-cpu").any_width)
    Calibrate(**options).apply(model, ctx)
    written = model.clone()
    InsertQDQ().apply(written, ctx)
    return model, load(written.to_proto()), feeds


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8", "int4/channel"])
@pytest.mark.parametrize("name", NETS)
def test_encodings_come_back(name, weights):
    model, written, _ = quantized(name, weights=weights)
    floats, found = unquantized(written)
    assert found.keys() == model.encodings.keys()
    for tensor, encoding in model.encodings.items():
        got = found[tensor]
        assert (got.dtype, got.axis, got.block) == (encoding.dtype, encoding.axis, encoding.block)
        np.testing.assert_array_equal(got.zero_point, encoding.zero_point)
        # scales of a result per channel went into those of the weight, and out again
        np.testing.assert_allclose(got.scale, encoding.scale, rtol=2.5e-7)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {*ops(floats)}
    assert (floats.inputs, floats.outputs) == (model.inputs, model.outputs)


@pytest.mark.parametrize("name", NETS)
def test_the_float_model_has_rounded_weights(name):
    model, written, feeds = quantized(name)
    floats, _ = unquantized(written)
    for layer in model.layers():
        encoding = model.encodings[layer.weight_tensor.name]
        layer.set_weight(encoding.fake_quantize(layer.weight))
    for feed in feeds:
        got, wanted = run(floats, feed), run(model, feed)
        for output in model.outputs:
            span = np.abs(wanted[output]).max()
            np.testing.assert_allclose(
                got[output], wanted[output], atol=1e-4 * span
            )  # int32 biases


@pytest.mark.parametrize("name", NETS)
def test_writing_it_again_gives_the_same_model(name):
    _, written, feeds = quantized(name, exits="tensor")
    floats, found = unquantized(written)
    floats.encodings = found
    InsertQDQ().apply(floats, Context())
    for feed in feeds:
        got, wanted = run(floats, feed), run(written, feed)
        for output in written.outputs:
            np.testing.assert_array_equal(got[output], wanted[output])


def test_widths_that_onnx_has_no_type_for_come_back_as_they_lie():
    model, written, _ = quantized("chain", activations="uint5", weights="int6/channel")
    floats, found = unquantized(written)
    assert {e.dtype for e in found.values()} == {"uint8", "int8"}
    np.testing.assert_array_equal(found["x"].scale, model.encodings["x"].scale)
    assert "Clip" not in ops(floats)


def test_the_model_is_left_alone():
    _, written, _ = quantized("residual")
    before = written.to_proto()
    unquantized(written)
    assert written.to_proto() == before


def test_nodes_that_read_floats_stay_in_float():
    proto = parse(
        "g (float[N,4,8] x) => (float[] y) <float[8,8] w, float[8,6] v>"
        "{ a = MatMul(x, w) t = Transpose<perm=[0,2,1]>(a) u = Transpose<perm=[0,2,1]>(t)"
        " y = MatMul(u, v) }"
    )
    model, _ = PassManager(Calibrate(exclude=("Transpose*",)), InsertQDQ())(
        proto, [models.feeds(proto)]
    )
    floats, found = unquantized(load(model.to_proto()))
    twice = load(floats.to_proto())
    twice.encodings = found
    InsertQDQ().apply(twice, Context())
    feed = models.feeds(proto, seed=5)
    np.testing.assert_array_equal(run(twice, feed)["y"], run(model, feed)["y"])


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("{ y = Relu(x) }", ModelError, "no DequantizeLinear"),
        (
            "{ q = QuantizeLinear(x, s, z) r = Abs(q) y = DequantizeLinear(r, s, z) }",
            UnsupportedError,
            r"what .*Abs.* gives, not a QuantizeLinear",
        ),
        (
            "{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, t, z) }",
            UnsupportedError,
            "different scales",
        ),
        (
            "{ a = Abs(s) q = QuantizeLinear(x, a, z) y = DequantizeLinear(q, a, z) }",
            UnsupportedError,
            "scale or zero point that is computed",
        ),
    ],
)
def test_what_cannot_be_taken_apart(text, error, match):
    head = "g (float[N,4] x) => (float[N,4] y) <float s, float t, int8 z>"
    proto = parse(f"{head} {text}", s=0.5, t=0.25, z=3)
    with pytest.raises(error, match=match):
        unquantized(load(proto))


def test_an_input_that_is_an_output():
    proto = parse(
        "g (float[N,4] x) => (float[N,4] y) <float s, int8 z>"
        "{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        s=0.5,
        z=3,
    )
    floats, found = unquantized(load(proto))
    assert ops(floats) == ["Identity"]
    assert found == Encodings(
        {"x": Encoding("int8", np.array(0.5, np.float32), np.array(3, np.int32))}
    )
