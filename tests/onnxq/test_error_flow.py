"""Errors along the graph against those of onnxruntime's own results."""

import numpy as np
import pytest

from onnxq.analysis.error_flow import error_flow
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import Calibrate
from onnxq.simulation import simulated
from tests import models
from tests.checks import run
from tests.models import parse

TEXT = (
    "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[4] b, float[5,4,3,3] v>"
    "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }"
)


def sqnr(wanted, got):
    noise = sum(np.square(a.astype(np.float64) - b).sum() for a, b in zip(wanted, got, strict=True))
    return 10 * np.log10(sum(np.square(a.astype(np.float64)).sum() for a in wanted) / noise)


def test_each_tensor_as_it_is_computed_and_as_it_is_read():
    model = load(parse(TEXT))
    feeds = [models.feeds(model.to_proto(), seed=s) for s in range(3)]
    ctx = Context(feeds, threads=1)
    Calibrate().apply(model, ctx)
    other = simulated(model, ctx.target)
    found = {t.name: t for t in error_flow(model, other, feeds, threads=2)}
    assert [*found] == ["x", "c", "r", "y"]

    def tensor(proto, name):
        return [run(proto.to_proto([name]), f)[name] for f in feeds]

    plain = {n: tensor(model, n) for n in ("c", "r", "y")}
    inputs = [f["x"] for f in feeds]
    wanted = {
        "x": (None, sqnr(inputs, tensor(other, "x.rounded"))),
        "c": (sqnr(plain["c"], tensor(other, "c")), None),
        "r": (sqnr(plain["r"], tensor(other, "r")), sqnr(plain["r"], tensor(other, "r.rounded"))),
        "y": (sqnr(plain["y"], tensor(other, "y.float")), sqnr(plain["y"], tensor(other, "y"))),
    }
    for name, (computed, written) in wanted.items():
        assert found[name].sqnr_db == (None if computed is None else pytest.approx(computed, 1e-3))
        known = found[name].written_sqnr_db
        assert known == (None if written is None else pytest.approx(written, 1e-3))
    assert found["c"].inherited_sqnr_db == found["x"].written_sqnr_db
    assert found["y"].inherited_sqnr_db == found["r"].written_sqnr_db
    assert found["y"].drop_db == found["r"].written_sqnr_db - found["y"].sqnr_db
    assert found["x"].drop_db is None


def test_what_is_not_finite_is_told_and_stops_nothing():
    text = TEXT.replace("y = Conv(r, v)", "l = Log(c) k = Identity(l) y = Conv(r, v)")
    model = load(parse(text))
    feeds = [models.feeds(model.to_proto())]
    found = {t.name: t for t in error_flow(model, model, feeds)}
    assert found["l"].sqnr_db is None
    assert "NaN" in found["l"].note
    assert found["y"].sqnr_db == 200
