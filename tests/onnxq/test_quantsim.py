"""Simulation as users of AIMET know it: to the bit as what is exported."""

import json
from functools import partial
from itertools import pairwise

import numpy as np
import onnx
import pytest

import onnxq
from onnxq import arithmetic, encodings_json
from onnxq.calibration import Calibration
from onnxq.completion import rounded
from onnxq.encoding import Encoding
from onnxq.errors import CalibrationError, ModelError, OnnxqError, RecipeError, TargetError
from onnxq.fitting import channels
from onnxq.model import load
from onnxq.passes import GPTQ, AdaRound
from onnxq.quantsim import QuantizationSimModel
from onnxq.runtime import Session
from tests import models
from tests.models import parse

TEXT = (
    "g (float[N,3,10,10] x) => (float[] y)"
    "<float[6,3,3,3] w, float[6] b, float[6] s, float[6] o, float[6] m, float[6] var,"
    " float[6,1,3,3] d, float[5,24] f, float[5] c> {"
    " k = Conv(x, w, b) n = BatchNormalization(k, s, o, m, var) r = Relu(n)"
    " e = Conv<group=6>(r, d) p = MaxPool<kernel_shape=[3,3], strides=[3,3]>(e)"
    " l = Flatten(p) y = Gemm<transB=1>(l, f, c) }"
)
PROTO = parse(TEXT)


def samples(count=6):
    return [models.feeds(PROTO, seed=s) for s in range(count)]


def sim_of(proto=PROTO, **options):
    sim = QuantizationSimModel(proto, **options)
    sim.compute_encodings(samples())
    return sim


def outputs(model, level="disabled"):
    session = Session(model if isinstance(model, (str, bytes)) else model.to_proto(), level=level)
    return [session.run(feed)["y"] for feed in samples(9)]


def simulated(sim):
    return [sim.session.run(None, feed)[0] for feed in samples(9)]


WIDTHS = [
    {},
    {"param_type": "int8/tensor"},
    {"param_type": "int4", "activation_type": "int8"},
    {"param_type": "int5", "activation_type": "int3"},
    {"param_type": "int16", "activation_type": "int16"},
    {"param_type": "int11", "activation_type": "int13"},
    {"param_type": "int2", "activation_type": "int2"},
    {"activation_type": "float"},
]


# What onnxruntime runs the exported file at for the same bits.
LEVELS = {"integer": "all", "float": "disabled"}


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("options", WIDTHS)
def test_it_is_the_exported_model_to_the_bit(options, kind, tmp_path):
    sim = sim_of(**options, arithmetic=kind)
    files = sim.export(tmp_path, "m")
    onnx.checker.check_model(files.qdq, full_check=True)
    onnx.checker.check_model(files.model, full_check=True)
    wanted = outputs(str(files.qdq), LEVELS[kind])
    for got, want in zip(simulated(sim), wanted, strict=True):
        np.testing.assert_array_equal(got, want)
    assert not any(np.array_equal(w, f) for w, f in zip(wanted, outputs(sim.model), strict=True))


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
@pytest.mark.parametrize("options", WIDTHS[:5])
def test_what_is_exported_loads_again(options, version, tmp_path):
    sim = sim_of(**options)
    files = sim.export(tmp_path, "m", encoding_version=version)
    assert json.loads(files.encodings.read_text())["version"] == version
    again = QuantizationSimModel(files.model, **options)
    again.load_encodings(files.encodings)
    assert dict(again.encodings) == dict(sim.encodings)
    for got, want in zip(simulated(again), simulated(sim), strict=True):
        np.testing.assert_array_equal(got, want)


INTEGER = {"QLinearConv", "QGemm"}
FLOAT = {"Conv", "FusedConv", "Gemm"}


@pytest.mark.parametrize(
    ("options", "last", "runs", "never"),
    [
        ({}, None, INTEGER, FLOAT),
        ({"param_type": "int4"}, None, INTEGER, FLOAT),
        ({"level": "extended"}, None, INTEGER, FLOAT),
        ({}, "int16", {"QLinearConv", "Gemm"}, {"QGemm", "Conv", "FusedConv"}),
        ({"activation_type": "int16"}, None, {"Conv", "Gemm"}, INTEGER),
        ({"arithmetic": "float"}, None, {"Conv", "Gemm"}, INTEGER),
        ({"arithmetic": "float", "level": "extended"}, None, {"Conv", "Gemm"}, INTEGER),
    ],
)
def test_kernels_are_of_integers_where_there_are_some(
    options, last, runs, never, tmp_path, monkeypatch
):
    path = tmp_path / "optimized.onnx"
    monkeypatch.setattr(arithmetic, "Session", partial(Session, optimized_path=path))
    sim = QuantizationSimModel(PROTO, **options)
    if last is not None:
        sim.set_precision("last", weights=last)
    sim.compute_encodings(samples())
    assert len(sim.session.run(None, samples(1)[0])) == 1
    found = {node.op_type for node in onnx.load(path).graph.node}
    assert runs <= found
    assert not never & found


@pytest.mark.parametrize("options", [{"arithmetic": "float", "level": "all"}, {}])
def test_arithmetics_and_levels_agree_but_for_ties(options):
    sim, other = sim_of(arithmetic="float"), sim_of(**options)
    steps = max(float(np.max(e.scale)) for e in sim.encodings.values())
    for got, want in zip(simulated(other), simulated(sim), strict=True):
        assert np.abs(got - want).max() <= 3 * steps
    files = [np.concatenate(simulated(s)).argmax(axis=1) for s in (sim, other)]
    assert np.mean(files[0] == files[1]) >= 0.9


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"arithmetic": "integers"}, r"no arithmetic 'integers'; did you mean integer\?"),
        ({"arithmetic": 8}, "no arithmetic 8; take integer or float"),
        ({"level": "disabled"}, "at level 'disabled' .* no integer kernels; take extended or all"),
        ({"level": "basic"}, "arithmetic='float'"),
    ],
)
def test_arithmetics_that_there_are_not(options, match):
    with pytest.raises(RecipeError, match=match):
        QuantizationSimModel(PROTO, **options)


def test_more_bits_are_closer_to_float():
    exact = np.concatenate(outputs(sim_of().model))
    errors = []
    for bits in (3, 4, 6, 8, 10, 12, 16):
        sim = sim_of(param_type=f"int{bits}", activation_type=f"int{bits}")
        errors.append(float(np.square(np.concatenate(simulated(sim)) - exact).mean()))
    assert all(a > 3 * b for a, b in pairwise(errors)), errors


def test_a_callback_feeds_what_samples_do():
    seen = []

    def evaluate(session, count):
        assert session.get_inputs()[0].name == "x"
        for feed in samples(count):
            seen.append(session.run(["y"], feed)[0])
        return 0.5

    sim = QuantizationSimModel(PROTO)
    sim.compute_encodings(evaluate, 6)
    assert dict(sim.encodings) == dict(sim_of().encodings)
    for got, want in zip(seen, outputs(sim.model, "all"), strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # of the float model
    other = QuantizationSimModel(PROTO)
    other.compute_encodings(forward_pass_callback=evaluate, forward_pass_callback_args=6)
    assert dict(other.encodings) == dict(sim.encodings)
    alone = QuantizationSimModel(PROTO)
    alone.compute_encodings(lambda session: evaluate(session, 6))
    assert dict(alone.encodings) == dict(sim.encodings)


@pytest.mark.parametrize("scheme", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("name", ["plain", "gated", "float"])
def test_a_callback_runs_each_sample_once(name, scheme, monkeypatch):
    gated = (
        "g (float[N,3,10,10] x) => (float[] y) <float[6,3,3,3] w, float[4,12,1,1] v> {"
        " k = Conv(x, w) s = Sigmoid(k) g = Mul(k, s) r = Relu(g) c = Concat<axis=1>(g, r)"
        " p = MaxPool<kernel_shape=[2,2]>(c) y = Conv(p, v) }"
    )
    proto = parse(gated, opset=12) if name == "gated" else PROTO
    options = {"quant_scheme": scheme}
    if name == "float":
        options["activation_type"] = "float"
    feeds = [models.feeds(proto, seed=s) for s in range(6)]
    wanted = QuantizationSimModel(proto, **options)
    wanted.compute_encodings(feeds)

    ran, run = [], Session.run_shared
    monkeypatch.setattr(Session, "run_shared", lambda self, feed: ran.append(0) or run(self, feed))
    sim = QuantizationSimModel(proto, **options)
    sim.compute_encodings(lambda session: [session.run(None, feed) for feed in feeds])
    assert len(ran) == len(feeds)
    assert dict(sim.encodings) == dict(wanted.encodings)
    assert sim.encodings.float_nodes == wanted.encodings.float_nodes


def test_the_same_encodings_as_the_passes_choose():
    sim = sim_of()
    model, _ = onnxq.PassManager(
        onnxq.passes.Clean(), onnxq.passes.FoldBatchNorm(), onnxq.passes.Calibrate(exits="tensor")
    )(PROTO, samples())
    assert dict(sim.encodings) == dict(model.encodings)


def test_samples_in_other_forms():
    wanted = dict(sim_of().encodings)
    for given in (
        Calibration(samples()),
        iter(samples()),
        {"x": np.concatenate([f["x"] for f in samples()])},
    ):
        sim = QuantizationSimModel(PROTO)
        sim.compute_encodings(given)
        assert sim.encodings.keys() == wanted.keys()
        assert sim.encodings["x"].dtype == "uint8"


def test_schemes_have_the_names_of_aimet():
    ranges = {}
    for scheme in ("min_max", "tf_enhanced", "minmax", "mse"):
        ranges[scheme] = dict(sim_of(quant_scheme=scheme).encodings)
    assert ranges["min_max"] == ranges["minmax"]
    assert ranges["tf_enhanced"] == ranges["mse"]
    assert ranges["mse"] != ranges["minmax"]
    with pytest.raises(RecipeError, match="no method 'max_min'"):
        QuantizationSimModel(PROTO, quant_scheme="max_min")


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("selector", ["r", "Conv_0", "first"])
def test_the_precision_of_an_activation(selector):
    sim = QuantizationSimModel(PROTO)
    sim.set_precision(selector, activations="int4")
    sim.compute_encodings(samples())
    assert {n for n, e in sim.encodings.items() if e.dtype == "uint4"} == {"r"}
    assert sim.simulated_only == {"r": "uint4"}
    values = np.unique([f["x"] for f in samples()])
    assert len(np.unique(sim.encodings["r"].quantize(values))) <= 16


def test_what_a_relu_hides_has_no_precision():
    sim = QuantizationSimModel(PROTO)
    with pytest.raises(RecipeError, match="'n' matches no node"):
        sim.set_precision("n", activations="int4")


def test_the_precision_of_weights():
    sim = QuantizationSimModel(PROTO)
    (first, second, last) = sim.model.layers()
    sim.set_precision("first", weights="int4")
    sim.set_precision(last.weight_tensor.name, weights="int16/tensor")
    sim.compute_encodings(samples())
    found = [sim.encodings[x.weight_tensor.name] for x in (first, second, last)]
    assert [e.dtype for e in found] == ["int4", "int8", "int16"]
    assert [e.axis for e in found] == [0, 0, None]
    assert sim.simulated_only == {last.weight_tensor.name: "int16"}
    for layer, encoding in zip((first, second, last), found, strict=True):
        assert len(np.unique(encoding.quantize(layer.weight))) <= 1 << encoding.bits


def test_moved_data_share_the_precision_of_their_source():
    sim = QuantizationSimModel(PROTO)
    sim.set_precision("l", activations="int6")
    sim.compute_encodings(samples())
    assert {n for n, e in sim.encodings.items() if e.dtype == "uint6"} == {"e", "p", "l"}


def test_some_layers_stay_in_float():
    sim = QuantizationSimModel(PROTO)
    sim.set_precision("last", activations="int8")
    sim.set_precision("Gemm", weights="float")
    sim.compute_encodings(samples())
    (gemm,) = (x for x in sim.model.layers() if x.op == "Gemm")
    assert gemm.weight_tensor.name not in sim.encodings
    assert sim.encodings.float_nodes[gemm.name] == "excluded"
    by_weight = QuantizationSimModel(PROTO)
    by_weight.set_precision(gemm.weight_tensor.name, weights="float")
    for other in (QuantizationSimModel(PROTO, exclude=["Gemm"]), by_weight):
        other.compute_encodings(samples())
        assert dict(other.encodings) == dict(sim.encodings)
    first = QuantizationSimModel(PROTO)
    first.set_precision("first", weights="float")
    first.compute_encodings(samples())
    assert [n for n, why in first.encodings.float_nodes.items() if why == "excluded"] == ["Conv_0"]
    none = QuantizationSimModel(PROTO)
    none.set_precision("p", activations="float")
    none.compute_encodings(samples())
    assert "p" not in none.encodings


@pytest.mark.parametrize(
    ("selector", "given", "match"),
    [
        ("x", {}, "no format"),
        ("Conv", {"weights": "int99"}, "no number format"),
        ("Softmax", {"weights": "int4"}, "matches no node"),
        ("MaxPool", {"weights": "int4"}, "none with constant weights"),
        ("nothing", {"activations": "int4"}, "matches no node"),
        ("nothing", {"activations": "float"}, "matches no node"),
    ],
)
def test_precisions_that_mean_nothing(selector, given, match):
    with pytest.raises(RecipeError, match=match):
        QuantizationSimModel(PROTO).set_precision(selector, **given)


def test_frozen_encodings_stay():
    sim = sim_of()
    kept = Encoding("uint8", np.array(0.5, np.float32), np.array(3, np.int32))
    sim.encodings["p"] = kept
    sim.freeze("p", "w*")
    weight = sim.encodings["w"]
    sim.compute_encodings([{"x": 3 * f["x"]} for f in samples()])
    assert sim.encodings["p"] == kept
    assert sim.encodings["e"] == kept  # one grid before and behind what only moves data
    assert sim.encodings["l"] == kept
    assert sim.encodings["w"] == weight
    assert sim.encodings["x"] != sim_of().encodings["x"]
    with pytest.raises(RecipeError, match="matches no tensor with an encoding; did you mean p"):
        sim.freeze("pp")


def test_encodings_may_be_edited():
    sim = sim_of()
    before = simulated(sim)
    sim.encodings["x"] = Encoding("uint8", np.array(0.5, np.float32), np.array(128, np.int32))
    after = simulated(sim)
    assert not any(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    for got, want in zip(after, outputs(sim.to_onnx_qdq(), "all"), strict=True):
        np.testing.assert_array_equal(got, want)


# ---------------------------------------------------------------------- files


def test_half_a_file_and_samples_for_the_rest(tmp_path):
    sim = sim_of(quant_scheme="min_max")
    half = {n: e for n, e in sim.encodings.items() if n in ("x", "w", "r")}
    encodings_json.save(onnxq.Encodings(half), tmp_path / "half.json")
    other = QuantizationSimModel(PROTO)
    notes = other.load_encodings(tmp_path / "half.json", freeze=True)
    assert any("has no encoding" in note for note in notes)
    other.compute_encodings(samples())
    assert {n: other.encodings[n] for n in half} == half
    assert other.encodings.keys() == sim.encodings.keys()


def test_a_file_of_another_model_changes_nothing(tmp_path):
    sim = sim_of()
    before = dict(sim.encodings)
    encodings_json.save(onnxq.Encodings({"rr": before["r"], "q": before["x"]}), tmp_path / "e.json")
    with pytest.raises(RecipeError, match=r"no tensor 'rr', nor 1 more of 2.*did you mean r\?"):
        sim.load_encodings(tmp_path / "e.json")
    assert dict(sim.encodings) == before
    notes = sim.load_encodings(tmp_path / "e.json", strict=False)
    assert notes[0] == "2 encodings of tensors that the model does not have"


def test_export_without_models(tmp_path):
    files = sim_of().export(tmp_path, "m", export_model=False)
    assert (files.model, files.qdq) == (None, None)
    assert [f.name for f in tmp_path.iterdir()] == ["m.encodings"]


def test_a_complete_export_names_what_aimet_rounds(tmp_path):
    sim = sim_of()
    files = sim.export(tmp_path, "m", complete=samples())
    found = encodings_json.load(files.encodings, channels(sim.model))
    assert {"y", "e"} <= found.keys() == {*rounded(sim.model)}
    assert sim.encodings.keys() - found.keys() == {"p", "l"}  # moved data
    assert {n: e for n, e in found.items() if n != "y"} == {
        n: sim.encodings[n] for n in found if n != "y"
    }
    seen = np.concatenate(outputs(sim.model))[: len(samples())]
    scores = found["y"]
    assert scores.low <= seen.min() / 2
    assert scores.high >= seen.max() / 2
    assert "y" not in sim.encodings
    assert sim.report.notes == []


def test_passes_run_on_the_simulation():
    sim = sim_of(param_type="int4")
    exact = np.concatenate(outputs(sim.model))
    nearest = np.square(np.concatenate(simulated(sim)) - exact).mean()
    for step in (GPTQ(), AdaRound()):
        other = sim_of(param_type="int4")
        report = other.apply(step, inputs=samples())
        assert [p.name for p in report.passes] == [step.name]
        error = np.square(np.concatenate(simulated(other)) - exact).mean()
        assert error < nearest


# ---------------------------------------------------------------------- what it refuses


def test_there_are_no_encodings_at_first():
    sim = QuantizationSimModel(PROTO)
    for use in (lambda: sim.session, sim.to_onnx_qdq, lambda: sim.export(".", "m")):
        with pytest.raises(CalibrationError, match="no encodings yet; call"):
            use()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "one of the two"),
        ((lambda session: None,), "fed nothing"),
        (([], 5), "no callback"),
        ((3,), "samples cannot come from int"),
    ],
)
def test_nothing_to_compute_from(arguments, match):
    with pytest.raises(CalibrationError, match=match):
        QuantizationSimModel(PROTO).compute_encodings(*arguments)


def test_feeds_and_outputs_that_are_not_there():
    sim = sim_of()
    with pytest.raises(CalibrationError, match="no array for input 'x'"):
        sim.session.run(None, {"xx": np.zeros(3)})
    with pytest.raises(ModelError, match="no output 'z'"):
        sim.session.run(["z"], samples(1)[0])
    assert sim.session.get_outputs()[0].name == "y"
    assert sim.session.get_inputs()[0].type == "tensor(float)"
    assert sim.session.get_inputs()[0].shape[1:] == [3, 10, 10]
    assert sim.session.get_providers() == ["CPUExecutionProvider"]


def test_folders_and_versions_that_are_not_there(tmp_path):
    sim = sim_of()
    with pytest.raises(OnnxqError, match="no such folder"):
        sim.export(tmp_path / "none", "m")
    with pytest.raises(RecipeError, match=r"no version '3\.0\.0'"):
        sim.export(tmp_path, "m", encoding_version="3.0.0")
    assert [*tmp_path.iterdir()] == []


def test_the_file_that_is_given_is_never_replaced(tmp_path):
    onnx.save(PROTO, tmp_path / "m.onnx")
    before = (tmp_path / "m.onnx").read_bytes()
    sim = sim_of(tmp_path / "m.onnx")
    with pytest.raises(OnnxqError, match=r"is the input .*m\.onnx"):
        sim.export(tmp_path, "m")
    assert (tmp_path / "m.onnx").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"]
    assert sim.export(tmp_path, "other").model == tmp_path / "other.onnx"


def test_types_without_a_meaning():
    with pytest.raises(RecipeError, match="no number format 'int17'"):
        QuantizationSimModel(PROTO, param_type="int17")
    with pytest.raises(TargetError, match="nothing to quantize"):
        QuantizationSimModel(PROTO, param_type="float", activation_type="float")


def test_the_model_that_is_given_stays_as_it_is():
    before = PROTO.SerializeToString(deterministic=True)
    given = load(PROTO)
    sim = QuantizationSimModel(given)
    sim.compute_encodings(samples())
    assert PROTO.SerializeToString(deterministic=True) == before
    assert not given.encodings
