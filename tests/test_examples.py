"""The example that `make demo` and the README run: the model, its data, the way to int8."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxq

DIGITS = Path(__file__).parent.parent / "examples" / "digits"


@pytest.fixture
def score(monkeypatch):
    """The example's own scoring module, found as its scripts find it."""
    monkeypatch.syspath_prepend(DIGITS)
    monkeypatch.delitem(sys.modules, "score", raising=False)
    import score

    yield score
    del sys.modules["score"]


def test_the_model_is_valid_and_keeps_its_batch_norms():
    model = onnx.load(DIGITS / "digits.onnx")
    onnx.checker.check_model(model, full_check=True)
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("BatchNormalization") == 5
    assert ops.count("Conv") == 5
    assert model.opset_import[0].version == 17
    assert model.ir_version == 8


def test_the_model_scores(score):
    assert score.top1(score.predictions(DIGITS / "digits.onnx")) >= 97


def test_the_samples_fit_the_model():
    samples = sorted((DIGITS / "calib").glob("*.npz"))
    assert len(samples) == 100
    for sample in samples:
        with np.load(sample) as arrays:
            assert arrays.files == ["input"]
            check_pictures(arrays["input"], count=1)
    with np.load(DIGITS / "test.npz") as test:
        check_pictures(test["input"], count=500)
        assert np.bincount(test["labels"], minlength=10).min() >= 40


def check_pictures(x, count):
    assert x.dtype == np.float32
    assert x.shape == (count, 1, 8, 8)
    assert x.min() == 0
    assert x.max() <= 1


def test_the_files_are_small_enough_for_git():
    assert sum(f.stat().st_size for f in DIGITS.rglob("*") if f.is_file()) < 500_000


@pytest.mark.parametrize("arguments", [[], ["no-such-model.onnx"]])
def test_score_refuses_what_it_cannot_score(arguments):
    assert run("score.py", *arguments).returncode != 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the demo says, and the folder that it writes to."""
    folder = tmp_path_factory.mktemp("demo")
    done = run("demo.py", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, folder


def test_the_demo_from_end_to_end(score, demo):
    done, folder = demo
    before, after = DIGITS / "digits.onnx", folder / "digits.int8.onnx"
    assert after.stat().st_size < before.stat().st_size
    accuracy = [score.top1(score.predictions(model)) for model in (before, after)]
    assert abs(accuracy[0] - accuracy[1]) <= 1
    said = re.search(r"^  right +([\d.]+) % +([\d.]+) %", done.stdout, re.MULTILINE)
    assert [float(n) for n in said.groups()] == pytest.approx(accuracy)


def test_every_run_gives_the_same_bytes(demo, tmp_path):
    """In this process and in the demo's, whose hashes differ, on any number of threads."""
    _, folder = demo
    digests = {sha256(folder / "digits.int8.onnx")}
    for index, threads in enumerate((0, 0, 1, 3)):
        out = tmp_path / f"{index}.onnx"
        onnxq.quantize(DIGITS / "digits.onnx", out, DIGITS / "calib", threads=threads)
        digests.add(sha256(out))
    assert len(digests) == 1


def test_the_flow_of_aimet(score, tmp_path):
    done = run("simulate.py", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [float(n) for n in re.findall(r"([\d.]+) % right", done.stdout)]
    exact, eight, integers, four, four_integers, three = said
    assert abs(exact - eight) <= 0.6
    assert (eight, four) == pytest.approx((integers, four_integers), abs=0.4)
    assert exact >= four > three
    assert "int3 weights, int4 activations" in done.stdout
    assert len([*tmp_path.glob("*.encodings")]) == 3
    for file in tmp_path.glob("*.onnx"):
        onnx.checker.check_model(file, full_check=True)


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def run(script, *arguments):
    command = [sys.executable, DIGITS / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)
