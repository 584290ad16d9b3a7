"""Models as they come: what they hold that most do not, each by its smallest example."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxq
from onnxq.errors import OnnxqError
from tests import models
from tests.checks import assert_same_function, run
from tests.corpus.cases import Case
from tests.corpus.verdict import VERBS, judge


def outcomes(proto, folder, *feeds, bound_db=20.0, verbs=tuple(VERBS)):
    """What comes out of each verb, and the reason; fails for what must not come out."""
    case = Case("test", lambda: proto, lambda: [*feeds], bound_db)
    found = {}
    for verb in verbs:
        (place := folder / verb).mkdir()
        verdict = judge(case, verb, place)
        assert not verdict.failed, f"{verb}: {verdict.outcome}: {verdict.why}\n{verdict.detail}"
        found[verb] = f"{verdict.outcome}: {verdict.why}"
    return found


def test_nothing_to_compress(tmp_path):
    proto = models.parse("g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }")
    found = outcomes(proto, tmp_path)
    assert "no layers with constant weights" in found["compress"]
    assert found["quantize"] == "nothing to quantize: "


def test_a_part_without_values_between_layers(tmp_path):
    text = """
    g (float[N,3,8,8] x) => (float[N,2,8,8] y)
      <float[4,3,1,1] w, float[2,4,1,1] v, int64[1] zero, int64[1] one> {
        a = Conv(x, w)  b = Relu(a)  none = Slice(b, zero, zero, one)
        c = Concat<axis = 1>(none, b)  y = Conv(c, v)
    }"""
    found = outcomes(models.parse(text, zero=[0], one=[1]), tmp_path)
    assert found["quantize"] == "quantized: "


OLD = """
g (float[2,3,4,4] x) => (float[2,5] y)
  <float[4,3,3,3] w, float[4] gamma, float[4] beta, float[4] mean, float[4] var, float[5,4] v,
   float[5] c> {
    a = Conv(x, w)  n = BatchNormalization<is_test = 1>(a, gamma, beta, mean, var)  r = Relu(n)
    p = GlobalAveragePool(r)  f = Flatten(p)  y = Gemm<transB = 1, broadcast = 1>(f, v, c)
}"""


def test_models_from_before_operator_set_7_are_converted(tmp_path):
    proto = models.parse(OLD, opset=6)
    found = outcomes(proto, tmp_path)
    assert found["quantize"] == "quantized: "
    assert found["compress"] == "compressed: "
    assert "operator set raised from 6 to 7" in onnxq.inspect(proto).notes
    onnx.save(proto, tmp_path / "old.onnx")
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    _, report = onnxq.quantize(tmp_path / "old.onnx", tmp_path / "new.onnx", [{"x": x}])
    assert any(note.startswith("operator set raised from 6") for note in report.notes)
    compared = onnxq.compare(tmp_path / "old.onnx", tmp_path / "new.onnx", [{"x": x}], timed=False)
    assert compared.outputs[0].sqnr_db > 20
