"""Ranges of synthetic samples get room for what these do not show."""

import numpy as np
import pytest

from onnxq.analysis.unseen import UNSEEN, UNSEEN_CLASSES, widened
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import Calibrate, FoldBatchNorm
from onnxq.synthetic import synthesize
from tests.models import parse

NET = """g (float[N,3,16,16] x) => (float[] y, float[] z)
    <float[6,3,3,3] w, float[6,6,1,1] v, float[10,6,1,1] u, float[2,6,1,1] h> {
        c = Conv(x, w)  r = Relu(c)  d = Conv(r, v)  s = Sigmoid(d)  e = Conv(s, v)  q = Relu(e)
        p = GlobalAveragePool(q)  y = Conv(p, u)
        z = Conv(q, h)
    }"""


def spans(proto, data, **options):
    model = load(proto)
    model.infer()
    changes = Calibrate(method="minmax", **options).apply(model, Context(data))
    span = {n: e.scale * (e.qmax - e.qmin) for n, e in model.encodings.items()}
    return span, model, changes


@pytest.fixture(scope="module")
def pair():
    proto = parse(NET)
    made = synthesize(load(proto), count=24)
    return spans(proto, made), spans(proto, list(made))


def test_inner_ranges_get_a_little_room(pair):
    (wide, _, _), (narrow, _, _) = pair
    for name in ("r", "d", "q", "p"):
        assert wide[name] == pytest.approx(UNSEEN * narrow[name], rel=0.01), name


def test_class_scores_get_much_room_on_both_sides(pair):
    (_, wide, _), (_, narrow, _) = pair
    furthest = max(-narrow.encodings["y"].low, narrow.encodings["y"].high)
    for end in (-wide.encodings["y"].low, wide.encodings["y"].high):
        assert end == pytest.approx(UNSEEN_CLASSES * furthest, rel=0.02)


def test_results_with_positions_get_a_little_room(pair):
    (wide, _, _), (narrow, _, _) = pair
    assert wide["z"].shape == (2,)
    assert np.allclose(wide["z"], UNSEEN * narrow["z"], rtol=0.01)


def test_inputs_weights_and_what_functions_bound_keep_their_ranges(pair):
    (wide, _, _), (narrow, _, _) = pair
    for name in ("x", "w", "v"):
        assert np.array_equal(wide[name], narrow[name])
    assert wide["s"] <= 1 + 1 / 255


def test_the_report_says_so(pair):
    (_, _, told), (_, _, silent) = pair
    assert any("widened" in line for line in told.done)
    assert not any("widened" in line for line in silent.done)


def test_a_range_never_shrinks():
    tensor = load(parse("g (float[2] x) => (float[] y) { y = Sigmoid(x) }")).tensors()["y"]
    assert widened(tensor, 0.0, 0.7) == (0.0, 0.7 * UNSEEN)
    assert widened(tensor, 0.0, 0.95) == (0.0, 1.0)
    assert widened(tensor, 0.0, 1.0) == (0.0, 1.0)
    assert widened(tensor, 0.0, 1.5) == (0.0, 1.5)  # as a merged encoding may be
    assert widened(tensor, 0.0, 0.7, is_score=True) == (0.0, 1.0)


def test_ranges_that_batch_normalization_tells_need_none():
    proto = parse(
        """g (float[N,3,16,16] x) => (float[] y)
        <float[6,3,3,3] w, float[6] g, float[6] b, float[6] m, float[6] var, float[6,6,1,1] v> {
            c = Conv(x, w)  n = BatchNormalization(c, g, b, m, var)  r = Relu(n)  y = Conv(r, v)
        }"""
    )
    made = synthesize(load(proto), count=4)
    found = []
    for data in (made, list(made)):
        model = load(proto)
        FoldBatchNorm().apply(model, Context())
        model.infer()
        Calibrate(ranges="batch-norm").apply(model, Context(data))
        found.append(model.encodings["r"])
    assert found[0] == found[1]
