"""The guide to apps: its commands and its Python run, and the manifest is as it shows it."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from onnxq.cli import main

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "mobile.md").read_text("utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE, re.M | re.S)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """What the commands of the guide leave behind, run one after the other."""
    home = tmp_path_factory.mktemp("guide")
    shutil.copytree(ROOT / "examples" / "digits", home, dirs_exist_ok=True)
    (toml,) = blocks("toml")
    (home / "gray.toml").write_text(toml)
    commands = [shlex.split(x) for x in "".join(blocks("sh")).splitlines() if x[:6] == "onnxq "]
    assert [c[1] for c in commands] == ["quantize", "compare", "deploy"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for command in commands:
            quick = ["--no-latency"] if command[1] == "compare" else []
            result = CliRunner().invoke(main, command[1:] + quick)
            assert result.exit_code == 0, result.output
    return home / "app"


def test_the_files_are_those_of_the_table(app):
    names = {p.name for p in app.iterdir()}
    shown = set(re.findall(r"^\| `([^`]+)` \|", GUIDE, re.M))
    configs = {n for n in names if n.endswith(".config")}
    assert shown == names - configs | {"*.required_operators_and_types*.config"}
    for name in configs:
        assert re.fullmatch(r"digits\.int8\.required_operators_and_types.*\.config", name)
    for path in re.findall(r"app/(\S+\.config)", GUIDE):
        assert path in configs


def test_the_manifest_is_as_shown(app):
    manifest = json.loads((app / "manifest.json").read_text("utf-8"))
    shown = json.loads(blocks("json")[0])
    for key in ("inputs", "outputs"):
        assert manifest[key] == shown[key]
    assert manifest["preprocess"].items() >= shown["preprocess"].items()
    assert 'target = "ort-cpu"' in manifest["recipe"]
    besides = ["files", "versions", "target", "recipe", "verifications"]
    assert set(besides) <= set(manifest)
    (entry,) = {k: v for f in manifest["files"] for k, v in f["session"].items()}.items()
    assert f"`{entry[0]}` = `{entry[1]}`" in " ".join(GUIDE.split())


def test_the_python_of_the_guide_finds_files_that_were_changed(app, tmp_path, monkeypatch):
    (code,) = blocks("python")
    shutil.copytree(app, tmp_path / "app")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "mobile.md", "exec"), {})
    with (tmp_path / "app" / "digits.int8.ort").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(AssertionError):
        exec(compile(code, "mobile.md", "exec"), {})


def test_snippets_read_keys_that_the_manifest_has(app):
    manifest = json.loads((app / "manifest.json").read_text("utf-8"))
    (kotlin,) = [b for b in blocks("kotlin") if "class" in b]
    (swift,) = blocks("swift")
    for key in re.findall(r'get(?:JSONArray|JSONObject|Double|String)\("(\w+)"\)', kotlin):
        where = {**manifest, **manifest["inputs"][0], **manifest["preprocess"]}
        assert key in where
    structs = dict(re.findall(r"struct (\w+): Decodable \{ (.*?) \}", swift))
    for name, part in (("Tensor", manifest["inputs"][0]), ("Preprocess", manifest["preprocess"])):
        assert set(re.findall(r"let (\w+):", structs[name])) <= set(part)
    for text in (kotlin, swift):
        assert "digits.int8" in text
