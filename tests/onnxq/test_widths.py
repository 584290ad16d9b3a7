"""Any width from 2 to 16 bits is simulated to the bit."""

import numpy as np
import pytest
from onnx import helper

from onnxq.encoding import DTYPES, Encoding, Encodings
from onnxq.errors import UnsupportedError
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import InsertQDQ
from onnxq.simulation import fold_dequantized, simulated
from onnxq.targets import target_named
from onnxq.widths import saturate
from tests.checks import ops, run
from tests.models import parse

TYPES = [t for t in DTYPES if t != "int32"]
ANY = target_named("ort-cpu").any_width
TEXT = "g (float[N,8] x) => (float[N,8] y) <float[8,8] w> { y = MatMul(x, w) }"


def encoded(dtype, scale=0.037, zero=None):
    zero = (0 if DTYPES[dtype][1] else 1 << DTYPES[dtype][0] - 2) if zero is None else zero
    return Encoding(dtype, np.array(scale, np.float32), np.array(zero, np.int32))


@pytest.mark.parametrize("dtype", TYPES)
def test_an_activation_is_rounded_as_numpy_rounds_it(dtype):
    encoding = encoded(dtype)
    proto = parse(TEXT, w=np.eye(8))  # exact: the rounded input comes out
    model = load(proto)
    model.encodings = Encodings({"x": encoding, "w": encoded("int8", 1.0)})
    InsertQDQ().apply(model, Context(target=ANY))
    steps = np.array([encoding.qmin, encoding.qmax]) - encoding.zero_point
    ends = np.sort((steps * encoding.scale).astype(np.float32))
    rng = np.random.default_rng(0)
    x = rng.uniform(1.5 * ends[0] - 1, 1.5 * ends[1] + 1, (512, 8)).astype(np.float32)
    x[0] = [*np.nextafter(ends, -np.inf), *ends, *np.nextafter(ends, np.inf), 0, -0.0]
    x[1] = (rng.integers(-4, 4, 8) + 0.5) * encoding.scale  # ties
    x[2] = [1e30, -1e30, 3e38, -3e38, 1e-40, -1e-40, 1, -1]
    wanted = encoding.fake_quantize(x)
    for level in ("disabled", "basic"):
        np.testing.assert_array_equal(run(model, {"x": x}, level)["y"], wanted)
    values = np.unique(((wanted / encoding.scale).round() + encoding.zero_point).astype(int))
    assert values[0] >= encoding.qmin
    assert values[-1] <= encoding.qmax


@pytest.mark.parametrize("dtype", TYPES)
def test_a_weight_is_what_its_integers_stand_for(dtype):
    proto = parse(TEXT)
    weight = load(proto).layers()[0].weight
    encoding = Encoding.symmetric(np.abs(weight).max(axis=0), dtype, 1)
    model = load(proto)
    model.encodings = Encodings({"x": encoded("uint16", 1e-4, 30000), "w": encoding})
    InsertQDQ(stored="int8").apply(model, Context(target=ANY))
    assert fold_dequantized(model) == 1
    (layer,) = model.layers()
    np.testing.assert_array_equal(layer.weight, encoding.fake_quantize(weight))
    assert len(np.unique(encoding.quantize(weight))) <= 1 << encoding.bits


@pytest.mark.parametrize(("x", "y"), [("uint5", "int7"), ("int12", "uint9"), ("uint16", "uint3")])
def test_the_simulation_of_passes_clips_alike(x, y):
    proto = parse(
        "g (float[N,3,6,6] x) => (float[] y) <float[4,3,3,3] w, float[4,4,1,1] v>"
        "{ a = Conv(x, w) y = Conv(a, v) }"
    )
    model = load(proto)
    known = {"x": encoded(x, 0.05), "a": encoded(y, 0.3), "y": encoded("uint16", 1e-3, 30000)}
    for name in ("w", "v"):
        known[name] = Encoding.symmetric(np.full(4, 2.0), "int6", 0)
    model.encodings = Encodings(known)
    feed = {"x": np.random.default_rng(1).normal(size=(2, 3, 6, 6)).astype(np.float32) * 3}
    got = run(simulated(model, ANY), feed)["y"]
    written = model.clone()
    InsertQDQ().apply(written, Context(target=ANY))
    np.testing.assert_array_equal(got, run(written, feed)["y"])


def test_full_types_take_no_clip():
    for dtype in ("int8", "uint8"):
        model = load(parse(TEXT))
        model.encodings = Encodings({"x": encoded(dtype), "w": encoded("int8")})
        InsertQDQ().apply(model, Context())
        assert "Clip" not in ops(model)
        assert model.opset == 17


def test_operator_sets():
    assert Encodings({"x": encoded("uint8"), "w": encoded("int5")}).opset == 13
    assert Encodings({"x": encoded("uint8"), "w": encoded("uint9")}).opset == 21
    assert Encodings().opset == 13


def test_sixteen_bits_are_not_padded_as_integers():
    proto = parse(
        "g (float[N,2,4,4] x) => (float[] y) <int64[8] p, float[3,2,2,2] w>"
        "{ a = Pad(x, p) y = Conv(a, w) }",
        p=np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    )
    model = load(proto)
    known = {n: encoded("uint16", 1e-3, 30000) for n in ("x", "a", "y")}
    model.encodings = Encodings({**known, "w": encoded("int8")})
    InsertQDQ().apply(model, Context(target=ANY))
    feed = {"x": np.random.default_rng(1).normal(size=(2, 2, 4, 4)).astype(np.float32)}
    padded = np.pad(known["x"].fake_quantize(feed["x"]), ((0, 0), (0, 0), (1, 1), (1, 1)))
    got = run(model, feed)["y"]
    again = load(parse("g (float[N,2,6,6] a) => (float[] y) <float[3,2,2,2] w> { y = Conv(a, w) }"))
    again.layers()[0].set_weight(encoded("int8").fake_quantize(load(proto).layers()[0].weight))
    wanted = known["y"].fake_quantize(run(again, {"a": padded})["y"])
    assert np.abs(got - wanted).max() <= known["y"].scale * 1.01
    assert np.mean(got == wanted) > 0.95


def test_scales_per_channel_between_eight_and_sixteen_bits():
    model = load(parse(TEXT))
    tensors = model.tensors()
    many = Encoding("uint12", np.ones(8, np.float32), np.zeros(8, np.int32), 1)
    with pytest.raises(UnsupportedError, match=r"12 bits with scales per channel \(tensor x\)"):
        saturate(model, "x", tensors["x"], tensors["y"], many)


def test_only_16_bits_and_8_have_types():
    names = {t for t in TYPES if hasattr(np, t)}
    assert names == {"int8", "uint8", "int16", "uint16"}
    assert all(encoded(t).fills_storage == (t in names) for t in TYPES)
    assert helper.np_dtype_to_tensor_dtype(encoded("int11").storage) == 5
