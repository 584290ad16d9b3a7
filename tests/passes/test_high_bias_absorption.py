"""High biases absorbed: the function stays where channels are above what is taken off."""

import numpy as np
import pytest

from onnxq.analysis.distribution import propagate, shapes_of
from onnxq.errors import RecipeError
from onnxq.model import BatchNormStatistics, load
from onnxq.pass_manager import Context
from onnxq.passes import CrossLayerEqualization, FoldBatchNorm, HighBiasAbsorption
from onnxq.passes.high_bias_absorption import _border_error
from tests import models
from tests.checks import assert_same_function, ops, reasons, run
from tests.models import parse

X = "g (float[N,3,9,9] x) => (float[] y)"
W = "float[4,3,1,1] w, float[4] b"
FIRST = "c = Conv(x, w, b)"

# what is taken off each channel, at most
C = np.array([1.5, 0.0, 4.0, 2.0])
GAMMA = np.array([0.5, 1.0, -0.1, 0.2])

CHAINS = {
    "pair": f"{X} <{W}, float[5,4,3,3] v, float[5] d> {{ {FIRST} r = Relu(c) y = Conv(r, v, d) }}",
    "no-activation": f"{X} <{W}, float[5,4,1,1] v> {{ {FIRST} y = Conv(c, v) }}",
    "depthwise": f"{X} <{W}, float[8,1,2,2] v, float[8] d>"
    f"{{ {FIRST} r = Relu(c) y = Conv<group=4, strides=[2,2]>(r, v, d) }}",
    "grouped": f"{X} <{W}, float[6,2,2,2] v>"
    f"{{ {FIRST} r = Relu(c) y = Conv<group=2, dilations=[2,2]>(r, v) }}",
    "leaky": f"{X} <{W}, float[5,4,1,1] v> {{ {FIRST} r = LeakyRelu(c) y = Conv(r, v) }}",
    "prelu": f"{X} <{W}, float[4,1,1] s, float[5,4,1,1] v>"
    f"{{ {FIRST} r = PRelu(c, s) y = Conv(r, v) }}",
    "min": f"{X} <{W}, float[4,1,1] m = {{3, 4, 5, 1}}, float[5,4,1,1] v>"
    f"{{ {FIRST} r = Relu(c) q = Min(r, m) y = Conv(q, v) }}",
    "clip": f"{X} <{W}, float lo = {{0}}, float hi = {{1000}}, float[5,4,1,1] v>"
    f"{{ {FIRST} r = Clip(c, lo, hi) y = Conv(r, v) }}",
    "pools": f"{X} <{W}, float[5,4,1,1] v>"
    f"{{ {FIRST} r = Relu(c) m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(r)"
    " a = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(m) g = GlobalAveragePool(a)"
    " y = Conv(g, v) }",
    "mean": f"{X} <{W}, float[4,5] v, float[5] d>"
    f"{{ {FIRST} r = Relu(c) m = ReduceMean<axes=[2,3], keepdims=0>(r) y = Gemm(m, v, d) }}",
    "concat": f"{X} <{W}, float[2,3,1,1] u, float[5,6,1,1] v>"
    f"{{ {FIRST} o = Conv(x, u) j = Concat<axis=1>(o, c) r = Relu(j) y = Conv(r, v) }}",
    "dense": f"{X} <{W}, float[5,8,1,1] v>"
    f"{{ {FIRST} r = Relu(c) j = Concat<axis=1>(r, c) y = Conv(j, v) }}",
    "split": f"{X} <{W}, int64[2] s = {{1, 3}}, float[5,3,1,1] v, float[5,1,1,1] u>"
    f"{{ {FIRST} p, q = Split<axis=1>(c, s) r = Relu(q) d = Conv(r, v) e = Conv(p, u)"
    " y = Add(d, e) }",
    "slice": f"{X} <{W}, int64[1] st = {{1}}, int64[1] en = {{9}}, int64[1] ax = {{3}},"
    "int64[1] sp = {2}, float[5,4,1,1] v>"
    f"{{ {FIRST} s = Slice(c, st, en, ax, sp) r = Relu(s) y = Conv(r, v) }}",
    "resize": f"{X} <{W}, float[4] s = {{1, 1, 2, 2}}, float[5,4,1,1] v>"
    f'{{ {FIRST} r = Relu(c) z = Resize<mode="linear">(r, , s) y = Conv(z, v) }}',
    "flatten": f"{X} <{W}, float[324,5] v, float[5] d>"
    f"{{ {FIRST} r = Relu(c) f = Flatten(r) y = Gemm<alpha=0.5, beta=2.0>(f, v, d) }}",
    "add-and-two-readers": f"{X} <{W}, float[4,3,1,1] u, float[5,4,1,1] v, float[5,4,1,1] k>"
    f"{{ {FIRST} o = Conv(x, u) a = Add(o, c) d = Conv(a, v) r = Relu(c) e = Conv(r, k)"
    " y = Add(d, e) }",
    "add-a-constant": f"{X} <{W}, float[4,1,1] k, float[5,4,1,1] v>"
    f"{{ {FIRST} a = Add(k, c) s = Sub(a, k) r = Relu(s) y = Conv(r, v) }}",
    "shape": f"{X} <{W}, float[5,4,1,1] v>"
    f"{{ {FIRST} s = Shape(c) q = Reshape(c, s) r = Relu(q) y = Conv(r, v) }}",
    "gemm": "g (float[N,3] x) => (float[] y) <float[4,3] w, float[4] b, float[4,5] v>"
    "{ c = Gemm<transB=1>(x, w, b) r = Relu(c) y = Gemm(r, v) }",
    "conv-1d": "g (float[N,3,9] x) => (float[] y) <float[4,3,2] w, float[4] b, float[5,4,3] v>"
    f"{{ {FIRST} r = Relu(c) y = Conv(r, v) }}",
    "transposed-first": f"{X} <float[6,2,2,2] u, float[4] b, float[5,4,1,1] v>"
    "{ g = Concat<axis=1>(x, x) c = ConvTranspose<group=2>(g, u, b) r = Relu(c)"
    " y = Conv(r, v) }",
}


def shifted(proto, low, feed):
    """The model, its first bias such that each channel of c is just above `low` on the feed."""
    model = load(proto)
    layer = next(node for node in model.layers() if node.y.name == "c")
    c = run(model.to_proto(["c"]), feed)["c"]
    least = c.min(tuple(i for i in range(c.ndim) if i != 1))
    layer.set_bias((layer.bias + low - least).astype(np.float32))
    return model


def known(model, low, gamma=GAMMA):
    """Statistics by which channels of c are above `low`, three deviations below the mean."""
    beta = low + 3 * np.abs(gamma)
    model.batch_norms["c"] = BatchNormStatistics(gamma.astype(np.float32), beta.astype(np.float32))


@pytest.mark.parametrize("name", CHAINS)
def test_the_function_stays_where_channels_are_above(name):
    proto = parse(CHAINS[name])
    feed = models.feeds(proto)
    # channel 1 may fall below zero: nothing can be taken off it
    model = shifted(proto, np.array([1.6, -1.0, 4.1, 2.1]), feed)
    known(model, np.array([1.5, -1.0, 4.0, 2.0]))
    given = model.to_proto()
    old = next(node for node in model.layers() if node.y.name == "c").bias.copy()
    changes = HighBiasAbsorption(amount="whole").apply(model, Context())
    model.check()
    assert len(changes.done) == 1
    wanted = np.minimum(C, [3, 4, 5, 1]) if name == "min" else C
    layer = next(node for node in model.layers() if node.y.name == "c")
    np.testing.assert_allclose(old - layer.bias, wanted, atol=1e-5)
    np.testing.assert_allclose(
        model.batch_norms["c"].beta, np.array([3.0, 2.0, 4.3, 2.6]) - wanted, atol=1e-5
    )
    assert_same_function(given, model, tol=1e-5, feed=feed)
    after = run(model.to_proto(["c"]), feed)["c"]
    before = run(load(given).to_proto(["c"]), feed)["c"]
    assert after.max() < before.max() - 1


def test_bounds_move_along():
    proto = parse(CHAINS["min"])
    model = shifted(proto, np.array([1.6, -1.0, 4.1, 2.1]), models.feeds(proto))
    known(model, np.array([1.5, -1.0, 4.0, 2.0]))
    HighBiasAbsorption(amount="whole").apply(model, Context())
    [node] = [n for n in model.graph.nodes if n.op == "Min"]
    bounds = model.array(node.inputs[1])
    np.testing.assert_allclose(bounds.reshape(-1), [1.5, 4, 1, 0], atol=1e-6)


def test_relu6_through_equalization_first():
    """Clip becomes Relu and Min by equalization; then the bounds move."""
    proto = parse(
        f"{X} <{W}, float lo = {{0}}, float hi = {{6}}, float[5,4,1,1] v>"
        f"{{ {FIRST} r = Clip(c, lo, hi) y = Conv(r, v) }}"
    )
    feed = models.feeds(proto)
    model = shifted(proto, np.array([1.6, -1.0, 4.1, 2.1]), feed)
    known(model, np.array([1.5, -1.0, 4.0, 2.0]))
    given = model.to_proto()
    CrossLayerEqualization().apply(model, Context([feed]))
    assert "Min" in ops(model)
    assert HighBiasAbsorption(amount="whole").apply(model, Context())
    assert_same_function(given, model, tol=1e-5, feed=feed)


def test_residual_sums_limit_what_is_taken_off():
    """Of relu(a + c) only what both together are always above can be taken off."""
    proto = parse(
        f"{X} <{W}, float[4,3,1,1] u, float[4] e, float[5,4,1,1] v>"
        f"{{ {FIRST} o = Conv(x, u, e) a = Add(o, c) r = Relu(a) y = Conv(r, v) }}"
    )
    model = load(proto)
    low = np.array([5.0, 5.0, 5.0, 5.0])
    known(model, low, np.full(4, 0.3))
    model.batch_norms["o"] = BatchNormStatistics(
        np.full(4, 0.4, np.float32), np.array([0, -1, -20, 3], np.float32)
    )
    old = [layer.bias.copy() for layer in model.layers()[:2]]
    HighBiasAbsorption(amount="whole").apply(model, Context())
    # the sum is N(5.9 + beta, 0.5^2): above 4.4 + beta; then the other branch finds 0 left
    limit = np.maximum(np.minimum(low, [4.4, 3.4, 0.0, 7.4]), 0)
    first, second = (layer.bias for layer in model.layers()[:2])
    np.testing.assert_allclose(old[0] - first, limit, atol=1e-5)
    np.testing.assert_allclose(old[1] - second, [0, 0, 0, 1.8], atol=1e-5)


def test_both_operands_of_a_sum_may_give():
    proto = parse(
        f"{X} <{W}, float[4,3,1,1] u, float[4] e, float[5,4,1,1] v>"
        f"{{ {FIRST} o = Conv(x, u, e) a = Add(o, c) r = Relu(a) y = Conv(r, v) }}"
    )
    feed = models.feeds(proto)
    model = shifted(proto, np.full(4, 9.0), feed)
    layer = model.layers()[1]
    o = run(model.to_proto(["o"]), feed)["o"]
    layer.set_bias((layer.bias + 5 - o.min((0, 2, 3))).astype(np.float32))
    known(model, np.full(4, 8.0), np.full(4, 0.1))
    gamma = np.full(4, 0.1, np.float32)
    model.batch_norms["o"] = BatchNormStatistics(gamma, np.full(4, 4.3, np.float32))
    given = model.to_proto()
    changes = HighBiasAbsorption(amount="whole").apply(model, Context())
    assert len(changes.done) == 2
    assert_same_function(given, model, tol=1e-5, feed=feed)


def normals(count=64, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, 4, 9, 9))
    return {"x": x.astype(np.float32)}


def folded(tail, beta, gamma, pads="", size=9):
    """A normalization of exactly normal channels, folded into an identity before it."""
    proto = parse(
        f"g (float[N,4,{size},{size}] x) => (float[] y) <float[4,4,1,1] w, float[4] gamma,"
        f"float[4] beta, float[4] mean, float[4] var, float[5,4,3,3] v>"
        "{ k = Conv(x, w) c = BatchNormalization<epsilon=0.0>(k, gamma, beta, mean, var)"
        f" r = Relu(c) y = Conv{pads}(r, v) {tail} }}",
        w=np.eye(4)[:, :, None, None],
        gamma=gamma,
        beta=beta,
        mean=0,
        var=1,
    )
    model = load(proto)
    FoldBatchNorm().apply(model, Context())
    return model


def test_what_is_lost_below_is_what_was_expected():
    model = folded("", beta=[5.0, 6.0, 11.0, 0.0], gamma=[1.0, 1.0, 2.0, 1.0])
    given = model.to_proto()
    assert HighBiasAbsorption(amount="whole", sigmas=1.5).apply(model, Context())
    feed = normals()
    error = np.square(run(model, feed)["y"] - run(given, feed)["y"]).mean((0, 2, 3))
    # E[((c - x)+)^2] / sigma^2 at c = mean - 1.5 sigma
    z = np.linspace(-12, 12, 200_001)
    density = np.exp(-0.5 * z * z)
    each = density @ np.maximum(-1.5 - z, 0) ** 2 / density.sum()
    mean = density @ np.maximum(-1.5 - z, 0) / density.sum()
    weight = load(given).layers()[1].weight.astype(np.float64)
    squares = np.square(weight).sum((2, 3)) @ (each * np.array([1.0, 1.0, 4.0, 0.0]))
    # the lifts of neighbours are independent, but have a mean
    first = (weight.sum((2, 3)) @ (mean * np.array([1.0, 1.0, 2.0, 0.0]))) ** 2
    again = np.square(weight).sum((2, 3)) @ (mean * np.array([1.0, 1.0, 2.0, 0.0])) ** 2
    np.testing.assert_allclose(error, squares + first - again, rtol=0.1)


def test_samples_serve_where_there_was_no_normalization():
    proto = parse(CHAINS["pair"])
    data = [models.feeds(proto, seed=s) for s in range(5)]
    model = shifted(proto, np.array([1.6, -1.0, 4.1, 2.1]), data[0])
    c = np.concatenate([run(model.to_proto(["c"]), f)["c"] for f in data])
    old = model.layers()[0].bias.copy()
    low = c.mean((0, 2, 3)) - 0.5 * c.std((0, 2, 3))
    assert HighBiasAbsorption(amount="whole", sigmas=0.5).apply(model, Context(data))
    np.testing.assert_allclose(old - model.layers()[0].bias, np.maximum(low, 0), rtol=1e-4)


@pytest.mark.parametrize(
    "attrs",
    [
        "pads=[1,1,1,1]",
        "pads=[0,2,1,0], strides=[2,1]",
        "pads=[2,2,2,2], dilations=[2,2], group=2",
        'auto_pad="SAME_UPPER", strides=[2,2]',
    ],
)
def test_the_error_at_borders_is_told_beforehand(attrs):
    inputs = 2 if "group" in attrs else 4
    proto = parse(
        f"g (float[1,4,7,8] x) => (float[] y) <float[6,{inputs},3,3] w>"
        f"{{ y = Conv<{attrs}>(x, w) }}"
    )
    model = load(proto)
    [layer] = model.layers()
    shift = np.array([1.0, -2.0, 0.5, 3.0])
    whole = layer.sum_over_inputs(layer.weight * layer.along_inputs(shift))
    x = np.broadcast_to(shift[:, None, None], (1, 4, 7, 8)).astype(np.float32)
    y = run(proto, {"x": x})["y"][0]
    wanted = np.square(y - whole[:, None, None]).mean((1, 2)).sum()
    assert _border_error(layer, shift, shapes_of(model)) == pytest.approx(wanted, rel=1e-5)


def rounded_error(model, given, feed, bits=8):
    """Squared error of the reader's output when what it reads is rounded to its range."""
    r = run(load(model.to_proto()).to_proto(["r"]), feed)["r"]
    step = r.max() / (2**bits - 1)
    reader = load(model.to_proto())
    tail = parse(
        "g (float[N,4,9,9] r) => (float[] y) <float[5,4,3,3] v, float[5] d>"
        "{ y = Conv<pads=[1,1,1,1]>(r, v, d) }",
        v=reader.layers()[1].weight,
        d=0 if reader.layers()[1].bias is None else reader.layers()[1].bias,
    )
    got = run(tail, {"r": (np.rint(r / step) * step).astype(np.float32)})["y"]
    return np.square(got - run(given, feed)["y"], dtype=np.float64).mean()


@pytest.mark.parametrize("bits", [6, 8])
def test_weighing_takes_off_what_pays(bits):
    def fresh():
        model = folded(
            "", beta=[0.5, 0.0, 9.0, 20.0], gamma=[0.5, 1.0, 0.5, 0.5], pads="<pads=[1,1,1,1]>"
        )
        for layer in model.layers()[1:]:  # the high channels are read by small weights
            layer.scale_inputs(np.array([1, 1, 0.02, 0.01]))
        return model

    feed = normals()
    given = fresh().to_proto()
    model = fresh()
    assert HighBiasAbsorption(bits=bits).apply(model, Context())
    before = rounded_error(fresh(), given, feed, bits)
    after = rounded_error(model, given, feed, bits)
    assert after < (0.97 if bits == 8 else 0.7) * before
    # much more or less is no better
    shift = (load(given).layers()[0].bias - model.layers()[0].bias).astype(np.float64)
    for factor in (0.5, 1.2):
        other = fresh()
        for layer, sign in ((other.layers()[0], -1), (other.layers()[1], 1)):
            moved = shift * factor
            extra = (
                moved
                if sign < 0
                else layer.sum_over_inputs(layer.weight * layer.along_inputs(moved))
            )
            layer.set_bias((layer.take_bias() + sign * extra).astype(np.float32))
        assert rounded_error(other, given, feed, bits) > 0.9 * after


def test_borders_that_cost_more_than_steps_are_left():
    model = folded("", beta=[2, 3, 9, 4], gamma=[0.3] * 4, pads="<pads=[1,1,1,1]>", size=3)
    changes = HighBiasAbsorption(bits=16).apply(model, Context())
    assert not changes
    [name] = [n for n in reasons(changes) if n == model.layers()[0].name]
    assert "finer steps would win less" in reasons(changes)[name]
    changes = HighBiasAbsorption(amount="whole").apply(model, Context())
    assert not changes
    assert "pads it with zeros" in reasons(changes)[name]


def test_statistics_follow():
    model = folded("", beta=[2, 3, 9, 4], gamma=[0.3] * 4)
    top = propagate(model)[0]["r"].mean.max()
    HighBiasAbsorption(amount="whole").apply(model, Context())
    after = propagate(model)[0]["r"]
    np.testing.assert_allclose(after.mean, 0.9, atol=1e-3)
    assert top == pytest.approx(9)


def test_a_second_run_finds_nothing_left():
    model = folded("", beta=[2, 3, 9, 4], gamma=[0.3] * 4)
    assert HighBiasAbsorption(amount="whole").apply(model, Context())
    assert not HighBiasAbsorption(amount="whole").apply(model, Context())


def test_other_readers_of_a_bias_keep_it():
    proto = parse(
        "g (float[N,4,9,9] x) => (float[] y) <float[4,4,1,1] w, float[4] b>"
        "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, w, b) }"
    )
    feed = models.feeds(proto)
    model = shifted(proto, np.full(4, 2.0), feed)
    known(model, np.full(4, 1.9), np.full(4, 0.1))
    given = model.to_proto()
    assert HighBiasAbsorption(amount="whole").apply(model, Context())
    assert_same_function(given, model, tol=1e-5, feed=feed)


REFUSED = {
    "sigmoid": (f"{X} <{W}> {{ {FIRST} y = Sigmoid(c) }}", "(Sigmoid) reads it"),
    "output": (
        "g (float[N,3,9,9] x) => (float[] y, float[] c) <float[4,3,1,1] w, float[4] b,"
        f"float[5,4,1,1] v> {{ {FIRST} r = Relu(c) y = Conv(r, v) }}",
        "c is an output of the model",
    ),
    "transposed": (
        f"{X} <{W}, float[4,2,2,2] v> {{ {FIRST} y = ConvTranspose(c, v) }}",
        "differs from position to position",
    ),
    "matmul": (
        f"{X} <{W}, float[9,4] v> {{ {FIRST} y = MatMul(c, v) }}",
        "takes no bias",
    ),
    "computed": (
        "g (float[N,3,9,9] x, float[5] d) => (float[] y) <float[4,3,1,1] w, float[4] b,"
        f"float[5,4,1,1] v> {{ {FIRST} y = Conv(c, v, d) }}",
        "the bias of",
    ),
    "zeros": (
        f"{X} <{W}, int64[8] p = {{0,0,1,1,0,0,1,1}}, float[5,4,1,1] v>"
        f"{{ {FIRST} q = Pad(c, p) y = Conv(q, v) }}",
        "mixes channels, or zeros into them",
    ),
    "itself": (
        f"{X} <{W}, float[5,4,1,1] v> {{ {FIRST} r = Relu(c) a = Add(r, c) y = Conv(a, v) }}",
        "it meets itself in",
    ),
    "clip": (
        f"{X} <{W}, float lo = {{0}}, float hi = {{2}}, float[5,4,1,1] v>"
        f"{{ {FIRST} r = Clip(c, lo, hi) y = Conv(r, v) }}",
        "it reaches the bound of",
    ),
    "clip-above-zero": (
        f"{X} <{W}, float lo = {{1}}, float hi = {{90}}, float[5,4,1,1] v>"
        f"{{ {FIRST} r = Clip(c, lo, hi) y = Conv(r, v) }}",
        "a lower bound above zero",
    ),
    "counted": (
        f"{X} <{W}, float[5,4,1,1] v> {{ {FIRST}"
        " a = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(c)"
        " y = Conv(a, v) }",
        "counts the padded border",
    ),
    "subtracted": (
        f"{X} <{W}, float[4,1,1] k, float[5,4,1,1] v> {{ {FIRST} s = Sub(k, c) y = Conv(s, v) }}",
        "takes it away",
    ),
    "over-channels": (
        f"{X} <{W}, float[5,1,1,1] v> {{ {FIRST} m = ReduceMean<axes=[1]>(c) y = Conv(m, v) }}",
        "takes the mean over channels",
    ),
    "spread": (
        "g (float[N,3,9,9] x) => (float[] y) <float[1,3,1,1] w, float[1] b, float[4,3,1,1] u,"
        f"float[5,4,1,1] v> {{ {FIRST} o = Conv(x, u) a = Add(o, c) y = Conv(a, v) }}",
        "spreads it over several channels",
    ),
    "unread": (
        f"{X} <{W}> {{ {FIRST} s = Shape(c) y = Cast<to=1>(s) }}",
        "no layer reads it",
    ),
    "bounds-between-tensors": (
        f"{X} <{W}, float[4,3,1,1] u, float[5,4,1,1] v>"
        f"{{ {FIRST} o = Conv(x, u) m = Min(o, c) y = Conv(m, v) }}",
        "no constant per channel",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stands_in_the_way_is_named(name):
    text, why = REFUSED[name]
    model = load(parse(text))
    size = model.layers()[0].output_channels
    known(model, np.full(size, 5.0), np.full(size, 0.2))
    before = model.to_proto()
    changes = HighBiasAbsorption().apply(model, Context())
    assert not changes
    assert why in reasons(changes)[model.layers()[0].name]
    assert model.to_proto().graph.initializer == before.graph.initializer


def test_nothing_is_known_without_samples_or_normalization():
    model = load(parse(CHAINS["pair"]))
    changes = HighBiasAbsorption().apply(model, Context())
    first, second = (layer.name for layer in model.layers())
    assert "nothing is known of c without samples" in reasons(changes)[first]
    known(model, np.full(4, 5.0))
    model.batch_norms["c"] = BatchNormStatistics(*np.ones((2, 4), np.float32))
    changes = HighBiasAbsorption().apply(model, Context())
    assert reasons(changes)[first] == "no channel is always above zero"
    # an estimate, as of the second layer, is not enough to take something off
    assert "nothing is known of y without samples" in reasons(changes)[second]


@pytest.mark.parametrize(
    "given", [{"sigmas": -1.0}, {"sigmas": np.nan}, {"bits": 1}, {"limit": -1}]
)
def test_options_that_mean_nothing(given):
    with pytest.raises(RecipeError, match=next(iter(given))):
        HighBiasAbsorption(**given)
