"""Slices of every b-th pixel, joined: one SpaceToDepth, the same function."""

from itertools import product

import numpy as np
import pytest

from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Calibrate, InsertQDQ, SpaceToDepth
from tests import models
from tests.checks import ops, reasons, rewrite, run
from tests.models import parse

YOLO = [(0, 0), (1, 0), (0, 1), (1, 1)]
END = 2**63 - 1


def focus(blocks, then, *, more="", outputs="float[] y", size="8,12", step=2, end=END, one=False):
    """Slices from `blocks` of (row, column), their Concat j, and what reads it."""
    lines, constants = [], {}
    for k, (row, column) in enumerate(blocks):
        cuts = [([row, column], [2, 3])] if one else [([row], [2]), ([column], [3])]
        name = "x"
        for n, (starts, axes) in enumerate(cuts):
            given = {"s": starts, "e": [end] * len(axes), "a": axes, "t": [step] * len(axes)}
            constants |= {f"{key}{k}{n}": value for key, value in given.items()}
            lines.append(f"p{k}{n} = Slice({name}, s{k}{n}, e{k}{n}, a{k}{n}, t{k}{n})")
            name = f"p{k}{n}"
    joined = ", ".join(f"p{k}{int(not one)}" for k in range(len(blocks)))
    declared = ", ".join(f"int64[{len(v)}] {n}" for n, v in constants.items())
    return parse(
        f"g (float[N,3,{size}] x) => ({outputs}) <{declared}{more}>"
        f"{{ {' '.join(lines)} j = Concat<axis=1>({joined}) {then} }}",
        **constants,
    )


CONV = "y = Conv<pads=[1,1,1,1]>(j, w, b)"
WEIGHT = ", float[5,12,3,3] w, float[5] b"


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("size", ["8,12", "H,W"])
def test_the_stem_of_detectors(size, one):
    proto = focus(YOLO, CONV, more=WEIGHT, size=size, one=one)
    model, changes = rewrite(SpaceToDepth(), proto, tol=1e-6)
    assert len(changes.done) == 1
    assert ops(model) == ["SpaceToDepth", "Conv"]
    assert model.graph.nodes[0].attrs["blocksize"] == 2
    before, after = (m.layers()[0].weight for m in (load(proto), model))
    np.testing.assert_array_equal(after[:, 3:6], before[:, 6:9])
    np.testing.assert_array_equal(after[:, 6:9], before[:, 3:6])
    np.testing.assert_array_equal(after[:, [0, 1, 2, 9, 10, 11]], before[:, [0, 1, 2, 9, 10, 11]])


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_blocks(seed):
    order = np.random.default_rng(seed).permutation(9)
    blocks = [(int(k) // 3, int(k) % 3) for k in order]
    proto = focus(blocks, "y = Conv(j, w)", more=", float[4,27,1,1] w", size="9,6", step=3)
    model, changes = rewrite(SpaceToDepth(), proto, tol=1e-6)
    assert changes
    assert ops(model) == ["SpaceToDepth", "Conv"]


@pytest.mark.parametrize("outputs", ["float[] y", "float[] y, float[] j"])
def test_the_order_of_the_operator_suits_any_reader(outputs):
    proto = focus([*product((0, 1), (0, 1))], "y = Exp(j)", outputs=outputs)
    model, changes = rewrite(SpaceToDepth(), proto, tol=0)
    assert changes
    assert ops(model) == ["SpaceToDepth", "Exp"]


def test_a_shared_weight_stays_as_it_was_for_others():
    proto = focus(
        YOLO,
        "c = Conv(j, w) d = Conv(z, w) y = Add(c, d)",
        more=", float[4,12,1,1] w, float[1,12,4,6] z",
    )
    model, changes = rewrite(SpaceToDepth(), proto)
    assert changes
    assert ops(model)[-3:] == ["Conv", "Conv", "Add"]


W = ", float[4,12,1,1] w"
REFUSED = {
    "another reader": (
        {"then": "c = Conv(j, w) e = Exp(j) d = Conv(e, w) y = Add(c, d)", "more": W},
        "(Exp) reads it",
    ),
    "groups": ({"then": "y = Conv<group=2>(j, w)", "more": ", float[4,6,1,1] w"}, "has groups"),
    "an output": (
        {"then": "y = Conv(j, w)", "more": W, "outputs": "float[] y, float[] j"},
        "it is an output",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(name):
    given, why = REFUSED[name]
    proto = focus(YOLO, **given)
    model, changes = rewrite(SpaceToDepth(), proto)
    assert not changes
    assert ops(model) == ops(proto)
    (reason,) = reasons(changes).values()
    assert why in reason


OTHER = {
    "a block twice": {"blocks": [(0, 0), (1, 0), (1, 0), (1, 1)]},
    "a block too few": {"blocks": YOLO[:3], "more": ", float[5,9,3,3] w, float[5] b"},
    "an end before the last": {"end": 6},
    "another step": {"step": 3, "size": "9,12"},
}


@pytest.mark.parametrize("name", OTHER)
def test_other_slices_are_none_of_its_business(name):
    given = {"blocks": YOLO, "then": CONV, "more": WEIGHT} | OTHER[name]
    proto = focus(**given)
    model, changes = rewrite(SpaceToDepth(), proto)
    assert not changes
    assert not changes.skipped
    assert ops(model) == ops(proto)


def test_slices_of_old_operator_sets_have_no_steps():
    cuts = " ".join(
        f"p{k} = Slice<axes=[2,3], starts=[{i},{j}], ends=[{i + 4},{j + 4}]>(x)"
        for k, (i, j) in enumerate(YOLO)
    )
    proto = parse(
        f"g (float[N,3,8,8] x) => (float[] y) <float[5,12,1,1] w>"
        f"{{ {cuts} j = Concat<axis=1>(p0, p1, p2, p3) y = Conv(j, w) }}",
        opset=9,
    )
    _, changes = rewrite(SpaceToDepth(), proto)
    assert not changes


def test_the_integers_are_the_same():
    proto = focus(YOLO, CONV, more=WEIGHT)
    data = [models.feeds(proto, seed=seed) for seed in range(4)]
    plain, joined = (
        PassManager(*steps, Calibrate(method="minmax"), InsertQDQ())(proto, data)[0]
        for steps in ((), (SpaceToDepth(),))
    )
    assert ops(joined).count("SpaceToDepth") == 1
    for level in ("disabled", "all"):
        for feed in data:
            np.testing.assert_array_equal(
                run(joined, feed, level)["y"], run(plain, feed, level)["y"]
            )


def test_without_a_concat_of_slices_shapes_are_left_alone():
    model = load(parse("g (float[N,3,8,8] x) => (float[] y) { y = Concat<axis=1>(x, x) }"))
    assert not SpaceToDepth().apply(model, Context())
