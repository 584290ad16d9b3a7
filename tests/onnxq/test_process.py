"""The command line as a process: what it loads, how it ends, what it says at its first use."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from onnxq.cli import main

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"
HEAVY = ["numpy", "onnx", "onnxruntime", "numba", "onnx_graphsurgeon", "PIL", "rich"]


def python(code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE} | options
    return subprocess.run(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120, **options
    )


def onnxq(*arguments, **options):
    return python("from onnxq.cli import main; main(prog_name='onnxq')", *arguments, **options)


@pytest.mark.parametrize(
    "arguments", ["--help", "--version", *(f"{c} --help" for c in main.commands)]
)
def test_help_loads_nothing_heavy(arguments):
    code = f"""
import sys
from onnxq.cli import main
main(prog_name="onnxq", standalone_mode=False)
sys.exit(" ".join(m for m in {HEAVY} if m in sys.modules))
"""
    done = python(code, *arguments.split())
    assert done.stderr.split() == []
    assert "onnxq" in done.stdout


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "onnxq", "passes", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: onnxq passes [OPTIONS] [NAME]\n")


@pytest.mark.parametrize("arguments", [["passes"], ["passes", "clean"], ["--help"]])
def test_a_reader_that_has_left_gets_no_traceback(arguments):
    # as in `onnxq passes | head -1`
    read, write = os.pipe()
    os.close(read)
    try:
        done = onnxq(*arguments, stdout=write)
    finally:
        os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1


def test_ctrl_c_is_no_traceback():
    # the signal comes while the work goes on
    code = f"""
import os, time
from onnxq import api
from onnxq.cli import main

def quantize(*arguments, **options):
    os.kill(os.getpid(), {int(signal.SIGINT)})
    time.sleep(60)

api.quantize = quantize
main(["quantize", "in.onnx", "out.onnx", "--calib", "samples"])
"""
    done = python(code)
    assert done.returncode == 130
    assert done.stderr.strip() == "interrupted; no file was left half-written"
    assert done.stdout == ""


@pytest.mark.parametrize("where", ["in a pass", "outside"])
def test_a_bug_keeps_its_traceback(where, tmp_path):
    target = "onnxq.passes.clean.Clean.apply" if where == "in a pass" else "onnxq.api._measure"
    module, _, name = target.rpartition(".")
    code = f"""
import pkgutil, sys
from onnxq.cli import main

def broken(*arguments):
    raise ZeroDivisionError("a bug")

setattr(pkgutil.resolve_name({module!r}), {name!r}, broken)
main()
"""
    out = tmp_path / "out.onnx"
    done = python(code, "quantize", DIGITS / "digits.onnx", out, "--calib", DIGITS / "calib")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert re.search(r"in broken\n(.*\n)*?ZeroDivisionError: a bug", done.stderr)
    assert not out.exists()


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="kernels run as Python")
def test_first_use_says_what_takes_so_long(tmp_path):
    cache = tmp_path / "cache"
    env = os.environ | {"NUMBA_CACHE_DIR": str(cache), "ONNXQ_NUMBA_CACHE": "1"}
    runs = []
    for name in ("a.onnx", "b.onnx"):
        done = onnxq(
            *("quantize", DIGITS / "digits.onnx", tmp_path / name),
            *("--calib", DIGITS / "calib", "--limit", "8"),
            env=env,
        )
        assert done.returncode == 0, done.stderr
        runs.append((done.stderr.count("compiling kernels"), sorted(cache.rglob("*.nbc"))))
    (first, compiled), (second, after) = runs
    assert (first, second) == (1, 0)
    # one form of each kernel, and all of them: nothing was compiled without a word
    assert len(compiled) == len({re.sub(r"\.\d+\.nbc$", "", f.name) for f in compiled}) > 10
    assert after == compiled
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
