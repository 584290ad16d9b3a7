"""Choosing candidates under a budget, against brute force; the table kept in a file."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.errors import OnnxqError, RecipeError
from onnxq.selection import Budget, Candidate, Choice, Sensitivities, select


def choice(name, whole, *pairs, covers=None, effect=1.0):
    """A choice of a layer that costs so much, from pairs of cost and error."""
    found = tuple(
        Candidate(name, "m", macs / whole, i, macs, 4 * macs, error)
        for i, (macs, error) in enumerate(pairs)
    )
    return Choice(name, covers or (name,), whole, 4 * whole, found, effect)


def outcome(choices, found, total):
    saved = sum(c.macs - found[c.name].macs for c in choices if c.name in found)
    return total - saved, sum(c.loss(found[c.name]) for c in choices if c.name in found)


def brute_force(choices, total, limit):
    best = np.inf
    for picked in itertools.product(*((None, *c.candidates) for c in choices)):
        found = {c.name: p for c, p in zip(choices, picked, strict=True) if p is not None}
        macs, loss = outcome(choices, found, total)
        if macs <= limit:
            best = min(best, loss)
    return best


@st.composite
def tables(draw):
    choices = []
    for i in range(draw(st.integers(1, 4))):
        whole = draw(st.integers(10, 100))
        pairs = draw(
            st.lists(st.tuples(st.integers(1, whole), st.floats(0, 1)), min_size=1, max_size=3)
        )
        choices.append(choice(f"l{i}", whole, *pairs, effect=draw(st.floats(0.1, 10))))
    return choices, sum(c.macs for c in choices) + draw(st.integers(0, 50))


@given(tables(), st.floats(0.05, 1))
def test_optimal_is_the_least_error_there_is(table, share):
    choices, total = table
    best = brute_force(choices, total, share * total)
    if not np.isfinite(best):
        with pytest.raises(OnnxqError, match="cannot be met"):
            select(choices, total, Budget("macs", share))
        return
    for search in ("optimal", "greedy"):
        macs, loss = outcome(choices, select(choices, total, Budget("macs", share), search), total)
        assert macs <= share * total
        assert loss >= best - 1e-9
        if search == "optimal":
            assert loss == pytest.approx(best, abs=1e-9)


def step_by_step(choices, needed):
    """The greedy choice, as plain loops: what adds least error for what it saves."""
    found, saved = {}, 0
    while saved < needed:
        prices = []
        for c in choices:
            if any({*c.covers} & {*o.covers} for o in choices if o.name in found and o is not c):
                continue
            now = found.get(c.name)
            cost, loss = (now.macs, c.loss(now)) if now else (c.macs, 0.0)
            for k in c.candidates:
                if k.macs < cost:
                    price = (c.loss(k) - loss) / min(cost - k.macs, needed - saved)
                    prices.append((price, cost - k.macs, c.name, k))
        if not prices:
            return None
        _, more, name, taken = min(prices, key=lambda entry: entry[:3])
        found[name] = taken
        saved += more
    return found


@pytest.mark.parametrize("seed", range(40))
def test_greedy_takes_step_by_step_what_costs_least(seed):
    rng = np.random.default_rng(seed)
    choices = []
    for i in range(6):
        whole = int(rng.integers(50, 2000))
        left = np.sort(rng.choice(whole, 5, replace=False))[::-1]
        pairs = zip(left.tolist(), np.sort(rng.random(5)).tolist(), strict=True)
        covers = (f"l{i}", f"l{(i + 1) % 6}") if rng.random() < 0.3 else None
        choices.append(choice(f"l{i}", whole, *pairs, covers=covers, effect=rng.uniform(0.1, 9)))
    total = sum(c.macs for c in choices)
    share = float(rng.uniform(0.3, 0.95))
    expected = step_by_step(choices, total - int(share * total))
    if expected is None:
        with pytest.raises(OnnxqError, match="cannot be met"):
            select(choices, total, Budget("macs", share), "greedy")
    else:
        assert select(choices, total, Budget("macs", share), "greedy") == expected


def test_greedy_takes_what_costs_least_for_what_it_saves():
    choices = [choice("a", 100, (50, 0.1), (20, 0.5)), choice("b", 100, (60, 0.02))]
    assert {*select(choices, 200, Budget("macs", 0.8), "greedy")} == {"b"}
    found = select(choices, 200, Budget("macs", 0.6), "greedy")
    assert {n: c.macs for n, c in found.items()} == {"a": 50, "b": 60}
    found = select(choices, 200, Budget("macs", 0.4), "greedy")
    assert {n: c.macs for n, c in found.items()} == {"a": 20, "b": 60}


def test_effects_weigh_errors():
    choices = [choice("a", 100, (50, 0.1), effect=5.0), choice("b", 100, (50, 0.2))]
    assert {*select(choices, 200, Budget("macs", 0.75))} == {"b"}
    choices[0] = dataclasses.replace(choices[0], effect=1.0)
    assert {*select(choices, 200, Budget("macs", 0.75))} == {"a"}


@pytest.mark.parametrize("search", ["optimal", "greedy"])
def test_choices_that_share_a_layer_exclude_one_another(search):
    choices = [
        choice("a", 100, (60, 0.1)),
        choice("b", 100, (60, 0.1)),
        choice("a and b", 200, (90, 0.15), covers=("a", "b")),
        choice("c", 100, (50, 0.9)),
    ]
    found = select(choices, 300, Budget("macs", 0.65), search)
    assert {*found} == {"a and b"}
    found = select(choices[:2] + choices[3:], 300, Budget("macs", 0.65), search)
    assert {*found} >= {"c"}


def test_bytes_are_another_budget():
    choices = [choice("a", 100, (50, 0.1))]
    heavy = dataclasses.replace(choices[0].candidates[0], bytes=390)
    choices.append(dataclasses.replace(choice("b", 100), candidates=(heavy,), name="b"))
    assert {*select(choices, 800, Budget("bytes", 0.75))} == {"a"}


def test_nothing_is_to_be_saved():
    assert select([choice("a", 100, (50, 0.1))], 100, Budget("macs", 1.0)) == {}


def test_a_budget_that_cannot_be_met_says_what_can():
    with pytest.raises(OnnxqError, match=r"a share of 0.3 cannot be met; 0.500 can"):
        select([choice("a", 100, (50, 0.1))], 100, Budget("macs", 0.3))
    with pytest.raises(OnnxqError, match="no layer can be compressed"):
        select([choice("a", 100)], 100, Budget("macs", 0.3))
    assert select([choice("a", 100, (50, 0.1))], 100, Budget("macs", 0.5))


@pytest.mark.parametrize("share", [0, -1, 1.1, float("nan")])
def test_shares_that_are_none(share):
    with pytest.raises(RecipeError, match=r"wanted a share in \(0, 1\]"):
        Budget("macs", share)


# ---------------------------------------------------------------------- the file


def table():
    choices = (choice("a", 100, (50, 0.1), effect=0.3), choice("b", 7))
    return Sensitivities("sha", "options", 107, 500, choices, {"c": "it has 3 groups"})


def test_the_table_comes_back(tmp_path):
    table().save(tmp_path / "s.json")
    assert Sensitivities.load(tmp_path / "s.json", "sha", "options") == table()


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [("other", "options", "another model"), ("sha", "more", "other options: options")],
)
def test_a_table_of_something_else(tmp_path, model, options, says):
    table().save(tmp_path / "s.json")
    with pytest.raises(OnnxqError, match=says):
        Sensitivities.load(tmp_path / "s.json", model, options)


def spoiled(change):
    plain = {"version": 1, **json.loads(json.dumps(dataclasses.asdict(table())))}
    change(plain)
    return json.dumps(plain)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{",
        spoiled(lambda t: t.update(version=2)),
        spoiled(lambda t: t.update(more=1)),
        spoiled(lambda t: t.update(macs="many")),
        spoiled(lambda t: t["choices"][0].update(macs=-1)),
        spoiled(lambda t: t["choices"][0].update(effect=float("nan"))),
        spoiled(lambda t: t["choices"][0]["candidates"][0].update(error="small")),
        spoiled(lambda t: t["choices"][0]["candidates"][0].pop("layer")),
    ],
)
def test_files_that_are_no_table(tmp_path, text):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(OnnxqError, match="is no table of sensitivities") as raised:
        Sensitivities.load(path, "sha", "options")
    assert str(path) in str(raised.value)
