"""Kills work at its file operations, and tells what that leaves; a process of its own, as it forks.

    python -m tests.killing FOLDER MOST WORK...

WORK is the name of a function of this file, or a verb of the command line with its arguments. It
writes into FOLDER, and keeps temporary files in FOLDER/tmp. A child does it undisturbed; then, from
what FOLDER held before, one child each is killed before one of the operations (audit events) that
touch FOLDER: at most MOST of them, evenly spread. Each time the work is then done again. Prints a
line of JSON per child.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

EVENTS = {
    *("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"),
    *("shutil.rmtree", "tempfile.mkdtemp", "ctypes.dlsym"),
}


def save_model(folder):
    model().save(folder / "out.onnx")


def save_large_model(folder):
    """As if it were larger than 2 GB."""
    from onnxq import model_io

    model_io.TWO_GB = 0
    model().save(folder / "large.onnx")


def save_text(folder):
    from onnxq.report import write_text

    write_text(folder / "out.json", "[1]" * 10_000)


def put_folder(folder):
    from onnxq.whole_folder import whole_folder

    with whole_folder(folder / "app", force=True) as built:
        (built / "one").write_text("new")
        (built / "two").write_text("new")


def put_folder_in_two_steps(folder):
    """As where two folders cannot be exchanged."""
    from onnxq import scratch

    scratch._exchange = lambda one, other: False
    put_folder(folder)


def model():
    from onnxq.model import load
    from tests.models import parse

    return load(parse(CONV))


CONV = "g (float[N,2,4,4] x) => (float[N,32,2,2] y) <float[32,2,3,3] w> { y = Conv(x, w) }"


def tree(folder):
    """Path -> digest of each file; None for a folder."""
    return {
        os.fspath(p.relative_to(folder)): None
        if p.is_dir()
        else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
    }


def child(folder, work, moment):
    """Exit code of a child that is killed before an operation, and how many it came to."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        seen = 0

        def audit(event, arguments):
            nonlocal seen
            if event not in EVENTS:
                return
            if event != "ctypes.dlsym" and not any(str(folder) in str(a) for a in arguments):
                return
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

        tempfile.tempdir = os.fspath(folder / "tmp")
        sys.addaudithook(audit)
        code = 1  # an error, which is printed
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            try:
                work()
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                os.write(write, str(seen).encode())
                os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), int(told or 0)


def main():
    folder, most, work = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    # loaded here, so that children need not
    from onnxq import analyzing, compression, deployment, encoding_files, report_page  # noqa: F401
    from onnxq.cli import main as onnxq

    named = globals().get(work[0])
    do = (lambda: onnxq(work)) if named is None else (lambda: named(folder))
    before = folder.with_name(f"{folder.name}.before")
    shutil.copytree(folder, before)
    code, count = child(folder, do, None)
    print(json.dumps({"code": code, "count": count, "tree": tree(folder)}))
    most = min(most, count)
    for moment in sorted({(i + 1) * count // (most + 1) for i in range(most)}):
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
        code, _ = child(folder, do, moment)
        left = tree(folder)
        again, _ = child(folder, do, None)
        print(json.dumps({"code": code, "tree": left, "again": again, "after": tree(folder)}))


if __name__ == "__main__":
    main()
