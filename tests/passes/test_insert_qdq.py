"""Q/DQ as onnxruntime fuses it: the operators that it runs, and that every level agrees."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from onnx import numpy_helper

from onnxq.encoding import Encoding
from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Calibrate, Clean, FoldBatchNorm, InsertQDQ, insert_qdq
from onnxq.placement import place
from onnxq.runtime import Session
from onnxq.targets import TARGETS
from tests import models
from tests.checks import ops, reasons, run
from tests.models import parse

X = "g (float[N,4,8,8] x) => (float[] y)"
Q, DQ, CONV = "QuantizeLinear", "DequantizeLinear", "QLinearConv"
MATMUL, LAST_MATMUL = "QLinearMatMul", "MatMulIntegerToFloat"

# name -> text, constants, the operators of the graph that onnxruntime runs
PATTERNS = {
    "conv-relu": (
        f"{X} <float[4,4,3,3] w, float[4] b, float[5,4,3,3] v>"
        "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }",
        {},
        [Q, CONV, CONV, DQ],
    ),
    "conv-clip": (
        f"{X} <float[4,4,3,3] w, float lo, float hi, float[5,4,3,3] v>"
        "{ c = Conv(x, w) r = Clip(c, lo, hi) y = Conv(r, v) }",
        {"lo": 0.0, "hi": 6.0},
        [Q, CONV, CONV, DQ],
    ),
    "depthwise": (
        f"{X} <float[4,1,3,3] w, float[4] b, float[5,4,1,1] v>"
        "{ c = Conv<group=4, pads=[1,1,1,1]>(x, w, b) r = Relu(c) y = Conv(r, v) }",
        {},
        [Q, CONV, CONV, DQ],
    ),
    "conv-1d": (
        "g (float[N,3,32] x) => (float[] y) <float[4,3,3] w, float[4] b, float[5,4,3] v>"
        "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }",
        {},
        [Q, CONV, CONV, DQ],
    ),
    "grouped": (
        f"{X} <float[6,2,3,3] w, float[4,3,1,1] v>"
        "{ c = Conv<group=2>(x, w) r = Relu(c) y = Conv<group=2>(r, v) }",
        {},
        [Q, CONV, CONV, DQ],
    ),
    "conv-3d": (
        "g (float[N,2,6,6,6] x) => (float[] y)"
        "<float[4,2,3,3,3] w, float[4] b, float[5,4,1,1,1] v>"
        "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }",
        {},
        [Q, CONV, CONV, DQ],
    ),
    "residual": (
        f"{X} <float[4,4,1,1] a, float[4,4,3,3] w, float[4,4,1,1] v>"
        "{ i = Conv(x, a) c = Conv<pads=[1,1,1,1]>(i, w) s = Add(c, i) r = Relu(s)"
        " y = Conv(r, v) }",
        {},
        [Q, CONV, CONV, "QLinearAdd", CONV, DQ],
    ),
    "concat": (
        f"{X} <float[4,4,1,1] a, float[4,4,1,1] w, float[4,8,1,1] v>"
        "{ i = Conv(x, a) c = Conv(x, w) s = Concat<axis=1>(i, c) y = Conv(s, v) }",
        {},
        [Q, CONV, CONV, "QLinearConcat", CONV, DQ],
    ),
    "concat-relu": (
        f"{X} <float[4,4,1,1] a, float[4,4,1,1] w, float[4,8,1,1] v>"
        "{ i = Conv(x, a) k = Relu(i) c = Conv(x, w) s = Concat<axis=1>(k, c) y = Conv(s, v) }",
        {},
        [Q, CONV, CONV, "QLinearConcat", CONV, DQ],
    ),
    "max-pool": (
        f"{X} <float[4,4,3,3] w, float[5,4,3,3] v>"
        "{ c = Conv(x, w) r = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c) y = Conv(r, v) }",
        {},
        [Q, CONV, "MaxPool", CONV, DQ],
    ),
    "average-pool": (
        f"{X} <float[4,4,3,3] w, float[5,4,3,3] v>"
        "{ c = Conv(x, w) r = AveragePool<kernel_shape=[2,2], strides=[2,2]>(c) y = Conv(r, v) }",
        {},
        [Q, CONV, "QLinearAveragePool", CONV, DQ],
    ),
    "head": (
        f"{X} <float[4,4,3,3] w, float[4,5] v, float[5] b>"
        "{ c = Conv(x, w) r = Relu(c) p = GlobalAveragePool(r) f = Flatten(p) y = Gemm(f, v, b) }",
        {},
        [Q, CONV, "QLinearGlobalAveragePool", "Flatten", "QGemm"],
    ),
    "matmul-chain": (
        "g (float[N,8] x) => (float[] y) <float[8,12] w, float[12,6] v>"
        "{ m = MatMul(x, w) y = MatMul(m, v) }",
        {},
        [Q, MATMUL, LAST_MATMUL],
    ),
    "attention": (
        "g (float[N,6,8] x) => (float[] y) <float[8,8] w, float[8,8] v>"
        "{ q = MatMul(x, w) k = MatMul(x, v) t = Transpose<perm=[0,2,1]>(k) y = MatMul(q, t) }",
        {},
        [Q, MATMUL, MATMUL, "Transpose", LAST_MATMUL],
    ),
    "pad": (
        f"{X} <float[4,4,3,3] w, int64[8] p, float[5,4,3,3] v>"
        "{ c = Conv(x, w) r = Pad(c, p) y = Conv(r, v) }",
        {"p": [0, 0, 1, 2, 0, 0, 3, 0]},
        [Q, CONV, "Pad", CONV, DQ],
    ),
    "moves": (
        f"{X} <float[4,4,1,1] w, int64[3] s, float[64,6] v>"
        "{ c = Conv(x, w) r = Reshape(c, s) t = Transpose<perm=[1,0,2]>(r) y = MatMul(t, v) }",
        {"s": [0, 4, 64]},
        [Q, CONV, "Reshape", "Transpose", LAST_MATMUL],
    ),
    "relu-is-output": (
        "g (float[N,4,8,8] x) => (float[] r, float[] y) <float[4,4,3,3] w, float[5,4,3,3] v>"
        "{ c = Conv(x, w) r = Relu(c) y = Conv(r, v) }",
        {},
        [Q, CONV, CONV, DQ, DQ],
    ),
    "conv-is-output": (
        "g (float[N,4,8,8] x) => (float[] c, float[] y) <float[4,4,3,3] w, float[5,4,3,3] v>"
        "{ c = Conv(x, w) r = Relu(c) y = Conv(r, v) }",
        {},
        [Q, CONV, "Reshape", DQ, "Reshape", Q, CONV, DQ, DQ],
    ),
    "exit": (
        f"{X} <float[4,4,3,3] w, float[4] b> {{ c = Conv(x, w, b) y = Erf(c) }}",
        {},
        [Q, CONV, DQ, "Erf"],
    ),
    "exit-relu": (
        f"{X} <float[4,4,3,3] w, float[4] b> {{ c = Conv(x, w, b) r = Relu(c) y = Erf(r) }}",
        {},
        [Q, CONV, DQ, "Erf"],
    ),
    "silu": (
        f"{X} <float[4,4,3,3] w, float[4] b, float[5,4,3,3] v>"
        "{ c = Conv(x, w, b) s = Sigmoid(c) m = Mul(c, s) y = Conv(m, v) }",
        {},
        [Q, CONV, "QLinearSigmoid", "QLinearMul", CONV, DQ],
    ),
    "shared-weight": (
        f"{X} <float[4,4,3,3] w>{{ c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) y = Conv(r, w) }}",
        {},
        [Q, CONV, CONV, DQ],
    ),
    "shared-bias": (
        f"{X} <float[4,4,3,3] w, float[4] b, float[4,4,3,3] v>"
        "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v, b) }",
        {},
        [Q, CONV, CONV, DQ],
    ),
    "weight-read-both-ways": (
        "g (float[N,6] x) => (float[] y, float[] z) <float[6,6] w, float[6] b>"
        "{ y = Gemm(x, w, b) z = Gemm<transB=1>(x, w, b) }",
        {},
        [Q, "QGemm", "QGemm"],
    ),
    "weight-on-the-left": (
        "g (float[N,6,8] x) => (float[] y) <float[5,6] w, float[8,8] v>"
        "{ a = MatMul(x, v) y = MatMul(w, a) }",
        {},
        [Q, MATMUL, LAST_MATMUL],
    ),
    "weight-behind-moves": (
        "g (float[N,6] x) => (float[] y) <float[24] w, int64[2] s>"
        "{ r = Reshape(w, s) t = Transpose(r) y = MatMul(x, t) }",
        {"s": [4, 6]},
        [Q, LAST_MATMUL],
    ),
}


@pytest.fixture(autouse=True)
def few_values_are_enough(monkeypatch):
    """Small graphs give channels few values; believe their ranges all the same."""
    monkeypatch.setattr("onnxq.passes.calibrate.MANY_VALUES", 1)


def samples(proto, count=8):
    return [models.feeds(proto, seed=seed) for seed in range(count)]


def quantized(proto, data=None, **options):
    data = samples(proto) if data is None else data
    model, report = PassManager(Clean(), Calibrate(**options), InsertQDQ())(proto, data)
    return model.to_proto(), report


def sqnr(wanted, got):
    wanted, got = wanted.astype(np.float64), got.astype(np.float64)
    return 10 * np.log10(np.square(wanted).sum() / max(np.square(wanted - got).sum(), 1e-30))


def shapes(infos):
    return [
        (i.name, [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]) for i in infos
    ]


def assert_good(proto, after):
    """Valid, of the same signature, near float, and the same at each optimization level."""
    onnx.checker.check_model(after, full_check=True)
    assert shapes(after.graph.input) == shapes(proto.graph.input)
    assert shapes(after.graph.output) == shapes(proto.graph.output)
    for batch in (1, 3):
        feed = models.feeds(proto, seed=0, batch=batch)
        wanted = run(proto, feed)
        plain, fused = (run(after, feed, level) for level in ("disabled", "all"))
        for name, array in wanted.items():
            assert plain[name].shape == array.shape
            assert sqnr(plain[name], fused[name]) >= 30, name
            if batch == 1:  # the first half of a sample that the ranges were taken from
                continue
            assert sqnr(array, fused[name]) >= 20, name
    feed = models.feeds(proto, seed=0)
    for name, array in run(proto, feed).items():
        assert sqnr(array, run(after, feed, "all")[name]) >= 25, name


def fused_ops(proto, folder):
    path = folder / "optimized.onnx"
    Session(proto, level="extended", optimized_path=path, threads=1)
    return ops(onnx.load(path))


def with_values(proto, **values):
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            array = values[tensor.name].astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return proto


def tensors(proto):
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}


def node_of(proto, output):
    return next(n for n in proto.graph.node if output in n.output)


@pytest.mark.parametrize("name", PATTERNS)
def test_onnxruntime_runs_integers(name, tmp_path):
    text, constants, wanted = PATTERNS[name]
    proto = parse(text, **constants)
    after, _ = quantized(proto)
    assert_good(proto, after)
    assert fused_ops(after, tmp_path) == wanted


# Which of them onnxruntime fuses with int8 activations depends on the processor.
@pytest.mark.parametrize("name", PATTERNS)
def test_int8_activations(name):
    text, constants, _ = PATTERNS[name]
    proto = parse(text, **constants)
    after, _ = quantized(proto, activations="int8")
    assert_good(proto, after)
    for node in after.graph.node:
        if node.op_type == "QuantizeLinear":
            assert tensors(after)[node.input[2]].dtype == np.int8


@pytest.mark.parametrize("weights", ["int8/tensor", "uint8", "uint8/channel"])
@pytest.mark.parametrize("name", ["conv-relu", "depthwise", "head", "matmul-chain", "exit"])
def test_formats_of_weights(name, weights, tmp_path):
    text, constants, wanted = PATTERNS[name]
    proto = parse(text, **constants)
    after, _ = quantized(proto, weights=weights)
    assert_good(proto, after)
    assert fused_ops(after, tmp_path) == wanted
    kinds = {a.dtype for n, a in tensors(after).items() if n.endswith("_quantized") and a.ndim > 1}
    assert kinds == {np.dtype(weights.partition("/")[0])}


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8"])
@pytest.mark.parametrize("name", ["conv-relu", "head", "shared-bias", "depthwise", "exit"])
def test_the_scale_of_a_bias_is_exactly_the_product(name, weights):
    text, constants, _ = PATTERNS[name]
    after, _ = quantized(parse(text, **constants), weights=weights)
    values = tensors(after)
    checked = 0
    for node in after.graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            x, w, b = (node_of(after, name).input for name in node.input[:3])
            product = values[x[1]] * values[w[1]]
            assert product.dtype == np.float32
            np.testing.assert_array_equal(values[b[1]], product)
            assert values[b[0]].dtype == np.int32
            assert not values[b[2]].any()
            checked += 1
    assert checked


def test_a_bias_far_larger_than_its_layer_does_not_overflow():
    text = (
        "g (float[N,3,6,6] x) => (float[] y) <float[4,3,3,3] w, float[4] b> { y = Conv(x, w, b) }"
    )
    proto = parse(text, b=[1e3, -1e3, 5, 0])
    data = [{"x": feed["x"] * np.float32(1e-5)} for feed in samples(proto)]
    for weights in ("int8/channel", "int8/tensor"):
        after, _ = quantized(proto, data, weights=weights)
        wanted = run(proto, data[0])["y"]
        for level in ("disabled", "all"):
            got = run(after, data[0], level)["y"]
            np.testing.assert_allclose(got, wanted, atol=10)
            assert np.all(np.sign(got[:, 0]) == 1)
            assert np.all(np.sign(got[:, 1]) == -1)


def test_a_bias_before_an_integer_reader_does_not_overflow():
    text = f"{X} <float[4,4,3,3] w, float[4] b, float[4,4,1,1] v> {{ c = Conv(x, w, b) y = Conv(c, v) }}"  # noqa: E501
    proto = parse(text, b=[900, -1000, 800, 700])
    data = [{"x": feed["x"] * np.float32(1e-5)} for feed in samples(proto)]
    after, _ = quantized(proto, data)
    biases = [a for a in tensors(after).values() if a.dtype == np.int32]
    assert max(np.abs(b.astype(np.int64)).max() for b in biases) <= 2**30
    for level in ("disabled", "all"):
        assert sqnr(run(proto, data[0])["y"], run(after, data[0], level)["y"]) > 25


def test_results_of_convolutions_that_floats_read_have_a_scale_per_channel():
    text, constants, _ = PATTERNS["exit"]
    proto = parse(text, **constants)
    after, _ = quantized(proto)
    erf = next(n for n in after.graph.node if n.op_type == "Erf")
    leaving = node_of(after, erf.input[0])
    assert tensors(after)[leaving.input[1]].shape == (4,)
    arriving = node_of(after, leaving.input[0])
    assert tensors(after)[arriving.input[1]] == 1


GATED = (
    "g (float[N,4,{size}] x) => (float[] y) <float[4,4,{ones}] w, float[4] b, float[5,4,{ones}] v,"
    "float[4,{ones}] t> {{ c = Conv(x, w, b) s = Sigmoid(c) m = Mul(c, s) {more} y = Conv(m, v) }}"
)
SIZES = {"1-d": "32", "2-d": "8,8", "3-d": "6,6,6", "half-known": "8,W", "free": "H,W"}
SILU = ("Sigmoid", "Mul")


def gated(sizes, more=""):
    ones = ",".join("1" * (sizes.count(",") + 1))
    return parse(GATED.format(size=sizes, ones=ones, more=more), t=1.0)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_floats_between_integers_stand_between_reshapes(sizes, tmp_path, monkeypatch):
    proto = gated(sizes)
    after, _ = quantized(proto, exclude=SILU)
    assert_good(proto, after)
    shape = ["Shape"] * (sizes == "H,W")
    assert fused_ops(after, tmp_path) == [
        *(Q, CONV, *shape, "Reshape", DQ, "Reshape", "QuickGelu", Q, CONV, DQ)
    ]
    monkeypatch.setattr(insert_qdq, "ISLAND", frozenset())
    plain, _ = quantized(proto, exclude=SILU)
    assert "Reshape" not in ops(plain)
    for level in ("disabled", "all"):
        for feed in samples(proto):
            np.testing.assert_array_equal(
                run(after, feed, level)["y"], run(plain, feed, level)["y"]
            )


@pytest.mark.parametrize(
    "body",
    ["m = Sigmoid(c) y = Conv(m, v)", "m = Sigmoid(c) y = MatMul(m, u)",
     "m = LeakyRelu(c) k = Exp(c) y = Conv(m, v)"],
)  # fmt: skip
def test_a_function_in_float_never_meets_a_kernel_that_wants_one_scale(body):
    """onnxruntime makes DQ -> Sigmoid -> Q one lookup, whatever the scales of DQ are."""
    proto = parse(
        f"{X[:-1]}, float[] m, float[] {'k' if 'k =' in body else 'c'}) <float[4,4,1,1] w,"
        f"float[4,4,1,1] v, float[8,5] u> {{ c = Conv(x, w) {body} }}"
    )
    after, _ = quantized(proto, exclude=["Sigmoid" if "Sigmoid" in body else "LeakyRelu"])
    assert_good(proto, after)


STRAIGHT = {
    "an output": "g (float[N,4,8,8] x) => (float[] y) <float[4,4,1,1] w>"
    "{ c = Conv(x, w) y = Sigmoid(c) }",
    "a second source": f"{X} <float[4,4,1,1] w, float[4,4,1,1] u, float[4,4,1,1] v>"
    "{ c = Conv(x, w) d = Conv(x, u) m = Add(c, d) y = Conv(m, v) }",
    "what is no function": f"{X} <float[4,4,1,1] w, float[4,4,1,1] v>"
    "{ c = Conv(x, w) m = Softmax<axis=1>(c) y = Conv(m, v) }",
}


@pytest.mark.parametrize("name", STRAIGHT)
def test_elsewhere_channels_leave_the_integers_without_reshapes(name):
    proto = parse(STRAIGHT[name])
    found = {n.op_type for n in proto.graph.node}
    after, _ = quantized(proto, exclude=sorted({"Sigmoid", "Add", "Softmax"} & found))
    assert_good(proto, after)
    assert "Reshape" not in ops(after)
    assert any(node.op_type == DQ and node.attribute for node in after.graph.node)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_scales_that_even_out_a_gate_are_those_of_its_quantization(sizes, tmp_path, monkeypatch):
    ones = (4, *[1] * (sizes.count(",") + 1))
    proto = gated(sizes, "e = Mul(m, t)")
    proto.graph.node[-1].input[0] = "e"
    proto = with_values(proto, t=np.reshape([1, 0.5, 8, 2], ones))
    after, _ = quantized(proto)
    assert_good(proto, after)
    assert ops(after).count("Mul") == 1
    finer = next(n for n in after.graph.node if n.op_type == Q and n.attribute)
    scale = tensors(after)[finer.input[1]]
    np.testing.assert_array_equal(scale[0] / scale, [1, 0.5, 8, 2])
    assert "QuickGelu" in fused_ops(after, tmp_path)
    monkeypatch.setattr(insert_qdq, "gate_scales", lambda model, node: None)
    plain, _ = quantized(proto)
    assert ops(plain).count("Mul") == 2
    for level in ("disabled", "all"):
        for feed in samples(proto):
            np.testing.assert_array_equal(
                run(after, feed, level)["y"], run(plain, feed, level)["y"]
            )


def test_a_float_reader_of_an_evened_gate_keeps_the_product():
    text = (
        f"{X} <float[4,4,1,1] w, float[4,4,1,1] v, float[4,1,1] t> {{ c = Conv(x, w)"
        " s = Sigmoid(c) m = Mul(c, s) e = Mul(m, t) d = Conv(e, v) f = Erf(e) y = Add(d, f) }"
    )
    proto = parse(text, t=np.reshape([1, 0.5, 8, 2], (4, 1, 1)))
    after, _ = quantized(proto)
    assert_good(proto, after)
    assert ops(after).count("Mul") == 2


def test_a_float_join_takes_only_what_is_on_its_own_grid():
    """A part that is dequantized by another scale is quantized again."""
    text = (
        f"{X} <float[5,8,1,1] w, float s, float u, uint8 z> {{ q = QuantizeLinear(x, s, z)"
        " d = DequantizeLinear(q, GRID, z) r = Sub(x, d) e = Erf(r) j = Concat<axis=1>(d, e)"
        " y = Conv(j, w) }"
    )
    for grid, op in (("s", "Concat"), ("u", Q)):
        proto = parse(text.replace("GRID", grid), s=0.05, u=0.02, z=128)
        model = load(proto)
        Calibrate(method="minmax", exclude=("Concat",)).apply(model, Context(samples(proto)))
        scale, zero = np.float32(0.05), np.int32(128)
        model.encodings.replace({**model.encodings, "j": Encoding("uint8", scale, zero)})
        floats = model.to_proto(["j"])
        wanted = [model.encodings["j"].quantize(run(floats, feed)["j"]) for feed in samples(proto)]
        InsertQDQ().apply(model, Context())
        (conv,) = (n for n in model.graph.nodes if n.op == "Conv")
        integers = conv.inputs[0].inputs[0].inputs[0]
        assert integers.inputs[0].op == op
        exposed = model.to_proto([integers.name])
        for feed, array in zip(samples(proto), wanted, strict=True):
            np.testing.assert_array_equal(run(exposed, feed)[integers.name], array)


def test_channels_of_very_different_sizes_keep_their_precision_at_an_exit():
    text = (
        "g (float[N,3,6,6] x) => (float[] y) <float[4,3,3,3] w, float[4] b> { y = Conv(x, w, b) }"
    )
    w = np.random.default_rng(0).normal(size=(4, 3, 3, 3))
    proto = parse(text, w=w * np.array([1, 1e-2, 1e-4, 0])[:, None, None, None], b=[0, 0, 0, 0.5])
    after, _ = quantized(proto)
    feed = samples(proto)[0]
    wanted, got = run(proto, feed)["y"], run(after, feed, "all")["y"]
    for channel in range(4):
        assert sqnr(wanted[:, channel], got[:, channel]) > 30, channel


def test_inputs_of_a_concat_share_their_parameters():
    text, constants, _ = PATTERNS["concat"]
    after, _ = quantized(parse(text, **constants))
    concat = next(n for n in after.graph.node if n.op_type == "Concat")
    reader = next(n for n in after.graph.node if concat.output[0] in n.input)
    values = tensors(after)
    grids = [node_of(after, name).input for name in concat.input]
    scales = {float(values[i[1]]) for i in grids} | {float(values[reader.input[1]])}
    zeros = {int(values[i[2]]) for i in grids} | {int(values[reader.input[2]])}
    assert len(scales) == len(zeros) == 1


def test_a_relu_before_a_concat_keeps_its_own_range():
    text, constants, _ = PATTERNS["concat-relu"]
    after, _ = quantized(parse(text, **constants))
    concat = next(n for n in after.graph.node if n.op_type == "Concat")
    values = tensors(after)
    zeros = [int(values[node_of(after, name).input[2]]) for name in concat.input]
    assert zeros[0] == 0
    assert zeros[1] > 0


def test_pad_is_written_on_integers_and_pads_with_the_zero_point():
    text, constants, _ = PATTERNS["pad"]
    after, _ = quantized(parse(text, **constants))
    pad = next(n for n in after.graph.node if n.op_type == "Pad")
    assert node_of(after, pad.input[0]).op_type == "QuantizeLinear"
    reader = next(n for n in after.graph.node if pad.output[0] in n.input)
    assert reader.op_type == "DequantizeLinear"
    values = tensors(after)
    assert values[pad.input[2]] == values[reader.input[2]]
    assert values[pad.input[2]].dtype == np.uint8


def test_a_pad_that_is_an_output_keeps_its_name():
    text = (
        "g (float[N,4,8,8] x) => (float[] r, float[] y) <float[4,4,3,3] w, int64[8] p,"
        "float[5,4,3,3] v> { c = Conv(x, w) r = Pad(c, p) y = Conv(r, v) }"
    )
    proto = parse(text, p=[0, 0, 1, 1, 0, 0, 1, 1])
    assert_good(proto, quantized(proto)[0])


def test_nothing_to_quantize_is_said_and_nothing_is_changed():
    proto = parse("g (float[N,6] x) => (float[] y) { a = Erf(x) y = Sin(a) }")
    model = load(proto)
    model.infer()
    before = model.to_proto().SerializeToString(deterministic=True)
    ctx = Context(samples(proto))
    Calibrate().apply(model, ctx)
    changes = InsertQDQ().apply(model, ctx)
    assert not changes
    assert [s.layer for s in changes.skipped] == ["model"]
    assert model.to_proto().SerializeToString(deterministic=True) == before


def test_a_subgraph_keeps_reading_what_it_reads():
    text = (
        "g (float[N,4,8,8] x, bool k) => (float[] y, float[] z) <float[4,4,3,3] w, float[4,4,1,1] v> {"  # noqa: E501
        " c = Conv(x, w) r = Relu(c) y = Conv(r, v)"
        " z = If(k) <then_branch = t () => (float[N,4,6,6] a) { a = Neg(r) },"
        " else_branch = e () => (float[N,4,6,6] b) { b = Abs(c) }> }"
    )
    proto = parse(text)
    data = [{**f, "k": np.array(i % 2 == 0)} for i, f in enumerate(samples(proto))]
    after, _ = quantized(proto, data)
    onnx.checker.check_model(after, full_check=True)
    assert ops(after).count("QuantizeLinear") >= 2
    for feed in data[:2]:
        wanted = run(proto, feed)
        for level in ("disabled", "all"):
            got = run(after, feed, level)
            assert min(sqnr(wanted[n], got[n]) for n in wanted) >= 25


def test_encodings_set_by_hand_are_written_as_they_are():
    text, constants, _ = PATTERNS["conv-relu"]
    proto = parse(text, **constants)
    model, ctx = load(proto), Context(samples(proto))
    Calibrate().apply(model, ctx)
    model.encodings["x"] = Encoding.of_range(-7, 9, "uint8")
    InsertQDQ().apply(model, ctx)
    after = model.to_proto()
    first = next(n for n in after.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "x")
    assert tensors(after)[first.input[1]] == np.float32(16 / 255)
    assert tensors(after)[first.input[2]] == 112


def test_without_encodings_nothing_is_written():
    text, constants, _ = PATTERNS["conv-relu"]
    model = load(parse(text, **constants))
    changes = InsertQDQ().apply(model, Context())
    assert not changes
    assert "model" in reasons(changes)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 21])
def test_operator_sets(opset):
    text, constants, _ = PATTERNS["residual"]
    proto = parse(text, opset=opset, **constants)
    after, _ = quantized(proto)
    assert after.opset_import[0].version == max(opset, 13)
    assert_good(proto, after)


def test_names_that_are_taken_already():
    text = (
        "g (float[N,4,8,8] x, float[N,4,8,8] x_scale) => (float[] y) <float[4,4,3,3] w,"
        "float[4,4,3,3] w_quantized> { a = Conv(x, w) c = Conv(x_scale, w_quantized) y = Add(a, c) }"  # noqa: E501
    )
    proto = parse(text)
    assert_good(proto, quantized(proto)[0])


def test_constants_of_zeros():
    text, _, _ = PATTERNS["conv-relu"]
    proto = parse(text, w=np.zeros((4, 4, 3, 3)))
    after, _ = quantized(proto)
    feed = samples(proto)[0]
    wanted = run(proto, feed)["y"]
    for level in ("disabled", "all"):
        assert sqnr(wanted, run(after, feed, level)["y"]) >= 30


# ------------------------------------------------------------------ weights, wherever they stand


# name -> text, the product of x and the weight as it stands when calibrated
SIDES = {
    "gemm": (
        "g (float[N,6] x) => (float[] y) <float[6,5] w, float[5] b> { y = Gemm(x, w, b) }",
        lambda x, w: x @ w,
    ),
    "gemm, weight transposed": (
        "g (float[N,6] x) => (float[] y) <float[5,6] w, float[5] b>{ y = Gemm<transB=1>(x, w, b) }",
        lambda x, w: x @ w.T,
    ),
    "gemm, both transposed": (
        "g (float[6,N] x) => (float[] y) <float[5,6] w, float[5] b>"
        "{ y = Gemm<transA=1, transB=1>(x, w, b) }",
        lambda x, w: x.T @ w.T,
    ),
    "gemm with factors": (
        "g (float[N,6] x) => (float[] y) <float[6,5] w, float[1,5] b>"
        "{ y = Gemm<alpha=0.5, beta=2.0>(x, w, b) }",
        lambda x, w: x @ w,
    ),
    "matmul": (
        "g (float[N,6] x) => (float[] y) <float[6,5] w> { y = MatMul(x, w) }",
        lambda x, w: x @ w,
    ),
    "matmul of stacks": (
        "g (float[N,3,6] x) => (float[] y) <float[6,5] w> { y = MatMul(x, w) }",
        lambda x, w: x @ w,
    ),
    "matmul by a stack": (
        "g (float[2,3,6] x) => (float[] y) <float[2,6,5] w> { y = MatMul(x, w) }",
        lambda x, w: x @ w,
    ),
    "matmul by a vector": (
        "g (float[N,3,6] x) => (float[] y) <float[6] w> { y = MatMul(x, w) }",
        lambda x, w: x @ w,
    ),
    "matmul, weight on the left": (
        "g (float[N,6,3] x) => (float[] y) <float[5,6] w> { y = MatMul(w, x) }",
        lambda x, w: w @ x,
    ),
    "matmul, vector on the left": (
        "g (float[6,3] x) => (float[] y) <float[6] w> { y = MatMul(w, x) }",
        lambda x, w: w @ x,
    ),
    "a weight reshaped": (
        "g (float[N,6] x) => (float[] y) <float[30] w, int64[2] s>"
        "{ r = Reshape(w, s) y = MatMul(x, r) }",
        lambda x, w: x @ w,
    ),
    "a weight transposed": (
        "g (float[N,6] x) => (float[] y) <float[5,6] w, float[5] b>"
        "{ t = Transpose(w) y = Gemm(x, t, b) }",
        lambda x, w: x @ w,
    ),
    "a weight computed from constants": (
        "g (float[N,6] x) => (float[] y) <float[5,6] w, float k, float[5] b>"
        "{ m = Mul(w, k) t = Transpose<perm=[1,0]>(m) i = Identity(t) y = Gemm(x, i, b) }",
        lambda x, w: x @ w,
    ),
}


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor", "uint8"])
@pytest.mark.parametrize("name", SIDES)
def test_onnxruntime_multiplies_what_the_encodings_say(name, weights, tmp_path):
    text, product = SIDES[name]
    proto = parse(text, **({"s": [6, 5]} if "int64[2] s" in text else {}))
    data = samples(proto)
    model, _ = PassManager(Clean(), Calibrate(weights=weights))(proto, data)
    (layer,) = model.layers()
    assert len(model.graph.nodes) == 1
    of_x, of_w = model.encodings["x"], model.encodings[layer.weight_tensor.name]
    wanted = product(
        of_x.fake_quantize(data[0]["x"]).astype(np.float64),
        of_w.fake_quantize(layer.weight).astype(np.float64),
    )
    if layer.bias is not None:
        step = of_x.scale.astype(np.float64) * of_w.scale
        wanted += np.rint(layer.bias / step) * step
    InsertQDQ().apply(model, Context())
    for level in ("disabled", "all"):
        got = run(model, data[0], level)["y"]
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    assert {"QGemm", LAST_MATMUL} & set(fused_ops(model.to_proto(), tmp_path))
    exact = run(proto, data[0])["y"]
    assert np.abs(exact - wanted).max() < 0.03 * np.abs(exact).max()


def test_a_shared_weight_is_written_once():
    text = (
        "g (float[N,4,8,8] x) => (float[] y, float[] z) <float[4,4,1,1] w, float[4] b>"
        "{ a = Conv(x, w) r = Relu(a) c = Conv(r, w, b) q = Relu(c) y = Conv(q, w)"
        " z = ConvTranspose(x, w) }"
    )
    proto = parse(text)
    after, _ = quantized(proto, weights="int8/tensor")
    names = [n for n, a in tensors(after).items() if a.dtype == np.int8 and a.ndim == 4]
    assert len(names) == 2  # of the two inner layers, and of the one that is left with scales
    assert "w" in tensors(after)  # what stays in float reads floats
    assert_good(proto, after)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_transposed_convolutions_stay_in_float_and_it_is_said(group, tmp_path):
    text = (
        f"{X} <float[4,4,1,1] w, float[4,2,2,2] t, float[{2 * group},{2 * group},1,1] v>"
        f"{{ c = Conv(x, w) r = Relu(c) d = ConvTranspose<group={group}, strides=[2,2]>(r, t)"
        f" y = Conv(d, v) }}"
    )
    proto = parse(text)
    proto.graph.node[2].name = "up"
    after, report = quantized(proto)
    assert ("up", "ort-cpu has no integer ConvTranspose") in [
        (skip.layer, skip.why) for _, skip in report.skipped
    ]
    np.testing.assert_array_equal(tensors(after)[node_of(after, "d").input[1]], tensors(proto)["t"])
    assert_good(proto, after)
    assert fused_ops(after, tmp_path) == [Q, CONV, DQ, "ConvTranspose", Q, CONV, DQ]


# ------------------------------------------------------------------ activations in between


@pytest.mark.parametrize(
    ("low", "high"), [("lo", "hi"), ("lo", "z"), ("z", "hi")], ids=["shifted", "upper", "lower"]
)
@pytest.mark.parametrize("after_it", ["y = Erf(r)", "y = Conv(r, v)", "y = Identity(r)"])
def test_a_clip_that_is_not_taken_over_gets_exact_floats(low, high, after_it):
    """Its input leaves the integers with a scale per channel."""
    text = (
        "g (float[N,4,8,8] x, float[1] u) => (float[] y) <float[4,4,3,3] w, int64[0] s, float lo,"
        "float hi, float[4,4,1,1] v>"
        f"{{ z = Reshape(u, s) c = Conv(x, w) r = Clip(c, {low}, {high}) {after_it} }}"
    )
    proto = parse(text, lo=0.5, hi=6.0, s=[])
    data = [{**f, "u": np.float32([3.0])} for f in samples(proto)]
    if low == "z":
        data = [{**f, "u": np.float32([-3.0])} for f in data]
    after, _ = quantized(proto, data)
    wanted = run(proto, data[0])["y"]
    for level in ("disabled", "all"):
        assert sqnr(wanted, run(after, data[0], level)["y"]) >= 28


def test_an_excluded_relu_runs_in_float(tmp_path):
    text, constants, _ = PATTERNS["conv-relu"]
    proto = parse(text, **constants)
    after, _ = quantized(proto, exclude=("Relu",))
    assert_good(proto, after)
    relu = next(n for n in after.graph.node if n.op_type == "Relu")
    back = node_of(after, relu.input[0])
    assert [back.op_type, node_of(after, back.input[0]).op_type] == ["Reshape", DQ]


def test_a_branch_reads_what_its_activation_would_have_taken():
    """The only reader of a convolution is a Relu inside of a subgraph."""
    text = (
        "g (float[N,4,8,8] x, bool k) => (float[] y, float[] z)"
        "<float[4,4,1,1] w, float[4,4,1,1] v> { c = Conv(x, w) y = Conv(x, v)"
        " z = If(k) <then_branch = t () => (float[N,4,8,8] a) { a = Relu(c) },"
        " else_branch = e () => (float[N,4,8,8] b) { b = Neg(x) }> }"
    )
    proto = parse(text)
    data = [{**f, "k": np.array(i % 2 == 0)} for i, f in enumerate(samples(proto))]
    after, _ = quantized(proto, data)
    onnx.checker.check_model(after, full_check=True)
    for feed in data[:2]:
        wanted = run(proto, feed)
        for level in ("disabled", "all"):
            got = run(after, feed, level)
            assert min(sqnr(wanted[n], got[n]) for n in wanted) >= 25


def test_a_concat_with_a_large_constant_keeps_it():
    text = (
        f"{X} <float[4,4,1,1] w, float[1,4,1,1] k, int64[4] r, float[4,8,1,1] v>"
        "{ c = Conv(x, w) e = Expand(k, r) s = Concat<axis=1>(c, e) y = Conv(s, v) }"
    )
    proto = parse(
        text.replace("[N,", "[2,"), k=50 * np.arange(4).reshape(1, 4, 1, 1), r=[2, 4, 8, 8]
    )
    after, _ = quantized(proto)
    feed = samples(proto)[0]
    wanted = run(proto, feed)["y"]
    for level in ("disabled", "all"):
        assert sqnr(wanted, run(after, feed, level)["y"]) >= 30


@pytest.mark.parametrize("shape", ["[2,5]", "[2,1]"])
def test_a_bias_that_differs_from_row_to_row_leaves_its_gemm_in_float(shape):
    text = f"g (float[2,6] x) => (float[] y) <float[6,5] w, float{shape} b> {{ y = Gemm(x, w, b) }}"
    proto = parse(text)
    after, report = quantized(proto)
    assert ops(after) == ["Gemm"]
    assert any("one value per output channel" in skip.why for _, skip in report.skipped)
    feed = samples(proto)[0]
    np.testing.assert_array_equal(run(after, feed)["y"], run(proto, feed)["y"])


# ------------------------------------------------------------------ any network


def data_of(node):
    """The inputs of a node that carry values, as ONNX counts them."""
    layers = ("Conv", "Gemm", "MatMul")
    several = (*layers, "Add", "Mul", "Concat")
    inputs = list(node.input) if node.op_type in several else list(node.input[:1])
    return inputs[:2] if node.op_type in layers else inputs


def assert_placed(graph, kernels):
    """Placed nodes stand between DequantizeLinear and QuantizeLinear, and nobody else does."""
    made = {name: node for node in graph.node for name in node.output}
    readers = {name: [n for n in graph.node if name in n.input] for name in made}
    nodes = {node.name: node for node in graph.node}
    for name, kernel in kernels.items():
        node = nodes[name]
        for source in data_of(node):
            assert made[source].op_type in ({Q, "Pad"} if node.op_type == "Pad" else {DQ}), name
        for result in node.output:
            after = readers[result]
            if len(after) == 1 and after[0].op_type in ("Relu", "Clip"):
                after = readers[after[0].output[0]]
            wanted = {DQ, "Pad"} if node.op_type == "Pad" else {Q}
            assert kernel.float_output or {n.op_type for n in after} <= wanted, name
    for node in graph.node:
        if node.op_type != Q:
            continue
        source = made.get(node.input[0])
        if source is not None and source.op_type in ("Relu", "Clip"):
            source = made.get(source.input[0], source)
        if source is None or source.name not in kernels:  # floats before it: integers after it
            for leaving in readers[node.output[0]]:
                assert leaving.name in kernels or all(
                    reader.name in kernels for reader in readers[leaving.output[0]]
                )


@settings(max_examples=60)
@given(models.networks())
def test_networks_run_in_integers_where_they_are_placed(tmp_path_factory, proto):
    data = samples(proto, 4)
    ready, _ = PassManager(Clean(), FoldBatchNorm())(proto, data)
    kernels = place(ready.clone(), TARGETS["ort-cpu"]).nodes
    model, _ = PassManager(Calibrate(), InsertQDQ())(ready, data)
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert_placed(after.graph, kernels)
    found = fused_ops(after, tmp_path_factory.mktemp("fused"))
    layers = [n.op_type for n in after.graph.node if n.name in kernels]
    assert found.count("QLinearConv") == layers.count("Conv")
    assert found.count("QGemm") == layers.count("Gemm")
    assert found.count(MATMUL) + found.count(LAST_MATMUL) == layers.count("MatMul")
    wanted, plain, fused = (
        run(m, data[0], level)
        for m, level in ((proto, "disabled"), (after, "disabled"), (after, "all"))
    )
    for name, array in wanted.items():
        step = max(np.ptp(array), np.abs(array).max(), 1e-3) / 255
        assert np.abs(plain[name] - fused[name]).max() <= 2 * step
        assert np.abs(plain[name] - array).mean() <= 20 * step
