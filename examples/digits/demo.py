"""Quantize the digits model with the command line, then say what that changed.

    python examples/digits/demo.py [OUTPUT FOLDER]

The output folder is `build/demo` unless named. `make demo` runs this.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import score

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def shown(path: Path) -> str:
    """The path as it is typed from the top of the repository."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def onnxq(*arguments: str) -> int:
    """Show a command, run it from the top of the repository, let its output through."""
    print(f"\n$ onnxq {shlex.join(arguments)}", flush=True)
    return subprocess.run([sys.executable, "-m", "onnxq", *arguments], cwd=ROOT).returncode


def main(folder: Path) -> int:
    before, calib, after = HERE / "digits.onnx", HERE / "calib", folder / "digits.int8.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    after.unlink(missing_ok=True)  # never report on the file of an earlier run

    print(
        "A convolutional network that reads 8 x 8 pictures of digits, and 100 pictures to calibrate"
    )
    print("it with. One command makes its weights and activations 8-bit integers:")
    code = onnxq("quantize", shown(before), shown(after), "--calib", shown(calib))
    if code or not after.is_file():
        print(f"\nThe command failed (exit code {code}).", file=sys.stderr)
        return code or 1

    was, now = score.predictions(before), score.predictions(after)
    bytes_was, bytes_now = before.stat().st_size, after.stat().st_size
    differ = f"{(was != now).sum()} of {len(was)} predictions differ"
    print(f"""
On {len(was)} test pictures that neither training nor calibration has seen:

             float      int8
  right    {score.top1(was):5.1f} %   {score.top1(now):5.1f} %   {differ}
  bytes    {bytes_was:7,}   {bytes_now:7,}   {bytes_was / bytes_now:.1f} times smaller

The int8 model is {shown(after)}: standard ONNX, ready for onnxruntime.

Next{activate()}
  onnxq compare {shown(before)} {shown(after)} --data {shown(calib)}
  onnxq inspect {shown(after)}
  onnxq quantize your.onnx your.int8.onnx --calib your/samples""")
    return 0


def activate() -> str:
    """What to do first where typing `onnxq` would not find the command of this Python."""
    folder = Path(sys.executable).parent
    if str(folder) in os.environ.get("PATH", "").split(os.pathsep):
        return ""
    return f", after `. {shown(folder / 'activate')}`"


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if len(arguments) > 1 or any(a.startswith("-") for a in arguments):
        sys.exit(__doc__)
    sys.exit(main(Path(arguments[0]).resolve() if arguments else ROOT / "build" / "demo"))
