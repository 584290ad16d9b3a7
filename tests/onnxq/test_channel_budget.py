"""Channels to a budget: exact costs, the least error, and what cannot be met."""

import itertools

import numpy as np
import pytest

from onnxq.analysis.cost import layer_costs, tensor_shapes
from onnxq.channel_budget import Loss, within_budget
from onnxq.compression import compress
from onnxq.dependency import find_groups
from onnxq.errors import OnnxqError, RecipeError
from onnxq.model import load
from onnxq.passes import ChannelPruning
from onnxq.pruning import Costs
from tests.models import parse
from tests.passes.test_channel_pruning import RESIDUAL, error, feeds, named, pruned, sizes

CHAIN = (
    "g (float[N,3,6,6] x) => (float[] y) <float[8,3,1,1] a, float[8,8,1,1] b, float[8,8,1,1] c,"
    " float[5,8,1,1] d>"
    "{ i = Conv(x, a) j = Relu(i) k = Conv(j, b) l = Relu(k) m = Conv(l, c) n = Relu(m)"
    " y = Conv(n, d) }"
)


def macs(model):
    feed = {"x": np.zeros((1, 3, 9, 9), np.float32)}
    return sum(c.macs for c in layer_costs(model, tensor_shapes(model, feed)))


def chain(effects=(1.0, 1.0, 1.0)):
    """The groups of a chain, each with errors that grow as channels go; and its costs."""
    model = load(named(CHAIN))
    groups = find_groups(model).groups
    counts = (2, 4, 6)
    losses = {
        group: Loss(np.arange(8), {n: (1 - n / 8) ** 2 for n in counts}, effect)
        for group, effect in zip(groups, effects, strict=True)
    }
    return losses, Costs.of(model)


@pytest.mark.parametrize("of", ["macs", "bytes"])
@pytest.mark.parametrize("share", [1.0, 0.8, 0.6, 0.4, 0.25])
def test_a_budget_is_met_by_the_costs_of_all_cuts_together(of, share):
    losses, costs = chain()
    counts = within_budget(losses, costs, of, share)
    place = ("macs", "bytes").index(of)
    assert costs.after(counts)[place] <= share * costs.after({})[place]
    assert (share == 1.0) == all(n == 8 for n in counts.values())


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
def test_few_choices_are_better(share):
    losses, costs = chain((1.0, 5.0, 0.2))
    counts = within_budget(losses, costs, "macs", share)
    got = sum(losses[g].at(n) for g, n in counts.items())
    best = min(
        sum(losses[g].at(n) for g, n in zip(losses, every, strict=True))
        for every in itertools.product((2, 4, 6, 8), repeat=len(losses))
        if costs.after(dict(zip(losses, every, strict=True)))[0] <= share * costs.macs
    )
    assert best <= got <= 1.6 * best  # greedy, not optimal


def test_what_counts_at_the_outputs_is_spared():
    losses, costs = chain((1.0, 100.0, 1.0))
    counts = within_budget(losses, costs, "macs", 0.7)
    first, second, third = counts.values()
    assert second == 8
    assert min(first, third) < 8


@pytest.mark.parametrize(("of", "can"), [("macs", "0.1"), ("bytes", "0.1")])
def test_a_budget_that_cannot_be_met_says_what_can(of, can):
    losses, costs = chain()
    with pytest.raises(OnnxqError, match=rf"{of}: a share of 0.01 cannot be met; {can}\d\d can"):
        within_budget(losses, costs, of, 0.01)


def test_nothing_can_be_taken_out():
    _, costs = chain()
    with pytest.raises(OnnxqError, match="no channels can be taken out"):
        within_budget({}, costs, "macs", 0.5)


@pytest.mark.parametrize("share", [0.8, 0.6])
def test_the_model_costs_what_was_asked(share):
    proto = named(RESIDUAL)
    data = feeds(proto, 60)
    model, _ = pruned(proto, data, budget="macs", share=share)
    before = macs(load(proto))
    assert macs(model) <= share * before
    assert macs(model) > (share - 0.15) * before


def test_it_beats_the_same_share_of_every_group():
    """One group holds copies, which cost nothing: a budget finds them, a ratio for all does not."""
    rng = np.random.default_rng(1)
    half = rng.normal(size=(8, 8, 3, 3)).astype(np.float32)
    proto = named(RESIDUAL, a=np.concatenate([half, half]), p=np.zeros(16, np.float32))
    data, unseen = feeds(proto, 60), feeds(proto, 10, start=900)
    uniform, _ = pruned(proto, data, ratio=0.75)
    share = macs(uniform) / macs(load(proto))
    model, _ = pruned(proto, data, budget="macs", share=share)
    assert sizes(model)["i"][0] <= 8 + 2
    assert error(proto, model, unseen) < 0.5 * error(proto, uniform, unseen)


def test_facts_are_those_of_the_layers_of_each_group():
    proto = named(RESIDUAL)
    _, report = compress(
        proto, None, feeds(proto, 40), macs=0.7, method="channel-pruning", multiple=1
    )
    found = report.facts["compression"]
    assert found["macs"]["after"] <= 0.7 * found["macs"]["before"]
    for layer in found["layers"]:
        assert 0 < layer["macs"]["after"] < layer["macs"]["before"] < found["macs"]["before"]
        assert 0 < layer["bytes"]["after"] < layer["bytes"]["before"]
        assert layer["method"] == "channel-pruning"
        assert layer["effect"] > 0


def test_a_whole_budget_leaves_the_model_whole():
    proto = named(RESIDUAL)
    _, report = compress(proto, None, feeds(proto, 20), macs=1.0, method="channel-pruning")
    assert report.facts["compression"]["layers"] == []


def test_excluded_layers_keep_their_channels():
    proto = named(RESIDUAL)
    model, changes = pruned(proto, feeds(proto), budget="macs", share=0.8, exclude=("i",))
    assert sizes(model)["i"][0] == 16
    assert "keeps its channels: i is excluded" in {s.why for s in changes.skipped}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"budget": "time"}, "budget: wanted macs or bytes, got 'time'"),
        ({"budget": "macs", "ratios": (("a", 0.5),)}, "a budget and ratios are given"),
        ({"budget": "macs", "importance": "magnitude"}, "a budget goes by errors"),
        ({"budget": "macs", "share": 0.0}, r"share: wanted a share in \(0, 1\], got 0"),
    ],
)
def test_options_that_mean_nothing(options, why):
    with pytest.raises(RecipeError, match=why):
        ChannelPruning(**options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"latency": 0.5}, "channel-pruning takes no budget of time"),
        ({"macs": 0.5, "sensitivities": "s.json"}, "channel-pruning keeps no sensitivities"),
    ],
)
def test_what_only_splits_take(options, why):
    proto = parse(CHAIN)
    with pytest.raises(RecipeError, match=why):
        compress(proto, None, feeds(proto, 4), method="channel-pruning", **options)
