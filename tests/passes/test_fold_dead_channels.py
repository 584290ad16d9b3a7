"""Dead channels folded away, the function kept."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given

from onnxq.analysis.error import compare
from onnxq.dead_channels import find_dead_channels
from onnxq.model import BatchNormStatistics, load
from onnxq.pass_manager import Context
from onnxq.passes import Clean, FoldBatchNorm, FoldDeadChannels
from onnxq.runtime import Session
from tests import models
from tests.checks import assert_same_function, ops, reasons, rewrite
from tests.models import parse

X = "g (float[N,3,9,9] x) => (float[] y)"
PAIR = "<float[4,3,3,3] w, float[4] b, float[5,4,3,3] v, float[5] d>"


def weight(shape, *dead, scale=1e-9, seed=0):
    """A random weight whose output channels `dead` are scaled down to about zero."""
    values = np.random.default_rng(seed).normal(size=shape)
    values[[*dead]] *= scale
    return values.astype(np.float32)


def folded(proto, **options):
    """The model after the pass, which must keep the function, and what was changed."""
    return rewrite(FoldDeadChannels(**options), proto)


def layer(model, name):
    """The layer that puts out a tensor."""
    return next(x for x in model.layers() if x.y.name == name)


def column(model, name, channel):
    """What a layer of one group reads of an input channel."""
    where = np.arange(layer(model, name).input_channels) == channel
    one = layer(model, name)
    return np.abs(np.where(one.along_inputs(where), one.weight, 0)).max()


# ---------------------------------------------------------------------- the rules


def test_what_is_left_of_a_dead_channel_goes_and_nothing_reads_it():
    proto = parse(
        f"{X} {PAIR} {{ c = Conv(x, w, b) r = Relu(c) y = Conv<pads=[1,1,1,1]>(r, v, d) }}",
        w=weight((4, 3, 3, 3), 1),
        b=[1, -2, 3, 4],
    )
    before = load(proto)
    model, changes = folded(proto)
    first, second = model.layers()
    assert not first.weight[1].any()
    assert not second.weight[:, 1].any()
    assert first.bias.tolist() == [1, 0, 3, 4]
    np.testing.assert_array_equal(second.bias, before.layers()[1].bias)
    kept = [0, 2, 3]
    np.testing.assert_array_equal(first.weight[kept], before.layers()[0].weight[kept])
    np.testing.assert_array_equal(second.weight[:, kept], before.layers()[1].weight[:, kept])
    assert not reasons(changes)


def test_a_constant_goes_into_the_next_bias():
    proto = parse(
        f"{X} {PAIR} {{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v, d) }}",
        w=weight((4, 3, 3, 3), 1),
        b=[1, 5, 3, 4],
    )
    before = load(proto).layers()[1]
    model, _ = folded(proto)
    first, second = model.layers()
    np.testing.assert_allclose(
        second.bias, before.bias + 5 * before.weight[:, 1].sum(axis=(1, 2)), 1e-6
    )
    assert not second.weight[:, 1].any()
    assert first.bias.tolist() == [1, 0, 3, 4]


def test_a_layer_without_a_bias_gets_one_where_it_has_to_take_a_constant():
    text = f"{X} {PAIR} {{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }}"
    for constant in (5, -5):
        proto = parse(text, w=weight((4, 3, 3, 3), 1), b=[1, constant, 3, 4])
        model, _ = folded(proto)
        assert (layer(model, "y").bias is not None) == (constant > 0)
        assert not column(model, "y", 1)


def test_a_dead_channel_without_a_bias_is_zero():
    proto = parse(
        f"{X} {PAIR} {{ c = Conv(x, w) r = LeakyRelu(c) y = Conv<pads=[2,0,2,0]>(r, v) }}",
        w=weight((4, 3, 3, 3), 2),
    )
    model, _ = folded(proto)
    assert [one.bias for one in model.layers()] == [None, None]
    assert not column(model, "y", 2)


@pytest.mark.parametrize("padding", ["pads=[0,0,0,1]", 'auto_pad="SAME_LOWER"'])
def test_a_padded_border_keeps_a_constant_that_is_not_zero(padding):
    proto = parse(
        f"{X} {PAIR} {{ c = Conv(x, w, b) r = Relu(c) y = Conv<{padding}>(r, v, d) }}",
        w=weight((4, 3, 3, 3), 0, 1, 2),
        b=[1, 5, -3, 4],
    )
    before = load(proto).layers()
    model, changes = folded(proto)
    first, second = model.layers()
    assert not first.weight[:3].any()
    assert first.bias.tolist() == [1, 5, 0, 4]
    np.testing.assert_array_equal(second.weight[:, :2], before[1].weight[:, :2])
    assert not second.weight[:, 2].any()
    assert "2 of its inputs are constant and not zero" in reasons(changes)[second.name]
    assert "zero-padded border" in reasons(changes)[second.name]


def test_every_reader_takes_what_it_can():
    proto = parse(
        f"{X} <float[4,3,1,1] w, float[4] b, float[5,4,3,3] v, float[5] d, float[5,4,3,3] u>"
        "{ c = Conv(x, w, b) r = Relu(c) p = Conv(r, v, d) q = Conv<pads=[1,1,1,1]>(r, u)"
        "  s = GlobalAveragePool(p) t = GlobalAveragePool(q) y = Add(s, t) }",
        w=weight((4, 3, 1, 1), 3),
        b=[1, 5, 3, 4],
    )
    model, changes = folded(proto)
    assert not column(model, "p", 3)
    assert column(model, "q", 3)
    assert layer(model, "c").bias[3] == 4
    assert [*reasons(changes)] == [layer(model, "q").name]


def test_a_depthwise_chain_is_folded_down_to_the_end():
    """A dead channel makes that of the depthwise convolution constant, whatever its weights."""
    w = weight((6, 3, 1, 1), 2)
    d = 300.0 * weight((6, 1, 3, 3))
    d[[0, 1, 3, 4, 5]] /= 300
    proto = parse(
        f"{X} <float[6,3,1,1] w, float[6] b, float[6,1,3,3] d, float[6] e, float[4,6,1,1] v,"
        " float[4] f, float[4,1,3,3] g, float zero = {0}, float six = {6}>"
        "{ c = Conv(x, w, b) r = Clip(c, zero, six) k = Conv<group=6, pads=[1,1,1,1]>(r, d, e)"
        "  q = Clip(k, zero, six) p = Conv(q, v, f) y = Conv<group=4>(p, g) }",
        w=w,
        d=d,
        b=[1, 1, -1, 1, 1, 1],
        e=[0, 0, 2.5, 0, 0, 0],
    )
    before = load(proto).layers()
    model, changes = folded(proto)
    _, depthwise, pointwise, _ = model.layers()
    assert not depthwise.weight[2].any()
    assert depthwise.bias[2] == 0
    assert not pointwise.weight[:, 2].any()
    np.testing.assert_allclose(
        pointwise.bias, before[2].bias + 2.5 * before[2].weight[:, 2, 0, 0], 1e-6
    )
    assert np.abs(depthwise.weight).max() < np.abs(d).max() / 50
    sizes = before[1].magnitudes[:, 0]
    what = f"weights up to {sizes[2] / np.median(sizes):.2g} times the median"
    assert f"{depthwise.name}: 1 of 6 channels dead, {what}" in changes.done
    assert changes.done[-1] == f"dead channels in all: 2, {what}"


GOES = {  # what lies between a dead channel, whose bias is 2, and the layer y
    "functions": "t = Sigmoid(c) r = Tanh(t)",
    "silu": "s = Sigmoid(c) r = Mul(c, s)",
    "hard-swish": "r = HardSwish(c)",
    "max-pool": "r = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(c)",
    "average-pool": "r = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1]>(c)",
    "norm": "r = BatchNormalization(c, n, n, n, var)",
    "resize": "r = Resize<mode=\"linear\">(c, , scales)",
    "added": "r = Add(c, n3)",
    "multiplied": "r = Mul(n3, c)",
    "both-constant": "e = Conv(x, w2, b2) r = Add(c, e)",
    "upsampled": "r = ConvTranspose<group=4>(c, w1, b2)",
}  # fmt: skip


@pytest.mark.parametrize("between", GOES)
def test_constants_go_through(between):
    text = (
        f"{X} <float[4,3,1,1] w, float[4] b, float[4,3,1,1] w2, float[4] b2, float[4,1,1,1] w1,"
        " float[4] n, float[4] var, float[4,1,1] n3, float[5,4,3,3] v,"
        f" float[4] scales = {{1,1,2,2}}> {{ c = Conv(x, w, b) {GOES[between]} y = Conv(r, v) }}"
    )
    proto = parse(text, w=weight((4, 3, 1, 1), 1), w2=weight((4, 3, 1, 1), 1, seed=1), b=2.0)
    model, changes = folded(proto)
    assert not column(model, "y", 1)
    assert layer(model, "c").bias[1] == 0
    assert not reasons(changes)


STAYS = {
    "added-to-what-varies": "e = Conv(x, w2) r = Add(c, e)",
    "padded-average": "r = AveragePool<kernel_shape=[2,2], pads=[1,1,1,1], count_include_pad=1>(c)",
    "padded": "r = Pad(c, border)",
    "picture": "r = Add(c, picture)",
    "softmax": "r = Softmax<axis=1>(c)",
    "interleaved": "s = Reshape(c, two) t = Transpose<perm=[0,2,1,3,4]>(s) r = Reshape(t, back)",
    "taken-as-a-bias": "m = ReduceMax<axes=[0,2,3], keepdims=0>(c) r = Conv(x, w2, m)",
}


@pytest.mark.parametrize("between", STAYS)
def test_constants_stop_where_they_would_not_be_constant(between):
    text = (
        f"{X} <float[4,3,1,1] w, float[4] b, float[4,3,1,1] w2, float[9,9] picture,"
        " float[5,4,3,3] v, int64[8] border = {0,0,1,1,0,0,1,1},"
        " int64[5] two = {0,2,2,9,9}, int64[4] back = {0,4,9,9}>"
        f"{{ c = Conv(x, w, b) {STAYS[between]} y = Conv(r, v) }}"
    )
    proto = parse(text, w=weight((4, 3, 1, 1), 1), b=2.0)
    model, _ = folded(proto)
    assert not layer(model, "c").weight[1].any()
    assert layer(model, "c").bias[1] == 2
    assert column(model, "y", 1)


def test_concat_and_split_pass_every_channel_on():
    proto = parse(
        f"{X} <float[4,3,1,1] w, float[4] b, float[2,3,1,1] u, float[6] s, float[3,2,1,1] v,"
        " float[3,4,1,1] t, int64[2] sizes = {2,4}>"
        "{ c = Conv(x, w, b) e = Conv(x, u) j = Concat<axis=1>(e, c) r = Relu(j)"
        "  p, q = Split<axis=1>(r, sizes) f = Conv(p, v) g = Conv(q, t) y = Add(f, g) }",
        w=weight((4, 3, 1, 1), 0, 3),
        u=weight((2, 3, 1, 1), 1),
        b=[3, 1, 1, -1],
    )
    model, _ = folded(proto)
    assert not column(model, "f", 1)
    assert layer(model, "f").bias is None
    assert not column(model, "g", 0)
    assert not column(model, "g", 3)
    assert layer(model, "g").bias is not None
    assert layer(model, "c").bias.tolist() == [0, 1, 1, 0]


def test_groups_read_their_own_channels():
    proto = parse(
        f"{X} <float[6,3,1,1] w, float[6] b, float[4,3,3,3] v, float[4] d>"
        "{ c = Conv(x, w, b) r = Relu(c) y = Conv<group=2>(r, v, d) }",
        w=weight((6, 3, 1, 1), 1, 5),
        b=[1, 2, 1, 1, 1, 3],
    )
    before = load(proto).layers()[1]
    model, _ = folded(proto)
    wanted = before.bias + np.append(
        2 * before.weight[:2, 1].sum(axis=(1, 2)), 3 * before.weight[2:, 2].sum(axis=(1, 2))
    )
    np.testing.assert_allclose(layer(model, "y").bias, wanted, 1e-5)


def test_transposed_convolutions():
    text = (
        f"{X} <float[4,3,1,1] w, float[4] b, float[4,3,2,2] v, float[6] d, float[2,6,1,1] u>"
        "{ c = Conv(x, w, b) r = Relu(c) t = ConvTranspose<group=2, strides=[2,2]>(r, v, d)"
        "  q = Relu(t) y = Conv(q, u) }"
    )
    w = weight((4, 3, 1, 1), 1)
    v = weight((4, 3, 2, 2))
    v[2:, 1] = 1e-9  # the output channel 4
    d = [1, 1, 1, 1, 2, 1]
    model, changes = folded(parse(text, w=w, v=v, b=[1, -1, 1, 1], d=d))
    assert not column(model, "t", 1)
    assert not layer(model, "t").weight[2:, 1].any()
    assert layer(model, "t").bias.tolist() == [1, 1, 1, 1, 0, 1]
    assert not column(model, "y", 4)
    assert not reasons(changes)

    model, changes = folded(parse(text, w=w, v=v, b=[1, 1, 1, 1], d=d))
    assert column(model, "t", 1)
    assert layer(model, "c").bias[1] == 1
    assert "(ConvTranspose)" in reasons(changes)[layer(model, "t").name]


GEMMS = {
    "alpha": "y = Gemm<alpha=0.5>(r, v, d)",
    "beta": "y = Gemm<beta=0.5>(r, v, d)",
    "one bias": "y = Gemm<beta=2.0>(r, v, one)",
    "a row": "y = Gemm(r, v, row)",
    "no bias": "y = Gemm<alpha=3.0>(r, v)",
    "transposed": "y = Gemm<transB=1>(r, u, d)",
}


@pytest.mark.parametrize("gemm", GEMMS)
def test_gemm(gemm):
    text = (
        "g (float[N,6] x) => (float[] y) <float[6,4] w, float[4] b, float[4,3] v, float[3,4] u,"
        " float[3] d, float[1] one, float[1,3] row>"
        f"{{ c = Gemm(x, w, b) r = Relu(c) {GEMMS[gemm]} }}"
    )
    w = weight((4, 6), 1, 2).T
    model, changes = folded(parse(text, w=w, b=[1, 2, -2, 1]))
    assert not column(model, "y", 1)
    assert not column(model, "y", 2)
    assert layer(model, "c").bias.tolist() == [1, 0, 0, 1]
    assert not reasons(changes)


def test_every_position_of_a_flattened_channel():
    proto = parse(
        "g (float[N,3,4,4] x) => (float[] y)"
        "<float[2,3,3,3] w, float[2] b, float[8,5] v, float[5] d>"
        "{ c = Conv(x, w, b) r = Relu(c) f = Flatten(r) y = Gemm(f, v, d) }",
        w=weight((2, 3, 3, 3), 1),
        b=[1, 2],
    )
    before = load(proto).layers()[1]
    model, _ = folded(proto)
    np.testing.assert_allclose(
        layer(model, "y").bias, before.bias + 2 * before.weight[4:].sum(axis=0), 1e-5
    )
    assert not layer(model, "y").weight[4:].any()
    assert layer(model, "c").bias.tolist() == [1, 0]


def test_the_bias_of_a_matmul_is_the_add_behind_it():
    proto = parse(
        "g (float[N,7,6] x) => (float[] y) <float[6,4] w, float[4] b, float[4,3] v, float[1,1,3] d>"
        "{ c = MatMul(x, w) a = Add(b, c) r = Relu(a) m = MatMul(r, v) y = Add(m, d) }",
        w=weight((4, 6), 1).T,
        b=[1, 2, 1, 1],
        d=1.0,
    )
    before = load(proto)
    model, changes = folded(proto)
    first, second = (n for n in model.graph.nodes if n.op == "Add")
    assert model.array(first.inputs[0]).tolist() == [1, 0, 1, 1]
    wanted = 1 + 2 * before.layers()[1].weight[1]
    np.testing.assert_allclose(model.array(second.inputs[1]), wanted.reshape(1, 1, 3), 1e-6)
    assert not column(model, "m", 1)
    assert not reasons(changes)


def test_a_matmul_without_an_add_takes_zeros_only():
    text = (
        "g (float[N,7,6] x) => (float[] y) <float[6,4] w, float[4] b, float[4,3] v>"
        "{ c = MatMul(x, w) a = Add(c, b) r = Relu(a) y = MatMul(r, v) }"
    )
    model, changes = folded(parse(text, w=weight((4, 6), 1, 2).T, b=[1, 2, -2, 1]))
    assert column(model, "y", 1)
    assert not column(model, "y", 2)
    assert "no Add of constants" in reasons(changes)[layer(model, "y").name]
    [add] = (n for n in model.graph.nodes if n.op == "Add")
    assert model.array(add.inputs[1]).tolist() == [1, 2, 0, 1]


def test_channels_that_nothing_reads_go_back_to_their_beginning():
    v = weight((4, 6, 1, 1))
    v[:, [0, 4]] = 0
    proto = parse(
        f"{X} <float[6,3,3,3] w, float[6] b, float[6,1,3,3] d, float[6] e, float[4,6,1,1] v>"
        "{ c = Conv(x, w, b) r = Sigmoid(c) k = Conv<group=6, pads=[1,1,1,1]>(r, d, e)"
        "  m = MaxPool<kernel_shape=[2,2]>(k) y = Conv(m, v) }",
        v=v,
    )
    model, changes = folded(proto)
    for one in model.layers()[:2]:
        assert not one.weight[[0, 4]].any()
        assert not one.bias[[0, 4]].any()
        assert one.weight[[1, 2, 3, 5]].all()
    assert any("2 of 6 channels dead" in what for what in changes.done)


def test_a_channel_is_read_as_long_as_one_reads_it():
    v, u = weight((4, 4, 1, 1)), weight((4, 4, 1, 1))
    v[:, [0, 1]] = 0
    u[:, [1, 2]] = 0
    text = (
        "<float[4,3,1,1] w, float[4] b, float[4,4,1,1] v, float[4,4,1,1] u>"
        "{ c = Conv(x, w, b) r = Relu(c) p = Conv(r, v) q = Conv(r, u) y = Add(p, q) }"
    )
    model, _ = folded(parse(f"{X} {text}", v=v, u=u))
    dead = ~layer(model, "c").weight.any(axis=(1, 2, 3))
    assert dead.tolist() == [False, True, False, False]

    _, changes = folded(parse(f"{X.replace('y)', 'y, float[] r)')} {text}", v=v, u=u))
    assert not changes


def test_a_gate_of_a_dead_channel_is_not_computed():
    proto = parse(
        f"{X} <float[4,3,1,1] w, float[4,3,1,1] g, float[4] h, float[5,4,3,3] v>"
        "{ c = Conv(x, w) p = GlobalAveragePool(x) f = Conv(p, g, h) s = Sigmoid(f)"
        "  m = Mul(c, s) y = Conv<pads=[1,1,1,1]>(m, v) }",
        w=weight((4, 3, 1, 1), 2),
    )
    model, _ = folded(proto)
    assert not column(model, "y", 2)
    assert not layer(model, "f").weight[2].any()
    assert layer(model, "f").bias[2] == 0
    assert layer(model, "f").bias[[0, 1, 3]].all()


def test_one_zero_factor_is_enough_but_it_stays_zero():
    """A product that is read keeps one of the two factors that make it zero."""
    proto = parse(
        f"{X} <float[4,3,1,1] w, float[4] b, float[4,3,1,1] u, float[4] d>"
        "{ c = Conv(x, w, b) e = Conv(x, u, d) y = Mul(c, e) }",
        w=weight((4, 3, 1, 1), 0, 1, scale=0),
        u=weight((4, 3, 1, 1), 1, 2, scale=0),
        b=[0, 0, 1, 1],
        d=[5, 5, 0, 1],
    )
    model, _ = folded(proto)
    assert layer(model, "e").bias.tolist() == [0, 0, 0, 1]
    assert not layer(model, "e").weight[0].any()
    assert not layer(model, "c").weight[2].any()
    assert layer(model, "c").bias.tolist() == [0, 0, 0, 1]


def test_of_two_zeros_one_is_kept_even_where_zero_weights_would_not_give_zero():
    proto = parse(
        f"{X} <float[4,3,1,1] w, float[4] b, float[4,3,1,1] u, float[4] d>"
        "{ c = Conv(x, w, b) p = HardSigmoid(c) e = Conv(x, u, d) q = HardSigmoid(e)"
        "  y = Mul(p, q) }",
        w=weight((4, 3, 1, 1), 1),
        u=weight((4, 3, 1, 1), 1, seed=1),
        b=[1, -9, 1, 1],
        d=[1, -8, 1, 1],
    )
    model, _ = folded(proto)
    assert layer(model, "c").bias.tolist() == [1, -9, 1, 1]
    assert layer(model, "e").bias.tolist() == [1, 0, 1, 1]


def test_a_normalization_without_a_scale_reads_nothing():
    proto = parse(
        f"{X} <float[4,3,1,1] w, float[4] b, float[4] gamma, float[4] n, float[4] var,"
        " float[5,4,3,3] v>"
        "{ c = Conv(x, w, b) m = BatchNormalization(c, gamma, n, n, var)"
        "  y = Conv<pads=[1,1,1,1]>(m, v) }",
        gamma=[1, 1, 0, 1],
    )
    model, _ = folded(proto)
    assert np.flatnonzero(layer(model, "c").weight.any(axis=(1, 2, 3))).tolist() == [0, 1, 3]
    assert layer(model, "c").bias[2] == 0
    assert column(model, "y", 2)


def test_channels_side_by_side_are_all_read():
    proto = parse(
        f"{X} <float[4,3,1,1] w, float[4,3,1,1] u, float[5,4,3,3] v>"
        "{ c = Conv(x, w) e = Conv(x, u) j = Concat<axis=3>(c, e) y = Conv(j, v) }",
        w=weight((4, 3, 1, 1), 0, 1),
        u=weight((4, 3, 1, 1), 1, 2, seed=1),
    )
    model, _ = folded(proto)
    assert [bool(column(model, "y", i)) for i in range(4)] == [True, False, True, True]
    assert layer(model, "e").weight[[0, 3]].all()


# ---------------------------------------------------------------------- what is left alone


def test_outputs_and_subgraphs_keep_their_constants():
    proto = parse(
        "g (float[N,3,5,5] x) => (float[] y, float[] c) <float[4,3,1,1] w, float[4] b,"
        " float[2,4,1,1] v> { c = Conv(x, w, b) y = Conv(c, v) }",
        w=weight((4, 3, 1, 1), 1),
        b=2.0,
    )
    model, _ = folded(proto)
    assert not layer(model, "c").weight[1].any()
    assert layer(model, "c").bias[1] == 2
    assert not column(model, "y", 1)

    proto = parse(
        "g (float[N,3,5,5] x) => (float[] y, float[] z) <float[4,3,1,1] w, float[4] b,"
        " float[2,4,1,1] v, bool t = {1}> { c = Conv(x, w, b) y = Conv(c, v) z = If(t) <"
        "then_branch = one () => (float[] p) { p = Relu(c) },"
        " else_branch = two () => (float[] q) { q = Identity(c) }> }",
        w=weight((4, 3, 1, 1), 1),
        b=2.0,
    )
    model, _ = folded(proto)
    assert layer(model, "c").bias[1] == 2
    assert not column(model, "y", 1)


REFUSED = {
    "shared": (
        f"{X} <float[3,3,1,1] w> {{ c = Conv(x, w) r = Relu(c) y = Conv(r, w) }}",
        "shares its parameters",
    ),
    "computed": (
        "g (float[N,3,9,9] x, float[3] b) => (float[] y) <float[3,3,1,1] w, float[3,3,1,1] v>"
        "{ c = Conv(x, w, b) y = Conv(c, v) }",
        "is computed",
    ),
    "left": (
        "g (float[3,4] x) => (float[] y) <float[3,3] w, float[4,2] v>"
        "{ c = MatMul(w, x) y = MatMul(c, v) }",
        "is on the left",
    ),
    "bias per row": (
        "g (float[4,3] x) => (float[] y) <float[3,3] w, float[4,1] b, float[3,2] v>"
        "{ c = Gemm<transB=1>(x, w, b) y = MatMul(c, v) }",
        "not one value per channel",
    ),
    "transposed": (
        "g (float[3,4] x) => (float[] y) <float[3,3] w, float[3,2] v>"
        "{ c = Gemm<transA=1, transB=1>(x, w) y = MatMul(c, v) }",
        "reads its input transposed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_cannot_be_edited_are_named(name):
    text, why = REFUSED[name]
    shape = (3, 3, 1, 1) if "3,3,1,1" in text else (3, 3)
    _, changes = folded(parse(text, w=weight(shape, 1)))
    assert not changes
    assert any(why in reason for reason in reasons(changes).values()), reasons(changes)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_left_alone(broken):
    w = weight((4, 3, 1, 1), 1)
    w[0, 0] = broken
    proto = parse(
        f"{X} <float[4,3,1,1] w, float[2,4,1,1] v> {{ c = Conv(x, w) y = Conv(c, v) }}", w=w
    )
    model = load(proto)
    changes = FoldDeadChannels().apply(model, Context())
    assert not changes
    assert "not finite" in reasons(changes)[layer(model, "c").name]


def test_weights_of_size_zero_are_left_alone():
    proto = parse(
        "g (float[N,3] x) => (float[] y) <float[3,0] w, float[0,2] v>"
        "{ c = MatMul(x, w) y = MatMul(c, v) }"
    )
    changes = FoldDeadChannels().apply(load(proto), Context())
    assert not changes
    assert all("is empty" in why for why in reasons(changes).values())
    assert len(changes.skipped) == 2


def test_a_model_without_dead_channels_stays():
    proto = parse(f"{X} {PAIR} {{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v, d) }}")
    _, changes = folded(proto)
    assert not changes
    assert not changes.skipped


# ---------------------------------------------------------------------- what counts as zero


def test_about_zero_is_a_share_of_the_median():
    text = f"{X} {PAIR} {{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v, d) }}"
    w = np.ones((4, 3, 3, 3), np.float32) * np.reshape([1, 3, 5, 3e-4], (4, 1, 1, 1))
    proto = parse(text, w=w)
    assert not FoldDeadChannels().apply(load(proto), Context())
    assert not FoldDeadChannels(negligible=0.9e-4).apply(load(proto), Context())
    model = load(proto)
    assert FoldDeadChannels(negligible=1.1e-4).apply(model, Context())
    assert not layer(model, "c").weight[3].any()


def test_most_channels_may_be_dead():
    proto = parse(
        f"{X} <float[9,3,1,1] w, float[9] b, float[2,9,1,1] v>"
        "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }",
        w=weight((9, 3, 1, 1), *range(1, 8), scale=1e-38),
    )
    model, changes = folded(proto)
    assert np.flatnonzero(layer(model, "c").weight.any(axis=(1, 2, 3))).tolist() == [0, 8]
    assert "7 of 9 channels dead" in changes.done[0]


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_all_channels_may_be_dead(scale):
    """Nothing to compare with: weights that are all alike are what they are."""
    proto = parse(
        f"{X} {PAIR} {{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v, d) }}",
        w=weight((4, 3, 3, 3), 0, 1, 2, 3, scale=scale),
        b=[1, -1, 2, 0],
    )
    model, _ = folded(proto)
    assert all(np.isfinite(one.weight).all() for one in model.layers())
    assert all(np.isfinite(one.bias).all() for one in model.layers())
    assert layer(model, "y").weight.any() == (scale > 0)
    assert layer(model, "c").bias.any() == (scale > 0)


def test_the_largest_option_does_no_harm():
    proto = parse(f"{X} {PAIR} {{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v, d) }}")
    model = load(proto)
    FoldDeadChannels(negligible=100.0).apply(model, Context())
    assert all(np.isfinite(one.bias).all() for one in model.layers())
    assert not any(one.weight.any() for one in model.layers())


def test_half_precision():
    proto = parse(
        "g (float16[N,3,5,5] x) => (float16[] y) <float16[4,3,1,1] w, float16[4] b,"
        " float16[2,4,1,1] v> { c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }",
        w=weight((4, 3, 1, 1), 1, scale=0),
        b=[1, 2, 1, 1],
    )
    before = load(proto).layers()[1]
    model = load(proto)
    FoldDeadChannels().apply(model, Context())
    assert layer(model, "y").bias.dtype == np.float16
    np.testing.assert_allclose(layer(model, "y").bias, 2 * before.weight[:, 1, 0, 0], 1e-3)
    assert_same_function(proto, model, tol=2e-3)


# ---------------------------------------------------------------------- statistics


def test_statistics_of_batch_norms_say_what_became_constant():
    proto = parse(
        f"{X} <float[4,3,1,1] w, float[4] gamma, float[4] beta, float[4] mean, float[4] var,"
        " float[4,4,3,3] v>"
        "{ c = Conv(x, w) n = BatchNormalization(c, gamma, beta, mean, var) r = Relu(n)"
        "  y = Conv<pads=[1,1,1,1]>(r, v) }",
        w=weight((4, 3, 1, 1), 1, 2),
        mean=[1, 2, 3, 4],
        var=1.0,
        gamma=[1, 0.5, 2, 1],
        beta=[1, 2.5, 3, 1],
    )
    model = load(proto)
    FoldBatchNorm().apply(model, Context())
    assert model.batch_norms["n"].gamma.tolist() == [1, 0.5, 2, 1]
    FoldDeadChannels().apply(model, Context())
    known = model.batch_norms["n"]
    assert isinstance(known, BatchNormStatistics)
    assert known.gamma.tolist() == [1, 0, 0, 1]
    # (0 - 2) 0.5 + 2.5; (0 - 3) 2 + 3 is cut off by Relu and so is read by nothing
    np.testing.assert_allclose(known.beta, [1, 1.5, 0, 1], 1e-4)
    assert known.gamma.dtype == known.beta.dtype == np.float32
    assert_same_function(proto, model)


# ---------------------------------------------------------------------- random and real models


@given(models.chains_with_dead_channels())
def test_random_chains_keep_their_function(proto):
    model, changes = folded(proto)
    assert ops(model) == ops(proto)
    model.infer()
    found = find_dead_channels(model)
    for channels in found.layers:  # what is said not to be read changes nothing
        one, unread = channels.layer, ~channels.read
        assert not one.weight[np.broadcast_to(one.along_outputs(unread), one.weight.shape)].any()
        noise = np.where(one.along_outputs(unread), 3.0, one.weight)
        one.set_weight(noise.astype(np.float32))
        one.set_bias(np.where(unread, -1.0, channels.bias).astype(np.float32))
    assert_same_function(proto, model)
    assert bool(changes) == bool(changes.done)


@given(models.chains_with_dead_channels())
def test_folded_normalization_stays_described(proto):
    model = load(proto)
    FoldBatchNorm(standalone="conv").apply(model, Context())
    before = model.to_proto()
    FoldDeadChannels().apply(model, Context())
    model.check()
    assert_same_function(before, model)
    assert not FoldDeadChannels().apply(load(model.to_proto()), Context())
    names = [n for n, known in model.batch_norms.items() if (known.gamma == 0).any()]
    session = Session(model.to_proto(names), outputs=names)
    for name, array in session.run(models.feeds(before)).items():
        known = model.batch_norms[name]
        rows = np.moveaxis(array, 1, 0).reshape(known.gamma.size, -1)
        still = known.gamma == 0
        assert np.abs(rows[still] - known.beta[still, None]).max() < 1e-4


DEAD = {
    "cifar_resnet20": 1,
    "espcn_x3": 1,
    "espnet_camvid": 232,
    "mobilenetv1_075": 42,
    "mobilenetv2": 12,
    "vww_mobilenetv1_025": 1531,
}


def pictures(name, folder):
    """A few real samples of a zoo model."""
    source = models.zoo(name)
    script = source.parent.parent / "calib.py"
    command = [sys.executable, script, source, folder, "--limit", "4"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    files = sorted(folder.glob("*.npz"))
    assert files
    return [dict(np.load(file)) for file in files]


def steps(model, name):
    """Largest weight of a layer over the median of its channels: what one scale has to span."""
    one = next(x for x in model.layers() if x.name == name)
    sizes = one.magnitudes.max(axis=1)
    return sizes.max() / np.median(sizes[sizes > 0])


@pytest.mark.zoo
@pytest.mark.parametrize("name", models.ZOO)
def test_zoo_models_keep_their_function_on_real_samples(name, tmp_path):
    model = load(models.zoo(name))
    Clean().apply(model, Context())
    FoldBatchNorm(standalone="conv").apply(model, Context())
    before = model.clone()
    changes = FoldDeadChannels().apply(model, Context())
    assert bool(changes) == (name in DEAD)
    if not changes:
        return
    assert changes.done[-1].startswith(f"dead channels in all: {DEAD[name]},")
    assert not FoldDeadChannels().apply(load(model.to_proto()), Context())
    sessions = [Session(m.to_proto(), threads=1, level="disabled") for m in (before, model)]
    for error in compare(*sessions, pictures(name, tmp_path)):
        assert error.sqnr_db > 100
    if name == "mobilenetv1_075":
        for depthwise in ("conv_dw_1", "conv_dw_2"):
            assert steps(before, depthwise) > 50
            assert steps(model, depthwise) < 15
