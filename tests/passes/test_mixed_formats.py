"""Weights of several number formats in one model: encodings, integers, storage, copies, errors."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from onnxq import api, encodings_json
from onnxq.analysis.storage import storage
from onnxq.errors import RecipeError, TargetError
from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import GPTQ, AdaRound, Calibrate, Clean, InsertQDQ, LoadEncodings
from tests import models
from tests.checks import LEVELS, reasons, run
from tests.models import parse
from tests.passes.test_insert_qdq import CONV, DQ, Q, fused_ops, samples, sqnr
from tests.passes.test_low_bits import alone, said, stored_weights

CHAIN = (
    "g (float[N,4,8,8] x) => (float[] y)"
    "<float[8,4,3,3] w, float[8] b, float[8,1,3,3] d, float[8,8,1,1] p, float[5,8,3,3] v>"
    "{ [stem] c = Conv(x, w, b) r = Relu(c) [dw] e = Conv<group=8>(r, d) s = Relu(e)"
    " [pw] h = Conv(s, p) t = Relu(h) [head] y = Conv(t, v) }"
)
SHARED = (
    "g (float[N,4,8,8] x) => (float[] y) <float[4,4,3,3] w>"
    "{ [one] c = Conv(x, w) r = Relu(c) [two] y = Conv(r, w) }"
)
# one reader after the other of float[16,16] w
MATRICES = (
    "g (float[N,16] x) => (float[] y) <float[16,16] w>"
    "{ [one] c = MatMul(x, w) [two] d = MatMul(c, w) [three] y = MatMul(d, w) }"
)


@pytest.fixture(autouse=True)
def few_values_are_enough(monkeypatch):
    monkeypatch.setattr("onnxq.passes.calibrate.MANY_VALUES", 1)


def calibrated(text, *formats, weights="int4/channel", **options):
    proto = parse(text)
    model = load(proto)
    step = Calibrate(weights=weights, formats=formats, **options)
    changes = step.apply(model, Context(samples(proto)))
    return model, changes


def quantized(text, *formats, weights="int4/channel", passes=(), **values):
    proto = parse(text, **values)
    steps = (Clean(), Calibrate(weights=weights, formats=formats), *passes, InsertQDQ())
    model, report = PassManager(*steps)(proto, samples(proto))
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    return proto, after, report


def dtypes(model):
    return {layer.name: layer.weight_encoding.dtype for layer in model.layers()}


FOUR = dict.fromkeys(("stem", "dw", "pw", "head"), "int4")


@pytest.mark.parametrize(
    ("formats", "wanted"),
    [
        ((), {}),
        (("first=int8/channel",), {"stem": "int8"}),
        (("last=int8/channel",), {"head": "int8"}),
        (("depthwise=int8/channel",), {"dw": "int8"}),
        (("h*=int8/channel", "p?=int3/channel"), {"head": "int8", "pw": "int3"}),
        (("Conv=int8/channel", "pw=int2/channel"), {**dict.fromkeys(FOUR, "int8"), "pw": "int2"}),
        (("pw=int2/channel", "Conv=int8/channel"), dict.fromkeys(FOUR, "int8")),  # the last counts
    ],
)
def test_layers_have_the_formats_that_name_them(formats, wanted):
    model, _ = calibrated(CHAIN, *formats)
    assert dtypes(model) == FOUR | wanted
    plain, _ = calibrated(CHAIN, weights="int8/channel")
    for layer in model.layers():
        name, encoding = layer.weight_tensor.name, layer.weight_encoding
        steps = (1 << encoding.bits - 1) - 1  # from zero to the greatest weight of a channel
        assert encoding.scale.shape == (layer.output_channels,)
        np.testing.assert_allclose(encoding.scale * steps, plain.encodings[name].scale * 127, 1e-6)
    assert {n: e for n, e in model.encodings.items() if n not in ("w", "d", "p", "v")} == {
        n: e for n, e in plain.encodings.items() if n not in ("w", "d", "p", "v")
    }


def test_the_granularity_goes_with_the_format():
    model, _ = calibrated(CHAIN, "head=int8/tensor", "stem=uint8/channel")
    assert model.encodings["v"].scale.shape == ()
    assert (model.encodings["w"].dtype, model.encodings["w"].zero_point[0]) == ("uint8", 128)


def test_what_is_reported():
    _, changes = calibrated(CHAIN, "first=int8/channel", "last=int8/channel", "pw=int2/channel")
    assert [line for line in changes.done if "activations" not in line] == [
        "first=int8/channel: 1 layers",
        "last=int8/channel: 1 layers",
        "pw=int2/channel: 1 layers",
        "1 weights: int4/channel",
        "2 weights: int8/channel",
        "1 weights: int2/channel",
    ]


def test_a_word_that_names_no_layer_changes_nothing():
    plain, _ = calibrated(SHARED)
    model, changes = calibrated(SHARED, "depthwise=int8/channel")
    assert changes.done[0] == "depthwise=int8/channel: the model has no such layer"
    assert dict(model.encodings) == dict(plain.encodings)


def test_a_layer_in_float_is_reported_as_that():
    model, changes = calibrated(CHAIN, "last=int8/channel", exclude=("head",))
    assert reasons(changes) == {"head": "excluded"}
    assert "v" not in model.encodings


def test_a_weight_on_the_left_is_written_as_activations_are():
    text = "g (float[2,8,4] x) => (float[] y) <float[6,8] w> { [m] y = MatMul(w, x) }"
    model, changes = calibrated(text, "m=int8/channel")
    assert model.encodings["w"].dtype == "uint8"
    assert reasons(changes) == {"m": "its weight is on the left: uint8, not int8/channel"}
    assert not reasons(calibrated(text)[1])


# ------------------------------------------------------------------------------- in integers


MIXED = ("first=int8/channel", "last=int8/channel", "depthwise=int8/channel")


@pytest.mark.parametrize("passes", [(), (GPTQ(),), (AdaRound(),)], ids=["nearest", "gptq", "ada"])
def test_onnxruntime_runs_integers(passes, tmp_path):
    proto, after, _ = quantized(CHAIN, *MIXED, passes=passes)
    assert fused_ops(after, tmp_path) == [Q, CONV, CONV, CONV, CONV, DQ]
    kinds = {n: t.data_type for n, t in stored_weights(after).items()}
    eight = {f"{n}_quantized": TensorProto.INT8 for n in ("w", "d", "v_head")}
    assert kinds == {**eight, "p_quantized": TensorProto.INT4}
    feed = models.feeds(proto, seed=0)
    wanted, plain = run(proto, feed)["y"], run(after, feed)["y"]
    for level in LEVELS:
        assert sqnr(plain, run(after, feed, level)["y"]) >= 25
    _, four, _ = quantized(CHAIN, passes=passes)
    assert sqnr(wanted, plain) > sqnr(wanted, run(four, feed)["y"]) + 3


@pytest.mark.parametrize("passes", [(), (GPTQ(),), (AdaRound(),)], ids=["nearest", "gptq", "ada"])
def test_each_weight_is_on_its_own_grid(passes):
    _, after, _ = quantized(CHAIN, *MIXED, passes=passes)
    for name, tensor in stored_weights(after).items():
        most = np.abs(numpy_helper.to_array(tensor).astype(int)).max()
        assert (most <= 8) if name == "p_quantized" else (64 <= most <= 128)


def test_the_storage_tells_both():
    _, after, _ = quantized(CHAIN, *MIXED)
    found = {s.stored: str(s) for s in storage(load(after))}
    assert found == {
        "int8": f"3 of {8 * 4 * 9 + 8 * 9 + 5 * 8 * 9} values, 8-bit, int8 in the file",
        "int4": "1 of 64 values, 4-bit, packed in the file,"
        " unpacked to int8 when the model is loaded",
    }


def test_the_encodings_are_read_again(tmp_path):
    path = tmp_path / "e.json"
    proto = parse(SHARED)
    model, _ = calibrated(SHARED, "last=int8/channel")
    encodings_json.save(model.encodings, path)
    again = load(proto)
    LoadEncodings(path=str(path)).apply(again, Context())
    assert dict(again.encodings) == dict(model.encodings)
    assert dtypes(again) == {"one": "int4", "two": "int8"}


# ------------------------------------------------------------------------------- shared weights


@pytest.mark.parametrize("order", ["first", "last"])
def test_layers_that_share_a_weight_get_their_own(order, tmp_path):
    proto, after, _ = quantized(SHARED, f"{order}=int8/channel")
    found = stored_weights(after)
    kinds = [found[n].data_type for n in ("w_quantized", "w.two_two_quantized")]
    assert len(found) == 2
    assert kinds == [TensorProto.INT8, TensorProto.INT4][:: 1 if order == "first" else -1]
    assert fused_ops(after, tmp_path) == [Q, CONV, CONV, DQ]
    # as if the model had had two to begin with
    w = numpy_helper.to_array(proto.graph.initializer[0])
    apart = SHARED.replace("[4,4,3,3] w", "[4,4,3,3] w, float[4,4,3,3] v").replace("r, w", "r, v")
    _, twin, _ = quantized(apart, f"{order}=int8/channel", w=w, v=w)
    feed = models.feeds(proto, seed=0)
    np.testing.assert_array_equal(run(after, feed)["y"], run(twin, feed)["y"])


def test_layers_of_the_same_format_go_on_sharing():
    model, _ = calibrated(SHARED, "first=int8/channel", "last=int8/channel")
    assert dtypes(model) == {"one": "int8", "two": "int8"}
    assert len({layer.weight_tensor.name for layer in model.layers()}) == 1


@pytest.mark.parametrize("options", [{}, {"activations": "float"}])
def test_three_that_share_a_weight(options):
    model, _ = calibrated(MATRICES, "two=int8/channel", **options)
    assert dtypes(model) == {"one": "int4", "two": "int8", "three": "int4"}
    names = [layer.weight_tensor.name for layer in model.layers()]
    assert names == ["w", "w.two", "w"]


# ------------------------------------------------------------------------------- weights alone


def test_weights_alone(tmp_path):
    text = (
        "g (float[N,64] x) => (float[] y) <float[64,64] w, float[64,48] v>"
        "{ [a] m = MatMul(x, w) r = Relu(m) [b] y = MatMul(r, v) }"
    )
    proto = parse(text)
    after, found = alone(proto, "int4/block=32", formats=("last=int8/channel",))
    assert found.done[:3] == [
        "last=int8/channel: 1 layers",
        "1 weights: int4/block=32, activations in float",
        "1 weights: int8/channel, activations in float",
    ]
    kinds = {n: t.data_type for n, t in stored_weights(after).items()}
    assert kinds == {"w_a_quantized": TensorProto.INT4, "v_b_quantized": TensorProto.INT8}
    scales = {t.name: [*t.dims] for t in after.graph.initializer if t.name.endswith("_scale")}
    assert scales == {"w_a_scale": [2, 64], "v_b_scale": [48]}
    assert fused_ops(after, tmp_path).count("MatMulNBits") == 2
    feed = models.feeds(proto, seed=0)
    assert sqnr(run(proto, feed)["y"], run(after, feed, "all")["y"]) > 15


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"formats": ("first=int16/channel",)}, "int16/channel weights.*use --format first=int8"),
        ({"formats": ("a*=int4/block=32",)}, r"blocks of weights; use --format a\*=int4/channel"),
        ({"formats": ("last=uint8",), "activations": "int8"}, "use --format last=int8$"),
        (
            {"formats": ("last=int4/block=48",), "activations": "float"},
            "not of 48; use --format last=int4/block=64",
        ),
        (
            {"formats": ("fc=int16/channel",), "activations": "float"},
            "use --format fc=int8/channel or int4/block=32",
        ),
    ],
)
def test_formats_without_kernels_are_refused(options, match):
    with pytest.raises(TargetError, match=match):
        Calibrate(**options).apply(load(parse(CHAIN)), Context())


def test_a_glob_that_names_nothing_is_refused_before_samples_are_read():
    with pytest.raises(RecipeError, match=r"'haed' matches no node.*near: head"):
        Calibrate(formats=("haed=int8/channel",)).apply(load(parse(CHAIN)), Context())


def test_what_is_no_format_is_refused_at_once():
    with pytest.raises(RecipeError, match="'first' is not SELECTOR=FORMAT"):
        Calibrate(formats=("first",))
    with pytest.raises(RecipeError, match=r"'first' is not SELECTOR=FORMAT \(pass 1 \(calibrate\)"):
        api.recipe.loads('[[pass]]\nname = "calibrate"\nformats = ["first"]')


def test_formats_in_recipes():
    formats = ("first=int8/channel", "head.*=int3/channel")
    given = api.recipe.loads(f'[[pass]]\nname = "calibrate"\nformats = {list(formats)}')
    assert given.passes == (Calibrate(formats=formats),)
    assert api.recipe.loads(api.recipe.dumps(given)) == given


def test_quantize_hands_formats_on(tmp_path):
    proto = parse(CHAIN)
    path, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(proto, path)
    formats = ["depthwise=int8/channel"]
    _, report = api.quantize(path, out, samples(proto), weights="int4/channel", formats=formats)
    assert [p.name for p in report.passes if "round" in p.name] == ["adaround"]  # by --weights
    assert "depthwise=int8/channel: 1 layers" in said(report)
    kinds = {n: t.data_type for n, t in stored_weights(onnx.load(out)).items()}
    assert {n for n, kind in kinds.items() if kind == TensorProto.INT8} == {"d_quantized"}
    assert {n for n, kind in kinds.items() if kind == TensorProto.INT4} == {
        *("w_quantized", "p_quantized", "v_head_quantized")
    }
