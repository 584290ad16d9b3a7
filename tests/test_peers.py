"""Other tools beside onnxq: they run through one adapter, and the tables tell who is better."""

import ast
import importlib.metadata
import shutil
import sys
from pathlib import Path

import pytest

import onnxq

ROOT = Path(__file__).parent.parent
MODEL, CALIB = (ROOT / "examples" / "digits" / name for name in ("digits.onnx", "calib"))
MODULES = ("peers", "_peer_tables", "_adapter", "_memory", "_text", "_zoo")


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.delenv("ONNXQ_PEERS", raising=False)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import peers

    yield peers
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def few(tmp_path):
    """Four samples."""
    folder = tmp_path / "calib"
    folder.mkdir()
    for file in sorted(CALIB.glob("*.npz"))[:4]:
        shutil.copy(file, folder)
    return folder


def cells(text, first):
    lines = [line.strip("|").split("|") for line in text.splitlines()]
    return next([c.strip() for c in line[1:]] for line in lines if line[0].strip() == first)


def fails(message):
    raise AssertionError(message)


def test_the_adapter_writes_what_the_tool_writes(peers, few, tmp_path):
    got = peers.adapter("onnxq", Path(sys.executable), MODEL, few, tmp_path / "a.onnx", "{}")
    onnxq.quantize(MODEL, tmp_path / "b.onnx", few)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert got["version"] == onnxq.__version__
    assert got["note"] is None
    assert 20e6 < got["peak"] < 2e9
    assert got["seconds"] > 0
    assert got["processor"] > 0


def test_clean_as_a_simplifier(peers, few, tmp_path):
    tools = dict.fromkeys(peers.QUANTIZERS) | {"onnxq": Path(sys.executable)}
    rows = peers.simplified(tools, MODEL, few, 0.1, tmp_path)
    before = len(onnxq.load(MODEL).graph.nodes)
    assert [(r["tool"], r["setting"]) for r in rows] == [
        ("none", ""),
        ("onnxq", "clean, fold-batch-norm"),
        ("onnxq", "clean"),
    ]
    assert rows[0]["nodes"] == before > rows[1]["nodes"]
    assert rows[0]["apart"] == 0
    assert rows[1]["apart"] < 1e-5


def test_what_a_tool_fails_with_becomes_its_row(peers, few, tmp_path):
    row = peers.adapter(
        "onnxq", Path(sys.executable), tmp_path / "no.onnx", few, tmp_path / "o.onnx", "{}"
    )
    assert "ModelError: no such file (no.onnx)" in row["error"]
    row |= {"model": "m", "tool": "onnxq", "setting": "no options"}
    known = {"model": "m", "tool": "float", "setting": "", "ms": 2.0, "file_bytes": 1e6}
    line = peers.quantized_table([known, row]).splitlines()[-1]
    assert line.startswith("| m | onnxq, no options | fails |")
    assert line.count("|") == peers.quantized_table([known]).splitlines()[0].count("|")


def test_a_tool_that_takes_too_long_is_given_up(peers, monkeypatch):
    monkeypatch.setattr(peers, "PATIENCE", 0.01)
    assert peers.adapter("onnxq", Path(sys.executable)) == {"error": "not done after 0.01 s"}


def test_bytes_are_those_of_all_that_is_required(peers):
    import _adapter

    click = importlib.metadata.distribution("click")
    wanted = sum(Path(click.locate_file(f)).stat().st_size for f in click.files)
    assert _adapter.installed(("click",)) == {"click": wanted}
    found = _adapter.installed(("onnxq",))
    assert {"click", "numba", "llvmlite", "onnxruntime"} <= set(found)
    assert "hypothesis" not in found  # only the extra `dev` asks for it
    assert found["click"] == wanted
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        _adapter.installed(("onnxq", "no-such-thing"))


def test_interpreters(peers, monkeypatch, tmp_path):
    assert {k for k, v in peers.interpreters([], fails).items() if v} == {"onnxq", "onnxruntime"}
    python = tmp_path / "nncf" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setenv("ONNXQ_PEERS", str(tmp_path))
    found = peers.interpreters([f"aimet={sys.executable}"], fails)
    assert found["nncf"] == python
    assert found["aimet"] == Path(sys.executable)
    assert found["quark"] is None
    for given, told in (("keras=x", "no tool keras"), ("nncf", "nothing is no interpreter")):
        with pytest.raises(AssertionError, match=told):
            peers.interpreters([given], fails)


def test_the_table_tells_where_onnxq_is_not_better(peers):
    def row(tool, score, seconds, peak, latency, **more):
        facts = {"model": "m", "setting": "", "bare": 2.0, "bare_processor": 1.0, "note": None}
        measured = {"tool": tool, "score": score, "seconds": seconds, "processor": seconds}
        measured |= {"peak": peak, "latency": latency, "share": 1.0, "file_bytes": 5e5}
        return {**facts, **measured, **more}

    known = {"model": "m", "tool": "float", "setting": "", "ms": 2.0, "file_bytes": 2e6}
    rows = [
        known | {"score": 80.0},
        row("onnxq", 79.5, 4.0, 3e8, 0.5),
        row("nncf", 79.7, 3.0, 2e8, 0.6, share=0.75, file_bytes=6e5, note="told\nat length"),
        row("quark", 70.0, 9.0, 4e8, 0.5, file_bytes=4e5),
    ]
    lines = [line.strip("|").split(" | ") for line in peers.quantized_table(rows).splitlines()]
    table = {line[1].strip(): [cell.strip() for cell in line[2:]] for line in lines}
    assert table["float"][0] == "80.00"
    ours = ["79.50", "-0.50", "4.0 (2.0x)", "4.0x", "300", "0.50", "100.0 %", "0.50", "", ""]
    assert table["onnxq"] == ours
    assert table["nncf"][8:] == ["score 0.20, seconds 0.5x, processor 1.0x, memory 100 MB",
                                 "at length"]  # fmt: skip
    assert table["quark"][8] == "latency 0.00, integers 0.0 %, file 0.10 MB"


def test_the_table_of_tools(peers):
    about = {
        "onnxq": {"version": "1", "bytes": 4e8, "import_s": 0.5},
        "nncf": {"version": "2", "bytes": 3e8, "import_s": 0.6},
        "quark": None,
        "aimet": {"error": "ImportError: torch"},
    }
    text = peers.tool_table(about)
    assert cells(text, "onnxq") == ["1", "400", "0.50", ""]
    assert cells(text, "nncf") == ["2", "300", "0.60", "100 MB"]
    assert cells(text, "quark")[0] == "not installed"
    assert cells(text, "aimet")[0] == "fails: ImportError: torch"


def test_the_table_of_simplifiers(peers):
    def row(tool, nodes, seconds, latency):
        row = {"model": tool, "tool": tool, "setting": "", "nodes": nodes, "seconds": seconds}
        return row | {"latency": latency, "ms": 2.0, "apart": 1e-7, "model": "m"}

    rows = [row("none", 9, 0, 1), row("onnxq", 7, 0.5, 0.9), row("onnxsim", 6, 0.7, 0.8)]
    text = peers.simplified_table(rows).splitlines()
    assert text[-1] == "| m | onnxsim | 6 | 0.70 | 0.80 | 1e-07 | nodes 1, latency 0.10 |"
    assert text[-2] == "| m | onnxq | 7 | 0.50 | 0.90 | 1e-07 |  |"


def test_without_the_zoo_there_is_nothing_to_measure(peers, monkeypatch, capsys):
    monkeypatch.delenv("ONNXQ_ZOO", raising=False)
    with pytest.raises(SystemExit) as left:
        peers.main([])
    assert left.value.code == 77
    assert "set ONNXQ_ZOO" in capsys.readouterr().err


def test_settings_are_arguments_of_the_adapters(peers):
    seen = 0
    for table in (peers.QUANTIZERS, peers.MORE, peers.SIMPLIFIERS):
        for tool, settings in table.items():
            tree = ast.parse((ROOT / "benchmarks" / "peers" / f"{tool}.py").read_text())
            functions = {n.name: n.args for n in tree.body if isinstance(n, ast.FunctionDef)}
            for given in settings.values():
                known = functions[given.get("task", "quantize")]
                assert [a.arg for a in known.args] == ["model", "feeds", "output"]
                names = {a.arg for a in known.kwonlyargs} | ({*given} if known.kwarg else set())
                assert {*given} - {"task"} <= names
                seen += 1
    assert seen == 16
