"""The error of outputs as a quadratic: what it predicts, and what it makes of few samples."""

import numpy as np
import pytest

from onnxq.biases import BIAS_LIMIT
from onnxq.kernels.rounding import shrink
from onnxq.patches import PatchSource, rows_of
from onnxq.quadratic import Quadratic, settle
from onnxq.second_order import Accumulator
from tests.models import parse
from tests.passes.test_gptq import LAYERS, coarse, samples


def given(name="conv", weights="int8/channel", noise=0.3, count=40, factor=40.0):
    """A layer with a coarse encoding, and statistics of inputs that are off by noise."""
    proto = parse(LAYERS[name])
    data = samples(proto)
    model, _ = coarse(proto, data, weights=weights, factor=factor)
    (layer,) = model.layers()
    rng = np.random.default_rng(0)
    source = PatchSource.of(layer)
    total = Accumulator(source, 10**6, rng, shifted=noise > 0, halves=True)
    for _ in range(count):
        x = rng.normal(1, 1, data[0]["x"].shape).astype(np.float32)
        x = (x + np.roll(x, 1, axis=-1)).astype(np.float32)
        total.add((x + noise * rng.normal(0.5, 1, x.shape) * x).astype(np.float32), x)
    return layer, total.result()


@pytest.mark.parametrize("name", ["conv", "depthwise", "gemm", "matmul"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_differences_of_the_objective_are_those_of_the_error(name, noise):
    layer, statistics = given(name, noise=noise, count=400)
    problem = Quadratic.of(layer, statistics)
    biased = name != "matmul"
    h = statistics.covariance if biased else statistics.moment
    c = statistics.cross_covariance if biased else statistics.cross_moment
    rows = problem.rows.astype(np.float64)

    def error(q):
        q = q.astype(np.float64)
        whole = np.einsum("gok,gkl,gol->go", q, h, q) - 2 * np.einsum("gok,gkl,gol->go", rows, c, q)
        return whole.reshape(-1)

    one, other = problem.nearest, np.floor(problem.rows / 0.5).astype(np.float32) * 0.5
    got = problem.cost(one) - problem.cost(other)
    wanted = error(one) - error(other)
    # H is drawn towards its diagonal, and g believed, as far as 400 samples let it
    np.testing.assert_allclose(got, wanted, rtol=0.1, atol=0.02 * np.abs(wanted).max())


def test_few_samples_are_believed_little():
    many = Quadratic.of(*given(count=200))
    few = Quadratic.of(*given(count=2))
    one = Quadratic.of(*given(count=1))
    asked = np.abs(many.linear).sum()
    assert np.abs(one.linear).sum() == 0
    layer, statistics = given(count=2)
    raw = np.matmul(
        rows_of(layer).astype(np.float64), statistics.covariance - statistics.cross_covariance
    )
    assert np.abs(few.linear).sum() < 0.9 * np.abs(raw).sum()
    layer, statistics = given(count=200)
    raw = np.matmul(
        rows_of(layer).astype(np.float64), statistics.covariance - statistics.cross_covariance
    )
    assert asked > 0.8 * np.abs(raw).sum()


def test_halves_that_agree_are_not_drawn_to_the_diagonal():
    gram = np.array([[2.0, 1.0], [1.0, 2.0]])
    np.testing.assert_array_equal(shrink(gram, 10, gram, gram), gram)
    apart = np.array([[0.0, 1.0], [1.0, 0.0]])
    half = shrink(gram, 10, gram + apart / np.sqrt(2), gram - apart / np.sqrt(2))
    np.testing.assert_allclose(half, [[2.0, 0.5], [0.5, 2.0]])
    none = shrink(gram, 10, gram + 3 * apart, gram - 3 * apart)
    np.testing.assert_array_equal(none, np.diag([2.0, 2.0]))


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8"])
def test_better_scales_and_refits_lower_the_objective(weights):
    problem = Quadratic.of(*given(weights=weights))
    before = problem.cost(problem.nearest).sum()
    scaled = problem.with_scale(problem.best_scale(0, 1))
    assert scaled.cost(scaled.nearest).sum() < before
    assert bool(np.ptp(scaled.scale) == 0) is (weights != "int8/channel")
    refitted, values = scaled.refitted(scaled.nearest)
    assert refitted.cost(values).sum() <= scaled.cost(scaled.nearest).sum()
    codes = values / refitted.scale.reshape(1, -1, 1)
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)


def test_scales_leave_the_bias_room():
    """A bias that fills int32 at the scale that is given forbids smaller ones."""
    proto = parse(LAYERS["conv"])
    data = samples(proto)
    model, _ = coarse(proto, data, factor=1.0)
    (layer,) = model.layers()
    x = float(model.encodings["x"].scale)
    scale = model.encodings["w"].scale
    bias = (scale.astype(np.float64) * x * BIAS_LIMIT * 0.9).astype(np.float32)
    bias[1:] = 0
    layer.set_bias(bias)
    _, statistics = given()
    problem = Quadratic.of(layer, statistics)
    found = problem.best_scale(0, 1)
    assert found[0] >= 0.9 * scale[0]
    assert (found[1:] < scale[1:]).any()
    tight = problem.with_scale(np.full(problem.scale.shape, 1.1 * problem.least[0]))
    assert (tight.refitted(tight.nearest)[0].scale >= problem.least).all()


def test_settling_gives_weight_scale_and_bias():
    layer, statistics = given()
    problem = Quadratic.of(layer, statistics)
    bias = layer.bias.copy()
    problem = problem.with_scale(problem.scale * np.float32(0.7))
    settle(layer, problem.nearest, statistics, problem.scale)
    np.testing.assert_array_equal(rows_of(layer), problem.nearest)
    encoding = layer.model.encodings["w"]
    np.testing.assert_array_equal(encoding.scale, problem.scale)
    shift = np.einsum("gok,gk->go", problem.rows.astype(np.float64), statistics.reference_mean)
    shift -= np.einsum("gok,gk->go", problem.nearest.astype(np.float64), statistics.mean)
    np.testing.assert_allclose(layer.bias, bias + shift.reshape(-1), rtol=1e-5, atol=1e-5)
