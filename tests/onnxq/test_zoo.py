"""`onnxq zoo` on a small zoo made of the digits example, and what the entries say."""

import hashlib
import inspect
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import onnxq
from onnxq import api, zoo
from onnxq.cli import main
from onnxq.errors import OnnxqError
from onnxq.runtime import Session
from onnxq.zoo import catalog, files, scripts
from tests import models
from tests.onnxq.test_zoo_download import served

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "examples" / "digits"
CALIB = """
import pathlib, shutil, sys
model, out, count = sys.argv[1:]
assert pathlib.Path(model).is_file()
for file in sorted((pathlib.Path(__file__).parent / "data" / "calib").iterdir())[:int(count)]:
    shutil.copy(file, out)
"""
EVAL = """
import json, pathlib, sys
import numpy as np
import onnxruntime
with np.load(pathlib.Path(__file__).parent / "data" / "test.npz") as test:
    x, labels = test["input"], test["labels"]
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
right = session.run(None, {"input": x})[0].argmax(1) == labels
print("scoring")
print(json.dumps({"top1": 100 * float(right.mean())}))
"""
ENTRY = """
name = "digits"
title = "A small network"
task = "classification"
input = "input N x 1 x 8 x 8"
preprocessing = "none"

[model]
file = "models/digits.onnx"
bytes = {bytes}
sha256 = "{model}"
repository = "someone/something"
path = "digits.pth"
licence = "Apache-2.0"

[calibration]
what = "a hundred digits"
source = "someone/digits"
licence = "CC0"
path = "data/calib"
sha256 = "{calib}"
command = ["calib.py", "{{model}}", "{{out}}", "{{samples}}"]
samples = 20

[evaluation]
what = "other digits"
source = "someone/digits"
licence = "CC0"
path = "data/test.npz"
sha256 = "{test}"
command = ["eval.py", "{{model}}"]
metric = "top1"
unit = "%"
score = 98.9
tolerance = 0.5

[formats.W8A8]
score = 99.5
tolerance = 0.5

[formats.W4A8]
score = 50.0
tolerance = 0.5
options = {{ weights = "int4/channel", recipe = "default", formats = ["first=int8/channel"] }}
"""


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sums(folder):
    """What sha256sum * writes in a folder."""
    return "".join(f"{sha(f)}  {f.name}\n" for f in sorted(folder.iterdir()))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder of a zoo of one entry, which takes the place of the real ones."""
    folder = tmp_path / "home"
    (folder / "models").mkdir(parents=True)
    shutil.copy(DIGITS / "digits.onnx", folder / "models")
    shutil.copytree(DIGITS / "calib", folder / "data" / "calib")
    shutil.copy(DIGITS / "test.npz", folder / "data")
    (folder / "calib.py").write_text(CALIB)
    (folder / "eval.py").write_text(EVAL)
    known = tmp_path / "entries"
    known.mkdir()
    (known / "digits.toml").write_text(
        ENTRY.format(
            bytes=(DIGITS / "digits.onnx").stat().st_size,
            model=sha(DIGITS / "digits.onnx"),
            calib=hashlib.sha256(sums(folder / "data" / "calib").encode()).hexdigest(),
            test=sha(DIGITS / "test.npz"),
        )
    )
    monkeypatch.setattr(catalog, "_HOME", known)
    known_scripts = {name: sha(folder / name) for name in ("calib.py", "eval.py")}
    monkeypatch.setattr(files, "SCRIPTS", known_scripts)
    zoo.entries.cache_clear()
    yield folder
    zoo.entries.cache_clear()


def command(*args):
    return CliRunner().invoke(main, ["zoo", *map(str, args)])


def top1(path):
    with np.load(DIGITS / "test.npz") as test:
        found = Session(path).run({"input": test["input"]})["logits"]
        return 100 * float(np.mean(found.argmax(axis=1) == test["labels"]))


def tree(folder):
    return {f: f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def count_calls(monkeypatch):
    calls, original = [], api.quantize

    def counted(source, destination, *args, **options):
        calls.append(Path(destination).name)
        return original(source, destination, *args, **options)

    monkeypatch.setattr(api, "quantize", counted)
    return calls


# ---------------------------------------------------------------------- build


def test_a_model_is_built_as_its_entry_says(home, tmp_path):
    before = tree(home)
    to = tmp_path / "out"
    done = command("build", "digits", "--from", home, "--to", to, "--json", tmp_path / "b.json")
    assert done.exit_code == 0, done.output
    assert tree(home) == before
    found = json.loads((tmp_path / "b.json").read_text())["models"]
    assert [f["format"] for f in found] == ["W8A8", "W4A8"]
    for each in found:
        file = to / each["file"]
        assert json.loads(file.with_suffix(".json").read_text()) == each
        assert each["sha256"] == sha(file)
        assert each["bytes"] == {
            "float": (DIGITS / "digits.onnx").stat().st_size,
            "quantized": file.stat().st_size,
        }
        assert each["share_of_possible"] == 1
        assert each["file"] in done.stdout
    samples = to / "samples" / found[0]["samples"]
    assert len([*samples.iterdir()]) == 20
    options = {"weights": "int4/channel", "recipe": "default", "formats": ["first=int8/channel"]}
    assert found[1]["options"] == options
    # the same bytes as without the zoo
    onnxq.quantize(DIGITS / "digits.onnx", tmp_path / "same.onnx", samples, **options)
    assert sha(tmp_path / "same.onnx") == found[1]["sha256"]


def test_options_as_the_command_line_takes_them(home):
    assert zoo.entry("digits").formats["W4A8"].arguments == (
        *("--weights", "int4/channel", "--recipe", "default"),
        *("--format", "first=int8/channel"),
    )


@pytest.mark.parametrize(
    ("args", "change", "says"),
    [
        (["digit"], None, ["the zoo has no entry 'digit'", "did you mean digits?"]),
        (["x"], None, ["no entry 'x'", "there are digits"]),
        (["digits", "--format", "W8A9"], None, ["no format 'W8A9' (digits)", "did you mean W8A8?"]),
        (
            ["digits"],
            lambda h: (h / "models" / "digits.onnx").write_bytes(b"other"),
            ["checksum is d9298a10d1b0", "not ", "digits.onnx", "someone/something : digits.pth"],
        ),
        (
            ["digits"],
            lambda h: (h / "models" / "digits.onnx").unlink(),
            ["is missing", "digits.onnx", "made from someone/something : digits.pth", "--download"],
        ),
        (
            ["digits"],
            lambda h: shutil.rmtree(h / "data"),
            ["is missing", "data/calib", "it holds a hundred digits, from someone/digits"],
        ),
        (
            ["digits"],
            lambda h: (h / "data" / "calib" / "005.npz").unlink(),
            ["checksum is", "data/calib", "fetch it again"],
        ),
        (["digits"], lambda h: (h / "calib.py").unlink(), ["is missing", "calib.py"]),
        (["digits"], shutil.rmtree, ["no such folder", "home", "--from", "--download URL"]),
        (
            ["digits"],
            lambda h: (h / "calib.py").write_text("raise ValueError('no luck')"),
            ["the script failed: ValueError: no luck", "calib.py", "try it: python "],
        ),
        (["digits"], lambda h: (h / "calib.py").write_text(""), ["wrote no samples", "calib.py"]),
        (["digits", "--download", "ftp://host"], lambda h: (h / "calib.py").unlink(), ["ftp://"]),
    ],
)
def test_what_is_wrong_is_one_line(args, change, says, home, tmp_path):
    if change is not None:
        change(home)
    done = command("build", *args, "--from", home, "--to", tmp_path / "out", "--quiet")
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for part in says:
        assert part in line
    assert not list(tmp_path.glob("out/**/*.onnx"))
    assert not list(tmp_path.glob("out/samples/*"))


def test_a_folder_for_results_that_cannot_be_made(home, tmp_path):
    (tmp_path / "file").touch()
    for verb in ("build", "table"):
        done = command(verb, "digits", "--from", home, "--to", tmp_path / "file" / "x", "--quiet")
        assert done.exit_code == 1
        assert "cannot be made" in done.stderr


# ---------------------------------------------------------------------- download


def test_all_that_is_needed_comes_from_a_server(home, tmp_path, monkeypatch):
    (home / "data" / "calib" / files.LIST).write_text(sums(home / "data" / "calib"))
    own = tmp_path / "own"
    with served(home) as server:
        server.cuts = [1000, 2000]
        done = command(
            *("table", "--from", own, "--to", tmp_path / "out", "--format", "W8A8"),
            *("--download", f"{server.address}/"),
        )
        assert done.exit_code == 0, done.output
        assert ("/models/digits.onnx", "bytes=1000-") in server.asked or server.cuts == []
        assert tree(own).keys() == {own / f.relative_to(home) for f in tree(home)}
        server.asked.clear()
        again = command(
            *("build", "digits", "--from", own, "--to", tmp_path / "out", "--format", "W8A8"),
            *("--download", server.address),
        )
        assert again.exit_code == 0, again.output
        assert server.asked == []  # all is there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(own, tmp_path / "cache" / "onnxq" / "zoo")
    assert command("build", "digits", "--to", tmp_path / "b", "--format", "W8A8").exit_code == 0
    assert sha(tmp_path / "b" / "digits.W8A8.onnx") == sha(tmp_path / "out" / "digits.W8A8.onnx")


def test_a_server_that_gives_other_scripts(home, tmp_path):
    (home / "data" / "calib" / files.LIST).write_text(sums(home / "data" / "calib"))
    ran = tmp_path / "ran"
    (home / "calib.py").write_text(f"open({str(ran)!r}, 'w')")
    with served(home) as server:
        done = command(
            *("build", "digits", "--from", tmp_path / "own", "--to", tmp_path / "out", "--quiet"),
            *("--download", server.address),
        )
    assert done.exit_code == 1
    assert "the server gives another file" in done.stderr
    assert "calib.py" in done.stderr
    assert not ran.exists()
    assert not (tmp_path / "own" / "calib.py").exists()


def test_files_that_are_there_are_left_alone(home, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(home, own)
    (own / "data" / "calib" / "000.npz").write_bytes(b"mine")
    (home / "data" / "calib" / files.LIST).write_text(sums(home / "data" / "calib"))
    with served(home) as server:
        done = command(
            *("build", "digits", "--from", own, "--to", tmp_path / "out", "--quiet"),
            *("--download", server.address),
        )
    assert done.exit_code == 1
    assert "its checksum is" in done.stderr
    assert (own / "data" / "calib" / "000.npz").read_bytes() == b"mine"


# ---------------------------------------------------------------------- table


def test_scores_are_those_of_the_models(home, tmp_path):
    to = tmp_path / "out"
    done = command(
        *("table", "--from", home, "--to", to, "--json", tmp_path / "t.json"),
        *("--markdown", tmp_path / "t.md"),
    )
    assert done.exit_code == 0, done.output
    (found,) = json.loads((tmp_path / "t.json").read_text())["entries"]
    assert found["score"] == pytest.approx(top1(DIGITS / "digits.onnx"), abs=1e-9)
    for row in found["formats"]:
        file = to / f"digits.{row['format']}.onnx"
        assert row["score"] == pytest.approx(top1(file), abs=1e-9)
        assert row["bytes"] == file.stat().st_size
        assert row["loss"] == pytest.approx(1 - row["score"] / found["score"])
        assert row["kept"] == (row["loss"] <= row["limit"])
        assert row["share"] == 1
        assert row["latency"] > 0
    assert "not as expected: digits, W4A8: expected 50 +- 0.5, got 9" in done.stdout
    assert "digits, W8A8" not in done.stdout
    page = (tmp_path / "t.md").read_text()
    options = "--weights int4/channel --recipe default --format first=int8/channel"
    assert f"| digits |  | `{options}` | `onnxq zoo table digits --from DIR` |" in page
    assert f"| digits | classification | top1, % | {found['score']:.2f} |" in page


def test_finished_rows_are_taken_up_again(home, tmp_path, monkeypatch):
    calls = count_calls(monkeypatch)
    table = ("table", "--from", home, "--to", tmp_path / "out", "--json", tmp_path / "t.json")
    original = scripts.score

    def interrupted(entry, folder, model, progress):
        if "W4A8" in model.name:
            raise KeyboardInterrupt
        return original(entry, folder, model, progress)

    monkeypatch.setattr(scripts, "score", interrupted)
    assert command(*table).exit_code == 130
    assert calls == ["digits.W8A8.onnx", "digits.W4A8.onnx"]
    monkeypatch.setattr(scripts, "score", original)
    assert command(*table).exit_code == 0
    assert calls[2:] == ["digits.W4A8.onnx"]
    first = (tmp_path / "t.json").read_text()
    assert command(*table).exit_code == 0
    assert len(calls) == 3
    assert (tmp_path / "t.json").read_text() == first  # latency, too, is as it was measured
    assert command(*table, "--anew", "--format", "W8A8").exit_code == 0
    assert len(calls) == 4
    # a script that changed may give another score
    (home / "eval.py").write_text(EVAL.replace("100 *", "50 *"))
    assert command(*table).exit_code == 0
    assert len(calls) == 6
    halved = json.loads((tmp_path / "t.json").read_text())["entries"][0]["score"]
    assert halved == pytest.approx(json.loads(first)["entries"][0]["score"] / 2)
    (tmp_path / "out" / "rows" / "digits.float.json").write_text("{")
    broken = command(*table, "--quiet")
    assert broken.exit_code == 1
    assert "is no kept row" in broken.stderr
    assert "digits.float.json" in broken.stderr


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("print('{}')", "its last line is no JSON object with a number 'top1'"),
        ("print('[1]')", "its last line is no JSON object"),
        ("print('top1: 3')", "its last line is no JSON object"),
        ("", "its last line is no JSON object"),
        ("print('{\"top1\": NaN}')", "top1 is nan"),
        ("print('{\"top1\": 0}')", "top1 of the float model is 0"),
        ("import sys; sys.exit('no data')", "the script failed: no data"),
        ("import sys; sys.exit(3)", "the script failed: exit status 3"),
    ],
)
def test_scripts_that_give_no_score(script, says, home, tmp_path):
    (home / "eval.py").write_text(script)
    done = command("table", "--from", home, "--to", tmp_path / "out", "--quiet")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert says in line
    assert "eval.py" in line


def made_up(score, **scores):
    """Results of an entry with those scores."""
    rows = tuple(zoo.Row(f, s, 10**6, 1.0, 1.0, (30.0,), 0.5, 1.0) for f, s in scores.items())
    return zoo.Result(zoo.entry("digits"), score, rows)


def test_rows_that_lose_too_much_are_marked(home):
    found = [
        made_up(80.0, W8A8=79.2, W4A8=77.6),  # the most that they may lose
        made_up(80.0, W8A8=79.19, W4A8=77.59),
        made_up(80.0, W8A8=79.76, W4A8=81.0),
    ]
    kept = [[r.kept(row) for row in r.rows] for r in found]
    assert kept == [[True, True], [False, False], [True, True]]
    page = zoo.results_page(found)
    rows = re.findall(r"^\| digits \| classification \|.*$", page, re.MULTILINE)
    assert rows[0].endswith("| 80.00 | 79.20 | -1.00 % | 77.60 | -3.00 % |")
    assert rows[1].endswith("| 79.19 | -1.01 % **missed** | 77.59 | -3.01 % **missed** |")
    assert rows[2].endswith("| 79.76 | -0.30 % | 81.00 | +1.25 % |")
    assert "- W8A8: 2 of 3 within 1 % of the float score, 1 within 0.3 %" in page
    assert "- W4A8: 2 of 3 within 3 % of the float score, 1 within 0.3 %" in page


def test_a_format_that_was_not_measured_leaves_its_cells_empty(home):
    page = zoo.results_page([made_up(80.0, W8A8=80.0), made_up(80.0, W8A8=80.0, W4A8=80.0)])
    rows = re.findall(r"^\| digits \| classification \|.*$", page, re.MULTILINE)
    assert rows[0].endswith("| 80.00 | 80.00 | +0.00 % |  |  |")


def test_the_checksum_of_a_folder_is_that_of_its_list(tmp_path):
    for name, content in (("b.txt", "2"), ("B.txt", "3"), ("a.txt", "1"), (".hidden", "4")):
        (tmp_path / name).write_text(content)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("5")
    lines = [
        "4e07408562bedb8b60ce05c1decfe3ad16b72230967de01f640b7e4729b49fce  B.txt\n",
        "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b  a.txt\n",
        "d4735e3a265e16eee03f59718b9b5d03019c07d8b6c51f90da3a666eec13ab35  b.txt\n",
    ]
    wanted = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert files.digest(tmp_path) == wanted
    (tmp_path / files.LIST).write_text("".join(lines))
    assert files.digest(tmp_path) == wanted
    assert files.digest(tmp_path / files.LIST) == wanted


# ---------------------------------------------------------------------- the entries


ENTRIES = zoo.entries()


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_are_whole(name):
    found = ENTRIES[name]
    assert found.model.file == f"models/{name}.onnx"  # so that results start like it
    assert [*found.formats] == [*zoo.LIMITS] == ["W8A8", "W4A8"]
    checksums = (found.model.sha256, found.calibration.sha256, found.evaluation.sha256)
    assert all(re.fullmatch("[0-9a-f]{64}", s) for s in checksums)
    assert {found.calibration.command[0], found.evaluation.command[0]} <= set(files.SCRIPTS)
    assert 0 < found.calibration.samples <= 100
    known = inspect.signature(onnxq.quantize).parameters
    for form in found.formats.values():
        assert set(form.options) <= set(known)
        assert 0 < form.tolerance < 0.05 * form.score
    assert found.formats["W4A8"].options["weights"] == "int4/channel"
    for text in (found.title, found.task, found.input, found.preprocessing, found.model.licence):
        assert text.strip()


def test_entries_cover_the_tasks():
    tasks = [e.task for e in ENTRIES.values()]
    assert tasks.count("classification") >= 2
    assert sum("detection" in t for t in tasks) >= 2
    assert {"segmentation", "pose", "super resolution", "speech commands"} <= set(tasks)


def test_the_list_shows_every_entry(tmp_path):
    done = command("list", "--json", tmp_path / "list.json")
    assert done.exit_code == 0
    found = json.loads((tmp_path / "list.json").read_text())["entries"]
    assert [*found] == [*ENTRIES]
    for name, e in ENTRIES.items():
        assert found[name]["model"]["sha256"] == e.model.sha256
        (line,) = [x for x in done.stdout.splitlines() if x.split()[:1] == [name]]
        scores = (e.evaluation.score, *(f.score for f in e.formats.values()))
        assert line.split()[-3:] == [f"{s:.2f}" for s in scores]


def test_the_page_of_results_is_that_of_the_entries():
    page = (ROOT / "docs" / "zoo.md").read_text("utf-8")
    rows = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    for name, e in ENTRIES.items():
        scores, _, commands, _ = [r for r in rows if r[0] == name]
        for cell, wanted in zip(
            (scores[3], scores[4], scores[6]),
            (e.evaluation, *e.formats.values()),
            strict=True,
        ):
            assert abs(float(cell) - wanted.score) <= wanted.tolerance + 0.005
        given = [f"`{' '.join(f.arguments)}`".replace("``", "") for f in e.formats.values()]
        assert commands[1:3] == given


# ---------------------------------------------------------------------- the real zoo


@pytest.mark.zoo
def test_the_folder_of_the_zoo_is_the_one_that_entries_describe():
    folder = models.zoo("m5_speech").parent.parent
    for e in ENTRIES.values():
        path = files.check(e, folder, e.calibration, e.evaluation)
        assert path.stat().st_size == e.model.bytes
        model = onnxq.load(path)
        assert [i.split()[0] for i in e.input.split(", ")] == [i.name for i in model.graph.inputs]
    assert {n: files.digest(folder / n) for n in files.SCRIPTS} == files.SCRIPTS


@pytest.mark.zoo
def test_scores_are_as_expected(tmp_path):
    folder = models.zoo("m5_speech").parent.parent
    (found,) = zoo.results(folder, tmp_path, names=["m5_speech"])
    assert found.surprises() == []
    assert all(found.kept(row) for row in found.rows)


def test_a_copy_that_is_none(home, tmp_path):
    with pytest.raises(OnnxqError, match="is no address"):
        zoo.build("digits", tmp_path / "new", tmp_path / "out", download=sys.executable)
