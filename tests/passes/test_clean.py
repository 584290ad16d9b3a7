import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx import helper

from onnxq.errors import ModelError
from onnxq.model import load
from onnxq.passes.clean import Clean
from tests import models
from tests.checks import assert_same_function, ops, reasons, rewrite, run


def clean(text, **values):
    return rewrite(Clean(), models.parse(text, **values))


# ---------------------------------------------------------------------- constants


@pytest.mark.parametrize(
    "body",
    [
        "v = Transpose <perm=[1,0]> (w) y = MatMul (x, v)",
        "v = Reshape (w, s) y = MatMul (x, v)",
        "a = Cast <to=11> (w) b = Cast <to=1> (a) v = Transpose (b) y = MatMul (x, v)",
        "a, b = Split <axis=1> (w) c = Concat <axis=1> (b, a) v = Transpose (c) y = MatMul (x, v)",
        "a = Unsqueeze (w, n) b = Squeeze (a, n) v = Transpose (b) y = MatMul (x, v)",
        "a = Mul (w, w) v = Transpose (a) y = MatMul (x, v)",
        "a = Identity (w) v = Transpose (a) y = MatMul (x, v)",
    ],
)
def test_weights_are_computed(body):
    model, changes = clean(
        f"g (float[N,4] x) => (float[N,6] y) <float[6,4] w, int64[2] s, int64[1] n> {{ {body} }}",
        s=[4, 6],
        n=0,
    )
    assert ops(model) == ["MatMul"]
    assert len(model.layers()) == 1
    assert len(changes.done) == body.count("=") - body.count("<") - 1


def test_names_of_computed_tensors_stay():
    model, changes = clean(
        """g (float[N,4] x) => (float[N,6] y) <float[6,4] w> {
            [turn] v = Transpose (w)
            y = MatMul (x, v)
        }"""
    )
    assert changes.done == ["turn (Transpose) computed"]
    assert set(model.tensors()) == {"x", "v", "y"}


def test_subgraphs_read_computed_tensors():
    model, _ = clean(
        """g (float[N,4] x, bool c) => (float[] y) <float[6,4] w> {
            v = Transpose (w)
            y = If (c) <
                then_branch = t () => (float[] p) { p = MatMul (x, v) },
                else_branch = e () => (float[] q) { q = MatMul (x, v) }
            >
        }"""
    )
    assert ops(model) == ["If"]


def test_results_that_grow_are_left_and_reported():
    text = """g (float[N,256] x) => (float[N,256] y) <float[1,1] w, int64[2] s, float[2] v> {
        [grow] a = Expand (w, s)
        [times] b = Tile (w, s)
        [fill] c = ConstantOfShape (s)
        d = MatMul (x, a)
        e = MatMul (d, b)
        y = MatMul (e, c)
    }"""
    model, changes = clean(text, s=256)
    assert ops(model)[:3] == ["Expand", "Tile", "ConstantOfShape"]
    why = reasons(changes)
    assert set(why) == {"grow", "times", "fill"}
    assert why["grow"] == "its result is constant, but would grow to 256 KiB"
    small = text.replace("256", "64")
    model, changes = clean(small, s=64)
    assert ops(model) == ["MatMul", "MatMul", "MatMul"]
    assert not changes.skipped


def test_huge_results_are_never_computed():
    proto = models.parse(
        """g (float[N,2] x) => (float[] y) <int64[2] s> {
            [fill] a = ConstantOfShape (s)
            y = MatMul (x, a)
        }""",
        s=[2, 1 << 40],
    )
    changes = Clean().apply(load(proto), None)
    assert not changes
    assert "fill" in reasons(changes)


def test_values_of_small_inputs_decide_about_the_size():
    model, _ = clean(
        """g (float[N,3] x) => (float[] y) <int64 a, int64 b, int64 c, float[8] k> {
            r = Range (a, b, c)
            f = Cast <to=1> (r)
            z = NonZero (k)
            h = Gather (k, z)
            s = ReduceSum (h)
            p = Add (x, f)
            y = Mul (p, s)
        }""",
        a=0,
        b=3,
        c=1,
        k=[0, 1, 2, 0, 3, 0, 0, 4],
    )
    assert ops(model) == ["Add", "Mul"]


def test_large_weights_are_fed():
    model, _ = clean(
        """g (float[N,300] x) => (float[N,400] y) <float[400,300] w> {
            v = Transpose (w)
            y = MatMul (x, v)
        }"""
    )
    assert ops(model) == ["MatMul"]


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("r = RandomNormalLike (w) y = Add (x, r)", ["RandomNormalLike", "Add"]),
        ("q = QuantizeLinear (w, one) d = DequantizeLinear (q, one) y = Add (x, d)", None),
        ("s = Bernoulli (u) y = Add (x, s)", ["Bernoulli", "Add"]),
        ("z = SequenceConstruct (w, w) v = SequenceAt (z, i) y = Add (x, v)", None),
    ],
)
def test_left_alone(body, kept):
    proto = models.parse(
        f"""g (float[N,4] x) => (float[N,4] y)
        <float[4] w, float one, float[4] u, int64 i> {{{body}}}""",
        one=1,
        u=0.5,
        i=1,
    )
    model = load(proto)
    before = ops(model)
    assert not Clean().apply(model, None)
    assert ops(model) == (kept or before)


def test_an_output_of_the_model_is_not_computed():
    model, changes = clean(
        "g (float[4] x) => (float[4] y, float[4] z) <float[4] w> { y = Relu (x) z = Abs (w) }"
    )
    assert ops(model) == ["Relu", "Abs"]
    assert not changes


def test_what_cannot_be_computed_is_reported():
    proto = models.parse(
        """g (float[2,2] x) => (float[2,2] y) <float[4] w, int64[2] s> {
            [odd] v = Reshape (w, s)
            y = Add (x, v)
        }""",
        s=[2, 3],
    )
    model = load(proto)
    changes = Clean().apply(model, None)
    assert not changes
    assert reasons(changes)["odd"].startswith("its result is constant, but ")


# ---------------------------------------------------------------------- operators without effect


@pytest.mark.parametrize(
    "body",
    [
        "y = Identity (h)",
        "y = Dropout (h)",
        "y = Dropout (h, ratio)",
        "y = Dropout (h, ratio, no)",
        "y, mask = Dropout (h, ratio)",
        "y = Cast <to=1> (h)",
        "y = Reshape (h, shape)",
        "y = Transpose <perm=[0,1]> (h)",
        "y = Flatten (h)",
        "y = Pad (h, nothing)",
        "y = Concat <axis=1> (h)",
        "y = Sum (h)",
        "y = Mean (h)",
        "y = Max (h)",
        "y = Min (h)",
        "y = Add (h, zero)",
        "y = Add (zero, h)",
        "y = Sub (h, zero)",
        "y = Mul (one, h)",
        "y = Mul (h, ones)",
        "y = Div (h, one)",
        "a = Identity (h) b = Identity (a) y = Identity (b)",
    ],
)
@pytest.mark.parametrize("end", [False, True])
def test_without_effect(body, end):
    if end:
        body += " z = Exp (y)"
    model, changes = clean(
        f"""g (float[N,4] x) => (float[N,4] {"z" if end else "y"})
        <float[N,4] h, float ratio, bool no, int64[2] shape, int64[4] nothing, float zero,
         float one, float[1,1] ones> {{ h = Relu (x) {body} }}""",
        ratio=0.5,
        no=False,
        shape=[-1, 4],
        nothing=0,
        zero=0,
        one=1,
        ones=1,
    )
    assert ops(model) == ["Relu", "Exp"][: 1 + end]
    assert changes


@pytest.mark.parametrize(
    "body",
    [
        "y = Dropout (h, ratio, yes)",
        "y, y2 = Dropout (h, ratio)",
        "y = Cast <to=1> (d)",
        "y = Reshape (h, shape)",
        "y = Reshape <allowzero=1> (e, zeros)",
        "y = Transpose <perm=[1,0]> (h)",
        "y = Transpose (h)",
        "y = Pad (h, some)",
        "y = Add (h, one)",
        "y = Sub (zero, h)",
        "y = Div (one, h)",
        "y = Mul (h, wide)",
        "y = Mul (h, high)",
    ],
)
def test_with_effect(body):
    proto = models.parse(
        f"""g (float[N,4] x) => (float[] y {", bool[] y2" if "y2" in body else ""})
        <float[N,4] h, float ratio, bool yes, int64[2] shape, int64[2] zeros, int64[4] some,
         float zero, float one, float[3,1,1] wide, float[1,1,1] high, double[N,4] d,
         float[0,4] e> {{
            h = Relu (x) d = Cast <to=11> (x) {body}
        }}""",
        ratio=0.5,
        yes=True,
        shape=[4, -1],
        zeros=[0, 4],
        some=[0, 1, 0, 0],
        zero=0,
        one=1,
        wide=1,
        high=1,
    )
    model = load(proto)
    model.cleanup()
    before = ops(model)
    Clean().apply(model, None)
    assert ops(model) == before


def test_old_dropout():
    text = "g (float[N,4] x) => (float[N,4] y) { h = Relu (x) y = Dropout %s (h) }"
    model, _ = rewrite(Clean(), models.parse(text % "", opset=10))
    assert ops(model) == ["Relu"]
    model = load(models.parse(text % "<is_test=1>", opset=6))
    Clean().apply(model, None)
    assert ops(model) == ["Relu"]
    with pytest.raises(ModelError, match="is_test must not have value 0"):
        load(models.parse(text % "<is_test=0>", opset=6))


def test_old_attributes():
    proto = models.parse(
        "g (float[2,4] x) => (float[2,4] y) { h = Relu (x) y = Pad <pads=[0,0,0,0]> (h) }", opset=10
    )
    model, _ = rewrite(Clean(), proto)
    assert ops(model) == ["Relu"]


@pytest.mark.parametrize(
    "text",
    [
        "g (float[4] x) => (float[4] y) { y = Identity (x) }",
        "g (float[4] x) => (float[4] y, float[4] z) { y = Relu (x) z = Identity (y) }",
        "g (float[4] x) => (float[4] y, float[4] z) <float[4] w> {y = Relu (x) z = Identity (w)}",
    ],
)
def test_an_output_keeps_a_name_of_its_own(text):
    model, changes = clean(text)
    assert ops(model).count("Identity") == 1
    assert not changes
    assert not changes.skipped


def test_two_outputs_of_one_tensor():
    model, _ = clean(
        """g (float[4] x) => (float[4] y, float[4] z) {
            h = Relu (x)
            y = Identity (h)
            z = Identity (h)
        }"""
    )
    assert ops(model) == ["Relu", "Identity"]
    assert model.outputs == ["y", "z"]


def test_subgraphs_read_what_is_left():
    model, _ = clean(
        """g (float[N,4] x, bool c) => (float[] y) {
            h = Relu (x)
            i = Identity (h)
            y = If (c) <
                then_branch = t () => (float[] p) { p = Neg (i) },
                else_branch = e () => (float[] q) { q = Identity (i) }
            >
        }"""
    )
    assert ops(model) == ["Relu", "If"]


# ---------------------------------------------------------------------- Gemm


@pytest.mark.parametrize(("length", "pools"), [(7, 0), (8, 1), ("L", 1)])
def test_the_average_of_one_position(length, pools):
    proto = models.parse(
        f"""g (float[N,3,{length}] x) => (float[] y) <float[4,3,3] w> {{
            c = Conv (x, w) m = MaxPool <kernel_shape=[5], strides=[1]> (c)
            p = GlobalAveragePool (m) y = Flatten (p)
        }}"""
    )
    model, changes = rewrite(Clean(), proto)
    assert ops(model).count("GlobalAveragePool") == pools
    assert bool(changes) != bool(pools)
    feed = {"x": np.random.default_rng(3).normal(size=(2, 3, 8 - (length == 7))).astype("f")}
    np.testing.assert_array_equal(run(model, feed)["y"], run(proto, feed)["y"])


@pytest.mark.parametrize("bias", ["", "6", "1,6", "1", "1,1", "2,1", "2,6", "2,6 computed"])
@pytest.mark.parametrize("attrs", ["", "transB=1, alpha=0.5", "beta=3.0", "alpha=0.5, beta=0.0"])
def test_gemm(bias, attrs):
    weight = "6,4" if "transB" in attrs else "4,6"
    shape, _, computed = bias.partition(" ")
    model, _ = clean(
        f"""g (float[2,4] x {f", float[{shape}] b" if computed else ""}) => (float[2,6] y)
        <float[{weight}] w {f", float[{shape}] b" if bias and not computed else ""}> {{
            y = Gemm <{attrs}> (x, w {", b" if bias else ""})
        }}"""
    )
    [layer] = model.layers()
    assert layer.node.attrs.get("alpha", 1.0) == 1.0
    if not computed or "beta=0" in attrs:
        assert layer.node.attrs.get("beta", 1.0) == 1.0
    if bias in ("6", "1,6", "1", "1,1") and "beta=0" not in attrs:
        assert layer.bias.shape == (6,)


def test_plain_gemm_stays():
    model, changes = clean(
        "g (float[2,4] x) => (float[2,6] y) <float[4,6] w, float[6] b> { y = Gemm (x, w, b) }"
    )
    assert ops(model) == ["Gemm"]
    assert not changes


def test_gemm_says_what_changed():
    _, changes = clean(
        """g (float[2,4] x) => (float[2,6] y) <float[4,6] w, float[1] b> {
            [dense] y = Gemm <alpha=2.0, beta=0.5> (x, w, b)
        }"""
    )
    assert changes.done == ["dense: alpha, beta, shape of the bias folded"]


def test_gemm_of_shared_weights():
    model, _ = clean(
        """g (float[2,4] x) => (float[2,4] y) <float[4,4] w> {
            h = Gemm <alpha=2.0> (x, w)
            y = Gemm (h, w)
        }"""
    )
    first, second = model.layers()
    np.testing.assert_allclose(first.weight, 2 * second.weight)


# ---------------------------------------------------------------------- dead ends, at large


def test_dead_ends():
    model, changes = clean(
        """g (float[4] x) => (float[4] y) <float[4] w, float[4] v> {
            y = Relu (x)
            a = Abs (w)
            b = Add (x, a)
            c = Neg (b)
        }"""
    )
    assert ops(model) == ["Relu"]
    assert changes.done == ["3 operators that no output needs removed"]
    assert not model.to_proto().graph.initializer


def test_nothing_to_do():
    _, changes = clean("g (float[N,4] x) => (float[N,4] y) <float[4] w> { y = Add (x, w) }")
    assert not changes
    assert not changes.skipped


def test_other_domains_are_left_alone():
    node = helper.make_node("Identity", ["h"], ["y"], domain="custom")
    info = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4]) for n in "xy"]
    relu = helper.make_node("Relu", ["x"], ["h"])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("custom", 1)]
    graph = helper.make_graph([relu, node], "g", info[:1], info[1:])
    model = load(helper.make_model(graph, opset_imports=opsets))
    assert not Clean().apply(model, None)
    assert ops(model) == ["Relu", "Identity"]


@settings(max_examples=40, deadline=None)
@given(models.chains())
def test_random_chains_keep_their_function(proto):
    model, _ = rewrite(Clean(), proto)
    assert model.outputs == [o.name for o in proto.graph.output]


@pytest.mark.zoo
@pytest.mark.parametrize("name", models.ZOO)
def test_zoo(name):
    before = load(models.zoo(name))
    model = before.clone()
    Clean().apply(model, None)
    model.check()
    feed = models.feeds(before.to_proto(), size=576 if name == "silero_vad" else 48)
    assert_same_function(before, model, 1e-5, feed, levels=("disabled",))
    assert run(model, feed).keys() == run(before, feed).keys()
