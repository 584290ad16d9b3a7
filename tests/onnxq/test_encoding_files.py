"""`onnxq encodings`: export, convert, apply, diff."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxq
from onnxq import encoding_files, encodings_json
from onnxq.cli import main
from onnxq.completion import rounded
from onnxq.encoding import Encoding, Encodings
from onnxq.errors import CalibrationError, OnnxqError, RecipeError
from onnxq.model import load
from onnxq.quantsim import QuantizationSimModel
from onnxq.runtime import Session

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
MODEL, CALIB = DIGITS / "digits.onnx", DIGITS / "calib"


def run(*args):
    return CliRunner().invoke(main, ["encodings", *map(str, args)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A simulation's files of each version: float model, encodings, Q/DQ model."""
    folder = tmp_path_factory.mktemp("files")
    sim = QuantizationSimModel(MODEL)
    sim.compute_encodings(CALIB)
    for version in ("0.6.1", "1.0.0", "2.0.0"):
        sim.export(folder, version, encoding_version=version)
    return folder


def logits(model):
    with np.load(DIGITS / "test.npz") as test:
        return Session(model, level="disabled").run({"input": test["input"]})["logits"]


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
def test_apply_makes_the_exported_model_again(folder, version, tmp_path):
    out = tmp_path / "out.onnx"
    result = run("apply", folder / f"{version}.onnx", folder / f"{version}.encodings", out)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(logits(out), logits(folder / f"{version}.qdq.onnx"))


def test_a_complete_file_keeps_what_is_known_and_adds_the_rest(folder, tmp_path):
    source, out, plain = folder / "2.0.0.qdq.onnx", tmp_path / "all.json", tmp_path / "some.json"
    assert run("export", source, plain).exit_code == 0
    options = ("--complete", "--calib", CALIB, "--limit", 8, "--float", tmp_path / "float.onnx")
    for version in ("1.0.0", "2.0.0"):
        result = run("export", source, out, "--to", version, *options)
        assert result.exit_code == 0, result.output
        model = load(tmp_path / "float.onnx")
        found = encoding_files.read(out, model)
        assert found.keys() == {*rounded(model)}
        known = encoding_files.read(plain)
        assert {n: known[n] for n in found if n in known} == {
            n: found[n] for n in found if n in known
        }
        assert found.keys() - known.keys() == {"logits", "depthwise/bn.out"}


@pytest.mark.parametrize("options", [["--complete"], ["--calib", CALIB]])
def test_samples_are_for_complete_files_alone(folder, options, tmp_path):
    result = run("export", folder / "1.0.0.qdq.onnx", tmp_path / "out.json", *options)
    assert result.exit_code == 2
    assert "give both or none" in result.output
    assert [*tmp_path.iterdir()] == []


def test_apply_folds_batch_normalization_first(folder, tmp_path):
    assert any(n.op == "BatchNormalization" for n in load(MODEL).graph.nodes)
    _, report = encoding_files.apply(
        MODEL, folder / "1.0.0.encodings", tmp_path / "out.onnx", CALIB
    )
    assert [p.name for p in report.passes] == ["fold-batch-norm", "load-encodings", "insert-qdq"]
    assert report.facts["integers"]["share"] == 1
    assert report.facts["outputs"][0]["sqnr_db"] > 25


def test_what_the_file_forgot_is_completed(folder, tmp_path):
    whole = encodings_json.load(folder / "2.0.0.encodings")
    half = Encodings({n: e for i, (n, e) in enumerate(whole.items()) if i % 2})
    half[next(iter(half))] = odd = Encoding("uint8", np.array(0.5, "f4"), np.array(0, "i4"))
    file, out = tmp_path / "half.json", tmp_path / "out.onnx"
    encodings_json.save(half, file)
    result = run("apply", folder / "2.0.0.onnx", file, out)
    assert result.exit_code == 0
    assert "in float: stem/conv (Conv): its input input is not quantized" in result.stdout
    assert "depthwise/conv.weight: nothing in integers reads or writes it" in result.stdout
    result = run("apply", folder / "2.0.0.onnx", file, out, "--complete", "--calib", CALIB)
    assert result.exit_code == 0, result.output
    assert "in float" not in result.stdout
    found = encoding_files.read(out)
    assert found[next(iter(half))] == odd
    for name, encoding in half.items():
        np.testing.assert_allclose(found[name].scale, encoding.scale, rtol=2.5e-7)
    assert found.keys() >= whole.keys() - {"logits"}


def test_export_reads_foreign_and_own_models(folder, tmp_path):
    out, floats = tmp_path / "out.json", tmp_path / "float.onnx"
    result = run("export", folder / "2.0.0.qdq.onnx", out, "--float", floats)
    assert result.exit_code == 0, result.output
    assert (
        encodings_json.load(out).tensors == encodings_json.load(folder / "2.0.0.encodings").tensors
    )
    again = tmp_path / "again.onnx"
    assert run("apply", floats, out, again, "--quiet").exit_code == 0
    np.testing.assert_array_equal(logits(again), logits(folder / "2.0.0.qdq.onnx"))


@pytest.mark.parametrize("source", ["0.6.1", "1.0.0", "2.0.0"])
@pytest.mark.parametrize("target", ["0.6.1", "1.0.0", "2.0.0", "overrides"])
def test_conversions_keep_every_scale(folder, source, target, tmp_path):
    model, out = folder / "1.0.0.onnx", tmp_path / "out.json"
    result = run("convert", folder / f"{source}.encodings", out, "--to", target, "--model", model)
    assert result.exit_code == 0, result.output
    wanted = encodings_json.load(folder / "2.0.0.encodings").tensors
    found = encoding_files.read(out, load(model))
    assert found.keys() <= wanted.keys()
    assert len(wanted) - len(found) in (0, 2)  # moved data, which come back as they are loaded
    assert {n: wanted[n] for n in found} == dict(found)
    diff = encoding_files.diff(folder / "2.0.0.encodings", out, model)
    assert (diff.equal, diff.different, diff.only_second) == (len(found), [], [])


def test_conversion_without_a_model(folder, tmp_path):
    out = tmp_path / "out.json"
    result = run("convert", folder / "2.0.0.encodings", out, "--to", "1.0.0")
    assert result.exit_code == 1
    assert "keeps weights and activations apart; give the model" in result.stderr
    result = run("convert", folder / "1.0.0.encodings", out)
    assert result.exit_code == 1
    assert "does not say along which axis its scales run" in result.stderr
    assert not out.exists()


def test_differences_in_steps(tmp_path):
    def grid(scale, zero=0, dtype="uint8", axis=None):
        shape = np.shape(scale)
        return Encoding(dtype, np.array(scale, "f4"), np.full(shape, zero, "i4"), axis)

    first = {"same": grid(1), "x": grid(1), "w": grid([1, 2], dtype="int8", axis=0), "a": grid(1)}
    second = {"same": grid(1), "x": grid(1.5, 2), "w": grid([1, 1], dtype="int8", axis=0)}
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, tensors in zip(files, (first, second | {"b": grid(1)}), strict=True):
        encodings_json.save(Encodings(tensors), path)
    result = run("diff", *files, "--json", tmp_path / "d.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "d.json").read_text())
    assert found == {
        "equal": 1,
        "different": [
            # 255 of 1 against 253 of 1.5: 379.5
            {"name": "x", "first": "uint8 [0, 255]", "second": "uint8 [-3, 379.5]", "steps": 124.5},
            {
                "name": "w",
                "first": "int8 [-256, 254], 2 scales",
                "second": "int8 [-128, 127], 2 scales",
                "steps": 64.0,
            },
        ],
        "only_first": ["a"],
        "only_second": ["b"],
    }
    assert "only in the first: a" in result.stdout
    assert "1 encodings are the same, 2 differ" in result.stdout


def test_a_model_beside_a_file(folder):
    result = run("diff", folder / "2.0.0.encodings", folder / "1.0.0.qdq.onnx")
    assert result.stdout.endswith("encodings are the same, 0 differ\n")


# ---------------------------------------------------------------------- what is refused


def test_complete_needs_samples(folder, tmp_path):
    result = run("apply", MODEL, folder / "1.0.0.encodings", tmp_path / "o.onnx", "--complete")
    assert (result.exit_code, "--complete needs samples" in result.stderr) == (2, True)
    with pytest.raises(CalibrationError, match="need samples"):
        encoding_files.apply(MODEL, folder / "1.0.0.encodings", complete=True)


@pytest.mark.parametrize("verb", ["apply", "convert", "export"])
def test_nothing_is_written_where_something_is_wrong(verb, folder, tmp_path):
    broken = tmp_path / "broken.json"
    text = (folder / "2.0.0.encodings").read_text().replace('"input"', '"imput"')
    broken.write_text(text if verb == "apply" else text.replace("uint8", "uint99"))
    out = tmp_path / "out"
    arguments = {"apply": (MODEL, broken, out), "convert": (broken, out), "export": (MODEL, out)}
    result = run(verb, *arguments[verb])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    said = {"apply": "did you mean input?", "convert": "no integer type", "export": "no Dequantize"}
    assert said[verb] in result.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["broken.json"]


def test_no_input_is_overwritten(folder):
    before = (folder / "1.0.0.encodings").read_bytes()
    result = run("convert", folder / "1.0.0.encodings", folder / "1.0.0.encodings")
    assert "is the input" in result.stderr
    assert (folder / "1.0.0.encodings").read_bytes() == before


def test_encodings_of_quantize_go_with_exclude_alone(folder, tmp_path):
    file, out = folder / "2.0.0.encodings", tmp_path / "out.onnx"
    given = ["quantize", MODEL, out, "--encodings", file, "--recipe", "minmax"]
    for option in (
        ("--weights", "int4/channel"),
        ("--activations", "int8"),
        ("--method", "mse"),
        ("--format", "first=int4"),
    ):
        result = CliRunner().invoke(main, [str(a) for a in (*given, *option)])
        assert result.exit_code == 2
        assert f"{option[0]} would choose what --encodings says already" in result.stderr
    with pytest.raises(RecipeError, match="encodings are given, and say themselves what weights"):
        onnxq.quantize(MODEL, None, weights="int4/channel", encodings=file)
    result = CliRunner().invoke(main, [str(a) for a in (*given, "--exclude", "Gemm")])
    assert result.exit_code == 0, result.output
    gemm = [n for n in onnx.load(out).graph.node if n.op_type == "Gemm"]
    assert gemm
    weights = {t.name for t in onnx.load(out).graph.initializer}
    assert all(n.input[1] in weights for n in gemm)  # float constants, no DequantizeLinear
    with pytest.raises(OnnxqError, match="matches no node"):
        onnxq.quantize(MODEL, None, encodings=file, recipe="minmax", exclude=["Softmax"])
