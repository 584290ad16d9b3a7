"""Layers: parameters are replaced, never shared, and channels scaled mean what they say."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxq.errors import ModelError, UnsupportedError
from onnxq.model import Layer, load
from tests import models
from tests.checks import run
from tests.onnxq.test_model import CONVS, DENSE

# name -> (a model of one layer, the sizes of an x that the weight meets once)
LAYERS = {
    "conv": (
        "g (float[N,4,A,B] x) => (float[] y) <float[6,4,3,2] w, float[6] b> { y = Conv(x, w, b) }",
        (1, 4, 3, 2),
    ),
    "grouped": (
        "g (float[N,4,A,B] x) => (float[] y) <float[6,2,3,2] w, float[6] b>"
        "{ y = Conv<group=2>(x, w, b) }",
        (1, 4, 3, 2),
    ),
    "depthwise": (
        "g (float[N,3,A,B] x) => (float[] y) <float[6,1,3,3] w, float[6] b>"
        "{ y = Conv<group=3>(x, w, b) }",
        (1, 3, 3, 3),
    ),
    "conv-1d": (
        "g (float[N,4,A] x) => (float[] y) <float[6,4,3] w> { y = Conv(x, w) }",
        (1, 4, 3),
    ),
    "conv-3d": (
        "g (float[N,4,A,B,C] x) => (float[] y) <float[6,2,2,1,3] w, float[6] b>"
        "{ y = Conv<group=2>(x, w, b) }",
        (1, 4, 2, 1, 3),
    ),
    "transposed": (
        "g (float[N,4,A,B] x) => (float[] y) <float[4,3,2,3] w, float[3] b>"
        "{ y = ConvTranspose<strides=[2,1]>(x, w, b) }",
        (1, 4, 1, 1),
    ),
    "transposed-grouped": (
        "g (float[N,6,A,B] x) => (float[] y) <float[6,2,3,3] w, float[4] b>"
        "{ y = ConvTranspose<group=2>(x, w, b) }",
        (1, 6, 1, 1),
    ),
    "transposed-depthwise": (
        "g (float[N,4,A,B] x) => (float[] y) <float[4,1,3,3] w, float[4] b>"
        "{ y = ConvTranspose<group=4>(x, w, b) }",
        (1, 4, 1, 1),
    ),
    "transposed-narrow": (
        "g (float[N,4,A] x) => (float[] y) <float[4,1,3] w> { y = ConvTranspose<group=2>(x, w) }",
        (1, 4, 1),
    ),
    "gemm": (
        "g (float[N,4] x) => (float[] y) <float[4,6] w, float[6] b> { y = Gemm(x, w, b) }",
        (1, 4),
    ),
    "gemm-transposed": (
        "g (float[N,4] x) => (float[] y) <float[6,4] w, float[1,6] b>"
        "{ y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b) }",
        (1, 4),
    ),
    "gemm-one-bias": (
        "g (float[N,4] x) => (float[] y) <float[4,6] w, float[1] b> { y = Gemm(x, w, b) }",
        (1, 4),
    ),
    "matmul": (
        "g (float[N,5,4] x) => (float[] y) <float[4,6] w> { y = MatMul(x, w) }",
        (1, 5, 4),
    ),
}


def channel_axis(layer):
    return 1 if "Conv" in layer.op else -1


def along(values, array, axis):
    """Values in a shape that broadcasts over one axis of an array."""
    shape = [1] * array.ndim
    shape[axis] = -1
    return values.reshape(shape)


# ---------------------------------------------------------------------- parameters


def test_shared_parameters_are_copied():
    model = load(models.parse(CONVS))
    first, second = model.layers()
    assert not first.owns_params
    old = first.bias
    first.set_bias(old + 1)
    np.testing.assert_array_equal(second.bias, old)
    np.testing.assert_array_equal(first.bias, old + 1)
    assert first.owns_params
    assert first.bias_tensor.name == "b.first"
    second.set_bias(old - 1)
    assert second.bias_tensor.name == "b"
    model.check()


def test_weights_that_are_outputs_are_copied():
    proto = models.parse(DENSE)
    proto.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 6]))
    model = load(proto)
    [layer] = model.layers()
    old = layer.weight
    layer.set_weight(0 * old)
    layer.set_bias(layer.bias)
    outputs = run(model, {"x": np.ones((1, 4), np.float32)})
    np.testing.assert_array_equal(outputs["w"], old)
    np.testing.assert_array_equal(outputs["y"][0], layer.bias)


def test_bias_where_there_is_none():
    model = load(models.parse(DENSE.replace("w, b)", "w)")))
    [layer] = model.layers()
    assert layer.bias is None
    layer.set_bias(np.ones(6, np.float32))
    assert layer.bias_tensor.name == "Gemm_0.bias"
    model.check()


def test_bias_in_place_of_a_computed_one():
    model = load(
        models.parse(DENSE.replace("{ y = Gemm (x, w, b)", "{ c = Abs (b) y = Gemm (x, w, c)"))
    )
    [layer] = model.layers()
    assert layer.bias is None
    layer.set_bias(np.ones(6, np.float32))
    model.check()
    run(model, {"x": np.ones((1, 4), np.float32)})


def test_matmul_takes_no_bias():
    model = load(models.parse("g (float[N,4] x) => (float[N,6] y) <float[4,6] w> {y=MatMul(x,w)}"))
    with pytest.raises(ModelError, match="MatMul takes no bias"):
        model.layers()[0].set_bias(np.ones(6, np.float32))


@pytest.mark.parametrize(
    ("body", "side", "axis"),
    [
        ("y = MatMul (x, w)", 1, 1),
        ("y = MatMul (w, x)", 0, 0),
        ("y = Gemm (x, w)", 1, 1),
        ("y = Gemm <transB=1> (x, w)", 1, 0),
        ("y = Gemm (w, x)", 0, 0),
        ("y = Gemm <transA=1> (w, x)", 0, 1),
        ("y = MatMul (x, x)", None, None),
        ("v = Abs (w) y = MatMul (x, v)", None, None),
    ],
)
def test_layers(body, side, axis):
    model = load(models.parse(f"g (float[4,4] x) => (float[4,4] y) <float[4,4] w> {{ {body} }}"))
    layer = Layer.of(model, model.graph.nodes[-1])
    assert (layer and layer.side) == side
    assert (layer and layer.channel_axis) == axis
    if layer:
        assert layer.x.name == "x"


def test_taking_the_bias_takes_beta():
    text = (
        "g (float[N,4] x) => (float[] y) <float[4,6] w, float[6] b> { y = Gemm<beta=0.5>(x, w, b)}"
    )
    model = load(models.parse(text))
    [layer] = model.layers()
    bias = layer.take_bias()
    np.testing.assert_array_equal(bias, layer.bias.astype(np.float64) * 0.5)
    assert "beta" not in layer.node.attrs
    np.testing.assert_array_equal(layer.take_bias(), layer.bias)


def test_taking_a_bias_that_is_not_there():
    [layer] = load(models.parse(LAYERS["matmul"][0])).layers()
    np.testing.assert_array_equal(layer.take_bias(), [0.0])


# ---------------------------------------------------------------------- channels


@pytest.mark.parametrize("name", LAYERS)
def test_channels_are_counted(name):
    proto = models.parse(LAYERS[name][0])
    [layer] = load(proto).layers()
    feed = models.feeds(proto)
    axis = channel_axis(layer)
    assert layer.input_channels == feed["x"].shape[axis]
    assert layer.output_channels == run(proto, feed)["y"].shape[axis]


@pytest.mark.parametrize("name", LAYERS)
def test_scaled_outputs_scale_the_result(name):
    proto = models.parse(LAYERS[name][0])
    model, feed = load(proto), models.feeds(proto)
    [layer] = model.layers()
    scale = np.random.default_rng(3).uniform(-3, 3, layer.output_channels)
    layer.scale_outputs(scale)
    y = run(proto, feed)["y"]
    wanted = y * along(scale, y, channel_axis(layer))
    np.testing.assert_allclose(run(model, feed)["y"], wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", LAYERS)
def test_scaled_inputs_are_a_scaled_x(name):
    proto = models.parse(LAYERS[name][0])
    model, feed = load(proto), models.feeds(proto)
    [layer] = model.layers()
    scale = np.random.default_rng(3).uniform(-3, 3, layer.input_channels)
    layer.scale_inputs(scale)
    x = feed["x"]
    wanted = run(proto, {"x": (x * along(scale, x, channel_axis(layer))).astype(np.float32)})["y"]
    np.testing.assert_allclose(run(model, feed)["y"], wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", LAYERS)
def test_sums_over_inputs_are_what_a_constant_x_gives(name):
    text, sizes = LAYERS[name]
    proto = models.parse(text)
    if len(proto.graph.node[0].input) == 3:
        del proto.graph.node[0].input[2]
    [layer] = load(proto).layers()
    values, axis = np.arange(1.0, 1 + layer.input_channels), channel_axis(layer)
    x = np.zeros(sizes, np.float32)
    x += along(values, x, axis)
    y = np.moveaxis(run(proto, {"x": x})["y"], axis, -1)[0]
    if layer.op == "ConvTranspose":  # it spreads one position over the window
        y = y.sum(axis=tuple(range(y.ndim - 1)))
    found = layer.sum_over_inputs(layer.weight * layer.along_inputs(values))
    found = found * layer.node.attrs.get("alpha", 1.0)
    wanted = y.reshape(-1, layer.output_channels)
    np.testing.assert_allclose(found, wanted[0], rtol=1e-4, atol=1e-4)


def test_inputs_behind_a_flatten_are_scaled_by_channel():
    text = "g (float[N,3,2,2] x) => (float[] y) <float[12,5] w> { f = Flatten(x) y = MatMul(f, w) }"
    proto = models.parse(text)
    model, feed = load(proto), models.feeds(proto)
    scale = np.array([2.0, -3.0, 0.5])
    model.layers()[0].scale_inputs(scale)
    x = (feed["x"] * along(scale, feed["x"], 1)).astype(np.float32)
    np.testing.assert_allclose(run(model, feed)["y"], run(proto, {"x": x})["y"], atol=1e-5)


def test_scaling_leaves_other_readers_alone():
    model = load(models.parse(CONVS.replace("(r, v, b)", "(r, v, b) t = Conv(x, w)")))
    first, second, third = model.layers()
    weight, bias = first.weight, first.bias
    first.scale_outputs(np.arange(4.0))
    first.scale_inputs(np.arange(3.0))
    np.testing.assert_array_equal(third.weight, weight)
    np.testing.assert_array_equal(second.bias, bias)
    assert not first.weight[:, 0].any()
    assert not first.bias[0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "g (float[N,6,8] x) => (float[] y) <float[5,6] w> { y = MatMul(w, x) }",
            "the weight of MatMul_0 is on the left",
        ),
        (
            "g (float[2,6,8] x) => (float[] y) <float[2,8,5] w> { y = MatMul(x, w) }",
            "the weight of MatMul_0 is not a matrix",
        ),
        (
            "g (int32[N,4] x) => (int32[] y) <int32[4,3] w> { y = MatMul(x, w) }",
            "the weight of MatMul_0 is not in floating point",
        ),
        (
            "g (float[N,4] x, float[3] b) => (float[] y) <float[4,3] w> { y = Gemm(x, w, b) }",
            "the bias of Gemm_0 is computed",
        ),
    ],
)
def test_what_cannot_be_scaled(text, why):
    values = {"w": np.ones((4, 3))} if "int32" in text else {}
    [layer] = load(models.parse(text, **values)).layers()
    assert layer.unscalable == why
    for scale in (layer.scale_outputs, layer.scale_inputs):
        with pytest.raises(UnsupportedError, match=why):
            scale(np.ones(4))


@pytest.mark.parametrize(
    ("attributes", "padded"),
    [
        ("", False),
        ("<pads=[0,0,0,0]>", False),
        ("<pads=[0,0,0,1]>", True),
        ('<auto_pad="SAME_UPPER">', True),
        ('<auto_pad="SAME_LOWER">', True),
        ('<auto_pad="VALID">', False),
    ],
)
def test_padding(attributes, padded):
    text = "g (float[N,4,8,8] x) => (float[] y) <float[6,4,3,3] w> { y = Conv ATTRS (x, w) }"
    [layer] = load(models.parse(text.replace("ATTRS", attributes))).layers()
    assert layer.is_padded is padded


def test_windows_of_one_need_no_padding():
    text = (
        "g (float[N,4,8,8] x) => (float[] y) <float[6,4,1,1] w>"
        '{ y = Conv<auto_pad="SAME_UPPER">(x, w) }'
    )
    assert not load(models.parse(text)).layers()[0].is_padded


ADDENDS = {  # what follows m = MatMul(x, w) of shape [N, 5, 4] -> whether it is its bias
    "a = Add(m, b) y = Relu(a)": 1,
    "a = Add(row, m) y = Relu(a)": 0,
    "a = Add(m, one) y = Relu(a)": None,  # not per channel
    "a = Add(m, positions) y = Relu(a)": None,
    "a = Add(m, m) y = Relu(a)": None,
    "a = Sub(m, b) y = Relu(a)": None,
    "a = Add(m, b) y = Mul(a, m)": None,  # another reads it, too
    "s = Sigmoid(m) y = Add(m, s)": None,
    "y = Identity(m)": None,
}


@pytest.mark.parametrize("body", ADDENDS)
def test_the_add_that_is_the_bias_of_a_matmul(body):
    proto = models.parse(
        "g (float[N,5,3] x) => (float[] y) <float[3,4] w, float[4] b, float[1,1,4] row,"
        f" float[1] one, float[5,1] positions> {{ m = MatMul(x, w) {body} }}"
    )
    [layer] = load(proto).layers()
    addend = layer.addend
    assert (None if addend is None else addend[1]) == ADDENDS[body]
    assert addend is None or addend[0].op == "Add"


def test_a_matmul_has_no_bias_where_its_result_is_an_output():
    proto = models.parse(
        "g (float[N,3] x) => (float[] y, float[] m) <float[3,4] w, float[4] b>"
        "{ m = MatMul(x, w) y = Add(m, b) }"
    )
    assert load(proto).layers()[0].addend is None


def test_an_add_in_a_subgraph_is_left_alone():
    proto = models.parse(
        "g (float[N,3] x) => (float[] y) <float[3,4] w, float[4] b, bool t = {1}>"
        "{ m = MatMul(x, w) y = If(t) <"
        "then_branch = one () => (float[] p) { p = Add(m, b) },"
        " else_branch = two () => (float[] q) { q = Identity(b) }> }"
    )
    [layer] = load(proto).layers()
    assert [n.op for n in layer.y.outputs] == ["Add"]
    assert layer.addend is None
