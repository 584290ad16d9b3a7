"""The command line on the digits example: exit codes, streams, files."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from onnxq.cli import main
from onnxq.runtime import Session

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
MODEL, CALIB = DIGITS / "digits.onnx", DIGITS / "calib"


def onnxq(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def test_quantize_compare_and_reuse(tmp_path):
    out, facts, kept = tmp_path / "a.onnx", tmp_path / "a.json", tmp_path / "kept.npz"
    saved = tmp_path / "encodings.json"
    before = MODEL.read_bytes()
    result = onnxq(
        "quantize", MODEL, out, "--calib", CALIB, "--json", facts, "--statistics", kept,
        "--save-encodings", saved,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "MACs in integers" in result.stdout
    assert "MACs in integers" not in result.stderr
    assert MODEL.read_bytes() == before
    onnx.checker.check_model(str(out), full_check=True)
    found = json.loads(facts.read_text())
    assert found["integers"]["share"] == 1.0
    assert found["outputs"][0]["sqnr_db"] > 25
    assert found["bytes"]["after"] == out.stat().st_size
    again = onnxq(
        "quantize", MODEL, tmp_path / "b.onnx", "--calib", CALIB, "--statistics", kept, "--quiet"
    )
    assert again.exit_code == 0
    assert again.output == ""
    assert (tmp_path / "b.onnx").read_bytes() == out.read_bytes()
    given = onnxq("quantize", MODEL, tmp_path / "c.onnx", "--encodings", saved, "--calib", CALIB)
    assert given.exit_code == 0, given.output
    feed = dict(np.load(next(iter(sorted(CALIB.iterdir())))))
    runs = [Session(tmp_path / n).run(feed)["logits"] for n in ("a.onnx", "c.onnx")]
    assert np.array_equal(*runs)
    compared = onnxq("compare", MODEL, out, "--data", CALIB, "--no-latency")
    assert compared.exit_code == 0, compared.output
    assert "logits" in compared.stdout
    assert "latency" not in compared.stdout
    timed = onnxq("compare", MODEL, out, "--data", CALIB, "--runs", 3, "--threads", 1)
    ms = r"\d+\.\d\d ms \(\d+\.\d\d to \d+\.\d\d\)"
    ratio = r"speedup \d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)"
    assert re.search(f"^latency: {ms} -> {ms} a sample, {ratio}$", timed.stdout, re.M)
    assert "of 3 runs each, in turns, 2 before left out" in timed.stdout
    assert "CPUExecutionProvider, threads: 1\n" in timed.stdout


def test_low_bits_are_shown(tmp_path):
    out = tmp_path / "q.onnx"
    result = onnxq("quantize", MODEL, out, "--calib", CALIB, "--limit", 16, "--weights", "int4")
    assert result.exit_code == 0, result.output
    line = next(x for x in result.stdout.splitlines() if x.split()[:1] == ["weights"])
    assert "4-bit, packed in the file, unpacked to int8 when the model is loaded" in line
    assert "100.0 %" in next(x for x in result.stdout.splitlines() if "MACs in integers" in x)
    assert line.split("weights", 1)[1].strip() in onnxq("inspect", out).stdout


def test_formats_of_layers_are_shown(tmp_path):
    out, facts = tmp_path / "q.onnx", tmp_path / "q.json"
    result = onnxq(
        "quantize", MODEL, out, "--calib", CALIB, "--limit", 16, "--weights", "int4/channel",
        "--recipe", "default", "--format", "first=int8/channel", "--format", "last=int8/channel",
        "--format", "depthwise=int8/channel", "--json", facts,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = [x for x in result.stdout.splitlines() if x.split()[:1] == ["weights"]]
    assert any("8-bit, int8 in the file" in x for x in lines)
    assert any("4-bit, packed in the file, unpacked to int8" in x for x in lines)
    assert "100.0 %" in next(x for x in result.stdout.splitlines() if "MACs in integers" in x)
    (step,) = (p for p in json.loads(facts.read_text())["passes"] if p["name"] == "calibrate")
    assert step["options"]["formats"] == [
        *("first=int8/channel", "last=int8/channel", "depthwise=int8/channel")
    ]
    counts = dict(reversed(line.split(" weights: ")) for line in step["done"] if "weights:" in line)
    eight, four = (next(x.split()[1] for x in lines if f"{n}-bit" in x) for n in (8, 4))
    assert counts == {"int8/channel": eight, "int4/channel": four}


def test_weights_alone_need_no_samples(tmp_path):
    out, facts = tmp_path / "q.onnx", tmp_path / "q.json"
    result = onnxq("quantize", MODEL, out, "--activations", "float", "--json", facts)
    assert result.exit_code == 0, result.output
    found = json.loads(facts.read_text())
    kernels = {n["name"]: n["kernel"] for n in found["integers"]["layers"]}
    alone = [name for name, kernel in kernels.items() if kernel == "MatMulNBits"]
    macs = {n["name"]: n["macs"] for n in found["integers"]["layers"]}
    share = sum(macs[n] for n in alone) / sum(macs.values())
    assert alone
    row = next(x for x in result.stdout.splitlines() if "MACs on integer weights" in x)
    assert f"{100 * share:.1f} %" in row
    in_float = [x for x in result.stdout.splitlines() if x.startswith("in float")]
    assert len(in_float) == len(kernels) - len(alone)  # these were to be so
    assert all("ort-cpu has no Conv of integer weights" in x for x in in_float)


def test_run_a_recipe(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[pass]]\nname = "clean"\n[[pass]]\nname = "fold-batch-norm"\n')
    out = tmp_path / "folded.onnx"
    result = onnxq("run", recipe, MODEL, out, "--calib", CALIB)
    assert result.exit_code == 0, result.output
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(out).graph.node}


def test_inspect_and_passes(tmp_path):
    result = onnxq("inspect", MODEL, "--json", tmp_path / "i.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "i.json").read_text())["layers"]
    listed = onnxq("passes")
    assert listed.exit_code == 0
    for name in ("clean", "gptq", "insert-qdq"):
        assert name in listed.stdout
        assert onnxq("passes", name).exit_code == 0


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model": "missing.onnx"}, "no such file"),
        ({"calib": "missing"}, "no such file or folder"),
        ({"out": "nowhere/out.onnx"}, "no such folder"),
        ({"extra": ["--exclude", "Cnov"]}, "matches no node"),
        ({"extra": ["--weights", "int17"]}, "no number format"),
        ({"extra": ["--format", "first"]}, "'first' is not SELECTOR=FORMAT; write first, last"),
        ({"extra": ["--format", "last=int16"]}, "use --format last=int8"),
        ({"extra": ["--weights", "int16/channel"]}, "no integer kernels"),
        ({"extra": ["--method", "mes"]}, "mse"),
        ({"extra": ["--target", "ort-cup"]}, "ort-cpu"),
        ({"extra": ["--recipe", "defalt"]}, "default"),
        ({"broken": True}, "not an ONNX model"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(change, line, tmp_path):
    model = MODEL
    if change.get("broken"):
        model = tmp_path / "broken.onnx"
        model.write_bytes(MODEL.read_bytes()[:1000])
    model = tmp_path / change["model"] if "model" in change else model
    calib = tmp_path / change["calib"] if "calib" in change else CALIB
    out = tmp_path / change.get("out", "out.onnx")
    result = onnxq("quantize", model, out, "--calib", calib, *change.get("extra", []))
    assert result.exit_code == 1, result.output
    errors = [row for row in result.stderr.splitlines() if row.startswith("error: ")]
    assert len(errors) == 1
    assert line in errors[0]
    assert not out.exists()


def test_an_old_output_survives_an_error(tmp_path):
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")
    result = onnxq("quantize", MODEL, out, "--calib", CALIB, "--exclude", "nothing")
    assert result.exit_code == 1
    assert out.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_wrong_usage_and_refusals(tmp_path):
    assert onnxq("quantize", MODEL, tmp_path / "o.onnx").exit_code == 2
    assert onnxq("quantise").exit_code == 2
    same = tmp_path / "same.onnx"
    same.write_bytes(MODEL.read_bytes())
    assert "is the input" in onnxq("quantize", same, same, "--calib", CALIB).stderr
    done = tmp_path / "done.onnx"
    assert onnxq("quantize", MODEL, done, "--calib", CALIB, "--quiet").exit_code == 0
    twice = onnxq("quantize", done, tmp_path / "twice.onnx", "--calib", CALIB)
    assert "quantized already" in twice.stderr


@pytest.mark.parametrize("command", ["quantize", "run", "compare", "inspect", "passes"])
def test_every_command_has_help(command):
    result = onnxq(command, "--help")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 4


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--version"]])
def test_help_and_version_of_the_whole(args):
    result = onnxq(*args)
    assert result.exit_code == 0
    assert result.stdout
    assert result.stderr == ""


def test_json_has_what_was_asked_for_and_quiet_says_nothing(tmp_path):
    out, facts = tmp_path / "q.onnx", tmp_path / "q.json"
    quiet = ["--json", facts, "--quiet"]
    result = onnxq("quantize", MODEL, out, "--calib", CALIB, "--limit", 8, *quiet)
    assert (result.exit_code, result.output) == (0, "")
    found = json.loads(facts.read_text())
    wanted = {"bytes", "versions", "seconds", "integers", "storage", "outputs", "weights", "notes"}
    wanted |= {"passes", "target"}
    assert set(found) == wanted
    assert set(found["passes"][0]) == {"name", "options", "seconds", "bytes", "done", "skipped"}
    assert found["outputs"][0]["samples"] == 8
    result = onnxq("compare", MODEL, out, "--data", CALIB, "--limit", 8, "--no-latency", *quiet)
    assert (result.exit_code, result.output) == (0, "")
    found = json.loads(facts.read_text())
    wanted = {"outputs", "bytes", "latency_ms", "latency", "samples", "threads", "notes"}
    assert set(found) == wanted
    assert found["outputs"][0]["name"] == "logits"
    assert found["samples"] == 8


def test_progress_goes_to_stderr(tmp_path):
    result = onnxq("quantize", MODEL, tmp_path / "q.onnx", "--calib", CALIB, "--limit", 8)
    assert "calibrate" in result.stderr
    assert "done" not in result.stdout
    assert "SQNR" not in result.stderr


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ([], 2),
        (["inspect"], 2),
        (["inspect", MODEL, "--shape", "input=axb"], 2),
        (["inspect", "missing.onnx"], 1),
        (["compare", MODEL, MODEL], 2),
        (["compare", MODEL, "missing.onnx", "--data", CALIB], 1),
        (["compare", MODEL, MODEL, "--data", "missing"], 1),
        (["passes", "gtpq"], 1),
        (["run", "missing.toml", MODEL, "out.onnx", "--calib", CALIB], 1),
        (["quantize", MODEL, "out.onnx", "--calib", CALIB, "--limit", 0], 2),
        (["quantize", MODEL, "out.onnx", "--calib", CALIB, "--threads", -1], 2),
        (["quantize", MODEL, "out.onnx", "--calib", CALIB, "--no-such-option"], 2),
        (["quantize", MODEL, "out.onnx", "--encodings", "missing.json"], 1),
    ],
)
def test_exit_codes(args, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = onnxq(*args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    if code == 1:
        assert [line[:7] for line in result.stderr.splitlines()] == ["error: "]
    assert not any(tmp_path.iterdir())


def test_encodings_need_no_samples(tmp_path):
    saved, recipe = tmp_path / "e.json", ["--recipe", "minmax"]
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    given = ["--calib", CALIB, "--save-encodings", saved, "--quiet"]
    assert onnxq("quantize", MODEL, a, *recipe, *given).exit_code == 0
    result = onnxq("quantize", MODEL, b, *recipe, "--encodings", saved)
    assert result.exit_code == 0, result.output
    with np.load(DIGITS / "test.npz") as test:
        feed = {"input": test["input"]}
    assert np.array_equal(*(Session(path).run(feed)["logits"] for path in (a, b)))
