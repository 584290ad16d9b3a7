"""Where integers flow, and why they do not where they do not."""

import numpy as np
import pytest

from onnxq.errors import RecipeError
from onnxq.model import load
from onnxq.placement import gate_factor, match_nodes, place
from onnxq.targets import TARGETS
from tests.models import parse

ORT = TARGETS["ort-cpu"]
X = "g (float[N,4,8,8] x) => (float[] y)"


def placed(text, exclude=(), **values):
    """The placement; nodes are named after their first output."""
    proto = parse(text, **values)
    for node in proto.graph.node:
        node.name = node.output[0]
    return place(load(proto), ORT, exclude)


def test_activations_between_layers_join_in():
    found = placed(
        f"{X} <float[4,4,3,3] w, float[4,4,3,3] v>"
        "{ c = Conv(x, w) r = Relu(c) p = MaxPool<kernel_shape=[2,2]>(r) y = Conv(p, v) }"
    )
    assert set(found.nodes) == {"c", "p", "y"}
    assert found.float_nodes == {}
    assert found.tensors == ["x", "r", "p", "y"]
    assert found.bounds == {"r": (0.0, float("inf"))}
    assert found.moves == [("r", "p")]
    assert found.exits == {"y": "y"}


def test_what_nothing_reads_as_integers_stays_in_float():
    found = placed(
        f"{X} <float[4,4,3,3] w> {{ c = Conv(x, w) a = Add(c, c) p = Sigmoid(a) y = Exp(p) }}"
    )
    assert set(found.nodes) == {"c"}
    assert found.float_nodes["a"] == "nothing reads its result as integers"
    assert found.float_nodes["p"] == "nothing reads its result as integers"
    assert "Exp" in found.float_nodes["y"]
    assert found.exits == {"c": "c"}


def test_what_reads_floats_stays_in_float():
    found = placed(
        f"{X} <float[4,4,3,3] w, float[4,4,1,1] v>"
        "{ c = Conv<pads=[1,1,1,1]>(x, w) e = Exp(c) a = Add(c, e) y = Conv(a, v) }"
    )
    assert set(found.nodes) == {"c", "y"}
    assert found.float_nodes["a"] == "an input of it is computed in float"


def test_a_model_without_layers_has_no_integers():
    found = placed("g (float[N,8] x) => (float[] y) { a = Add(x, x) y = Mul(a, x) }")
    assert not found.nodes
    assert not found.tensors


def test_excluding_a_layer_frees_its_surroundings():
    text = (
        f"{X} <float[4,4,3,3] w, float[4,4,3,3] v>"
        "{ c = Conv(x, w) p = AveragePool<kernel_shape=[2,2]>(c) y = Conv(p, v) }"
    )
    assert set(placed(text).nodes) == {"c", "p", "y"}
    found = placed(text, ["y"])
    assert set(found.nodes) == {"c"}
    assert found.float_nodes["y"] == "excluded"
    assert not placed(text, ["Conv"]).nodes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("g (float[N,4] x, float[4,5] z) => (float[] y) <float[5] b> { y = Gemm(x, z, b) }",
         "weight is computed"),
        ("g (float[N,4] x, float[5] z) => (float[] y) <float[4,5] w> { y = Gemm(x, w, z) }",
         "bias is computed"),
        ("g (float[N,4] x) => (float[] y) <float[4,5] w, float[5] b>"
         "{ y = Gemm<beta=0.5>(x, w, b) }", "beta"),
        ("g (float[4,N] x) => (float[] y) <float[5,4] w> { y = Gemm(w, x) }", "left"),
        ("g (float16[N,4] x) => (float16[] y) <float16[4,5] w> { y = MatMul(x, w) }", "float32"),
        ("g (float[N,4,5,5] x) => (float[] y) <float[4,3,2,2] w> { y = ConvTranspose(x, w) }",
         "no integer ConvTranspose"),
    ],
)  # fmt: skip
def test_reasons(text, why):
    found = placed(text)
    assert not found.nodes
    assert why in found.float_nodes["y"]


@pytest.mark.parametrize(
    ("value", "joins"), [([2, 2, 2, 2], True), ([1, 2, 0, 4], True), ([1, 1, 1, 100], False)]
)
def test_a_constant_that_one_scale_cannot_cover_stays_in_float(value, joins):
    found = placed(
        f"{X} <float[4,4,3,3] w, float[1,4,1,1] k, float[4,4,3,3] v>"
        "{ c = Conv(x, w) a = Mul(c, k) y = Conv(a, v) }",
        k=np.reshape(value, (1, 4, 1, 1)),
    )
    assert ("a" in found.nodes) is joins


@pytest.mark.parametrize(
    ("low", "high", "taken"), [(0, 6, True), (-1, 1, True), (1, 6, False), (-6, -1, False)]
)
def test_a_clip_is_taken_over_only_if_zero_is_inside(low, high, taken):
    found = placed(
        f"{X} <float[4,4,3,3] w, float lo, float hi, float[4,4,3,3] v>"
        "{ c = Conv(x, w) r = Clip(c, lo, hi) y = Conv(r, v) }",
        lo=low,
        hi=high,
    )
    assert ("c" in found.tensors) is not taken
    assert found.bounds.get("r") == ((low, high) if taken else None)


def test_an_activation_with_a_second_reader_of_its_input_is_not_taken_over():
    found = placed(
        f"{X} <float[4,4,1,1] w, float[4,4,1,1] v, float[4,4,1,1] u>"
        "{ c = Conv(x, w) r = Relu(c) a = Conv(r, v) b = Conv(c, u) y = Add(a, b) }"
    )
    assert {"c", "r"} <= set(found.tensors)
    assert "r" not in found.bounds


def test_padding_with_something_else_than_zero_stays_in_float():
    text = (
        f"{X} <float[4,4,3,3] w, int64[8] p, float k, float[4,4,3,3] v>"
        "{ c = Conv(x, w) r = Pad(c, p, k) y = Conv(r, v) }"
    )
    pads = [0, 0, 1, 1, 0, 0, 1, 1]
    assert "r" in placed(text, p=pads, k=0).nodes
    assert "pads" in placed(text, p=pads, k=1).float_nodes["r"]


def test_second_outputs_stay_in_float():
    found = placed(
        "g (float[N,4,8,8] x) => (float[] y, int64[] i) <float[4,4,3,3] w, float[4,4,3,3] v>"
        "{ c = Conv(x, w) p, i = MaxPool<kernel_shape=[2,2]>(c) y = Conv(p, v) }"
    )
    assert "p" in found.float_nodes


def test_joins_name_inputs_and_result():
    found = placed(
        f"{X} <float[4,4,1,1] w, float[4,8,1,1] v>"
        "{ c = Conv(x, w) s = Concat<axis=1>(c, x) y = Conv(s, v) }"
    )
    assert found.joins == [(["c", "x"], "s")]


def test_globs_match_names_and_types():
    proto = parse(f"{X} <float[4,4,3,3] w> {{ c = Conv(x, w) r = Relu(c) y = Relu(r) }}")
    for node, name in zip(proto.graph.node, ("a/conv", "a/relu", "b[0].relu"), strict=True):
        node.name = name
    model = load(proto)
    assert match_nodes(model, ["Relu"]) == {"a/relu", "b[0].relu"}
    assert match_nodes(model, ["a/*"]) == {"a/conv", "a/relu"}
    assert match_nodes(model, ["b[0].relu"]) == {"b[0].relu"}
    assert match_nodes(model, ["Conv", "*relu"]) == {"a/conv", "a/relu", "b[0].relu"}
    assert match_nodes(model, []) == set()
    with pytest.raises(RecipeError, match="near: a/conv"):
        match_nodes(model, ["Relu", "a/cnov"])
    with pytest.raises(RecipeError, match="matches no node"):
        match_nodes(model, ["relu"])


def test_gates():
    text = (
        f"{X} <float[4,4,1,1] w> {{ c = Conv(x, w) s = Sigmoid(c) m = Mul(s, c) t = Sigmoid(m)"
        " y = Mul(t, m) }"
    )
    nodes = load(parse(text)).graph.nodes
    assert [gate_factor(n) for n in nodes] == [None, None, 1, None, None]
