"""The error of other budgets: least at each, monotone, each method alone no better than all."""

import itertools
import json

import numpy as np
import pytest

from onnxq.selection import Budget, Candidate, Choice, least_share, select
from onnxq.tradeoff import Point, tradeoff
from tests.onnxq.test_selection import brute_force, outcome


def table(seed, methods=("a", "b"), layers=4, candidates=5):
    """Layers that lose the more, the less is left, and one that nothing can become of."""
    rng = np.random.default_rng(seed)
    choices = [Choice("whole", ("whole",), 500, 2000, ())]
    for name in map(str, range(layers)):
        whole = int(rng.integers(100, 2000))
        found = tuple(
            Candidate(name, m, k, i, int(k * whole), int(4 * k * whole), e)
            for m in methods
            for i, k in enumerate(rng.uniform(0.1, 0.95, candidates))
            for e in [float((1 - k) ** 2 * rng.uniform(0.5, 2))]
        )
        choices.append(Choice(name, (name,), whole, 4 * whole, found, float(rng.uniform(0.1, 3))))
    return choices, sum(c.macs for c in choices)


def by_method(found):
    return {m: [p for p in found.points if p.method == m] for m in {p.method for p in found.points}}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("search", ["optimal", "greedy"])
def test_the_curve_falls_and_holds_what_was_chosen(seed, search):
    choices, total = table(seed)
    chosen = select(choices, total, Budget("macs", 0.6), search)
    found = tradeoff(choices, total, "macs", chosen, search)
    cost, loss = outcome(choices, chosen, total)
    assert found.chosen == Point("auto", cost / total, pytest.approx(loss))
    for method, points in by_method(found).items():
        assert len(points) > 3, method
        assert [p.kept for p in points] == sorted(p.kept for p in points)
        assert all(p.error > q.error for p, q in itertools.pairwise(points))
        assert points[-1] == Point(method, 1.0, 0.0)
    # no point that costs as little has a smaller error, but for the steps of the search
    best = min(p.error for p in found.points if p.kept <= found.chosen.kept)
    assert best == pytest.approx(found.chosen.error, rel=1e-12 if search == "optimal" else 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_each_point_is_the_least_error_at_its_cost(seed):
    choices, total = table(seed, layers=3, candidates=3)
    found = tradeoff(choices, total, "macs", {})
    assert found.chosen == Point("auto", 1.0, 0.0)
    for method, points in by_method(found).items():
        possible = [
            Choice(
                c.name,
                c.covers,
                c.macs,
                c.bytes,
                tuple(k for k in c.candidates if method in ("auto", k.method)),
                c.effect,
            )
            for c in choices
        ]
        for point in points:
            best = brute_force(possible, total, round(point.kept * total))
            assert point.error == pytest.approx(best)
        assert points[0].kept == pytest.approx(least_share(possible, total, "macs"))


def test_no_method_alone_is_better_than_all():
    choices, total = table(7)
    found = by_method(tradeoff(choices, total, "macs", {}))
    assert set(found) == {"auto", "a", "b"}
    for point in (*found["a"], *found["b"]):
        assert min(p.error for p in found["auto"] if p.kept <= point.kept + 1e-9) <= point.error


def test_one_method_goes_by_its_name():
    choices, total = table(0, methods=("a",))
    assert set(by_method(tradeoff(choices, total, "macs", {}))) == {"a"}


def test_what_is_reserved_is_kept():
    choices, total = table(0)
    plain, reserved = (
        tradeoff(choices, 4 * total, "bytes", {}, reserve=reserve) for reserve in (0, 400)
    )
    assert reserved.points[0].kept == pytest.approx(plain.points[0].kept + 100 / total)
    assert reserved.points[0].error == plain.points[0].error


def test_plain_json_types():
    choices, total = table(0)
    found = tradeoff(choices, total, "macs", select(choices, total, Budget("macs", 0.7)))
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["of"] == "macs"
    assert Point(**read["chosen"]) == found.chosen
    assert [Point(**p) for p in read["points"]] == [*found.points]
