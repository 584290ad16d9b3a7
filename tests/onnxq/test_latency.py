"""Models timed in turn, by a clock that they set themselves."""

import numpy as np
import pytest

from onnxq.analysis import latency


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


class Model:
    """Takes so many milliseconds a run: the first two are to warm up."""

    threads, provider = 3, "CPUExecutionProvider"

    def __init__(self, clock, log, name, *milliseconds):
        self.clock, self.log, self.name = clock, log, name
        self.milliseconds = milliseconds
        self.count = 0

    def run(self, feed):
        assert feed == {"x": 1}
        self.log.append(self.name)
        warm = self.count - 2
        self.clock.now += self.milliseconds[max(warm, 0) % len(self.milliseconds)] / 1e3
        self.count += 1


@pytest.fixture
def models(monkeypatch):
    clock, log = Clock(), []
    monkeypatch.setattr(latency, "time", clock)
    return [Model(clock, log, "a", 1, 2, 9), Model(clock, log, "b", 4), Model(clock, log, "c", 6)]


def test_every_run_but_those_to_warm_up(models):
    rows = latency.runs(models, {"x": 1}, seconds=0.0, least=6)
    np.testing.assert_allclose(rows, [[1, 2, 9, 1, 2, 9], [4] * 6, [6] * 6])
    assert [m.count for m in models] == [latency.WARM_UP + 6] * 3


def test_medians_quartiles_and_the_ratio_of_each_round(models):
    found = latency.pair(*models[:2], {"x": 1}, count=9)
    one, two = np.repeat([1, 2, 9], 3), np.full(9, 4)
    for spread, values in (
        (found.reference_ms, one),
        (found.other_ms, two),
        (found.speedup, one / two),
    ):
        wanted = np.quantile(values, [0.25, 0.5, 0.75])
        np.testing.assert_allclose([spread.low, spread.median, spread.high], wanted)
    assert found.to_dict() == {
        "float_ms": pytest.approx({"median": 2, "low": 1, "high": 9}),
        "other_ms": pytest.approx({"median": 4, "low": 4, "high": 4}),
        "speedup": pytest.approx({"median": 0.5, "low": 0.25, "high": 2.25}),
        "runs": 9,
        "threads": 3,
        "provider": "CPUExecutionProvider",
        "warm_up": latency.WARM_UP,
    }


def test_without_a_number_of_runs_time_decides(models):
    assert latency.pair(*models[1:], {"x": 1}).runs == 200  # 10 ms a round, 2 s


def test_every_round_runs_each_once_in_an_order_of_its_own(models):
    latency.runs(models, {"x": 1}, seconds=0.0, least=100)
    log = models[0].log
    assert log[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = [tuple(log[i : i + 3]) for i in range(6, len(log), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(rounds) == 100
    assert {rounds.count(order) > 5 for order in set(rounds)} == {True}
    assert len(set(rounds)) == 6


def test_timing_goes_on_as_long_as_asked(models):
    rows = latency.runs(models[1:], {"x": 1}, seconds=1.0, least=1)
    assert len(rows[0]) == 100  # 10 ms a round
