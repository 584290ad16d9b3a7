"""Curvature against the matrices of models in which it is known."""

import numpy as np
import pytest

from onnxq.curvature import Curvature, curvatures
from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import WeightSVD
from tests.checks import run
from tests.models import parse

TWO = (
    "g (float[M,12] x) => (float[M,10] y) <float[12,8] w, float[8] b, float[8,10] v>"
    "{ h = Gemm(x, w, b) y = MatMul(h, v) }"
)


def rows(count=64, seed=0):
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(60, 12)).astype(np.float32)} for _ in range(count)]


def test_of_a_matrix_it_is_that_of_the_matrix_behind_it():
    model, feeds = load(parse(TWO)), rows()
    found, unknown = curvatures(model, model.layers()[:1], Context(feeds), np.random.default_rng(0))
    assert not unknown
    v = model.layers()[1].weight.astype(np.float64)
    power = np.mean([np.square(run(model, f)["y"]).sum() for f in feeds])
    wanted = 60 * v @ v.T / power  # over all positions of a sample
    wanted += 0.1 * np.trace(wanted) / 8 * np.eye(8)
    root = next(iter(found.values())).root[0]
    assert np.linalg.norm(root @ root - wanted) < 0.08 * np.linalg.norm(wanted)


def test_weighing_is_undone():
    halves = np.random.default_rng(1).normal(size=(2, 3, 4, 9))
    known = Curvature.of(halves @ halves.swapaxes(2, 3))
    given = np.random.default_rng(2).normal(size=(3, 4, 5))
    np.testing.assert_allclose(known.undo(known.weigh(given)), given, rtol=1e-9)


def test_halves_that_agree_in_nothing_leave_the_diagonal():
    one, other = np.array([[2.0, 1.0], [1.0, 2.0]]), np.array([[2.0, -1.0], [-1.0, 2.0]])
    root = Curvature.of(np.array([[one], [other]])).root[0]
    np.testing.assert_allclose(root @ root, 2.2 * np.eye(2), atol=1e-12)


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        ("h = Gemm(x, w, b) e = Det(h) y = Identity(e)", "no gradient passes"),
        ("h = Gemm(x, w, b) y = Identity(x)", "no output depends on it"),
        ("h = Gemm(x, w, b) z = Mul(h, o) y = Identity(z)", "zero or not finite"),
    ],
)
def test_what_has_none_says_why(tail, why):
    text = (
        f"g (float[4,4] x) => (float[] y) <float[4,4] w, float[4] b, float o = {{0}}>{{ {tail} }}"
    )
    model = load(parse(text))
    feeds = [{"x": np.eye(4, dtype=np.float32) + i} for i in range(4)]
    found, unknown = curvatures(model, model.layers(), Context(feeds), np.random.default_rng(0))
    assert not found
    (reason,) = unknown.values()
    assert why in reason


def test_ranks_go_to_what_the_outputs_see():
    # large outputs that are hardly read, small ones that are
    apart = [np.linalg.qr(np.random.default_rng(3).normal(size=(n, n)))[0] for n in (12, 10)]
    w = apart[0][:, :8] * ([2.0] * 4 + [1.0] * 4)
    v = apart[1][:8] * np.array([0.01] * 4 + [1.0] * 4)[:, None]
    model = load(parse(TWO, w=w.astype(np.float32), v=v.astype(np.float32)))
    feeds = rows()
    ratios = ((model.layers()[0].name, 4 * 20 / 96),)
    step = WeightSVD(ratio=1.0, ratios=ratios, multiple=1, reconstruct="split")
    small, _ = PassManager(step)(model, feeds)
    assert small.layers()[0].weight.shape == (12, 4)
    wanted, got = (np.concatenate([run(m, f)["y"] for f in feeds]) for m in (model, small))
    assert np.square(wanted - got).sum() < 0.02 * np.square(wanted).sum()
