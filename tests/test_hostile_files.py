"""Files beside the model, made to break what reads them: samples, recipes, encodings, what is kept.

Where a file could take memory or time without end, the verb runs in a process with limits.
"""

import json
import os
import shutil
import struct
import zipfile
import zlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from PIL import Image

from onnxq.errors import CalibrationError
from onnxq.files import parse_toml
from onnxq.model import load
from onnxq.pictures import Preprocess
from onnxq.readers import read_npz
from onnxq.signature import TensorSpec
from tests.hostile import limited, one_line, onnxq, refused
from tests.models import parse
from tests.test_bad_input import TEXT, samples, save, tree

MIB = 1 << 20


@pytest.fixture
def model(tmp_path):
    """A small model, as a file."""
    return save(tmp_path, parse(TEXT))


def quantize(model, calib, *options):
    return ["quantize", model, model.parent / "out.onnx", "--calib", calib, *options, "--quiet"]


# ------------------------------------------------------------------------------- arrays


def head(shape, descr="<f4", length=None, version=1):
    """The start of a .npy file."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    count = len(text) if length is None else length
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack(["<H", "<I"][version - 1], count) + text


def deflated(path, **members):
    """A .npz archive; a member is its start, and how many zeros follow."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, (start, zeros) in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                file.write(start)
                for _ in range(zeros // (16 * MIB)):
                    file.write(bytes(16 * MIB))
    return path


ARRAYS = {
    "elements of no bytes": head((10**18, 3, 8, 8), "|V0"),
    "text of no bytes": head((10**18, 3, 8, 8), "<U0"),
    "more values than there are numbers": head((10**30, 3, 8, 8)),
    "negative sizes": head((-1, -3, 8, 8)) + bytes(9999),
    "sizes that are no numbers": head((True, 3, 8, 8)) + bytes(9999),
    "a header of minus signs": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"-" * 9000,
    "a header of brackets": b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000,
    "a header of 4 GiB": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"x",
    "a hundred axes": head((1,) * 100) + bytes(999),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_headers_that_lie(name, model, tmp_path):
    (tmp_path / "a.npy").write_bytes(ARRAYS[name])
    before = tree(tmp_path)
    refused(onnxq(*quantize(model, tmp_path / "a.npy")), "a.npy")
    assert tree(tmp_path) == before
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", ARRAYS[name])
    refused(onnxq(*quantize(model, tmp_path / "a.npz")), "a.npz")


def test_archives_are_not_inflated(model, tmp_path):
    """Headers of gigabytes, and arrays that do not fit the input."""
    for name in ("headers", "arrays"):
        (tmp_path / name).mkdir()
    start = b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 30)
    header = deflated(tmp_path / "headers" / "a.npz", x=(start, 320 * MIB))
    start = head((320 * MIB // 4 // 588, 3, 14, 14))
    values = deflated(tmp_path / "arrays" / "a.npz", x=(start, 320 * MIB))
    assert header.stat().st_size + values.stat().st_size < 4 * MIB
    calib = (header, header.parent, values, values.parent)
    found, peak = limited(*(quantize(model, path) for path in calib))
    for outcome, says in zip(
        found, [*["its header is too long"] * 2, *["wanted x"] * 2], strict=True
    ):
        assert outcome.code == 1
        assert says in one_line(outcome.stdout, outcome.stderr)
    assert peak < 400 * MIB


def test_an_archive_of_thousands_of_arrays(model, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for index in range(1001):
            archive.writestr(f"x{index}.npy", head((1,)) + bytes(4))
    refused(onnxq(*quantize(model, tmp_path / "a.npz")), "it holds 1,001 arrays")
    with pytest.raises(CalibrationError, match="1,001 arrays"):
        read_npz(tmp_path / "a.npz")


def test_names_in_an_archive_lead_nowhere(model, tmp_path):
    (tmp_path / "calib").mkdir()
    with zipfile.ZipFile(tmp_path / "calib" / "a.npz", "w") as archive:
        archive.writestr("../x.npy", head((1, 3, 8, 8)) + bytes(768))
    before = tree(tmp_path)
    refused(onnxq(*quantize(model, tmp_path / "calib")), "wanted input 'x', got '../x'")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("dims", [[10**6, 10**6], [-1, 3]])
def test_tensors_that_lie(model, tmp_path, dims):
    (tmp_path / "calib").mkdir()
    tensor = TensorProto(data_type=1, dims=dims, name="x", float_data=[1, 2, 3])
    (tmp_path / "calib" / "input_0.pb").write_bytes(tensor.SerializeToString())
    refused(onnxq(*quantize(model, tmp_path / "calib")), "calib")


# ------------------------------------------------------------------------------- what never ends


def pipe(path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    os.mkfifo(path)
    return path


def device(path):
    path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.png", "input_0.pb"])
def test_samples_that_never_end(name, make, model, tmp_path):
    (tmp_path / "calib").mkdir()
    make(tmp_path / "calib" / name)
    options = ["--preprocess", "unit"] if name.endswith("png") else []
    result = onnxq(*quantize(model, tmp_path / "calib", *options))
    refused(result, "it is a pipe or device, not a file", name)


NEVER_ENDING = {
    "recipe": lambda m, c, p: quantize(m, c, "--recipe", p("r.toml")),
    "run": lambda m, c, p: ["run", p("r.toml"), m, m.parent / "out.onnx", "--calib", c],
    "preprocessing": lambda m, c, p: quantize(m, c, "--preprocess", p("p.toml")),
    "encodings": lambda m, c, p: ["encodings", "apply", m, p("e.json"), m.parent / "out.onnx"],
    "encodings to convert": lambda m, c, p: ["encodings", "convert", p("e.json"), m.parent / "o"],
    "encodings to compare": lambda m, c, p: ["encodings", "diff", p("a.json"), p("b.json")],
    "model": lambda m, c, p: ["inspect", p("in2.onnx")],
    "model to compare": lambda m, c, p: ["compare", m, p("in2.onnx"), "--data", c],
}


@pytest.mark.parametrize("make", [pipe, device])
@pytest.mark.parametrize("name", NEVER_ENDING)
def test_files_that_never_end(name, make, model, tmp_path):
    arguments = NEVER_ENDING[name](model, samples(tmp_path), lambda n: make(tmp_path / n))
    before = tree(tmp_path)
    refused(onnxq(*arguments), "is a pipe or device, not a")
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------- pictures


def png(path, width, height):
    """A picture of which there is nothing but the size."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    sizes = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + sizes + chunk(b"IDAT", zlib.compress(b"")))


@pytest.mark.parametrize(
    ("width", "height", "says"),
    [
        (2**31 - 1, 2**31 - 1, "more than 89,478,485 pixels"),
        (10**5, 10**3, "more than 89,478,485 pixels"),
        (800, 800, "the picture cannot be read"),
        (0, 0, "is not a picture that can be read"),
    ],
)
def test_pictures_that_lie_about_their_size(width, height, says, model, tmp_path):
    (tmp_path / "calib").mkdir()
    png(tmp_path / "calib" / "a.png", width, height)
    refused(onnxq(*quantize(model, tmp_path / "calib", "--preprocess", "unit")), says, "a.png")


def test_a_picture_that_would_become_gigabytes(tmp_path):
    """A thin one, where the model fixes its short side alone."""
    Image.new("RGB", (60000, 1)).save(tmp_path / "a.png")
    spec = TensorSpec("x", np.dtype("f4"), (1, 3, 224, "W"))
    with pytest.raises(CalibrationError, match="would become one of 224 x 13440000"):
        Preprocess().apply(tmp_path / "a.png", spec)


@pytest.mark.parametrize("size", ["100000", "[1, 100000]", "1" * 31, "-1", "true", "1e9"])
def test_sizes_that_no_picture_has(size, model, tmp_path):
    (tmp_path / "p.toml").write_text(f"size = {size}\n")
    result = onnxq(*quantize(model, samples(tmp_path), "--preprocess", tmp_path / "p.toml"))
    refused(result, "size: wanted pixels, or [height, width], up to 65535", "p.toml")


# ------------------------------------------------------------------------------- TOML

TOML = {
    "integers without end": "size = " + "1" * 5000,
    "lists in lists": "a = " + "[" * 100_000,
    "tables in tables": "a = " + "{a=" * 50_000,
    "a key of many parts": ".".join("a" * 300_000) + " = 1",
    "a table of many parts": "[" + ".".join("a" * 300_000) + "]",
    "a megabyte": "# " + "a" * MIB,
    "zero bytes": 'name = "\0"',
    "half a character": '[[pass]]\nname = "\\ud800"\n',
    "a pass of many letters": '[[pass]]\nname = "' + "calibrate" * 100_000 + '"\n',
}


@pytest.mark.parametrize("option", ["--recipe", "--preprocess"])
@pytest.mark.parametrize("name", TOML)
def test_hostile_toml(name, option, model, tmp_path):
    (tmp_path / "r.toml").write_text(TOML[name])
    result = onnxq(*quantize(model, samples(tmp_path), option, tmp_path / "r.toml"))
    refused(result, "r.toml")
    assert len(result.stderr) < 5000


def test_dots_that_are_no_keys_are_read():
    text = "a = [" + "0.5, " * 500 + ']\nb = "' + "x." * 500 + '"\n'
    assert parse_toml(text) == {"a": [0.5] * 500, "b": "x." * 500}


# ------------------------------------------------------------------------------- encodings


def version_2(**entry):
    fields = {"name": "x", "output_dtype": "uint8", "y_scale": 0.1, "y_zero_point": 0} | entry
    return json.dumps({"version": "2.0.0", "encodings": [fields]})


def version_1(**entry):
    fields = {"name": "x", "dtype": "INT", "enc_type": "PER_TENSOR", "bw": 8, "is_sym": False}
    fields |= {"scale": [0.1], "offset": [-1], **entry}
    sections = {"activation_encodings": [fields], "param_encodings": []}
    return json.dumps({"version": "1.0.0", **sections})


def overrides(**entry):
    return json.dumps({"x": [{"quant_type": "QUInt8", **entry}]})


ENCODINGS = {
    "lists in lists": "[" * 1_000_000,
    "objects in objects": '{"a":' * 1_000_000,
    "a number without end": '{"version":' + "1" * 5000 + "}",
    "a version that is no text": '{"version": {}}',
    "two versions": '{"version": "2.0.0", "version": "1.0.0", "encodings": []}',
    "two scales": version_2().replace('"y_scale"', '"y_scale": 7, "y_scale"'),
    "a scale beyond floats": version_2(y_scale=10**400),
    "a scale of infinity": version_2(y_scale=float("inf")),
    "a zero point beyond integers": version_2(y_zero_point=10**30),
    "an axis beyond integers": version_2(axis=10**30, y_scale=[0.1]),
    "a type that is a list": version_2(output_dtype=["uint8"]),
    "a name that is a list": version_2(name=["x"]),
    "blocks of nothing": version_2(block_size=0, axis=0, y_scale=[0.1]),
    "a type that is an object": version_1(dtype={"a": 1}),
    "a billion bits": version_1(bw=10**9),
    "an offset beyond floats": version_1(offset=[-(10**400)]),
    "a quantization type that is a list": overrides(quant_type=["a"], scale=1, zero_point=0),
    "a range beyond floats": overrides(rmin=-1e308, rmax=1e308),
    "a range beyond integers": overrides(rmin=-(10**320), rmax=1),
    "a range upside down": overrides(rmin=5, rmax=-5),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_hostile_encodings(name, model, tmp_path):
    file, good = tmp_path / "e.json", tmp_path / "good.json"
    file.write_text(ENCODINGS[name])
    good.write_text(version_2())
    before = tree(tmp_path)
    refused(onnxq("encodings", "apply", model, file, tmp_path / "out.onnx"), "e.json")
    if "axis" not in name:  # which only the model shows to be wrong
        convert = ["encodings", "convert", file, tmp_path / "out.json"]
        refused(onnxq(*convert, "--to", "1.0.0", "--model", model), "e.json")
        refused(onnxq("encodings", "diff", file, good), "e.json")
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------- what is kept


def kept(model, calib, folder):
    """The first file that a search has kept."""
    args = quantize(model, calib, "--recipe", "accurate", "--resume", folder)
    result = onnxq(*args)
    assert result.exit_code == 0, result.output
    return args, min(folder.rglob("*.npz"))


def change(path, **arrays):
    with np.load(path) as found:
        whole = {name: found[name] for name in found.files}
    np.savez(path, **{**whole, **{k: f(whole) for k, f in arrays.items()}})


KEPT = {
    "nothing of use": (lambda p: np.savez(p, a=np.zeros(3)), "does not hold this layer"),
    "a weight of another shape": (
        lambda p: change(p, weight=lambda a: a["weight"][:1]),
        "does not hold this layer",
    ),
    "a weight of another type": (
        lambda p: change(p, weight=lambda a: a["weight"].astype("f8")),
        "does not hold this layer",
    ),
    "a weight of NaN": (
        lambda p: change(p, weight=lambda a: a["weight"] * np.nan),
        "holds numbers that no layer has",
    ),
    "scales below zero": (
        lambda p: change(p, scale=lambda a: -a["scale"]),
        "holds numbers that no layer has",
    ),
    "Python objects": (
        lambda p: np.savez(p, allow_pickle=True, weight=np.array([{}], object)),
        "cannot be read: holds pickled Python objects",
    ),
    "a header of minus signs": (
        lambda p: deflated(p, weight=(ARRAYS["a header of minus signs"], 0)),
        "cannot be read: the file cannot be read",
    ),
    "half a file": (lambda p: p.write_bytes(p.read_bytes()[:300]), "cannot be read"),
    "no archive": (lambda p: p.write_text("hello"), "cannot be read"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a model, samples, and what a search has kept."""
    folder = tmp_path_factory.mktemp("finished")
    model = save(folder, parse(TEXT))
    kept(model, samples(folder), folder / "kept")
    return folder


@pytest.mark.parametrize("name", KEPT)
def test_hostile_layers_that_are_kept(name, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "f")
    (tmp_path / "f" / "out.onnx").unlink()
    model = tmp_path / "f" / "in.onnx"
    file = min((tmp_path / "f" / "kept").rglob("*.npz"))
    damage, says = KEPT[name]
    damage(file)
    calib, resume = model.parent / "calib", model.parent / "kept"
    args = quantize(model, calib, "--recipe", "accurate", "--resume", resume)
    refused(onnxq(*args), says, file.name, "delete it, and the layer is done again")
    assert not (model.parent / "out.onnx").exists()
    file.unlink()
    assert onnxq(*args).exit_code == 0
    assert (model.parent / "out.onnx").read_bytes() == (finished / "out.onnx").read_bytes()


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"a": 1}', '{"a": {"effect": "b"}}', "[" * 100_000, "1" * 5000, '{"a": {}}'],
)
def test_hostile_measurements_that_are_kept(text, model, tmp_path):
    analyze = [
        "analyze",
        model,
        "--calib",
        samples(tmp_path),
        "--quiet",
        "--resume",
        tmp_path / "k",
    ]
    analyze += ["--measure", "one-at-a-time"]
    assert onnxq(*analyze).exit_code == 0
    file = min((tmp_path / "k").rglob("*.json"))
    file.write_text(text)
    refused(onnxq(*analyze), file.name, "delete it, and the layer is done again")


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "[" * 100_000, "1" * 5000, '{"version": 1, "choices": {}}', '{"choices": []}'],
)
def test_hostile_sensitivities(text, model, tmp_path):
    (tmp_path / "s.json").write_text(text)
    args = ["compress", model, tmp_path / "out.onnx", "--calib", samples(tmp_path), "--macs", "0.7"]
    result = onnxq(*args, "--quiet", "--sensitivities", tmp_path / "s.json")
    refused(result, "is no table of sensitivities", "s.json", "delete the file")
    assert not (tmp_path / "out.onnx").exists()


def test_statistics_are_not_inflated(model, tmp_path, monkeypatch):
    monkeypatch.setattr("onnxq.statistics._LARGEST", MIB)
    bomb = deflated(tmp_path / "s.npz", about=(head((4 * MIB,)), 16 * MIB))
    args = quantize(model, samples(tmp_path), "--statistics", bomb)
    refused(onnxq(*args), "not a file of statistics: the archive claims", "s.npz")


# ------------------------------------------------------------------------------- paths

NAMES = [
    "two words",
    "käse 芝士",
    "new\nline",
    "-leading",
    "[red]",
    "\x1b[2J",
    "'\"$(x)",
    "b\udcff",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_file(name, tmp_path, monkeypatch):
    """It works, and what is printed holds no control characters."""
    folder = tmp_path / name
    try:
        folder.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("the file system has no such names")
    model = save(folder, parse(TEXT), f"{name}.onnx")
    calib = samples(folder)
    out = folder / f"{name}.out.onnx"
    done = onnxq("quantize", model, out, "--calib", calib)
    assert done.exit_code == 0, done.output
    onnx.checker.check_model(onnx.load_from_string(out.read_bytes()))
    assert not any(c in done.output for c in "\x1b\udcff")
    for args in (["inspect", model], ["doctor", out], ["inspect", folder / "gone.onnx"]):
        done = onnxq(*args)
        assert isinstance(done.exception, (SystemExit, type(None))), repr(done.exception)
        assert not any(c in done.output for c in "\x1b\udcff")
    refused(onnxq("inspect", folder / "gone.onnx"), "no such file")


def test_a_link_as_output_is_replaced_not_followed(model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "precious"
    target.write_bytes(b"as it was")
    (tmp_path / "out.onnx").symlink_to(target)
    result = onnxq(*quantize(model, samples(tmp_path)))
    assert result.exit_code == 0, result.output
    assert target.read_bytes() == b"as it was"
    assert not (tmp_path / "out.onnx").is_symlink()
    assert load(tmp_path / "out.onnx").layers() is not None
