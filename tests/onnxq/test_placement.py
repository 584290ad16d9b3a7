"""Where integers flow, and why they do not where they do not."""

import numpy as np
import pytest

from onnxq.errors import RecipeError
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import Calibrate
from onnxq.placement import gate_factor, gate_scales, integer_nodes, match_nodes, place
from onnxq.targets import TARGETS
from tests import models
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
        ("g (float[N,4,5,5] x) => (float[] y) <float[4,3,2,2] w>"
         "{ y = ConvTranspose<group=2>(x, w) }", "no integer ConvTranspose"),
        ("g (float[N,4,5,5] x, float[3,4,2,2] z) => (float[] y) { y = Conv(x, z) }",
         "weight is computed"),
        ("g (float[2,4] x) => (float[] y) <float[4,5] w, float[2,5] b> { y = Gemm(x, w, b) }",
         "one value per output channel"),
        ("g (float[5,4] x) => (float[] y) <float[4,5] w, float[5,1] b> { y = Gemm(x, w, b) }",
         "one value per output channel"),
        ("g (float[5,4] x) => (float[] y) <float[4,1] w, float[5,1] b> { y = Gemm(x, w, b) }",
         "one value per output channel"),
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


def test_heads_tails_and_islands():
    """What stands before the first layer, after the last one, and floats between two."""
    found = placed(
        f"{X} <float[4,4,1,1] w, float[4,4,1,1] v, float[4] k, int64[2] s>"
        "{ h = Tanh(x) i = MaxPool<kernel_shape=[2,2]>(h) c = Conv(i, w) e = Exp(c) a = Add(e, c)"
        " d = Conv(a, v) g = GlobalAveragePool(d) f = Flatten(g) m = Mul(f, k) y = Softmax(m) }",
        k=[1, 2, 3, 4],
        s=[0, -1],
    )
    assert set(found.nodes) == {"i", "c", "d"}
    assert found.tensors == ["h", "i", "c", "a", "d"]
    assert found.exits == {"c": "c", "d": "d"}
    assert found.float_nodes["a"] == "an input of it is computed in float"
    for name in ("g", "f", "m", "y"):
        assert found.float_nodes[name] == "nothing reads its result as integers"


def test_a_residual_block():
    found = placed(
        f"{X} <float[4,4,1,1] w, float[4,4,3,3] v, float[4,4,1,1] u>"
        "{ c = Conv(x, w) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, v) a = Add(d, r) q = Relu(a)"
        " y = Conv(q, u) }"
    )
    assert set(found.nodes) == {"c", "d", "a", "y"}
    assert found.tensors == ["x", "r", "d", "q", "y"]
    assert set(found.bounds) == {"r", "q"}


def test_attention():
    """Products of two activations are layers; what scales their float result is not worth it."""
    found = placed(
        "g (float[N,6,8] x) => (float[] y) <float[8,8] q, float[8,8] k, float[8,8] v, float s,"
        "float[8,4] o> { a = MatMul(x, q) b = MatMul(x, k) c = MatMul(x, v)"
        " t = Transpose<perm=[0,2,1]>(b) d = MatMul(a, t) e = Mul(d, s) p = Softmax(e)"
        " z = MatMul(p, c) y = MatMul(z, o) }",
        s=0.35,
    )
    assert set(found.nodes) == {"a", "b", "c", "t", "d", "z", "y"}
    assert found.float_nodes["e"] == "the layer before it gives float at no cost"
    assert found.float_nodes["p"] == "an input of it is computed in float"
    assert found.tensors == ["x", "a", "b", "c", "t", "p", "z"]  # d and y leave as floats
    assert found.exits == {}
    assert found.moves == [("b", "t")]


def test_a_product_that_integers_read_is_written_in_integers():
    found = placed(
        "g (float[N,6,8] x) => (float[] y) <float[8,8] w, float[8,4] v>"
        "{ a = MatMul(x, w) r = Relu(a) s = Add(r, x) y = MatMul(s, v) }"
    )
    assert set(found.nodes) == {"a", "s", "y"}
    assert found.tensors == ["x", "r", "s"]
    assert found.bounds == {"r": (0.0, float("inf"))}


def test_a_concat_joins_if_one_input_arrives_as_integers():
    text = (
        f"{X} <float[4,4,1,1] w, float[4,8,1,1] v>"
        "{ c = FIRST e = Exp(x) s = Concat<axis=1>(c, e) y = Conv(s, v) }"
    )
    assert set(placed(text.replace("FIRST", "Conv(x, w)")).nodes) == {"c", "s", "y"}
    found = placed(text.replace("FIRST", "Tanh(x)"))
    assert set(found.nodes) == {"y"}
    assert found.float_nodes["s"] == "an input of it is computed in float"


def test_constants_of_a_concat_are_named_with_its_inputs():
    found = placed(
        f"{X} <float[4,4,1,1] w, float[2,1,8,8] k, float[4,6,1,1] v>"
        "{ c = Conv(x, w) s = Concat<axis=1>(k, c, k) y = Conv(s, v) }"
    )
    assert found.joins == [(["k", "c", "k"], "s")]
    assert "k" not in found.tensors


def test_all_outputs_of_a_split_are_written():
    found = placed(
        f"{X} <float[4,4,1,1] w, int64[3] s, float[4,1,1,1] v>"
        "{ c = Conv(x, w) a, b, d = Split<axis=1>(c, s) e = Exp(b) f = Conv(d, v)"
        " y = Concat<axis=1>(a, e, f) }",
        s=[1, 2, 1],
    )
    assert set(found.nodes) == {"c", "a", "f"}
    assert found.moves == [("c", "a"), ("c", "b"), ("c", "d")]
    assert set(found.tensors) == {"x", "c", "a", "b", "d", "f"}


def test_a_move_that_only_floats_read_stays_in_float():
    found = placed(
        f"{X} <float[4,4,1,1] w> {{ c = Conv(x, w) t = Transpose<perm=[0,2,3,1]>(c) y = Exp(t) }}"
    )
    assert set(found.nodes) == {"c"}
    assert found.float_nodes["t"] == "nothing reads its result as integers"


@pytest.mark.parametrize(
    ("node", "why"),
    [
        ('Resize<mode="linear">(c, , f)', "no integer Resize in this mode"),
        ('Resize<mode="cubic">(c, , f)', "no integer Resize in this mode"),
        ('Resize<mode="nearest">(c, , f)', None),
        ('Pad<mode="reflect">(c, p)', None),
        ('Pad<mode="edge">(c, p, k)', "pads with something else than zero"),
        ("Pad(c, p, q)", "pads with something else than zero"),
        ("Pad(c, p, )", None),
        ("Sub(c, c)", "no integer Sub"),
        ("Max(c, c)", "no integer Max"),
        ("LeakyRelu(c)", None),
        ("Softmax(c)", None),
    ],
)
def test_modes_and_operators(node, why):
    text = (
        "g (float[N,4,8,8] x, float q) => (float[] y) <float[4,4,1,1] w, float[4] f, int64[8] p,"
        f"float k, float[4,4,1,1] v> {{ c = Conv(x, w) a = {node} y = Conv(a, v) }}"
    )
    found = placed(text, f=[1, 1, 2, 2], p=1, k=3.0)
    if why is None:
        assert set(found.nodes) == {"c", "a", "y"}
    else:
        assert why in found.float_nodes["a"]


def test_a_table_of_constants_stays_in_float():
    found = placed(
        "g (int64[N,6] x) => (float[] y) <float[10,8] t, float[8,4] w>"
        "{ a = Gather(t, x) y = MatMul(a, w) }"
    )
    assert set(found.nodes) == {"y"}
    assert found.float_nodes["a"] == "its data are constants"
    assert found.tensors == ["a"]


def test_operators_of_other_domains_stay_in_float():
    proto = parse(f"{X} <float[4,4,1,1] w, float[4,4,1,1] v> {{ c = Conv(x, w) y = Conv(c, v) }}")
    proto.graph.node[0].domain = "other"
    model = load(proto)
    name = model.graph.nodes[0].name
    assert place(model, ORT).float_nodes[name] == "ort-cpu has no integer Conv"


@pytest.mark.parametrize(
    "limits", ["lo, z", "z, hi", "z, ", ", z"], ids=["upper", "lower", "lower alone", "upper alone"]
)
def test_a_clip_with_computed_bounds_is_not_taken_over(limits):
    found = placed(
        "g (float[N,4,8,8] x, float z) => (float[] y) <float[4,4,3,3] w, float lo, float hi,"
        f"float[4,4,3,3] v> {{ c = Conv(x, w) r = Clip(c, {limits}) y = Conv(r, v) }}",
        lo=0,
        hi=6,
    )
    assert set(found.nodes) == {"c", "y"}
    assert found.bounds == {}
    assert {"c", "r"} <= set(found.tensors)
    assert found.exits["c"] == "c"


@pytest.mark.parametrize(
    ("limits", "bounds"),
    [("lo", (-2, np.inf)), ("lo, hi", (-2, 6)), (", hi", (-np.inf, 6)), ("", (-np.inf, np.inf))],
)
def test_a_clip_may_have_one_bound(limits, bounds):
    found = placed(
        f"{X} <float[4,4,3,3] w, float lo, float hi, float[4,4,3,3] v>"
        f"{{ c = Conv(x, w) r = Clip(c, {limits}) y = Conv(r, v) }}",
        lo=-2,
        hi=6,
    )
    assert found.bounds == {"r": bounds}


def test_bounds_of_a_clip_in_old_operator_sets_are_attributes():
    proto = parse(
        f"{X} <float[4,4,3,3] w, float[4,4,3,3] v>"
        "{ c = Conv(x, w) r = Clip<max=6.0, min=-1.0>(c) y = Conv(r, v) }",
        opset=9,
    )
    assert place(load(proto), ORT).bounds == {"r": (-1.0, 6.0)}


def test_excluded_activations_are_not_taken_over():
    text = (
        f"{X} <float[4,4,3,3] w, float[4,4,3,3] v> {{ c = Conv(x, w) r = Relu(c) y = Conv(r, v) }}"
    )
    found = placed(text, ["Relu"])
    assert found.float_nodes == {"r": "excluded"}
    assert found.bounds == {}
    assert found.tensors == ["x", "c", "r", "y"]
    assert set(found.nodes) == {"c", "y"}


BRANCHES = (
    "z = If(k) <then_branch = t () => (float[N,4,6,6] a) { a = THEN },"
    " else_branch = e () => (float[N,4,6,6] b) { b = ELSE }>"
)


@pytest.mark.parametrize(
    ("then", "other"), [("Relu(c)", "Relu(c)"), ("Relu(c)", "Neg(o)"), ("Neg(c)", "Conv(c, v)")]
)
def test_subgraphs_are_left_alone(then, other):
    """No node inside of a branch is placed, and none takes part in what is outside."""
    proto = parse(
        "g (float[N,4,8,8] x, bool k) => (float[] y, float[] z) <float[4,4,3,3] w,"
        "float[4,4,1,1] v> { c = Conv(x, w) o = Conv(x, w) y = Conv(o, v) "
        f"{BRANCHES.replace('THEN', then).replace('ELSE', other)} }}"
    )
    for node in proto.graph.node:
        node.name = node.output[0]
    found = place(load(proto), ORT)
    assert set(found.nodes) == {"c", "o", "y"}
    assert found.float_nodes == {"z": "holds a subgraph"}
    assert found.tensors == ["x", "c", "o", "y"]
    assert found.exits == {"c": "c", "y": "y"}
    assert found.bounds == {}


@pytest.mark.parametrize(
    ("body", "k", "evens"),
    [
        ("g = Mul(c, s) e = Mul(g, k)", [1, 2, 4, 8], True),
        ("g = Mul(s, c) e = Mul(g, k)", [1, 0.5, 4, 8], True),
        ("g = Mul(c, s) e = Mul(k, g)", [1, 2, 4, 8], False),
        ("g = Mul(c, s) e = Mul(g, k)", [1, 2, 3, 8], False),
        ("g = Mul(c, s) e = Mul(g, k)", [1, 2, -4, 8], False),
        ("g = Mul(c, s) e = Mul(g, k)", [1, 0, 4, 8], False),
        ("g = Add(c, s) e = Mul(g, k)", [1, 2, 4, 8], False),
        ("g = Mul(c, s) e = Add(g, k)", [1, 2, 4, 8], False),
    ],
)
def test_products_that_even_out_a_gate_stay_in_float(body, k, evens):
    """With one scale for all channels they would be in vain."""
    text = (
        f"{X} <float[4,4,1,1] w, float[4,1,1] k, float[4,4,1,1] v>"
        f"{{ c = Conv(x, w) s = Sigmoid(c) {body} y = Conv(e, v) }}"
    )
    k = np.reshape(k, (4, 1, 1))
    model = load(parse(text, k=k))
    model.infer()
    node = next(n for n in model.graph.nodes if n.outputs[0].name == "e")
    scales = gate_scales(model, node)
    assert (scales is not None) is evens
    found = placed(text, k=k)
    assert ("even out" in found.float_nodes.get("e", "")) is evens
    if evens:
        np.testing.assert_array_equal(scales, k.reshape(-1))
    if evens:
        assert set(found.nodes) == {"c", "y"}
        assert found.exits == {"c": "c", "y": "y"}


# ------------------------------------------------------------------ nodes that encodings allow


def test_encodings_of_a_placement_allow_just_its_nodes():
    text = (
        f"{X} <float[4,4,1,1] w, float[4,4,1,1] v, float[4,1,1] k, float[4,8,1,1] u>"
        "{ c = Conv(x, w) r = Relu(c) a = Mul(r, k) e = Exp(a) d = Conv(e, v)"
        " s = Concat<axis=1>(a, d) y = Conv(s, u) }"
    )
    proto = parse(text, k=np.ones((4, 1, 1)))
    model = load(proto)
    wanted = place(model.clone(), ORT).nodes
    Calibrate().apply(model, Context([models.feeds(proto)]))
    assert integer_nodes(model, ORT) == wanted
    names = {n.outputs[0].name: n.name for n in model.graph.nodes}
    for tensor, lost in (
        ("w", {"c"}),
        ("k", {"a"}),
        ("r", {"c", "a"}),
        ("a", {"a", "s"}),
        ("s", {"s", "y"}),
    ):
        other = model.clone()
        del other.encodings[tensor]
        assert set(integer_nodes(other, ORT)) == set(wanted) - {names[n] for n in lost}
