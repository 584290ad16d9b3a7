"""The layout that packaging, the type checkers and the import contract rely on."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

import onnxq

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = ("onnxq", "passes", "kernels")


def sources(*folders):
    # rglob does not follow the two links, so each file comes once
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def shown(file):
    return file.relative_to(ROOT).as_posix()


def imported(file):
    """The absolute names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_every_package_is_listed():
    found = [file.parent.relative_to(ROOT) for file in sources(*SHIPPED) if file.stem == "__init__"]
    names = [".".join(folder.parts) for folder in found]
    names = [name if name.split(".")[0] == "onnxq" else f"onnxq.{name}" for name in names]
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(names)


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_links_lead_to_the_top(name):
    link = ROOT / "onnxq" / name
    if link.is_file():
        pytest.skip("this checkout has no symbolic links: git wrote them as text files")
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_mapped_packages_are_flat(name):
    # setuptools' list names packages one by one: a subfolder would not ship
    folders = [f.name for f in (ROOT / name).iterdir() if f.is_dir() and f.name != "__pycache__"]
    assert folders == []


@pytest.mark.parametrize("file", sources(*SHIPPED, "tests", "benchmarks", "examples"), ids=shown)
def test_no_module_is_imported_twice(file):
    # from the top of the repository `import passes` works, and makes a second copy of every class
    assert {name.split(".")[0] for name in imported(file)}.isdisjoint({"passes", "kernels"})


def test_only_the_runtime_imports_onnxruntime():
    users = [
        shown(file)
        for file in sources(*SHIPPED)
        if any(name.split(".")[0] == "onnxruntime" for name in imported(file))
    ]
    assert set(users) <= {"onnxq/runtime.py"}


def test_kernels_know_numpy_and_numba_only():
    for file in sources("kernels"):
        own = {name for name in imported(file) if name.split(".")[0] == "onnxq"}
        assert all(name.startswith("onnxq.kernels") for name in own), file


def test_one_version():
    assert onnxq.__version__ == PYPROJECT["project"]["version"]


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert re.match(r"\s*Apache License\s+Version 2\.0, January 2004", text)
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_make_target_has_a_help_text():
    makefile = (ROOT / "Makefile").read_text()
    targets = dict(re.findall(r"^([a-z][\w-]*):(?!=)(.*)$", makefile, re.MULTILINE))
    assert set(targets) >= {"help", "demo", "test", "check", "bench", "clean"}
    assert [name for name, rest in targets.items() if not re.search(r"## \w", rest)] == []
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(phony[1].split()) == set(targets)


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_papers(name):
    assert (ROOT / name).stat().st_size > 0
