import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxq.analysis.cost import tensor_shapes
from onnxq.analysis.fusion import Fusion, LayerFusion, integer_share
from onnxq.errors import ModelError
from onnxq.model import load

RNG = np.random.default_rng(0)


def scale(value, n=None):
    return np.full(() if n is None else n, value, np.float32)


def integers(*shape, dtype=np.int8):
    return RNG.integers(-100, 100, shape).astype(dtype)


CONSTANTS = {
    "xs": scale(0.02),
    "xz": np.uint8(128),
    "ys": scale(0.03),
    "yz": np.uint8(0),
    "ws": scale(0.05, 4),
    "wz": np.zeros(4, np.int8),
    "bs": scale(0.001, 4),
    "b": np.arange(4, dtype=np.int32),
    "fb": np.ones(4, np.float32),
}
CONV = {"w": integers(4, 3, 3, 3)}
DENSE = {"w": integers(8, 4)}


def build(text, **constants):
    """A model whose text may name the constants above."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
    constants = CONSTANTS | constants
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in read
    )
    onnx.checker.check_model(proto)
    return proto


INPUT = "xq = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xq, xs, xz)"
OUTPUT = "yq = QuantizeLinear(r, ys, yz) y = DequantizeLinear(yq, ys, yz)"
IMAGE = f"{INPUT} wd = DequantizeLinear<axis=0>(w, ws, wz)"
ROWS = f"{INPUT} wd = DequantizeLinear<axis=1>(w, ws, wz)"
BIAS = "bd = DequantizeLinear<axis=0>(b, bs)"


def image(body, result="float[N,4,6,6] y", **constants):
    body = f"{BIAS if 'bd' in body else ''} {body}"
    return build(f"(float[N,3,8,8] x) => ({result}) {{ {IMAGE} {body} }}", **CONV | constants)


def rows(body, **constants):
    body = f"{BIAS if 'bd' in body else ''} {body}"
    return build(f"(float[N,8] x) => (float[N,4] y) {{ {ROWS} {body} }}", **DENSE | constants)


def only(proto, **options):
    (layer,) = integer_share(proto, **options).layers
    return layer


MACS = 4 * 6 * 6 * 27


# ------------------------------------------------------------------------------- in integers


@pytest.mark.parametrize("arm", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        f"[conv] r = Conv(xd, wd, bd) {OUTPUT}",
        f"[conv] r = Conv(xd, wd) {OUTPUT}",
        f"[conv] c = Conv(xd, wd, bd) r = Relu(c) {OUTPUT}",
        f"[conv] r = Conv(xd, wd, fb) {OUTPUT}",
    ],
)
def test_conv(body, arm):
    fusion = integer_share(image(body), arm=arm)
    assert fusion.layers == [LayerFusion("conv", "Conv", MACS, True, "QLinearConv", "")]
    assert fusion.operators == {"QuantizeLinear": 1, "QLinearConv": 1, "DequantizeLinear": 1}
    assert (fusion.macs, fusion.integer_macs, fusion.possible_macs) == (MACS, MACS, MACS)
    assert fusion.share == fusion.share_of_possible == 1


@pytest.mark.parametrize(
    ("body", "kernel"),
    [
        ("[fc] y = Gemm(xd, wd, bd)", "QGemm"),
        (f"[fc] r = Gemm(xd, wd, bd) {OUTPUT}", "QGemm"),
        ("[fc] c = Gemm(xd, wd, bd) y = Relu(c)", "QGemm"),
        ("[fc] y = MatMul(xd, wd)", "MatMulIntegerToFloat"),
        (f"[fc] r = MatMul(xd, wd) {OUTPUT}", "QLinearMatMul"),
        # onnxruntime makes one Gemm of the two, and calls it otherwise
        (f"[fc] c = MatMul(xd, wd) r = Add(c, fb) {OUTPUT}", "QGemm"),
    ],
)
def test_dense(body, kernel):
    layer = only(rows(body))
    assert (layer.name, layer.macs, layer.integer, layer.kernel) == ("fc", 32, True, kernel)


SIGNED = {"xz": np.int8(3), "yz": np.int8(-128)}


@pytest.mark.parametrize("arm", [False, True])
def test_int8_activations_are_found_whatever_onnxruntime_calls_them(arm):
    proto = image(f"[conv] c = Conv(xd, wd, bd) r = Relu(c) {OUTPUT}", **SIGNED)
    assert only(proto, arm=arm).integer


def test_arm_is_another_view():
    # on x64 the int8 side becomes uint8
    text = """(float[N,8] x, float[N,8,4] v) => (float y) {
        xq = QuantizeLinear(x, xs, xz) xd = DequantizeLinear(xq, xs, xz)
        vq = QuantizeLinear(v, xs, vz) vd = DequantizeLinear(vq, xs, vz)
        [mm] y = MatMul(xd, vd)
    }"""
    proto = build(text, xz=np.int8(0), vz=np.uint8(128))
    assert only(proto).integer
    layer = only(proto, arm=True)
    assert not layer.integer
    assert layer.reason == "onnxruntime has no integer MatMul of int8 and uint8"


@pytest.mark.parametrize("arm", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_product_of_activations(arm, dtype):
    text = f"""(float[2,6,8] x, float[2,8,5] v) => (float y) {{
        {INPUT}
        vq = QuantizeLinear(v, xs, xz) vd = DequantizeLinear(vq, xs, xz)
        [qk] r = MatMul(xd, vd) {OUTPUT}
    }}"""
    layer = only(build(text, xz=dtype(3), yz=dtype(5)), arm=arm)
    assert layer == LayerFusion("qk", "MatMul", 6 * 8 * 5, True, "QLinearMatMul", "")


# ------------------------------------------------------------------------------- in float


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (
            image(
                f"[conv] r = Conv(xd, wd, bd) {OUTPUT}",
                "float[N,4,6,6] y, float[N,4,6,6] r",
            ),
            "its result is an output of the model",
        ),
        (
            image("[conv] c = Conv(xd, wd, bd) y = Relu(c)"),
            "its result is an output of the model",
        ),
        (
            image(f"[conv] c = Conv(xd, wd, bd) [soft] r = Sigmoid(c) {OUTPUT}"),
            "soft reads its result in float",
        ),
        (
            image(f"[conv] c = Conv(xd, wd, bd) r = Relu(c) {OUTPUT}", yz=np.uint8(128)),
            "onnxruntime makes a float FusedConv of it and of what follows",
        ),
        (  # not the product of the two scales
            image(f"[conv] r = Conv(xd, wd, bd) {OUTPUT}", bs=scale(0.002, 4)),
            "Q/DQ around it did not fuse",
        ),
        (
            image(f"[conv] r = Conv(x, wd, bd) {OUTPUT}"),
            "its input x is not quantized",
        ),
        (
            image(f"[conv] r = Conv(xd, wd) {OUTPUT}", xz=np.uint16(0), yz=np.uint16(0)),
            "onnxruntime has no integer Conv of uint16 and int8",
        ),
        (
            build(
                f"""(float[N,3,8,8] x) => (float y) {{ {INPUT}
                    wd = DequantizeLinear(w, xs, wz) [up] r = ConvTranspose(xd, wd) {OUTPUT} }}""",
                w=integers(3, 4, 3, 3),
                wz=np.int8(0),
            ),
            "onnxruntime has no integer ConvTranspose",
        ),
        (
            rows("[fc] c = MatMul(xd, wd) y = Add(c, fb)"),
            "onnxruntime makes a float Gemm of it and of what follows",
        ),
    ],
)
def test_reasons(proto, reason):
    layer = only(proto)
    assert not layer.integer
    assert layer.reason == reason
    assert layer.kernel


def test_weights_alone_in_integers():
    proto = build(
        "(float[N,64] x) => (float y) { d=DequantizeLinear<axis=1>(w, ws) [fc] y = MatMul(x, d) }",
        w=integers(64, 4),
    )
    layer = only(proto)
    assert layer.kernel == "MatMulNBits"
    assert layer.reason == "only its weight is in integers (MatMulNBits)"


def test_float_nodes_say_why():
    model = load(image(f"[conv] r = Conv(x, wd, bd) {OUTPUT}"))
    model.encodings.float_nodes["conv"] = "excluded"
    assert only(model).reason == "left in float: excluded"


def test_float_layers_are_found_when_they_swallow_others():
    proto = build(
        """(float[N,3,8,8] x) => (float y) {
            [one] a = Conv(x, v) m = BatchNormalization(a, fb, fb, fb, fb) r = Relu(m)
            [two] c = Conv(x, v) s = Add(c, r) y = Relu(s)
        }""",
        v=RNG.normal(size=(4, 3, 3, 3)).astype(np.float32),
    )
    one, two = integer_share(proto).layers
    assert {one.kernel, two.kernel} <= {"Conv", "FusedConv"}
    assert one.reason == two.reason == "its input x is not quantized"


# ------------------------------------------------------------------------------- finding layers


def test_what_is_gone_is_said():
    # products of constants are folded before anything runs
    proto = build(
        "(float[4,4] x) => (float y) { [folded] p = MatMul(u, v) y = Add(x, p) }",
        u=np.ones((4, 4), np.float32),
        v=np.ones((4, 4), np.float32),
    )
    layer = only(proto)
    assert (layer.kernel, layer.integer) == ("", False)
    assert layer.reason == "not found in onnxruntime's optimized graph"


@pytest.mark.parametrize(
    "optimized",
    [
        "r = QLinearConv(xq, xs, xz, w, ws, wz, ys, yz)",  # by its output
        "yq = QLinearConv(xq, xs, xz, v, ws, wz, ys, yz)",  # by the output of the Q after it
        "q = QLinearConv(xq, xs, xz, v, ws, wz, ys, yz) y = DequantizeLinear(q, ys, yz)",
        "q = QLinearConv(xq, xs, xz, w, ws, wz, ys, yz)",  # by its weight
        "wd = DequantizeLinear(w, ws, wz) q = Conv(xd, wd)",
    ],
)
def test_layers_are_found_under_other_names(optimized, monkeypatch):
    graph = onnx.parser.parse_graph(f"g (float x) => (float y) {{ {optimized} }}")
    monkeypatch.setattr("onnxq.analysis.fusion.optimized_graph", lambda model, arm: graph)
    layer = only(image(f"[conv] r = Conv(xd, wd, bd) {OUTPUT}"))
    assert layer.kernel == next(n.op_type for n in graph.node if "Conv" in n.op_type)


# ------------------------------------------------------------------------------- sums

TWO = f"""(float[N,3,H,W] x) => (float y) {{
    {IMAGE} {BIAS}
    [one] r = Conv(xd, wd, bd)
    yq = QuantizeLinear(r, ys, yz) yd = DequantizeLinear(yq, ys, yz)
    [two] u = ConvTranspose(yd, v)
    [three] y = Conv(u, t)
}}"""


def two():
    return build(
        TWO, **CONV, v=np.ones((4, 1, 2, 2), np.float32), t=np.ones((1, 1, 2, 2), np.float32)
    )


def test_sums():
    fusion = integer_share(two(), {"x": (1, 3, 8, 8)})
    macs = [MACS, 4 * 36 * 4, 36 * 4]
    assert [n.macs for n in fusion.layers] == macs
    assert [n.integer for n in fusion.layers] == [True, False, False]
    assert (fusion.macs, fusion.integer_macs, fusion.possible_macs) == (
        sum(macs),
        MACS,
        MACS + macs[2],
    )
    assert fusion.share == MACS / sum(macs)
    assert fusion.share_of_possible == MACS / (MACS + macs[2])
    plain = json.loads(json.dumps(fusion.to_dict()))
    assert plain["layers"][1] == {
        "name": "two",
        "op": "ConvTranspose",
        "macs": macs[1],
        "integer": False,
        "kernel": "ConvTranspose",
        "reason": "onnxruntime has no integer ConvTranspose",
    }
    assert (plain["integer_layers"], plain["float_layers"]) == (1, 2)
    assert (plain["quantize_nodes"], plain["dequantize_nodes"]) == (1, 1)
    assert plain["share"] == fusion.share


def test_shapes_of_the_float_model_and_of_none():
    model = load(two())
    whole = tensor_shapes(model, {"x": (2, 3, 16, 16)})
    some = {"x": (2, 3, 16, 16), "r": None}  # the rest is found out
    found = [integer_share(model, shapes).layers for shapes in (whole, some)]
    assert found[0] == found[1]
    assert found[0][0].macs == 4 * 14 * 14 * 27


def test_no_layers():
    fusion = integer_share(build("(float[2] x) => (float y) { y = Relu(x) }"))
    assert fusion == Fusion([], {"Relu": 1})
    assert (fusion.share, fusion.share_of_possible, fusion.macs) == (0, 0, 0)


def test_models_that_cannot_run():
    proto = image(f"[conv] r = Conv(xd, wd, bd) {OUTPUT}")
    proto.graph.node[4].op_type = "Convolution"
    with pytest.raises(ModelError, match="onnxruntime cannot load"):
        integer_share(proto)


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    integer_share(two())
    assert list(tmp_path.iterdir()) == []
