"""ReLU6 with a bound per channel, written so that integer kernels run it."""

import numpy as np
import onnx
import pytest

from onnxq.analysis.fusion import integer_share
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import Calibrate, InsertQDQ
from onnxq.placement import place
from onnxq.targets import TARGETS
from tests.checks import LEVELS, ops, run
from tests.models import parse

TEXT = (
    "g (float[N,3,8,8] x) => (float[] y) <float[5,3,3,3] w, float[5] b, float[5,1,1] m,"
    " float[4,5,1,1] v>"
    "{ c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) k = Min(r, m) y = Conv(k, v) }"
)
BOUNDS = np.array([0.2, 0.5, 1.0, 3.0, 50.0], np.float32)


def relu6(bounds=BOUNDS, text=TEXT):
    proto = parse(text, m=bounds.reshape(5, 1, 1))
    for node in proto.graph.node:
        node.name = node.output[0]
    return proto


def samples(count=8):
    rng = np.random.default_rng(3)
    return [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def quantized(proto, data):
    model = load(proto)
    ctx = Context(data)
    Calibrate(method="minmax").apply(model, ctx)
    encoding = model.encodings["k"]
    changes = InsertQDQ().apply(model, ctx)
    model.check()
    return model, encoding, changes


def test_the_bounds_are_taken_over():
    placement = place(load(relu6()), TARGETS["ort-cpu"])
    assert set(placement.nodes) == {"c", "y"}
    assert placement.float_nodes == {}
    assert placement.tensors == ["x", "k", "y"]
    assert placement.exits == {"y": "y"}


@pytest.mark.parametrize("level", LEVELS)
def test_saturation_is_the_bound_within_half_a_step(level):
    proto, data = relu6(), samples()
    model, encoding, changes = quantized(proto, data)
    assert "Min" not in ops(model)
    assert ops(model).count("Add") == 1
    assert any("by saturation" in done for done in changes.done)
    after = model.to_proto()
    after.graph.output.append(onnx.ValueInfoProto(name="k_DequantizeLinear_Output"))
    before = load(proto).to_proto(["k"])
    step = float(encoding.scale)
    weight = load(proto).layers()[0].weight
    spans = [np.ptp(np.stack([f["x"] for f in data])), 2 * np.abs(weight).max()]
    # what rounding inputs and weights to 255 steps can do to a sum of 27 products
    noise = spans[0] / 510 * np.abs(weight).sum(axis=(1, 2, 3)).max() + spans[1] / 510 * 27 * 3
    for feed in data:
        wanted = run(before, feed)["k"]
        got = run(after, feed, level)["k_DequantizeLinear_Output"]
        top = got.max(axis=(0, 2, 3))
        assert (top <= BOUNDS + step / 2 + 1e-6).all()
        # half a step for the result, half for the bound
        assert np.abs(got - wanted).max() <= step + noise


def test_everything_fuses():
    model, _, _ = quantized(relu6(), samples())
    share = integer_share(model, {"x": (1, 3, 8, 8), "c": (1, 5, 8, 8), "y": (1, 4, 8, 8)})
    assert share.share == 1.0


def test_bounds_beyond_the_grid_go():
    model, _, changes = quantized(relu6(np.full(5, 50.0, np.float32)), samples())
    assert "Add" not in ops(model)
    assert "Min" not in ops(model)
    assert any("below its bounds" in done for done in changes.done)


OTHERS = {
    "read-twice": TEXT.replace("k = Min(r, m) y = Conv(k, v)", "k = Min(r, m) y = Add(k, r)"),
    "computed": TEXT.replace("k = Min(r, m)", "n = Relu(m) k = Min(r, n)")
    .replace("float[N,3,8,8] x)", "float[N,3,8,8] x, float[5,1,1] m)")
    .replace(" float[5,1,1] m,", ""),
    "without-relu": TEXT.replace("r = Relu(c) k = Min(r, m)", "k = Min(c, m)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_minima_stay_in_float(name):
    proto = parse(OTHERS[name])
    for node in proto.graph.node:
        node.name = node.output[0]
    placement = place(load(proto), TARGETS["ort-cpu"])
    assert "integer Min" in placement.float_nodes["k"]


@pytest.mark.parametrize("glob", ["Min", "Relu"])
def test_excluded_bounds_stay_in_float(glob):
    proto, data = relu6(), samples()
    model = load(proto)
    Calibrate(exclude=(glob,)).apply(model, Context(data))
    InsertQDQ().apply(model, Context())
    assert "Add" not in ops(model)
    assert {"Min", "Relu"} <= set(ops(model))
    wanted = run(proto, data[0])["y"]
    for level in LEVELS:
        assert np.abs(run(model, data[0], level)["y"] - wanted).max() < 0.1 * np.abs(wanted).max()
