"""`onnxq compress` on the trained example: budget met, accuracy kept, one line where it is not."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxq as package
from onnxq import recipe
from onnxq.analysis.cost import layer_costs, tensor_shapes
from onnxq.cli import main
from onnxq.compression import compress
from onnxq.runtime import Session
from tests.models import parse

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
MODEL, CALIB = DIGITS / "digits.onnx", DIGITS / "calib"


def onnxq(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def right(path):
    """Percent of the test pictures that a model gets right."""
    with np.load(DIGITS / "test.npz") as test:
        found = Session(path).run({"input": test["input"]})["logits"].argmax(1)
        return 100 * np.mean(found == test["labels"])


def macs(model):
    return sum(c.macs for c in layer_costs(model, tensor_shapes(model)))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    out = folder / "digits.half.onnx"
    options = ["--json", folder / "facts.json", "--report", folder / "report.html"]
    before = MODEL.read_bytes()
    result = onnxq("compress", MODEL, out, "--calib", CALIB, "--macs", 0.5, *options)
    assert result.exit_code == 0, result.output
    assert MODEL.read_bytes() == before
    return folder, result


def test_half_of_the_computation_and_nearly_all_of_the_accuracy(half):
    folder, _ = half
    out = folder / "digits.half.onnx"
    onnx.checker.check_model(out, full_check=True)
    whole, left = (macs(package.load(path)) for path in (MODEL, out))
    assert 0.4 < left / whole <= 0.5
    assert right(MODEL) - right(out) <= 1.5
    facts = json.loads((folder / "facts.json").read_text())["compression"]
    assert facts["macs"] == {"before": whole, "after": left}
    saved = sum(layer["macs"]["before"] - layer["macs"]["after"] for layer in facts["layers"])
    assert whole - saved == left


def test_what_is_told(half):
    folder, result = half
    facts = json.loads((folder / "facts.json").read_text())
    page = (folder / "report.html").read_text()
    for layer in facts["compression"]["layers"]:
        assert layer["name"] in result.stdout
        assert layer["name"] in page
        assert layer["method"] in result.stdout
    share = 100 * facts["compression"]["macs"]["after"] / facts["compression"]["macs"]["before"]
    assert f"{share:.1f} %" in result.stdout
    assert f"{share:.1f} %" in page
    assert 'id="plot-tradeoff"' in page
    methods = {p["method"] for p in facts["compression"]["tradeoff"]["points"]}
    assert methods == {"auto", "spatial-svd", "weight-svd"}
    assert f"SQNR {facts['outputs'][0]['sqnr_db']:.1f} dB" in result.stdout
    assert "left alone by compress: depthwise/conv: it has 16 groups" in result.stdout
    assert "in float: " not in result.stdout
    assert "in float (" not in page
    assert "reconstruct layers" in result.stderr


def test_the_recipe_in_the_file_does_it_again(half, tmp_path):
    folder, _ = half
    model = package.load(folder / "digits.half.onnx")
    steps = recipe.loads(model.metadata["onnxq.recipe"])
    package.run(steps, MODEL, tmp_path / "again.onnx", CALIB)
    assert (tmp_path / "again.onnx").read_bytes() == (folder / "digits.half.onnx").read_bytes()


def test_compress_then_quantize(tmp_path):
    out = tmp_path / "digits.int8.onnx"
    result = onnxq("compress", MODEL, out, "--calib", CALIB, "--macs", 0.6, "--then-quantize")
    assert result.exit_code == 0, result.output
    assert "MACs in integers  100.0 %" in " ".join(result.stdout.split("\n")).replace("   ", "  ")
    assert out.stat().st_size < 0.45 * MODEL.stat().st_size
    assert right(MODEL) - right(out) <= 2.0


@pytest.mark.parametrize("method", ["spatial-svd", "weight-svd"])
def test_one_method(method):
    model, report = compress(MODEL, None, CALIB, macs=0.7, method=method)
    layers = report.facts["compression"]["layers"]
    assert {layer["method"] for layer in layers} == {method}
    assert macs(model) <= 0.7 * macs(package.load(MODEL))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--macs", 0.01], r"macs: a share of 0.01 cannot be met; 0."),
        (["--macs", 0], "macs: wanted a share in (0, 1], got 0"),
        (["--bytes", 1.5], "wanted a share in (0, 1], got 1.5"),
        (["--macs", "nan"], "got nan"),
        (["--macs", 0.5, "--method", "spatial"], "no method 'spatial'; did you mean spatial-svd?"),
        (["--macs", 0.5, "--search", "best"], "search: wanted one of optimal, greedy, got 'best'"),
        (["--macs", 0.5, "--exclude", "heat*"], "'heat*' matches no node and no operator type"),
        (["--macs", 0.5, "--multiple", 64], "no rank that is a multiple of 64 saves anything"),
        (["--macs", 0.5, "--sensitivities", MODEL], "is the input"),
        (["--macs", 0.5, "--sensitivities", CALIB / "nothing" / "s.json"], "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(options, says, tmp_path):
    result = onnxq("compress", MODEL, tmp_path / "out.onnx", "--calib", CALIB, *options)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert result.stdout == ""
    assert [*tmp_path.iterdir()] == []


def test_sensitivities_that_are_none(tmp_path):
    (tmp_path / "s.json").write_text("{}")
    options = ["--macs", 0.5, "--sensitivities", tmp_path / "s.json"]
    result = onnxq("compress", MODEL, tmp_path / "out.onnx", "--calib", CALIB, *options)
    assert result.exit_code == 1
    assert "is no table of sensitivities" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    "options", [[], ["--macs", 0.5, "--bytes", 0.5], ["--macs", "half"], ["--multiple", 0]]
)
def test_wrong_usage_is_exit_2(options, tmp_path):
    result = onnxq("compress", MODEL, tmp_path / "out.onnx", "--calib", CALIB, *options)
    assert result.exit_code == 2
    without = onnxq("compress", MODEL, tmp_path / "out.onnx", "--macs", 0.5)
    assert without.exit_code == 2
    assert "give samples (--calib PATH)" in without.stderr


def test_shapes_that_depend_on_the_data_are_left_alone():
    text = (
        "g (float[4,16] x) => (float[] y)"
        "<float[16,16] w, float[16,16] v, float z, int64[1] axes> {"
        "  a = MatMul(x, w) f = ReduceSum <keepdims = 0> (x, axes) k = Greater(f, z)"
        "  b = Compress <axis = 0> (a, k) y = MatMul(b, v) }"
    )
    proto = parse(text, axes=[1], z=0.0)
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(4, 16)).astype(np.float32)} for _ in range(20)]
    model, report = compress(proto, None, data, macs=0.9, multiple=1)
    assert {layer["name"] for layer in report.facts["compression"]["layers"]} == {"MatMul_0"}
    assert report.facts["compression"]["refused"] == {"MatMul_4": "its shapes depend on the data"}
    assert len(model.layers()) == 3
