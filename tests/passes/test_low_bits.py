"""Weights of 4 bits and fewer: packed in the file, integers in onnxruntime; weights alone."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import onnxq
from onnxq import api, encodings_json
from onnxq.analysis.fusion import integer_share
from onnxq.analysis.storage import storage
from onnxq.encoding import Encoding
from onnxq.errors import ModelError, RecipeError, TargetError
from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import GPTQ, Calibrate, Clean, InsertQDQ, LoadEncodings
from onnxq.targets import TARGETS
from tests import models
from tests.checks import LEVELS, ops, reasons, run
from tests.models import parse
from tests.passes.test_insert_qdq import PATTERNS, fused_ops, samples, sqnr

CPU = TARGETS["ort-cpu"]
CONVS = (
    "g (float[N,4,8,8] x) => (float[] y) <float[4,4,3,3] w, float[4] b, float[5,4,3,3] v>"
    "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }"
)
MATRIX = "g (float[N,64] x) => (float[] y) <float[64,48] w> { y = MatMul(x, w) }"


@pytest.fixture(autouse=True)
def few_values_are_enough(monkeypatch):
    monkeypatch.setattr("onnxq.passes.calibrate.MANY_VALUES", 1)


def quantized(proto, *, stored=None, passes=(), target=CPU, **options):
    steps = (Clean(), Calibrate(**options), *passes, InsertQDQ(stored=stored))
    model, report = PassManager(*steps)(proto, samples(proto), target=target)
    return model.to_proto(), report


def alone(proto, weights="int4/block=16", *, stored=None, **options):
    """The model with nothing but weights in integers, and what Calibrate and InsertQDQ said."""
    model, ctx = load(proto), Context()
    found = Calibrate(weights=weights, activations="float", **options).apply(model, ctx)
    found.extend(InsertQDQ(stored=stored).apply(model, ctx))
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    return after, found


def stored_weights(proto):
    """Integers of weights by name."""
    return {
        t.name: t
        for t in proto.graph.initializer
        if t.name.endswith("_quantized") and len(t.dims) > 1
    }


def said(report):
    return [line for p in report.passes for line in p.changes.done]


# ------------------------------------------------------------------------------- in integers


@pytest.mark.parametrize(
    "weights", ["int4/channel", "int4/tensor", "int3/channel", "int2/channel", "int2/tensor"]
)
@pytest.mark.parametrize("name", PATTERNS)
def test_onnxruntime_runs_integers(name, weights, tmp_path):
    text, constants, wanted = PATTERNS[name]
    proto = parse(text, **constants)
    after, _ = quantized(proto, weights=weights)
    onnx.checker.check_model(after, full_check=True)
    assert fused_ops(after, tmp_path) == wanted
    for batch in (1, 3):
        feed = models.feeds(proto, seed=0, batch=batch)
        plain = run(after, feed)
        for level in LEVELS:
            for key, array in run(after, feed, level).items():
                assert sqnr(plain[key], array) >= 25, (level, key)


@pytest.mark.parametrize("weights", ["int4/channel", "uint4/channel"])
@pytest.mark.parametrize("name", ["conv-relu", "depthwise", "grouped", "head", "matmul-chain"])
def test_the_integers_are_those_of_the_grid(name, weights):
    text, constants, _ = PATTERNS[name]
    proto = parse(text, **constants)
    model, ctx = load(proto), Context(samples(proto))
    Calibrate(weights=weights).apply(model, ctx)
    wanted = {
        f"{layer.weight_tensor.name}_quantized": layer.weight_encoding.quantize(layer.weight)
        for layer in model.layers()
    }
    InsertQDQ().apply(model, ctx)
    after = stored_weights(model.to_proto())
    kind = TensorProto.INT4 if weights.startswith("int") else TensorProto.UINT4
    assert {t.data_type for t in after.values()} == {kind}
    for tensor in after.values():
        name = next(n for n in wanted if tensor.name in (n, n.replace("_q", "_Conv_2_q")))
        np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(int), wanted[name])
        assert len(tensor.raw_data) == (wanted[name].size + 1) // 2


@pytest.mark.parametrize(("weights", "least"), [("int4/channel", 15), ("int3/channel", 8)])
def test_the_result_is_near_that_of_float(weights, least):
    proto = parse(CONVS)
    after, _ = quantized(proto, weights=weights)
    feed = models.feeds(proto, seed=0)
    assert sqnr(run(proto, feed)["y"], run(after, feed, "all")["y"]) >= least


def test_before_and_after():
    proto = parse("g (float[N,4] x) => (float[] y) <float[4,3] w> { y = MatMul(x, w) }")
    after, _ = quantized(proto, weights="int4/channel")
    names = [(n.op_type, list(n.input), list(n.output)) for n in after.graph.node]
    q, dq, w = "x_QuantizeLinear_Output", "x_DequantizeLinear_Output", "w_DequantizeLinear_Output"
    assert names == [
        ("QuantizeLinear", ["x", "x_scale", "x_zero_point"], [q]),
        ("DequantizeLinear", [q, "x_scale", "x_zero_point"], [dq]),
        ("Cast", ["w_quantized"], ["w_unpacked"]),
        ("DequantizeLinear", ["w_unpacked", "w_scale", "w_zero_point"], [w]),
        ("MatMul", [dq, w], ["y"]),
    ]


def test_gptq_takes_low_bits():
    proto = parse(CONVS)
    nearest, _ = quantized(proto, weights="int3/channel")
    after, report = quantized(proto, weights="int3/channel", passes=(GPTQ(),))
    assert any("rounded by output error" in line for line in said(report))
    for tensor in stored_weights(after).values():
        values = numpy_helper.to_array(tensor).astype(int)
        assert values.min() >= -4
        assert values.max() <= 3
    errors = []
    for model in (nearest, after):
        pairs = [(run(proto, f)["y"], run(model, f, "all")["y"]) for f in samples(proto)]
        errors.append(sum(np.square(a - b).sum() for a, b in pairs))
    assert errors[1] < errors[0]


# ------------------------------------------------------------------------------- carriers


def test_a_byte_each_where_that_is_asked_for(tmp_path):
    proto = parse(CONVS)
    packed, _ = quantized(proto, weights="int4/channel")
    plain, report = quantized(proto, weights="int4/channel", stored="int8")
    assert "Cast" not in ops(plain)
    assert plain.opset_import[0].version == 17
    assert {t.data_type for t in stored_weights(plain).values()} == {TensorProto.INT8}
    assert not any("take a byte" in s.why for _, s in report.skipped)
    feed = models.feeds(proto, seed=0)
    for level in LEVELS:
        np.testing.assert_array_equal(run(packed, feed, level)["y"], run(plain, feed, level)["y"])
    assert fused_ops(plain, tmp_path) == fused_ops(packed, tmp_path)


def test_the_target_decides():
    bytes_ = type(CPU)(**{**vars(CPU), "stored": "int8"})
    after, _ = quantized(parse(CONVS), weights="int4/channel", target=bytes_)
    assert "Cast" not in ops(after)
    after, _ = quantized(parse(CONVS), weights="int4/channel", target=bytes_, stored="packed")
    assert ops(after).count("Cast") == 2


GROUP_NORM = (
    "g (float[N,4,8,8] x) => (float[] y) <float[4,4,1,1] w, float[2] s, float[2] b>"
    "{ c = Conv(x, w) y = GroupNormalization<num_groups=2>(c, s, b) }"
)


def test_a_byte_each_where_the_operator_set_cannot_be_raised():
    proto = parse(GROUP_NORM, opset=18)
    after, report = quantized(proto, weights="int4/channel")
    assert after.opset_import[0].version == 18
    assert {t.data_type for t in stored_weights(after).values()} == {TensorProto.INT8}
    why = [s.why for p, s in report.skipped if p == "insert-qdq"]
    assert len(why) == 1
    assert why[0].startswith("its weights take a byte each: cannot convert operator set 18 to 21")
    feed = models.feeds(proto, seed=0)
    assert sqnr(run(proto, feed)["y"], run(after, feed, "all")["y"]) > 10
    with pytest.raises(ModelError, match="would need its scales per channel"):
        quantized(proto, weights="int4/channel", stored="packed")


def test_int8_weights_leave_the_operator_set():
    after, _ = quantized(parse(CONVS), weights="int8/channel", stored="packed")
    assert after.opset_import[0].version == 17


def test_an_unknown_carrier_is_refused_in_recipes():
    with pytest.raises(RecipeError, match="wanted one of packed, int8 or none"):
        api.recipe.loads('[[pass]]\nname = "insert-qdq"\nstored = "nibbles"')


# ------------------------------------------------------------------------------- weights alone

# what comes after x and before y -> whether its weight has to be turned
FUSED = {
    "matmul": ("<float[64,48] w> { y = MatMul(x, w) }", 1),
    "matmul-add": ("<float[64,48] w, float[48] b> { m = MatMul(x, w) y = Add(m, b) }", 1),
    "gemm": ("<float[64,48] w, float[48] b> { y = Gemm(x, w, b) }", 1),
    "gemm-no-bias": ("<float[64,48] w> { y = Gemm(x, w) }", 1),
    "gemm-transposed": ("<float[48,64] w, float[48] b> { y = Gemm<transB=1>(x, w, b) }", 1),
    "gemm-row-bias": ("<float[64,48] w, float[1,48] b> { y = Gemm(x, w, b) }", 1),
    "gemm-one-bias": ("<float[64,48] w, float[1] b> { y = Gemm(x, w, b) }", 1),
    "relu": (
        "<float[64,64] w, float[64,48] v> { m = MatMul(x, w) r = Relu(m) y = MatMul(r, v) }",
        2,
    ),
    "add-relu": (
        "<float[64,64] w, float[64] b, float[64,48] v>"
        "{ m = MatMul(x, w) a = Add(m, b) r = Relu(a) y = MatMul(r, v) }",
        2,
    ),
    "clip": (
        "<float[64,64] w, float[64] b, float lo, float hi, float[64,48] v>"
        "{ m = Gemm(x, w, b) r = Clip(m, lo, hi) y = MatMul(r, v) }",
        2,
    ),
    "clip-below": (
        "<float[64,64] w, float[64] b, float lo, float[64,48] v>"
        "{ m = MatMul(x, w) a = Add(m, b) r = Clip(a, lo) y = MatMul(r, v) }",
        2,
    ),
    "clip-above": (
        "<float[64,64] w, float hi, float[64,48] v>"
        "{ m = MatMul(x, w) r = Clip(m, , hi) y = MatMul(r, v) }",
        2,
    ),
    "gemm-relu": (
        "<float[64,64] w, float[64] b, float[48,64] v>"
        "{ m = Gemm(x, w, b) r = Relu(m) y = Gemm<transB=1>(r, v) }",
        2,
    ),
    "shared": (
        "<float[64,64] w> { m = MatMul(x, w) r = Relu(m) y = MatMul(r, w) }",
        2,
    ),
    "read-both-ways": (
        "<float[64,64] w> { m = Gemm(x, w) r = Relu(m) y = Gemm<transB=1>(r, w) }",
        2,
    ),
}
FORMATS = [
    *("int4/block=16", "int4/block=32", "uint4/block=32", "int8/block=32", "uint8/block=64"),
    *("int4/channel", "int4", "int3/channel", "int2/block=16", "int8/channel", "uint8/channel"),
]


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("name", FUSED)
def test_onnxruntime_multiplies_integer_weights(name, weights, tmp_path):
    text, count = FUSED[name]
    bounds = {n: v for n, v in (("lo", -4.0), ("hi", 4.0)) if f" {n}," in text}
    proto = parse(f"g (float[N,64] x) => (float[] y) {text}", **bounds)
    after, _ = alone(proto, weights)
    fused = fused_ops(after, tmp_path)
    assert fused.count("MatMulNBits") == count
    assert not {"DequantizeLinear", "MatMul", "Gemm", "FusedGemm"} & {*fused}
    # what the float model gives with its weights on the grid
    model = load(proto)
    Calibrate(weights=weights, activations="float").apply(model, Context())
    for layer in model.layers():
        layer.set_weight(layer.weight_encoding.fake_quantize(layer.weight))
    for batch in (1, 3):
        feed = models.feeds(proto, seed=0, batch=batch)
        wanted = run(model, feed)["y"]
        np.testing.assert_allclose(run(after, feed)["y"], wanted, rtol=1e-4, atol=1e-4)
        assert sqnr(wanted, run(after, feed, "all")["y"]) > 33  # its sums are of 8-bit inputs


def test_weights_alone_before_and_after():
    proto = parse(
        "g (float[N,64] x) => (float[] y) <float[48,64] w, float[1,48] b>"
        "{ y = Gemm<transB=1>(x, w, b) }"
    )
    after, found = alone(proto, "int4/block=32")
    dequantize, gemm = after.graph.node
    w = {t.name: t for t in after.graph.initializer}
    assert list(dequantize.input) == ["w_Gemm_0_quantized", "w_Gemm_0_scale"]
    stored = w["w_Gemm_0_quantized"]
    assert {a.name: a.i for a in dequantize.attribute} == {"axis": 0, "block_size": 32}
    assert (list(stored.dims), stored.data_type) == ([64, 48], TensorProto.INT4)
    assert list(w["w_Gemm_0_scale"].dims) == [2, 48]
    assert list(gemm.input) == ["x", *dequantize.output, "b"]
    assert {a.name: a.i for a in gemm.attribute if a.name == "transB"} == {"transB": 0}
    assert after.opset_import[0].version == 21
    assert found.done == [
        "1 weights: int4/block=32, activations in float",
        "1 layers with nothing but the weight in integers",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "(float[N,4,8,8] x) => (float[] y) <float[4,4,1,1] w> { [n] y = Conv(x, w) }",
            "ort-cpu has no Conv of integer weights and float activations",
        ),
        (
            "(float[N,64,8] x) => (float[] y) <float[16,64] w> { [n] y = MatMul(w, x) }",
            "its weight is on the left side",
        ),
        (
            "(float[2,8,64] x) => (float[] y) <float[2,64,16] w> { [n] y = MatMul(x, w) }",
            "its weight is not a matrix",
        ),
        (
            "(float[64,N] x) => (float[] y) <float[64,16] w> { [n] y = Gemm<transA=1>(x, w) }",
            "its input is transposed",
        ),
        (
            "(float[N,64] x) => (float[] y) <float[64,16] w> { [n] y = Gemm<alpha=0.5>(x, w) }",
            "its alpha or beta is not 1",
        ),
        (
            "(float[N,64] x, float[16] b) => (float[] y) <float[64,16] w>{ [n] y = Gemm(x, w, b) }",
            "its bias is computed, not constant",
        ),
        (
            "(float[3,64] x) => (float[] y) <float[64,16] w, float[3,16] b>"
            "{ [n] y = Gemm(x, w, b) }",
            "its bias is not one value per output channel",
        ),
        (
            "(double[N,64] x) => (double[] y) <double[64,16] w> { [n] y = MatMul(x, w) }",
            "does not compute in float32",
        ),
    ],
)
def test_layers_without_a_kernel_stay_in_float(text, why):
    proto = parse(f"g {text}")
    after, found = alone(proto)
    assert reasons(found)["n"] == why
    assert "DequantizeLinear" not in ops(after)
    assert [t.dims for t in after.graph.initializer] == [t.dims for t in proto.graph.initializer]


def test_excluded_layers_stay_in_float():
    proto = parse(
        "g (float[N,64] x) => (float[] y) <float[64,64] w, float[64,16] v>"
        "{ [a] m = MatMul(x, w) [b] y = MatMul(m, v) }"
    )
    after, found = alone(proto, exclude=("a",))
    assert reasons(found) == {"a": "excluded"}
    assert {*stored_weights(after)} == {"v_b_quantized"}


def test_inputs_that_are_no_multiple_of_the_block_have_a_scale_per_channel(tmp_path):
    proto = parse("g (float[N,40] x) => (float[] y) <float[40,16] w> { [n] y = MatMul(x, w) }")
    after, found = alone(proto, "int4/block=16")
    assert reasons(found) == {"n": "its 40 inputs are no multiple of 16: one scale per channel"}
    (scale,) = (t for t in after.graph.initializer if t.name.endswith("_scale"))
    assert list(scale.dims) == [16]
    assert fused_ops(after, tmp_path) == ["MatMulNBits"]


def test_all_weights_may_be_stored_in_integers():
    proto = parse(
        "g (float[N,4,8,8] x) => (float[] y) <float[8,4,1,1] w, float[8] b, float[512,6] v>"
        "{ [c] c = Conv(x, w, b) f = Flatten(c) [m] y = MatMul(f, v) }"
    )
    after, found = alone(proto, "int4/block=32", weight_only="all")
    assert reasons(found) == {"c": "it computes in float: one scale per channel"}
    assert {t.data_type for t in stored_weights(after).values()} == {TensorProto.INT4}
    assert [a.i for a in after.graph.node[0].attribute if a.name == "axis"] == [0]
    feed = models.feeds(proto, seed=0)
    for level in LEVELS:
        assert sqnr(run(proto, feed)["y"], run(after, feed, level)["y"]) > 15
    share = integer_share(after)
    assert [n.kernel for n in share.layers] == ["Conv", "MatMulNBits"]


def test_weights_alone_a_byte_each(tmp_path):
    after, _ = alone(parse(MATRIX), "int4/channel", stored="int8")
    assert after.opset_import[0].version == 17
    assert {t.data_type for t in stored_weights(after).values()} == {TensorProto.INT8}
    assert fused_ops(after, tmp_path) == ["MatMulNBits"]


def test_gptq_lowers_the_error_of_weights_alone():
    proto = parse(MATRIX)
    rng = np.random.default_rng(3)
    mix = rng.normal(size=(64, 64))  # inputs that hang together, which rounding can use
    data = [{"x": (rng.normal(size=(16, 64)) @ mix).astype(np.float32)} for _ in range(16)]
    errors = []
    for passes in ((), (GPTQ(),)):
        steps = (Calibrate(weights="int3/channel", activations="float"), *passes, InsertQDQ())
        model, _ = PassManager(*steps)(proto, data)
        wanted, got = (run(m, data[0])["y"] for m in (proto, model))
        errors.append(np.square(wanted - got).sum())
    assert errors[1] < 0.8 * errors[0]


def test_gptq_leaves_blocks_at_nearest():
    steps = (Calibrate(weights="int4/block=16", activations="float"), GPTQ(), InsertQDQ())
    model, report = PassManager(*steps)(parse(MATRIX))  # and needs no samples for that
    assert {s.why for p, s in report.skipped} == {"scales per block are rounded to nearest"}
    assert len(stored_weights(model.to_proto())) == 1


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ("int4/block=8", r"blocks of 16 and more.*not of 8; use --weights int4/block=16"),
        ("int4/block=48", "not of 48; use --weights int4/block=64"),
        ("int16/channel", "no kernels for int16/channel weights.*use --weights int8/channel"),
        ("float", "leave nothing to quantize; use --weights int4/block=32"),
    ],
)
def test_weights_alone_that_the_target_refuses(weights, match):
    with pytest.raises(TargetError, match=match):
        alone(parse(MATRIX), weights)


def test_a_target_without_kernels_for_weights_alone():
    target = type(CPU)(**{**vars(CPU), "weight_only": frozenset()})
    step = Calibrate(weights="int4/block=32", activations="float")
    with pytest.raises(TargetError, match="with float activations; use --activations uint8"):
        step.apply(load(parse(MATRIX)), Context(target=target))


def test_blocks_in_integers_are_refused():
    with pytest.raises(TargetError, match="use --weights int4/channel, or --activations float"):
        quantized(parse(MATRIX), weights="int4/block=32")


# ------------------------------------------------------------------------------- encodings files


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "int4/channel"},
        {"weights": "int2", "activations": "uint8"},
        {"weights": "uint4/block=16", "activations": "float"},
        {"weights": "int3/channel", "activations": "float"},
    ],
    ids=str,
)
def test_the_model_of_saved_encodings_is_the_same(options, tmp_path):
    proto = parse(MATRIX)
    model, ctx = load(proto), Context(samples(proto))
    Calibrate(**options).apply(model, ctx)
    path = tmp_path / "e.json"
    encodings_json.save(model.encodings, path)
    other = load(proto)
    LoadEncodings(path=str(path)).apply(other, ctx)
    assert dict(other.encodings) == dict(model.encodings)
    for made in (model, other):
        InsertQDQ().apply(made, ctx)
    assert other.digest() == model.digest()


@pytest.mark.parametrize(
    ("scales", "axis", "block", "why"),
    [
        ((4, 48), 0, 32, "4x48 scales for blocks of 32 along axis 0"),
        ((2, 47), 0, 32, "2x47 scales for blocks of 32"),
        ((3, 48), 0, 20, "3x48 scales for blocks of 20"),
        ((2, 48), 2, 32, "it has no axis 2"),
    ],
)
def test_blocks_that_do_not_fit(scales, axis, block, why, tmp_path):
    entry = {"name": "w", "output_dtype": "int4", "axis": axis, "block_size": block}
    entry["y_scale"] = np.ones(scales).tolist()
    path = tmp_path / "e.json"
    path.write_text(json.dumps({"version": "2.0.0", "encodings": [entry]}))
    with pytest.raises(RecipeError, match=why):
        LoadEncodings(path=str(path)).apply(load(parse(MATRIX)), Context())


def test_an_activation_has_no_blocks(tmp_path):
    entry = {"name": "x", "output_dtype": "uint8", "axis": 1, "block_size": 32}
    path = tmp_path / "e.json"
    path.write_text(
        json.dumps({"version": "2.0.0", "encodings": [entry | {"y_scale": [[1.0, 1.0]]}]})
    )
    with pytest.raises(RecipeError, match="only the result of a Conv"):
        LoadEncodings(path=str(path)).apply(load(parse(MATRIX)), Context())


# ------------------------------------------------------------------------------- from end to end


def test_a_written_model_is_read_again(tmp_path):
    proto = parse(CONVS)
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(proto, path)
    data = samples(proto)
    model, report = api.quantize(path, out, data, weights="int4/channel")
    assert report.facts["integers"]["share"] == 1
    assert report.facts["bytes"]["after"] == out.stat().st_size
    assert [s["text"] for s in report.facts["storage"]] == [
        "2 of 324 values, 4-bit, packed in the file, unpacked to int8 when the model is loaded"
    ]
    again = load(out)
    assert (again.nbytes, again.digest()) == (model.nbytes, model.digest())
    assert [str(s) for s in onnxq.inspect(out).storage] == [
        s["text"] for s in report.facts["storage"]
    ]
    assert integer_share(again).share == 1
    (error,) = onnxq.compare(path, out, data, timed=False).outputs
    assert error.to_dict()["sqnr_db"] > 15
    with pytest.raises(ModelError, match="quantized already"):
        api.quantize(out, tmp_path / "twice.onnx", data)


def test_weights_alone_from_end_to_end_need_no_samples(tmp_path):
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(parse(MATRIX), path)
    model, report = api.quantize(path, out, activations="float")
    assert model.encodings["w"] == Encoding.symmetric(
        np.abs(load(path).layers()[0].weight.reshape(2, 32, 48)).max(1), "int4", 0, 32
    )
    (layer,) = report.facts["integers"]["layers"]
    assert (layer["kernel"], layer["integer"]) == ("MatMulNBits", False)
    assert report.in_float == []  # it was to be so
    assert [p.name for p in report.passes][-2:] == ["calibrate", "insert-qdq"]
    (found,) = storage(load(out))
    assert (found.stored, found.block, found.bits, found.values) == ("int4", 32, 4, 64 * 48)
    assert out.stat().st_size < path.stat().st_size / 4
    with pytest.raises(ModelError, match="quantized already"):
        api.quantize(out, tmp_path / "twice.onnx", activations="float")
