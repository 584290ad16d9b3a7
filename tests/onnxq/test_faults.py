"""What is left when a run is killed, interrupted, finds no space, or is not alone."""

import ctypes
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxq.scratch import Scratch
from tests.killing import CONV, tree
from tests.models import parse

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"
MODEL, CALIB = DIGITS / "digits.onnx", DIGITS / "calib"


def onnxq(*arguments, **options):
    command = [sys.executable, "-m", "onnxq", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options
    )


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "digits.int8.onnx"
    done = onnxq("quantize", MODEL, path, "--calib", CALIB, "--limit", 4)
    assert done.returncode == 0, done.stderr
    return path


def verb(name, folder, quantized):
    """A verb that writes into a folder, with its arguments; it ends with the same bytes."""
    few = ("--calib", CALIB, "--limit", 4, "--threads", 1, "--quiet")
    found = {
        "quantize": ("quantize", MODEL, folder / "out.onnx", *few),
        "compress": ("compress", MODEL, folder / "out.onnx", "--macs", 0.8, *few),
        "analyze": ("analyze", MODEL, "--report", folder / "page.html", *few),
        "deploy": ("deploy", quantized, folder / "app", "--force", "--limit", 1, "--quiet"),
        "export": ("encodings", "export", quantized, folder / "out.json", "--quiet"),
    }
    return found[name]


VERBS = ("quantize", "compress", "analyze", "deploy", "export")
# what such a run writes otherwise at each time: seconds, and tables in another order
VARIES = ("page.html", "app/manifest.json", ".ort")


def prepared(tmp_path, *, old):
    folder = tmp_path / "work"
    (folder / "tmp").mkdir(parents=True)
    if old:
        for name in ("out.onnx", "out.json", "page.html"):
            (folder / name).write_text("old")
        (folder / "app").mkdir()
        (folder / "app" / "old").write_text("old")
    return folder


def killed(folder, most, *work):
    """What a run that is killed at so many moments leaves, each time, and the undisturbed run."""
    before = tree(folder)
    command = [sys.executable, "-m", "tests.killing", *map(str, (folder, most, *work))]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    whole, *kills = map(json.loads, done.stdout.splitlines())
    assert whole["code"] == 0
    assert kills
    return before, whole["tree"], kills


def constant(found):
    """Paths, and digests of what is the same at every run."""
    return {p: None if p.endswith(VARIES) else digest for p, digest in found.items()}


def visible(found):
    """Without scratch folders and temporary files."""
    return {p: d for p, d in found.items() if not p.startswith((".onnxq-scratch-", "tmp/"))}


def old_or_new(kill, before, whole):
    """Whether each file and folder at the top is the old one or the new one, and all of it."""
    tops = {path.partition("/")[0] for path in (*before, *whole)}
    left = visible(kill["tree"])
    assert {path.partition("/")[0] for path in left} <= tops
    for top in tops:
        parts = [
            {p: d for p, d in constant(found).items() if p.partition("/")[0] == top}
            for found in (left, before, whole)
        ]
        assert parts[0] in parts[1:], top


JOBS = ("save_model", "save_text", "put_folder")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("job", JOBS)
def test_killed_at_any_moment_of_writing(job, old, tmp_path):
    before, whole, kills = killed(prepared(tmp_path, old=old), 1000, job)
    assert len(kills) >= 9
    assert any(kill["tree"] != visible(kill["tree"]) for kill in kills)  # a scratch folder is left
    for kill in kills:
        assert kill["code"] == -signal.SIGKILL
        old_or_new(kill, before, whole)
        assert (kill["again"], kill["after"]) == (0, whole)  # which sweeps it


def test_killed_where_folders_cannot_be_exchanged(tmp_path):
    folder = prepared(tmp_path, old=True)
    before, whole, kills = killed(folder, 1000, "put_folder_in_two_steps")
    gone = [kill for kill in kills if "app" not in kill["tree"]]
    assert len(gone) == 1
    for kill in kills:
        if kill not in gone:
            old_or_new(kill, before, whole)
        assert (kill["again"], kill["after"]) == (0, whole)


def test_an_old_folder_is_put_back(tmp_path):
    scratch = tmp_path / ".onnxq-scratch-abcd1234"
    (scratch / ".old" / "app").mkdir(parents=True)
    (scratch / ".old" / "app" / "old").write_text("old")
    with Scratch(tmp_path):
        pass
    assert list(tree(tmp_path)) == ["app", "app/old"]


@pytest.mark.parametrize("old", [False, True])
def test_killed_while_weights_go_to_a_second_file(old, tmp_path):
    folder = prepared(tmp_path, old=False)
    if old:
        earlier = parse(CONV, seed=1)
        onnx.save(earlier, folder / "large.onnx", save_as_external_data=True, location="o.data")
        # a name that onnxq gives
        os.rename(folder / "o.data", folder / "large.onnx.data")
        text = (folder / "large.onnx").read_bytes()
        (folder / "large.onnx").unlink()
        proto = onnx.ModelProto.FromString(text)
        proto.graph.initializer[0].external_data[0].value = "large.onnx.data"
        (folder / "large.onnx").write_bytes(proto.SerializeToString())
    before, whole, kills = killed(folder, 1000, "save_large_model")
    names = ["large.onnx", "large.onnx.1.data" if old else "large.onnx.data", "tmp"]
    assert sorted(whole) == sorted(names)
    for kill in kills:
        left = visible(kill["tree"])
        if left.get("large.onnx") == before.get("large.onnx"):
            assert before.items() <= left.items()  # beside it perhaps weights that nothing names
        else:
            assert whole.items() <= left.items()
        assert kill["again"] == 0
        after = {p: d for p, d in kill["after"].items() if p != "large.onnx"}
        assert len(after) == 2  # one file of weights and tmp, whatever the number in its name
        assert [d for p, d in after.items() if p != "tmp"] == [whole[names[1]]]


@pytest.mark.parametrize("name", VERBS)
def test_killed_verbs(name, tmp_path, quantized):
    folder = prepared(tmp_path, old=True)
    before, whole, kills = killed(folder, 2, *verb(name, folder, quantized))
    for kill in kills:
        assert kill["code"] == -signal.SIGKILL
        old_or_new(kill, before, whole)
        assert (kill["again"], constant(kill["after"])) == (0, constant(whole))


@pytest.mark.slow
@pytest.mark.parametrize("name", VERBS)
def test_killed_verbs_at_any_moment(name, tmp_path, quantized):
    folder = prepared(tmp_path, old=True)
    before, whole, kills = killed(folder, 1000, *verb(name, folder, quantized))
    for kill in kills:
        old_or_new(kill, before, whole)
        assert (kill["again"], constant(kill["after"])) == (0, constant(whole))


def test_killed_at_random(tmp_path, quantized):
    out = tmp_path / "out.onnx"
    arguments = map(str, verb("quantize", tmp_path, quantized))
    command = [sys.executable, "-m", "onnxq", *arguments]
    wanted = quantized.read_bytes()
    draw = random.Random(0)
    for _ in range(4):
        out.write_text("old")
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.2, 0.8))
        process.kill()
        process.wait()
        assert out.read_bytes() == b"old"
    assert onnxq(*verb("quantize", tmp_path, quantized)).returncode == 0
    assert out.read_bytes() == wanted
    assert list(tree(tmp_path)) == ["out.onnx"]


# ------------------------------------------------------------------ scratch folders of others


def test_a_scratch_folder_that_is_held_stays(tmp_path):
    with Scratch(tmp_path) as held:
        (held / "file").touch()
        with Scratch(tmp_path) as other:
            assert (held / "file").exists()
            assert other != held
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", [".onnxq-scratch-mine", ".onnxq-abcd1234", "onnxq-scratch"])
def test_folders_of_another_name_stay(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / ".onnxq-scratch-abcd1234").mkdir()
    with Scratch(tmp_path):
        pass
    assert list(tree(tmp_path)) == [name]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ".onnxq-scratch-abcd1234").symlink_to(tmp_path / "mine")
    with Scratch(tmp_path / "work"):
        pass
    assert (tmp_path / "mine" / "file").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes folders of others")
def test_folders_of_other_users_stay(tmp_path):
    theirs = tmp_path / ".onnxq-scratch-abcd1234"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    with Scratch(tmp_path):
        pass
    assert theirs.exists()


# ------------------------------------------------------------------ two at a time


def test_two_writers_and_a_reader(tmp_path):
    """Each reading is one of both models, never a mix."""
    code = """
import sys
from onnxq.model import load
from tests.killing import CONV
from tests.models import parse

model = load(parse(CONV, seed=int(sys.argv[2])))
for _ in range(150):
    model.save(sys.argv[1])
"""
    out, digests = tmp_path / "out.onnx", set()
    known = {seed: tmp_path / f"{seed}.onnx" for seed in (1, 2)}
    writers = [
        subprocess.Popen([sys.executable, "-c", code, path, str(seed)], cwd=ROOT)
        for seed in known
        for path in (out,)
    ]
    while any(w.poll() is None for w in writers):
        if out.exists():
            digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert [w.returncode for w in writers] == [0, 0]
    from onnxq.model import load

    for seed, path in known.items():
        load(parse(CONV, seed=seed)).save(path)
    assert digests <= {hashlib.sha256(p.read_bytes()).hexdigest() for p in known.values()}
    assert digests
    assert sorted(tree(tmp_path)) == ["1.onnx", "2.onnx", "out.onnx"]


def test_two_writers_of_large_models(tmp_path):
    """The last one wins, with its own weights, and those of the other are gone."""
    code = """
import sys
from onnxq import model_io
from onnxq.model import load
from tests.killing import CONV
from tests.models import parse

model_io.TWO_GB = 0
model = load(parse(CONV, seed=int(sys.argv[2])))
for _ in range(40):
    model.save(sys.argv[1])
"""
    out = tmp_path / "out.onnx"
    command = [sys.executable, "-c", code, out]
    writers = [subprocess.Popen([*command, seed], cwd=ROOT) for seed in "12"]
    assert [w.wait() for w in writers] == [0, 0]
    weights = [onnx.numpy_helper.to_array(parse(CONV, seed=s).graph.initializer[0]) for s in (1, 2)]
    found = onnx.numpy_helper.to_array(onnx.load(out).graph.initializer[0])
    assert any(np.array_equal(found, w) for w in weights)
    assert len(tree(tmp_path)) == 2


# ------------------------------------------------------------------ no space, no permission


def full(folder, kilobytes, *arguments, **variables):
    """Run a verb with a file system of so many kB mounted at the folder, and list what is left."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs '{folder}'"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted")
    script = (
        f"{mount} && mkdir '{folder}/tmp' && \"$@\"; code=$?; find '{folder}' -type f; exit $code"
    )
    mounted = ("unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-m", "onnxq")
    return subprocess.run(
        [*mounted, *map(str, arguments)],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300},
        env=os.environ | variables,
        check=False,
    )


def one_line(done, *parts):
    *_progress, last = done.stderr.splitlines()
    assert last.startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in last
    assert done.returncode == 1


@pytest.mark.parametrize("name", VERBS)
def test_a_full_disk(name, tmp_path, quantized):
    arguments = verb(name, tmp_path, quantized)
    done = full(tmp_path, 4, *arguments)
    one_line(done, "No space left on device", str(tmp_path), "space on the disk")
    assert done.stdout == ""  # not even a part of a file


@pytest.mark.parametrize("name", ["quantize", "compress", "deploy"])
def test_a_full_disk_for_temporary_files(name, tmp_path, quantized):
    space, out = tmp_path / "space", tmp_path / "out"
    space.mkdir()
    out.mkdir()
    done = full(space, 24, *verb(name, out, quantized), TMPDIR=str(space / "tmp"))
    one_line(done, "TMPDIR")
    assert not [*out.iterdir()]


@pytest.mark.parametrize("name", VERBS)
def test_files_that_may_not_grow(name, tmp_path, quantized):
    """As with a quota: what is written ends with an error after so many bytes."""
    done = onnxq(
        *verb(name, tmp_path, quantized),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)),
        env=os.environ | {"ONNXQ_NUMBA_CACHE": "0"} if name == "export" else None,
    )
    one_line(done)
    assert not [*tmp_path.iterdir()]


def without_override():
    """Root may write anywhere, until it gives up that capability."""
    if os.geteuid() == 0:
        drop, dac_override = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
        ctypes.CDLL(None).prctl(drop, dac_override)


@pytest.mark.skipif(sys.platform != "linux", reason="gives up capabilities as Linux has them")
@pytest.mark.parametrize("name", VERBS)
def test_a_folder_that_may_not_be_written(name, tmp_path, quantized):
    folder = tmp_path / "work"
    folder.mkdir()
    folder.chmod(0o555)
    done = onnxq(*verb(name, folder, quantized), preexec_fn=without_override)
    one_line(done, "cannot be written to", str(folder))


# ------------------------------------------------------------------ Ctrl-C


INTERRUPTED = "interrupted; no file was left half-written\n"
WRITTEN = {"quantize": "out.onnx", "analyze": "page.html", "deploy": "app"}


@pytest.mark.parametrize("name", WRITTEN)
def test_interrupted_at_random(name, tmp_path, quantized):
    command = [sys.executable, "-m", "onnxq", *map(str, verb(name, tmp_path, quantized))]
    draw = random.Random(len(name))
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        _reached_work(process)
        time.sleep(draw.uniform(0, 1))
        process.send_signal(signal.SIGINT)
        _, says = process.communicate(timeout=60)
        left = {*tmp_path.iterdir()}
        if left:  # it was done before, and is whole
            assert left == {tmp_path / WRITTEN[name]}
            assert says in ("", INTERRUPTED)
            break
        assert (process.returncode, says) == (130, INTERRUPTED)


def _reached_work(process):
    """Wait until Python has started, and numpy is loaded."""
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "_multiarray_umath" not in maps.read_text():
        time.sleep(0.01)


def test_an_interrupt_that_a_library_makes_another_error_of(tmp_path):
    code = """
import os, signal
from onnxq import api
from onnxq.cli import main

def quantize(*arguments, **options):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    except KeyboardInterrupt:
        raise ImportError("initialization failed") from None

api.quantize = quantize
main(["quantize", "in.onnx", "out.onnx", "--calib", "samples"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == INTERRUPTED


def test_an_interrupted_run_is_taken_up_again(tmp_path):
    out, kept = tmp_path / "out.onnx", tmp_path / "kept"
    search = ("--weights", "int4/channel", "--threads", 1, "--quiet")
    arguments = ("quantize", MODEL, out, "--calib", CALIB, "--limit", 8, *search)
    assert onnxq(*arguments).returncode == 0
    wanted = out.read_bytes()
    out.unlink()
    command = [sys.executable, "-m", "onnxq", *map(str, (*arguments, "--resume", kept))]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not [*kept.glob("*/[0-9]*.npz")] and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, says = process.communicate(timeout=60)
    assert process.returncode == 130, says
    finished = sorted(kept.glob("*/[0-9]*.npz"))
    assert finished
    assert not out.exists()
    before = [f.stat().st_mtime_ns for f in finished]
    assert onnxq(*arguments, "--resume", kept).returncode == 0
    assert [f.stat().st_mtime_ns for f in finished] == before  # not done again
    assert out.read_bytes() == wanted


# ------------------------------------------------------------------ samples


def test_an_unreadable_sample_is_skipped_and_counted(tmp_path):
    calib, fewer = tmp_path / "calib", tmp_path / "fewer"
    for folder in (calib, fewer):
        folder.mkdir()
        for file in sorted(CALIB.iterdir())[:20]:
            shutil.copy(file, folder)
    files = sorted(calib.iterdir())
    middle = files[len(files) // 2]
    middle.write_bytes(middle.read_bytes()[:100])
    (fewer / middle.name).unlink()
    facts = tmp_path / "facts.json"
    for folder in (calib, fewer):
        done = onnxq(
            "quantize", MODEL, folder.with_suffix(".onnx"), "--calib", folder, "--json", facts
        )
        assert done.returncode == 0, done.stderr
        notes = [n for n in json.loads(facts.read_text())["notes"] if "skipped" in n]
        assert (middle.name in " ".join(notes)) == (folder is calib)
    assert notes == []
    assert calib.with_suffix(".onnx").read_bytes() == fewer.with_suffix(".onnx").read_bytes()
    one_line(
        onnxq("quantize", MODEL, tmp_path / "o.onnx", "--calib", calib, "--strict"),
        "cannot be read",
        middle.name,
    )
    assert not (tmp_path / "o.onnx").exists()
