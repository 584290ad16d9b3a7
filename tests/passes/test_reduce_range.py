"""7 bits where 8-bit products overflow, and nowhere else."""

import numpy as np
import pytest

from onnxq import recipe
from onnxq.errors import RecipeError
from onnxq.model import load, producer
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import GPTQ, Calibrate, Clean, InsertQDQ, ReduceRange
from onnxq.targets import TARGETS
from tests import models
from tests.checks import pair_sums

LIMIT = 32767
TEXT = """
    g (float[N,4,8,8] x) => (float[] y) {
        a = Conv<pads=[1,1,1,1]>(x, loud)
        b = Relu(a)
        c = Conv(b, calm)
        d = Relu(c)
        e = Conv<group=8, pads=[1,1,1,1]>(d, depthwise)
        y = Conv(e, loud2)
    }
"""


def network():
    """Layers of large equal weights overflow, those of a few large ones among small ones do not."""
    rng = np.random.default_rng(0)
    calm = rng.normal(size=(8, 8, 1, 1)) * 0.02
    calm[:, 0] = 1.0
    values = {
        "loud": np.abs(rng.uniform(0.8, 1, (8, 4, 3, 3))),
        "calm": calm,
        "depthwise": rng.uniform(0.5, 1, (8, 1, 3, 3)),
        "loud2": rng.uniform(0.8, 1, (3, 8, 1, 1)),
    }
    values = {n: v.astype(np.float32) for n, v in values.items()}
    declared = ", ".join(f"float{list(v.shape)} {n}" for n, v in values.items())
    return models.parse(TEXT.replace(") {", f") <{declared}> {{"), **values)


def samples(count=4):
    rng = np.random.default_rng(1)
    return [{"x": rng.uniform(0, 1, (1, 4, 8, 8)).astype(np.float32)} for _ in range(count)]


def reduced(target="ort-x64-avx2", feeds=None, *, last=(), **options):
    feeds = samples() if feeds is None else feeds
    model, report = PassManager(Clean(), Calibrate(), ReduceRange(**options), *last)(
        network(), feeds, target=target
    )
    changes = next(p.changes for p in report.passes if p.name == "reduce-range")
    return model, changes


def kinds(model):
    return {n: model.encodings[n].dtype for n in ("loud", "calm", "depthwise", "loud2")}


def test_only_the_layers_that_overflow_give_up_a_bit():
    model, changes = reduced()
    assert kinds(model) == {
        "loud": "int7",
        "calm": "int8",
        "depthwise": "int8",
        "loud2": "int7",
    }
    assert len(changes.done) == 2
    assert all("7 bits, sums of pairs reach" in what for what in changes.done)
    why = {skip.layer: skip.why for skip in changes.skipped}
    assert why == {
        "Conv_2": why["Conv_2"],
        "Conv_4": "depthwise convolutions are multiplied exactly",
    }
    assert why["Conv_2"].startswith("sums of pairs reach ")


def test_the_range_of_the_weights_stays():
    before, _ = reduced("ort-x64")
    after, _ = reduced()
    for name in ("loud", "loud2"):
        old, new = before.encodings[name], after.encodings[name]
        np.testing.assert_allclose(new.scale * 63, old.scale * 127, rtol=1e-6)
        assert new.axis == old.axis
    assert after.encodings["calm"] == before.encodings["calm"]


@pytest.mark.parametrize("name", [n for n, t in TARGETS.items() if not t.saturates])
def test_targets_that_do_not_saturate_keep_their_bits(name):
    model, changes = reduced(name)
    assert set(kinds(model).values()) == {"int8"}
    assert not changes.done
    assert not changes.skipped


@pytest.mark.parametrize("step", [GPTQ(), None])
def test_what_is_written_does_not_overflow(step):
    """Pair by pair, on the integers of the file and of the samples, rounding by error included."""
    last = [s for s in (step, InsertQDQ()) if s is not None]
    model, _ = reduced(last=last)
    plain, _ = reduced("ort-x64", last=last)
    found = {}
    for name, written in (("all 8 bits", plain), ("reduced", model)):
        node = next(n for n in written.graph.nodes if n.op == "Conv")
        x, w = (producer(t) for t in node.inputs[:2])
        integers = written.array(w.inputs[0])
        assert integers.dtype == np.int8
        scale, zero = (written.array(t) for t in x.inputs[1:])
        q = [np.clip(np.rint(f["x"] / scale) + zero, 0, 255) for f in samples()]
        sums = np.concatenate([pair_sums(i, integers, pad=1, zero=int(zero)) for i in q])
        found[name] = int(((sums > LIMIT) | (sums < -LIMIT - 1)).sum())
        if name == "reduced":
            assert np.abs(integers).max() <= 64
    assert found["all 8 bits"] > 1000
    assert found["reduced"] == 0


def test_where_each_option_does_it():
    assert set(kinds(reduced(where="all")[0]).values()) == {"int7", "int8"}
    assert kinds(reduced(where="all")[0])["depthwise"] == "int8"
    by = {
        w: {n for n, k in kinds(reduced(where=w)[0]).items() if k == "int7"}
        for w in ("error", "samples", "ranges", "all")
    }
    assert by["error"] <= by["samples"] <= by["ranges"] <= by["all"]
    assert by["error"] == {"loud", "loud2"}
    assert by["all"] == {"loud", "loud2", "calm"}


def test_quiet_samples_do_not_overflow():
    """The grid is that of a loud sample; the others use a part of it."""
    loud, quiet = samples(1), [{"x": s["x"] * 0.3} for s in samples(3)]
    context = Context(quiet, target="ort-x64-avx2")
    model = load(network())
    PassManager(Clean(), Calibrate()).apply(model, Context(loud, target="ort-x64-avx2"))
    changes = ReduceRange(where="ranges").apply(model, context)
    assert not changes.done
    assert {n: k for n, k in kinds(model).items() if k != "int8"} == {}


def test_weights_that_have_fewer_bits_are_left_alone():
    steps = Clean(), Calibrate(weights="int4/channel"), ReduceRange(where="all")
    model, report = PassManager(*steps)(network(), samples(), target="ort-x64-avx2")
    assert set(kinds(model).values()) == {"int4"}
    assert not report.passes[-1].changes.done


@pytest.mark.parametrize("options", [{"samples": -1}, {"patches": 0}])
def test_options_that_mean_nothing(options):
    with pytest.raises(RecipeError, match="wanted at least 0 and 1"):
        ReduceRange(**options)


@pytest.mark.parametrize("name", ["default", "accurate", "per-tensor", "data-free", "minmax"])
def test_recipes_look_at_it_before_they_round(name):
    names = [step.name for step in recipe.load(name).passes]
    assert names.index("calibrate") < names.index("reduce-range") < len(names) - 1
    for rounds in {"gptq", "adaround", "bias-correction"} & {*names}:
        assert names.index("reduce-range") < names.index(rounds)
