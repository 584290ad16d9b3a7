"""Channel pruning: exact where channels are dead or copies, near the float model elsewhere."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import recipe
from onnxq.analysis.error import compare
from onnxq.calibration import Calibration
from onnxq.errors import CalibrationError, RecipeError
from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Calibrate, ChannelPruning, Clean, FoldBatchNorm
from onnxq.runtime import Session
from tests import models
from tests.checks import assert_same_function, reasons, run
from tests.models import parse

PAIR = (
    "g (float[N,3,9,9] x) => (float[] y) <float[16,3,3,3] w, float[16] b, float[6,16,3,3] v,"
    " float[6] d> { c = Conv(x, w, b) r = Relu(c) y = Conv(r, v, d) }"
)
RESIDUAL = (
    "g (float[N,3,9,9] x) => (float[] y) <float[8,3,1,1] w, float[16,8,3,3] a, float[16] p,"
    " float[8,16,3,3] b, float[8] q, float[16,8,3,3] e, float[8,16,3,3] f, float[8,5] u,"
    " float[5] z> { c = Conv(x, w) i = Conv<pads=[1,1,1,1]>(c, a, p) r = Relu(i)"
    " o = Conv<pads=[1,1,1,1]>(r, b, q) s = Add(o, c) t = Relu(s)"
    " j = Conv<pads=[1,1,1,1]>(t, e) k = Relu(j) l = Conv<pads=[1,1,1,1]>(k, f) m = Add(l, t)"
    " g = GlobalAveragePool(m) h = Flatten(g) y = Gemm(h, u, z) }"
)


def named(text, **values):
    proto = parse(text, **values)
    for node in proto.graph.node:
        node.name = node.output[0]
    return proto


def feeds(proto, count=40, start=0):
    """Inputs in which neighbours hang together, as in pictures."""
    found = []
    for seed in range(start, start + count):
        feed = models.feeds(proto, seed=seed, batch=1)
        x = feed["x"]
        for axis in range(1, x.ndim):
            x = x + 0.7 * np.roll(x, 1, axis=axis)
        found.append({"x": x.astype(np.float32)})
    return found


def pruned(proto, data, **options):
    """The model after the pass, valid, its batch still free, and what was changed."""
    given = load(proto).clone()
    step = ChannelPruning(**{"multiple": 1, "ratio": 0.5} | options)
    model, report = PassManager(step)(given, data)
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    for batch in (1, 3):
        feed = models.feeds(proto, batch=batch)
        for name, y in run(model, feed).items():
            assert y.shape == run(proto, feed)[name].shape
    return model, report.passes[-1].changes


def error(proto, model, data):
    """Relative squared error of the output."""
    noise = power = 0.0
    for feed in data:
        wanted = run(proto, feed)["y"].astype(np.float64)
        noise += np.square(run(model, feed)["y"] - wanted).sum()
        power += np.square(wanted - wanted.mean()).sum()
    return noise / power


def sizes(model):
    return {layer.name: layer.weight.shape for layer in model.layers()}


# ---------------------------------------------------------------------- exact


def weight(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_dead_channels_are_cut_off_and_their_constants_kept():
    w, b = weight((16, 3, 3, 3)), np.linspace(-1, 2, 16)
    w[[2, 5, 11]] = 0.0
    proto = named(PAIR, w=w, b=b)
    model, changes = pruned(proto, None, ratio=1.0)
    assert sizes(model) == {"c": (13, 3, 3, 3), "y": (6, 13, 3, 3)}
    assert_same_function(proto, model)
    assert "c: 13 of 16 channels kept" in changes.done


def test_dead_channels_are_cut_off_to_a_multiple():
    w = weight((16, 3, 3, 3))
    w[[2, 5, 11]] = 0.0
    proto = named(PAIR, w=w)
    model, _ = pruned(proto, None, ratio=1.0, multiple=4)
    assert sizes(model)["c"] == (16, 3, 3, 3)
    w[[1]] = 0.0
    model, _ = pruned(named(PAIR, w=w), None, ratio=1.0, multiple=4)
    assert sizes(model)["c"] == (12, 3, 3, 3)
    assert_same_function(named(PAIR, w=w), model)


def test_dead_channels_go_before_others():
    w = weight((16, 3, 3, 3))
    w[[*range(0, 16, 2)]] = 0.0
    proto = named(PAIR, w=w)
    for importance in ("error", "magnitude"):
        model, _ = pruned(proto, feeds(proto), importance=importance, reconstruct=False)
        assert sizes(model)["c"] == (8, 3, 3, 3)
        assert_same_function(proto, model)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_copies_cost_nothing_once_they_are_made_up_for(factor):
    # each channel of the second half is a multiple of one of the first
    w, b = weight((16, 3, 3, 3)), np.linspace(-1, 2, 16)
    w[8:], b[8:] = factor * w[:8], factor * b[:8]
    v = np.ones((6, 16, 3, 3)) * weight((6, 1, 3, 3), 1) + 0.1 * weight((6, 16, 3, 3), 2)
    proto = named(PAIR, w=w, b=b, v=v)
    data = feeds(proto)
    model, _ = pruned(proto, data)
    plain, _ = pruned(proto, data, reconstruct=False)
    assert sizes(model)["c"] == sizes(plain)["c"] == (8, 3, 3, 3)
    assert error(proto, model, data) < 1e-6
    assert error(proto, plain, data) > 0.1


def test_a_ratio_of_one_changes_nothing():
    proto = named(PAIR)
    model, changes = pruned(proto, None, ratio=1.0)
    assert not changes
    assert model.to_proto().graph.initializer == load(proto).to_proto().graph.initializer


# ---------------------------------------------------------------------- near


@pytest.mark.parametrize("importance", ["error", "magnitude"])
@pytest.mark.parametrize("text", [PAIR, RESIDUAL], ids=["pair", "residual"])
def test_reconstruction_beats_plain_pruning(text, importance):
    proto = named(text)
    data, others = feeds(proto), feeds(proto, start=100)
    plain, _ = pruned(proto, data, importance=importance, reconstruct=False)
    model, _ = pruned(proto, data, importance=importance)
    assert sizes(model) == sizes(plain)
    assert error(proto, model, others) < 0.7 * error(proto, plain, others)


def test_output_error_chooses_better_than_magnitude():
    better = 0
    for seed in range(6):
        proto = named(PAIR, seed=seed)
        data, others = feeds(proto), feeds(proto, start=100)
        by_error, by_magnitude = (
            error(proto, pruned(proto, data, importance=i)[0], others)
            for i in ("error", "magnitude")
        )
        better += by_error < by_magnitude
    assert better >= 5


def test_the_mean_of_the_output_is_kept():
    proto = named(PAIR)
    data = feeds(proto)
    model, _ = pruned(proto, data, patches=10**6)
    means = [
        np.mean([run(m, f)["y"].mean(axis=(0, 2, 3)) for f in data], 0) for m in (proto, model)
    ]
    np.testing.assert_allclose(*means, atol=1e-4)


def test_more_channels_leave_less_error():
    proto = named(RESIDUAL)
    data, others = feeds(proto), feeds(proto, start=100)
    errors = [
        error(proto, pruned(proto, data, ratio=ratio)[0], others) for ratio in (0.5, 0.75, 0.9)
    ]
    assert errors == sorted(errors, reverse=True)


@settings(deadline=None, max_examples=25)
@given(models.chains(), st.sampled_from([0.4, 0.8]), st.booleans())
def test_random_chains_keep_their_outputs_shape(proto, ratio, reconstruct):
    data = [models.feeds(proto, seed=seed) for seed in range(6)]
    name = proto.graph.output[0].name
    model, _ = pruned(proto, data, ratio=ratio, reconstruct=reconstruct)
    assert all(np.isfinite(run(model, feed)[name]).all() for feed in data)
    if reconstruct and [n.op_type for n in proto.graph.node][-1] == "Conv":
        plain, _ = pruned(proto, data, ratio=ratio, reconstruct=False)
        noise = [
            sum(float(np.square(run(m, f)[name] - run(proto, f)[name]).sum()) for f in data)
            for m in (model, plain)
        ]
        assert noise[0] <= noise[1] * 1.05 + 1e-6


def test_the_same_seed_gives_the_same_bytes():
    proto = named(RESIDUAL)
    data = feeds(proto)
    first, second = (pruned(proto, data)[0].to_proto().SerializeToString() for _ in range(2))
    assert first == second


def test_little_memory_takes_more_runs_to_the_same_choice():
    proto = named(RESIDUAL)
    data = feeds(proto)
    one, _ = pruned(proto, data, reconstruct=False)
    other, _ = pruned(proto, data, reconstruct=False, memory_mb=1)
    assert sizes(one) == sizes(other)
    assert_same_function(one, other)


# ---------------------------------------------------------------------- options


def test_ratios_by_layer_and_by_glob():
    proto = named(RESIDUAL)
    model, _ = pruned(proto, None, ratio=1.0, ratios=(("[ij]", 0.5), ("j", 0.25)), **PLAIN)
    assert sizes(model) == sizes(load(proto)) | {
        "i": (8, 8, 3, 3),
        "o": (8, 8, 3, 3),
        "j": (4, 8, 3, 3),
        "l": (8, 4, 3, 3),
    }


PLAIN = {"importance": "magnitude", "reconstruct": False}


def test_any_layer_of_a_group_names_it():
    proto = named(RESIDUAL)
    model, _ = pruned(proto, None, ratio=1.0, ratios=(("l", 0.5),), **PLAIN)
    assert sizes(model)["c"] == (4, 3, 1, 1)
    assert sizes(model)["l"] == (4, 16, 3, 3)


def test_the_name_of_a_group_means_no_other():
    # o puts out what c does, too, and channels of its own
    text = (
        "g (float[N,3,9,9] x) => (float[] y) <float[4,3,1,1] w, float[8,4,1,1] a,"
        " int64[8] pads, float[5,8,1,1] v>"
        "{ c = Conv(x, w) o = Conv(c, a) p = Pad(c, pads) s = Add(o, p) y = Conv(s, v) }"
    )
    proto = named(text, pads=[0, 2, 0, 0, 0, 2, 0, 0])
    model, _ = pruned(proto, None, ratio=1.0, ratios=(("o", 0.5),), **PLAIN)
    assert sizes(model) == {"c": (4, 3, 1, 1), "o": (6, 4, 1, 1), "y": (5, 6, 1, 1)}
    model, _ = pruned(proto, None, ratio=1.0, ratios=(("[o]", 0.5),), **PLAIN)
    assert sizes(model) == {"c": (2, 3, 1, 1), "o": (4, 2, 1, 1), "y": (5, 4, 1, 1)}


def test_excluded_layers_keep_their_channels():
    proto = named(RESIDUAL)
    model, changes = pruned(proto, None, exclude=("l", "j"), **PLAIN)
    assert sizes(model)["c"] == (8, 3, 1, 1)
    assert sizes(model)["j"] == (16, 8, 3, 3)
    assert sizes(model)["i"] == (8, 8, 3, 3)
    assert reasons(changes)["c"] == "keeps its channels: l is excluded"


def test_least_and_multiple():
    proto = named(RESIDUAL)
    model, changes = pruned(proto, None, ratio=0.1, multiple=8, **PLAIN)
    assert sizes(model)["i"] == (8, 8, 3, 3)
    assert reasons(changes)["c"] == (
        "keeps its 8 channels: that is the multiple of 8 next to what was asked for"
    )
    model, _ = pruned(proto, None, ratio=0.1, least=6, **PLAIN)
    assert sizes(model)["i"] == (6, 6, 3, 3)


def test_magnitude_alone_needs_no_samples():
    proto = named(PAIR)
    model, _ = pruned(proto, None, **PLAIN)
    assert sizes(model)["c"] == (8, 3, 3, 3)
    with pytest.raises(CalibrationError):
        pruned(proto, None)


def test_from_a_recipe():
    text = recipe.dumps(recipe.Recipe(passes=(ChannelPruning(ratios=(("c", 0.5),)),)))
    assert recipe.loads(text).passes[0] == ChannelPruning(ratios=(("c", 0.5),))


def test_then_quantized():
    proto = named(RESIDUAL)
    data = feeds(proto)
    steps = (ChannelPruning(multiple=1, ratio=0.75), Calibrate())
    model, _ = PassManager(*steps)(load(proto), data)
    assert all(
        layer.weight_encoding.scale.size == layer.output_channels for layer in model.layers()
    )


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ratio": 0.0}, "ratio: wanted a share in (0, 1], got 0"),
        ({"ratio": 1.5}, "ratio: wanted a share in (0, 1], got 1.5"),
        ({"ratio": float("nan")}, "ratio: wanted a share in (0, 1], got nan"),
        ({"ratios": (("conv1", -1.0),)}, "conv1: wanted a share in (0, 1], got -1"),
        ({"multiple": 0}, "multiple: wanted at least 1, got 0"),
        ({"least": 0}, "least: wanted at least 1, got 0"),
        ({"samples": -1}, "samples: wanted 0 or more, got -1"),
    ],
)
def test_options_that_mean_nothing(options, why):
    with pytest.raises(RecipeError) as caught:
        ChannelPruning(**options)
    assert caught.value.what == why


def test_names_that_are_not_there():
    proto = named(RESIDUAL)
    with pytest.raises(RecipeError, match="no channels of 'jj' can be taken out"):
        pruned(proto, None, ratios=(("jj", 0.5),))
    with pytest.raises(RecipeError, match="y keeps its channels: y is an output of the model"):
        pruned(proto, None, ratios=(("y", 0.5),))
    with pytest.raises(RecipeError, match="matches no node"):
        pruned(proto, None, exclude=("nothing",))


def test_what_keeps_its_channels_has_its_reason():
    _, changes = pruned(named(PAIR), None, **PLAIN)
    assert reasons(changes) == {"y": "keeps its channels: y is an output of the model"}


def test_encodings_come_after():
    proto = named(PAIR)
    model = load(proto)
    ctx = Context(feeds(proto))
    Calibrate().apply(model, ctx)
    with pytest.raises(RecipeError, match="before calibrate"):
        ChannelPruning().apply(model, ctx)


def test_weights_in_float16_are_cut_but_not_fitted():
    text = PAIR.replace("float[", "float16[")
    proto = named(text)
    data = [{"x": f["x"].astype(np.float16)} for f in feeds(proto, 8)]
    model, changes = pruned(proto, data)
    assert sizes(model)["c"] == (8, 3, 3, 3)
    assert "not reconstructed: float16 weights" in [skip.why for skip in changes.skipped]


# ---------------------------------------------------------------------- real models


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenetv1_075", "m5_speech"])
def test_zoo(name, tmp_path):
    source, data = models.zoo(name), models.zoo_samples(name, tmp_path, 32)
    plain, model = (
        PassManager(Clean(), FoldBatchNorm(), ChannelPruning(ratio=0.85, reconstruct=r))(
            source, data
        )[0]
        for r in (False, True)
    )
    assert sizes(model) == sizes(plain)
    assert model.nbytes < 0.95 * load(source).nbytes
    sessions = [Session(load(m).to_proto()) for m in (source, plain, model)]
    samples = Calibration(data).bind(sessions[0].inputs)
    before, after = (compare(sessions[0], s, samples)[0].sqnr_db for s in sessions[1:])
    assert after > before + 3
