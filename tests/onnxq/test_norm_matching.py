"""Samples chosen by what BatchNormalization knows: distances, choice, moments in onnxruntime."""

from itertools import combinations

import numpy as np
import pytest

from onnxq.model import load
from onnxq.norm_matching import Moments, MomentSession, NormTargets, herd
from onnxq.pass_manager import Context
from onnxq.passes import FoldBatchNorm
from tests.checks import run
from tests.models import parse

NORMS = """g (float[N,3,6,6] x) => (float[] y)
    <float[4,3,3,3] w, float[4] ga, float[4] ba, float[4] ma, float[4] var_a,
     float[2,4] v, float[2] gb, float[2] bb, float[2] mb, float[2] var_b> {
        c = Conv(x, w)  n = BatchNormalization(c, ga, ba, ma, var_a)
        r = Relu(n)  p = GlobalAveragePool(r)  f = Flatten(p)
        d = Gemm<transB = 1>(f, v)  y = BatchNormalization(d, gb, bb, mb, var_b)
    }"""


def inferred(proto):
    model = load(proto)
    model.infer()
    return model


def targets(beta, gamma, tensor=None):
    beta, gamma = np.asarray(beta, float), np.asarray(gamma, float)
    tensor = np.zeros(beta.size, int) if tensor is None else np.asarray(tensor)
    return NormTargets(tuple("abc"[: tensor.max() + 1]), beta, gamma, tensor)


def moments_like(beta, gamma, samples=5):
    mean = np.tile(np.asarray(beta, float), (samples, 1))
    return Moments(mean, mean**2 + np.asarray(gamma, float) ** 2)


def test_targets_are_found_folded_or_not():
    model = inferred(parse(NORMS))
    values = {name: model.array(model.tensors()[name]) for name in ("ga", "ba", "gb", "bb")}
    before = NormTargets.of(model)
    assert before.names == ("n", "y")
    assert np.allclose(before.beta, [*values["ba"], *values["bb"]])
    assert np.allclose(before.gamma, np.abs([*values["ga"], *values["gb"]]))
    assert before.tensor.tolist() == [0, 0, 0, 0, 1, 1]
    FoldBatchNorm().apply(model, Context())
    after = NormTargets.of(model)
    assert after.names == before.names
    assert np.array_equal(after.beta, before.beta)
    assert NormTargets.of(model, 1).names == ("n",)


def test_a_model_without_normalization_has_no_targets():
    proto = parse("g (float[N,3] x) => (float[] y) <float[3,2] w> { y = MatMul(x, w) }")
    assert NormTargets.of(inferred(proto)) is None


def test_divergence_is_that_of_normal_distributions():
    known = targets([1.0, -2.0], [0.5, 3.0])
    assert known.divergence(moments_like([1.0, -2.0], [0.5, 3.0])) == pytest.approx(0, abs=1e-12)
    m, s = np.array([1.5, 0.0]), np.array([1.0, 1.5])
    kl = 0.5 * (s**2 / known.gamma**2 + (m - known.beta) ** 2 / known.gamma**2 - 1)
    kl += np.log(known.gamma / s)
    assert known.divergence(moments_like(m, s)) == pytest.approx(np.log1p(kl).mean())


def test_tensors_count_the_same_and_dead_channels_not_at_all():
    known = targets([0, 0, 0, 0, 0], [1, 1, 1, 1e-6, 1], [0, 0, 0, 0, 1])
    assert known.live.tolist() == [True, True, True, False, True]
    off = known.divergence(moments_like([9, 9, 9, 99, 0], [1, 1, 1, 1, 1]))
    assert off == pytest.approx(np.log1p(40.5) / 2)
    features = known.features(moments_like([1, 1, 1, 99, 1], [1, 1, 1, 1, 1]))
    assert features.shape == (5, 8)
    norms = np.square(features).sum(axis=0)
    assert norms[:3].sum() == pytest.approx(norms[3], rel=1e-6)


def test_moments_are_those_of_the_tensors():
    model = inferred(parse(NORMS))
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(i, 2, (3, 3, 6, 6)).astype(np.float32)} for i in range(5)]
    steps = []
    found = MomentSession(model, ("n", "y"), threads=2).run(iter(feeds), steps.append)
    assert steps == [1] * 5
    for i, feed in enumerate(feeds):
        values = run(model.to_proto(["n"]), feed)
        n, y = (values[k].astype(np.float64) for k in ("n", "y"))
        mean = np.concatenate([n.mean((0, 2, 3)), y.mean(0)])
        square = np.concatenate([np.square(n).mean((0, 2, 3)), np.square(y).mean(0)])
        assert np.allclose(found.mean[i], mean, rtol=1e-4, atol=1e-4)
        assert np.allclose(found.square[i], square, rtol=1e-4, atol=1e-4)


def test_only_the_part_before_the_tensors_runs():
    model = inferred(parse(NORMS))
    session = MomentSession(model, ("n",))
    assert session.run([{"x": np.ones((1, 3, 6, 6), np.float32)}]).mean.shape == (1, 4)
    assert not {o.name for o in session._session.outputs} & {"y/mean", "f"}


def residue(features, rows):
    return float(np.linalg.norm(features[list(rows)].sum(axis=0)))


def test_herding_is_near_the_best_choice_there_is():
    rng = np.random.default_rng(3)
    features = (rng.normal(size=(12, 6)) + 0.5).astype(np.float32)
    every = sorted(residue(features, rows) for rows in combinations(range(12), 4))
    chosen = herd(features, 4)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 4
    assert residue(features, chosen) <= every[len(every) // 50]  # among the best 2 %


def test_herding_beats_chance_by_far():
    rng = np.random.default_rng(1)
    # many channels that a few causes explain, as in networks, all a little off in the mean
    causes = rng.normal(0.2, 1, (200, 12)) @ rng.normal(size=(12, 400))
    features = (causes + rng.normal(0, 0.3, (200, 400))).astype(np.float32)
    by_chance = [residue(features, rng.permutation(200)[:32]) for _ in range(50)]
    assert residue(features, herd(features, 32)) < 0.5 * min(by_chance)


def test_herding_takes_what_there_is():
    assert herd(np.ones((3, 2), np.float32), 3) == [0, 1, 2]
    assert herd(np.ones((3, 2), np.float32), 8) == [0, 1, 2]
