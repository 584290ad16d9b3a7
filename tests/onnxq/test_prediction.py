"""The rules by which onnxruntime runs Q/DQ in integers, held against the installed version.

Each case is a small model, and what becomes of its node `n` (or `n` and more): the kernel that runs
in integers, or "" for float.  What is predicted and what is measured have to be that; all other
nodes of the model have to be predicted as they are measured.
"""

import random

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from onnxq.analysis.measurement import measure
from onnxq.analysis.prediction import predict
from onnxq.analysis.qdq import is_dequantize, is_quantize
from onnxq.analysis.rewrites import Rewritten
from onnxq.errors import ModelError
from onnxq.model import consumers, load, producer, rewire
from onnxq.runtime import Session
from tests.qdq import SIGNED, build, integers, packed, rows, scale

SAME = {"ys": scale(0.02), "yz": np.uint8(128)}
WIDE = {"xz": np.uint16(300), "yz": np.uint16(300)}
AXES = {
    "axes": np.array([0]),
    "start": np.array([0]),
    "stop": np.array([2]),
    "index": np.array([0, 1]),
    "shape": np.array([0, -1]),
    "repeats": np.array([1, 2, 1, 1]),
    "larger": np.array([2, 1, 1, 1, 1]),
    "sizes": np.array([1, 1, 2, 2], np.float32),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "low": scale(0),
    "high": scale(6),
    "slope": scale(0.1, 1),
    "other": scale(0.5),
    "otherq": np.uint8(3),
    "yes": np.array(True),
}


def check(proto, wanted, arm=False):
    model = load(proto)
    predictions = {p.name: p for p in predict(model, arm=arm)}
    measured = measure(model, arm=arm).nodes
    wanted = {"n": wanted} if isinstance(wanted, str) else wanted
    for name, kernel in wanted.items():
        found = predictions[name]
        assert found.integer is bool(kernel), found
        assert measured[name].integer is bool(kernel), measured[name]
        if kernel:
            assert (found.kernel, measured[name].kernel) == (kernel, kernel)
            assert found.why is None
        else:
            assert found.why.reason
            assert found.why.mend
    for name, found in predictions.items():
        both = found.integer, measured[name].integer
        assert None in both or both[0] == both[1], (name, found, measured[name])


# ------------------------------------------------------------------------------- layers

CONV = "[n] r = Conv(xd, wd, bd)"
UNSIGNED_WEIGHT = {"w": integers(4, 3, 3, 3, dtype=np.uint8), "wz": np.full(4, 100, np.uint8)}
LAYERS = {
    "u8 s8": (CONV, {}),
    "u8 u8": (CONV, UNSIGNED_WEIGHT),
    "s8 s8": (CONV, SIGNED),
    "no bias": ("[n] r = Conv(xd, wd)", {}),
    "per tensor": ("t = DequantizeLinear(w, wst, wzt) [n] r = Conv(xd, t)", {}),
    "zero point 0 of the bias": (
        "t = DequantizeLinear<axis=0>(b, bs, bz) [n] r = Conv(xd, wd, t)",
        {},
    ),
    "float bias": ("[n] r = Conv(xd, wd, fb)", {}),
    "float weight": ("[n] r = Conv(xd, fw)", {}),
    "float weight and bias": ("[n] r = Conv(xd, fw, fb)", {}),
    "fake-quantized weight": (
        "q = QuantizeLinear(fw, wst, wzt) t = DequantizeLinear(q, wst, wzt) [n] r = Conv(xd, t)",
        {},
    ),
    "bias scale 0.5 % off": (CONV, {"bs": scale(0.001005, 4)}),
    "Relu": ("[n] c = Conv(xd, wd, bd) r = Relu(c)", {}),
    "Relu, s8 from its end": ("[n] c = Conv(xd, wd, bd) r = Relu(c)", SIGNED),
    "Clip to the range": (
        "[n] c = Conv(xd, wd, bd) r = Clip(c, low, high)",
        {**AXES, "ys": scale(6 / 255)},
    ),
    "Pad in front": ("p = Pad(xd, pads) [n] r = Conv(p, wd)", AXES),
    "Identity in front": ("p = Identity(xd) [n] r = Conv(p, wd)", {}),
}


@pytest.mark.parametrize("arm", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_in_integers(name, arm):
    body, constants = LAYERS[name]
    check(build(body, **constants), "QLinearConv", arm)


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
def test_convolutions_of_each_operator_set(opset):
    check(build(CONV, opset=opset), "QLinearConv")


@pytest.mark.parametrize(
    ("x", "w", "attrs"),
    [
        ("float[N,4,8] x", (4, 4, 3), ""),
        ("float[N,4,6,6,6] x", (4, 4, 3, 3, 3), ""),
        ("float[N,4,8,8] x", (4, 1, 3, 3), "<group=4>"),
    ],
)
def test_convolutions_of_other_shapes(x, w, attrs):
    check(build(f"[n] r = Conv{attrs}(xd, wd, bd)", x, w=integers(*w)), "QLinearConv")


FLOAT = {
    "bias scale 2x": (CONV, {"bs": scale(0.002, 4)}, "bias-scale"),
    "zero point of the bias": (
        "t = DequantizeLinear<axis=0>(b, bs, bz) [n] r = Conv(xd, wd, t)",
        {"bz": np.ones(4, np.int32)},
        "bias-zero-point",
    ),
    "bias int8": (
        "t = DequantizeLinear<axis=0>(b8, bs) [n] r = Conv(xd, wd, t)",
        {"b8": np.arange(4, dtype=np.int8)},
        "bias-type",
    ),
    "float weight, integer bias": ("[n] r = Conv(xd, fw, bd)", {}, "unquantized-input"),
    "16-bit activations": ("[n] r = Conv(xd, wd)", WIDE, "bits"),
    "16-bit weight": (
        "t = DequantizeLinear(v, wst) [n] r = Conv(xd, t)",
        {"v": integers(4, 3, 3, 3, dtype=np.int16)},
        "bits",
    ),
    "4-bit weight": (
        "t = DequantizeLinear(v, wst) [n] r = Conv(xd, t)",
        {"v": packed(4, 3, 3, 3)},
        "bits",
    ),
    "Relu, zero point in the middle": (
        "[n] c = Conv(xd, wd, bd) r = Relu(c)",
        {"yz": np.uint8(128)},
        "activation",
    ),
    "Clip, range beyond": (
        "[n] c = Conv(xd, wd, bd) r = Clip(c, low, high)",
        {**AXES, "ys": scale(7 / 255)},
        "activation",
    ),
    "Clip, scale of shape [1]": (
        "[n] c = Conv(xd, wd, bd) r = Clip(c, low, high)",
        {**AXES, "ys": scale(6 / 255, 1), "yz": np.zeros(1, np.uint8)},
        "activation",
    ),
    "Sigmoid": ("[n] c = Conv(xd, wd, bd) r = Sigmoid(c)", {}, "float-reader"),
    "no Q": ("[n] y = Conv(xd, wd, bd)", {}, "graph-output"),
    "no Q, float bias": ("[n] y = Conv(xd, wd, fb)", {}, "float-bias"),
    "Flatten": ("[n] c = Conv(xd, wd, bd) r = Flatten(c)", {}, "float-reader"),
    "input not quantized": ("[n] r = Conv(x, wd, bd)", {}, "unquantized-input"),
    "u8 in, s8 out": (CONV, {"xz": np.int8(3), "yz": np.uint16(3)}, "bits"),
}


@pytest.mark.parametrize("name", FLOAT)
def test_convolutions_in_float(name):
    body, constants, code = FLOAT[name]
    proto = build(body, **constants)
    check(proto, "")
    why = next(p.why for p in predict(load(proto)) if p.name == "n")
    assert why.code == code, why


@pytest.mark.parametrize(
    ("body", "outputs", "code"),
    [
        (CONV, "float[] y, float[N,4,6,6] r", "graph-output"),
        (f"{CONV} z = Tanh(r)", "float[] y, float[] z", "float-reader"),
        (
            f"{CONV} q = QuantizeLinear(r, zs, zz) z = DequantizeLinear(q, zs, zz)",
            "float[] y, float[] z",
            "two-quantizes",
        ),
    ],
)
def test_results_that_others_need(body, outputs, code):
    proto = build(body, outputs=outputs)
    check(proto, "")
    assert next(p.why.code for p in predict(load(proto)) if p.name == "n") == code


def test_equal_quantizations_are_one():
    body = f"{CONV} q = QuantizeLinear(r, ys, yz) z = DequantizeLinear(q, ys, yz)"
    check(build(body, outputs="float[] y, float[] z"), "QLinearConv")


ROWS = {
    "Gemm": ("[n] r = Gemm(xd, gd, bd)", {}, "QGemm"),
    "Gemm, float result": ("[n] y = Gemm(xd, gd, bd)", {}, "QGemm"),
    "Gemm, no bias": ("[n] y = Gemm(xd, gd)", {}, "QGemm"),
    "Gemm, float weight and bias": ("[n] r = Gemm(xd, fg, fb)", {}, "QGemm"),
    "Gemm, bias scale 2x": ("[n] r = Gemm(xd, gd, bd)", {"bs": scale(0.002, 4)}, "QGemm"),
    "Gemm, alpha without bias": ("[n] r = Gemm<alpha=2.0>(xd, gd)", {}, "QGemm"),
    "Gemm and Relu at the end": ("[n] c = Gemm(xd, gd, bd) y = Relu(c)", {}, "QGemm"),
    "MatMul": ("[n] r = MatMul(xd, gd)", {}, "QLinearMatMul"),
    "MatMul, float result": ("[n] y = MatMul(xd, gd)", {}, "MatMulIntegerToFloat"),
    "MatMul, Relu": ("[n] c = MatMul(xd, gd) r = Relu(c)", {}, "QLinearMatMul"),
    "MatMul and Add": ("[n] c = MatMul(xd, gd) r = Add(c, fb)", {}, "QGemm"),
    "MatMul, transposed weight": (
        "t = DequantizeLinear<axis=0>(v, ws, wz) u = Transpose<perm=[1,0]>(t)"
        " [n] r = MatMul(xd, u)",
        {"v": integers(4, 8)},
        "QLinearMatMul",
    ),
    "Gemm, beta": ("[n] r = Gemm<beta=2.0>(xd, gd, bd)", {}, ""),
    "Gemm, alpha": ("[n] r = Gemm<alpha=2.0>(xd, gd, bd)", {}, ""),
    "Gemm, float bias, float result": ("[n] y = Gemm(xd, gd, fb)", {}, ""),
    "Gemm, Relu, then float": ("[n] c = Gemm(xd, gd, bd) e = Relu(c) y = Tanh(e)", {}, ""),
    "Gemm, wrong axis": (
        "t = DequantizeLinear<axis=0>(g, s8, z8) [n] r = Gemm(xd, t)",
        {"s8": scale(0.05, 8), "z8": np.zeros(8, np.int8)},
        "",
    ),
    "Gemm, 16 bits": ("[n] c = Gemm(xd, gd) [z] e = Tanh(c) y = Exp(e)", WIDE, ""),
    "MatMul, wrong axis": (
        "t = DequantizeLinear<axis=0>(g, s8, z8) [n] r = MatMul(xd, t)",
        {"s8": scale(0.05, 8), "z8": np.zeros(8, np.int8)},
        "",
    ),
    "MatMul, float weight": ("[n] r = MatMul(xd, fg)", {}, ""),
    "MatMul, Relu, then float": ("[n] c = MatMul(xd, gd) e = Relu(c) y = Tanh(e)", {}, ""),
    "MatMul and Add, float result": ("[n] c = MatMul(xd, gd) y = Add(c, fb)", {}, ""),
    "MatMul, 16 bits": ("[n] r = MatMul(xd, gd)", WIDE, ""),
    "MatMul, weight alone": ("[n] y = MatMul(x, gd)", {}, ""),
}


@pytest.mark.parametrize("name", ROWS)
def test_matrix_products(name):
    body, constants, kernel = ROWS[name]
    check(rows(body, **constants), kernel)


@pytest.mark.parametrize("arm", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_products_of_activations(dtype, arm):
    body = "vq = QuantizeLinear(v, xs, xz) vd = DequantizeLinear(vq, xs, xz) [n] r = MatMul(xd, vd)"
    inputs = "float[2,6,8] x, float[2,8,5] v"
    check(build(body, inputs, xz=dtype(3), yz=dtype(5)), "QLinearMatMul", arm)


@pytest.mark.parametrize(("n", "kernel"), [("2", "QGemm"), ("N", "MatMulIntegerToFloat")])
def test_matmul_and_add_of_batches(n, kernel):
    # one Gemm of the two, but only where all sizes are known
    body = "[n] c = MatMul(xd, gd) r = Add(c, fb)"
    check(build(body, f"float[{n},5,8] x"), kernel)


# ------------------------------------------------------------------------------- other operators

UNARY = {
    "AveragePool": "AveragePool<kernel_shape=[2,2]>(xd)",
    "GlobalAveragePool": "GlobalAveragePool(xd)",
    "LeakyRelu": "LeakyRelu(xd)",
    "Sigmoid": "Sigmoid(xd)",
    "Softmax": "Softmax(xd)",
    "Add": "Add(xd, xd)",
    "Mul": "Mul(xd, xd)",
    "Concat": "Concat<axis=1>(xd, xd)",
}


@pytest.mark.parametrize("arm", [False, True])
@pytest.mark.parametrize("op", UNARY)
def test_functions(op, arm):
    kernel = f"QLinear{op}"
    check(build(f"[n] r = {UNARY[op]}"), kernel, arm)
    check(build(f"[n] r = {UNARY[op]}", **WIDE), "", arm)


MOVES = {
    "Transpose": "Transpose<perm=[0,2,3,1]>(xd)",
    "Reshape": "Reshape(xd, shape)",
    "Flatten": "Flatten(xd)",
    "Squeeze": "Squeeze(xd, axes)",
    "Unsqueeze": "Unsqueeze(xd, axes)",
    "Slice": "Slice(xd, start, stop, axes)",
    "Gather": "Gather<axis=1>(xd, index)",
    "Expand": "Expand(xd, larger)",
    "Tile": "Tile(xd, repeats)",
    "DepthToSpace": "DepthToSpace<blocksize=2>(xd)",
    "MaxPool": "MaxPool<kernel_shape=[2,2]>(xd)",
    "ReduceMax": "ReduceMax(xd, axes)",
    "ReduceMin": "ReduceMin(xd, axes)",
    "Resize": 'Resize<mode="nearest">(xd, , sizes)',
}
NARROW = {"DepthToSpace", "MaxPool", "ReduceMax", "ReduceMin", "Resize"}


def moved(op, **constants):
    return build(f"[n] r = {MOVES[op]}", "float[1,4,8,8] x", **{**AXES, **constants})


@pytest.mark.parametrize("op", MOVES)
def test_movement_needs_one_grid(op):
    check(moved(op, **SAME), op)
    check(moved(op), "")
    wide = {**WIDE, "ys": scale(0.02)}
    check(moved(op, **wide), "" if op in NARROW else op)


def test_movement_needs_zero_points():
    body = "q = QuantizeLinear(x, xs) d = DequantizeLinear(q, xs) [n] r = Transpose(d)"
    end = "p = QuantizeLinear(r, xs) y = DequantizeLinear(p, xs)"
    check(build(f"{body} {end}"), "")


@pytest.mark.parametrize(
    ("op", "x", "w", "kernel"),
    [
        ("Gemm", "", ", wz", ""),
        ("Gemm", ", xz", "", ""),
        ("MatMul", "", "", "QLinearMatMul"),
    ],
)
def test_zero_points_that_are_left_out(op, x, w, kernel):
    body = f"q = QuantizeLinear(x, xs{x}) d = DequantizeLinear(q, xs{x})"
    weight = f"v = DequantizeLinear<axis=1>(g, ws{w})"
    check(rows(f"{body} {weight} [n] r = {op}(d, v)"), kernel)


def test_arg_max_and_where_need_zero_points():
    body = "q = QuantizeLinear(x, xs) d = DequantizeLinear(q, xs)"
    check(build(f"{body} [n] y = ArgMax(d)", outputs="int64[] y"), "")
    inputs = "float[N,3,8,8] x, bool[N,3,8,8] c"
    check(build(f"{body} [n] r = Where(c, d, other)", inputs, **AXES), "")


def test_split_needs_one_grid_for_all():
    body = (
        "[n] a, c = Split<axis=1, num_outputs=2>(xd) aq = QuantizeLinear(a, xs, xz)"
        " y = DequantizeLinear(aq, xs, xz) cq = QuantizeLinear(c, {0}s, {0}z)"
        " z = DequantizeLinear(cq, {0}s, {0}z)"
    )
    outputs = "float[] y, float[] z"
    check(build(body.format("x"), "float[N,4,8,8] x", outputs), "Split")
    check(build(body.format("z"), "float[N,4,8,8] x", outputs), "")


NONE = {
    "Relu": "Relu(xd)",
    "Clip": "Clip(xd, low, high)",
    "Tanh": "Tanh(xd)",
    "HardSigmoid": "HardSigmoid(xd)",
    "Elu": "Elu(xd)",
    "Gelu": "Gelu(xd)",
    "Exp": "Exp(xd)",
    "PRelu": "PRelu(xd, slope)",
    "Sub": "Sub(xd, other)",
    "Div": "Div(xd, other)",
    "Pow": "Pow(xd, other)",
    "Max": "Max(xd, other)",
    "Pad": "Pad(xd, pads)",
    "SpaceToDepth": "SpaceToDepth<blocksize=2>(xd)",
    "ReduceMean": "ReduceMean(xd, axes)",
    "ReduceSum": "ReduceSum(xd, axes)",
    "GlobalMaxPool": "GlobalMaxPool(xd)",
    "linear Resize": 'Resize<mode="linear">(xd, , sizes)',
    "cubic Resize": 'Resize<mode="cubic">(xd, , sizes)',
    "Add of a float": "Add(xd, other)",
}


@pytest.mark.parametrize("name", NONE)
def test_without_integer_kernels(name):
    proto = build(f"[n] r = {NONE[name]}", "float[N,4,8,8] x", opset=20, **{**AXES, **SAME})
    check(proto, "")


def test_transposed_convolutions_stay_float():
    body = "t = DequantizeLinear(v, wst, wzt) [n] r = ConvTranspose(xd, t)"
    check(build(body, v=integers(3, 4, 3, 3)), "")


def test_constants_of_functions_need_a_dequantize():
    body = "od = DequantizeLinear(otherq, xs, xz) [n] r = Add(xd, od)"
    check(build(body, **AXES), "QLinearAdd")


def test_where():
    body = "od = DequantizeLinear(otherq, xs, xz) [n] r = Where(c, xd, od)"
    inputs = "float[N,3,8,8] x, bool[N,3,8,8] c"
    check(build(body, inputs, **AXES), "QLinearWhere")
    check(build("[n] r = Where(c, xd, other)", inputs, **AXES), "QLinearWhere")


def test_arg_max_reads_integers():
    check(build("[n] y = ArgMax(xd)", outputs="int64[] y"), "ArgMax")


def test_scales_of_a_concat_may_differ_its_types_not():
    body = "vq = QuantizeLinear(v, zs, zz) vd = DequantizeLinear(vq, zs, zz)"
    body += " [n] r = Concat<axis=1>(xd, vd)"
    inputs = "float[N,8] x, float[N,8] v"
    check(build(body, inputs), "QLinearConcat")
    mixed = build(body, inputs, zz=np.int8(0))
    check(mixed, "QLinearConcat")  # on x86-64 the int8 pair becomes uint8
    check(mixed, "", arm=True)


def test_gates():
    body = (
        "[c] c = Conv(xd, wd, bd) cq = QuantizeLinear(c, zs, zz) cd = DequantizeLinear(cq, zs, zz)"
        " [s] s = {}(cd) sq = QuantizeLinear(s, ys, yz) sd = DequantizeLinear(sq, ys, yz)"
        " [n] r = Mul(cd, sd)"
    )
    fused = {"c": "QLinearConv", "n": "QLinearMul"}
    check(build(body.format("Sigmoid")), {**fused, "s": "QLinearSigmoid"})
    check(build(body.format("HardSigmoid")), {**fused, "s": ""})


def test_residuals():
    body = (
        "[c] c = Conv(xd, wd, bd) cq = QuantizeLinear(c, zs, zz) cd = DequantizeLinear(cq, zs, zz)"
        " [n] a = Add(cd, cd) [relu] r = Relu(a)"
    )
    proto = build(body)
    check(proto, {"c": "QLinearConv", "n": "QLinearAdd"})
    relu = next(p for p in predict(load(proto)) if p.name == "relu")
    assert relu.integer


# ------------------------------------------------------------------------------- pairs that move


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
@pytest.mark.parametrize("op", ["Transpose", "Reshape", "MaxPool", "Slice", "Unsqueeze"])
def test_pairs_spread_through_movement(op, opset):
    made = MOVES[op].replace("perm=[0,2,3,1]", "perm=[0,1,3,2]")
    proto = build(f"[n] m = {made} [s] r = Sigmoid(m)", opset=opset, **AXES)
    check(proto, {"n": op, "s": "QLinearSigmoid"})


@pytest.mark.parametrize("op", ["Flatten", "Tile"])
def test_pairs_do_not_spread_through_the_rest(op):
    check(build(f"[n] m = {MOVES[op]} [s] r = Sigmoid(m)", **AXES), {"n": "", "s": ""})


def test_pairs_spread_backward():
    body = "[c] c = Conv(xd, wd, bd) [relu] e = Relu(c) [n] r = Transpose<perm=[0,1,3,2]>(e)"
    check(build(body), {"c": "QLinearConv", "n": "Transpose"})


def test_equal_nodes_are_one():
    # each Slice alone would be moved behind the Q; of two that are one, the result has two readers
    one = "t = Tanh(x) a = Slice(t, start, stop, axes) [n] r = Slice(a, start, stop, axes)"
    two = "e = Slice(t, start, stop, axes) [m] c = Slice(e, start, stop, last)"
    end = "q = QuantizeLinear(c, ys, yz) z = DequantizeLinear(q, ys, yz)"
    constants = {**AXES, "last": np.array([2])}
    check(build(one, **constants), "Slice")
    proto = build(f"{one} {two} {end}", outputs="float[] y, float[] z", **constants)
    check(proto, {"n": "", "m": ""})


def test_pairs_spread_to_outputs():
    body = "[c] r = Conv(xd, wd, bd) q = QuantizeLinear(r, ys, yz) d = DequantizeLinear(q, ys, yz)"
    check(build(f"{body} [n] y = Transpose<perm=[0,1,3,2]>(d)"), {"c": "QLinearConv"})


def test_pairs_behind_pairs_are_one():
    body = (
        "[c] c = Conv(xd, wd, bd) cq = QuantizeLinear(c, zs, zz) r = DequantizeLinear(cq, zs, zz)"
    )
    check(build(body), {"c": "QLinearConv"})


@pytest.mark.parametrize(
    ("weight", "ratio", "kernel"),
    [
        (0.05, 1.009, "QLinearConv"),
        (0.05, 1.02, ""),
        (0.0005, 1.09, "QLinearConv"),  # 1e-6 off, and 1 % of 1e-5
        (0.0005, 1.2, ""),
        (5e-6, 9.0, "QLinearConv"),  # 8e-7 off: computes other numbers
        (5e-6, 12.0, ""),
    ],
)
def test_slack_of_bias_scales(weight, ratio, kernel):
    scales = {"ws": scale(weight, 4), "bs": scale(0.02 * weight * ratio, 4)}
    check(build(CONV, **scales), kernel)


def test_the_grid_of_pairs_that_become_one_is_that_of_float32():
    # what both hold is what the first holds, but the last bit of its scale may differ
    body = (
        "[n] m = Transpose<perm=[0,1,3,2]>(xd) mq = QuantizeLinear(m, xs, xz)"
        " r = DequantizeLinear(mq, xs, xz)"
    )
    kernels = set()
    for value in (0.02, 0.09357, 0.00506):
        proto = build(body, xs=scale(value), ys=scale(1.1 * value), yz=np.uint8(128))
        found = next(p for p in predict(load(proto)) if p.name == "n")
        check(proto, "Transpose" if found.integer else "")
        kernels.add(found.integer)
    assert kernels == {True, False}


# ------------------------------------------------------------------------------- int8 on x86-64


BRANCH = (
    "[one] a = Conv(xd, wd, bd) aq = QuantizeLinear(a, ys, yz) ad = DequantizeLinear(aq, ys, yz)"
    " [two] c = Conv(xd, wd) cq = QuantizeLinear(c, ys, yz) cd = DequantizeLinear(cq, ys, yz)"
    " [n] r = Add(ad, cd)"
)


def test_int8_that_two_nodes_read_is_float_on_x64():
    proto = build(BRANCH, **SIGNED)
    check(proto, {"one": "", "two": "", "n": "QLinearAdd"})
    check(proto, {"one": "QLinearConv", "two": "QLinearConv", "n": "QLinearAdd"}, arm=True)
    why = next(p.why for p in predict(load(proto)) if p.name == "one")
    assert why.code == "int8-on-x64"
    check(build(BRANCH), {"one": "QLinearConv", "two": "QLinearConv", "n": "QLinearAdd"})


def test_int8_constants_stay_int8_on_x64():
    body = "od = DequantizeLinear(o, xs, wzt) [n] r = Add(xd, od)"
    proto = build(body, **SIGNED, o=np.int8(7))
    check(proto, "")
    check(proto, "QLinearAdd", arm=True)


def test_int8_outputs_on_x64():
    proto = build(
        "[n] r = Conv(xd, wd) y = QuantizeLinear(r, ys, yz)", outputs="int8[] y", **SIGNED
    )
    check(proto, "")
    check(proto, "QLinearConv", arm=True)


# ------------------------------------------------------------------------------- what is counted


def test_operators_on_integers_are_in_integers():
    text = "[n] q = QLinearConv(xq, xs, xz, w, ws, wz, ys, yz) y = DequantizeLinear(q, ys, yz)"
    proto = build(f"xq = QuantizeLinear(x, xs, xz) {text}")
    check(proto, "QLinearConv")


def test_indices_and_shapes_are_not_counted():
    body = (
        "s = Shape(x) i = Gather(s, index) [n] r = Sigmoid(xd) [i] f = Cast<to=1>(i)"
        " q = QuantizeLinear(r, ys, yz) y = DequantizeLinear(q, ys, yz) z = Identity(f)"
    )
    proto = build(body, outputs="float[] y, float[] z", **AXES)
    assert [p.name for p in predict(load(proto)) if p.op not in ("Identity",)] == ["n"]


# ------------------------------------------------------------------------------- at random


PAIR = "{1}q = QuantizeLinear({0}, {2}s, {2}z) {1} = DequantizeLinear({1}q, {2}s, {2}z) "
NETWORK = (
    "a1 = Conv<pads=[1,1,1,1]>(xd, wd, bd) a2 = Relu(a1) " + PAIR.format("a2", "a", "y")
    + "e1 = Conv<pads=[1,1,1,1]>(a, ve) " + PAIR.format("e1", "e", "z")
    + "ve = DequantizeLinear(v, wst, wzt) s1 = Sigmoid(e) " + PAIR.format("s1", "s", "y")
    + "m1 = Mul(e, s) " + PAIR.format("m1", "m", "z")
    + "r1 = Add(m, a) " + PAIR.format("r1", "h", "z")
    + "c1 = Concat<axis=1>(h, a) " + PAIR.format("c1", "c", "z")
    + "p1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c) " + PAIR.format("p1", "p", "z")
    + "t1 = Transpose<perm=[0,2,3,1]>(p) " + PAIR.format("t1", "t", "z")
    + "f1 = Flatten(t) " + PAIR.format("f1", "f", "z")
    + "g1 = DequantizeLinear(g, wst, wzt) r = Gemm(f, g1, o) o = DequantizeLinear(b, bo)"
)  # fmt: skip


def network(signed):
    order = NETWORK.replace("ve = DequantizeLinear(v, wst, wzt) ", "")
    order = order.replace("o = DequantizeLinear(b, bo)", "")
    head = "ve = DequantizeLinear(v, wst, wzt) o = DequantizeLinear(b, bo) "
    constants = {
        "v": integers(4, 4, 3, 3),
        "g": integers(128, 4),
        "bo": scale(0.002),
        "zz": np.uint8(128),
        **({**SIGNED, "zz": np.int8(0)} if signed else {}),
    }
    return build(head + order, **constants)


def change(model, rng):
    """Change a Q/DQ pair of a model as tools get them wrong."""
    pairs = [n for n in model.graph.nodes if is_quantize(n) and n.inputs]
    quantize = rng.choice(pairs)
    source, integers_ = quantize.inputs[0], quantize.outputs[0]
    both = [quantize, *(n for n in consumers(integers_) if is_dequantize(n))]
    kind = rng.choice(["drop", "scale", "type", "no zero", "twice", "output", "reader"])
    if kind == "drop":
        for node in both[1:]:
            if not model.is_output(node.outputs[0]):
                for reader in [*node.outputs[0].outputs]:
                    rewire(reader, node.outputs[0], source)
    elif kind == "scale":
        new = model.constant("scale", np.float32(rng.choice([0.01, 0.02, 0.07])))
        for node in both:
            node.inputs[1] = new
    elif kind == "type":
        dtype = rng.choice([np.uint8, np.int8, np.uint16])
        new = model.constant("zero", dtype(rng.choice([0, 5])))
        for node in both:
            if len(node.inputs) > 2:
                node.inputs[2] = new
    elif kind == "no zero":
        for node in both:
            if len(node.inputs) > 2 and model.array(node.inputs[2]).dtype == np.uint8:
                node.inputs.pop()
    elif kind == "twice" and len(both) > 1:
        after = both[1].outputs[0]
        parts = [model.variable("twice", t) for t in (integers_.dtype, np.float32)]
        for reader in [*after.outputs]:
            rewire(reader, after, parts[1])
        grid = [*quantize.inputs[1:]]
        if rng.random() < 0.5:
            grid[0] = model.constant("scale", np.float32(0.05))
        nodes = [("QuantizeLinear", after, parts[0]), ("DequantizeLinear", *parts)]
        model.insert([gs.Node(op, op, {}, [x, *grid], [y]) for op, x, y in nodes])
    elif kind == "output" and producer(source) is not None and not model.is_output(source):
        model.graph.outputs.append(source)
    elif kind == "reader" and producer(source) is not None:
        result = model.variable("read", np.float32)
        model.insert([gs.Node("Tanh", "Tanh", {}, [source], [result])])
        model.graph.outputs.append(result)


@pytest.mark.parametrize(
    ("body", "loads"),
    [
        ("m = MaxPool<kernel_shape=[2,2]>(xd) y = Tanh(m)", False),
        ("m = Slice(xd, start, stop, axes) t = Transpose<perm=[0,1,3,2]>(m) y = Tanh(t)", False),
        ("y = Transpose<perm=[0,1,3,2]>(xd)", False),
        ("m = MaxPool<kernel_shape=[2,2]>(xd) r = Transpose<perm=[0,1,3,2]>(m)", True),
        ("t = Tanh(x) r = Transpose<perm=[0,1,3,2]>(t)", True),
    ],
)
def test_int8_that_spreads_does_not_load_on_x64(body, loads):
    for opset in (17, 21):
        model = load(build(body, opset=opset, **AXES, **SIGNED))
        model.infer()
        broken = bool(Rewritten(model, arm=False).unloadable)
        assert broken is (opset == 21 and not loads)
        if broken:
            with pytest.raises(ModelError, match="output_dtype INT8 does not match"):
                measure(model)
        else:
            measure(model)
        measure(model, arm=True)


def changed(rng, *, signed):
    """A network with one to four changes, which may make no model of it."""
    model = load(network(signed=signed))
    model.infer()
    for _ in range(rng.choice([1, 2, 4])):
        change(model, rng)
    model.cleanup()
    model.sort()
    return model.to_proto()


def loads(proto):
    try:
        Session(proto, level="disabled")
    except ModelError:
        return False
    return True


@pytest.mark.parametrize("seed", range(40))
def test_models_that_are_changed_at_random(seed):
    rng = random.Random(seed)
    proto = changed(rng, signed=bool(seed % 2))
    while not loads(proto):
        proto = changed(rng, signed=bool(seed % 2))
    model = load(proto)
    model.infer()
    for arm in (False, True):
        if arm or not Rewritten(model, arm=False).unloadable:
            check(proto, {}, arm)
        else:
            with pytest.raises(ModelError, match="output_dtype INT8 does not match"):
                measure(load(proto))
