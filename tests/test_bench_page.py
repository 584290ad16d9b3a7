"""`make bench` writes a page of what the scripts print, section by section."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "good": '"""Measures much.\n\n    python good.py\n\nWith --care.\n"""\nprint("9 x 9")\n'
    'print("| a | b |")\nprint("| --- | --- |")\nprint("| 1 | 2 |")\nprint("done")\nprint("x")',
    "long": 'print("| a |\\n| --- |")\nfor i in range(41):\n    print(f"| {i} |")',
    "none": 'import sys\nprint("not measured: set IT", file=sys.stderr)\nsys.exit(77)',
    "poor": 'print("| a |\\n| --- |\\n| 7 |")\nraise ValueError("no /some/where/file.onnx")',
}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """benchmarks/run.py with four small scripts in place of the benchmarks, and a page of none."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name in ("run", "_zoo", "_text"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run

    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name, text in {**SCRIPTS, "_shared": "raise SystemExit(9)", "run": "0/0"}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(run, "HERE", folder)
    monkeypatch.setattr(run, "MORE", {"good": [["--more", "2"]]})
    page = tmp_path / "page.md"
    yield lambda *given: run.main(["--page", str(page), *given]), page, folder, run
    for name in ("run", "_zoo", "_text"):
        sys.modules.pop(name, None)


def section(page, name):
    return re.search(rf"<!-- {name} -->\n\n(.*)\n\n<!-- /{name} -->", page.read_text(), re.S)[1]


def test_a_section_has_description_command_facts_and_tables(bench):
    run, page, _, module = bench
    run("--only", "good")
    parts = section(page, "good").split("\n\n")
    assert parts[:3] == ["## good", "Measures much.", "With `--care`."]
    first, more = parts[3:8], parts[8:]
    assert first[1:] == ["9 x 9", "| a | b |\n| --- | --- |\n| 1 | 2 |", "done", "x"]
    assert first[0].startswith("`python benchmarks/good.py`, 20")
    assert more[0].startswith("`python benchmarks/good.py --more 2`, 20")
    assert more[1:] == first[1:]
    onnxruntime = module.versions()["onnxruntime"]
    facts = (
        rf" s; {module.cores()} cores? of .+, load [\d.]+, Python 3.+ onnxruntime {onnxruntime},"
    )
    assert re.search(facts, first[0])


def test_all_scripts_run_and_what_fails_is_told(bench, capfd):
    run, page, _, _ = bench
    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == "failed: poor"
    found = re.findall(r"^## (.*)$", page.read_text(), re.M)
    assert found == ["good", "long", "none", "poor"]
    assert section(page, "none").endswith(": not measured: set IT")
    poor = section(page, "poor")
    assert "**Ended with status 1**: ValueError: no file.onnx\n\n| a |\n| --- |\n| 7 |" in poor
    assert "<details><summary>41 rows</summary>\n\n| a |\n" in section(page, "long")
    assert "ValueError: no /some/where/file.onnx" in capfd.readouterr().err


def test_one_section_is_measured_anew_and_the_others_stay(bench):
    run, page, folder, _ = bench
    run("--only", "good", "long")
    before = section(page, "long")
    (folder / "good.py").write_text('print("other")')
    (folder / "long.py").write_text("0/0")
    run("--only", "good")
    assert section(page, "good").endswith("\n\nother")
    assert section(page, "long") == before
    (folder / "poor.py").unlink()
    run("--missing")  # fails, were `long` run again
    assert "## none" in page.read_text()


def test_a_measured_section_outlives_a_run_without_what_it_needs(bench, capsys):
    run, page, folder, _ = bench
    run("--only", "good")
    before = section(page, "good")
    (folder / "good.py").write_text(SCRIPTS["none"])
    run("--only", "good")
    assert section(page, "good") == before
    assert "stays as it is" in capsys.readouterr().err


def test_sections_of_scripts_that_are_gone_go(bench):
    run, page, folder, _ = bench
    run("--only", "good", "long")
    (folder / "long.py").unlink()
    run("--only", "none")
    assert re.findall(r"^## (.*)$", page.read_text(), re.M) == ["good", "none"]


@pytest.mark.parametrize(
    ("info", "machine", "wanted"),
    [
        ("model name\t: A 7\nflags\t\t: avx2 avx512_vnni\n", "x86_64", ("A 7", "VNNI")),
        ("model name\t: A 7\nflags\t\t: avx2 avx512f\n", "x86_64", ("A 7", "no VNNI")),
        ("Features\t: asimd\n", "aarch64", ("chip", "aarch64")),
        ("", "x86_64", ("chip", "VNNI not known")),
    ],
)
def test_processors(bench, monkeypatch, tmp_path, info, machine, wanted):
    module = bench[3]
    (tmp_path / "cpuinfo").write_text(info)
    monkeypatch.setattr(module, "CPU", tmp_path / "cpuinfo")
    monkeypatch.setattr(module.platform, "machine", lambda: machine)
    monkeypatch.setattr(module.platform, "processor", lambda: "chip")
    assert module.processor() == wanted


def test_the_page_has_the_sections_of_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import run

    page = run.PAGE.read_text()
    assert set(run.sections(page)) <= set(run.scripts())
    assert set(run.MORE) <= set(run.scripts())
    assert page.startswith(run.HEAD)
    bench = re.search(r"^bench:.*(?:\n\t.*)+", (ROOT / "Makefile").read_text(), re.MULTILINE)[0]
    assert "benchmarks/run.py" in bench
