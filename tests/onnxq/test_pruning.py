"""Candidates against models that are really cut, and the errors that these really make."""

import numpy as np
import pytest

from onnxq.analysis.cost import layer_costs, tensor_shapes
from onnxq.calibration import Calibration
from onnxq.cut import cut
from onnxq.dependency import find_groups
from onnxq.model import load
from onnxq.pruning import (
    Costs,
    candidates,
    channels_at,
    dead_classes,
    order_by_error,
    order_by_magnitude,
    trial,
)
from onnxq.runtime import Session
from onnxq.second_order import collect, input_session
from tests import models
from tests.checks import run
from tests.models import parse

BLOCK = (
    "g (float[N,3,9,9] x) => (float[] y) <float[16,3,3,3] w, float[16] b, float[16,1,3,3] d,"
    " float[8,16,1,1] v, float[8,8,3,3] a, float[8,8,3,3] e, float[8,10] u, float[10] c>"
    "{ f = Conv(x, w, b) r = Relu(f) p = Conv<group=16>(r, d) q = Conv(p, v)"
    " i = Conv<pads=[1,1,1,1]>(q, a) t = Relu(i) o = Conv<pads=[1,1,1,1]>(t, e) s = Add(o, q)"
    " m = GlobalAveragePool(s) h = Flatten(m) y = Gemm(h, u, c) }"
)


def named(text):
    proto = parse(text)
    for node in proto.graph.node:
        node.name = node.output[0]
    return proto


def known(proto, count=24):
    """The model, its groups, and statistics of what every layer reads."""
    model = load(proto)
    found = find_groups(model)
    layers = model.layers()
    session = input_session(model, layers, 1)
    feeds = [models.feeds(proto, seed=seed) for seed in range(count)]
    samples = Calibration(feeds).bind(session.inputs)
    rng = np.random.default_rng(0)
    return model, found, collect(layers, session, samples, expected=count, rng=rng), feeds


@pytest.mark.parametrize(
    ("size", "ratio", "multiple", "least", "wanted"),
    [
        (64, 0.75, 8, 1, 48),
        (64, 0.7, 8, 1, 48),
        (64, 0.65, 8, 1, 40),
        (16, 0.75, 8, 1, 16),
        (12, 0.5, 8, 1, 8),
        (6, 0.5, 8, 1, 6),
        (6, 0.5, 1, 1, 3),
        (6, 0.5, 1, 5, 5),
        (60, 1.0, 8, 1, 60),
        (60, 0.99, 8, 1, 56),
        (6, 0.01, 1, 1, 1),
    ],
)
def test_channels_at_a_ratio(size, ratio, multiple, least, wanted):
    assert channels_at(size, ratio, multiple, least) == wanted


def test_costs_are_those_of_the_model_that_is_really_cut():
    model = load(named(BLOCK))
    found = find_groups(model)
    costs = Costs.of(model)
    assert costs.macs == sum(c.macs for c in layer_costs(model, tensor_shapes(model)))
    counts = {g: max(1, g.classes.size // 3) for g in found.groups}
    assert len(counts) == 3
    keep = np.ones(found.count, bool)
    for group, count in counts.items():
        keep[group.classes[count:]] = False
    macs, nbytes = costs.after(counts)
    cut(model, found, keep)
    assert macs == sum(c.macs for c in layer_costs(model, tensor_shapes(model)))
    assert nbytes == model.nbytes


def test_candidates_name_what_each_ratio_costs():
    model, found, statistics, _ = known(named(BLOCK))
    group = found.group("f")
    rows = candidates(model, group, statistics, [1.0, 0.5, 0.75, 0.25], multiple=4)
    assert [r.channels for r in rows] == [16, 8, 12, 4]
    assert rows[0].error == 0.0
    assert rows[0][2:4] == (Costs.of(model).macs, model.nbytes)
    errors = [r.error for r in sorted(rows, key=lambda r: -r.channels)]
    assert errors == sorted(errors)
    for row in rows:
        other = load(named(BLOCK))
        keep = np.ones(found.count, bool)
        keep[group.classes[row.channels :]] = False
        cut(other, find_groups(other), keep)
        assert row.macs == sum(c.macs for c in layer_costs(other, tensor_shapes(other)))
        assert row.nbytes == other.nbytes


@pytest.mark.parametrize("name", ["f", "i"])
def test_the_error_is_that_of_the_best_weights_on_the_channels_left(name):
    proto = named(BLOCK)
    model, found, statistics, feeds = known(proto)
    group = found.group(name)
    (row,) = candidates(model, group, statistics, [0.5], multiple=1)
    order, _ = order_by_error(group, statistics, row.channels)
    (side,) = group.readers
    read = side.layer.x.name
    session = input_session(model, model.layers(), 1)
    taps = []
    for feed in feeds:
        x = session.run(feed)[read].astype(np.float64)
        size = side.layer.weight.shape[2]
        wide = np.pad(x, [(0, 0), (0, 0), *[(size // 2, size // 2)] * 2])
        view = np.lib.stride_tricks.sliding_window_view(wide, (size, size), (2, 3))
        taps.append(view.transpose(0, 2, 3, 1, 4, 5).reshape(-1, x.shape[1], size * size))
    x = np.concatenate(taps)
    y = np.einsum("pck,ock->po", x, side.layer.weight.reshape(*side.layer.weight.shape[:2], -1))
    kept = np.delete(np.arange(group.classes.size), order)
    part = x[:, kept].reshape(len(x), -1)
    part, y = part - part.mean(axis=0), y - y.mean(axis=0)
    left = y - part @ np.linalg.lstsq(part, y, rcond=None)[0]
    assert row.error == pytest.approx(np.square(left).sum() / np.square(y).sum(), rel=0.05)


@pytest.mark.parametrize("name", ["f", "q", "i"])
def test_a_trial_makes_the_error_that_was_foretold(name):
    proto = named(BLOCK)
    model, found, statistics, feeds = known(proto)
    group = found.group(name)
    (row,) = candidates(model, group, statistics, [0.5], multiple=1)
    other = trial(model, group, statistics, row.channels)
    total = 0.0
    for side in group.readers:
        sessions = [
            Session(m.to_proto([side.layer.y.name] if side.layer.y.name != "y" else []), threads=1)
            for m in (model, without_upstream(model, other, side.layer.name))
        ]
        pairs = [
            [s.run(feed)[side.layer.y.name].astype(np.float64) for s in sessions] for feed in feeds
        ]
        noise = sum(np.square(a - b).sum() for a, b in pairs)
        values = np.concatenate([np.moveaxis(a, 1, -1).reshape(-1, a.shape[1]) for a, _ in pairs])
        total += noise / np.square(values - values.mean(axis=0)).sum()
    assert total == pytest.approx(row.error, rel=0.2)


def without_upstream(model, other, name):
    """The model with the weight of one layer from another, so that it reads what it did before."""
    copy = model.clone()
    layers = [next(x for x in m.layers() if x.name == name) for m in (copy, other)]
    layers[0].set_weight(layers[1].weight)
    if layers[1].bias is not None:
        layers[0].set_bias(layers[1].bias)
    return copy


def test_magnitude_goes_by_all_weights_of_a_channel():
    proto = named(BLOCK)
    model = load(proto)
    layers = {layer.name: layer for layer in model.layers()}
    scale = np.ones(16)
    scale[[3, 7]] = 0.05, 0.2
    layers["f"].scale_outputs(scale)
    layers["p"].scale_outputs(scale)
    layers["q"].scale_inputs(scale)
    order = order_by_magnitude(find_groups(model).group("f"))
    assert order[:2].tolist() == [3, 7]


def test_channels_that_are_read_with_zeros_are_dead():
    model = load(named(BLOCK))
    layer = next(x for x in model.layers() if x.name == "q")
    layer.scale_inputs(np.where(np.isin(np.arange(16), [2, 5]), 0.0, 1.0))
    found = find_groups(model)
    assert np.flatnonzero(dead_classes(found, found.group("f"))).tolist() == [2, 5]


def test_no_candidate_runs_the_model(monkeypatch):
    model, found, statistics, _ = known(named(BLOCK))
    costs = Costs.of(model)
    monkeypatch.setattr("onnxq.pruning.tensor_shapes", lambda model: pytest.fail("shapes anew"))
    monkeypatch.setattr("onnxq.runtime.Session.run", lambda self, feed: pytest.fail("it ran"))
    for group in found.groups:
        assert len(candidates(model, group, statistics, [0.5, 0.9], costs=costs)) == 2


def test_the_models_that_candidates_are_of_stay_as_they_were():
    proto = named(BLOCK)
    model, found, statistics, feeds = known(proto, 4)
    for group in found.groups:
        candidates(model, group, statistics, [0.3])
    np.testing.assert_array_equal(run(model, feeds[0])["y"], run(proto, feeds[0])["y"])
