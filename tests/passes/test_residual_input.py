"""What quantization leaves of an input, fed along."""

import numpy as np
import onnx
import pytest

from onnxq import encodings_json
from onnxq.model import load
from onnxq.pass_manager import Context
from onnxq.passes import GPTQ, Calibrate, InsertQDQ, LoadEncodings, ResidualInput
from onnxq.runtime import Session
from tests.checks import assert_same_function, ops, reasons, run
from tests.models import parse

TEXT = (
    "g (float[N,1,64] x) => (float[] y) <float[6,1,9] w, float[6] b, float[4,6,1] v>"
    "{ c = Conv<strides=[2]>(x, w, b) r = Relu(c) y = Conv(r, v) }"
)


def sounds(count=12, quietest=1e-3):
    """Noise at loudnesses that differ by orders of magnitude."""
    rng = np.random.default_rng(5)
    loud = np.geomspace(quietest, 1.0, count)
    return [{"x": (rng.normal(size=(1, 1, 64)) * a).astype(np.float32)} for a in loud]


def calibrated(data, text=TEXT):
    proto = parse(text)
    model, ctx = load(proto), Context(data)
    Calibrate().apply(model, ctx)
    return proto, model, ctx


def test_the_float_function_stays():
    data = sounds()
    proto, model, ctx = calibrated(data)
    changes = ResidualInput().apply(model, ctx)
    assert changes
    assert "dB in 8 bits" in changes.done[0]
    for feed in data:
        assert_same_function(proto, model, feed=feed)
    layer = model.layers()[0]
    half = layer.weight.shape[1] // 2
    assert np.array_equal(layer.weight[:, :half] / np.float32(8), layer.weight[:, half:])
    assert layer.input_channels == 2
    assert model.encodings["x.with_residue"].dtype == "uint8"


def error(proto, model, data):
    """Mean over samples of noise power over signal power."""
    found = []
    for feed in data:
        wanted, got = run(proto, feed)["y"], run(model, feed, "all")["y"]
        found.append(np.square(got - wanted).mean() / np.square(wanted - wanted.mean()).mean())
    return np.mean(found)


def test_quiet_samples_keep_their_shape():
    data = sounds(quietest=3e-2)
    errors = []
    for steps in ([], [ResidualInput()]):
        proto, model, ctx = calibrated(
            data, TEXT.replace("r = Relu(c) y = Conv(r, v)", "y = Exp(c)")
        )
        for step in (*steps, GPTQ(), InsertQDQ()):
            step.apply(model, ctx)
            model.revision += 1
        errors.append(error(proto, model, data))
    plain, split = errors
    assert split < plain / 3  # what is left is noise of the weights and of the result


def test_inputs_that_are_fine_are_left_alone():
    data = sounds(quietest=0.5)
    _, model, ctx = calibrated(data)
    assert not ResidualInput().apply(model, ctx)
    assert ops(model) == ["Conv", "Relu", "Conv"]


def test_without_samples_there_is_nothing_to_judge_by():
    _, model, _ = calibrated(sounds())
    assert not ResidualInput().apply(model, Context())


def test_saved_encodings_give_the_same_again(tmp_path):
    data = sounds()
    proto, model, ctx = calibrated(data)
    ResidualInput().apply(model, ctx)
    encodings_json.save(model.encodings, tmp_path / "e.json")
    again = load(proto)
    LoadEncodings(path=str(tmp_path / "e.json")).apply(again, ctx)
    assert ResidualInput().apply(again, ctx)
    assert again.encodings == model.encodings


def test_silence_is_no_error():
    data = [*sounds(), {"x": np.zeros((1, 1, 64), np.float32)}]
    _, model, ctx = calibrated(data)
    assert ResidualInput().apply(model, ctx)


OTHERS = {
    "two-readers": (
        "g (float[N,1,64] x) => (float[] y, float[] z) <float[6,1,9] w, float[6,1,5] u>"
        "{ y = Conv(x, w) z = Conv(x, u) }",
        "2 nodes read it",
    ),
    "gemm": ("g (float[N,64] x) => (float[] y) <float[64,6] w> { y = Gemm(x, w) }", "(Gemm)"),
    "groups": (
        "g (float[N,2,64] x) => (float[] y) <float[6,1,9] w> { y = Conv<group=2>(x, w) }",
        "has groups",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_it_refuses(name):
    text, why = OTHERS[name]
    shape = [d.dim_value or 1 for d in parse(text).graph.input[0].type.tensor_type.shape.dim]
    rng = np.random.default_rng(1)
    data = [
        {"x": (rng.normal(size=shape) * a).astype(np.float32)} for a in np.geomspace(1e-3, 1, 9)
    ]
    _, model, ctx = calibrated(data, text)
    changes = ResidualInput().apply(model, ctx)
    assert not changes
    assert why in reasons(changes)["x"]


@pytest.mark.parametrize("magnify", [8.0, 6.0])
def test_the_halves_are_joined_in_integers(magnify):
    """The same integers as those of the joined floats, by fewer operators."""
    data = sounds()
    _, model, ctx = calibrated(data)
    ResidualInput(magnify=magnify).apply(model, ctx)
    model.revision += 1
    joined = model.encodings["x.with_residue"]
    floats = model.to_proto(["x.with_residue"])
    InsertQDQ().apply(model, ctx)
    kinds = [op for op in ops(model) if op != "DequantizeLinear"]
    times = ["Mul"] * (magnify == 6)  # a power of two becomes a scale
    assert kinds[: 4 + len(times)] == ["QuantizeLinear", "Sub", *times, "QuantizeLinear", "Concat"]
    (name,) = (n.outputs[0].name for n in model.graph.nodes if n.op == "Concat")
    exposed = model.to_proto([name])
    for feed in data:
        got = run(exposed, feed)[name]
        wanted = joined.quantize(run(floats, feed)["x.with_residue"])
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, wanted)


# convolution over one row, and the samples of it that become channels
STEPS = {
    "whole-blocks": ("<strides=[16]>", 48, 160, 16),
    "filled-up": ("<strides=[16], kernel_shape=[40], pads=[0,0]>", 40, 160, 16),
    "half-steps": ("<strides=[16]>", 40, 168, 8),
    "much-to-fill-up": ('<strides=[16], auto_pad="VALID">', 8, 160, 8),
    "a-few-left": ("<strides=[16]>", 40, 165, 0),
    "short-steps": ("<strides=[4]>", 8, 160, 0),
    "padded": ("<strides=[16], pads=[16,16]>", 48, 160, 0),
    "padded-as-needed": ('<strides=[16], auto_pad="SAME_UPPER">', 48, 160, 0),
    "dilated": ("<strides=[16], dilations=[2]>", 16, 160, 0),
}


def stepping(name):
    attrs, taps, length, _ = STEPS[name]
    rng = np.random.default_rng(7)
    data = [
        {"x": (rng.normal(size=(2, 1, length)) * a).astype(np.float32)}
        for a in np.geomspace(1e-3, 1, 9)
    ]
    text = (
        f"g (float[N,1,{length}] x) => (float[] y) <float[6,1,{taps}] w, float[6] b,"
        f" float[4,6,1] v> {{ c = Conv{attrs}(x, w, b) r = Relu(c) y = Conv(r, v) }}"
    )
    return data, text


def written(name):
    _, model, ctx = calibrated(*stepping(name))
    ResidualInput().apply(model, ctx)
    model.revision += 1
    InsertQDQ().apply(model, ctx)
    return model


@pytest.mark.parametrize("name", STEPS)
def test_neighbours_become_channels(name, monkeypatch):
    """To the bit what the convolution along the row gives."""
    _, taps, _, block = STEPS[name]
    blocks = written(name)
    monkeypatch.setattr("onnxq.row_blocks.LEAST", 1000)
    plain = written(name)
    shapes = [
        next(t.shape for n, t in m.tensors().items() if n == "w_quantized") for m in (plain, blocks)
    ]
    assert shapes[0] == (6, 2, taps)
    assert shapes[1] == ((6, 2 * block, -(-taps // block)) if block else (6, 2, taps))
    for feed in stepping(name)[0]:
        wanted, got = (run(m, feed, "all")["y"] for m in (plain, blocks))
        assert np.ptp(wanted) > 0
        np.testing.assert_array_equal(got, wanted)


def test_the_runtime_transposes_no_blocks(tmp_path):
    found = {}
    for name in ("filled-up", "a-few-left"):
        path = tmp_path / f"{name}.onnx"
        Session(written(name).to_proto(), threads=1, level="all", optimized_path=path)
        kinds = ops(onnx.load(path))
        found[name] = kinds[: kinds.index("QLinearConv")]
    halves = ["QuantizeLinear", "DequantizeLinear", "Sub", "QuantizeLinear", "Concat"]
    assert found == {"filled-up": ["Reshape", *halves], "a-few-left": [*halves, "Transpose"]}
