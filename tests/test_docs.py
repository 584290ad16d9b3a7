"""The pages: generated ones are up to date, links lead somewhere, what can be run runs."""

import inspect
import re
import runpy
import shutil
from pathlib import Path

import click
import numpy as np
import onnx
import pytest

from onnxq import recipe
from onnxq.cli import main
from onnxq.commands.group import verbs
from onnxq.pages import page
from onnxq.passes import PASSES
from onnxq.runtime import Session

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DIGITS = ROOT / "examples" / "digits"
PAGES = [*(ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *DOCS.glob("*.md")]
VERBS = dict(verbs(main))
GENERATED = runpy.run_path(str(DOCS / "generate.py"))["pages"]()


def shown(file):
    return file.relative_to(ROOT).as_posix()


def blocks(file, language):
    """The fenced blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text("utf-8"), re.M | re.S)


def anchors(file):
    """What links into a page may name: its headings as GitHub writes them."""
    text = re.sub(r"^```.*?^```", "", file.read_text("utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("file", GENERATED, ids=shown)
def test_generated_pages_are_up_to_date(file):
    assert file.is_file(), "run make docs"
    assert file.read_text("utf-8") == GENERATED[file], "run make docs"


@pytest.mark.parametrize("file", PAGES, ids=shown)
def test_links_lead_somewhere(file):
    links = re.findall(r"\]\(([^)\s]+)\)", file.read_text("utf-8"))
    broken = []
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_links_are_found():
    assert {"docs/cli.md", "docs/passes.md"} <= set(
        re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text("utf-8"))
    )
    assert "onnxq-quantize" in anchors(DOCS / "cli.md")


@pytest.mark.parametrize("file", PAGES, ids=shown)
def test_commands_that_pages_show_exist(file):
    text = file.read_text("utf-8")
    for line in re.findall(r"^(?:    )?(?:\$ )?onnxq ([a-z].*)$", text, re.MULTILINE):
        words = line.split()
        verb = max((v for v in VERBS if words[: len(v.split())] == v.split()), key=len)
        known = {o for p in VERBS[verb].params for o in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", line)) <= known | {"--help"}, line


def test_the_python_of_the_readme_runs(monkeypatch, tmp_path):
    shutil.copytree(DIGITS, tmp_path / "examples" / "digits")
    monkeypatch.chdir(tmp_path)
    snippets = blocks(ROOT / "README.md", "python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
    onnx.checker.check_model("digits.int8.onnx", full_check=True)
    with np.load(DIGITS / "test.npz") as test:
        x, labels = test["input"], test["labels"]
    found = [
        Session(model).run({"input": x})["logits"].argmax(axis=1)
        for model in (DIGITS / "digits.onnx", tmp_path / "digits.int8.onnx")
    ]
    right = [100 * np.mean(f == labels) for f in found]
    assert abs(right[0] - right[1]) <= 1


def test_the_python_of_the_migration_guide_runs(monkeypatch, tmp_path, capsys):
    shutil.copytree(DIGITS, tmp_path / "examples" / "digits")
    monkeypatch.chdir(tmp_path)
    snippets, names = blocks(DOCS / "migration.md", "python"), {}
    assert len(snippets) >= 6
    for snippet in snippets:
        exec(compile(snippet, "migration.md", "exec"), names)
    shares = [float(n) for n in re.findall(r"([\d.]+)% right", capsys.readouterr().out)]
    assert shares[0] >= 98.5
    assert shares[1] >= 95
    assert names["report"].facts["integers"]["share"] == 1
    onnx.checker.check_model("digits.qdq.onnx", full_check=True)
    with np.load(DIGITS / "test.npz") as test:
        found = Session("digits.int8.onnx").run({"input": test["input"]})["logits"]
        assert np.mean(found.argmax(axis=1) == test["labels"]) >= 0.985


def test_recipes_that_pages_show_are_recipes():
    for file in PAGES:
        for text in blocks(file, "toml"):
            if "[[pass]]" in text:
                assert recipe.loads(text, where=shown(file)).passes


# ---------------------------------------------------------------------- what pages are made from


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_explains_itself(name):
    found = page(name)
    assert found.summary.endswith(".")
    assert any(block.kind == "literal" for block in found.blocks)  # a formula or a drawing
    assert re.search(r"[Rr]efuse|leaves alone|[Nn]othing is written|Declines", str(found.blocks))
    assert all(meaning.endswith(".") for _, meaning in found.options)
    section = (inspect.getdoc(kind(name)) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    documented = re.findall(r"^    (\w+): ", section, re.MULTILINE)
    assert documented == [option.name for option, _ in found.options]
    assert kind(name).__name__ == found.class_name


def kind(name):
    return recipe.pass_class(name)


def test_parts_of_a_docstring():
    found = page("gate-equalization")
    assert [b.kind for b in found.blocks] == ["text", "literal", "text", "text"]
    drawing = found.blocks[1].text.split("\n")
    assert drawing[0].startswith("Conv -> x --> Sigmoid")
    assert drawing[2] == ""  # two drawings, one block
    assert found.blocks[0].text.endswith("But its result can:")
    assert {o.name: m for o, m in found.options}["largest"] == "Greatest scale."
    assert found.source.startswith("the equalization of Nagel et al. 2019")
    points = next(b for b in page("calibrate").blocks if b.kind == "list").items
    assert len(points) == 6
    assert points[1].startswith("The inputs of a Concat take the encoding of its result, unless")
    assert "\n" not in points[1]


def test_pages_name_every_verb_option_and_pass():
    cli, passes = (GENERATED[DOCS / n] for n in ("cli.md", "passes.md"))
    for name, command in VERBS.items():
        section = cli.partition(f"## onnxq {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert f"`{parameter.opts[0]}" in section
    for name in PASSES:
        section = passes.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for option, meaning in page(name).options:
            assert f"| `{option.name}` |" in section
            assert meaning
        assert f'```toml\n[[pass]]\nname = "{name}"' in section
