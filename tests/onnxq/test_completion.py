"""Which tensors AIMET's default configuration rounds, and encodings for all of them."""

import numpy as np
import pytest

from onnxq.completion import completed, rounded
from onnxq.encoding import Encoding, Encodings
from onnxq.errors import CalibrationError
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.runtime import Session
from tests import models
from tests.models import parse

# As aimet-onnx 2.42 has them; the names of what it rounds end in _.
CASES = {
    "pairs": (
        "g (float[N,4,8,8] x_) => (float[] y_)"
        "<float[4,4,3,3] a_, float[4] b, float[4,1,3,3] d_, float[5,4,1,1] e_> {"
        " k = Conv(x_, a_, b) r_ = Relu(k) j_ = Conv<group=4>(r_, d_) q_ = Relu(j_)"
        " m_ = Conv(q_, e_) n_ = Relu(m_) y_ = Add(m_, n_) }"
    ),
    "sums": (
        "g (float[N,6] x_) => (float[N,6] y_)"
        "<float[6,6] a_, float[6] b, float[6,6] c_, float[6] o_, float[6,6] f_, float[6] g> {"
        " s = MatMul(x_, a_) t = Add(b, s) u_ = Relu(t)"
        " v_ = Gemm(u_, f_, g) w_ = Mul(v_, o_) z = Add(w_, v_) r_ = Relu(z) y_ = MatMul(r_, c_) }"
    ),
    "moves": (
        "g (float[N,3,8,8] x_) => (float[] y_)"
        "<float[3] s_, float[3] o, float[3] m, float[3] v, float low_, float[4] sizes,"
        " int64[2] shape, float[3,2,2,2] t_> {"
        " n_ = BatchNormalization(x_, s_, o, m, v) p = MaxPool<kernel_shape=[2,2]>(n_)"
        ' c_ = Clip(p, low_) z_ = Resize<mode="nearest">(c_, , sizes)'
        " k_ = ConvTranspose(z_, t_) f = Reshape(k_, shape) i = Cast<to=7>(f)"
        " h = Cast<to=1>(i) y_ = Exp(h) }"
    ),
    "depthwise": (
        "g (float[N,4,8,8] x_) => (float[] y_) <float[4,1,2,2] t_, float[4] b> {"
        " y_ = ConvTranspose<group=4>(x_, t_, b) }"
    ),
}


def model_of(name):
    given = {"sizes": np.float32([1, 1, 2, 2]), "shape": np.int64([0, -1])}
    return parse(CASES[name], **(given if name == "moves" else {}))


@pytest.mark.parametrize("name", CASES)
def test_what_is_rounded(name):
    proto = model_of(name)
    found = [*rounded(load(proto))]
    every = {t.name for t in (*proto.graph.input, *proto.graph.initializer)}
    every |= {t for node in proto.graph.node for t in node.output}
    assert len(found) == len({*found})
    assert {*found} == {t for t in every if t.endswith("_")}


def test_scales_of_weights():
    assert rounded(load(model_of("pairs"))).weights == {"a_": 0, "d_": 0, "e_": 0}
    assert rounded(load(model_of("sums"))).weights == {"a_": 1, "f_": 1, "c_": 1}
    assert rounded(load(model_of("moves"))).weights == {"t_": 1}
    assert rounded(load(model_of("depthwise"))).weights == {"t_": None}


def test_what_is_known_stays_and_the_rest_has_the_ranges_of_the_samples():
    proto = model_of("sums")
    model, feeds = load(proto), [models.feeds(proto, seed=s) for s in range(4)]
    kept = Encoding("uint8", np.array(0.5, np.float32), np.array(3, np.int32))
    narrow = Encoding.symmetric(np.full(6, 2.0), "int4", 1)
    known = Encodings({"x_": kept, "s": kept, "a_": narrow})
    known.float_nodes = {"n": "why"}
    found, notes = completed(model, known, Context(feeds), "minmax")
    assert found.keys() == {*rounded(model)}
    assert (found["x_"], found["a_"]) == (kept, narrow)
    assert found.float_nodes == {"n": "why"}
    assert notes == ["s: AIMET does not round it, left out"]
    names = ["u_", "v_", "w_", "r_", "y_"]
    session = Session(proto, outputs=names)
    seen = [session.run(feed) for feed in feeds]
    for name in names:
        values = np.stack([s[name] for s in seen])
        ends = min(values.min(), 0), max(values.max(), 0)
        assert found[name] == Encoding.of_range(*ends, "uint8")
    operand = model.array(model.tensors()["o_"])
    assert found["o_"] == Encoding.of_range(operand.min(), operand.max(), "uint8")
    weight = model.array(model.tensors()["f_"])
    assert found["f_"] == Encoding.symmetric(np.abs(weight).max(axis=0), "int4", 1)
    assert "o_" not in known
    assert model.encodings == Encodings()


def test_infinite_bounds_are_finite_on_the_grid():
    text = "g (float[N,3] x) => (float[N,3] y) <float top> { y = Min(x, top) }"
    proto = parse(text, top=np.float32(np.inf))
    found, _ = completed(load(proto), Encodings(), Context([models.feeds(proto)]))
    assert np.isfinite(found["top"].scale)
    assert found["top"].high >= 3e38


def test_ranges_need_samples():
    with pytest.raises(CalibrationError, match="needs calibration samples"):
        completed(load(model_of("pairs")), Encodings(), Context(None))
