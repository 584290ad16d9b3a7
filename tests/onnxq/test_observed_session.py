"""A session that is observed while its caller runs it."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from onnxq.blocked import any_order
from onnxq.errors import CalibrationError
from onnxq.model import load
from onnxq.observed_session import ObservedSession
from onnxq.runtime import Session
from onnxq.statistics import observe
from tests import models
from tests.models import parse

PROTO = parse(
    "g (float[N,3,12,12] x) => (float[N,16,8,8] y, float[N,16,10,10] r)"
    "<float[16,3,3,3] w, float[16] b, float[16,16,3,3] v> {"
    " k = Conv(x, w, b) r = Relu(k) e = Conv(r, v) y = Sigmoid(e) }"
)
NAMES = ["x", "r", "e"]
FEEDS = [models.feeds(PROTO, seed=s) for s in range(5)]


def same(one, other):
    assert list(one) == list(other)
    for name in one:
        for field in dataclasses.fields(one[name]):
            a, b = getattr(one[name], field.name), getattr(other[name], field.name)
            assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, (name, field.name)


@pytest.mark.parametrize("histogram", [False, True])
def test_statistics_are_those_of_observed_samples(histogram):
    plain = any_order(load(PROTO).to_proto(["e"]), {"e"}, threads=1)
    wanted = observe(plain, NAMES, FEEDS, histogram=histogram)
    exact = Session(PROTO)
    with ObservedSession(load(PROTO), NAMES, histogram=histogram, threads=1) as session:
        assert [s.name for s in session.inputs] == ["x"]
        assert [s.name for s in session.outputs] == ["y", "r"]
        for feed in FEEDS:
            found = session.run(feed)
            assert [*found] == ["y", "r"]
            for name, array in exact.run(feed).items():
                np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)
                found[name][...] = np.nan  # the caller's own
        assert session.count == len(FEEDS)
        same(session.statistics(), wanted)


def test_the_feed_may_be_written_over():
    feed = {"x": FEEDS[0]["x"].copy()}
    with ObservedSession(load(PROTO), ["x"]) as session:
        for other in FEEDS:
            feed["x"][...] = other["x"]
            session.run(feed)
        feed["x"][...] = 1e9
        (found,) = session.statistics().values()
    assert found.maximum == max(float(f["x"].max()) for f in FEEDS)
    assert found.batches == len(FEEDS)


def test_runs_may_overlap():
    with ObservedSession(load(PROTO), NAMES, threads=1) as one:
        for feed in FEEDS:
            one.run(feed)
        wanted = one.statistics()
    with ObservedSession(load(PROTO), NAMES, threads=1) as session:
        with ThreadPoolExecutor(4) as pool:
            [*pool.map(session.run, FEEDS)]
        found = session.statistics()
    for name in NAMES:
        np.testing.assert_array_equal(found[name].bins, wanted[name].bins)
        assert (found[name].minimum, found[name].count) == (
            wanted[name].minimum,
            wanted[name].count,
        )


def test_values_that_are_not_finite_are_named():
    bad = {"x": np.full_like(FEEDS[0]["x"], np.inf)}
    with ObservedSession(load(PROTO), NAMES) as session:
        session.run(FEEDS[0])
        session.run(bad)
        with pytest.raises(CalibrationError, match=r"NaN or infinite \(tensor x, sample 1\)"):
            session.run(FEEDS[1])
    with ObservedSession(load(PROTO), NAMES) as session:
        session.run(bad)
        with pytest.raises(CalibrationError, match="sample 0"):
            session.statistics()


def test_nothing_was_run():
    with (
        ObservedSession(load(PROTO), NAMES) as session,
        pytest.raises(CalibrationError, match="no samples"),
    ):
        session.statistics()
