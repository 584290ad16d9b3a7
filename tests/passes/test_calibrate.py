"""Encodings as they are proposed: ranges, shared groups, exclusions, refusals."""

import numpy as np
import pytest

from onnxq.analysis.distribution import propagate
from onnxq.encoding import Encoding
from onnxq.errors import CalibrationError, ModelError, RecipeError, TargetError
from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Calibrate, Clean, FoldBatchNorm, InsertQDQ
from onnxq.passes.calibrate import BIAS_LIMIT, guard_bias
from tests import models
from tests.checks import reasons, run
from tests.models import parse

CHAIN = (
    "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[4] b, float[5,4,3,3] v>"
    "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }"
)
METHODS = ("minmax", "moving-average", "percentile", "entropy", "mse")


def samples(proto, count=6):
    return [models.feeds(proto, seed=seed) for seed in range(count)]


def calibrated(proto, data=None, **options):
    model = load(proto)
    changes = Calibrate(**options).apply(model, Context(samples(proto) if data is None else data))
    return model, changes


def observed(proto, name, data=None):
    inner = parse_outputs(proto, name)
    values = [run(inner, feed)[name] for feed in data or samples(proto)]
    return min(v.min() for v in values), max(v.max() for v in values)


def parse_outputs(proto, name):
    return load(proto).to_proto([name])


def test_minmax_covers_exactly_what_was_seen():
    proto = parse(CHAIN)
    model, _ = calibrated(proto, method="minmax")
    assert {"x", "r", "w", "v"} <= set(model.encodings)
    assert "c" not in model.encodings
    low = min(f["x"].min() for f in samples(proto))
    high = max(f["x"].max() for f in samples(proto))
    assert model.encodings["x"] == Encoding.of_range(low, high, "uint8")
    top = observed(proto, "r")[1]
    assert model.encodings["r"].low == 0
    assert top * (1 - 1e-6) <= model.encodings["r"].high <= top * (1 + 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_every_method_gives_ranges_within_what_was_seen(method, activations):
    proto = parse(CHAIN)
    model, _ = calibrated(proto, method=method, activations=activations)
    low, high = observed(proto, "r")
    encoding = model.encodings["r"]
    assert encoding.dtype == activations
    assert encoding.axis is None
    assert encoding.low == 0
    assert 0.2 * high < encoding.high < 1.1 * high
    assert low == 0


def test_a_clip_bounds_its_range():
    text = (
        "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float lo, float hi,"
        "float[5,4,3,3] v> { c = Conv(x, w) r = Clip(c, lo, hi) y = Conv(r, v) }"
    )
    model, _ = calibrated(parse(text, lo=-1.5, hi=6.0))
    assert model.encodings["r"].low >= -1.5 - 1e-7
    assert model.encodings["r"].high <= 6 + 1e-7
    assert model.encodings["r"].high > 5.5


def test_weights_have_a_scale_per_output_channel():
    proto = parse(CHAIN)
    model, _ = calibrated(proto)
    encoding = model.encodings["w"]
    assert (encoding.dtype, encoding.axis, encoding.scale.shape) == ("int8", 0, (4,))
    bound = np.abs(model.array(model.tensors()["w"])).max(axis=(1, 2, 3))
    np.testing.assert_allclose(encoding.scale, bound / 127, rtol=1e-6)
    assert not encoding.zero_point.any()


def test_weights_with_one_scale():
    model, _ = calibrated(parse(CHAIN), weights="int8/tensor")
    assert model.encodings["w"].scale.shape == ()
    model, _ = calibrated(parse(CHAIN), weights="uint8")
    assert model.encodings["w"].scale.shape == ()
    assert model.encodings["w"].dtype == "uint8"


def test_a_channel_of_zeros_has_the_finest_scale_of_the_others():
    w = np.random.default_rng(0).normal(size=(4, 3, 3, 3))
    w[2] = 0
    model, _ = calibrated(parse(CHAIN, w=w))
    scale = model.encodings["w"].scale
    assert scale[2] == np.delete(scale, 2).min()


def test_moves_have_the_encoding_of_their_source():
    text = (
        "g (float[N,4,8,8] x) => (float[] y) <float[4,4,1,1] w, int64[3] s, float[16,6] v>"
        "{ c = Conv(x, w) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c) r = Reshape(p, s)"
        " y = MatMul(r, v) }"
    )
    model, _ = calibrated(parse(text, s=[0, 4, 16]))
    assert model.encodings["c"] == model.encodings["p"] == model.encodings["r"]


@pytest.mark.parametrize(
    ("glob", "left"), [("second", {"second"}), ("s*d", {"second"}), ("Conv", {"first", "second"})]
)
def test_excluded_by_name_or_type(glob, left):
    text = (
        "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[4,4,1,1] v, float[4,2,1,1] u>"
        "{ c = Conv(x, w) r = Relu(c) y = Conv(r, v) }"
    )
    proto = parse(text.replace(", float[4,2,1,1] u", ""))
    for node, name in zip(proto.graph.node, ("first", "middle", "second"), strict=True):
        node.name = name
    model, changes = calibrated(proto, exclude=(glob,))
    assert {n for n, why in model.encodings.float_nodes.items() if why == "excluded"} == left
    assert {n for n, why in reasons(changes).items() if why == "excluded"} == left
    assert ("v" in model.encodings) is ("second" not in left)


def test_a_glob_that_matches_nothing_names_what_is_near():
    proto = parse(CHAIN)
    proto.graph.node[0].name = "head.conv"
    with pytest.raises(RecipeError, match="matches no node") as caught:
        calibrated(proto, exclude=("head.cnov",))
    assert "head.conv" in str(caught.value)
    with pytest.raises(RecipeError, match="Conv"):
        calibrated(proto, exclude=("Conf",))
    with pytest.raises(RecipeError, match="onnxq inspect"):
        calibrated(proto, exclude=("zzzzzz",))


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int4/channel"},
        {"weights": "int16"},
        {"weights": "int8/block=32"},
        {"weights": "float"},
        {"weights": "uint8", "activations": "int8"},
        {"activations": "int16"},
        {"activations": "uint16"},
        {"activations": "uint8/channel"},
        {"activations": "int4"},
    ],
)
def test_formats_without_kernels_are_refused(options):
    with pytest.raises(TargetError, match="use --"):
        calibrated(parse(CHAIN), **options)


@pytest.mark.parametrize("options", [{"weights": "in8"}, {"activations": "int8/chanel"}])
def test_formats_that_mean_nothing_are_refused_at_once(options):
    with pytest.raises(RecipeError, match="no number format"):
        Calibrate(**options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["w", "b", "v"])
def test_a_constant_that_is_not_finite_is_named(name, value):
    shapes = {"w": (4, 3, 3, 3), "b": (4,), "v": (5, 4, 3, 3)}
    array = np.ones(shapes[name])
    array.reshape(-1)[1] = value
    with pytest.raises(ModelError, match=rf"NaN.*\b{name}\b"):
        calibrated(parse(CHAIN, **{name: array}))


def test_a_weight_whose_result_stays_unseen():
    text = "g (float[N,3] x) => (float[] y) <float[3,4] v> { y = MatMul(x, v) }"
    with pytest.raises(ModelError, match=r"NaN.*\bv\b"):
        calibrated(parse(text, v=np.full((3, 4), np.nan)))


def test_an_activation_that_is_not_finite_is_named():
    proto = parse(CHAIN)
    data = samples(proto)
    data[3]["x"][0, 0, 0, 0] = np.nan
    with pytest.raises(CalibrationError, match=r"\bx\b"):
        calibrated(proto, data)
    text = (
        "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[4,4,1,1] v>"
        "{ l = Log(x) c = Conv(l, w) y = Conv(c, v) }"
    )
    with pytest.raises(CalibrationError, match=r"\bl\b"):
        calibrated(parse(text))


def test_without_samples():
    with pytest.raises(CalibrationError, match="calibration samples"):
        Calibrate().apply(load(parse(CHAIN)), Context())


# a normalization of exactly normal channels, between layers; the input's layer stays in float
NORMAL = (
    "g (float[N,4,9,9] x) => (float[] y) <float[4,4,1,1] w, float[4] gamma, float[4] beta,"
    "float[4] mean, float[4] var, float[6,4,3,3] v, float[6] d, float[5,6,3,3] u>"
    "{ k = Conv(x, w) n = BatchNormalization<epsilon=0.0>(k, gamma, beta, mean, var) r = Relu(n)"
    " c = Conv(r, v, d) q = Relu(c) y = Conv(q, u) }"
)


def normal_model():
    proto = parse(
        NORMAL,
        w=np.eye(4)[:, :, None, None],
        gamma=[1, 0.5, -2, 0.1],
        beta=[0.3, 1, -1, 2],
        mean=0,
        var=1,
    )
    model = load(proto)
    FoldBatchNorm().apply(model, Context())
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(64, 4, 9, 9)).astype(np.float32)} for _ in range(8)]
    return model, data


@pytest.mark.parametrize("method", METHODS)
def test_ranges_without_samples_are_those_of_normal_samples(method):
    model, data = normal_model()
    found = []
    for ctx in (Context(), Context(data)):
        other = model.clone()
        step = Calibrate(exclude=(other.layers()[0].name,), method=method, percentile=99.9)
        changes = step.apply(other, ctx)
        found.append(other.encodings)
        said = any("ranges from batch normalization" in what for what in changes.done)
        assert said is (ctx.data is None)
    assert {*found[0]} == {*found[1]}
    # six sigmas are wider than samples, which do not count for the other methods
    widest = {"minmax": 1.6, "moving-average": 2.0}.get(method, 1.35)
    for name in ("r", "q"):
        assert found[0][name].low == found[1][name].low == 0
        assert 0.8 < found[0][name].high / found[1][name].high < widest


def test_minmax_of_batch_norms_is_six_sigmas():
    model, _ = normal_model()
    Calibrate(exclude=(model.layers()[0].name,), method="minmax").apply(model, Context())
    assert model.encodings["r"].high == pytest.approx(-1 + 6 * 2, rel=1e-5)


def test_results_that_leave_the_integers_have_ranges_per_channel_without_samples():
    model, _ = normal_model()
    first, _, last = (layer.name for layer in model.layers())
    Calibrate(exclude=(first,), method="minmax").apply(model, Context())
    encoding = model.encodings["y"]
    known, _ = propagate(model)
    low, high = known["y"].extremes(6.0)
    assert encoding.axis == 1
    ends = [encoding.scale * (q - encoding.zero_point) for q in (encoding.qmin, encoding.qmax)]
    np.testing.assert_allclose(ends, [low, high], atol=encoding.scale.max())
    assert model.layers()[-1].name == last


def test_what_is_known_of_no_tensor_is_named():
    model, _ = normal_model()
    with pytest.raises(CalibrationError) as error:
        Calibrate().apply(model, Context())
    assert "nothing is known of x: x is an input of the model" in str(error.value)
    assert "give data" in str(error.value)
    text = "g (float[N,3] x) => (float[] y) <float[3,3] w> {"
    for i in range(5):
        text += f" m{i} = MatMul({f'm{i - 1}' if i else 'x'}, w)"
    with pytest.raises(CalibrationError, match=r"m0: x is an input of the model;.* and \d more"):
        Calibrate().apply(load(parse(text + " y = MatMul(m4, w) }")), Context())


def test_batch_norms_before_samples_if_asked_for():
    model, data = normal_model()
    data = [{"x": feed["x"] * np.float32(0.1)} for feed in data]  # not what training saw
    found = {}
    for ranges in ("samples", "batch-norm"):
        other = model.clone()
        Calibrate(method="minmax", ranges=ranges).apply(other, Context(data))
        found[ranges] = other.encodings
    assert found["samples"]["x"] == found["batch-norm"]["x"]
    assert found["batch-norm"]["r"].high == pytest.approx(11, rel=1e-5)
    assert found["samples"]["r"].high < 3


def test_statistics_of_an_earlier_run_serve_without_samples():
    proto = parse(CHAIN)
    ctx = Context(samples(proto))
    first, second = load(proto), load(proto)
    exits = Calibrate(activations="int8", weights="int8/channel", method="minmax")
    exits.apply(first, ctx)
    exits.apply(second, Context(statistics=ctx.observed))
    assert first.encodings["r"] == second.encodings["r"]


def test_samples_that_do_not_fit():
    with pytest.raises(CalibrationError, match="x"):
        calibrated(parse(CHAIN), [{"z": np.zeros((1, 3, 8, 8), np.float32)}])
    with pytest.raises(CalibrationError, match=r"wanted.*got"):
        calibrated(parse(CHAIN), [{"x": np.zeros((1, 4, 8, 8), np.float32)}])
    with pytest.raises(CalibrationError):
        calibrated(parse(CHAIN), [])


def test_activations_of_nothing_but_zeros():
    proto = parse(CHAIN)
    data = [{"x": np.zeros((1, 3, 8, 8), np.float32)}]
    model, _ = PassManager(Clean(), Calibrate(), InsertQDQ())(proto, data)
    for level in ("disabled", "all"):
        got = run(model, data[0], level)["y"]
        np.testing.assert_allclose(got, run(proto, data[0])["y"], atol=0.5)


def test_calibrating_twice_proposes_the_same():
    model = load(parse(CHAIN))
    ctx = Context(samples(parse(CHAIN)))
    Calibrate().apply(model, ctx)
    first = dict(model.encodings)
    Calibrate().apply(model, ctx)
    assert dict(model.encodings) == first


def test_a_weight_read_along_two_axes_is_copied():
    text = (
        "g (float[N,6] x) => (float[] y, float[] z) <float[6,6] w>"
        "{ y = Gemm(x, w) z = Gemm<transB=1>(x, w) }"
    )
    model, _ = calibrated(parse(text))
    weights = [layer.weight_tensor.name for layer in model.layers()]
    assert len(set(weights)) == 2
    assert {model.encodings[name].axis for name in weights} == {0, 1}


def test_the_guard_raises_scales_just_as_far_as_needed():
    encoding = Encoding("int8", np.full(3, 1e-6, np.float32), np.zeros(3, np.int32), 0)
    bias = np.array([0.0, 1.0, -100.0])
    guarded = guard_bias(encoding, bias, 1e-5)
    assert guarded.scale[0] == encoding.scale[0]
    assert np.all(guarded.scale >= encoding.scale)
    steps = np.abs(bias) / (guarded.scale.astype(np.float64) * 1e-5)
    assert steps.max() <= BIAS_LIMIT
    assert steps.max() > 0.999 * BIAS_LIMIT
    assert guard_bias(encoding, np.zeros(3), 1e-5) is encoding


def test_the_guard_of_one_scale_for_all():
    encoding = Encoding("int8", np.array(1e-6, np.float32), np.array(0, np.int32))
    guarded = guard_bias(encoding, np.array([0.0, 50.0]), 1e-6)
    assert guarded.scale.shape == ()
    assert 50 / (float(guarded.scale) * 1e-6) <= BIAS_LIMIT
