"""A model as an app ships it: the files, what they compute, and that they appear whole or not."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.tools.convert_onnx_models_to_ort import (
    OptimizationStyle,
    convert_onnx_models_to_ort,
)
from onnxruntime.tools.ort_format_model.types import FbsTypeInfo
from onnxruntime.tools.reduced_build_config_parser import parse_config
from PIL import Image

import onnxq
from onnxq import deployment, ort_format, runtime
from onnxq.cli import main
from onnxq.errors import (
    CalibrationError,
    ModelError,
    OnnxqError,
    RecipeError,
    TargetError,
    UnsupportedError,
)
from onnxq.pictures import Preprocess
from onnxq.runtime import REPLAY, Session
from tests.models import ZOO, parse, zoo

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
CALIB = DIGITS / "calib"
CONV = (
    "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[4] b, float[5,4,3,3] v>"
    "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }"
)


def cli(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


def save(folder, proto, name="m.onnx"):
    onnx.save(proto, folder / name)
    return folder / name


def feed(model):
    rng = np.random.default_rng(0)
    spec = Session(model).inputs[0]
    shape = [d if isinstance(d, int) else 1 for d in spec.shape]
    return {spec.name: rng.normal(size=shape).astype(np.float32)}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The digits example in int8."""
    path = tmp_path_factory.mktemp("models") / "digits.int8.onnx"
    onnxq.quantize(DIGITS / "digits.onnx", path, CALIB, limit=16)
    return path


@pytest.fixture(scope="module")
def deployed(quantized):
    folder = quantized.parent / "app"
    return onnxq.deploy(quantized, folder, data=CALIB), folder


# ------------------------------------------------------------------------------- what is there


def test_the_manifest_tells_of_every_file(deployed, quantized):
    result, folder = deployed
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest == json.loads(json.dumps(result.to_dict()))
    listed = {f["name"]: f for f in manifest["files"]}
    assert {p.name for p in folder.iterdir()} == {*listed, "manifest.json"}
    for name, file in listed.items():
        data = (folder / name).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    kinds = [(f["kind"], f["style"], f["session"]) for f in manifest["files"]]
    assert kinds == [
        ("onnx", None, {}),
        ("ort", "fixed", {}),
        ("operators", "fixed", {}),
        ("ort", "runtime", REPLAY),
        ("operators", "runtime", {}),
    ]
    assert (folder / "digits.int8.onnx").read_bytes() == quantized.read_bytes()
    assert manifest["inputs"] == [{"name": "input", "type": "float32", "shape": ["N", 1, 8, 8]}]
    assert manifest["outputs"] == [{"name": "logits", "type": "float32", "shape": ["N", 10]}]
    assert 'name = "insert-qdq"' in manifest["recipe"]
    assert set(manifest["versions"]) >= {"onnxq", "onnx", "onnxruntime"}
    assert (manifest["target"], manifest["quantized"]) == ("ort-cpu", True)
    assert manifest["integer_macs"] == manifest["macs"] > 0
    assert (result.folder, result.preprocess) == (folder, None)


def test_ort_files_compute_what_the_onnx_computes(deployed):
    result, folder = deployed
    with np.load(DIGITS / "test.npz") as test:
        x = {"input": test["input"][:32]}
    wanted = {
        level: Session(folder / "digits.int8.onnx", level=level).run(x)["logits"]
        for level in ("basic", "extended", "all")
    }
    fixed = Session(folder / "digits.int8.ort").run(x)["logits"]
    np.testing.assert_array_equal(fixed, wanted["extended"])
    later = folder / "digits.int8.with_runtime_opt.ort"
    np.testing.assert_array_equal(Session(later).run(x)["logits"], wanted["basic"])
    np.testing.assert_array_equal(
        Session(later, config=REPLAY).run(x)["logits"], wanted["extended"]
    )
    assert [(v.file, v.session, v.level) for v in result.verifications] == [
        ("digits.int8.ort", {}, "extended"),
        (later.name, {}, "basic"),
        (later.name, REPLAY, "extended"),
    ]
    for found in result.verifications:
        assert [(o.sqnr_db, o.max_abs_error, o.samples) for o in found.outputs] == [(200, 0, 8)]
    assert result.verified_on == "given"


def test_nothing_of_this_processor_is_in_the_files(deployed):
    # onnxruntime would add blocks of channels on x86-64: the domain com.microsoft.nchwc
    for config in deployed[1].glob("*.config"):
        operators, _ = parse_config(str(config))
        assert set(operators) == {"ai.onnx", "com.microsoft"}


@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_activations_keep_their_type(activations, tmp_path):
    model = tmp_path / "m.onnx"
    onnxq.quantize(DIGITS / "digits.onnx", model, CALIB, limit=8, activations=activations)
    onnxq.deploy(model, tmp_path / "app", data=CALIB, limit=2)
    config = (tmp_path / "app" / "m.required_operators_and_types.config").read_text()
    types = re.findall(r'QLinearConv\{"inputs": \{"0": \["(\w+)"\]', config)
    assert types == [f"{activations}_t"] * 2  # as saved, and channels-last


# ------------------------------------------------------------------------------- custom builds


def operators(config, types=True):
    """Domain -> operators, and operator -> its types, as onnxruntime's build reads them."""
    found, usage = parse_config(str(config), enable_type_reduction=types)
    ops = {d: set().union(*sets.values()) for d, sets in found.items()}
    lines = [] if usage is None else usage.get_cpp_entries()
    return ops, {re.search(r"\(\w+, (\w+),", x)[1]: x for x in lines}


def test_operators_that_the_files_and_loading_need(deployed):
    folder = deployed[1]
    fixed, types = operators(folder / "digits.int8.required_operators_and_types.config")
    assert fixed["ai.onnx"] >= {"QuantizeLinear", "QLinearConv", "Transpose"}
    assert fixed["com.microsoft"] >= {"QLinearConv", "QLinearAdd", "QGemm"}  # channels-last
    assert "float" not in types["QLinearConv"]
    later, _ = operators(
        folder / "digits.int8.required_operators_and_types.with_runtime_opt.config"
    )
    assert later["ai.onnx"] > {"Conv", "Gemm", "Add", "QuantizeLinear", "DequantizeLinear"}
    assert later["com.microsoft"] == fixed["com.microsoft"]


@pytest.mark.parametrize("style", OptimizationStyle)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the converter's
def test_no_operator_less_than_the_converter_of_onnxruntime_lists(style, deployed, tmp_path, capfd):
    folder = deployed[1]
    shutil.copy(folder / "digits.int8.onnx", tmp_path)
    convert_onnx_models_to_ort(
        tmp_path / "digits.int8.onnx",
        optimization_styles=[style],
        target_platform="arm",
        enable_type_reduction=True,
    )
    (config,) = tmp_path.glob("*.config")
    ours, our_types = operators(folder / config.name)
    theirs, their_types = operators(config)
    for domain, names in theirs.items():
        assert names <= ours[domain]
    for name, line in their_types.items():
        assert set(re.findall(r"\w+", line)) <= set(re.findall(r"\w+", our_types[name]))


def test_reading_operators_touches_neither_logging_nor_the_path(deployed):
    # onnxruntime's tools do, where they are imported first: in a process of its own
    code = (
        "import logging, sys; from onnxq.runtime import required_operators as read;"
        "before = logging.getLogger().handlers[:], sys.path[:]; text, typed = read(sys.argv[1]);"
        "assert (logging.getLogger().handlers, sys.path) == before; assert 'QLinearConv' in text"
    )
    file = deployed[1] / "digits.int8.ort"
    subprocess.run([sys.executable, "-W", "error", "-c", code, file], check=True)


def test_operators_without_types_where_a_type_has_no_name(deployed, quantized, monkeypatch):
    wanted = operators(deployed[1] / "digits.int8.required_operators_and_types.config", types=False)
    monkeypatch.setattr(FbsTypeInfo, "tensordatatype_to_string", {})
    folder = quantized.parent / "untyped"
    result = onnxq.deploy(quantized, folder, data=CALIB, limit=1)
    assert [f.name for f in result.files if f.kind == "operators"] == [
        "digits.int8.required_operators.config",
        "digits.int8.required_operators.with_runtime_opt.config",
    ]
    found = folder / "digits.int8.required_operators.config"
    assert operators(found) == wanted
    assert "{" not in found.read_text()


# ------------------------------------------------------------------------------- any model


def test_a_float_model_is_deployable_and_told_apart(tmp_path):
    result = onnxq.deploy(save(tmp_path, parse(CONV)), tmp_path / "app")
    assert not result.quantized
    assert (result.integer_macs, result.macs) == (0, 4 * 36 * 27 + 5 * 16 * 36)
    assert "not quantized" in result.notes[0]
    assert result.recipe is None
    assert result.verified_on == "made up"
    assert any("sizes are open (x: float32 [N x 3 x 8 x 8])" in note for note in result.notes)


@pytest.mark.parametrize(("target", "breaks"), [("ort-mobile", False), ("xnnpack", True)])
def test_what_the_target_does_not_run_in_integers_is_noted(target, breaks, quantized, tmp_path):
    result = onnxq.deploy(quantized, tmp_path / "app", target=target)
    found = [
        note for note in result.notes if "xnnpack has no integer Conv of uint8 and int8" in note
    ]
    assert bool(found) == breaks
    assert all("use uint8 weights with uint8 activations" in note for note in found)
    written = json.loads((tmp_path / "app" / "manifest.json").read_text())
    assert written["notes"] == result.notes


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }",
        "g (float[N,4] x) => (float[N,4] y) <float[4,4] a, float[4,4] b, float[4] c, float[4,4] d>"
        "{ e = MatMul(x, a) f = MatMul(e, b) h = Sub(f, c) y = MatMul(h, d) }",
    ],
)
def test_styles_that_do_not_differ_are_one_file(text, tmp_path):
    result = onnxq.deploy(save(tmp_path, parse(text)), tmp_path / "app")
    assert [f.name for f in result.files] == [
        "m.onnx",
        "m.ort",
        "m.required_operators_and_types.config",
    ]
    assert [v.file for v in result.verifications] == ["m.ort"]
    assert {p.name for p in (tmp_path / "app").iterdir()} == {
        *(f.name for f in result.files),
        "manifest.json",
    }


def test_a_file_that_onnxruntime_does_not_load_again_is_left_out(tmp_path):
    # 4-bit integers that stay so until the model is loaded have no place in the ORT format
    text = "g (float[N,64] x) => (float[N,32] y) <float[64,32] w> { y = MatMul(x, w) }"
    source = save(tmp_path, parse(text))
    model = tmp_path / "w4.onnx"
    onnxq.quantize(source, model, activations="float", weights="int4/block=32")
    result = onnxq.deploy(model, tmp_path / "app")
    assert [f.style for f in result.files] == [None, "fixed", "fixed"]
    (note,) = [n for n in result.notes if n.startswith("left out")]
    assert re.search(r"w4\.with_runtime_opt\.ort: onnxruntime does not load", note)
    assert not [*(tmp_path / "app").glob("*with_runtime_opt*")]
    assert "some layers have nothing but their weights in integers (MatMulNBits)" in result.notes


def test_a_model_that_the_format_cannot_hold(tmp_path):
    text = "g (float[N,4] x) => (float[N,4] y) { y = Identity(x) }"
    proto = parse(text, opset=21)
    packed = helper.make_tensor("q", TensorProto.INT4, [4], b"\x21\x43", raw=True)
    scale = numpy_helper.from_array(np.float32(0.5), "s")
    proto.graph.initializer.extend([packed, scale])
    del proto.graph.node[:]
    proto.graph.node.extend(
        [
            helper.make_node("DequantizeLinear", ["q", "s"], ["d"]),
            helper.make_node("Add", ["x", "d"], ["y"]),
        ]
    )
    before = tree(tmp_path), save(tmp_path, proto)
    with pytest.raises(UnsupportedError, match=r"onnxruntime does not load .*m\.ort\); ship the"):
        onnxq.deploy(before[1], tmp_path / "app")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_models_beyond_two_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(deployment, "TWO_GB", 100)
    with pytest.raises(UnsupportedError, match="holds 2 GB at most"):
        onnxq.deploy(save(tmp_path, parse(CONV)), tmp_path / "app")


def test_weights_of_another_file_come_along(tmp_path):
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "m.onnx"
    onnx.save(parse(CONV), source, save_as_external_data=True, location="w.bin", size_threshold=0)
    onnxq.deploy(source, tmp_path / "app")
    shutil.rmtree(tmp_path / "in")
    x = feed(tmp_path / "app" / "m.onnx")
    wanted = Session(parse(CONV), level="extended").run(x)["y"]
    for name in ("m.onnx", "m.ort"):
        got = Session(tmp_path / "app" / name, level="extended").run(x)["y"]
        np.testing.assert_array_equal(got, wanted)


def test_a_model_in_memory(tmp_path):
    result = onnxq.deploy(onnxq.load(parse(CONV)), tmp_path / "app")
    assert [f.name for f in result.files][:2] == ["model.onnx", "model.ort"]


def test_names_with_spaces_and_other_letters(quantized, tmp_path):
    home = tmp_path / "mit Ähre und 漢字"
    home.mkdir()
    source = shutil.copy(quantized, home / "mein Módell.v2.onnx")
    result = onnxq.deploy(source, home / "das Büro", data=CALIB, limit=1)
    assert [f.name for f in result.files][:2] == ["mein Módell.v2.onnx", "mein Módell.v2.ort"]
    manifest = json.loads((home / "das Büro" / "manifest.json").read_text("utf-8"))
    assert manifest["model"] == "mein Módell.v2"


def test_the_same_model_gives_the_same_folder(quantized, deployed, tmp_path):
    onnxq.deploy(quantized, tmp_path / "app", data=CALIB)
    trees = [tree(folder) for folder in (tmp_path / "app", deployed[1])]
    manifests = [json.loads(t.pop("manifest.json")) for t in trees]
    for manifest, files in zip(manifests, trees, strict=True):
        for file in manifest["files"]:
            if file["kind"] == "ort":  # onnxruntime writes it in an order of its own each time
                del file["sha256"]
                files[file["name"]] = len(files[file["name"]])
    assert trees[0] == trees[1]
    assert manifests[0] == manifests[1]


def test_integers_and_sequences_as_outputs(tmp_path):
    text = (
        "g (float[N,4] x) => (int64[] i, seq(float[N,4]) s)"
        "{ i = ArgMax<axis=1>(x) s = SequenceConstruct(x, x) }"
    )
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    result = onnxq.deploy(save(tmp_path, proto), tmp_path / "app")
    outputs = {o.name: o for v in result.verifications for o in v.outputs}
    assert (outputs["i"].equal, outputs["i"].sqnr_db) == (1, None)
    assert result.to_dict()["outputs"][1] == {"name": "s", "type": None, "shape": None}
    assert "s: not compared" in cli("deploy", tmp_path / "m.onnx", tmp_path / "b").stdout


@pytest.mark.zoo
@pytest.mark.parametrize("name", ZOO)
def test_models_of_the_zoo(name, tmp_path):
    result = onnxq.deploy(zoo(name), tmp_path / "app", limit=1)
    assert {o.sqnr_db for v in result.verifications for o in v.outputs} <= {200, None}
    assert {f.kind for f in result.files} == {"onnx", "ort", "operators"}


# ------------------------------------------------------------------------------- fixed sizes


def test_sizes_are_fixed_everywhere(quantized, tmp_path):
    result = onnxq.deploy(quantized, tmp_path / "app", shapes={"input": (2, 1, 8, 8)})
    name = "digits.int8"
    for session in (Session(tmp_path / "app" / f"{name}{s}") for s in (".onnx", ".ort")):
        assert [s.shape for s in (*session.inputs, *session.outputs)] == [(2, 1, 8, 8), (2, 10)]
    assert [s.shape for s in (*result.inputs, *result.outputs)] == [(2, 1, 8, 8), (2, 10)]
    assert not any("sizes are open" in note for note in result.notes)
    x = feed(tmp_path / "app" / f"{name}.onnx")
    wanted = Session(quantized).run(x)["logits"]
    got = Session(tmp_path / "app" / f"{name}.onnx").run(x)["logits"]
    np.testing.assert_array_equal(got, wanted)


TWO = "g (float[N,T] a, float[N,K] b) => (float[N,M] y) { y = Concat<axis=1>(a, b) }"


def test_a_symbol_is_one_size_wherever_it_stands(tmp_path):
    source = save(tmp_path, parse(TWO))
    result = onnxq.deploy(source, tmp_path / "app", shapes={"a": (3, 5)})
    assert [s.shape for s in result.inputs] == [(3, 5), (3, "K")]
    result = onnxq.deploy(source, tmp_path / "b", shapes={"a": (3, 5), "b": (3, 2)})
    assert [s.shape for s in (*result.inputs, *result.outputs)] == [(3, 5), (3, 2), (3, 7)]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"c": (1, 2)}, "no input 'c'; inputs are a, b"),
        ({"a": (1,)}, "input a: wanted N x T, got 1"),
        ({"a": (1, 5), "b": (2, 5)}, r"'N' would be 1 and 2 \(input b\); give both the same"),
    ],
)
def test_sizes_that_do_not_fit(shapes, message, tmp_path):
    source = save(tmp_path, parse(TWO))
    with pytest.raises(ModelError, match=message):
        onnxq.deploy(source, tmp_path / "app", shapes=shapes)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_samples_have_to_have_the_fixed_sizes(quantized, tmp_path):
    with pytest.raises(CalibrationError, match=r"wanted input: float32 \[2 x 1 x 8 x 8\]"):
        onnxq.deploy(quantized, tmp_path / "app", shapes={"input": (2, 1, 8, 8)}, data=CALIB)
    assert [*tmp_path.iterdir()] == []


# ------------------------------------------------------------------------------- preprocessing


def test_preprocessing_is_in_the_manifest_as_the_input_has_it(tmp_path):
    source = save(tmp_path, parse(CONV))
    given = {"shapes": {"x": (1, 3, 8, 8)}, "preprocess": "imagenet"}
    result = onnxq.deploy(source, tmp_path / "app", **given)
    found = json.loads((tmp_path / "app" / "manifest.json").read_text())["preprocess"]
    assert found == {
        "size": [8, 8],
        "fit": "crop",
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "pad_value": 114,
        "order": "RGB",
        "layout": "NCHW",
        "scale": 1 / 255,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert Preprocess(**found) == result.preprocess


@pytest.mark.parametrize("kind", ["arrays", "pictures"])
def test_preprocessing_beside_samples_of_any_kind(kind, tmp_path):
    source, samples = save(tmp_path, parse(CONV)), tmp_path / "samples"
    samples.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    if kind == "arrays":
        np.savez(samples / "a.npz", x=picture.transpose(2, 0, 1)[None].astype(np.float32))
    else:
        Image.fromarray(picture).save(samples / "a.png")
    result = onnxq.deploy(source, tmp_path / "app", data=samples, preprocess="unit")
    assert result.preprocess == Preprocess(size=(8, 8), layout="NCHW")
    assert (result.verified_on, result.verifications[0].outputs[0].samples) == ("given", 1)


def test_preprocessing_that_does_not_fit(tmp_path):
    source = save(tmp_path, parse(TWO))
    with pytest.raises(CalibrationError, match="one input of pictures, and 0 look like one"):
        onnxq.deploy(source, tmp_path / "app", preprocess="imagenet")
    with pytest.raises(RecipeError, match="did you mean imagenet"):
        onnxq.deploy(source, tmp_path / "app", preprocess="imagnet")
    gray = parse(CONV.replace("N,3", "N,2").replace("4,3,3,3", "4,2,3,3"))
    with pytest.raises(CalibrationError, match="wanted channels: 2"):
        onnxq.deploy(save(tmp_path, gray), tmp_path / "app", preprocess="imagenet")


# ------------------------------------------------------------------------------- verification


def other_model(monkeypatch, proto, folder):
    """Let the .ort files be made of another model."""
    other = save(folder, proto, "other.onnx")
    write = runtime.save_ort

    def save_ort(model, path, style):
        write(other, path, style)

    monkeypatch.setattr(ort_format, "save_ort", save_ort)


def test_a_file_that_computes_something_else_is_an_error(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    proto = parse(CONV)
    source = save(home, proto)
    weight = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight[1] *= 1.01  # of four channels one, by a hundredth: 40 to 50 dB
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    other_model(monkeypatch, proto, tmp_path)
    before = tree(home)
    with pytest.raises(ModelError, match=r"not compute .* output y: SQNR [45]\d\.\d dB.*m\.ort"):
        onnxq.deploy(source, home / "app")
    assert tree(home) == before


def test_integers_that_differ_are_an_error(tmp_path, monkeypatch):
    text = "g (float[N,4] x) => (int64[] i) {{ i = {}<axis=1>(x) }}"
    home = tmp_path / "home"
    home.mkdir()
    source = save(home, parse(text.format("ArgMax")))
    other_model(monkeypatch, parse(text.format("ArgMin")), tmp_path)
    with pytest.raises(ModelError, match=r"output i: 0\.0% of its values are equal"):
        onnxq.deploy(source, home / "app")
    assert [p.name for p in home.iterdir()] == ["m.onnx"]


# ------------------------------------------------------------------------------- the folder


def test_a_folder_that_is_empty_is_filled(tmp_path):
    source = save(tmp_path, parse(CONV))
    (tmp_path / "app").mkdir()
    onnxq.deploy(source, tmp_path / "app")
    assert (tmp_path / "app" / "manifest.json").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "app"}


def test_a_folder_that_is_not_empty_is_replaced_only_if_told_so(tmp_path):
    source, app = save(tmp_path, parse(CONV)), tmp_path / "app"
    (app / "sub").mkdir(parents=True)
    (app / "sub" / "old").write_bytes(b"old")
    before = tree(tmp_path)
    with pytest.raises(OnnxqError, match=r"the folder is not empty .*app\); .* --force"):
        onnxq.deploy(source, app)
    with pytest.raises(TargetError):
        onnxq.deploy(source, app, force=True, target="none")
    with pytest.raises(ModelError):
        onnxq.deploy(source, app, force=True, shapes={"x": (1,)})
    assert tree(tmp_path) == before
    onnxq.deploy(source, app, force=True)
    assert not (app / "sub").exists()
    assert (app / "m.ort").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "app"}


def test_a_link_to_a_folder_stays_one(tmp_path):
    source, link = save(tmp_path, parse(CONV)), tmp_path / "link"
    (tmp_path / "app").mkdir()
    link.symlink_to(tmp_path / "app")
    assert onnxq.deploy(source, link).folder == link
    assert link.is_symlink()
    assert (tmp_path / "app" / "m.ort").exists()


@pytest.mark.parametrize("at", ["manifest", "rename", "file"])
def test_a_failure_at_the_end_leaves_the_old_folder(at, tmp_path, monkeypatch):
    source, app = save(tmp_path, parse(CONV)), tmp_path / "app"
    app.mkdir()
    (app / "old").write_bytes(b"old")
    before = tree(tmp_path)

    def full(*args, **options):
        raise OSError(28, os.strerror(28))

    rename = os.rename
    if at == "manifest":
        monkeypatch.setattr(os, "replace", full)
    elif at == "file":
        monkeypatch.setattr(shutil, "copyfile", full)
    else:
        monkeypatch.setattr(
            os, "rename", lambda a, b: full() if Path(a).name == "new" else rename(a, b)
        )
        monkeypatch.setattr("onnxq.scratch._exchange", lambda one, other: False)
    with pytest.raises(OnnxqError, match="cannot be written: No space left on device"):
        onnxq.deploy(source, app, force=True)
    assert tree(tmp_path) == before


def test_a_folder_filled_in_the_meantime_is_left_alone(tmp_path, monkeypatch):
    source, app = save(tmp_path, parse(CONV)), tmp_path / "app"
    app.mkdir()
    write = deployment.write_text

    def meanwhile(path, text):
        (app / "new").write_bytes(b"of someone else")
        write(path, text)

    monkeypatch.setattr(deployment, "write_text", meanwhile)
    with pytest.raises(OnnxqError, match="not empty"):
        onnxq.deploy(source, app)
    assert [p.name for p in app.iterdir()] == ["new"]


def test_an_ort_file_that_cannot_be_written(tmp_path):
    source = save(tmp_path, parse(CONV))
    with pytest.raises(OnnxqError, match=r"cannot be written: .*no.m\.ort\); check the folder"):
        runtime.save_ort(source, tmp_path / "no" / "m.ort")


def test_folders_that_cannot_be(tmp_path, monkeypatch):
    source = save(tmp_path, parse(CONV))
    inside = tmp_path / "full"
    inside.mkdir()
    shutil.copy(source, inside)
    before = tree(tmp_path)
    for folder, says in (
        (tmp_path / "no" / "app", "no such folder .*no.*create it first"),
        (source, "is a file, not a folder"),
        (tmp_path / ("o" * 300), "cannot be written: File name too long"),
    ):
        with pytest.raises(OnnxqError, match=says):
            onnxq.deploy(source, folder)
    lies = "an input or the current folder lies in it"
    with pytest.raises(OnnxqError, match=lies):
        onnxq.deploy(inside / "m.onnx", inside, force=True)
    monkeypatch.chdir(inside)
    with pytest.raises(OnnxqError, match=lies):
        onnxq.deploy(source, ".", force=True)
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------- the command line


def test_the_command_lists_files_and_verification(quantized, tmp_path):
    app, facts = tmp_path / "app", tmp_path / "facts.json"
    given = ["--data", CALIB, "--limit", 4, "--shape", "input=1x1x8x8"]
    result = cli("deploy", quantized, app, *given, "--preprocess", "raw", "--json", facts)
    assert result.exit_code == 1  # three channels, and the model takes one
    gray = tmp_path / "gray.toml"
    gray.write_text('preset = "raw"\norder = "GRAY"\n')
    result = cli("deploy", quantized, app, *given, "--preprocess", gray, "--json", facts)
    assert result.exit_code == 0, result.output
    assert json.loads(facts.read_text()) == json.loads((app / "manifest.json").read_text())
    rows = result.stdout.splitlines()
    assert rows[0] == f"{app}: digits.int8 for ort-cpu"
    for file in app.iterdir():
        size = file.stat().st_size
        assert any(r.split()[:2] == [file.name, f"{size / 1e3:.1f}"] for r in rows), file.name
    assert any(r.startswith("MACs in integers on ARM: 100.0%") for r in rows)
    assert "verified in fresh sessions, against the .onnx optimized alike, on 4 samples:" in rows
    same = ": logits: SQNR 200.0 dB, max |error| 0"
    counts = Counter(r.strip() for r in rows if r.endswith(same))
    later = "digits.int8.with_runtime_opt.ort"
    files = ("digits.int8.ort", later, f"{later}, optimizations replayed")
    assert counts == {file + same: 1 for file in files}
    assert "verify digits.int8.ort" in result.stderr
    again = cli("deploy", quantized, app, *given, "--quiet")
    assert again.exit_code == 1
    assert again.stderr.startswith("error: the folder is not empty")
    again = cli("deploy", quantized, app, *given, "--quiet", "--force")
    assert (again.exit_code, again.output) == (0, "")


def custom(folder):
    node = helper.make_node("Foo", ["x"], ["y"], domain="my.own")
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy"]
    opsets = [helper.make_opsetid("my.own", 1), helper.make_opsetid("", 17)]
    graph = helper.make_graph([node], "g", info[:1], info[1:])
    return save(folder, helper.make_model(graph, opset_imports=opsets, ir_version=8))


def ort(folder):
    runtime.save_ort(save(folder, parse(CONV), "first.onnx"), folder / "m.ort")
    return folder / "m.ort"


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (ort, [], ["is a model in ORT format", "m.ort", "give the .onnx"]),
        (custom, [], ["my.own", "Foo", "m.onnx"]),
        (lambda f: f / "gone.onnx", [], ["no such file", "gone.onnx"]),
        (lambda f: DIGITS / "digits.onnx", ["--target", "ort-cpi"], ["did you mean ort-cpu?"]),
        (lambda f: DIGITS / "digits.onnx", ["--data", "gone"], ["no such file or folder", "gone"]),
    ],
)
def test_bad_input_is_one_line(make, options, says, tmp_path):
    source = make(tmp_path)
    before = tree(tmp_path)
    result = cli("deploy", source, tmp_path / "app", *options)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = [r for r in result.stderr.splitlines() if r.startswith("error")]
    assert all(part in line for part in says)
    assert tree(tmp_path) == before


def test_one_default_target():
    (option,) = [p for p in main.commands["deploy"].params if p.name == "target"]
    assert option.default == deployment.deploy.__kwdefaults__["target"]
    (option,) = [p for p in main.commands["deploy"].params if p.name == "limit"]
    assert option.show_default == str(deployment.SAMPLES)
