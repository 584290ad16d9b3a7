"""Calibrate, GPTQ and InsertQDQ on small graphs: what fuses in onnxruntime, and how exactly."""

import numpy as np
import onnx
import pytest

from onnxq.errors import CalibrationError, ModelError, RecipeError, TargetError
from onnxq.model import Model
from onnxq.pass_manager import PassManager
from onnxq.passes import GPTQ, BiasCorrection, Calibrate, Clean, FoldBatchNorm, InsertQDQ
from onnxq.runtime import Session
from tests import models

SHAPE = (1, 8, 12, 12)


def parse(text, *, opset=17, **arrays):
    """A model whose initializers are the given arrays."""
    kinds = {"float32": "float", "int64": "int64"}
    declared = [
        f"{kinds[a.dtype.name]}{list(a.shape) if a.ndim else ''} {name}"
        for name, a in arrays.items()
    ]
    text = text.replace(") {", f") <{', '.join(declared)}> {{", 1)
    return models.parse(text, opset=opset, **arrays)


def data(seed=0, count=8, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def graph(body, result="y"):
    return f"g (float[N,8,12,12] x) => (float[] {result}) {{ {body} }}"


def weights(**shapes):
    rng = np.random.default_rng(1)
    made = {}
    for name, shape in shapes.items():
        fan = max(1, int(np.prod(shape[1:])))
        made[name] = (rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32)
    return made


def quantized(proto, samples, **options):
    model, report = PassManager(
        Clean(), FoldBatchNorm(), Calibrate(**options), GPTQ(), InsertQDQ()
    )(proto, samples)
    return model, report


def fused(model, tmp_path, *, arm=False):
    """Operators of onnxruntime's optimized graph; as on Arm, where int8 stays int8."""
    path = tmp_path / "optimized.onnx"
    config = {"session.qdqisint8allowed": "1"} if arm else None
    Session(model.to_proto(), level="extended", optimized_path=path, config=config)
    return [n.op_type for n in onnx.load(path).graph.node]


def sqnr(reference, other):
    error = np.square(reference - other).sum()
    return 10 * np.log10(np.square(reference).sum() / max(error, 1e-20))


def assert_close(proto, model, samples, least=25.0):
    onnx.checker.check_model(model.to_proto(), full_check=False)
    float_session = Session(proto)
    plain = Session(model.to_proto(), level="disabled")
    best = Session(model.to_proto(), level="all")
    assert [o.name for o in best.outputs] == [o.name for o in float_session.outputs]
    for feed in samples[:3]:
        for name, value in float_session.run(feed).items():
            assert sqnr(value, best.run(feed)[name]) > least
            assert sqnr(plain.run(feed)[name], best.run(feed)[name]) > 30


PATTERNS = {
    "conv relu": (
        "a = Conv<pads=[1,1,1,1]>(x, w, b) y = Relu(a)",
        {"w": (8, 8, 3, 3), "b": (8,)},
        {"QLinearConv": 1},
    ),
    "depthwise": (
        "y = Conv<group=8, pads=[1,1,1,1]>(x, w)",
        {"w": (8, 1, 3, 3)},
        {"QLinearConv": 1},
    ),
    "grouped": ("y = Conv<group=2>(x, w)", {"w": (6, 4, 3, 3)}, {"QLinearConv": 1}),
    "residual": (
        "a = Conv<pads=[1,1,1,1]>(x, w) s = Add(a, x) r = Relu(s) y = Conv(r, v)",
        {"w": (8, 8, 3, 3), "v": (4, 8, 1, 1)},
        {"QLinearConv": 2, "QLinearAdd": 1},
    ),
    "concat with relu": (
        "a = Conv(x, w) r = Relu(a) b = Conv(x, v) c = Concat<axis=1>(r, b) y = Conv(c, u)",
        {"w": (4, 8, 1, 1), "v": (4, 8, 1, 1), "u": (4, 8, 1, 1)},
        {"QLinearConv": 3, "QLinearConcat": 1},
    ),
    "pool": (
        "a = Conv(x, w) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)"
        " p = AveragePool<kernel_shape=[2,2]>(m) y = Conv(p, v)",
        {"w": (8, 8, 1, 1), "v": (4, 8, 1, 1)},
        {"QLinearConv": 2, "MaxPool": 1, "QLinearAveragePool": 1},
    ),
    "head": (
        "a = Conv(x, w) p = GlobalAveragePool(a) f = Flatten(p) y = Gemm<transB=1>(f, v, b)",
        {"w": (8, 8, 1, 1), "v": (5, 8), "b": (5,)},
        {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    ),
    "matmul": ("y = MatMul(x, w)", {"w": (12, 7)}, {"MatMulIntegerToFloat": 1}),
    "attention": (
        "t = Transpose<perm=[0,1,3,2]>(x) y = MatMul(x, t)",
        {},
        {"MatMulIntegerToFloat": 1},
    ),
    "silu": (
        "a = Conv(x, w) s = Sigmoid(a) m = Mul(a, s) y = Conv(m, v)",
        {"w": (8, 8, 1, 1), "v": (4, 8, 1, 1)},
        {"QLinearConv": 2, "QLinearSigmoid": 1, "QLinearMul": 1},
    ),
    "tanh after": (
        "a = Conv(x, w) y = Tanh(a)",
        {"w": (8, 8, 1, 1)},
        {"QLinearConv": 1, "Tanh": 1},
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_patterns_fuse_and_stay_close(name, activations, tmp_path):
    body, shapes, wanted = PATTERNS[name]
    proto = parse(graph(body), opset=17, **weights(**shapes))
    samples = data()
    model, _ = quantized(proto, samples, activations=activations)
    found = fused(model, tmp_path, arm=activations == "int8")
    for op, count in wanted.items():
        assert found.count(op) == count, found
    assert_close(proto, model, samples)


@pytest.mark.parametrize("fmt", ["int8/tensor", "int8/channel", "uint8/tensor", "uint8/channel"])
def test_weight_formats(fmt, tmp_path):
    body, shapes, wanted = PATTERNS["conv relu"]
    proto = parse(graph(body), opset=17, **weights(**shapes))
    model, _ = quantized(proto, data(), weights=fmt)
    assert fused(model, tmp_path).count("QLinearConv") == wanted["QLinearConv"]
    assert_close(proto, model, data())


def test_clip_is_absorbed(tmp_path):
    limits = {"low": np.float32(0), "high": np.float32(6)}
    body = "a = Conv(x, w) c = Clip(a, low, high) y = Conv(c, v)"
    proto = parse(graph(body), opset=17, **weights(w=(8, 8, 1, 1), v=(4, 8, 1, 1)), **limits)
    model, _ = quantized(proto, [{"x": 8 * f["x"]} for f in data()])
    found = fused(model, tmp_path)
    assert found.count("QLinearConv") == 2
    assert "Clip" not in found


def test_result_that_is_also_an_output():
    body = "a = Conv(x, w) y = Conv(a, v)"
    text = f"g (float[N,8,12,12] x) => (float[] a, float[] y) {{ {body} }}"
    proto = parse(text, opset=17, **weights(w=(8, 8, 1, 1), v=(4, 8, 1, 1)))
    model, _ = quantized(proto, data())
    assert model.outputs == ["a", "y"]
    assert_close(proto, model, data())


def test_pad_runs_on_integers(tmp_path):
    body = "a = Conv(x, w) p = Pad(a, pads) y = Conv(p, v)"
    pads = np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)
    proto = parse(graph(body), opset=17, **weights(w=(8, 8, 1, 1), v=(4, 8, 3, 3)), pads=pads)
    model, _ = quantized(proto, data())
    assert fused(model, tmp_path).count("QLinearConv") == 2
    assert_close(proto, model, data())


def test_bias_scale_is_the_product():
    proto = parse(
        graph("a = Conv(x, w, b) r = Relu(a) y = Conv(r, v)"),
        opset=17,
        **weights(w=(8, 8, 1, 1), b=(8,), v=(4, 8, 1, 1)),
    )
    model, _ = quantized(proto, data())
    encodings = model.encodings
    product = encodings["x"].scale * encodings["w"].scale
    bias = next(n for n in model.graph.nodes if n.op == "Conv").inputs[2].inputs[0]
    assert np.array_equal(bias.inputs[1].values, product.astype(np.float32))
    assert bias.inputs[0].values.dtype == np.int32


def test_tiny_input_does_not_overflow_the_bias():
    proto = parse(graph("y = Conv(x, w, b)"), opset=17, **weights(w=(8, 8, 1, 1), b=(8,)))
    samples = [{"x": 1e-9 * f["x"]} for f in data()]
    model, _ = quantized(proto, samples)
    assert_close(proto, model, samples)


def test_bias_correction_restores_the_mean():
    proto = parse(graph("y = Conv(x, w)"), opset=17, **weights(w=(8, 8, 3, 3)))
    samples = [{"x": f["x"] + 3} for f in data()]
    errors = []
    for steps in ((), (BiasCorrection(),)):
        manager = PassManager(Calibrate(weights="int8/tensor"), *steps, InsertQDQ())
        model, _ = manager(proto, samples)
        shift = [
            Session(model.to_proto()).run(f)["y"] - Session(proto).run(f)["y"] for f in samples
        ]
        errors.append(np.abs(np.mean(shift, axis=(0, 1, 3, 4))).max())
    assert errors[1] < errors[0] / 2


def test_input_model_is_untouched_and_runs_repeat():
    body, shapes, _ = PATTERNS["residual"]
    proto = parse(graph(body), opset=17, **weights(**shapes))
    before = proto.SerializeToString()
    first, second = (quantized(proto, data())[0].to_proto() for _ in range(2))
    assert proto.SerializeToString() == before
    assert first.SerializeToString() == second.SerializeToString()


def test_exclude_by_name_and_type():
    body = "a = Conv(x, w) r = Relu(a) y = Conv(r, v)"
    proto = parse(graph(body), opset=17, **weights(w=(8, 8, 1, 1), v=(4, 8, 1, 1)))
    model, report = quantized(proto, data(), exclude=("Conv",))
    assert not any(n.op == "QuantizeLinear" for n in model.graph.nodes)
    assert {s.why for _, s in report.skipped} >= {"excluded"}
    with pytest.raises(RecipeError, match="matches no node"):
        quantized(proto, data(), exclude=("Covn",))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"weights": "int16/channel"}, "no integer kernels for int16"),
        ({"weights": "int8/block=32"}, "blocks"),
        ({"activations": "int16"}, "not int16"),
        ({"activations": "int8", "weights": "uint8"}, "no integer kernels"),
    ],
)
def test_formats_that_the_target_refuses(options, line):
    proto = parse(graph("y = Conv(x, w)"), opset=17, **weights(w=(8, 8, 1, 1)))
    with pytest.raises(TargetError, match=line):
        quantized(proto, data(), **options)


def test_values_that_are_not_finite():
    bad = np.full((8, 8, 1, 1), np.nan, np.float32)
    proto = parse(graph("y = Conv(x, w)"), opset=17, w=bad)
    with pytest.raises((ModelError, CalibrationError), match=r"NaN|finite"):
        quantized(proto, data())
    proto = parse(graph("l = Log(x) y = Conv(l, w)"), opset=17, **weights(w=(8, 8, 1, 1)))
    with pytest.raises(CalibrationError, match="l"):
        quantized(proto, data())


def test_nothing_to_quantize():
    proto = parse(graph("y = Tanh(x)"), opset=17)
    model, report = quantized(proto, data())
    assert [n.op for n in model.graph.nodes] == ["Tanh"]
    assert any("no operator" in s.why for _, s in report.skipped)


def test_managers_nest_and_hooks_see_every_pass():
    proto = parse(graph("y = Conv(x, w)"), opset=17, **weights(w=(8, 8, 1, 1)))
    seen = []
    inner = PassManager(Clean(), FoldBatchNorm())
    manager = PassManager(
        inner, Calibrate(), InsertQDQ(), after=lambda step, model, changes: seen.append(step.name)
    )
    model, report = manager(proto, data())
    assert isinstance(model, Model)
    assert seen == ["pass-manager", "calibrate", "insert-qdq"]
    assert [p.name for p in report.passes] == [
        "clean",
        "fold-batch-norm",
        "calibrate",
        "insert-qdq",
    ]
