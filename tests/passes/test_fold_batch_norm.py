import numpy as np
import pytest
from hypothesis import given, settings

from onnxq.model import load
from onnxq.passes.clean import Clean
from onnxq.passes.fold_batch_norm import FoldBatchNorm
from tests import models
from tests.checks import assert_same_function, ops, reasons, rewrite

SIX = "float[6] gamma, float[6] beta, float[6] mean, float[6] var"
NORM = "BatchNormalization (h, gamma, beta, mean, var)"


def fold(text, *, standalone="keep", tol=1e-5, **values):
    return rewrite(FoldBatchNorm(standalone=standalone), models.parse(text, **values), tol=tol)


# ---------------------------------------------------------------------- after a layer


@pytest.mark.parametrize("bias", ["", ", float[6] b"])
@pytest.mark.parametrize(
    ("shape", "weight", "attrs"),
    [
        ("3,9", "6,3,3", ""),
        ("3,9,8", "6,3,3,2", ""),
        ("3,6,5,4", "6,3,2,2,2", ""),
        ("4,9,8", "6,2,3,3", "group=2"),
        ("6,9,8", "6,1,3,3", "group=6"),
        ("3,9,8", "6,3,3,3", "group=3"),
        ("3,9,8", "6,3,3,3", 'auto_pad="SAME_UPPER", strides=[2,2]'),
        ("3,9,8", "6,3,3,3", "pads=[0,1,2,1], dilations=[2,1]"),
    ],
)
def test_after_conv(bias, shape, weight, attrs):
    if attrs == "group=3":
        weight = "6,1,3,3"
    model, changes = fold(
        f"""g (float[N,{shape}] x) => (float[] y) <float[{weight}] w {bias}, {SIX}> {{
            [conv] h = Conv <{attrs}> (x, w {", b" if bias else ""})
            [bn] y = {NORM}
        }}"""
    )
    assert ops(model) == ["Conv"]
    assert changes.done == ["bn folded into conv"]
    assert not changes.skipped


@pytest.mark.parametrize("bias", ["", ", float[6] b"])
@pytest.mark.parametrize(
    ("channels", "weight", "attrs"),
    [
        (4, "4,6,3,3", "strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]"),
        (4, "4,3,2,2", "group=2"),
        (6, "6,1,3,3", "group=6, strides=[2,2]"),
        (3, "3,2,2,2", "group=3"),
    ],
)
def test_after_transposed_conv(bias, channels, weight, attrs):
    model, _ = fold(
        f"""g (float[N,{channels},5,4] x) => (float[] y) <float[{weight}] w {bias}, {SIX}> {{
            h = ConvTranspose <{attrs}> (x, w {", b" if bias else ""})
            y = {NORM}
        }}"""
    )
    assert ops(model) == ["ConvTranspose"]


@pytest.mark.parametrize("bias", ["", "6", "1,6", "1", "2,1", "2,6"])
@pytest.mark.parametrize("attrs", ["", "transB=1", "alpha=0.5, beta=2.0", "beta=0.0", "transA=1"])
def test_after_gemm(bias, attrs):
    weight = "6,4" if "transB" in attrs else "4,6"
    shape = "4,2" if "transA" in attrs else "2,4"
    model, _ = fold(
        f"""g (float[{shape}] x) => (float[2,6] y)
        <float[{weight}] w {f", float[{bias}] b" if bias else ""}, {SIX}> {{
            h = Gemm <{attrs}> (x, w {", b" if bias else ""})
            y = {NORM}
        }}"""
    )
    assert ops(model) == ["Gemm"]


def test_after_matmul_comes_an_add():
    model, _ = fold(
        f"""g (float[N,4] x) => (float[N,6] y) <float[4,6] w, {SIX}> {{
            [dense] h = MatMul (x, w)
            [bn] y = {NORM}
        }}"""
    )
    assert ops(model) == ["MatMul", "Add"]
    assert [n.name for n in model.graph.nodes] == ["dense", "dense.add"]


def test_after_matmul_without_shift_comes_nothing():
    model, _ = fold(
        f"""g (float[N,4] x) => (float[N,6] y) <float[4,6] w, {SIX}> {{
            h = MatMul (x, w)
            y = {NORM}
        }}""",
        beta=0,
        mean=0,
    )
    assert ops(model) == ["MatMul"]


def test_matmul_of_unknown_rank_is_inferred():
    model, _ = fold(
        f"""g (float[N,2,2] x) => (float[] y) <float[4,6] w, {SIX}> {{
            f = Flatten (x)
            h = MatMul (f, w)
            y = {NORM}
        }}"""
    )
    assert ops(model) == ["Flatten", "MatMul", "Add"]


@pytest.mark.parametrize("constant", ["6", "1,6", "1", "1,1"])
@pytest.mark.parametrize("order", ["p, c", "c, p"])
def test_add_between_takes_the_shift(constant, order):
    model, _ = fold(
        f"""g (float[N,4] x) => (float[N,6] y) <float[4,6] w, float[{constant}] c, {SIX}> {{
            p = MatMul (x, w)
            h = Add ({order})
            y = {NORM}
        }}"""
    )
    assert ops(model) == ["MatMul", "Add"]


@pytest.mark.parametrize("constant", ["6,1,1", "1,6,1,1", "1"])
def test_conv_and_add(constant):
    model, _ = fold(
        f"""g (float[N,4,5,5] x) => (float[] y)
        <float[6,4,1,1] w, float[6] b, float[{constant}] c, {SIX}> {{
            p = Conv (x, w, b)
            h = Add (p, c)
            y = {NORM}
        }}"""
    )
    assert ops(model) == ["Conv", "Add"]


def test_add_per_position_is_refused():
    _, changes = fold(
        f"""g (float[N,4,5,5] x) => (float[] y) <float[6,4,1,1] w, float[5] c, {SIX}> {{
            p = Conv (x, w)
            [add] h = Add (p, c)
            [bn] y = {NORM}
        }}"""
    )
    assert "add adds more than one constant per channel" in reasons(changes)["bn"]


@pytest.mark.parametrize("axis", [1, -3])
def test_after_concat(axis):
    model, changes = fold(
        f"""g (float[N,3,5,5] x) => (float[] y)
        <float[1,3,1,1] w1, float[2,3,1,1] w2, float[3] b3, float[3,3,1,1] w3, {SIX}> {{
            [c1] p = Conv (x, w1)
            [c2] q = Conv (x, w2)
            [c3] r = ConvTranspose (x, w3, b3)
            h = Concat <axis={axis}> (p, q, r)
            [bn] y = {NORM}
        }}"""
    )
    assert ops(model) == ["Conv", "Conv", "ConvTranspose", "Concat"]
    assert changes.done == ["bn folded into c1, c2, c3"]
    assert [model.batch_norms[n].beta.size for n in ("p", "q", "r", "y")] == [1, 2, 3, 6]


def test_after_concat_of_dense_layers():
    model, _ = fold(
        f"""g (float[N,4] x) => (float[N,6] y) <float[4,2] w1, float[4,4] w2, {SIX}> {{
            p = MatMul (x, w1)
            q = Gemm (x, w2)
            h = Concat <axis=-1> (p, q)
            y = {NORM}
        }}"""
    )
    assert ops(model) == ["MatMul", "Add", "Gemm", "Concat"]


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ("q = Relu (x)", "has no constant weight"),
        ("q = Conv (x, w)  z = Relu (q)", "q is read by something else"),
    ],
)
def test_concat_is_folded_wholly_or_not_at_all(second, why):
    model, changes = fold(
        f"""g (float[N,3,5,5] x) => (float[] y, float[] z) <float[3,3,1,1] w, {SIX}> {{
            p = Conv (x, w)
            {second}
            {"z = Relu (x)" if "z =" not in second else ""}
            h = Concat <axis=1> (p, q)
            [bn] y = {NORM}
        }}"""
    )
    assert "BatchNormalization" in ops(model)
    assert why in reasons(changes)["bn"]
    assert not changes


def test_concat_of_one_tensor_twice_is_refused():
    _, changes = fold(
        f"""g (float[N,3,5,5] x) => (float[] y) <float[3,3,1,1] w, {SIX}> {{
            p = Conv (x, w)
            h = Concat <axis=1> (p, p)
            [bn] y = {NORM}
        }}"""
    )
    assert "p is read by something else" in reasons(changes)["bn"]


def test_concat_of_rows_is_refused():
    _, changes = fold(
        f"""g (float[N,3,5,5] x) => (float[] y) <float[6,3,1,1] w, {SIX}> {{
            p = Conv (x, w)
            q = Conv (x, w)
            [join] h = Concat <axis=2> (p, q)
            [bn] y = {NORM}
        }}"""
    )
    assert "join is not known to join channels" in reasons(changes)["bn"]


def test_two_in_a_row():
    model, changes = fold(
        f"""g (float[N,3,5,5] x) => (float[] y) <float[6,3,1,1] w, {SIX}> {{
            a = Conv (x, w)
            [bn1] h = BatchNormalization (a, gamma, beta, mean, var)
            [bn2] y = {NORM}
        }}"""
    )
    assert ops(model) == ["Conv"]
    assert len(changes.done) == 2
    assert list(model.batch_norms) == ["y"]


def test_names_and_statistics():
    text = f"""g (float[N,3,5,5] x) => (float[] z) <float[6,3,1,1] w, {SIX}> {{
        h = Conv (x, w)
        y = {NORM}
        z = Relu (y)
    }}"""
    proto = models.parse(text)
    model, _ = rewrite(FoldBatchNorm(), proto)
    assert list(model.tensors()) == ["x", "w", "Conv_0.bias", "y", "z"]
    arrays = {t.name: t for t in proto.graph.initializer}
    statistics = model.batch_norms["y"]
    for key in ("gamma", "beta"):
        np.testing.assert_array_equal(
            getattr(statistics, key), np.frombuffer(arrays[key].raw_data, np.float32)
        )


def test_shared_weights_are_copied():
    model, _ = fold(
        f"""g (float[N,3,5,5] x) => (float[] y, float[] z) <float[6,3,1,1] w, float[6] b, {SIX}> {{
            h = Conv (x, w, b)
            y = {NORM}
            z = Conv (x, w, b)
        }}"""
    )
    first, second = model.layers()
    assert first.owns_params
    assert second.owns_params
    assert second.weight_tensor.name == "w"


@pytest.mark.parametrize(("dtype", "tol"), [("float16", 5e-3), ("double", 1e-12)])
def test_other_floats_keep_their_type(dtype, tol):
    six = SIX.replace("float[", f"{dtype}[")
    model, _ = fold(
        f"""g ({dtype}[N,3] x) => ({dtype}[] y) <{dtype}[3,6] w, {six}> {{
            h = Gemm (x, w)
            y = {NORM}
        }}""",
        tol=tol,
    )
    [layer] = model.layers()
    assert layer.weight.dtype == layer.bias.dtype == np.dtype(dtype)


# ---------------------------------------------------------------------- before a layer


@pytest.mark.parametrize(
    ("weight", "attrs"),
    [
        ("4,6,3,3", ""),
        ("4,3,3,3", "group=2"),
        ("6,1,3,3", "group=6, dilations=[2,2]"),
        ("4,6,3,3", 'auto_pad="VALID", strides=[2,2]'),
        ("4,6,1,1", 'auto_pad="SAME_UPPER", strides=[2,2]'),
        ("4,6,3,3", "pads=[0,0,0,0]"),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_before_conv(weight, attrs, bias):
    outputs = weight.split(",")[0]
    model, changes = fold(
        f"""g (float[N,6,7,7] h) => (float[] z) <float[{weight}] w, float[{outputs}] b, {SIX}> {{
            [bn] y = {NORM}
            [conv] z = Conv <{attrs}> (y, w {", b" if bias else ""})
        }}"""
    )
    assert ops(model) == ["Conv"]
    assert changes.done == ["bn folded into conv"]
    assert not model.batch_norms


@pytest.mark.parametrize("attrs", ["pads=[0,0,0,1]", 'auto_pad="SAME_LOWER"'])
def test_before_padded_conv(attrs):
    text = f"""g (float[N,6,7,7] h) => (float[] z) <float[4,6,3,3] w, {SIX}> {{
        [bn] y = {NORM}
        [conv] z = Conv <{attrs}> (y, w)
    }}"""
    _, changes = fold(text)
    assert "the zero-padded border of conv would change" in reasons(changes)["bn"]
    model, _ = fold(text, beta=0, mean=0)
    assert ops(model) == ["Conv"]


def test_before_transposed_conv_only_scales():
    text = f"""g (float[N,6,7,7] h) => (float[] z) <float[6,2,3,3] w, {SIX}> {{
        [bn] y = {NORM}
        [up] z = ConvTranspose <group=2, strides=[2,2]> (y, w)
    }}"""
    _, changes = fold(text)
    assert "the border that up puts out would change" in reasons(changes)["bn"]
    model, _ = fold(text, beta=0, mean=0)
    assert ops(model) == ["ConvTranspose"]


@pytest.mark.parametrize("attrs", ["", "transB=1", "alpha=0.5, beta=2.0"])
@pytest.mark.parametrize("bias", ["", "4", "1"])
def test_before_gemm(attrs, bias):
    weight = "4,6" if "transB" in attrs else "6,4"
    model, _ = fold(
        f"""g (float[N,6] h) => (float[] z)
        <float[{weight}] w {f", float[{bias}] b" if bias else ""}, {SIX}> {{
            y = {NORM}
            z = Gemm <{attrs}> (y, w {", b" if bias else ""})
        }}"""
    )
    assert ops(model) == ["Gemm"]


def test_before_matmul():
    model, _ = fold(
        f"""g (float[N,6] h) => (float[] z) <float[6,4] w, {SIX}> {{
            y = {NORM}
            z = MatMul (y, w)
        }}"""
    )
    assert ops(model) == ["MatMul", "Add"]


@pytest.mark.parametrize("constant", ["4", "1,4", "1", "3,4"])
def test_before_matmul_and_add(constant):
    model, _ = fold(
        f"""g (float[3,6] h) => (float[] z) <float[6,4] w, float[{constant}] c, {SIX}> {{
            y = {NORM}
            p = MatMul (y, w)
            z = Add (c, p)
        }}"""
    )
    assert ops(model) == ["MatMul", "Add"]


def test_between_matmuls_on_both_sides():
    model, _ = fold(
        """g (float[N,6] x) => (float[] z)
        <float[6,6] w, float[6] gamma, float[6] beta, float[6] mean, float[6] var> {
            a = BatchNormalization (x, gamma, beta, mean, var)
            b = MatMul (a, w)
            c = BatchNormalization (b, gamma, beta, mean, var)
            d = BatchNormalization (c, gamma, beta, mean, var)
            z = Relu (d)
        }"""
    )
    assert ops(model) == ["MatMul", "Add", "Relu"]


def test_before_flatten_and_gemm():
    model, _ = fold(
        f"""g (float[N,6,2,3] h) => (float[] z, float[] u) <float[36,4] w, float[4,36] v, {SIX}> {{
            y = {NORM}
            f = Flatten (y)
            z = MatMul (f, w)
            u = Gemm <transB=1> (f, v)
        }}"""
    )
    assert ops(model) == ["Flatten", "MatMul", "Add", "Gemm"]


def test_before_several_layers():
    text = f"""g (float[N,6,5,5] h) => (float[] u, float[] v) <float[4,6,1,1] w, {SIX}> {{
        [bn] y = {NORM}
        u = Conv (y, w)
        %s
    }}"""
    model, _ = fold(text % "v = Conv (y, w)")
    assert ops(model) == ["Conv", "Conv"]
    _, changes = fold(text % "[relu] v = Relu (y)")
    assert "after it is relu (Relu), which has no constant weight" in reasons(changes)["bn"]


def test_two_in_a_row_before_a_conv():
    model, _ = fold(
        f"""g (float[N,6,5,5] x) => (float[] z) <float[4,6,3,3] w, {SIX}> {{
            h = BatchNormalization (x, gamma, beta, mean, var)
            y = {NORM}
            z = Conv (y, w)
        }}"""
    )
    assert ops(model) == ["Conv"]


def test_layer_before_goes_first():
    model, changes = fold(
        f"""g (float[N,3,5,5] x) => (float[] z) <float[6,3,1,1] w, float[4,6,3,3] v, {SIX}> {{
            [c1] h = Conv (x, w)
            [bn] y = {NORM}
            [c2] z = Conv (y, v)
        }}"""
    )
    assert changes.done == ["bn folded into c1"]
    assert "y" in model.batch_norms


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"h = Relu (x) [bn] y = {NORM}", "before it is Relu_0 (Relu)"),
        ("[bn] y = BatchNormalization (x, gamma, beta, mean, var)", "before it is no node"),
        (f"h = Conv (x, w) [bn] y = {NORM} z = Relu (h)", "h is read by something else"),
        (f"h = Conv (x, x1) [bn] y = {NORM}", "before it is Conv_0 (Conv)"),
        (f"c = Abs (b) [l] h = Conv (x, w, c) [bn] y = {NORM}", "the bias of l is computed"),
        (
            "g2 = Abs (b) h = Conv (x, w) [bn] y = BatchNormalization (h, g2, beta, mean, var)",
            "its parameters are computed, not constant",
        ),
    ],
)
def test_refusals(body, why):
    outputs = ", float[] z" if "z =" in body else ""
    inputs = ", float[6,6,1,1] x1" if "x1" in body else ""
    model, changes = fold(
        f"g (float[N,6,5,5] x {inputs}) => (float[] y {outputs}) "
        f"<float[6,6,1,1] w, float[6] b, {SIX}> {{ {body} }}"
    )
    assert "BatchNormalization" in ops(model)
    assert why in reasons(changes)["bn"]
    assert not changes


def test_output_of_the_layer_is_an_output_of_the_model():
    _, changes = fold(
        f"""g (float[N,6,5,5] x) => (float[] y, float[] h) <float[6,6,1,1] w, {SIX}> {{
            h = Conv (x, w)
            [bn] y = {NORM}
        }}"""
    )
    assert "h is an output of the model" in reasons(changes)["bn"]


def test_result_is_an_output_of_the_model():
    _, changes = fold(
        f"""g (float[N,6,5,5] h) => (float[] y, float[] z) <float[6,6,1,1] w, {SIX}> {{
            [bn] y = {NORM}
            z = Conv (y, w)
        }}"""
    )
    assert "y is an output of the model" in reasons(changes)["bn"]


def test_matmul_over_another_axis():
    _, changes = fold(
        f"""g (float[N,6,4] x) => (float[] z) <float[4,6] w, float[6,3] v, {SIX}> {{
            [m1] h = MatMul (x, w)
            [bn] y = {NORM}
            [m2] z = MatMul (y, v)
        }}"""
    )
    why = reasons(changes)["bn"]
    assert "the last axis of m1 is not known to be the channel axis" in why
    assert "the last axis of m2 is not known to be the channel axis" in why


def test_weight_on_the_left():
    _, changes = fold(
        f"""g (float[6,6] x) => (float[6,6] y) <float[6,6] w, {SIX}> {{
            [m] h = MatMul (w, x)
            [bn] y = {NORM}
        }}"""
    )
    assert "the weight of m is on the left" in reasons(changes)["bn"]


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"var": [1, 1, 1, 1, 1, -1]}, "a variance plus epsilon is not above zero"),
        ({"var": [1, 1, 1, 1, 1, np.nan]}, "its parameters are not finite"),
        ({"mean": np.inf}, "its parameters are not finite"),
    ],
)
def test_broken_statistics(values, why):
    proto = models.parse(
        f"""g (float[N,6,5,5] x) => (float[] y) <float[6,6,1,1] w, {SIX}> {{
            h = Conv (x, w)
            [bn] y = {NORM}
        }}""",
        **values,
    )
    changes = FoldBatchNorm().apply(load(proto), None)
    assert not changes
    assert reasons(changes) == {"bn": why}


def test_training():
    proto = models.parse(
        f"""g (float[N,6,5,5] x) => (float[] y) <float[6,6,1,1] w, {SIX}> {{
            h = Conv (x, w)
            [bn] y, m, v = BatchNormalization <training_mode=1> (h, gamma, beta, mean, var)
        }}"""
    )
    changes = FoldBatchNorm().apply(load(proto), None)
    assert reasons(changes) == {"bn": "it is in training mode"}
    old = models.parse(
        f"""g (float[N,6,5,5] x) => (float[] y) <float[6,6,1,1] w, {SIX}> {{
            h = Conv (x, w)
            [bn] y, m, v, m1, v1 = {NORM}
        }}""",
        opset=9,
    )
    changes = FoldBatchNorm().apply(load(old), None)
    assert reasons(changes) == {"bn": "it puts out statistics, as in training"}


def test_subgraphs_count_as_readers():
    text = f"""g (float[N,6,5,5] x, bool c) => (float[] y, float[] z) <float[6,6,1,1] w, {SIX}> {{
        [conv] h = Conv (x, w)
        [bn] y = {NORM}
        z = If (c) <
            then_branch = t () => (float[] p) {{ p = Relu (%s) }},
            else_branch = e () => (float[] q) {{ q = Neg (x) }}
        >
    }}"""
    _, changes = fold(text % "h")
    assert "h is read by something else" in reasons(changes)["bn"]
    model, _ = fold(text % "y")
    assert ops(model) == ["Conv", "If"]


def test_layers_of_subgraphs_are_left_alone():
    _, changes = fold(
        f"""g (float[N,6,5,5] h, bool c) => (float[] z) <float[6,6,1,1] w, {SIX}> {{
            [bn] y = {NORM}
            z = If (c) <
                then_branch = t () => (float[] p) {{ [inner] p = Conv (y, w) }},
                else_branch = e () => (float[] q) {{ q = Neg (h) }}
            >
        }}"""
    )
    assert "a subgraph reads it" in reasons(changes)["bn"]


def test_nothing_to_do():
    model, changes = fold("g (float[N,6] x) => (float[N,6] y) { y = Relu (x) }")
    assert ops(model) == ["Relu"]
    assert not changes
    assert not changes.skipped


# ---------------------------------------------------------------------- standalone


@pytest.mark.parametrize("shape", ["6,5", "6,5,4", "6,5,4,3"])
def test_standalone_becomes_a_convolution(shape):
    model, changes = fold(
        f"""g (float[N,{shape}] x) => (float[] z) <{SIX}> {{
            h = Relu (x)
            [bn] y = {NORM}
            z = Relu (y)
        }}""",
        standalone="conv",
    )
    assert ops(model) == ["Relu", "Conv", "Relu"]
    assert changes.done == ["bn became a depthwise convolution"]
    assert not changes.skipped
    assert list(model.batch_norms) == ["y"]


def test_standalone_in_a_row_becomes_one_convolution():
    model, _ = fold(
        f"""g (float[N,6,5,5] x) => (float[] z) <{SIX}> {{
            h = BatchNormalization (x, gamma, beta, mean, var)
            y = {NORM}
            z = Relu (y)
        }}""",
        standalone="conv",
    )
    assert ops(model) == ["Conv", "Relu"]


def test_standalone_without_positions_stays():
    model, changes = fold(
        f"""g (float[N,6] h) => (float[] z) <{SIX}> {{
            [bn] y = {NORM}
            z = Relu (y)
        }}""",
        standalone="conv",
    )
    assert ops(model) == ["BatchNormalization", "Relu"]
    assert "it has no axes besides batch and channels" in reasons(changes)["bn"]


# ---------------------------------------------------------------------- at large


@settings(max_examples=60, deadline=None)
@given(models.chains())
def test_random_chains_keep_their_function(proto):
    model, changes = rewrite(FoldBatchNorm(), proto, tol=1e-4)
    left = ops(model).count("BatchNormalization")
    assert (
        left == len(changes.skipped) == ops(proto).count("BatchNormalization") - len(changes.done)
    )


@settings(max_examples=30, deadline=None)
@given(models.chains())
def test_random_chains_lose_every_normalization(proto):
    model, changes = rewrite(FoldBatchNorm(standalone="conv"), proto, tol=1e-4)
    assert "BatchNormalization" not in ops(model)
    assert not changes.skipped


@pytest.mark.zoo
@pytest.mark.parametrize("name", models.ZOO)
def test_zoo(name):
    path = models.zoo(name)
    before = load(path)
    model = before.clone()
    done = [step.apply(model, None) for step in (Clean(), FoldBatchNorm())]
    model.check()
    left = ops(model).count("BatchNormalization")
    assert left == (16 if name == "espnet_camvid" else 0)
    assert left == len(done[1].skipped)
    size = 576 if name == "silero_vad" else 48
    feed = models.feeds(before.to_proto(), size=size)
    assert_same_function(before, model, 1e-4, feed, levels=("all",))
