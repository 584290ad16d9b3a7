"""Gradients against difference quotients of onnxruntime's own results."""

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxq.analysis.adjoint import Adjoint
from onnxq.model import load
from tests import models
from tests.checks import run
from tests.models import parse

HEAD = "g (float[N,4,6,6] x) => (float[] y) <float[4,4,3,3] w, float[4] b"
# what lies behind the first layer, as ONNX text; constants after the bar
TAILS = {
    "nothing": "y = Identity(c)",
    "relu": "y = Relu(c)",
    "clip": "y = Clip(c, lo, hi) | float lo = {-1}, float hi = {1}",
    "sigmoid": "y = Sigmoid(c)",
    "tanh": "y = Tanh(c)",
    "leaky": "y = LeakyRelu<alpha=0.2>(c)",
    "prelu": "y = PRelu(c, s) | float[4,1,1] s",
    "silu": "s = Sigmoid(c) y = Mul(c, s)",
    "exp": "y = Exp(c)",
    "log": "e = Exp(c) y = Log(e)",
    "sqrt": "e = Exp(c) y = Sqrt(e)",
    "reciprocal": "e = Exp(c) y = Reciprocal(e)",
    "pow": "e = Exp(c) y = Pow(e, p) | float p = {1.5}",
    "div": "e = Exp(c) y = Div(c, e)",
    "sub": "r = Relu(c) y = Sub(r, c)",
    "min-max": "r = Relu(c) m = Max(c, t) y = Min(m, u) | float t = {-0.5}, float u = {0.7}",
    "where": "k = Greater(c, z) y = Where(k, c, z) | float z = {0}",
    "sum-mean": "r = Relu(c) s = Sum(r, c, r) y = Mean(s, c)",
    "broadcast": "m = GlobalAveragePool(c) y = Mul(c, m)",
    "softmax": "y = Softmax<axis=1>(c)",
    "log-softmax": "y = LogSoftmax<axis=1>(c)",
    "layer-norm": "y = LayerNormalization<axis=-1>(c, s, t) | float[6] s, float[6] t",
    "batch-norm": "y = BatchNormalization(c, s, t, t, var) | float[4] s, float[4] t, float[4] var",
    "conv": "y = Conv<pads=[1,1,1,1]>(c, v) | float[5,4,3,3] v",
    "strided": "y = Conv<strides=[2,2], pads=[1,0,1,1]>(c, v) | float[5,4,3,3] v",
    "depthwise": "y = Conv<group=4, dilations=[2,2]>(c, v) | float[4,1,2,2] v",
    "same": 'y = Conv<strides=[2,2], auto_pad="SAME_LOWER">(c, v) | float[5,4,2,2] v',
    "transposed": "y = ConvTranspose<strides=[2,2], pads=[1,0,0,1]>(c, v) | float[4,2,3,3] v",
    "longer": "y = ConvTranspose<strides=[2,2], output_padding=[1,1]>(c, v) | float[4,2,3,3] v",
    "grouped": "y = ConvTranspose<group=2>(c, v) | float[4,2,3,3] v",
    "gemm": "f = Flatten(c) y = Gemm<alpha=0.5>(f, v, t) | float[144,3] v, float[3] t",
    "gemm-transposed": "f = Flatten(c) y = Gemm<transB=1>(f, v) | float[3,144] v",
    "matmul": "y = MatMul(c, v) | float[6,3] v",
    "attention": "t = Transpose<perm=[0,1,3,2]>(c) y = MatMul(c, t)",
    "average": "y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(c)",
    "average-padded": "y = AveragePool<kernel_shape=[2,2], pads=[1,0,0,1], count_include_pad=1>(c)",
    "max-pool": "y = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,0,0]>(c)",
    "global": "a = GlobalAveragePool(c) m = GlobalMaxPool(c) y = Add(a, m)",
    "reduce-mean": "y = ReduceMean<axes=[2,3], keepdims=0>(c)",
    "reduce-sum": "y = ReduceSum<keepdims=0>(c, i) | int64[1] i = {1}",
    "reduce-max": "y = ReduceMax<axes=[1]>(c)",
    "concat-slice": "r = Relu(c) k = Concat<axis=1>(r, c) y = Slice(k, i, j, i)"
    "| int64[1] i = {1}, int64[1] j = {7}",
    "split": "p, q = Split<axis=1>(c) r = Relu(p) y = Mul(q, r)",
    "pad": "y = Pad(c, i) | int64[8] i = {0,1,0,2,0,0,1,0}",
    "gather": "y = Gather<axis=1>(c, i) | int64[3] i = {3,0,3}",
    "resize": "y = Resize(c, , s) | float[4] s = {1,1,2,2}",
    "depth-to-space": "y = DepthToSpace<blocksize=2>(c)",
    "reshape": "y = Reshape(c, i) | int64[3] i = {0,-1,12}",
    "cast": "d = Cast<to=1>(c) y = Relu(d)",
}


def model(tail):
    body, _, constants = tail.partition("|")
    declared = f", {constants.strip()}" if constants.strip() else ""
    return load(parse(f"{HEAD}{declared}> {{ c = Conv<pads=[1,1,1,1]>(x, w, b) {body} }}"))


def nudged(model, output, direction, feed, noise, sign):
    """The output along a direction, with noise added to what the first layer puts out."""
    proto = model.to_proto()
    proto.graph.node[0].output[0] = "c/before"
    shape = list(noise.shape)
    proto.graph.input.append(helper.make_tensor_value_info("noise", 1, shape))
    proto.graph.node.insert(1, helper.make_node("Add", ["c/before", "noise"], ["c"]))
    got = run(proto, {**feed, "noise": (sign * noise).astype(np.float32)})[output]
    return float((got.astype(np.float64) * direction).sum())


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_gradients_are_difference_quotients(tail):
    net = model(tail)
    feed = models.feeds(net.to_proto(), batch=2)
    adjoint = Adjoint(net, net.layers()[:1], feed)
    assert adjoint.stopped == {}
    rng = np.random.default_rng(0)
    direction = {n: rng.normal(size=s).astype(np.float32) for n, s in adjoint.outputs.items()}
    found = dict(adjoint.run(feed, direction))[net.layers()[0].name]
    # along the gradient itself, so that no cancellation hides an error, and along noise
    for along in (found.output, rng.normal(size=found.output.shape)):
        noise = along * (1e-3 / np.sqrt(np.square(along).mean()))
        plus, minus = (nudged(net, "y", direction["y"], feed, noise, s) for s in (1, -1))
        wanted = (plus - minus) / 2
        scale = float(np.sqrt(np.square(found.output).sum() * np.square(noise).sum()))
        assert abs(float((found.output * noise).sum()) - wanted) <= 0.02 * scale


def test_the_input_of_a_layer_has_the_gradient_of_that_layer_alone():
    net = load(
        parse(
            f"{HEAD}> {{ c = Conv<pads=[1,1,1,1]>(x, w, b) s = Conv<pads=[1,1,1,1]>(x, w)"
            " y = Add(c, s) }"
        )
    )
    feed = models.feeds(net.to_proto())
    adjoint = Adjoint(net, net.layers()[:1], feed)
    direction = {n: np.ones(s, np.float32) for n, s in adjoint.outputs.items()}
    found = dict(adjoint.run(feed, direction))
    (alone,) = found.values()
    proto = onnx.ModelProto()
    proto.CopyFrom(net.to_proto())
    step = np.zeros_like(feed["x"])
    step[0, 1, 2, 3] = 1.0
    whole = [run(proto, {"x": feed["x"] + s * step})["y"].sum() for s in (0, 1)]
    np.testing.assert_allclose(2 * alone.input[0, 1, 2, 3], whole[1] - whole[0], rtol=1e-3)


def test_what_has_no_derivative_stops_the_gradient():
    net = model("r = Round(c) y = Add(r, z) | float z = {0}")
    feed = models.feeds(net.to_proto())
    adjoint = Adjoint(net, net.layers(), feed)
    assert adjoint.layers == []
    assert [*adjoint.stopped.values()] == ["it is flat between its steps"]
    assert {*adjoint.partial} == {net.layers()[0].name}


def test_what_passes_beside_a_stop_is_known_in_part():
    net = model("h = Hardmax<axis=1>(c) y = Add(h, c)")
    adjoint = Adjoint(net, net.layers(), models.feeds(net.to_proto()))
    assert adjoint.layers == [net.layers()[0].name]
    assert [*adjoint.stopped.values()] == ["no rule for the derivative of Hardmax"]
    assert {*adjoint.partial} == {net.layers()[0].name}


def test_only_samples_of_its_shape_fit():
    net = model("y = Relu(c)")
    feed = models.feeds(net.to_proto(), batch=2)
    adjoint = Adjoint(net, net.layers(), feed)
    assert adjoint.fits(feed)
    assert not adjoint.fits({"x": feed["x"][:1]})


def test_only_float32_has_gradients():
    net = model("d = Cast<to=11>(c) e = Cast<to=1>(d) y = Add(e, c)")
    adjoint = Adjoint(net, net.layers(), models.feeds(net.to_proto()))
    assert [*adjoint.stopped.values()] == ["it does not compute in float32"]
    assert {*adjoint.partial} == {net.layers()[0].name}
