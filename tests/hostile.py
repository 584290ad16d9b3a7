"""The command line on hostile input, in this process or in one of its own with limits."""

from __future__ import annotations

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
    """What a process of its own did.

    Args:
        code: Exit status; negative for a signal.
        stdout: What it wrote there.
        stderr: The same.
        peak: Most resident memory, bytes.
    """

    code: int
    stdout: str
    stderr: str
    peak: int


_LIMITED = """
import atexit, resource, sys
space, seconds, peak = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
resource.setrlimit(resource.RLIMIT_AS, (space, space))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
rss = lambda: str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
atexit.register(lambda: open(peak, "w").write(rss()))
from onnxq.cli import main
main()
"""


def limited(folder, *args, space=4 << 30, seconds=60):
    """Run the command line in a process that may address so many bytes, and take so long."""
    pytest.importorskip("resource", reason="no limits here")
    peak = folder / "peak"
    command = [sys.executable, "-c", _LIMITED, str(space), str(seconds), str(peak)]
    done = subprocess.run(
        [*command, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=4 * seconds
    )
    kib = int(peak.read_text()) if peak.exists() else 0
    peak.unlink(missing_ok=True)
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return Outcome(done.returncode, done.stdout, done.stderr, kib * unit)
