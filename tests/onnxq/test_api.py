"""The verbs as functions: files appear whole or not at all, errors say what to mend."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxq
from onnxq import encodings_json
from onnxq.errors import (
    CalibrationError,
    ModelError,
    OnnxqError,
    PassError,
    RecipeError,
    TargetError,
)
from onnxq.pass_manager import Changes
from onnxq.passes import Calibrate, InsertQDQ
from onnxq.recipe import Recipe
from onnxq.runtime import Session
from tests import models
from tests.models import parse

TEXT = (
    "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[4] b, float[5,4,3,3] v>"
    "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }"
)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "float.onnx"
    onnx.save(parse(TEXT), path)
    return path


def data(count=4):
    return [models.feeds(parse(TEXT), seed=seed) for seed in range(count)]


def test_quantize_writes_a_model_and_reports(source, tmp_path):
    out = tmp_path / "out.onnx"
    before = source.read_bytes()
    model, report = onnxq.quantize(source, out, data())
    assert source.read_bytes() == before
    onnx.checker.check_model(str(out), full_check=True)
    facts = report.facts
    assert facts["bytes"] == {"before": source.stat().st_size, "after": out.stat().st_size}
    assert facts["integers"]["share"] == 1
    assert facts["outputs"][0]["sqnr_db"] > 25
    metadata = {p.key: p.value for p in onnx.load(out).metadata_props}
    assert metadata["onnxq.version"] == onnxq.__version__
    assert model.metadata == metadata
    again = tmp_path / "recipe.toml"
    again.write_text(metadata["onnxq.recipe"])
    onnxq.run(again, source, tmp_path / "again.onnx", data())
    assert (tmp_path / "again.onnx").read_bytes() == out.read_bytes()


def test_a_model_in_memory_is_never_changed(source):
    model = onnxq.load(source)
    before = model.to_proto()
    onnxq.quantize(model, calib=data())
    assert model.to_proto() == before
    assert not model.encodings


def test_the_same_seed_gives_the_same_bytes(source, tmp_path):
    for name in ("a", "b"):
        onnxq.quantize(source, tmp_path / name, data(), seed=5)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_samples_may_be_read_only_once(source, tmp_path):
    class Reader:
        left = iter(data())

        def get_next(self):
            return next(self.left, None)

    facts = []
    for name, calib in enumerate((data(), iter(data()), Reader(), lambda: iter(data()))):
        _, report = onnxq.quantize(source, tmp_path / str(name), calib, threads=1)
        facts.append(report.facts["outputs"])
    assert facts[0][0]["samples"] == 4
    assert facts == facts[:1] * 4
    assert len({(tmp_path / str(name)).read_bytes() for name in range(4)}) == 1


def test_the_limit(source):
    _, report = onnxq.quantize(source, calib=data(9), limit=3)
    assert report.facts["outputs"][0]["samples"] == 3


def test_options_reach_calibrate(source):
    _, report = onnxq.quantize(
        source, calib=data(), weights="int8/tensor", method="minmax", exclude=["Conv_2"]
    )
    used = next(p.options for p in report.passes if p.name == "calibrate")
    assert (used["weights"], used["method"], used["exclude"]) == (
        "int8/tensor",
        "minmax",
        ["Conv_2"],
    )
    layers = {n["name"]: n["integer"] for n in report.facts["integers"]["layers"]}
    assert layers == {"Conv_0": True, "Conv_2": False}


def test_options_without_a_pass_to_take_them(source):
    with pytest.raises(RecipeError, match="no pass calibrate"):
        onnxq.quantize(source, calib=data(), recipe=Recipe(passes=(InsertQDQ(),)), weights="int8")


def test_encodings_instead_of_calibration(source, tmp_path):
    recipe = Recipe(passes=(Calibrate(), InsertQDQ()))
    first, _ = onnxq.quantize(source, calib=data(), recipe=recipe)
    path = tmp_path / "e.json"
    encodings_json.save(first.encodings, path)
    second, report = onnxq.quantize(source, recipe=recipe, encodings=path)
    assert [p.name for p in report.passes] == ["load-encodings", "insert-qdq"]
    assert "outputs" not in report.facts
    graphs = [model.to_proto().graph for model in (first, second)]
    for graph in graphs:
        del graph.value_info[:]  # one of the two knows more shapes
    assert graphs[0] == graphs[1]


def test_statistics_are_kept_and_reused(source, tmp_path):
    kept = tmp_path / "kept.npz"
    first, _ = onnxq.quantize(source, calib=data(), statistics=kept)
    stamp = kept.read_bytes()
    second, _ = onnxq.quantize(source, calib=data(), statistics=kept)
    assert kept.read_bytes() == stamp
    assert second.to_proto() == first.to_proto()
    other = tmp_path / "other.onnx"
    onnx.save(parse(TEXT, seed=9), other)
    with pytest.raises(OnnxqError, match="another model"):
        onnxq.quantize(other, calib=data(), statistics=kept)
    kept.write_bytes(b"broken")
    with pytest.raises(OnnxqError, match=r"kept\.npz"):
        onnxq.quantize(source, calib=data(), statistics=kept)


def test_quantizing_twice_is_refused(source, tmp_path):
    out = tmp_path / "out.onnx"
    onnxq.quantize(source, out, data())
    with pytest.raises(ModelError, match="quantized already"):
        onnxq.quantize(out, tmp_path / "twice.onnx", data())
    assert not (tmp_path / "twice.onnx").exists()


def test_destinations_that_cannot_be(source, tmp_path):
    before = source.read_bytes()
    for out, why in (
        (source, "is the input"),
        (tmp_path / "." / "float.onnx", "is the input"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "out.onnx", "no such folder"),
    ):
        with pytest.raises(OnnxqError, match=why):
            onnxq.quantize(source, out, data())
    link = tmp_path / "link.onnx"
    link.symlink_to(source)
    with pytest.raises(OnnxqError, match="is the input"):
        onnxq.quantize(source, link, data())
    assert source.read_bytes() == before


def nan_weight():
    proto = parse(TEXT)
    for tensor in proto.graph.initializer:
        if tensor.name == "v":
            array = numpy_helper.to_array(tensor).copy()
            array[0, 0, 0, 0] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(array, "v"))
    return proto


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"weights": "int16/channel"}, TargetError, "use --weights"),
        ({"activations": "int16"}, TargetError, "use --activations"),
        ({"weights": "int8/block=32"}, TargetError, "blocks"),
        ({"exclude": ["Covn"]}, RecipeError, "near: Conv"),
        ({"recipe": "defualt"}, RecipeError, "default"),
        ({"target": "ort-gpu"}, TargetError, "ort-cpu"),
        ({"calib": "missing"}, CalibrationError, "no such file"),
        ({"calib": [{"x": np.full((1, 3, 8, 8), np.nan, np.float32)}]}, CalibrationError, "x"),
        ({"calib": None}, CalibrationError, "samples"),
        ({"encodings": "missing.json"}, OnnxqError, "missing.json"),
        ({"limit": 0}, CalibrationError, "limit"),
    ],
)
def test_no_output_appears_on_an_error_and_an_old_one_survives(
    source, tmp_path, given, error, match
):
    out = tmp_path / "out.onnx"
    arguments = {"calib": data(), **given}
    for old in (None, b"old"):
        if old is not None:
            out.write_bytes(old)
        with pytest.raises(error, match=match):
            onnxq.quantize(source, out, **arguments)
        assert (out.read_bytes() if out.exists() else None) == old
    assert {p.name for p in tmp_path.iterdir()} == {"float.onnx", "out.onnx"}


def test_a_weight_of_nan_is_an_error_that_names_a_tensor(tmp_path):
    path, out = tmp_path / "nan.onnx", tmp_path / "out.onnx"
    onnx.save(nan_weight(), path)
    with pytest.raises(ModelError, match=r"NaN.*\bv\b"):
        onnxq.quantize(path, out, data())
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"not a model", "cut"])
def test_broken_models(source, tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(source.read_bytes()[:200] if content == "cut" else content)
    with pytest.raises(ModelError, match=r"broken\.onnx"):
        onnxq.quantize(path, tmp_path / "out.onnx", data())
    with pytest.raises(ModelError, match=r"nothing\.onnx"):
        onnxq.quantize(tmp_path / "nothing.onnx", tmp_path / "out.onnx", data())
    assert not (tmp_path / "out.onnx").exists()


def test_an_unforeseen_error_leaves_nothing(source, tmp_path, monkeypatch):
    def fail(self, model, ctx):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(InsertQDQ, "apply", fail)
    out = tmp_path / "out.onnx"
    with pytest.raises(PassError, match="insert-qdq failed: boom") as caught:
        onnxq.quantize(source, out, data())
    assert "calibrate" in caught.value.done
    assert not out.exists()


def test_compare(source, tmp_path):
    out = tmp_path / "out.onnx"
    onnxq.quantize(source, out, data())
    result = onnxq.compare(source, out, data(), timed=False)
    plain = result.to_dict()
    assert plain["outputs"][0]["name"] == "y"
    assert plain["outputs"][0]["sqnr_db"] > 25
    assert plain["bytes"] == {"float": source.stat().st_size, "other": out.stat().st_size}
    assert plain["samples"] == 4
    assert plain["latency_ms"] == {}
    assert plain["latency"] is None
    same = onnxq.compare(source, source, data(), limit=2, threads=1, runs=5)
    assert same.outputs[0].sqnr_db == 200
    assert same.samples == 2
    timed = same.latency
    assert (timed.runs, timed.threads, timed.provider) == (5, 1, "CPUExecutionProvider")
    assert same.latency_ms == (timed.reference_ms.median, timed.other_ms.median)
    for spread in (timed.reference_ms, timed.other_ms, timed.speedup):
        assert 0 < spread.low <= spread.median <= spread.high
    plain = same.to_dict()
    assert plain["latency"]["float_ms"]["median"] == plain["latency_ms"]["float"]
    with pytest.raises(OnnxqError, match="runs: wanted 1 or more, got 0"):
        onnxq.compare(source, source, data(), runs=0)


def test_compare_of_models_with_other_outputs(source, tmp_path):
    other = tmp_path / "other.onnx"
    onnx.save(parse("g (float[N,3,8,8] x) => (float[] z) { z = Relu(x) }"), other)
    with pytest.raises(OnnxqError):
        onnxq.compare(source, other, data())


def test_inspect(source):
    found = onnxq.inspect(source, shapes={"x": (1, 3, 8, 8)})
    assert found.operators == {"Conv": 2, "Relu": 1}
    assert found.opset == 17
    assert [layer.cost.name for layer in found.layers] == ["Conv_0", "Conv_2"]
    assert found.layers[0].cost.macs == 6 * 6 * 4 * 27
    assert found.layers[0].weight_shape == (4, 3, 3, 3)
    assert found.layers[0].low < 0 < found.layers[0].high
    assert found.layers[0].spread >= 1
    plain = found.to_dict()
    assert plain["layers"][1]["weight_shape"] == [5, 4, 3, 3]


# ---------------------------------------------------------------------- without samples

DIGITS = Path(__file__).parents[2] / "examples" / "digits"


def accuracy(path):
    with np.load(DIGITS / "test.npz") as test:
        got = Session(path).run({"input": test["input"]})["logits"].argmax(axis=1)
        return float((got == test["labels"]).mean())


@pytest.mark.parametrize("weights", ["int8/channel", "int8/tensor"])
def test_no_samples_are_needed_behind_batch_normalization(weights, tmp_path):
    out = tmp_path / "q.onnx"
    _, report = onnxq.quantize(DIGITS / "digits.onnx", out, data_free=True, weights=weights)
    assert any("synthetic samples" in note for note in report.notes)
    assert [p.name for p in report.passes][-2:] == ["bias-correction", "insert-qdq"]
    assert report.facts["integers"]["share"] == 1
    assert accuracy(out) >= accuracy(DIGITS / "digits.onnx") - 0.01


def test_samples_and_none_exclude_one_another(source, tmp_path):
    with pytest.raises(CalibrationError, match="none are wanted"):
        onnxq.quantize(source, tmp_path / "out.onnx", data(), data_free=True)
    assert not (tmp_path / "out.onnx").exists()


def test_one_scale_per_weight_takes_its_recipe(source):
    _, report = onnxq.quantize(source, None, data(), weights="int8/tensor")
    assert "cross-layer-equalization" in [p.name for p in report.passes]
    _, report = onnxq.quantize(source, None, data(), weights="int8/tensor", recipe="minmax")
    assert "cross-layer-equalization" not in [p.name for p in report.passes]


def test_equalize_model_keeps_the_function_and_the_model():
    model = onnxq.load(DIGITS / "digits.onnx")
    before = model.to_proto().SerializeToString(deterministic=True)
    even, report = onnxq.equalize_model(model)
    assert model.to_proto().SerializeToString(deterministic=True) == before
    assert [p.name for p in report.passes][-2:] == [
        "cross-layer-equalization",
        "high-bias-absorption",
    ]
    assert report.passes[-2].changes
    with np.load(DIGITS / "test.npz") as test:
        feed = {"input": test["input"][:64]}
    wanted, got = (Session(m.to_proto()).run(feed)["logits"] for m in (model, even))
    noise = np.square(got - wanted).mean() / np.square(wanted).mean()
    assert noise < 1e-4  # equalization is exact, absorption gives up what hardly ever occurs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own:
    """A pass of the caller's own."""

    name = "own"

    def apply(self, model, ctx):
        return Changes()


def test_passes_of_the_callers_own_run_and_are_named(tmp_path):
    """Nothing but their names is known to whoever reads the recipe in the file."""
    proto = models.parse(
        "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w> { y = Conv(x, w) }"
    )
    known = onnxq.recipe.load("minmax").passes
    chosen = onnxq.Recipe(passes=(Own(), onnxq.PassManager(known[0]), *known))
    model, report = onnxq.run(
        chosen, onnxq.load(proto), tmp_path / "out.onnx", [models.feeds(proto)]
    )
    assert [p.name for p in report.passes][:2] == ["own", "clean"]
    text = model.metadata["onnxq.recipe"]
    assert text.endswith("# and passes that onnxq does not name: own, pass-manager\n")
    assert onnxq.recipe.loads(text).passes == known
