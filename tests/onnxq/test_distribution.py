"""Distributions without data: against samples that really are what normalization says."""

import numpy as np
import pytest

import onnxq
from onnxq.analysis.distribution import (
    Distribution,
    patch_mean,
    propagate,
    shapes_of,
    statistics_of,
)
from onnxq.model import BatchNormStatistics, load
from onnxq.ops import conv_coverage, conv_window
from onnxq.pass_manager import Context
from onnxq.passes import Clean, FoldBatchNorm
from onnxq.statistics import Statistics
from tests import models
from tests.checks import run
from tests.models import parse

GAMMA = np.array([1.0, 0.5, -2.0, 0.0])
BETA = np.array([0.3, 2.0, -1.0, 0.7])

# the input is N(0, 1); what the normalization makes of it is exactly N(beta, gamma^2)
HEAD = "g (float[256,4,12,12] x) => (float[] y)"
NORM = (
    "float[4] gamma = {1, 0.5, -2, 0}, float[4] beta = {0.3, 2, -1, 0.7},"
    "float[4] mean = {0, 0, 0, 0}, float[4] var = {1, 1, 1, 1}"
)
FIRST = "n = BatchNormalization<epsilon=0.0>(x, gamma, beta, mean, var)"

# name -> constants, nodes from n to y, greatest error of the moments, whether it is estimated
CASES = {
    "relu": ("", "y = Relu(n)", 0.01, False),
    "clip": ("float lo = {-0.5}, float hi = {1.5}", "y = Clip(n, lo, hi)", 0.01, False),
    "relu-min": (
        "float[4,1,1] b = {1, 2, 0.5, 3}",
        "r = Relu(n) y = Min(r, b)",
        0.01,
        False,
    ),
    "max-min": ("float a = {-1}, float b = {1}", "m = Max(n, a) y = Min(m, b)", 0.01, False),
    "clips-in-a-row": (
        "float lo = {-2}, float hi = {2}, float top = {1}",
        "c = Clip(n, lo, hi) r = Relu(c) y = Clip(r, , top)",
        0.01,
        False,
    ),
    "leaky": ("", "y = LeakyRelu<alpha=0.2>(n)", 0.01, False),
    "prelu": ("float[4,1,1] s = {0.1, -0.5, 2, 0.3}", "y = PRelu(n, s)", 0.01, False),
    "leaky-of-relu": ("", "r = Relu(n) y = LeakyRelu(r)", 0.01, False),
    "constants": (
        "float[1,4,1,1] a = {1, -2, 3, 0.5}, float[4,1,1] b = {2, -1, 0, 3}, float c = {2}",
        "p = Mul(n, a) q = Add(b, p) s = Sub(c, q) t = Div(s, c) u = Neg(t) y = Relu(u)",
        0.01,
        False,
    ),
    "twice-the-same": ("", "y = Add(n, n)", 0.01, False),
    "concat": ("", "r = Relu(n) y = Concat<axis=1>(r, n)", 0.01, False),
    "split": (
        "int64[2] s = {1, 3}",
        "p, q = Split<axis=1>(n, s) r = Relu(q) y = Concat<axis=-3>(r, p)",
        0.01,
        False,
    ),
    "slice-pad": (
        "int64[2] st = {0, 1}, int64[2] en = {12, 12}, int64[2] ax = {2, 3}, int64[2] sp = {2, 1},"
        "int64[8] p = {0, 2, 1, 0, 0, 1, 0, 3}",
        "s = Slice(n, st, en, ax, sp) y = Pad(s, p)",
        0.03,
        False,
    ),
    "flatten": ("", "r = Relu(n) y = Flatten(r)", 0.4, False),
    "reshape-back": (
        "int64[3] a = {0, 4, -1}, int64[4] b = {0, 0, 12, 12}",
        "s = Reshape(n, a) y = Reshape(s, b)",
        0.01,
        False,
    ),
    "pixels": ("", "r = Relu(n) y = DepthToSpace<blocksize=2>(r)", 0.01, False),
    "pixels-back": ("", "y = SpaceToDepth<blocksize=2>(n)", 0.05, False),
    "channels-last": ("", "t = Transpose<perm=[0,2,3,1]>(n) y = Relu(t)", 0.01, False),
    "nearest": (
        "float[4] s = {1, 1, 2, 2}",
        'y = Resize<mode="nearest">(n, , s)',
        0.01,
        False,
    ),
    "conv": (
        "float[5,4,3,3] w, float[5] b",
        "y = Conv<pads=[1,0,2,1], strides=[2,1]>(n, w, b)",
        0.03,
        True,
    ),
    "grouped": ("float[6,2,3,3] w", "y = Conv<group=2, dilations=[2,2]>(n, w)", 0.03, True),
    "same": (
        "float[5,4,3,2] w",
        'y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(n, w)',
        0.03,
        True,
    ),
    "gemm": (
        "float[4,3] w, float[3] b",
        "s = Transpose<perm=[0,2,3,1]>(n) y = MatMul(s, w)",
        0.03,
        True,
    ),
    "flat-gemm": (
        "float[5,576] w, float[5] b",
        "f = Flatten(n) y = Gemm<transB=1, alpha=0.5, beta=3.0>(f, w, b)",
        0.25,
        True,
    ),
}


def model_of(name):
    constants, nodes, *_ = CASES[name]
    joined = f"{NORM}, {constants}" if constants else NORM
    return parse(f"{HEAD} <{joined}> {{ {FIRST} {nodes} }}")


def inputs(seed=0):
    """Each channel exactly N(0, 1) in mean and deviation."""
    x = np.random.default_rng(seed).normal(size=(256, 4, 12, 12))
    axes = (0, 2, 3)
    x = (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True)
    return x.astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_moments_are_those_of_samples(name):
    _, _, tolerance, estimated = CASES[name]
    proto = model_of(name)
    known, unknown = propagate(load(proto))
    assert unknown == {"x": "x is an input of the model"}
    got = known["y"]
    y = run(proto, {"x": inputs()})["y"].astype(np.float64)
    others = tuple(i for i in range(y.ndim) if i != got.axis)
    assert got.estimated is estimated
    assert got.channels == y.shape[got.axis]
    span = y.std()
    assert np.abs(got.mean - y.mean(others)).max() < tolerance * span
    assert np.abs(got.std - y.std(others)).max() < tolerance * span
    assert (got.low <= y.min(others) + 1e-5).all()
    assert (got.high >= y.max(others) - 1e-5).all()


def test_the_bounds_are_those_of_the_activations():
    known, _ = propagate(load(model_of("relu-min")))
    assert known["y"].low.tolist() == [0, 0, 0, 0]
    assert known["y"].high.tolist() == [1, 2, 0.5, 3]
    assert np.isinf(known["n"].low).all()


@pytest.mark.parametrize("opset", [6, 17])
def test_folded_and_whole_normalizations_say_the_same(opset):
    clip = "Clip<min=0.0, max=6.0>(n)" if opset == 6 else "Clip(n, lo, hi)"
    norm = "BatchNormalization<is_test=1>" if opset == 6 else "BatchNormalization"
    proto = parse(
        f"{HEAD} <{NORM}, float[4,4,1,1] w, float lo = {{0}}, float hi = {{6}}>"
        f"{{ c = Conv(x, w) n = {norm}(c, gamma, beta, mean, var) y = {clip} }}",
        opset=opset,
    )
    model = load(proto)
    before, _ = propagate(model)
    assert FoldBatchNorm().apply(model, Context())
    after, _ = propagate(model)
    for name in ("n", "y"):
        np.testing.assert_allclose(after[name].mean, before[name].mean)
        np.testing.assert_allclose(after[name].std, before[name].std)
    np.testing.assert_allclose(after["n"].std, np.abs(GAMMA))


def test_a_normalization_says_more_than_the_layer_before_it():
    proto = parse(f"{HEAD} <{NORM}, float[4,4,1,1] w> {{ {FIRST} y = Conv(n, w) }}")
    model = load(proto)
    assert propagate(model)[0]["y"].estimated
    model.batch_norms["y"] = BatchNormStatistics(GAMMA, BETA)
    y = propagate(model)[0]["y"]
    assert not y.estimated
    np.testing.assert_allclose(y.mean, BETA)


def test_sums_are_as_if_independent():
    proto = parse(
        f"{HEAD} <{NORM}> {{ {FIRST} r = Relu(n) m = BatchNormalization(x, beta, gamma, mean, var)"
        " y = Add(r, m) }"
    )
    known, _ = propagate(load(proto))
    r, m, y = known["r"], known["m"], known["y"]
    np.testing.assert_allclose(y.mean, r.mean + m.mean)
    np.testing.assert_allclose(y.std**2, r.std**2 + m.std**2)
    assert y.estimated


POOLS = {
    "average": "y = AveragePool<kernel_shape=[3,3]>(n)",
    "border": "y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(n)",
    "border-left-out": "y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(n)",
    "global": "y = GlobalAveragePool(n)",
    "reduced": "y = ReduceMean<axes=[2,3], keepdims=0>(n)",
}


@pytest.mark.parametrize("name", POOLS)
def test_averages_keep_their_mean_and_vary_less(name):
    proto = parse(f"{HEAD} <{NORM}> {{ {FIRST} {POOLS[name]} }}")
    got = propagate(load(proto))[0]["y"]
    y = run(proto, {"x": inputs()})["y"]
    others = tuple(i for i in range(y.ndim) if i != 1)
    assert np.abs(got.mean - y.mean(others)).max() < 0.01
    # wider than the average of independent values, narrower than that of equal ones
    live = GAMMA != 0
    assert (got.std[live] > y.std(others)[live]).all()
    assert (got.std[live] < np.abs(GAMMA)[live]).all()
    assert got.estimated


@pytest.mark.parametrize("pool", ["MaxPool<kernel_shape=[2,2], strides=[2,2]>", "GlobalMaxPool"])
def test_the_largest_lies_between_equal_and_independent_values(pool):
    proto = parse(f"{HEAD} <{NORM}> {{ {FIRST} r = Relu(n) y = {pool}(r) }}")
    known, _ = propagate(load(proto))
    y = run(proto, {"x": inputs()})["y"].mean((0, 2, 3))
    live = GAMMA != 0
    assert (known["y"].mean[live] > known["r"].mean[live]).all()
    assert (known["y"].mean[live] < y[live]).all()
    assert known["y"].mean[3] == pytest.approx(0.7)


UNKNOWN = {
    "sigmoid": ("y = Sigmoid(n)", "(Sigmoid) is not followed"),
    "product": ("r = Relu(n) y = Mul(n, r)", "(Mul) combines several activations"),
    "input": ("y = Add(n, x)", "x is an input of the model"),
    "joined": ("y = Concat<axis=1>(n, x)", "x is an input of the model"),
    "ends": ("r = Sigmoid(n) s = Relu(r) y = Neg(s)", "(Sigmoid) is not followed"),
    "map": ("y = Add(n, m)", "no constant per channel"),
    "padded": ('y = Pad<mode="constant">(n, p, one)', "something else than zeros"),
    "computed": ("s = Shape(x) y = Reshape(n, s)", ""),
    "over-channels": ("y = ReduceMean<axes=[1]>(n)", "takes the mean over channels"),
    "transposed": ("y = ConvTranspose(n, w)", "(ConvTranspose) is not followed"),
    "axes": (
        "g = GlobalAveragePool(n) t = Transpose<perm=[0,2,3,1]>(g) y = Add(g, t)",
        "different axes",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_has_its_reason(name):
    nodes, why = UNKNOWN[name]
    proto = parse(
        f"{HEAD} <{NORM}, float[12,12] m, int64[8] p = {{0,0,1,1,0,0,1,1}}, float one = {{1}},"
        f"float[4,3,2,2] w> {{ {FIRST} {nodes} }}",
    )
    known, unknown = propagate(load(proto))
    if not why:
        assert "y" in known
    else:
        assert "y" not in known
        assert why in unknown["y"]
    assert {*known} | {*unknown} >= {t for n in proto.graph.node for t in n.output}


def test_free_sizes_are_filled_in():
    proto = parse("g (float[N,3,H,W] x) => (float[] y) <float[4,3,3,3] w> { y = Conv(x, w) }")
    assert shapes_of(load(proto))["y"] == (1, 4, 126, 126)


def test_taps_at_a_padded_border_meet_zeros():
    proto = parse(
        "g (float[N,4,5,7] x) => (float[] y) <float[6,2,3,3] w>"
        "{ y = Conv<group=2, pads=[1,0,2,1], strides=[2,1]>(x, w) }"
    )
    model = load(proto)
    [layer] = model.layers()
    x = Distribution.normal(np.array([1.0, 2.0, 3.0, 4.0]), np.ones(4))
    got = patch_mean(layer, x, shapes_of(model))
    feed = np.broadcast_to(x.mean[:, None, None], (1, 4, 5, 7)).astype(np.float32)
    wanted = run(proto, {"x": feed})["y"].mean((0, 2, 3))
    rows = layer.weight.reshape(2, 3, -1)
    np.testing.assert_allclose(np.einsum("gok,gk->go", rows, got).reshape(-1), wanted, rtol=1e-5)


def test_coverage_counts_positions():
    window = conv_window({"pads": [1, 1], "strides": [2]}, (5,), (3,))
    # positions 0, 2, 4 read -1..1, 1..3, 3..5 of 0..4
    np.testing.assert_allclose(conv_coverage(window, (5,)), [2 / 3, 1, 2 / 3])


# ---------------------------------------------------------------------- histograms


def drawn(distribution, count=200_000):
    mu, sigma = distribution.unclipped
    z = np.random.default_rng(0).normal(size=(count, mu.size))
    return np.clip(mu + sigma * z, distribution.low, distribution.high)


RELU6 = Distribution.normal(BETA, GAMMA).clipped(0.0, 6.0)


def test_a_histogram_has_the_moments_and_zeros_of_its_channels():
    got = statistics_of(RELU6)
    x = drawn(RELU6)
    assert got.mean == pytest.approx(x.mean(), abs=3e-3)
    assert got.std == pytest.approx(x.std(), abs=3e-3)
    assert got.zeros / got.count == pytest.approx((x == 0).mean(), abs=2e-3)
    centres = (got.offset + np.arange(got.bins.size) + 0.5) * 2.0**got.exponent
    assert got.bins.sum() == got.count
    assert got.bins @ centres / got.count == pytest.approx(x.mean(), abs=3e-3)


def test_a_histogram_adds_up(tmp_path):
    for distribution in (RELU6, Distribution.normal(BETA, GAMMA), RELU6.affine(-3.0, 0.0)):
        Statistics({"a": statistics_of(distribution)}).save(tmp_path / "a.npz")
        assert "a" in Statistics.load(tmp_path / "a.npz")


def test_minmax_is_six_sigmas_within_the_bounds():
    low, high = statistics_of(Distribution.normal(BETA, GAMMA)).range("minmax")
    assert (low, high) == pytest.approx((-13.0, 11.0))
    assert statistics_of(RELU6).range("minmax") == pytest.approx((0.0, 6.0))
    narrow = statistics_of(Distribution.normal(BETA, GAMMA), sigmas=2.0)
    assert narrow.range("minmax") == pytest.approx((-5.0, 3.0))


@pytest.mark.parametrize("method", ["minmax", "moving-average", "percentile", "entropy", "mse"])
def test_ranges_are_those_of_samples(method):
    from onnxq.kernels import observe

    for distribution in (RELU6, Distribution.normal(BETA, GAMMA)):
        bins, grid = np.zeros(observe.BINS, np.int64), observe.empty_grid()
        got = statistics_of(distribution)
        x = drawn(distribution).astype(np.float32)
        ends = np.clip([got.minimum, got.maximum], distribution.low.min(), distribution.high.max())
        moments = observe.observe(np.append(x.reshape(-1), ends), bins, grid)
        real = type(got)(
            count=moments.size,
            minimum=grid[0],
            maximum=grid[1],
            ema_minimum=grid[0],
            ema_maximum=grid[1],
            zeros=moments.zeros,
            bins=bins,
            exponent=int(grid[2]),
            offset=int(grid[3]),
        )
        wanted = real.range(method, percentile=99.9)
        span = wanted[1] - wanted[0]
        assert got.range(method, percentile=99.9) == pytest.approx(wanted, abs=0.06 * span)


def test_a_tensor_of_constants():
    got = statistics_of(Distribution.normal(np.zeros(3), np.zeros(3)))
    assert (got.minimum, got.maximum, got.zeros) == (0, 0, got.count)
    assert got.range("mse") == (0, 0)
    got = statistics_of(Distribution.normal(np.array([2.0, -1.0]), np.zeros(2)))
    assert got.range("minmax") == (-1, 2)
    assert got.zeros == 0


# ---------------------------------------------------------------------- real models

# model -> least correlation of predicted and real channel means before activations, greatest error
# of means as a share of deviations, and of deviations as a share of them
REAL = {
    "cifar_resnet20": (0.90, 0.20, 0.15),
    "mobilenetv1_075": (0.98, 0.18, 0.10),
    "simplepose": (0.96, 0.25, 0.35),
    "m5_speech": (0.60, 0.60, 1.00),
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", REAL)
def test_real_networks_are_as_their_normalizations_say(name, tmp_path):
    model = load(models.zoo(name))
    ctx = Context(onnxq.Calibration(models.zoo_samples(name, tmp_path, 32)))
    Clean().apply(model, ctx)
    FoldBatchNorm().apply(model, ctx)
    model.infer()
    known, _ = propagate(model)
    real = ctx.channel_moments(model, [*model.batch_norms])
    pairs = [(known[n], *real[n]) for n in model.batch_norms]
    mean, std = (np.concatenate([getattr(p[0], k) for p in pairs]) for k in ("mean", "std"))
    true_mean, true_std = (np.concatenate([p[i] for p in pairs]) for i in (1, 2))
    correlation, of_means, of_stds = REAL[name]
    size = np.sqrt(np.mean(true_std**2))
    assert np.corrcoef(mean, true_mean)[0, 1] > correlation
    assert np.sqrt(np.mean((mean - true_mean) ** 2)) < of_means * size
    assert np.sqrt(np.mean((std - true_std) ** 2)) < of_stds * size
