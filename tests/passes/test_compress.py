"""Compression to a budget: met, with the error that was expected, and refused with what can be."""

import json

import numpy as np
import pytest

from onnxq.analysis.cost import layer_costs, tensor_shapes
from onnxq.curvature import curvatures
from onnxq.errors import CalibrationError, OnnxqError, RecipeError
from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Compress, compress
from onnxq.runtime import Session
from onnxq.sensitivity import measure
from onnxq.splits import Rows, Spatial
from tests.models import parse
from tests.passes.test_spatial_svd import blocks, samples, sqnr


def macs(model):
    shape = {"x": (1, 3, 12, 12)}
    return {c.name: c.macs for c in layer_costs(model, tensor_shapes(model, shape))}


def nbytes(model):
    return model.nbytes


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("search", ["optimal", "greedy"])
def test_a_budget_of_macs_is_met(share, search):
    model, data = blocks(), samples()
    step = Compress(share=share, multiple=1, search=search)
    small, report = PassManager(step)(model, data)
    before, after = sum(macs(model).values()), sum(macs(small).values())
    assert share - 0.06 < after / before <= share
    facts = report.facts["compression"]
    assert facts["macs"] == {"before": before, "after": after}
    for layer in facts["layers"]:
        parts = [m for name, m in macs(small).items() if name.startswith(layer["name"])]
        assert sum(parts) == layer["macs"]["after"]
        assert layer["macs"]["before"] == macs(model)[layer["name"]]


def test_a_budget_of_bytes_is_met():
    model, data = blocks(), samples()
    small, report = PassManager(Compress(budget="bytes", share=0.6, multiple=1))(model, data)
    assert nbytes(small) <= 0.6 * nbytes(model)
    assert report.facts["compression"]["bytes"] == {"before": model.nbytes, "after": small.nbytes}


@pytest.mark.parametrize("budget", ["macs", "bytes"])
def test_what_was_chosen_lies_on_the_curve_of_all_budgets(budget):
    model, data = blocks(), samples()
    step = Compress(budget=budget, share=0.6, multiple=1)
    _, report = PassManager(step)(model, data)
    facts = report.facts["compression"]
    found, chosen = facts["tradeoff"], facts["tradeoff"]["chosen"]
    assert found["of"] == budget
    assert chosen["kept"] == pytest.approx(facts[budget]["after"] / facts[budget]["before"])
    loss = sum(layer["error"] * layer["effect"] for layer in facts["layers"])
    assert chosen["error"] == pytest.approx(loss)
    curve = [(p["kept"], p["error"]) for p in found["points"] if p["method"] == "auto"]
    assert (chosen["kept"], chosen["error"]) in curve


def test_a_budget_of_time_is_met_by_trial(monkeypatch):
    """Time that is but the number of multiply-accumulates, and some that never goes away."""
    model, data = blocks(), samples(8)
    whole = sum(macs(model).values())
    timed = []

    def runs(sessions, feed, **options):
        timed.append(sessions)
        return [np.ones(3), np.full(3, costs[id(sessions[1])])]

    costs = {}
    original = compress.Session

    def session(proto, **options):
        made = original(proto, **options)
        costs[id(made)] = 0.3 + 0.7 * sum(macs(load(proto)).values()) / whole
        timed.append(made)  # or another one gets its id
        return made

    monkeypatch.setattr(compress.latency, "runs", runs)
    monkeypatch.setattr(compress, "Session", session)
    small, _ = PassManager(Compress(budget="latency", share=0.8, multiple=1))(model, data)
    share = sum(macs(small).values()) / whole
    assert 0.65 < share <= 0.5 / 0.7
    with pytest.raises(OnnxqError, match=r"latency: a share of 0.2 cannot be met; 0\.\d\d can"):
        PassManager(Compress(budget="latency", share=0.2, multiple=1))(model, data)


def test_the_methods_are_mixed_layer_by_layer():
    """One kernel is low in rank as columns and rows, one as a matrix of outputs."""
    model, data = blocks(), samples()
    rng = np.random.default_rng(0)
    _, second, third, *_ = model.layers()
    parts = rng.normal(size=(8, 2, 3)), rng.normal(size=(2, 8, 3))
    second.set_weight(0.2 * np.einsum("orj,rci->ocij", *parts).astype(np.float32))
    low = rng.normal(size=(8, 2)) @ rng.normal(size=(2, 72))
    third.set_weight((0.1 * low).reshape(8, 8, 3, 3).astype(np.float32))
    whole, saved = sum(macs(model).values()), 2 * 144 * (576 - 160)  # at rank 2, for either
    share = 1 - saved / whole + 1e-6
    small, report = PassManager(Compress(share=share, multiple=1))(model, data)
    layers = report.facts["compression"]["layers"]
    assert {layer["name"]: layer["method"] for layer in layers} == {
        second.name: "spatial-svd",
        third.name: "weight-svd",
    }
    assert sqnr(model, small, data) > 60


def test_errors_and_effects_are_those_of_the_layer_alone():
    model, data = blocks(), samples()
    table = measure(
        model,
        Context(data),
        [Spatial(1), Rows(1)],
        options="",
        rng=np.random.default_rng(0),
        samples=0,
        tried=64,
        patches=1 << 20,
    )
    assert table.macs == sum(macs(model).values())
    outputs = {layer.name: layer.y.name for layer in model.layers()}
    layers = [x for x in model.layers() if x.name in {c.name for c in table.choices}]
    curved, unknown = curvatures(model, layers, Context(data), np.random.default_rng(0))
    assert not unknown
    for choice in table.choices[:4]:
        tried = min(choice.candidates, key=lambda c: abs(c.macs - 0.5 * choice.macs))
        step = compress.METHODS[tried.method](
            ratio=1.0,
            ratios=((choice.name, tried.ratio),),
            multiple=1,
            reconstruct="split",
            patches=1 << 20,
        )
        small, _ = PassManager(step)(model, data)
        noise = {"own": 0.0, "y": 0.0}
        power = {"own": 0.0, "y": 0.0}
        name = outputs[choice.name]
        pair = [Session(m.to_proto([name]), outputs=[name, "y"]) for m in (model, small)]
        runs = [[s.run(feed) for s in pair] for feed in data]
        centre = np.mean([a[name].mean((0, 2, 3)) for a, _ in runs], 0).reshape(1, -1, 1, 1)
        root = curved[choice.name].root[0]
        for a, b in runs:
            pair = a[name] - b[name], a[name] - centre
            own = [np.einsum("oc,nchw->nohw", root, d) for d in pair]
            outputs_of = [a["y"] - b["y"], a["y"]]
            for key, (missed, whole) in (("own", own), ("y", outputs_of)):
                noise[key] += float(np.square(missed).sum())
                power[key] += float(np.square(whole).sum())
        # the pass turns the factors, so it is a little better than what was expected of it
        own = noise["own"] / power["own"]
        assert 0.4 * tried.error < own < 1.1 * tried.error
        assert 0.3 < noise["y"] / power["y"] / (choice.effect * own) < 2.5


def test_excluded_layers_stay_whole():
    model, data = blocks(), samples()
    name = model.layers()[2].name
    step = Compress(share=0.8, multiple=1, exclude=(name,))
    _, report = PassManager(step)(model, data)
    names = [layer["name"] for layer in report.facts["compression"]["layers"]]
    assert names
    assert name not in names
    with pytest.raises(RecipeError, match="matches no node"):
        PassManager(Compress(exclude=("nothing*",)))(model, data)


def test_sensitivities_are_kept_and_used_again(tmp_path, monkeypatch):
    model, data = blocks(), samples()
    path = tmp_path / "s.json"
    options = {"multiple": 1, "sensitivities": str(path)}
    first, _ = PassManager(Compress(share=0.6, **options))(model, data)
    kept = json.loads(path.read_text())
    assert {c["name"] for c in kept["choices"]} <= {layer.name for layer in model.layers()}
    monkeypatch.setattr(compress, "measure", None)
    again, _ = PassManager(Compress(share=0.6, **options))(model, data)
    assert again.digest() == first.digest()
    other, _ = PassManager(Compress(share=0.9, **options))(model, data)
    assert sum(macs(other).values()) > sum(macs(first).values())
    with pytest.raises(OnnxqError, match="made with other options"):
        PassManager(Compress(share=0.6, multiple=2, sensitivities=str(path)))(model, data)


def test_what_cannot_be_met_says_what_can():
    model, data = blocks(), samples(8)
    with pytest.raises(OnnxqError, match=r"macs: a share of 0.01 cannot be met; 0\.\d+ can"):
        PassManager(Compress(share=0.01))(model, data)
    plain = load(parse("g (float[N,4] x) => (float[] y) <float[4,2] w> { y = MatMul(x, w) }"))
    feeds = [{"x": np.ones((1, 4), np.float32)}]
    with pytest.raises(OnnxqError, match=r"nothing in the .* compressed; .*saves anything"):
        PassManager(Compress())(plain, feeds)
    with pytest.raises(OnnxqError, match="all layers that could be are excluded"):
        PassManager(Compress(exclude=("*",)))(blocks(), data)
    with pytest.raises(CalibrationError, match="needs calibration samples"):
        PassManager(Compress())(model)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"share": 0.0}, r"wanted a share in \(0, 1\], got 0"),
        ({"share": 1.01}, r"got 1.01"),
        ({"methods": ("spatial",)}, "no method 'spatial'; did you mean spatial-svd"),
        ({"methods": ()}, "wanted at least one"),
        ({"multiple": 0}, "multiple: wanted at least 1"),
        ({"measured": -1}, "measured: wanted 0 or more"),
    ],
)
def test_options_that_mean_nothing(options, says):
    with pytest.raises(RecipeError, match=says):
        Compress(**options)
