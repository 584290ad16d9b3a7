"""The command line on hostile input, in this process or in one of its own with limits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnxq.cli import main

ROOT = Path(__file__).parents[1]


def onnxq(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def refused(result, *says, code=1):
    """One line on stderr, nothing on stdout, no bug behind it."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    line = one_line(result.stdout, result.stderr)
    for part in says:
        assert part in line


def one_line(stdout, stderr):
    """The error, where stderr holds no other and stdout nothing."""
    assert stdout == ""
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    errors = [line for line in lines if line.lower().startswith("error: ")]
    assert errors == lines[-1:], stderr
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", errors[0]) is None
    return errors[0]


@dataclass(frozen=True)
class Outcome:
    """What a command did in a process with limits.

    Args:
        code: Exit status.
        stdout: What it wrote there.
        stderr: The same.
    """

    code: int
    stdout: str
    stderr: str


_LIMITED = """
import json, resource, sys
space, seconds = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (space, space))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
from click.testing import CliRunner
from onnxq.cli import main
found = []
for command in json.loads(sys.argv[3]):
    result = CliRunner().invoke(main, command)
    known = result.exception is None or isinstance(result.exception, SystemExit)
    assert known, repr(result.exception)
    found.append([result.exit_code, result.stdout, result.stderr])
status = open("/proc/self/status").read()  # getrusage's is at least that of the parent
peak = int(status.partition("VmHWM:")[2].split()[0])
print(json.dumps([found, peak]))
"""


def limited(*commands, space=4 << 30, seconds=60):
    """Run command lines one after the other in a process that may address so many bytes.

    Returns:
        What each did, and the most memory that was resident, in bytes.
    """
    pytest.importorskip("resource", reason="no limits here")
    texts = json.dumps([[str(a) for a in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(space), str(seconds), texts],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found, peak = json.loads(done.stdout)
    return [Outcome(*each) for each in found], peak * (1 if sys.platform == "darwin" else 1 << 10)
