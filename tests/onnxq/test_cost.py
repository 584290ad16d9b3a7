import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxq.analysis.cost import LayerCost, layer_costs, tensor_shapes
from onnxq.encoding import Encoding
from onnxq.errors import CalibrationError, ModelError
from onnxq.model import load
from onnxq.runtime import Session
from tests import qdq


def build(text, opset=21, **constants):
    """A model from the body of an ONNX text graph, and constants by name."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    return load(proto)


def ones(*shape):
    return np.ones(shape, np.float32)


def costs(model, given=None, **options):
    return layer_costs(model, tensor_shapes(model, given), **options)


# ------------------------------------------------------------------------------- MACs


@st.composite
def layers(draw):
    """A layer without padding, its weight, the shape of its input."""
    size = st.integers(1, 3)
    op = draw(st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul", "MatMul left"]))
    if op == "MatMul":
        k = draw(size)
        x = draw(st.sampled_from([(k,), (2, k), (2, 3, k)]))
        return "MatMul(x, w)", draw(st.sampled_from([(k,), (k, 4), (*x[:-2], k, 4)])), x
    if op == "MatMul left":
        k = draw(size)
        return (
            "MatMul(w, x)",
            draw(st.sampled_from([(k,), (4, k)])),
            draw(st.sampled_from([(k,), (k, 3), (2, k, 3)])),
        )
    if op == "Gemm":
        k, n, a, b = draw(size), draw(size), draw(st.integers(0, 1)), draw(st.integers(0, 1))
        body = f"Gemm<transA={a}, transB={b}>(x, w)"
        return body, (n, k) if b else (k, n), (k, 3) if a else (3, k)
    rank, group = draw(st.integers(1, 3)), draw(size)
    kernel = draw(st.lists(size, min_size=rank, max_size=rank))
    stride, dilation = (draw(st.lists(size, min_size=rank, max_size=rank)) for _ in "sd")
    window = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    per_group, outputs = draw(size), draw(size)
    first = per_group * group if op == "ConvTranspose" else outputs * group
    second = outputs if op == "ConvTranspose" else per_group
    body = f"{op}<group={group}, strides={stride}, dilations={dilation}>(x, w)"
    extra = draw(st.integers(0, 3))
    return body, (first, second, *kernel), (2, per_group * group, *(w + extra for w in window))


@given(layers())
def test_macs_are_the_products_that_a_layer_sums(case):
    body, weight, x = case
    shape = ",".join(map(str, x))
    model = build(f"(float[{shape}] x) => (float y) {{ y = {body} }}", w=ones(*weight))
    (cost,) = costs(model, batch=1)
    # with ones everywhere and no padding, the outputs count the products
    session = Session(model.to_proto(), threads=1, level="disabled")
    products = session.run({"x": ones(*x)})["y"]
    assert cost.macs == products.sum()
    assert cost.output_shape == products.shape
    assert cost.parameters == np.prod(weight)
    assert cost.nbytes == 4 * cost.parameters


def test_padding_counts():
    model = build(
        """(float[1,2,5,5] x) => (float y) {
            [same] a = Conv<auto_pad="SAME_UPPER", group=2>(x, w)
            [up] y = ConvTranspose<pads=[1,1,1,1], strides=[2,2]>(a, w, b)
        }""",
        w=ones(2, 1, 3, 3),
        b=ones(1),
    )
    same, up = costs(model)
    assert same == LayerCost("same", "Conv", 18, 72, 50 * 9, (1, 2, 5, 5))
    assert up == LayerCost("up", "ConvTranspose", 19, 76, 50 * 9, (1, 1, 9, 9))


def test_product_of_activations():
    model = build(
        "(float[1,4,6,8] a, float[1,4,8,5] b) => (float[1,4,6,5] y) { [qk] y = MatMul(a, b) }"
    )
    assert costs(model) == [LayerCost("qk", "MatMul", 0, 0, 4 * 6 * 8 * 5, (1, 4, 6, 5))]


def test_computed_weight():
    model = build(
        """(float[1,3,8,8] x, float[4,3,3,3] v) => (float y) { w = Relu(v) y = Conv(x, w) }"""
    )
    (cost,) = costs(model)
    assert (cost.macs, cost.parameters) == (4 * 6 * 6 * 27, 0)


def test_half_floats_and_shared_weights():
    model = build(
        """(float16[1,4] x) => (float16 y) { [a] h = MatMul(x, w) [b] y = MatMul(h, w) }""",
        w=np.ones((4, 4), np.float16),
    )
    for cost in costs(model):
        assert (cost.parameters, cost.nbytes) == (16, 32)
        assert (cost.weight_bits, cost.activation_bits) == (16, 16)
        assert cost.bit_operations == 16 * 16 * 16


@pytest.mark.parametrize(
    ("body", "weight", "macs"),
    [
        ("MatMul(x, w)", (5, 4), 60),
        ("MatMul(x, w)", (5,), 15),
        ("Gemm(x, w)", (5, 4), 60),
        ("Gemm<transB=1>(x, w)", (4, 5), 60),
    ],
)
def test_the_summed_axis_is_also_read_off_the_weight(body, weight, macs):
    model = build(f"(float[N,K] x) => (float y) {{ y = {body} }}", w=ones(*weight))
    shape = (3, 4)[: len(weight)]
    (cost,) = layer_costs(model, {"y": shape}, batch=1)
    assert cost.macs == macs
    model = build("(float[N,K] x, float[K,M] w) => (float y) { y = MatMul(x, w) }")
    (cost,) = layer_costs(model, {"y": shape})
    assert cost.macs is None


@pytest.mark.parametrize(
    ("inputs", "sizes", "batch", "macs"),
    [
        ("float[8,4] x", {}, None, 16),
        ("float[8,4] x", {}, 1, 128),
        ("float[N,4] x", {}, None, 16),
        ("float[N,4] x", {"x": (8, 4)}, None, 16),
        ("float[N,4] x", {"x": (0, 4)}, None, 0),
        ("float[8,4] x, float[8] z", {}, None, 16),
        ("float[8,4] x, float[9] z", {}, None, 128),
        ("float[8,4] x, float z", {}, None, 16),
    ],
)
def test_macs_are_per_sample(inputs, sizes, batch, macs):
    model = build(f"({inputs}) => (float y) {{ y = MatMul(x, w) }}", w=ones(4, 4))
    (cost,) = costs(model, sizes, batch=batch)
    assert cost.macs == macs


def test_other_domains_are_no_layers():
    proto = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("MatMul", ["x", "x"], ["h"], domain="mine"),
                helper.make_node("MatMul", ["h", "w"], ["y"], "dense"),
            ],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
            [numpy_helper.from_array(ones(2, 2), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)],
    )
    model = load(proto)
    said = Said()
    shapes = tensor_shapes(model, progress=said)  # onnxruntime does not know the first node
    assert shapes["h"] is None
    (cost,) = layer_costs(model, shapes)
    assert (cost.name, cost.macs, cost.bit_operations) == ("dense", None, None)
    assert "onnxruntime cannot load the model" in said.lines[0]


# ------------------------------------------------------------------------------- bits


def test_bits_of_encodings():
    model = build(
        """(float[1,4] x) => (float y) {
            [a] h = MatMul(x, w) [b] y = MatMul(h, w)
        }""",
        w=ones(4, 4),
    )
    model.encodings["w"] = Encoding.symmetric(np.ones(4), "int4", 1)
    model.encodings["x"] = Encoding.of_range(0, 1, "uint8")
    one, two = costs(model)
    assert (one.weight_bits, one.activation_bits, one.bit_operations) == (4, 8, 16 * 32)
    assert (two.weight_bits, two.activation_bits, two.bit_operations) == (4, 32, 16 * 128)
    model.encodings.float_nodes["a"] = "excluded"
    one, _ = costs(model)
    assert (one.weight_bits, one.activation_bits) == (32, 32)


QDQ = """(float[N,3,8,8] x) => (float y) {
    xq = QuantizeLinear(x, s)
    xd = DequantizeLinear(xq, s)
    wd = DequantizeLinear(w, s, z)
    bd = DequantizeLinear(b, s)
    [conv] c = Conv(xd, wd, bd)
    cq = QuantizeLinear(c, s)
    y = DequantizeLinear(cq, s)
}"""
SCALE = np.array(0.1, np.float32)


def packed(name, dtype, shape):
    values = [1] * int(np.prod(shape))
    return helper.make_tensor(name, dtype, shape, values)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(TensorProto.INT8, 8), (TensorProto.UINT8, 8), (TensorProto.INT16, 16), (TensorProto.INT4, 4)],
)
def test_weights_behind_dequantize(dtype, bits):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g {QDQ}')
    proto.graph.initializer.extend(
        [
            packed("w", dtype, [4, 3, 3, 3]),
            packed("z", dtype, []),
            numpy_helper.from_array(SCALE, "s"),
            numpy_helper.from_array(np.ones(4, np.int32), "b"),
        ]
    )
    (cost,) = costs(load(proto))
    assert (cost.parameters, cost.nbytes) == (108 + 4, 108 * bits // 8 + 16)
    assert (cost.macs, cost.output_shape) == (4 * 6 * 6 * 27, (1, 4, 6, 6))
    assert (cost.weight_bits, cost.activation_bits) == (bits, 8)


def test_shapes_of_the_float_model_serve_the_qdq_model():
    constants = {
        "w": np.ones((4, 3, 3, 3), np.int8),
        "z": np.array(0, np.int8),
        "b": np.ones(4, np.int32),
        "s": SCALE,
    }
    model = build(QDQ, **constants)
    for shapes in ({"x": (1, 3, 8, 8), "y": (1, 4, 6, 6)}, {"c": (1, 4, 6, 6)}):
        (cost,) = layer_costs(model, shapes)
        assert cost.macs == 4 * 6 * 6 * 27


def test_plain_types():
    cost = LayerCost("conv", "Conv", 18, 72, 450, (1, 2, 5, 5), 8, 8)
    assert json.loads(json.dumps(cost.to_dict())) == {
        "name": "conv",
        "op": "Conv",
        "parameters": 18,
        "nbytes": 72,
        "macs": 450,
        "output_shape": [1, 2, 5, 5],
        "weight_bits": 8,
        "activation_bits": 8,
        "bit_operations": 28800,
    }
    assert LayerCost("conv", "Conv", 18, 72, None, None).to_dict()["output_shape"] is None


# ------------------------------------------------------------------------------- shapes


class Said:
    """Progress that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


DYNAMIC = "(float[N,3,H,W] x) => (float[N,M] y) { c = Conv(x, w) f = Flatten(c) y = MatMul(f, v) }"


def test_dynamic_sizes_count_as_one_or_as_given():
    model = build(DYNAMIC, w=ones(4, 3, 1, 1), v=ones(4, 5))
    assert tensor_shapes(model)["c"] == (1, 4, 1, 1)
    model = build(DYNAMIC, w=ones(4, 3, 3, 3), v=ones(64, 5))
    for given_ in ({"x": (2, 3, 6, 6)}, {"x": [2, 3, 6, 6]}, {"x": ones(2, 3, 6, 6)}):
        shapes = tensor_shapes(model, given_)
        assert (shapes["x"], shapes["c"]) == ((2, 3, 6, 6), (2, 4, 4, 4))
        assert (shapes["f"], shapes["y"]) == ((2, 64), (2, 5))


def test_stale_shapes_are_not_believed():
    model = build(
        "(float[1,3,N,N] x) => (float[7] y) { c = Conv(x, w) y = Relu(c) }", w=ones(4, 3, 3, 3)
    )
    model.tensors()["c"].shape = (9, 9, 9, 9)
    assert tensor_shapes(model, {"x": (1, 3, 5, 5)})["c"] == (1, 4, 3, 3)


def test_reshapes_are_followed_and_weights_are_not_needed():
    model = build(
        """(float[N,4,8] x) => (float y) {
            s = Shape<start=0, end=1>(x)
            t = Concat<axis=0>(s, rest)
            r = Reshape(x, t)
            y = MatMul(r, w)
        }""",
        rest=np.array([-1], np.int64),
        w=ones(32, 100),
    )
    assert tensor_shapes(model, {"x": (2, 4, 8)})["r"] == (2, 32)


def test_without_shape_inference_the_model_runs(monkeypatch):
    def fails(*args, **kwargs):
        raise onnx.shape_inference.InferenceError

    monkeypatch.setattr("onnx.shape_inference.infer_shapes", fails)
    model = build(DYNAMIC, w=ones(4, 3, 3, 3), v=ones(64, 5))
    assert tensor_shapes(model, {"x": (2, 3, 6, 6)})["y"] == (2, 5)


# NonZero: no shape inference knows how many
COUNTED = """(float[N,4] x) => (float y) {
    i = NonZero(x) j = Transpose<perm=[1,0]>(i) f = Cast<to=1>(j) y = MatMul(f, w)
}"""


def test_what_inference_leaves_open_is_run():
    model = build(COUNTED, w=ones(2, 3))
    assert tensor_shapes(model)["y"] == (0, 3)  # zeros
    x = np.array([[0, 1, 2, 0], [0, 0, 0, 3]], np.float32)
    shapes = tensor_shapes(model, {"x": x})
    assert (shapes["f"], shapes["y"]) == ((3, 2), (3, 3))
    (cost,) = layer_costs(model, shapes, batch=1)
    assert cost.macs == 18


# row number sum(x) of the places where x is not 0: there is none on zeros
FAILING = """(float[N,4] x) => (float y) {
    i = NonZero(x) j = Transpose<perm=[1,0]>(i) f = Cast<to=1>(j)
    m = ReduceSum<keepdims=0>(x) k = Cast<to=7>(m) g = Gather(f, k)
    h = Add(f, g) y = MatMul(h, w)
}"""


def test_zeros_may_fail_and_a_feed_must_not():
    model = build(FAILING, w=ones(2, 3))
    said = Said()
    shapes = tensor_shapes(model, progress=said)
    assert (shapes["h"], shapes["y"], shapes["x"]) == (None, None, (1, 4))
    assert len(said.lines) == 1
    assert said.lines[0].startswith("the shapes of 2 tensors stay unknown: the model does not run")
    assert tensor_shapes(model) == shapes  # told to nobody
    (cost,) = layer_costs(model, shapes)
    assert (cost.macs, cost.parameters) == (None, 6)
    assert tensor_shapes(model, {"x": 0.1 * ones(1, 4)})["y"] == (4, 3)
    with pytest.raises(ModelError, match="the model failed"):
        tensor_shapes(model, {"x": ones(1, 4)})


def test_inputs_of_unknown_rank():
    model = build("(float[N] x) => (float y) { y = MatMul(x, w) }", w=ones(2, 3))
    model.graph.inputs[0].shape = None
    said = Said()
    assert tensor_shapes(model, progress=said) == {"x": None, "y": None}
    assert "no zeros can be made for input x" in said.lines[0]
    assert tensor_shapes(model, {"x": (5, 2)})["y"] == (5, 3)


@pytest.mark.parametrize(
    ("given_", "match"),
    [
        ({"z": (1,)}, "no input 'z'; inputs are x"),
        ({"x": (1, 3, 8)}, "input x: wanted N x 3 x H x W, got 1 x 3 x 8"),
        ({"x": (1, 4, 8, 8)}, "got 1 x 4 x 8 x 8"),
        ({"x": (1, 3, -1, 8)}, "got 1 x 3 x -1 x 8"),
        ({"x": ()}, "got a scalar"),
    ],
)
def test_given_shapes_must_fit(given_, match):
    model = build(DYNAMIC, w=ones(4, 3, 3, 3), v=ones(64, 5))
    with pytest.raises(ModelError, match=match):
        tensor_shapes(model, given_)


def test_a_feed_must_fit():
    model = build(COUNTED, w=ones(2, 3))
    with pytest.raises(CalibrationError, match="does not fit"):
        tensor_shapes(model, {"x": np.ones((2, 4))})


def test_operators_on_integers_cost_what_the_layers_do():
    body = (
        "xq = QuantizeLinear(x, xs, xz) q = QLinearConv(xq, xs, xz, w, ws, wz, ys, yz)"
        " d = DequantizeLinear(q, ys, yz) f = Flatten(d) fq = QuantizeLinear(f, xs, xz)"
        " a = QLinearMatMul(fq, xs, xz, m, wst, wzt, ys, yz)"
        " c = com.microsoft.MatMulIntegerToFloat(fq, m, xs, wst, xz, wzt)"
        " y = DequantizeLinear(a, ys, yz) z = Identity(c)"
    )
    made = qdq.build(body, "float[2,3,8,8] x", "float[] y, float[] z", m=qdq.integers(144, 5))
    found = {c.op: c for c in costs(load(made))}
    assert {op: c.macs for op, c in found.items()} == {
        "QLinearConv": 4 * 36 * 27,
        "QLinearMatMul": 144 * 5,
        "MatMulIntegerToFloat": 144 * 5,
    }
    assert {(c.weight_bits, c.activation_bits) for c in found.values()} == {(8, 8)}
    assert found["QLinearConv"].parameters == 4 * 27
