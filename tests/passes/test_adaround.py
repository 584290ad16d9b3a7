"""AdaRound: never worse than nearest, layer after layer, resumable, the same for a seed."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from onnxq.checkpoint import Checkpoint, fingerprint
from onnxq.errors import CalibrationError, OnnxqError, RecipeError
from onnxq.layer_inputs import LayerInputs
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import GPTQ, AdaRound, Calibrate
from onnxq.passes import adaround as module
from onnxq.quadratic import Quadratic
from onnxq.second_order import rows_of
from tests import models
from tests.checks import reasons, run
from tests.models import parse
from tests.passes.test_gptq import LAYERS, coarse, differences, nearest, samples

NET = (
    "g (float[N,3,10,10] x) => (float[N,5] y)"
    "<float[8,3,3,3] w1, float[8] b1, float[8,1,3,3] w2, float[12,8,1,1] w3, float[12] b3,"
    " float[12,5] w4, float[5] b4>"
    "{ c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) r1 = Relu(c1) c2 = Conv<group=8>(r1, w2)"
    " r2 = Relu(c2) c3 = Conv(r2, w3, b3) r3 = Relu(c3) p = GlobalAveragePool(r3)"
    " f = Flatten(p) y = Gemm(f, w4, b4) }"
)


def net(count=10, **options):
    """A small network with encodings so coarse that rounding shows, and its samples."""
    proto = parse(NET)
    data = samples(proto, count)
    model, ctx = coarse(proto, data, **options)
    return proto, data, model, ctx


def error(proto, model, data):
    """Mean squared difference of the outputs."""
    return np.square(differences(proto, model, data)).mean()


@pytest.mark.parametrize("solver", ["tabu", "relaxation"])
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_better_than_by_rounding_to_nearest(name, weights, sequential, solver):
    proto = parse(LAYERS[name])
    data = samples(proto)
    model, ctx = coarse(proto, data, weights=weights)
    plain = error(proto, nearest(model), data)
    step = AdaRound(solver=solver, sequential=sequential, scales="given", iterations=200)
    changes = step.apply(model, ctx)
    assert changes.done == [f"1 weights rounded by {solver}"]
    assert error(proto, model, data) < 0.9 * plain


@pytest.mark.parametrize("weights", ["int4/channel", "int3/channel", "int2/tensor", "uint4/tensor"])
@pytest.mark.parametrize("name", ["conv", "depthwise", "gemm", "matmul"])
def test_few_bits(name, weights):
    proto = parse(LAYERS[name])
    data = samples(proto)
    model, ctx = coarse(proto, data, factor=1.0, weights=weights)
    plain = error(proto, nearest(model), data)
    AdaRound().apply(model, ctx)
    assert error(proto, model, data) < 0.9 * plain
    layer = model.layers()[0]
    encoding = model.encodings[layer.weight_tensor.name]
    assert encoding.dtype == weights.partition("/")[0]
    on_grid = encoding.fake_quantize(layer.weight)
    np.testing.assert_allclose(on_grid, layer.weight, rtol=1e-6, atol=1e-7)


def test_the_error_behind_the_activation():
    """Where most outputs are cut off, what they would have been costs little."""
    proto = parse(
        "g (float[N,4,9,9] x) => (float[] y) <float[6,4,3,3] w, float[6] b>"
        "{ c = Conv(x, w, b) y = Relu(c) }",
        b=np.full(6, -12.0),
    )
    data = samples(proto, 30)
    model, ctx = coarse(proto, data)
    behind, before = error(proto, nearest(model), data), {}
    for activation in (False, True):
        copy = model.clone()
        step = AdaRound(solver="relaxation", iterations=1500, scales="given", activation=activation)
        step.apply(copy, ctx)
        assert error(proto, copy, data) < 0.9 * behind
        wide, exact = (load(m).to_proto(["c"]) for m in (copy, proto))
        before[activation] = np.mean(
            [np.square(run(wide, f)["c"] - run(exact, f)["c"]).mean() for f in data]
        )
    assert before[True] > 1.05 * before[False]
    np.testing.assert_array_equal(copy.layers()[0].bias, model.layers()[0].bias)


def test_the_error_behind_the_activation_takes_samples_and_gradients():
    with pytest.raises(RecipeError, match="activation: wanted solver relaxation, and sequential"):
        AdaRound(activation=True)
    with pytest.raises(RecipeError, match="activation: wanted solver relaxation, and sequential"):
        AdaRound(activation=True, solver="relaxation", sequential=False)


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_one_step_from_where_they_were(name):
    proto = parse(LAYERS[name])
    data = samples(proto)
    model, ctx = coarse(proto, data, factor=10)
    before = rows_of(model.layers()[0])
    AdaRound(scales="given").apply(model, ctx)
    layer = model.layers()[0]
    encoding = model.encodings[layer.weight_tensor.name]
    np.testing.assert_array_equal(encoding.fake_quantize(layer.weight), layer.weight)
    scale = encoding.scale.reshape(layer.group, -1, 1)
    assert np.abs((rows_of(layer) - before) / scale).max() < 1


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor"])
def test_scales_by_output_error_are_better(weights):
    proto, data, model, ctx = net(weights=weights)
    given = model.clone()
    AdaRound(scales="given").apply(given, ctx)
    AdaRound().apply(model, ctx)
    assert error(proto, model, data) <= error(proto, given, data)
    for layer in model.layers():
        new, old = (m.encodings[layer.weight_tensor.name] for m in (model, given))
        assert new.scale.shape == old.scale.shape
        assert (new.scale <= old.scale * (1 + 1e-6)).all()
        np.testing.assert_array_equal(new.fake_quantize(layer.weight), layer.weight)


def test_the_whole_network_is_better_in_sequence_than_in_one_pass_than_nearest():
    proto, data, model, ctx = net(24)
    found = {"nearest": error(proto, nearest(model), data)}
    for name, step in {
        "one pass": AdaRound(sequential=False),
        "sequential": AdaRound(),
        "gptq": GPTQ(),
        "gptq, sequential": GPTQ(sequential=True),
    }.items():
        copy = model.clone()
        step.apply(copy, ctx)
        found[name] = error(proto, copy, data)
    assert found["sequential"] < found["one pass"] < found["nearest"]
    assert found["gptq, sequential"] < found["gptq"] < found["nearest"]
    assert found["sequential"] < found["gptq, sequential"]


def test_the_bias_takes_up_what_the_layers_before_shifted():
    """With inputs of the model in integers, the mean of each output stays that of the float's."""
    proto, data, model, ctx = net(weights="int8/channel")
    AdaRound().apply(model, ctx)
    for name in ("c1", "c3"):
        got, wanted = (
            np.mean(
                [run(load(m).to_proto([name]), f)[name].mean(axis=(0, 2, 3)) for f in data], axis=0
            )
            for m in (model, proto)
        )
        # activations pass in float here, so the shift is what their rounding would have made
        np.testing.assert_allclose(got, wanted, atol=0.05 * np.abs(wanted).max())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_the_result(threads):
    _, data, model, _ = net()
    AdaRound().apply(model, Context(data, threads=threads))
    _, _, other, _ = net()
    AdaRound().apply(other, Context(data, threads=3))
    assert fingerprint(model) == fingerprint(other)


def test_the_seed_decides():
    found = []
    for seed in (0, 0, 1):
        _, data, model, _ = net()
        AdaRound(patches=40, effort=0.1).apply(model, Context(data, seed=seed))
        found.append(fingerprint(model))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("sequential", [True, False])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, sequential):
    step = AdaRound(sequential=sequential)
    _, data, whole, ctx = net()
    step.apply(whole, ctx)
    _, _, model, _ = net()
    original, count = Quadratic.of, []

    def broken(layer, statistics):
        count.append(layer.name)
        if len(count) == 3:
            raise KeyboardInterrupt
        return original(layer, statistics)

    said = []
    monkeypatch.setattr(module.Quadratic, "of", broken)
    ctx = Context(data, resume=tmp_path)
    ctx.progress.say = said.append
    with pytest.raises(KeyboardInterrupt):
        step.apply(model, ctx)
    assert said == [f"2 of 4 layers are kept in {tmp_path}; the same command goes on from there"]
    monkeypatch.setattr(module.Quadratic, "of", original)
    _, _, model, _ = net()
    changes = step.apply(model, Context(data, resume=tmp_path))
    assert changes.done == [
        "2 weights taken up from an earlier run",
        "2 weights rounded by tabu",
    ]
    assert fingerprint(model) == fingerprint(whole)
    assert not [*tmp_path.rglob("*.part")]
    # nothing is left to do, and other options find nothing
    _, _, model, _ = net()
    changes = step.apply(model, Context(data, resume=tmp_path))
    assert changes.done[0] == "4 weights taken up from an earlier run"
    assert fingerprint(model) == fingerprint(whole)
    for other in (
        (AdaRound(sequential=sequential, effort=0.5), Context(data, resume=tmp_path)),
        (step, Context(data, resume=tmp_path, seed=1)),
        (step, Context(data[1:], resume=tmp_path)),
    ):
        _, _, model, _ = net()
        assert other[0].apply(model, other[1]).done == ["4 weights rounded by tabu"]


def test_a_broken_checkpoint_is_named(tmp_path):
    _, data, model, _ = net()
    AdaRound().apply(model, Context(data, resume=tmp_path))
    (path, *_) = sorted(tmp_path.rglob("*.npz"))
    path.write_bytes(path.read_bytes()[:100])
    _, _, model, _ = net()
    with pytest.raises(OnnxqError, match="delete it, and the layer is done again"):
        AdaRound().apply(model, Context(data, resume=tmp_path))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    _, data, model, _ = net()
    with pytest.raises(OnnxqError, match=r"cannot be written.*another folder"):
        AdaRound().apply(model, Context(data, resume=tmp_path / "file"))
    checkpoint = Checkpoint(tmp_path / "gone", "0" * 16)
    (tmp_path / "gone" / ("0" * 16)).rmdir()
    with pytest.raises(OnnxqError, match=r"cannot be written.*another folder"):
        checkpoint.keep(model.layers()[0], 0)


class Clock:
    """A clock that each look moves on."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def monotonic(self):
        self.now += self.step
        return self.now


def test_when_the_time_is_up_the_rest_is_rounded_to_nearest(monkeypatch):
    proto, data, model, _ = net()
    ctx = Context(data, budget_s=1e-9)
    changes = AdaRound().apply(model, ctx)
    assert not changes.done
    assert len(reasons(changes)) == 4
    assert {*reasons(changes).values()} == {"the time was up; rounded to nearest"}
    assert np.isfinite(error(proto, model, data))


def test_time_that_runs_out_on_the_way(monkeypatch):
    _, data, model, _ = net()
    clock = Clock(1.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    ctx = Context(data)
    ctx.deadline = 9.0
    changes = AdaRound().apply(model, ctx)
    done = int(changes.done[0].split()[0])
    assert 0 < done < 4
    assert len(reasons(changes)) == 4 - done


def test_more_time_gives_more_effort(monkeypatch):
    efforts = {}
    original = AdaRound._search
    for budget in (20.0, 100.0, 1e6):
        _, data, model, _ = net()
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=Clock(1.0).monotonic))
        seen = []

        def watched(self, problem, effort, seed, threads, seen=seen):
            seen.append(effort)
            return original(self, problem, 0.1, seed, threads)

        monkeypatch.setattr(AdaRound, "_search", watched)
        ctx = Context(data)
        ctx.deadline = budget
        AdaRound(effort=0.5).apply(model, ctx)
        efforts[budget] = sum(seen)
    assert efforts[20.0] < efforts[100.0] <= efforts[1e6]
    assert seen[0] == 0.5
    assert max(seen) == 0.5 * module.MOST_EFFORT


def test_fewer_samples_where_activations_would_take_too_much():
    _, data, model, _ = net(40)
    data = [{"x": np.tile(f["x"], (8, 1, 1, 1))} for f in data]
    inputs = LayerInputs(
        model,
        model.layers(),
        Context(data),
        rng=np.random.default_rng,
        sequential=True,
        samples=0,
        patches=100,
        memory_mb=1,
    )
    assert 1 <= len(inputs.samples) < 40
    (note,) = inputs.notes
    assert note == f"{len(inputs.samples)} of 40 samples used: more would take more than 1 MB"


@pytest.mark.parametrize("memory_mb", [1024, 1])
def test_groups_of_layers_see_the_same_inputs(memory_mb, monkeypatch):
    """In one pass, layers of a second group meet the float model's inputs, too."""
    monkeypatch.setattr("onnxq.layer_inputs._MB", 8000)
    _, data, model, ctx = net()
    runs = []
    original = LayerInputs._collect
    monkeypatch.setattr(
        LayerInputs, "_collect", lambda self, i: runs.append(i) or original(self, i)
    )
    options = {"rng": lambda i: np.random.default_rng(0), "sequential": False}
    inputs = LayerInputs(
        model, model.layers(), ctx, samples=0, patches=10**6, memory_mb=memory_mb, **options
    )
    means = []
    for layer in model.layers():
        means.append(inputs.measure(layer).mean)
        layer.set_weight(layer.weight * 2)
        inputs.settle(layer)
    assert (len(runs) > 1) is (memory_mb == 1)
    wanted = np.mean([run(load(parse(NET)).to_proto(["f"]), f)["f"] for f in data], axis=(0, 1))
    np.testing.assert_allclose(means[-1][0], wanted, rtol=1e-4, atol=1e-4)


def test_a_layer_whose_statistics_do_not_fit_is_declined():
    proto = parse("g (float[N,200] x) => (float[] y) <float[200,4] w> { y = Gemm(x, w) }")
    model, ctx = coarse(proto, samples(proto))
    changes = AdaRound(memory_mb=1).apply(model, ctx)
    assert reasons(changes) == {"Gemm_0": "its statistics take 1 MB; rounded to nearest"}


def test_what_it_declines():
    text = (
        "g (float[N,4,8,8] x) => (float[] y) <float[4,4,3,3] w, float[4,4,1,1] v>"
        "{ c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, w)"
        " y = Conv(d, v) }"
    )
    proto = parse(text)
    for node, name in zip(proto.graph.node, ("one", "relu", "two", "three"), strict=True):
        node.name = name
    model, ctx = load(proto), Context(samples(proto))
    Calibrate().apply(model, ctx)
    changes = AdaRound().apply(model, ctx)
    assert {*reasons(changes)} == {"one", "two"}
    assert all("shared" in why for why in reasons(changes).values())
    assert changes.done == ["1 weights rounded by tabu"]


def test_a_weight_on_the_left_is_declined():
    proto = parse("g (float[N,6,8] x) => (float[] y) <float[5,6] w> { y = MatMul(w, x) }")
    model, ctx = load(proto), Context([models.feeds(proto)])
    Calibrate().apply(model, ctx)
    assert [*reasons(AdaRound().apply(model, ctx))] == ["MatMul_0"]


def test_without_encodings_nothing_happens():
    proto = parse(LAYERS["conv"])
    model = load(proto)
    assert not AdaRound().apply(model, Context())
    assert model.to_proto() == load(proto).to_proto()


@pytest.mark.parametrize(
    "x", [np.zeros((1, 4, 9, 9)), np.full((1, 4, 9, 9), 2.0), np.eye(9)[None, None].repeat(4, 1)]
)
def test_samples_that_say_little(x):
    """No spread, or less than a patch has values: H is singular."""
    proto = parse(LAYERS["conv"])
    data = [{"x": x.astype(np.float32)}]
    model, ctx = coarse(proto, data)
    plain = np.abs(differences(proto, nearest(model), data)).max()
    AdaRound().apply(model, ctx)
    assert np.isfinite(model.layers()[0].weight).all()
    assert np.abs(differences(proto, model, data)).max() <= plain + 1e-5


def test_a_sample_without_a_patch_leaves_nearest():
    """Compress leaves the rows that k says; the samples of the run say none."""
    proto = parse(
        "g (float[N,8] x, bool[N] k) => (float[M,6] y) <float[8,6] w>"
        "{ c = Compress<axis=0>(x, k) r = Relu(c) y = MatMul(r, w) }"
    )
    x = models.feeds(parse("g (float[2,8] x) => (float[2,8] y) { y = Relu(x) }"))["x"]
    model, _ = coarse(proto, [{"x": x, "k": np.array([True, True])}])
    changes = AdaRound().apply(model, Context([{"x": x, "k": np.array([False, False])}]))
    assert reasons(changes) == {"MatMul_2": "no sample reached it; rounded to nearest"}


def test_values_too_large_are_named():
    proto = parse(LAYERS["conv"])
    data = samples(proto)
    model, _ = coarse(proto, data)
    huge = [{"x": f["x"] * np.float32(1e30)} for f in data]
    with pytest.raises(CalibrationError, match="tensor x"):
        AdaRound(sequential=False).apply(model, Context(huge))


@pytest.mark.parametrize(
    "options",
    [{"effort": 0}, {"patches": 0}, {"iterations": 0}, {"memory_mb": 0}, {"samples": -1}],
)
def test_options_that_mean_nothing(options):
    (name,) = options
    with pytest.raises(RecipeError, match=f"{name}: wanted"):
        AdaRound(**options)


def test_a_budget_that_means_nothing():
    with pytest.raises(RecipeError, match="budget: wanted more than 0 seconds, got -1"):
        Context(budget_s=-1)
    assert Context(budget_s=5).deadline > time.monotonic()


SHARED = (
    "g (float[N,3,10,10] x) => (float[] y) <float[6,3,3,3] w, float[6,3,3,3] v, float[4,12,1,1] u>"
    "{ a = Conv(x, w) b = Conv(x, v) c = Concat<axis=1>(a, b) r = Relu(c) y = Conv(r, u) }"
)


@pytest.mark.parametrize("sequential", [True, False])
def test_a_resumed_run_draws_the_same_patches(tmp_path, monkeypatch, sequential):
    """Also where it broke off between layers that share patches, or a run over the samples."""
    monkeypatch.setattr("onnxq.layer_inputs.LEAST_PATCHES", 1)
    monkeypatch.setattr("onnxq.layer_inputs.PATCHES_PER_VALUE", 1)
    proto = parse(SHARED)
    data = samples(proto)
    step = AdaRound(patches=30, sequential=sequential)
    whole, ctx = coarse(proto, data)
    model = whole.clone()
    step.apply(whole, ctx)
    original, count = Quadratic.of, []

    def broken(layer, statistics):
        count.append(layer.name)
        if len(count) == 2:
            raise KeyboardInterrupt
        return original(layer, statistics)

    monkeypatch.setattr(module.Quadratic, "of", broken)
    with pytest.raises(KeyboardInterrupt):
        step.apply(model.clone(), Context(data, resume=tmp_path))
    monkeypatch.setattr(module.Quadratic, "of", original)
    changes = step.apply(model, Context(data, resume=tmp_path))
    assert changes.done[0] == "1 weights taken up from an earlier run"
    assert fingerprint(model) == fingerprint(whole)


def test_statistics_that_do_not_fit_twice_are_used_without_belief_in_drifts(monkeypatch):
    proto = parse("g (float[N,200] x) => (float[] y) <float[200,4] w> { y = Gemm(x, w) }")
    data = samples(proto, 60)
    model, ctx = coarse(proto, data)
    plain = error(proto, nearest(model), data)
    changes = AdaRound(memory_mb=2).apply(model, ctx)
    why = "its statistics do not fit twice: no drift is believed"
    assert reasons(changes) == {"Gemm_0": why}
    assert changes.done == ["1 weights rounded by tabu"]
    assert error(proto, model, data) < 0.9 * plain
