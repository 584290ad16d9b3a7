"""Models as they come: what they hold that most do not, each by its smallest example."""

import numpy as np
import onnx
import pytest
from onnx import helper

import onnxq
from onnxq.errors import OnnxqError
from onnxq.passes import CrossLayerEqualization
from tests import models
from tests.checks import assert_same_function, ops
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


def test_old_models_are_converted(tmp_path):
    proto = models.parse(OLD, opset=6)
    found = outcomes(proto, tmp_path)
    assert found["quantize"] == "quantized: "
    assert found["compress"] == "compressed: "
    assert "operator set raised from 6 to 8" in onnxq.inspect(proto).notes
    onnx.save(proto, tmp_path / "old.onnx")
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    _, report = onnxq.quantize(tmp_path / "old.onnx", tmp_path / "new.onnx", [{"x": x}])
    assert any(note.startswith("operator set raised from 6") for note in report.notes)
    compared = onnxq.compare(tmp_path / "old.onnx", tmp_path / "new.onnx", [{"x": x}], timed=False)
    assert compared.outputs[0].sqnr_db > 20


def test_weights_that_are_nan_are_named_whatever_the_verb(tmp_path):
    text = """
    g (float[N,3,8,8] x) => (float[N,2,8,8] y) <float[4,3,1,1] w, float[2,4,1,1] v> {
        a = Conv(x, w)  s = Sigmoid(a)  b = Mul(a, s)  y = Conv(b, v)
    }"""
    values = np.ones((2, 4, 1, 1))
    values[1, 2] = np.nan
    found = outcomes(models.parse(text, v=values), tmp_path)
    for verb in ("quantize", "compress"):
        assert "1 of 8 values are NaN or infinite (weight v)" in found[verb]


def test_halves_with_normalizations(tmp_path):
    text = """
    g (float16[N,3,8,8] x) => (float16[N,4,8,8] y)
      <float16[4,3,3,3] w, float16[4] gamma, float16[4] beta, float16[4] mean, float16[4] var> {
        a = Conv<pads = [1, 1, 1, 1]>(x, w)
        n = BatchNormalization(a, gamma, beta, mean, var)  y = Relu(n)
    }"""
    found = outcomes(models.parse(text), tmp_path)
    assert found["quantize"] == "nothing to quantize: "
    assert "its weight is float16, not float32" in found["compress"]


def test_halves_keep_their_type_wherever_constants_are_made(tmp_path):
    text = """
    g (float16[N,3,8,8] x) => (float16[N,2,8,8] y)
      <float16[4,3,1,1] w, float16[4,4,1,1] u, float16[2,4,1,1] v, float16 zero, float16 six> {
        a = Conv(x, w)  b = Clip(a, zero, six)  c = Conv(b, u)
        s = Sigmoid(c)  d = Mul(c, s)  y = Conv(d, v)
    }"""
    rng = np.random.default_rng(0)
    widths = np.array([0.01, 1, 5, 9]).reshape(4, 1, 1, 1)
    constants = {"w": rng.normal(size=(4, 3, 1, 1)) * widths, "zero": 0, "six": 6}
    proto = models.parse(text, u=rng.normal(size=(4, 4, 1, 1)) * widths, **constants)
    feeds = [{"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float16)} for _ in range(8)]
    verbs = ("quantize", "quantize-tensor", "compress", "compress-channels")
    found = outcomes(proto, tmp_path, *feeds, verbs=verbs)
    assert found["quantize"] == found["quantize-tensor"] == "nothing to quantize: "
    assert found["compress-channels"] == "compressed: "


def test_gemm_of_an_operator_set_that_wants_its_bias(tmp_path):
    text = """
    g (float[N,16] x) => (float[N,12] y) <float[16,12] w, float[12] c> { y = Gemm(x, w, c) }"""
    x = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    found = outcomes(models.parse(text, opset=9), tmp_path, {"x": x})
    assert found["compress"] == "compressed: "
    assert found["quantize"] == "quantized: "


def test_bounds_per_channel_where_min_does_not_broadcast_yet():
    text = """
    g (float[N,3,8,8] x) => (float[N,2,8,8] y)
      <float[4,3,1,1] w, float[4] c, float[2,4,1,1] v> {
        a = Conv(x, w, c)  r = Clip<min = 0.0, max = 6.0>(a)  y = Conv(r, v)
    }"""
    w = np.random.default_rng(0).normal(size=(4, 3, 1, 1)) * [[[[0.1]]], [[[1]]], [[[5]]], [[[9]]]]
    proto = models.parse(text, opset=7, w=w)
    equalize = onnxq.PassManager(CrossLayerEqualization())
    after, _ = equalize(proto)
    assert "Min" in ops(after)
    feed = {"x": np.random.default_rng(1).normal(0, 4, (2, 3, 8, 8)).astype(np.float32)}
    assert_same_function(proto, after, feed=feed)


def test_an_output_of_unknown_rank(tmp_path):
    text = """
    g (float[N,3,8,8] x, int64[k] shape) => (float[] y) <float[4,3,1,1] w> {
        a = Conv(x, w)  y = Reshape(a, shape)
    }"""
    proto = models.parse(text)
    assert not proto.graph.output[0].type.tensor_type.HasField("shape")
    rng = np.random.default_rng(0)
    feed = {"x": rng.normal(size=(1, 3, 8, 8)).astype(np.float32), "shape": np.array([16, 16])}
    assert outcomes(proto, tmp_path, feed)["quantize"] == "quantized: "


UPSAMPLED = """
g (float[N,3,5,5] x) => (float[N,2,10,10] y) <float[4,3,1,1] w, float[2,4,1,1] v> {
    a = Conv(x, w)  b = Upsample<mode = "MODE", scales = [1.0, 1.0, 2.0, 2.0]>(a)
    c = Relu(b)  y = Conv(c, v)
}"""
RESIZED = """
g (float[N,3,6,6] x) => (float[] y) <float[4,3,1,1] w, float[2,4,1,1] v, float[4] scales> {
    a = Conv(x, w)  b = Resize<mode = "MODE">(a, scales)  c = Relu(b)  y = Conv(c, v)
}"""


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("scale", [2.0, 3.5, 0.5, 0.3])
def test_resize_keeps_its_coordinates_when_it_is_converted(mode, scale):
    text = RESIZED.replace("MODE", mode)
    proto = models.parse(text, opset=10, scales=[1, 1, scale, scale])
    after = onnxq.load(proto)
    after.raise_opset(13)
    assert_same_function(proto, after, tol=1e-6)


def test_resize_that_enlarges_one_axis_and_reduces_another_is_refused():
    proto = models.parse(RESIZED.replace("MODE", "nearest"), opset=10, scales=[1, 1, 2, 0.5])
    with pytest.raises(OnnxqError, match="whether Resize_1"):
        onnxq.load(proto).raise_opset(13)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_tensors_keep_their_names_when_operators_are_converted(mode):
    proto = models.parse(UPSAMPLED.replace("MODE", mode), opset=8)
    names = {name for node in proto.graph.node for name in node.output}
    after = onnxq.load(proto)
    after.raise_opset(13)
    assert {t.name for node in after.graph.nodes for t in node.outputs} == names
    assert_same_function(proto, after, tol=1e-6)


def test_an_input_that_only_a_branch_reads(tmp_path):
    text = """
    g (float[2,3,8,8] x, bool flag) => (float[2,3,8,8] y) <float[3,3,1,1] w> {
        y = If(flag) <
            then_branch = one () => (float[2,3,8,8] a) { a = Conv(x, w) },
            else_branch = two () => (float[2,3,8,8] b) { b = Neg(x) }
        >
    }"""
    assert outcomes(models.parse(text), tmp_path)["doctor"] == "told: "


def test_a_first_layer_that_puts_out_constants(tmp_path):
    text = """
    g (float[2,3,8,8] x) => (float[2,2,8,8] y) <float[4,3,1,1] w, float[2,4,1,1] v> {
        a = Conv(x, w)  b = Relu(a)  y = Conv(b, v)
    }"""
    proto = models.parse(text, w=np.zeros((4, 3, 1, 1)))
    assert outcomes(proto, tmp_path)["doctor"] == "told: "


def test_models_without_standard_operators(tmp_path):
    node = helper.make_node("Binarizer", ["x"], ["y"], domain="ai.onnx.ml", threshold=0.5)
    infos = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [2, 3]) for n in "xy"]
    graph = helper.make_graph([node], "g", infos[:1], infos[1:])
    opset = helper.make_opsetid("ai.onnx.ml", 1)
    found = outcomes(helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path)
    assert found["quantize"] == "nothing to quantize: "
    assert found["doctor"] == "told: "


def test_limits_of_halves_stay_halves_when_clip_is_converted():
    text = """
    g (float16[N,3] x) => (float16[N,3] y) { r = Relu(x)  y = Clip<min = 0.25, max = 2.0>(r) }"""
    proto = models.parse(text, opset=9)
    after = onnxq.load(proto)
    after.raise_opset(13)
    assert_same_function(proto, after, tol=0)
