"""Encodings as they are proposed: ranges, shared groups, exclusions, refusals."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxq.analysis.distribution import propagate
from onnxq.biases import BIAS_LIMIT, guard_bias
from onnxq.encoding import SMALLEST_SCALE, Encoding, limits
from onnxq.errors import CalibrationError, ModelError, RecipeError, TargetError
from onnxq.formats import ZERO_WEIGHT
from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Calibrate, Clean, FoldBatchNorm, InsertQDQ
from onnxq.targets import target_named
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
        {"weights": "uint4/channel", "activations": "int8"},
        {"weights": "int16"},
        {"weights": "int8/block=32"},
        {"weights": "float"},
        {"weights": "uint8", "activations": "int8"},
        {"activations": "int16"},
        {"activations": "uint16"},
        {"activations": "uint8/channel"},
        {"activations": "int4"},
        {"weights": "int16/channel", "activations": "float"},
        {"weights": "float", "activations": "float"},
        {"weights": "int4/block=8", "activations": "float"},
        {"weights": "int4/block=48", "activations": "float"},
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


# ------------------------------------------------------------------ who shares an encoding


def values_of(proto, name, data=None):
    """All that a tensor is on the samples."""
    exposed = load(proto).to_proto([name])
    feeds = samples(proto) if data is None else data
    found = [feed[name] if name in feed else run(exposed, feed)[name] for feed in feeds]
    return np.concatenate([values.reshape(-1) for values in found])


def assert_covers(encoding, *values, dtype="uint8"):
    """The encoding is the min-max one of these values, to the rounding of float32."""
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    wanted = Encoding.of_range(low, high, dtype)
    assert (encoding.dtype, encoding.axis) == (dtype, None)
    assert encoding.zero_point == wanted.zero_point
    np.testing.assert_allclose(encoding.scale, wanted.scale, rtol=1e-6)


MOVES = {  # -> size of the last axis
    "Flatten(c)": 256,
    "MaxPool<kernel_shape=[3,3]>(c)": 6,
    "Reshape(c, s)": 16,
    "Transpose<perm=[0,2,3,1]>(c)": 4,
    "Slice(c, a, b)": 3,
    "Pad(c, p)": 10,
    "DepthToSpace<blocksize=2>(c)": 16,
    'Resize<mode="nearest">(c, , f)': 16,
    "Unsqueeze(c, i)": 8,
    "Gather<axis=1>(c, i)": 8,
    "Tile(c, t)": 16,
}


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("move", MOVES)
def test_what_only_moves_has_the_encoding_of_its_source(move, activations):
    text = (
        "g (float[N,4,8,8] x) => (float[] y) <float[4,4,1,1] w, int64[3] s, int64[4] a, int64[4] b,"
        f"int64[8] p, float[4] f, int64[1] i, int64[4] t, float[{MOVES[move]},5] v>"
        f"{{ c = Conv(x, w) m = {move} y = MatMul(m, v) }}"
    )
    proto = parse(
        text, s=[0, 16, 16], a=0, b=[9, 1, 1, 3], p=1, f=[1, 1, 2, 2], i=1, t=[1, 1, 1, 2]
    )
    model, _ = calibrated(proto, activations=activations, method="minmax")
    assert model.encodings["m"] == model.encodings["c"]
    assert_covers(model.encodings["c"], values_of(proto, "c"), dtype=activations)


def test_every_part_of_a_split_has_the_encoding_of_the_whole():
    text = (
        "g (float[N,4,8,8] x) => (float[] y, float[] z) <float[4,4,1,1] w, int64[2] s,"
        "float[2,1,1,1] v, float[2,3,1,1] u>"
        "{ c = Conv(x, w) a, b = Split<axis=1>(c, s) r = MaxPool<kernel_shape=[2,2]>(b)"
        " y = Conv(a, v) z = Conv(r, u) }"
    )
    model, _ = calibrated(parse(text, s=[1, 3]))
    assert len({model.encodings[name] for name in ("c", "a", "b", "r")}) == 1


# weights that make d ten times as large as c
LARGE = {"v": 10 * np.random.default_rng(5).normal(size=(4, 4, 1, 1))}


def joined(body, channels=8, *, outputs="", more="", data=None, **values):
    """A Concat s of c and d before a Conv: the model, and its min-max encodings."""
    text = (
        f"g (float[N,4,8,8] x) => (float[] y{outputs}) <float[4,4,1,1] w, float[4,4,1,1] v,"
        f"float[4,{channels},1,1] u{more}>"
        f"{{ c = Conv(x, w) d = Conv(x, v) {body} y = Conv(s, u) }}"
    )
    proto = parse(text, **(LARGE | values))
    model, _ = calibrated(proto, data, method="minmax")
    return proto, model.encodings


JOIN = "s = Concat<axis=1>(c, d)"


def test_inputs_of_a_concat_have_the_encoding_of_the_result():
    proto, encodings = joined(JOIN)
    assert encodings["c"] == encodings["d"] == encodings["s"]
    assert_covers(encodings["s"], values_of(proto, "c"), values_of(proto, "d"))


def test_a_concat_of_one_tensor_twice():
    proto, encodings = joined("s = Concat<axis=1>(d, d)")
    assert encodings["d"] == encodings["s"]
    assert_covers(encodings["s"], values_of(proto, "d"))


def test_nested_concats_share_one_encoding():
    body = (
        "i = Concat<axis=1>(c, d) m = MaxPool<kernel_shape=[1,1]>(i) e = Conv(x, t)"
        " s = Concat<axis=1>(m, e)"
    )
    proto, encodings = joined(body, 9, more=", float[1,4,1,1] t", t=99.0)
    assert len({encodings[name] for name in ("c", "d", "i", "m", "e", "s")}) == 1
    assert_covers(encodings["s"], values_of(proto, "e"))


def test_the_input_of_the_model_shares_with_a_concat_only_if_nothing_else_reads_it():
    text = (
        "g (float[N,4,8,8] x, float[N,4,8,8] z) => (float[] y) <float[4,4,1,1] w, float[4,8,1,1] u>"
        "{ c = Conv(z, w) s = Concat<axis=1>(c, x) y = Conv(s, u) }"
    )
    proto = parse(text, w=9.0)
    model, _ = calibrated(proto, method="minmax")
    assert model.encodings["x"] == model.encodings["s"]
    proto, encodings = joined("s = Concat<axis=1>(d, x)")
    assert_covers(encodings["x"], values_of(proto, "x"))
    assert encodings["d"] == encodings["s"] != encodings["x"]


@pytest.mark.parametrize(
    ("body", "own", "shared"),
    [
        ("r = Relu(c) s = Concat<axis=1>(r, d)", "r", "d"),
        ("r = Clip(c, lo, hi) s = Concat<axis=1>(r, d)", "r", "d"),
        ("r = Relu(c) m = MaxPool<kernel_shape=[1,1]>(r) s = Concat<axis=1>(m, d)", "m", "d"),
    ],
)
def test_a_concat_does_not_undo_the_bounds_of_an_activation(body, own, shared):
    proto, encodings = joined(body, more=", float lo, float hi", lo=-1.0, hi=6.0)
    assert encodings[shared] == encodings["s"] != encodings[own]
    assert_covers(encodings["s"], values_of(proto, own), values_of(proto, shared))
    bounds = (-1, 6) if "Clip" in body else (0, np.inf)
    assert bounds[0] <= encodings["r"].low
    assert encodings["r"].high <= bounds[1]


def test_activations_with_the_same_bounds_share():
    body = "r = Relu(c) q = Relu(d) s = Concat<axis=1>(r, q)"
    proto, encodings = joined(body)
    assert encodings["r"] == encodings["q"] == encodings["s"]
    assert_covers(encodings["s"], values_of(proto, "q"), np.zeros(1))


def test_a_relu_after_a_concat_bounds_the_result_alone():
    body = "j = Concat<axis=1>(c, d) s = Relu(j)"
    proto, encodings = joined(body)
    assert "j" not in encodings
    assert encodings["s"].low == 0
    assert_covers(encodings["s"], values_of(proto, "s"))
    # shared, so that the Concat only moves integers: what Relu drops is dropped one step earlier
    assert encodings["c"] == encodings["d"] == encodings["s"]


# What reads c beside the Concat, in its own words or through what only moves it.
READERS = {
    "a layer": (f"{JOIN} z = Conv(c, t)", ", float[] z", ", float[2,4,1,1] t"),
    "a layer, behind moves": (
        "m = Transpose<perm=[0,1,3,2]>(c) s = Concat<axis=1>(m, d) z = Conv(m, t)",
        ", float[] z",
        ", float[2,4,1,1] t",
    ),
    "a layer, another move": (
        "m = Transpose<perm=[0,1,3,2]>(c) k = MaxPool<kernel_shape=[2,2]>(c)"
        " s = Concat<axis=1>(m, d) z = Conv(k, t)",
        ", float[] z",
        ", float[2,4,1,1] t",
    ),
    "floats": (f"{JOIN} z = Exp(c)", ", float[] z", ""),
    "the caller": (JOIN, ", float[] c", ""),
}


@pytest.mark.parametrize("reader", READERS)
def test_sharing_with_a_concat_does_not_coarsen_for_other_readers(reader):
    body, outputs, more = READERS[reader]
    proto, encodings = joined(body, outputs=outputs, more=more)
    assert_covers(encodings["c"], values_of(proto, "c"))
    assert encodings["d"] == encodings["s"] != encodings["c"]
    # where it costs them next to nothing, it is shared
    proto, encodings = joined(body, outputs=outputs, more=more, v=-1.0, w=1.0)
    assert encodings["c"] == encodings["d"] == encodings["s"]


@pytest.mark.parametrize("size", [0.1, 100.0])
def test_the_result_of_a_concat_covers_its_constants(size):
    k = size * np.random.default_rng(0).normal(size=(2, 3, 8, 8))
    body = "s = Concat<axis=1>(c, k, d)"
    proto, encodings = joined(body, 11, more=", float[2,3,8,8] k", k=k)
    k = k.astype(np.float32)
    assert_covers(encodings["s"], values_of(proto, "c"), values_of(proto, "d"), k)
    assert_covers(encodings["k"], k)
    assert encodings["c"] == encodings["d"] == encodings["s"]


# ------------------------------------------------------------------ bounds


def grid(encoding):
    """Every value that the encoding can hold, in float32 as onnxruntime computes it."""
    low, high = limits(encoding.dtype)
    return encoding.dequantize(np.arange(low, high + 1).astype(encoding.dtype))


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@settings(max_examples=40)
@given(low=st.floats(-3, 0, width=32), high=st.floats(0, 7, width=32), seed=st.integers(0, 9))
def test_no_grid_point_leaves_the_bounds_of_a_clip(activations, low, high, seed):
    assume(low < high)
    text = (
        "g (float[N,2,3,3] x) => (float[] y) <float[2,2,1,1] w, float lo, float hi,"
        "float[2,2,1,1] v> { c = Conv(x, w) r = Clip(c, lo, hi) y = Conv(r, v) }"
    )
    proto = parse(text, seed=seed, lo=low, hi=high)
    data = samples(proto, 1)
    model, _ = calibrated(proto, data, activations=activations)
    points = grid(model.encodings["r"])
    assert points.dtype == np.float32
    assert min(low, -255 * SMALLEST_SCALE) <= points.min()
    assert points.max() <= max(high, 255 * SMALLEST_SCALE)
    assert np.isfinite(1 / model.encodings["r"].scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_every_method_stays_within_bounds(method, activations):
    text = (
        "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[4,4,1,1] v, float lo,"
        "float hi, float[5,4,3,3] u> { c = Conv(x, w) r = Clip(c, lo, hi) d = Conv(r, v)"
        " q = Relu(d) y = Conv(q, u) }"
    )
    model, _ = calibrated(parse(text, lo=-0.1, hi=0.7), activations=activations, method=method)
    points = grid(model.encodings["r"])
    assert -np.float32(0.1) <= points.min()
    assert points.max() <= np.float32(0.7)
    assert grid(model.encodings["q"]).min() == 0


# ------------------------------------------------------------------ scales per channel


EXIT = (
    "g (float[N,3,9,9] x) => (float[] y) <float[4,3,2,2] w, float[4] b, float lo, float hi>"
    "{ c = Conv(x, w, b) BODY }"
)
# channels of very different sizes, the last one constant
SIZES = {"w": np.reshape([1, 1e-2, 1e-3, 0], (4, 1, 1, 1)), "b": [0, 0.5, 0, 0], "lo": 0, "hi": 6}


def leaving(body, count=6, batch=2, **options):
    """A Conv that leaves the integers: the model, encodings, results as [C, values]."""
    proto = parse(EXIT.replace("BODY", body), **SIZES)
    data = [models.feeds(proto, seed=seed, batch=batch) for seed in range(count)]
    model, _ = calibrated(proto, data, **options)
    return proto, model.encodings, data


def per_channel(proto, name, data):
    exposed = load(proto).to_proto([name])
    values = np.concatenate([run(exposed, feed)[name] for feed in data])
    return np.moveaxis(values, 1, 0).reshape(4, -1)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("y = Identity(c)", "c"),
        ("y = Tanh(c)", "c"),
        ("r = Relu(c) y = Tanh(r)", "r"),
        ("r = Clip(c, lo, ) y = Tanh(r)", "r"),
    ],
)
def test_a_result_that_floats_read_has_a_range_per_channel(body, name):
    proto, encodings, data = leaving(body)
    values = per_channel(proto, name, data)
    low, high = np.minimum(values.min(axis=1), 0), np.maximum(values.max(axis=1), 0)
    room = (high - low) / 2
    low, high = np.maximum(low - room, low.min()), np.minimum(high + room, high.max())
    wanted = Encoding.of_ranges(low, high, "uint8", axis=1)
    assert encodings[name].axis == 1
    np.testing.assert_allclose(encodings[name].scale, wanted.scale, rtol=1e-5)
    np.testing.assert_array_equal(encodings[name].zero_point, wanted.zero_point)
    assert (name == "r") == (not encodings[name].zero_point.any())
    assert encodings[name].scale.max() > 50 * encodings[name].scale.min()


@pytest.mark.parametrize(
    ("body", "name", "options"),
    [
        ("y = Tanh(c)", "c", {"activations": "int8"}),  # onnxruntime has no such kernels
        ("r = Clip(c, lo, hi) y = Tanh(r)", "r", {}),  # one bound in different steps
    ],
)
def test_a_result_that_floats_read_may_have_one_range(body, name, options):
    assert leaving(body, **options)[1][name].scale.shape == ()


def test_a_result_that_integers_read_too_has_one_range():
    text = (
        "g (float[N,3,9,9] x) => (float[] y, float[] z) <float[4,3,2,2] w, float[5,4,1,1] v>"
        "{ c = Conv(x, w) y = Tanh(c) z = Conv(c, v) }"
    )
    proto = parse(text)
    model, _ = calibrated(proto, [models.feeds(proto, seed=s) for s in range(6)])
    assert model.encodings["c"].axis is None
    assert model.encodings["z"].axis == 1


@pytest.mark.parametrize(
    ("size", "count", "batch", "enough"),
    [
        *((9, 1, 1, False), (9, 2, 1, True), (9, 1, 2, True)),  # 64 values a picture
        *((2, 64, 1, False), (2, 200, 1, False)),  # one: as for scores of classes
        *((2, 49, 2, False), (2, 50, 2, True), (2, 1, 99, False), (2, 1, 100, True)),
    ],
)
def test_ranges_of_channels_are_believed_from_a_hundred_values_on(size, count, batch, enough):
    proto = parse(EXIT.replace("9,9", f"{size},{size}").replace("BODY", "y = Tanh(c)"), **SIZES)
    data = [models.feeds(proto, seed=seed, batch=batch) for seed in range(count)]
    model, _ = calibrated(proto, data)
    assert (model.encodings["c"].axis == 1) is enough


def test_positions_need_not_be_known():
    text = EXIT.replace("9,9", "H,W").replace("BODY", "y = Tanh(c)")
    model, _ = calibrated(parse(text, **SIZES), [models.feeds(parse(text, **SIZES), size=12)])
    assert model.encodings["c"].axis == 1


@pytest.mark.parametrize(("method", "passes"), [("percentile", 1), ("minmax", 1), ("mse", 2)])
def test_ranges_of_tensors_and_channels_come_from_one_pass(method, passes):
    """The ranges of inputs by least error take another one, over the samples alone."""
    proto = parse(EXIT.replace("BODY", "y = Tanh(c)"), **SIZES)
    read = []

    def data():
        read.append(1)
        return iter([models.feeds(proto, seed=s, batch=8) for s in range(20)])

    model, _ = calibrated(proto, data, method=method)
    assert model.encodings["c"].axis == 1
    assert len(read) == passes


# ------------------------------------------------------------------ weights and biases


def steps_of(bias, weight, x, leaving=None):
    """The int32 bias that is written, before it is cut off."""
    leaving = 0.0 if leaving is None else leaving.scale.astype(np.float64) * leaving.zero_point
    return (bias + leaving) / (weight.scale.astype(np.float64) * float(x.scale))


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8", "uint8/channel"])
@pytest.mark.parametrize("shape", ["", "[1]", "[5]", "[1,1]", "[1,5]"])
def test_no_bias_of_a_gemm_overflows(shape, weights):
    text = f"g (float[N,6] x) => (float[] y) <float[6,5] w, float{shape} b> {{ y = Gemm(x, w, b) }}"
    proto = parse(text, b=1e3)
    data = [{"x": 1e-5 * feed["x"]} for feed in samples(proto)]
    model, _ = calibrated(proto, data, weights=weights)
    steps = np.abs(steps_of(1e3, model.encodings["w"], model.encodings["x"]))
    assert 0.99 * BIAS_LIMIT < steps.min() <= steps.max() <= BIAS_LIMIT
    InsertQDQ().apply(model, Context())
    for level in ("disabled", "all"):
        got, wanted = run(model, data[0], level)["y"], run(proto, data[0])["y"]
        np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_the_zero_point_of_an_exit_counts_as_bias():
    proto = parse(EXIT.replace("BODY", "y = Tanh(c)"), **(SIZES | {"b": [900, -900, 1, 0]}))
    data = [models.feeds(proto, seed=seed) for seed in range(6)]
    data = [{"x": 1e-6 * feed["x"]} for feed in data]
    model, _ = calibrated(proto, data)
    leaving_ = model.encodings["c"]
    assert leaving_.axis == 1
    bias = np.array([900, -900, 1, 0])
    steps = np.abs(steps_of(bias, model.encodings["w"], model.encodings["x"], leaving_))
    assert steps.max() <= BIAS_LIMIT


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4),
    st.floats(1e-9, 1e3),
    st.floats(1e-9, 1e3),
    st.booleans(),
    st.booleans(),
)
def test_the_guard_raises_no_scale_further_than_needed(bias, scale, x_scale, channels, one):
    bias = np.array(bias[:1] if one else bias)
    count = (4 if one else len(bias),) if channels else ()
    encoding = Encoding("int8", np.full(count, scale, np.float32), np.zeros(count, np.int32), 0)
    encoding = encoding if channels else Encoding("int8", encoding.scale, encoding.zero_point)
    guarded = guard_bias(encoding, bias, x_scale)
    assert guarded.scale.shape == encoding.scale.shape
    assert guarded.scale.dtype == np.float32
    steps = np.abs(np.broadcast_to(bias, count or bias.shape)) / (guarded.scale * float(x_scale))
    assert np.all(steps <= BIAS_LIMIT)
    raised = guarded.scale > encoding.scale
    steps = steps if channels else np.array(steps.max())
    assert np.all(steps[raised] > 0.9999 * BIAS_LIMIT)
    assert np.all(guarded.scale >= encoding.scale)


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8/channel"])
def test_weights_of_zeros_have_a_fine_scale(weights):
    model, _ = calibrated(parse(CHAIN, w=0.0), weights=weights)
    encoding = model.encodings["w"]
    np.testing.assert_array_equal(encoding.scale, np.float32(ZERO_WEIGHT / 127))
    assert not encoding.fake_quantize(np.zeros((4, 3, 3, 3), np.float32)).any()


def test_weights_with_one_unsigned_scale_cover_their_range():
    w = np.random.default_rng(0).uniform(-1, 3, (4, 3, 3, 3)).astype(np.float32)
    model, _ = calibrated(parse(CHAIN, w=w), weights="uint8")
    assert_covers(model.encodings["w"], w)
    model, _ = calibrated(parse(CHAIN, w=w), weights="uint8/channel")
    encoding = model.encodings["w"]
    assert np.all(encoding.zero_point == 128)
    np.testing.assert_allclose(encoding.scale, np.abs(w).max(axis=(1, 2, 3)) / 127, rtol=1e-6)


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8/channel"])
@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,6,8] x) => (float[] y) <float[5,6] w> { y = MatMul(w, x) }",
        "g (float[N,6,8] x) => (float[] y) <float[1,5,6] w> { y = MatMul(w, x) }",
        "g (float[6,8] x) => (float[] y) <float[6] w> { y = MatMul(w, x) }",
    ],
)
def test_a_weight_on_the_left_is_written_as_an_activation(text, weights):
    w = np.random.default_rng(0).uniform(-1, 3, 30 if "5" in text else 6).astype(np.float32)
    shape = (1, 5, 6) if "1,5" in text else ((5, 6) if "5" in text else (6,))
    proto = parse(text, w=w.reshape(shape))
    model, _ = calibrated(proto, weights=weights)
    assert_covers(model.encodings["w"], w)


@pytest.mark.parametrize("shape", ["[8]", "[2,8,5]"])
def test_a_weight_that_is_no_matrix_has_one_scale(shape):
    proto = parse(f"g (float[2,6,8] x) => (float[] y) <float{shape} w> {{ y = MatMul(x, w) }}")
    model, _ = calibrated(proto)
    bound = np.abs(model.layers()[0].weight).max()
    np.testing.assert_allclose(model.encodings["w"].scale, bound / 127, rtol=1e-6)


def encodings_of_readers(model):
    """Node -> the encoding of the constant that it multiplies or adds."""
    found = {}
    for node in model.graph.nodes:
        for tensor in node.inputs[:2]:
            if not tensor.inputs and tensor.name in model.encodings and tensor.name != "x":
                found[node.outputs[0].name] = model.encodings[tensor.name]
    return found


def test_a_constant_on_both_sides_of_products_is_copied():
    text = "g (float[N,6,6] x) => (float[] y) <float[6,6] w> { a = MatMul(x, w) y = MatMul(w, a) }"
    model, _ = calibrated(parse(text), weights="int8/tensor")
    found = encodings_of_readers(model)
    assert (found["a"].dtype, found["y"].dtype) == ("int8", "uint8")


@pytest.mark.parametrize("first", ["layer", "product"])
def test_a_weight_that_is_also_multiplied_by_is_copied(first):
    layer, product = "a = MatMul(x, w)", "m = Mul(x, w) t = MaxPool<kernel_shape=[1,1]>(m)"
    body = f"{layer} {product}" if first == "layer" else f"{product} {layer}"
    text = (
        "g (float[2,3,6,6] x) => (float[] a, float[] z) <float[6,6] w, float[6,6] v>"
        f"{{ {body} z = MatMul(t, v) }}"
    )
    w = np.random.default_rng(0).uniform(1, 2, (6, 6)).astype(np.float32)
    proto = parse(text, w=w)
    model, _ = calibrated(proto)
    found = encodings_of_readers(model)
    assert (found["a"].dtype, found["a"].axis) == ("int8", 1)
    assert_covers(found["m"], w)
    InsertQDQ().apply(model, Context())
    feed = samples(proto)[0]
    for level in ("disabled", "all"):
        got = run(model, feed, level)
        for name, wanted in run(proto, feed).items():
            assert np.abs(got[name] - wanted).max() < 0.03 * np.abs(wanted).max()


def test_layers_that_share_a_weight_share_the_coarser_scale():
    text = (
        "g (float[N,6] x) => (float[] y, float[] z) <float[6,5] w, float[5] b>"
        "{ k = Abs(x) y = Gemm(x, w) z = Gemm(k, w, b) }"
    )
    proto = parse(text, b=[0, 1e6, 0, 0, 0])
    data = [{"x": 1e-3 * feed["x"]} for feed in samples(proto)]
    model, _ = calibrated(proto, data)
    alone = np.abs(model.layers()[0].weight).max(axis=0) / 127
    scale = model.encodings["w"].scale
    np.testing.assert_allclose(np.delete(scale, 1), np.delete(alone, 1), rtol=1e-6)
    assert scale[1] > 100 * alone[1]
    assert abs(1e6 / (scale[1] * float(model.encodings["k"].scale))) <= BIAS_LIMIT


# ------------------------------------------------------------------ gates and inputs


def silu(x):
    return x / (1 + np.exp(-x))


def hard_swish(x):
    return x * np.clip(0.3 * x + 0.4, 0, 1)


GATES = {
    "Sigmoid(c)": silu,
    "HardSigmoid<alpha=0.3, beta=0.4>(c)": hard_swish,
    "HardSigmoid(c)": lambda x: x * np.clip(0.2 * x + 0.5, 0, 1),
}


@pytest.fixture
def one_range(monkeypatch):
    """No range of its own for any channel: onnxruntime has no integer HardSigmoid or Tanh."""
    monkeypatch.setattr("onnxq.passes.calibrate.MANY_VALUES", np.inf)


def gated(gate, more="", outputs=""):
    text = (
        f"g (float[N,3,8,8] x) => (float[] y{outputs}) <float[4,3,1,1] w, float[4] b,"
        f"float[4,4,1,1] v> {{ c = Conv(x, w, b) s = {gate} m = Mul(c, s) y = Conv(m, v) {more} }}"
    )
    return parse(text, b=[-4, -2, 0, 1], w=2 * np.random.default_rng(3).normal(size=(4, 3, 1, 1)))


def gate_error(gate, values, low, high):
    encoding = Encoding.of_range(low, high, "uint8")
    return np.square(gate(encoding.fake_quantize(values)) - gate(values)).mean()


@pytest.mark.parametrize("gate", GATES)
def test_the_range_before_a_gate_is_best_for_the_result_of_the_gate(gate, one_range):
    proto = gated(gate)
    data = samples(proto, 30)
    values = values_of(proto, "c", data).astype(np.float64)
    chosen = calibrated(proto, data)[0].encodings["c"]
    got = gate_error(GATES[gate], values, chosen.low, chosen.high)
    others = [
        gate_error(GATES[gate], values, a * values.min(), b * values.max())
        for a in np.linspace(0.1, 1, 10)
        for b in np.linspace(0.5, 1, 6)
    ]
    assert got <= 1.05 * min(others)
    assert got < 0.9 * gate_error(GATES[gate], values, values.min(), values.max())


@pytest.mark.parametrize(
    ("more", "outputs"), [("", ", float[] c"), ("z = Conv(c, v)", ", float[] z")]
)
def test_a_range_that_others_read_is_not_that_of_the_gate(more, outputs, one_range):
    proto = gated("Sigmoid(c)", more, outputs)
    values = values_of(proto, "c")
    chosen = calibrated(proto)[0].encodings["c"]
    plain = calibrated(gated("Tanh(c)", more, outputs))[0].encodings["c"]
    assert chosen == plain
    assert chosen.low < 0.8 * values.min()


def test_the_range_of_an_input_weighs_samples_by_their_power():
    """One loud recording among quiet ones takes no more than its share of the steps."""
    proto = parse("g (float[N,64] x) => (float[] y) <float[64,5] w> { y = MatMul(x, w) }")
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(4, 64)).astype(np.float32)} for _ in range(40)]
    data[7]["x"] = data[7]["x"] * np.float32(30)

    def error(low, high):
        encoding = Encoding.of_range(low, high, "uint8")
        parts = [np.square(encoding.fake_quantize(f["x"]) - f["x"]).mean() for f in data]
        return np.mean([p / np.square(f["x"]).mean() for p, f in zip(parts, data, strict=True)])

    chosen = calibrated(proto, data)[0].encodings["x"]
    low, high = (f(f["x"].min() if f is min else f["x"].max() for f in data) for f in (min, max))
    others = [
        error(a * low, b * high) for a in np.linspace(0.05, 1, 20) for b in np.linspace(0.5, 1, 11)
    ]
    assert error(chosen.low, chosen.high) <= 1.05 * min(others)
    assert error(chosen.low, chosen.high) < 0.5 * error(low, high)


FLAT = {
    "Sigmoid": (lambda x: x / (1 + np.exp(-x)), -7.0, -4.0),
    "HardSigmoid": (lambda x: x * np.clip(0.2 * x + 0.5, 0, 1), -3.0, -2.0),
}


@pytest.mark.parametrize("op", FLAT)
def test_a_channel_before_a_gate_in_float_spends_no_steps_where_the_gate_is_flat(op):
    text = (
        "g (float[N,3,32,32] x) => (float[] y) <float[3,3,1,1] w, float[3,3,1,1] v>"
        f"{{ c = Conv(x, w) s = {op}(c) m = Mul(c, s) y = Conv(m, v) }}"
    )
    proto = parse(text, w=np.diag([1.0, 1.0, 1e-2]).reshape(3, 3, 1, 1))
    x = np.random.default_rng(0).uniform(-60, 4, (2, 3, 32, 32)).astype(np.float32)
    model = load(proto)
    Calibrate(exclude=(op, "Mul")).apply(model, Context([{"x": x}]))
    found = model.encodings["c"]
    scale = found.scale.astype(np.float64)
    low = -scale * found.zero_point
    gate, least, most = FLAT[op]
    assert ((least < low) & (low < most))[:2].all()
    assert np.abs(gate(np.linspace(-60, low[0], 1000))).max() <= scale[0] * 0.51 + 1e-6
    assert low[2] == pytest.approx(-0.6 - 0.5 * 0.64, rel=0.02)  # the gate is not flat there
    np.testing.assert_allclose((low + 255 * scale)[:2], 4, rtol=0.05)


def test_some_activations_have_a_format_of_their_own():
    proto = parse(
        "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[5,4,1,1] v>"
        "{ a = Conv(x, w) r = Relu(a) p = MaxPool<kernel_shape=[2,2]>(r) y = Conv(p, v) }"
    )
    feeds = [models.feeds(proto, seed=s) for s in range(4)]
    found = {}
    for entry in ("x=uint5", "p=uint5", "Conv_0=uint5", "first=uint5", "Conv=uint5", "last=int12"):
        model = load(proto)
        step = Calibrate(activation_formats=(entry,), method="minmax", exits="tensor")
        step.apply(model, Context(feeds, target=target_named("ort-cpu").any_width))
        types = {n: e.dtype for n, e in model.encodings.items() if n not in ("w", "v")}
        found[entry] = sorted(n for n, t in types.items() if t != "uint8")
        for name in found[entry]:
            low, high = model.encodings[name].low, model.encodings[name].high
            plain = load(proto)
            Calibrate(method="minmax", exits="tensor").apply(plain, Context(feeds))
            step_of = float(max(m.encodings[name].scale for m in (model, plain)))
            assert abs(low - plain.encodings[name].low) <= step_of
            assert abs(high - plain.encodings[name].high) <= step_of
    assert found == {
        "x=uint5": ["x"],
        "p=uint5": ["p", "r"],
        "Conv_0=uint5": ["p", "r"],
        "first=uint5": ["p", "r"],
        "Conv=uint5": ["p", "r", "y"],
        "last=int12": ["y"],
    }


def test_activation_formats_that_the_target_does_not_know():
    step = Calibrate(activation_formats=("x=uint5",))
    proto = parse("g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w> { y = Conv(x, w) }")
    with pytest.raises(TargetError, match="computes in uint8 or int8, not uint5"):
        step.apply(load(proto), Context([models.feeds(proto)]))
    with pytest.raises(RecipeError, match="nothing that 'Conv' matches"):
        Calibrate(activation_formats=("Conv=uint8",), exclude=("Conv",)).apply(
            load(proto), Context([models.feeds(proto)])
        )


def test_results_may_have_one_scale():
    proto = parse("g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w> { y = Conv(x, w) }")
    feeds = [models.feeds(proto, seed=s) for s in range(8)]
    axes = {}
    for exits in ("channel", "tensor"):
        model = load(proto)
        Calibrate(exits=exits).apply(model, Context(feeds))
        axes[exits] = model.encodings["y"].axis
    assert axes == {"channel": 1, "tensor": None}
