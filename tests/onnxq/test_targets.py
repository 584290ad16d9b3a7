"""Contracts: what they refuse, and that what is written for a target obeys its contract."""

import dataclasses

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings

from onnxq import encodings_json
from onnxq.analysis.fusion import integer_share, written_share
from onnxq.api import quantize
from onnxq.encoding import DTYPES, Format, in_bytes
from onnxq.errors import RecipeError, TargetError
from onnxq.model import Model, load, producer
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import (
    GPTQ,
    Calibrate,
    Clean,
    FoldBatchNorm,
    InsertQDQ,
    LoadEncodings,
    ResidualInput,
)
from onnxq.placement import data_inputs
from onnxq.targets import TARGETS, target_named
from tests import models
from tests.checks import ops, run

NAMES = [*TARGETS]
# the CPU provider's others are written as the first of them is
WRITTEN = ["ort-cpu", *(n for n, t in TARGETS.items() if not t.cpu)]
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def quantized(proto, target, *, count=4, **options):
    samples = [models.feeds(proto, seed=s) for s in range(count)]
    steps = (Clean(), FoldBatchNorm(), Calibrate(**options), ResidualInput(), GPTQ(), InsertQDQ())
    return PassManager(*steps)(proto, samples, target=target)


def dtype_of(model: Model, node) -> str:
    """The type of the integers that a Q writes or a DQ reads, by its zero point."""
    return model.array(node.inputs[2]).dtype.name


def assert_obeys(model: Model, name: str) -> None:
    """Every Q, every DQ and every layer of a written model is of the target's contract."""
    target = TARGETS[name]
    graph = model.graph
    assert target.opset is None or model.opset <= target.opset
    for node in graph.nodes:
        if node.op == "QuantizeLinear":
            assert_activation(model, node, target)
        if node.op == "DequantizeLinear" and dtype_of(model, node) == "int32":
            assert target.bias == "int32"
        if node.op in LAYERS:
            assert_layer(model, node, target)
        if node.op in ("Relu", "Clip") and not target.keeps_activation:
            before, after = producer(node.inputs[0]), node.outputs[0].outputs
            assert not in_integers(before, target) or [n.op for n in after] != ["QuantizeLinear"]


def in_integers(node, target):
    """Whether a node reads nothing but what is dequantized."""
    kernel = None if node is None else target.kernels.get(node.op)
    data = [] if kernel is None else [producer(t) for t in data_inputs(node, kernel)]
    return bool(data) and all(d is not None and d.op == "DequantizeLinear" for d in data)


def assert_activation(model, node, target):
    kind = dtype_of(model, node)
    assert kind in target.activations
    scale, zero = (model.array(t) for t in node.inputs[1:])
    assert scale.dtype == np.float32
    assert scale.ndim == 0 or target.cpu
    assert not target.symmetric or not zero.any()
    before = producer(node.inputs[0])
    kernel = None if before is None else target.kernels.get(before.op)
    for dtype, wanted, point in () if kernel is None else kernel.results:
        if dtype == kind:
            assert (scale, zero) == (np.float32(wanted), point)


def assert_layer(model, node, target):
    read = [producer(t) for t in node.inputs[:2]]
    if any(r is None or r.op != "DequantizeLinear" for r in read):
        return
    kernel = target.kernels[node.op]
    activation, weight = (dtype_of(model, r) for r in read)
    assert (activation, weight) in target.pairs
    scale = model.array(read[1].inputs[1])
    if scale.ndim:
        assert kernel.per_channel
        assert weight in target.per_channel
    if weight == "int8":
        assert not model.array(read[1].inputs[2]).any()
    bias = producer(node.inputs[2]) if len(node.inputs) > 2 else None
    if target.bias == "float":
        assert bias is None
    elif bias is not None:
        assert dtype_of(model, bias) == "int32"
        x = model.array(read[0].inputs[1])
        np.testing.assert_array_equal(model.array(bias.inputs[1]), x * scale)


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", WRITTEN)
@settings(deadline=None, max_examples=15, suppress_health_check=[*HealthCheck])
@given(proto=models.networks())
def test_what_is_written_obeys_the_contract(name, proto):
    for activations in TARGETS[name].activations:
        model, _ = quantized(proto, name, activations=activations)
        assert_obeys(model, name)
        onnx.checker.check_model(model.to_proto(), full_check=True)


@pytest.mark.parametrize("name", WRITTEN)
@settings(deadline=None, max_examples=6, suppress_health_check=[*HealthCheck])
@given(proto=models.networks())
def test_it_computes_about_what_the_float_model_does(name, proto):
    """At every level of optimization of the provider that can run it."""
    feed = models.feeds(proto, seed=0)
    (wanted,) = run(proto, feed).values()
    for activations in TARGETS[name].activations:
        model, _ = quantized(proto, name, activations=activations)
        for level in ("disabled", "all"):
            (got,) = run(model, feed, level).values()
            noise = np.sqrt(np.mean((got - wanted) ** 2))
            assert noise <= 0.08 * max(np.abs(wanted).max(), 1e-3), (activations, level)


CNN = """
    g (float[1,3,12,12] x) => (float[1,5] y) {
        a = Conv<pads=[1,1,1,1]>(x, w, b)
        r = Relu(a)
        p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
        c = Conv<pads=[1,1,1,1]>(p, v, d)
        s = Add(c, p)
        t = Clip(s, low, high)
        g = GlobalAveragePool(t)
        f = Flatten(g)
        z = Gemm(f, u, e)
        y = Softmax(z)
    }
"""


def cnn(**changes):
    rng = np.random.default_rng(3)
    shapes = {"w": (8, 3, 3, 3), "b": (8,), "v": (8, 8, 3, 3), "d": (8,), "u": (8, 5), "e": (5,)}
    values = {n: (0.4 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
    values |= {"low": np.float32(0), "high": np.float32(6)} | changes
    declared = ", ".join(f"float{list(v.shape) if v.ndim else ''} {n}" for n, v in values.items())
    return models.parse(CNN.replace(") {", f") <{declared}> {{", 1), **values)


def types(model):
    return {dtype_of(model, n) for n in model.graph.nodes if n.op == "QuantizeLinear"}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *((n, {"uint8"}) for n in ("ort-cpu", "ort-x64", "ort-x64-avx2", "ort-arm64")),
        *((n, {"uint8"}) for n in ("ort-mobile", "nnapi", "qnn", "openvino")),
        *((n, {"int8"}) for n in ("xnnpack", "tensorrt")),
    ],
)
def test_default_formats(name, kinds):
    model, _ = quantized(cnn(), name)
    assert types(model) == kinds
    assert_obeys(model, name)


def test_tensorrt_keeps_relu_and_float_biases():
    model, _ = quantized(cnn(), "tensorrt")
    assert ops(model).count("Relu") == 1
    zeros = [model.array(n.inputs[2]) for n in model.graph.nodes if n.op == "QuantizeLinear"]
    assert not np.concatenate([z.reshape(-1) for z in zeros]).any()
    known = cnn()
    for layer, bias in (("w", "b"), ("v", "d"), ("u", "e")):
        node = next(n for n in model.graph.nodes if n.name and weight_name(n) == layer)
        assert producer(node.inputs[2]) is None
        given_bias = next(
            onnx.numpy_helper.to_array(t) for t in known.graph.initializer if t.name == bias
        )
        assert np.abs(model.array(node.inputs[2]) - given_bias).max() < 0.05


def weight_name(node):
    before = producer(node.inputs[1]) if len(node.inputs) > 1 and node.op in LAYERS else None
    return None if before is None else before.inputs[0].name.partition("_")[0]


@pytest.mark.parametrize("name", ["xnnpack", "nnapi", "qnn"])
def test_phones_find_no_relu_before_q(name):
    model, report = quantized(cnn(), name)
    assert {"Relu", "Clip"}.isdisjoint(ops(model))
    assert "2 Relu and Clip are left to the saturation of Q" in report.passes[-1].changes.done


def test_qnn_leaves_nothing_in_float():
    model, _ = quantized(cnn(), "qnn")
    for node in model.graph.nodes:
        if node.op not in ("QuantizeLinear", "DequantizeLinear"):
            before = producer(node.inputs[0])
            assert before is not None
            assert before.op == "DequantizeLinear"
            assert [n.op for n in node.outputs[0].outputs] == ["QuantizeLinear"]
    assert producer(model.graph.outputs[0]).op == "DequantizeLinear"
    plain, _ = quantized(cnn(), "ort-cpu")
    assert producer(plain.graph.outputs[0]).op == "Softmax"


@pytest.mark.parametrize("kind", ["uint16", "int16"])
def test_sixteen_bits_take_operator_set_21_and_lose_next_to_nothing(kind):
    proto = cnn()
    feed = models.feeds(proto, seed=0)
    wanted = run(proto, feed)["y"]

    def noise(activations):
        model, _ = quantized(proto, "qnn", activations=activations, weights="int8/channel")
        assert types(model) == {activations}
        assert model.opset == (21 if activations == kind else 17)
        return float(np.abs(run(model, feed)["y"] - wanted).max())

    assert noise(kind) < noise("uint8")


def test_sixteen_bit_sigmoid_has_the_scale_that_qnn_wants():
    proto = models.parse(
        "g (float[1,4] x) => (float[1,4] y) { a = MatMul(x, w) y = Sigmoid(a) }".replace(
            ") {", ") <float[4,4] w> {", 1
        ),
        w=np.eye(4, dtype=np.float32),
    )
    model, _ = quantized(proto, "qnn", activations="uint16")
    last = [n for n in model.graph.nodes if n.op == "QuantizeLinear"][-1]
    assert float(model.array(last.inputs[1])) == 1 / 65536
    assert int(model.array(last.inputs[2])) == 0


@pytest.mark.parametrize("name", ["nnapi", "qnn"])
def test_weights_of_matrices_have_one_scale_there(name):
    model, report = quantized(cnn(), name)
    gemm = next(n for n in model.graph.nodes if n.op == "Gemm")
    assert model.array(producer(gemm.inputs[1]).inputs[1]).shape == ()
    conv = next(n for n in model.graph.nodes if n.op == "Conv")
    assert model.array(producer(conv.inputs[1]).inputs[1]).shape == (8,)
    said = [skip.why for step in report.passes for skip in step.changes.skipped]
    assert f"one scale: {name} takes no more for Gemm" in said


@pytest.mark.parametrize("name", ["xnnpack", "nnapi", "qnn"])
def test_open_sizes_are_named(name):
    proto = cnn()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    _, report = quantized(proto, name)
    said = [skip.why for skip in report.passes[-1].changes.skipped]
    assert f"sizes of x are open: {name} wants them fixed" in said


def test_a_newer_operator_set_is_refused():
    proto = models.parse("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=24)
    with pytest.raises(TargetError, match="nnapi takes operator sets up to 23, not 24"):
        quantized(proto, "nnapi")
    quantized(proto, "ort-cpu")


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "weights", "activations", "says", "advice"),
    [
        ("nnapi", "int8/channel", "int8", "nnapi computes in uint8, not int8", "uint8"),
        ("tensorrt", "int8", "uint8", "tensorrt computes in int8, not uint8", "int8"),
        ("ort-cpu", "int8", "uint16", "computes in uint8 or int8, not uint16", "uint8"),
        ("openvino", "int8", "int16", "computes in uint8 or int8, not int16", "int8"),
        (
            "xnnpack",
            "int8/channel",
            "uint8",
            "no integer kernels for int8/channel weights with uint8 activations",
            "uint8",
        ),
        (
            "xnnpack",
            "uint8/channel",
            "uint8",
            "one scale per tensor of uint8 weights",
            "uint8/tensor",
        ),
        (
            "qnn",
            "uint8/channel",
            "uint16",
            "one scale per tensor of uint8 weights",
            "uint8/tensor or --weights int8/channel",
        ),
        (
            "qnn",
            "int8/channel",
            "int8",
            "qnn computes in uint8 or uint16 or int16, not int8",
            "uint8",
        ),
        ("tensorrt", "uint8", "int8", "no integer kernels for uint8 weights", "int8"),
        ("openvino", "int8/block=32", "uint8", "no integer kernels for blocks", "int8/channel"),
        ("qnn", "int4/block=32", "float", "no kernels for integer weights with float", "uint8"),
        ("ort-cpu", "int16", "uint8", "no integer kernels for int16 weights", "int8 or uint8"),
        ("ort-cpu", "float", "uint8", "no integer kernels for float weights", "int8 or uint8"),
    ],
)
def test_the_rule_and_the_nearest_legal_choice(name, weights, activations, says, advice):
    with pytest.raises(TargetError) as caught:
        target_named(name).check(Format.parse(weights), Format.parse(activations))
    assert says in caught.value.what
    assert caught.value.fix.endswith(advice)


@pytest.mark.parametrize("name", NAMES)
def test_advice_is_legal(name):
    """What an error proposes is allowed in its turn."""
    target = TARGETS[name]
    formats = [f"{d}{g}" for d in DTYPES for g in ("", "/channel")]
    legal = 0
    for activations in DTYPES:
        for weights in formats:
            try:
                target.check(Format.parse(weights), Format.parse(activations))
            except TargetError as error:
                words = error.fix.removeprefix("use ").replace("--weights ", "").split(" or ")
                if error.fix.startswith("use --activations "):
                    words = error.fix.removeprefix("use --activations ").split(" or ")
                    assert all(w in target.activations for w in words)
                    continue
                for word in words:
                    target.check(Format.parse(word), Format.parse(activations))
            else:
                legal += 1
                wanted = Format.parse(weights)
                assert (activations, in_bytes(wanted.dtype)) in target.pairs
    assert legal


@pytest.mark.parametrize("name", NAMES)
def test_a_contract_is_consistent(name):
    target = TARGETS[name]
    assert target.name == name
    assert target.source
    target.check(Format.parse(target.weights), Format.parse(target.activations[0]))
    assert {a for a, _ in target.pairs} == set(target.activations)
    assert {d for k in target.kernels.values() for d, _, _ in k.results} <= set(target.activations)
    assert target.per_channel <= {w for _, w in target.pairs}
    assert not target.symmetric or not any(a.startswith("u") for a in target.activations)


def test_an_unknown_target_and_one_of_the_caller():
    with pytest.raises(TargetError, match=r"no target 'tensorr'.*did you mean tensorrt"):
        target_named("tensorr")
    own = dataclasses.replace(TARGETS["ort-cpu"], name="own", activations=("int8",))
    assert target_named(own) is own
    model, _ = quantized(cnn(), own)
    assert types(model) == {"int8"}
    assert load(model.to_proto()).opset == 17


# ---------------------------------------------------------------------- what is reported


@pytest.mark.parametrize("name", ["nnapi", "qnn", "tensorrt", "openvino"])
def test_shares_of_what_cannot_be_run_here_are_those_of_the_contract(name):
    proto = cnn()
    samples = [models.feeds(proto, seed=s) for s in range(2)]
    _, report = quantize(load(proto), calib=samples, target=name)
    integers = report.facts["integers"]
    assert (integers["measured"], report.facts["target"]) == (False, name)
    assert (integers["share"], integers["float_layers"]) == (1.0, 0)
    assert any(f"the contract of {name}" in note for note in report.notes)
    _, report = quantize(load(proto), calib=samples, target=name, exclude=["Gemm"])
    (left,) = [n for n in report.facts["integers"]["layers"] if not n["integer"]]
    assert (left["op"], left["reason"]) == ("Gemm", "left in float: excluded")


def test_sixteen_bits_are_no_integers_on_the_cpu():
    proto = cnn()
    model, _ = quantized(proto, "qnn", activations="uint16")
    assert written_share(model, TARGETS["qnn"]).share == 1.0
    assert integer_share(model).integer_macs == 0
    other = written_share(model, TARGETS["nnapi"])
    assert other.integer_macs == 0
    assert other.layers[0].reason == "nnapi has no integer Conv of uint16 and int8"


@pytest.mark.parametrize(
    ("source", "name", "says"),
    [
        ("ort-cpu", "tensorrt", "tensorrt has no integer kernels for uint8"),
        ("xnnpack", "tensorrt", "tensorrt wants zero points of 0"),
        ("tensorrt", "nnapi", "nnapi has no integer kernels for int8"),
    ],
)
def test_encodings_of_another_target_are_refused(source, name, says, tmp_path):
    proto = cnn()
    samples = [models.feeds(proto, seed=s) for s in range(2)]
    path = tmp_path / "encodings.json"
    model = load(proto)
    PassManager(Clean(), Calibrate()).apply(model, Context(samples, target=source))
    encodings_json.save(model.encodings, path)
    step = LoadEncodings(path=str(path))
    with pytest.raises(RecipeError, match=says):
        step.apply(load(proto), Context(target=name))
    step.apply(load(proto), Context(target=source))
