"""Help texts: complete, true, readable; and options that are refused before any work is done."""

import json
import os
import re
import tomllib
from pathlib import Path

import click
import onnx
import pytest
from click.testing import CliRunner

from onnxq import recipe
from onnxq.cli import main
from onnxq.commands.group import verbs
from onnxq.passes import Calibrate
from onnxq.pictures import PRESETS
from onnxq.recipe import RECIPES
from onnxq.targets import TARGETS
from tests.models import parse

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
VERBS = dict(verbs(main))
MODEL, CALIB = DIGITS / "digits.onnx", DIGITS / "calib"


def onnxq(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def option(name, command="quantize"):
    return next(p for p in main.commands[command].params if p.name == name)


@pytest.mark.parametrize("name", VERBS)
def test_every_argument_and_option_is_explained(name):
    command = VERBS[name]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help
            assert parameter.help.endswith(".")
        else:
            assert re.search(rf"\b{parameter.human_readable_name.strip('[]')}\b", command.help)


@pytest.mark.parametrize("name", [None, *VERBS])
def test_examples_keep_their_lines(name):
    shown = onnxq(*(name or "").split(), "--help").stdout
    command = main if name is None else VERBS[name]
    examples = re.findall(r"^  onnxq .*$", command.help, re.MULTILINE)
    assert examples
    lines = shown.splitlines()
    for line in examples:
        assert f"  {line}" in lines  # whole, on a line of its own
        words = line.split()[1:]
        verb = max((v for v in VERBS if words[: len(v.split())] == v.split()), key=len)
        known = {o for p in VERBS[verb].params for o in (*p.opts, *p.secondary_opts)}
        assert {w for w in words if w.startswith("-")} <= known


def test_the_first_lines_fit_the_list():
    listed = onnxq("--help").stdout
    for command in main.commands.values():
        assert command.help.split("\n")[0] in listed


def test_defaults_and_choices_that_texts_name():
    step = Calibrate()
    assert option("method").show_default == f"{step.method}, or the recipe's"
    assert {t.weights for t in TARGETS.values()} == {"int8/channel"}
    assert option("weights").show_default == "int8/channel, or the recipe's"
    assert all(name in option("recipe").help for name in RECIPES)
    assert all(name in option("target").help for name in TARGETS)
    assert all(name in option("preprocess").help for name in PRESETS)


def test_the_recipe_of_the_help_is_one():
    text = re.search(r"A recipe file:\n((?: +.*\n)+)", main.commands["run"].help)[1]
    lines = "\n".join(line.strip() for line in text.splitlines())
    assert [s.name for s in recipe.loads(lines).passes] == [
        step["name"] for step in tomllib.loads(lines)["pass"]
    ]


@pytest.mark.parametrize("flag", ["--json", "--report", "--save-encodings", "--statistics"])
@pytest.mark.parametrize("place", ["missing/file", "."])
def test_files_that_cannot_be_written_are_refused_at_once(flag, place, tmp_path):
    out = tmp_path / "out.onnx"
    result = onnxq("quantize", MODEL, out, "--calib", CALIB, flag, tmp_path / place)
    assert result.exit_code == 1
    wanted = "no such folder" if "missing" in place else "is a folder"
    assert result.stderr.startswith(f"error: {wanted}")
    assert len(result.stderr.splitlines()) == 1
    assert not out.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_only_files_are_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = onnxq("quantize", MODEL, pipe, "--calib", CALIB)
    assert result.exit_code == 1
    assert "is not a file" in result.stderr
    assert pipe.is_fifo()


@pytest.mark.parametrize("text", ["8x8", "=1x1x8x8", "input=", "input=1x0x8x8", "input=axb"])
def test_shapes_that_are_none(text):
    result = onnxq("inspect", MODEL, "--shape", text)
    assert result.exit_code == 2
    assert "input=1x3x224x224" in result.stderr


def test_quiet_prints_nothing(tmp_path):
    assert onnxq("inspect", MODEL, "--quiet", "--json", tmp_path / "i.json").output == ""
    assert (tmp_path / "i.json").exists()
    compared = onnxq(
        "compare", MODEL, MODEL, "--data", CALIB, "--limit", 2, "--no-latency", "--quiet"
    )
    assert (compared.exit_code, compared.output) == (0, "")


def test_json_knows_no_infinity(tmp_path):
    text = "g (float[1,2,3,3] x) => (float[] y) <float[3,2,1,1] w> { y = Conv(x, w) }"
    proto = parse(text, w=[[[[0.0]]], [[[0.0]]], [[[1.0]]]])  # the median channel is zero
    onnx.save(proto, tmp_path / "m.onnx")
    result = onnxq("inspect", tmp_path / "m.onnx", "--json", tmp_path / "i.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "i.json").read_text(), parse_constant=pytest.fail)
    assert found["layers"][0]["spread"] is None
