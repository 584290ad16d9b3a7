"""Passes in order: the input stays, revisions retire statistics, failures say what was done."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest

from onnxq.errors import CalibrationError, ModelError, PassError, TargetError
from onnxq.model import load
from onnxq.pass_manager import Changes, Context, Pass, PassManager, options
from onnxq.passes import GPTQ, Calibrate, Clean, InsertQDQ
from tests import models
from tests.checks import ops, run
from tests.models import parse

TEXT = (
    "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[4] b, float[5,4,3,3] v>"
    "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Scale every weight."""

    name: ClassVar[str] = "scale"
    by: float = 2.0

    def apply(self, model, ctx):
        changes = Changes()
        for layer in model.layers():
            layer.set_weight(layer.weight * np.float32(self.by))
            changes.add(layer.name)
        return changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Idle:
    """Do nothing."""

    name: ClassVar[str] = "idle"

    def apply(self, model, ctx):
        changes = Changes()
        changes.skip("everything", "idle")
        return changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fail:
    """Raise an error."""

    name: ClassVar[str] = "fail"
    error: Exception = dataclasses.field(default_factory=lambda: KeyError("oops"))

    def apply(self, model, ctx):
        raise self.error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Break:
    """Leave a graph that is none."""

    name: ClassVar[str] = "break"

    def apply(self, model, ctx):
        model.graph.nodes.reverse()
        changes = Changes()
        changes.add("reversed")
        return changes


def data(count=4):
    return [models.feeds(parse(TEXT), seed=seed) for seed in range(count)]


FULL = (Clean(), Calibrate(), GPTQ(), InsertQDQ())


def test_passes_run_in_order_on_a_copy():
    proto = parse(TEXT)
    kept = proto.SerializeToString(deterministic=True)
    model = load(proto)
    before = model.to_proto().SerializeToString(deterministic=True)
    for given in (proto, model):
        after, report = PassManager(*FULL)(given, data())
        assert [p.name for p in report.passes] == [p.name for p in FULL]
        assert "QuantizeLinear" in ops(after)
    assert proto.SerializeToString(deterministic=True) == kept
    assert model.to_proto().SerializeToString(deterministic=True) == before
    assert not model.encodings
    assert model.revision == 0


def test_a_file_is_never_changed(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(parse(TEXT).SerializeToString())
    before = path.read_bytes()
    PassManager(*FULL)(path, data())
    assert path.read_bytes() == before


def test_it_nests_and_joins():
    inner = PassManager(Scale(by=3.0))
    nested = PassManager(Scale(), PassManager(inner), Scale())
    assert isinstance(nested, Pass)
    after, report = nested(parse(TEXT))
    assert [p.name for p in report.passes] == ["scale"] * 3
    wanted = load(parse(TEXT)).layers()[0].weight * np.float32(12)
    np.testing.assert_allclose(after.layers()[0].weight, wanted, rtol=1e-6)
    assert after.revision == 3
    joined = PassManager(Scale()) + PassManager(Idle())
    assert joined == PassManager(Scale(), Idle())
    assert hash(joined) == hash(PassManager(Scale(), Idle()))
    assert joined != PassManager(Scale(by=1.0), Idle())
    assert [*joined] == [Scale(), Idle()]
    assert repr(joined) == "PassManager(Scale(by=2.0), Idle())"


def test_the_hook_sees_each_pass():
    seen = []
    manager = PassManager(
        Scale(), Idle(), after=lambda step, model, changes: seen.append((step, len(changes.done)))
    )
    manager(parse(TEXT))
    assert seen == [(Scale(), 2), (Idle(), 0)]


def test_the_record_of_a_pass():
    _, report = PassManager(Scale(by=4.0), Idle())(parse(TEXT))
    first, second = report.passes
    assert first.options == {"by": 4.0}
    assert first.nbytes == 4 * (4 * 27 + 4 + 5 * 36)
    assert first.seconds >= 0
    assert len(first.changes.done) == 2
    assert not second.changes
    assert report.skipped == [("idle", second.changes.skipped[0])]
    plain = report.to_dict()["passes"]
    assert [p["name"] for p in plain] == ["scale", "idle"]
    assert options(Calibrate(exclude=("a",)))["exclude"] == ["a"]


def test_only_changes_raise_the_revision():
    after, _ = PassManager(Idle(), Scale(), Idle())(parse(TEXT))
    assert after.revision == 1


def test_an_unforeseen_error_says_what_was_done():
    with pytest.raises(PassError, match="oops") as caught:
        PassManager(Idle(), Scale(), Fail())(parse(TEXT))
    assert caught.value.name == "fail"
    assert caught.value.done == ("idle", "scale")
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_unforeseen_error_within_a_nest_is_wrapped_once():
    with pytest.raises(PassError) as caught:
        PassManager(Idle(), PassManager(Scale(), Fail()))(parse(TEXT))
    assert (caught.value.name, caught.value.done) == ("fail", ("idle", "scale"))


def test_known_errors_pass_through():
    error = ModelError("broken", where="here")
    with pytest.raises(ModelError) as caught:
        PassManager(Fail(error=error))(parse(TEXT))
    assert caught.value is error


def test_a_pass_that_breaks_the_graph_is_caught():
    with pytest.raises((ModelError, PassError)):
        PassManager(Break())(parse(TEXT))


def test_statistics_are_kept_until_the_model_changes():
    model, ctx = load(parse(TEXT)), Context(data())
    first = ctx.statistics(model, ["x", "r"])
    assert ctx.statistics(model, ["r"]) is first
    assert ctx.statistics(model, ["r"], histogram=False) is first
    assert ctx.observed is first
    assert ctx.statistics(model, ["c"]) is not first
    first = ctx.statistics(model, ["x", "r"])
    PassManager(Scale()).apply(model, ctx)
    second = ctx.statistics(model, ["x", "r"])
    assert second is not first
    assert second["x"].maximum == first["x"].maximum
    assert second["r"].maximum > first["r"].maximum


def test_samples_are_checked_once_per_model_and_revision():
    model, ctx = load(parse(TEXT)), Context(data())
    ctx.statistics(model, ["r"])
    samples = ctx.samples(model)
    assert ctx.samples(model) is samples
    for _ in range(2):  # from the first on, each time
        for feed, wanted in zip(samples, data(), strict=True):
            np.testing.assert_array_equal(feed["x"], wanted["x"])
    other = load(parse(TEXT.replace("x", "other")))
    with pytest.raises(CalibrationError, match="other"):
        next(iter(ctx.samples(other)))
    model.revision += 1
    assert ctx.samples(model) is not samples


def test_statistics_without_histogram_do_not_serve_for_those_with():
    model, ctx = load(parse(TEXT)), Context(data())
    plain = ctx.statistics(model, ["r"], histogram=False)
    assert plain["r"].bins is None
    assert ctx.statistics(model, ["r"])["r"].bins is not None


def test_statistics_that_are_given_are_used():
    model = load(parse(TEXT))
    given = Context(data()).statistics(model, ["x", "r"])
    ctx = Context(statistics=given)
    assert ctx.statistics(model, ["r"]) is given
    with pytest.raises(CalibrationError, match="samples"):
        ctx.statistics(model, ["c"])
    with pytest.raises(CalibrationError, match="samples"):
        ctx.statistics(model, ["r"], channels=["r"])


def test_statistics_are_collected_anew_for_more_channels():
    model, ctx = load(parse(TEXT)), Context(data())
    without = ctx.statistics(model, ["x", "r"])
    found = ctx.statistics(model, ["x", "r"], channels=["r"])
    assert found is not without
    assert ctx.statistics(model, ["r"]) is found
    stacked = np.concatenate([run(model.to_proto(["r"]), feed)["r"] for feed in data()])
    wanted = [stacked.min(axis=(0, 2, 3)), stacked.max(axis=(0, 2, 3))]
    np.testing.assert_allclose(found["r"].channels, wanted, rtol=1e-6)


@pytest.mark.parametrize("opset", [13, 18])
def test_channel_ranges(opset):
    model, ctx = load(parse(TEXT, opset=opset)), Context(data())
    model.infer()
    found = ctx.channel_ranges(model, ["c", "x"])
    assert set(found) == {"c", "x"}
    stacked = np.concatenate([feed["x"] for feed in data()])
    np.testing.assert_array_equal(found["x"][0], stacked.min(axis=(0, 2, 3)))
    np.testing.assert_array_equal(found["x"][1], stacked.max(axis=(0, 2, 3)))
    assert ctx.channel_ranges(model, []) == {}


def test_random_numbers_depend_on_the_seed_and_the_pass():
    draws = [
        Context(seed=seed).rng(step).integers(1 << 40)
        for seed, step in ((0, Scale()), (0, Scale(by=9.0)), (1, Scale()), (0, Idle()))
    ]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_the_same_run_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        model, _ = PassManager(*FULL)(parse(TEXT), data(), seed=3, threads=1)
        model.save(tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_an_unknown_target():
    with pytest.raises(TargetError, match="did you mean ort-cpu"):
        Context(target="ort-cp")


@pytest.mark.parametrize("opset", [11, 17, 18])
def test_channel_moments_are_those_of_all_values(opset):
    proto = parse("g (float[N,3,H,W] x) => (float[N,3,H,W] y) { y = Relu(x) }", opset=opset)
    rng = np.random.default_rng(0)
    level = np.array([1000.0, 5.0, -3.0], np.float32)[:, None, None]
    feeds = [
        {"x": (rng.normal(size=(2, 3, 5, w)) * 0.1 + level + w).astype(np.float32)}
        for w in (3, 4, 9)
    ]
    model = load(proto)
    model.infer()
    found = Context(feeds).channel_moments(model, ["x", "y", "nothing"])
    assert found.keys() == {"x", "y"}
    x = np.concatenate([f["x"].transpose(1, 0, 2, 3).reshape(3, -1) for f in feeds], axis=1)
    for name, values in (("x", x), ("y", np.maximum(x, 0))):
        mean, std = found[name]
        np.testing.assert_allclose(mean, values.mean(axis=1, dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(std, values.std(axis=1, dtype=np.float64), rtol=1e-4)


def test_channel_moments_need_samples_only_for_something():
    model = load(parse(TEXT))
    assert Context().channel_moments(model, []) == {}
    with pytest.raises(CalibrationError, match="calibration samples"):
        Context().channel_moments(model, ["x"])
