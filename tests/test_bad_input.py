"""Bad input through the command line: one line that helps, exit 1, and the disk as it was.

Each case writes what it needs into a folder and returns the arguments of `onnxq quantize`; beside
it stands what the line has to say: what is wrong, where, and what to do about it.
"""

import errno
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, numpy_helper
from PIL import Image

from onnxq import readers, report
from onnxq.cli import main
from onnxq.runtime import Session
from tests.models import parse

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
CALIB = DIGITS / "calib"
TEXT = (
    "g (float[N,3,8,8] x) => (float[N,5,4,4] y) <float[4,3,3,3] w, float[4] b, float[5,4,3,3] v>"
    "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }"
)
NORM = (
    "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[4] s, float[4] b, float[4] m,"
    "float[4] var> { c = Conv(x, w) r = Relu(c) y = BatchNormalization(r, s, b, m, var) }"
)
LOG = (
    "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[5,4,3,3] v>"
    "{ c = Conv(x, w) l = Log(c) y = Conv(l, v) }"
)


def onnxq(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def tree(folder):
    """Every path below a folder: kind, target of a link, content."""
    return {
        str(p.relative_to(folder)): (
            os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        )
        for p in sorted(folder.rglob("*"))
    }


def check(result, *says):
    """One line that says all of that, exit 1, and no bug behind it."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    *progress, line = result.stderr.splitlines()
    assert not any("error" in row for row in progress)
    assert line.startswith("error: ")
    for part in says:
        assert part in line
    assert not re.search(r"ONNXRuntimeError|\w+\.(cc|h|py):\d|<class|0x[0-9a-f]{8}", line)


# ------------------------------------------------------------------------------- material


def save(folder, proto, name="in.onnx"):
    onnx.save(proto, folder / name)
    return folder / name


def samples(folder, *arrays):
    """A folder with a file of samples for each array; by default two that fit the small models."""
    calib = folder / "calib"
    calib.mkdir()
    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32)
    for index, array in enumerate(arrays or (x, 2 * x)):
        np.savez(calib / f"{index}.npz", x=array)
    return calib


def small(change=None, text=TEXT):
    """A case: the small model, changed, and samples that fit it."""

    def make(folder):
        proto = parse(text)
        if change is not None:
            change(proto)
        return [save(folder, proto), "--calib", samples(folder)]

    return make


def content(data):
    """A case: a file of that content as the model."""

    def make(folder):
        (folder / "in.onnx").write_bytes(data(DIGITS / "digits.onnx") if callable(data) else data)
        return [folder / "in.onnx", "--calib", CALIB]

    return make


def digits(*options, **files):
    """A case: the digits example with options; {} in an option is the folder.

    Files are written into the folder before: text, or what a function writes at a path.
    """

    def make(folder):
        shutil.copy(DIGITS / "digits.onnx", folder / "in.onnx")
        for name, given in files.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(exist_ok=True)
            path.write_text(given) if isinstance(given, str) else given(path)
        given = [str(o).replace("{}", str(folder)) for o in options]
        calib = [] if "--calib" in given else ["--calib", CALIB]
        return [folder / "in.onnx", *calib, *given]

    return make


def values(name, change):
    """A change of a weight of the small models."""

    def edit(proto):
        for tensor in proto.graph.initializer:
            if tensor.name == name:
                array = numpy_helper.to_array(tensor).copy()
                array = change(array) if callable(change) else array
                if not callable(change):
                    array.reshape(-1)[1] = change
                tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))

    return edit


def external(location, data=None, **keys):
    """A case: a weight that lies in another file; what is written there, as a slice of it."""

    def make(folder):
        (folder / "model").mkdir()
        proto = parse(TEXT)
        tensor = proto.graph.initializer[0]
        raw = numpy_helper.to_array(tensor).tobytes()
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **keys}.items():
            tensor.external_data.add(key=key, value=str(value))
        source = save(folder / "model", proto)
        if data is not None:
            (folder / "model" / location).write_bytes(raw[data])
        return [source, "--calib", samples(folder)]

    return make


def link_outside(folder):
    args = external("w.bin")(folder)
    (folder / "w.bin").write_bytes(bytes(432))
    (folder / "model" / "w.bin").symlink_to(folder / "w.bin")
    return args


def field(number, data):
    """A protobuf field of bytes."""
    size, length = len(data), b""
    while size > 127:
        size, length = size >> 7, length + bytes([size & 127 | 128])
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def nested():
    """A graph in an attribute of a node of a graph in an attribute..., 500 deep."""
    graph = b""
    for _ in range(500):
        graph = field(1, field(5, field(6, graph)))
    return field(7, graph)


def quantized(folder):
    source, *rest = small()(folder)
    assert onnxq("quantize", source, folder / "q.onnx", *rest).exit_code == 0
    return [folder / "q.onnx", *rest]


def array(*shape, dtype="float32", fill=1):
    return np.full(shape, fill, dtype)


def npz(**arrays):
    return lambda path: np.savez(path, allow_pickle=True, **arrays)


def npy(given):
    return lambda path: np.save(path, given)


def cut(write, size):
    """What `write` writes, cut off."""

    def cut_off(path):
        write(path)
        path.write_bytes(path.read_bytes()[:size])

    return cut_off


def claims_much(path):
    header = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": (10**12, 1, 8, 8)}
    np.lib.format.write_array_header_1_0(header, fields)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("input.npy", header.getvalue() + bytes(99))


def picture(mode, size=(8, 8)):
    return lambda path: Image.new(mode, size).save(path)


def folder_of(path):
    path.mkdir()


def statistics_of_another_model(path):
    source, *rest = small()(path.parent)
    made = path.parent / "made.onnx"
    result = onnxq("quantize", source, made, *rest, "--statistics", path, "--quiet")
    assert result.exit_code == 0, result.output
    shutil.copy(DIGITS / "digits.onnx", source)


PICKLED = np.array([{"a": 1}], object)
GRAY = 'preset = "unit"\norder = "GRAY"\n'


def encodings(**entry):
    fields = {"name": "stem/conv.weight", "output_dtype": "int8", "y_scale": 0.1} | entry
    return json.dumps({"version": "2.0.0", "encodings": [fields]})


def old_encodings(version="1.0.0", **entry):
    fields = {"name": "stem/conv.weight", "dtype": "INT", "enc_type": "PER_CHANNEL", "bw": 8}
    fields |= {"is_sym": True, "scale": [0.1] * 16, "offset": [-128] * 16, **entry}
    sections = {"activation_encodings": [], "param_encodings": [fields]}
    return json.dumps({"version": version, **sections})


def recipe(**options):
    lines = "".join(f"{key} = {value!r}\n" for key, value in options.items())
    return f'[[pass]]\nname = "calibrate"\n{lines}'


# ------------------------------------------------------------------------------- what is refused

MODELS = {
    "cut off": (content(lambda p: p.read_bytes()[:1000]), ["or is cut off", "in.onnx", "copy"]),
    "cut at the end": (content(lambda p: p.read_bytes()[:-7]), ["or is cut off", "in.onnx"]),
    "empty file": (content(b""), ["holds no ONNX graph", "in.onnx", "export"]),
    "text": (content(b"This is no model.\n" * 9), ["is not an ONNX model", "in.onnx", "export"]),
    "HTML": (content(b"<!DOCTYPE html><html></html>"), ["is not an ONNX model", "in.onnx"]),
    "ONNX text": (content(TEXT.encode()), ["is not an ONNX model", "in.onnx"]),
    "nested": (content(nested()), ["is not an ONNX model", "in.onnx"]),
    "random": (content(np.random.default_rng(0).bytes(3000)), ["is not an ONNX model"]),
    "missing": (lambda f: [f / "gone.onnx", "--calib", CALIB], ["no such file", "gone.onnx"]),
    "missing folder": (lambda f: [f / "no" / "x.onnx", "--calib", CALIB], ["no such file", "no/x"]),
    "folder": (lambda f: [f, "--calib", CALIB], ["is a folder, not a model", "give the .onnx"]),
    "external data above the folder": (
        external("../w.bin", slice(None)),
        ["'../w.bin' lies outside the model's folder", "tensor w of", "put the data beside"],
    ),
    "external data at an absolute path": (
        external("/etc/passwd"),
        ["'/etc/passwd' lies outside the model's folder", "tensor w of"],
    ),
    "external data behind a link": (link_outside, ["'w.bin' lies outside", "tensor w of"]),
    "external data missing": (external("w.bin"), ["w.bin is missing", "tensor w", "copy it"]),
    "external data cut off": (external("w.bin", slice(-4)), ["is cut off", "tensor w", "copy it"]),
    "external data before its start": (
        external("w.bin", slice(None), offset=-4),
        ["is cut off", "tensor w"],
    ),
    "external data past its end": (
        external("w.bin", slice(None), offset=10**30),
        ["is cut off", "tensor w"],
    ),
    "external data without an offset": (
        external("w.bin", slice(None), offset="first"),
        ["no valid offset or length", "tensor w", "export"],
    ),
    "external data with a zero byte": (external("w\0.bin"), ["no valid path", "tensor w"]),
    "external data with a long name": (external("w" * 999), ["no valid path", "tensor w"]),
    "weight larger than its data": (
        small(lambda p: p.graph.initializer[0].dims.__setitem__(0, 10**12)),
        ["cannot load the model", "'w' declares a size of", "in.onnx"],
    ),
    "weight smaller than its data": (
        small(lambda p: p.graph.initializer[0].dims.__setitem__(0, 2)),
        ["cannot load the model", "'w'", "in.onnx"],
    ),
    "weight of negative size": (
        small(lambda p: p.graph.initializer[0].dims.__setitem__(0, -4)),
        ["cannot load the model", "Out of bounds", "in.onnx"],
    ),
    "weight of no type": (
        small(lambda p: setattr(p.graph.initializer[0], "data_type", 99)),
        ["tensor w has no known type", "in.onnx", "export the model again"],
    ),
    "input of no type": (
        small(lambda p: setattr(p.graph.input[0].type.tensor_type, "elem_type", 99)),
        ["tensor x has no known type", "in.onnx"],
    ),
    "attribute of no type": (
        small(lambda p: p.graph.node[0].attribute.add(name="group", i=1)),
        ["attribute group of Conv", "has no known type", "in.onnx"],
    ),
    "attribute without values": (
        small(lambda p: p.graph.node[0].attribute.add(name="pads", type=7)),
        ["attribute pads of Conv", "is an empty list", "in.onnx", "export the model without it"],
    ),
    "attribute that is no text": (
        small(lambda p: p.graph.node[0].attribute.add(name="auto_pad", type=3, s=b"\xff")),
        ["attribute auto_pad of Conv", "is not text", "in.onnx"],
    ),
    "cycle": (
        small(lambda p: p.graph.node[0].input.__setitem__(0, "r")),
        ["cannot load the model", "not acyclic", "in.onnx"],
    ),
    "tensor from nowhere": (
        small(lambda p: p.graph.node[1].input.__setitem__(0, "zz")),
        ["cannot load the model", "'zz' is not a graph input", "in.onnx", "export it again"],
    ),
    "output from nowhere": (
        small(lambda p: setattr(p.graph.output[0], "name", "zz")),
        ["cannot load the model", "output (zz) does not exist", "in.onnx"],
    ),
    "no outputs": (small(lambda p: p.graph.output.pop()), ["the model has no outputs", "in.onnx"]),
    "no operators": (
        small(lambda p: p.graph.ClearField("node")),
        ["the model has no operators", "in.onnx", "export it again"],
    ),
    "unknown operator": (
        small(lambda p: setattr(p.graph.node[1], "op_type", "Relo")),
        ["No Op registered for Relo", "in.onnx"],
    ),
    "unknown operator set": (
        small(lambda p: setattr(p.opset_import[0], "version", 999)),
        ["Opset 999 is under development", "in.onnx"],
    ),
    "unknown version of the format": (
        small(lambda p: setattr(p, "ir_version", 99)),
        ["Unsupported model IR version: 99", "in.onnx"],
    ),
    "weight that does not fit its operator": (
        small(values("w", lambda a: a.reshape(4, 27))),
        ["cannot load the model", "Number of spatial dimensions", "in.onnx"],
    ),
    "fails when run": (
        small(lambda p: p.graph.node[0].attribute.add(name="kernel_shape", type=7, ints=[5, 5])),
        ["the model failed", "kernel_shape", "check the model"],
    ),
    "no inputs": (
        small(text="g () => (float[1,4] y) <float[1,3] a, float[3,4] w> { y = MatMul(a, w) }"),
        ["the model has no inputs"],
    ),
    "NaN in a weight": (small(values("w", np.nan)), ["1 of 108 values", "weight w", "export"]),
    "NaN in the last weight": (small(values("v", np.nan)), ["1 of 180 values", "weight v"]),
    "infinity in a weight": (small(values("w", np.inf)), ["1 of 108 values", "weight w"]),
    "NaN in a bias": (small(values("b", np.nan)), ["1 of 4 values", "weight b"]),
    "NaN in a scale that stays in float": (
        small(values("s", np.nan), NORM),
        ["1 of 4 values are NaN", "weight s", "export"],
    ),
    "NaN in an activation": (small(text=LOG), ["NaN or infinite", "tensor l, sample 0", "check"]),
    "weight that overflows": (
        small(values("w", lambda a: np.sign(a) * 3e38)),
        ["NaN or infinite", "tensor r, sample 0"],
    ),
    "quantized already": (quantized, ["is quantized already", "q.onnx", "give the float model"]),
    "quantized by dynamic quantization": (
        small(text="g (float[N,4] x) => (uint8[N,4] q, float s, uint8 z)"
        "{ q, s, z = DynamicQuantizeLinear(x) }"),
        ["is quantized already", "in.onnx"],
    ),
}  # fmt: skip

SAMPLES = {
    "missing": (digits("--calib", "{}/gone"), ["no such file or folder", "gone", "check the path"]),
    "empty folder": (digits("--calib", "{}/c", c=folder_of), ["the folder is empty", "/c", "put "]),
    "no samples in the folder": (
        digits("--calib", "{}/c", c__a_txt="hello"),
        ["holds only 1 .txt", "/c", "put .npz"],
    ),
    "several kinds": (
        digits("--calib", "{}/c", c__a_npy=npy(array(1, 1, 8, 8)), c__b_png=picture("L")),
        ["several kinds: 1 .npy and 1 pictures", "/c", "keep one kind"],
    ),
    "file of another kind": (
        digits("--calib", "{}/a.csv", a_csv="1,2"),
        ["neither .npz nor .npy nor a picture", "a.csv", "give a folder"],
    ),
    "pickled .npz": (
        digits("--calib", "{}/c", c__a_npz=npz(input=PICKLED)),
        ["pickled Python objects, which are never loaded", "'input' in", "a.npz", "np.savez"],
    ),
    "pickled .npy": (
        digits("--calib", "{}/a.npy", a_npy=lambda p: np.save(p, PICKLED, allow_pickle=True)),
        ["pickled Python objects, which are never loaded", "a.npy"],
    ),
    "pickle called .npy": (
        digits("--calib", "{}/a.npy", a_npy=lambda p: p.write_bytes(pickle.dumps([1]))),
        ["pickled Python objects, which are never loaded", "a.npy"],
    ),
    "name": (
        digits("--calib", "{}/c", c__a_npz=npz(inptu=array(1, 1, 8, 8))),
        ["wanted input 'input', got 'inptu'", "a.npz", "rename 'inptu' to 'input'"],
    ),
    "name too many": (
        digits("--calib", "{}/c", c__a_npz=npz(input=array(1, 1, 8, 8), label=array(1))),
        ["no input 'label'", "a.npz", "leave it out"],
    ),
    "shape": (
        digits("--calib", "{}/c", c__a_npz=npz(input=array(1, 8, 8, 1))),
        [
            *("wanted input: float32 [N x 1 x 8 x 8], got input: float32 [1 x 8 x 8 x 1]", "a.npz"),
            "array.transpose(0, 3, 1, 2)",
        ],
    ),
    "rank": (
        digits("--calib", "{}/c", c__a_npz=npz(input=array(1, 8, 8))),
        ["wanted input: float32 [N x 1 x 8 x 8], got input: float32 [1 x 8 x 8]", "array[None]"],
    ),
    "type": (
        digits("--calib", "{}/c", c__a_npz=npz(input=array(1, 1, 8, 8, dtype="uint8"))),
        ["wanted float32, got uint8", "'input' in", "a.npz", "convert and scale"],
    ),
    "text for numbers": (
        digits("--calib", "{}/c", c__a_npz=npz(input=array(1, 1, 8, 8, dtype="U1", fill="a"))),
        ["wanted float32, got str", "'input' in", "a.npz"],
    ),
    "one sample of many": (
        digits(
            *("--calib", "{}/c"),
            c__a_npz=npz(input=array(1, 1, 8, 8)), c__b_npz=npz(input=array(1, 1, 8, 9)),
        ),
        ["wanted input: float32 [N x 1 x 8 x 8]", "[1 x 1 x 8 x 9]", "b.npz"],
    ),
    "empty array": (
        digits("--calib", "{}/c", c__a_npz=npz(input=array(0, 1, 8, 8))),
        ["the array is empty", "a.npz"],
    ),
    "NaN": (
        digits("--calib", "{}/c", c__a_npz=npz(input=array(1, 1, 8, 8, fill=np.nan))),
        ["holds NaN", "'input' in", "a.npz", "mend the sample"],
    ),
    "infinity": (
        digits("--calib", "{}/c", c__a_npz=npz(input=array(1, 1, 8, 8, fill=np.inf))),
        ["holds an infinite value", "'input' in", "a.npz"],
    ),
    "cut .npz": (
        digits("--calib", "{}/c", c__a_npz=cut(npz(input=array(1, 1, 8, 8)), 200)),
        ["cannot be read", "a.npz", "copy or save it again"],
    ),
    "cut .npy": (
        digits("--calib", "{}/a.npy", a_npy=cut(npy(array(9, 1, 8, 8)), 500)),
        ["cannot be read: it is cut off", "a.npy", "copy or save it again"],
    ),
    "archive that claims too much": (
        digits("--calib", "{}/a.npz", a_npz=claims_much),
        ["cannot be read: it is cut off", "a.npz"],
    ),
    "link to nothing": (
        digits("--calib", "{}/c", c__a_npz=lambda p: p.symlink_to("gone.npz")),
        ["cannot be read: No such file", "a.npz"],
    ),
    "less than a batch": (
        lambda f: [
            save(f, parse(TEXT.replace("N,", "8,"))), "--calib", samples(f, array(3, 3, 8, 8)),
        ],
        ["wanted x: float32 [8 x 3 x 8 x 8], got x: float32 [3 x 3 x 8 x 8]", "0.npz"],
    ),
    "sample that overflows": (
        lambda f: [save(f, parse(TEXT)), "--calib", samples(f, array(1, 3, 8, 8, fill=3e38))],
        ["NaN or infinite", "tensor r, sample 0", "check the sample"],
    ),
    "pictures without preprocessing": (
        digits("--calib", "{}/c", c__a_png=picture("L")),
        ["nothing says how pictures become inputs", "/c", "--preprocess imagenet|"],
    ),
    "picture that is none": (
        digits("--calib", "{}/c", "--preprocess", "{}/p.toml", c__a_png="hello", p_toml=GRAY),
        ["is not a picture that can be read", "a.png", "remove or replace it"],
    ),
    "cut picture": (
        digits(
            *("--calib", "{}/c", "--preprocess", "{}/p.toml"),
            c__a_png=cut(picture("L", (64, 64)), 60), p_toml=GRAY,
        ),
        ["picture", "a.png", "remove or replace it"],
    ),
    "picture of other channels": (
        digits("--calib", "{}/c", "--preprocess", "unit", c__a_png=picture("L")),
        ["wanted channels: 1 (NCHW), got 3 (RGB)", "set order = 'GRAY'"],
    ),
    "preprocessing of arrays": (
        digits("--preprocess", "unit"),
        ["preprocessing is for pictures, got .npz", "calib", "leave it out"],
    ),
    "unknown preset": (digits("--preprocess", "imagnet"), ["'imagnet'", "did you mean imagenet?"]),
    "missing preset": (digits("--preprocess", "{}/p.toml"), ["no such file", "p.toml"]),
    "unknown key of a preset": (
        digits("--preprocess", "{}/p.toml", p_toml='oder = "GRAY"\n'),
        ["no 'oder'", "p.toml", "did you mean order?"],
    ),
}  # fmt: skip

OPTIONS = {
    "method": (digits("--method", "entrpy"), ["no method 'entrpy'", "did you mean 'entropy'?"]),
    "format": (digits("--weights", "itn8"), ["no number format 'itn8'", "did you mean int8?"]),
    "granularity": (digits("--weights", "int8/chanel"), ["'int8/chanel'", "int8/channel"]),
    "weights without kernels": (
        digits("--weights", "int16/channel"),
        ["no integer kernels for int16/channel weights", "use --weights int8 or uint8"],
    ),
    "activations without kernels": (
        digits("--activations", "int16"),
        ["not int16", "use --activations int8"],
    ),
    "activations that a target does not take": (
        digits("--target", "nnapi", "--activations", "int8"),
        ["nnapi computes in uint8, not int8", "use --activations uint8"],
    ),
    "weights that a target does not take": (
        digits("--target", "xnnpack", "--activations", "uint8", "--weights", "int8/channel"),
        ["xnnpack has no integer kernels for int8/channel weights", "use --weights uint8"],
    ),
    "scales that a target does not take": (
        digits("--target", "qnn", "--weights", "uint8/channel"),
        ["qnn has one scale per tensor of uint8 weights", "uint8/tensor or", "int8/channel"],
    ),
    "format of a layer that a target does not take": (
        digits("--target", "tensorrt", "--format", "first=uint8/tensor"),
        ["tensorrt has no integer kernels for uint8 weights", "use --format first=int8"],
    ),
    "recipe for a target that does not take its formats": (
        digits(
            "--recipe",
            "{}/r.toml",
            r_toml='target = "tensorrt"\n[[pass]]\nname = "calibrate"\nactivations = "uint8"\n',
        ),
        ["tensorrt computes in int8, not uint8", "use --activations int8"],
    ),
    "near miss of another target": (
        digits("--target", "tensor-rt"),
        ["no target 'tensor-rt'", "did you mean tensorrt?"],
    ),
    "target": (digits("--target", "ort-cup"), ["no target 'ort-cup'", "did you mean ort-cpu?"]),
    "recipe": (digits("--recipe", "defalt"), ["no recipe 'defalt'", "did you mean default?"]),
    "missing recipe": (digits("--recipe", "{}/r.toml"), ["no such file", "r.toml", "check"]),
    "recipe that is a folder": (
        digits("--recipe", "{}/r.toml", r_toml=folder_of),
        ["cannot be read: Is a directory", "r.toml"],
    ),
    "recipe that is no TOML": (
        digits("--recipe", "{}/r.toml", r_toml="[[pass]\n"),
        ["not TOML", "line 1", "r.toml"],
    ),
    "pass of a recipe": (
        digits("--recipe", "{}/r.toml", r_toml='[[pass]]\nname = "calibrat"\n'),
        ["no pass 'calibrat'", "pass 1", "r.toml", "did you mean calibrate?"],
    ),
    "option of a pass": (
        digits("--recipe", "{}/r.toml", r_toml=recipe(metod="mse")),
        ["calibrate has no option 'metod'", "r.toml", "did you mean method?"],
    ),
    "value of an option": (
        digits("--recipe", "{}/r.toml", r_toml=recipe(method="mes")),
        ["method: wanted one of minmax, ", "got 'mes'", "r.toml", "did you mean mse?"],
    ),
    "percentile": (
        digits("--recipe", "{}/r.toml", r_toml=recipe(percentile=150.0)),
        ["percentile 150.0 means nothing", "r.toml", "up to 100 percent"],
    ),
    "samples of a pass": (
        digits("--recipe", "{}/r.toml", r_toml='[[pass]]\nname = "gptq"\nsamples = -3\n'),
        ["samples -3", "wanted at least 0", "pass 1 (gptq) of", "r.toml"],
    ),
    "glob": (digits("--exclude", "Cnov"), ["'Cnov' matches no node", "near: ", "Conv"]),
    "glob like nothing": (digits("--exclude", "qq*"), ["'qq*' matches no node", "onnxq inspect"]),
    "format of layers": (
        digits("--format", "first"),
        ["'first' is not SELECTOR=FORMAT", "first=int8/channel"],
    ),
    "format of layers that is none": (
        digits("--format", "first=in8"),
        ["no number format 'in8'", "format first=in8", "did you mean int8?"],
    ),
    "format of no layers": (digits("--format", "Rleu=int8"), ["'Rleu' matches no node", "Relu"]),
    "format of what has no weights": (
        digits("--format", "Relu=int8"),
        ["'Relu' matches", "none with constant weights", "format Relu=int8", "Conv"],
    ),
    "format without kernels": (
        digits("--format", "first=int16"),
        ["no integer kernels for int16", "use --format first=int8"],
    ),
    "seed": (digits("--seed", "-1"), ["seed: wanted 0 or more, got -1"]),
    "threads": (digits("--threads", "100000"), ["threads: wanted 0", "got 100000"]),
    "missing encodings": (digits("--encodings", "{}/e.json"), ["no such file", "e.json", "check"]),
    "encodings that are no JSON": (
        digits("--encodings", "{}/e.json", e_json="{"),
        ["not JSON", "line 1", "e.json"],
    ),
    "encodings of another model": (
        digits("--encodings", "{}/e.json", e_json=encodings(name="stem/conv.weigh")),
        ["no tensor 'stem/conv.weigh'", "e.json", "did you mean stem/conv.weight?"],
    ),
    "encodings along no axis": (
        digits("--encodings", "{}/e.json", e_json=encodings(y_scale=[0.1] * 16, axis=7)),
        ["stem/conv.weight: it has no axis 7", "e.json", "encodings of this model"],
    ),
    "encodings of other channels": (
        digits("--encodings", "{}/e.json", e_json=encodings(y_scale=[0.1] * 15, axis=0)),
        ["stem/conv.weight: 15 scales for 16 channels along axis 0", "e.json"],
    ),
    "encodings per channel of an input": (
        digits("--encodings", "{}/e.json", e_json=encodings(name="input", y_scale=[0.1], axis=1)),
        ["input: only the result of a Conv can have scales per channel", "e.json"],
    ),
    "encodings without kernels": (
        digits("--encodings", "{}/e.json", e_json=encodings(output_dtype="int16")),
        ["stem/conv.weight: ort-cpu has no integer kernels for int16", "e.json"],
    ),
    "encodings of no version": (
        digits("--encodings", "{}/e.json", e_json=old_encodings("4.0.0")),
        ["encodings of version '4.0.0', wanted 0.6.1, 1.0.0, 2.0.0", "e.json"],
    ),
    "encodings in the layout of another version": (
        digits("--encodings", "{}/e.json", e_json=old_encodings("0.6.1")),
        ["activation_encodings: wanted an object of entries by name in version 0.6.1", "e.json"],
    ),
    "encodings in two layouts": (
        digits("--encodings", "{}/e.json", e_json=old_encodings(y_scale=[0.1])),
        ["'y_scale' is no key of version 1.0.0", "stem/conv.weight", "all in one version"],
    ),
    "encodings without a number": (
        digits("--encodings", "{}/e.json", e_json=old_encodings(scale=[float("nan")] * 16)),
        ["scale: wanted a finite float32 above 0, got nan", "stem/conv.weight"],
    ),
    "encodings of fewer scales than offsets": (
        digits("--encodings", "{}/e.json", e_json=old_encodings(scale=[0.1] * 15)),
        ["-offset has 16 values, the scale has 15", "stem/conv.weight"],
    ),
    "older encodings of other channels": (
        digits("--encodings", "{}/e.json", e_json=old_encodings(scale=[1] * 3, offset=[0] * 3)),
        ["stem/conv.weight: 3 scales for 16 channels along axis 0", "e.json"],
    ),
    "statistics that are none": (
        digits("--statistics", "{}/s.npz", s_npz="hello"),
        ["not a file of statistics", "s.npz", "collect the statistics again"],
    ),
    "statistics of another model": (
        digits("--statistics", "{}/s.npz", s_npz=statistics_of_another_model),
        ["belong to another model", "s.npz", "delete the file"],
    ),
}


CASES = {
    f"{kind}: {name}": case
    for kind, cases in (("model", MODELS), ("samples", SAMPLES), ("options", OPTIONS))
    for name, case in cases.items()
}


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("name", CASES)
def test_one_line_and_the_disk_as_it_was(name, old, tmp_path):
    make, says = CASES[name]
    source, *rest = make(tmp_path)
    out = tmp_path / "out.onnx"
    if old:
        out.write_bytes(b"an older result")
    before = tree(tmp_path)
    check(onnxq("quantize", source, out, *rest), *says)
    assert tree(tmp_path) == before


def test_an_archive_that_claims_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST_NPZ", 500)
    source, *rest = digits("--calib", "{}/a.npz", a_npz=npz(input=array(9, 1, 8, 8)))(tmp_path)
    before = tree(tmp_path)
    check(onnxq("quantize", source, tmp_path / "out.onnx", *rest), "claims", "a.npz", "save it as")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--metod", "mse"], ["No such option", "--metod", "--method"]),
        (["--limit", "0"], ["--limit", "x>=1"]),
        (["--limit", "many"], ["--limit", "'many'"]),
        (["--threads", "-1"], ["--threads"]),
        ([], ["--calib PATH", "--encodings FILE"]),
    ],
)
def test_wrong_usage_is_exit_2(options, says, tmp_path):
    source, *_ = digits()(tmp_path)
    before = tree(tmp_path)
    calib = ["--calib", CALIB] if options else []
    result = onnxq("quantize", source, tmp_path / "out.onnx", *calib, *options)
    assert result.exit_code == 2
    for part in says:
        assert part in result.stderr.splitlines()[-1]
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------- destinations


def symbolic_link(folder):
    (folder / "link.onnx").symlink_to(folder / "in.onnx")
    return folder / "link.onnx"


def hard_link(folder):
    os.link(folder / "in.onnx", folder / "link.onnx")
    return folder / "link.onnx"


def roundabout(folder):
    (folder / "sub").mkdir()
    return folder / "sub" / ".." / "in.onnx"


def pipe(folder):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


DESTINATIONS = {
    "the input": (lambda f: f / "in.onnx", ["is the input", "in.onnx", "write to another file"]),
    "a link to the input": (symbolic_link, ["is the input", "link.onnx"]),
    "a hard link to the input": (hard_link, ["is the input", "link.onnx"]),
    "the input by another way": (roundabout, ["is the input", "in.onnx"]),
    "a folder": (lambda f: f, ["is a folder", "give a file name"]),
    "in a missing folder": (lambda f: f / "no" / "o", ["no such folder", "/no", "create it first"]),
    "below a file": (lambda f: f / "in.onnx" / "o", ["no such folder", "in.onnx"]),
    "a pipe": (pipe, ["is not a file", "pipe", "give a file name"]),
    "too long": (lambda f: f / ("o" * 300), ["cannot be written: File name too long", "ooo"]),
}


@pytest.mark.parametrize("option", [None, "--json", "--report", "--save-encodings", "--statistics"])
@pytest.mark.parametrize("name", DESTINATIONS)
def test_destinations_are_checked_before_the_work(name, option, tmp_path, monkeypatch):
    def work(*args, **options):
        raise AssertionError("the destination was not checked first")

    monkeypatch.setattr("onnxq.pass_manager.PassManager.apply", work)
    make, says = DESTINATIONS[name]
    source, *rest = digits()(tmp_path)
    target = make(tmp_path)
    before = tree(tmp_path)
    outputs = [target] if option is None else [tmp_path / "out.onnx", option, target]
    check(onnxq("quantize", source, *outputs, *rest), *says)
    if option != "--save-encodings":
        check(onnxq("run", "default", source, *outputs, *rest), *says)
    assert tree(tmp_path) == before


def test_two_outputs_of_one_name(tmp_path):
    source, *rest = digits()(tmp_path)
    out = tmp_path / "out"
    for option in ("--json", "--report", "--save-encodings", "--statistics"):
        result = onnxq("quantize", source, out, *rest, option, tmp_path / "." / "out")
        check(result, "is given for two outputs", "out", "name another file")
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]


def test_outputs_never_replace_other_inputs(tmp_path):
    source, *rest = external("w.bin", slice(None))(tmp_path)
    weights, stack = tmp_path / "model" / "w.bin", tmp_path / "x.npy"
    np.save(stack, array(2, 3, 8, 8))
    before = tree(tmp_path)
    check(onnxq("quantize", source, weights, *rest), "holds weights of the input", "w.bin")
    result = onnxq("quantize", source, stack, "--calib", stack)
    check(result, "is the input", "x.npy", "write to another file")
    compared = ["compare", source, source, "--data", rest[1], "--no-latency", "--json"]
    check(onnxq(*compared, source), "is the input", "in.onnx")
    check(onnxq(*compared, weights), "holds weights of the input", "w.bin")
    check(onnxq("inspect", source, "--json", source), "is the input", "in.onnx")
    assert tree(tmp_path) == before


def test_a_missing_input_with_an_old_output(tmp_path):
    (tmp_path / "out.onnx").write_bytes(b"old")
    result = onnxq("quantize", tmp_path / "gone.onnx", tmp_path / "out.onnx", "--calib", CALIB)
    check(result, "no such file", "gone.onnx")


# ------------------------------------------------------------------------------- the disk


def no_room(monkeypatch, owner, name):
    """Let a way of writing stop halfway on a full disk."""
    write = getattr(owner, name)

    def stop(self, data, *args, **options):
        write(self, data[: len(data) // 2], *args, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(owner, name, stop)


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_no_space_for_the_model(tmp_path, monkeypatch, old):
    source, *rest = small()(tmp_path)
    out = tmp_path / "out.onnx"
    if old:
        out.write_bytes(b"an older result")
    before = tree(tmp_path)
    no_room(monkeypatch, Path, "write_bytes")
    result = onnxq("quantize", source, out, *rest)
    check(result, "cannot be written: No space left on device", "out.onnx", "space on the disk")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("option", ["--json", "--report", "--save-encodings"])
def test_no_space_for_what_goes_with_it(tmp_path, monkeypatch, option):
    source, *rest = small()(tmp_path)
    before = tree(tmp_path)
    no_room(monkeypatch, report.Path, "write_text")
    result = onnxq("quantize", source, tmp_path / "o.onnx", *rest, option, tmp_path / "facts")
    check(result, "cannot be written: No space left on device", "facts")
    onnx.checker.check_model(str(tmp_path / "o.onnx"))  # which is whole, and was written before
    (tmp_path / "o.onnx").unlink()
    assert tree(tmp_path) == before


def test_no_space_for_statistics(tmp_path, monkeypatch):
    source, *rest = small()(tmp_path)
    before = tree(tmp_path)

    def full(file, **arrays):
        file.write(b"PK")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez_compressed", full)
    result = onnxq("quantize", source, tmp_path / "o.onnx", *rest, "--statistics", tmp_path / "s")
    check(result, "No space left on device", "/s", "space on the disk")
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    source, *rest = small()(tmp_path)
    before = tree(tmp_path)
    access = os.access
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != locked and access(path, mode)
    )
    result = onnxq("quantize", source, locked / "o.onnx", *rest)
    check(result, "the folder cannot be written to", "locked", "take another one")
    locked.rmdir()
    assert tree(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do all")
def test_permissions(tmp_path):
    source, *rest = small()(tmp_path)
    (tmp_path / "locked").mkdir(mode=0o500)
    result = onnxq("quantize", source, tmp_path / "locked" / "o.onnx", *rest)
    check(result, "the folder cannot be written to", "locked")
    source.chmod(0)
    check(onnxq("quantize", source, tmp_path / "o.onnx", *rest), "Permission denied", "in.onnx")
    assert not (tmp_path / "o.onnx").exists()


# ------------------------------------------------------------------------------- no errors


@pytest.mark.parametrize(
    ("zeros", "fill"),
    [("", 0), ("", 1e-42), ("", 7), ("w", 1), ("wb", 1), ("v", 1), ("wbv", 1), ("wbv", 0)],
)
def test_ranges_of_nothing_are_no_error(zeros, fill, tmp_path):
    """Weights of zeros, samples of zeros or of one value: finite, and what the float model says."""
    proto = parse(TEXT)
    for name in zeros:
        values(name, lambda a: 0 * a)(proto)
    source, out = save(tmp_path, proto), tmp_path / "out.onnx"
    calib = samples(tmp_path, array(1, 3, 8, 8, fill=fill))
    result = onnxq("quantize", source, out, "--calib", calib)
    assert result.exit_code == 0, result.output
    feed = {"x": array(1, 3, 8, 8, fill=fill)}
    wanted, got = (Session(path).run(feed)["y"] for path in (source, out))
    assert np.isfinite(got).all()
    assert np.abs(got - wanted).max() <= 0.02 * max(np.abs(wanted).max(), 1e-6)


def test_outputs_that_are_nan_in_both_are_counted(tmp_path):
    proto = parse(NORM)
    values("var", -2.0)(proto)  # one channel of four
    source, out, facts = save(tmp_path, proto), tmp_path / "out.onnx", tmp_path / "facts.json"
    args = [source, out, "--calib", samples(tmp_path), "--json", facts]
    result = onnxq("quantize", *args)
    assert result.exit_code == 0, result.output
    assert "72 values that are NaN or infinite in both left out" in result.stdout
    assert '"left_out": 72' in facts.read_text()
