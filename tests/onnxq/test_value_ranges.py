"""Ranges, histograms and outliers against numpy."""

import numpy as np
import pytest

from onnxq.analysis.value_ranges import OUTLYING, activation_findings, outliers, weight_findings
from onnxq.analysis.weight_ranges import ChannelRanges
from onnxq.encoding import Encoding
from onnxq.model import load
from onnxq.runtime import Session
from onnxq.statistics import observe
from tests.models import parse


def layer(weight):
    shape = ",".join(map(str, weight.shape))
    text = f"g (float[N,3,8,8] x) => (float[] y) <float[{shape}] w> {{ y = Conv(x, w) }}"
    return load(parse(text, w=weight)).layers()[0]


def test_a_weight():
    weight = np.random.default_rng(0).normal(size=(6, 3, 3, 3)).astype(np.float32)
    weight[4] *= 30
    found = weight_findings(layer(weight))
    np.testing.assert_allclose(found.low, weight.min(axis=(1, 2, 3)))
    np.testing.assert_allclose(found.high, weight.max(axis=(1, 2, 3)))
    assert sum(found.histogram.counts) == weight.size
    assert (found.histogram.low, found.histogram.high) == (weight.min(), weight.max())
    bounds = np.abs(weight).max(axis=(1, 2, 3))
    assert found.spread == pytest.approx(bounds.max() / np.median(bounds))
    crests = bounds / np.sqrt(np.square(weight).mean(axis=(1, 2, 3)))
    assert found.crest == pytest.approx(np.median(crests), rel=1e-6)
    assert [o.channel for o in found.outliers] == [4]
    assert found.outliers[0].times == pytest.approx(found.spread)


def test_a_weight_that_is_not_finite_has_no_histogram():
    weight = np.ones((2, 3, 1, 1), np.float32)
    weight[1, 0] = np.nan
    found = weight_findings(layer(weight))
    assert found.low == (1.0, None)
    assert found.histogram is None
    assert found.crest is None


def test_an_activation():
    rng = np.random.default_rng(0)
    text = "g (float[N,4,8,8] x) => (float[N,4,8,8] y) { y = Relu(x) }"
    session = Session(parse(text), outputs=["y"], threads=1)
    feeds = [{"x": rng.normal(size=(1, 4, 8, 8)).astype(np.float32)} for _ in range(5)]
    for feed in feeds:
        feed["x"][:, 2] *= 40
    values = np.concatenate([np.maximum(f["x"], 0) for f in feeds])
    seen = observe(session, ["y"], feeds, channels=["y"])["y"]
    encoding = Encoding.of_range(0.0, 30.0, "uint8")
    found = activation_findings("y", seen, encoding, is_input=False)
    assert (found.low, found.high) == (0.0, float(values.max()))
    assert found.clip_high == pytest.approx(30.0)
    assert found.zeros == pytest.approx((values == 0).mean())
    assert found.rms == pytest.approx(np.sqrt(np.square(values.astype(np.float64)).mean()))
    assert found.clipped == pytest.approx((values > 30 + 30 / 255 / 2).mean(), abs=0.003)
    assert found.channel_high == tuple(values.max(axis=(0, 2, 3)).tolist())
    assert [o.channel for o in found.outliers] == [2]
    wanted, _ = np.histogram(values, len(found.histogram.counts), (found.low, found.high))
    assert sum(found.histogram.counts) == values.size
    assert np.abs(np.cumsum(found.histogram.counts) - np.cumsum(wanted)).max() < 0.01 * values.size


def test_outliers_are_many_times_the_median_the_largest_first():
    high = np.array([1.0, 1.0, OUTLYING * 1.01, 1.0, OUTLYING * 3, OUTLYING * 0.99, 1.0, 1.0])
    found = outliers(ChannelRanges(-0.5 * high, high))
    assert [o.channel for o in found] == [4, 2]
    zero = np.zeros(3)
    assert outliers(ChannelRanges(zero, zero)) == ()
