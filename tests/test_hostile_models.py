"""Models made to break what reads them: each verb says in one line what is wrong, and ends.

`ONNXQ_FUZZ=2000 pytest tests/test_hostile_models.py` looks further than the usual run does.
"""

import itertools
import os
import shutil

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxq import model_io
from onnxq.cli import main
from onnxq.commands.group import verbs
from onnxq.errors import OnnxqError
from onnxq.model import load
from tests.hostile import limited, one_line, onnxq, refused
from tests.models import feeds, parse
from tests.test_bad_input import tree

FUZZ = int(os.environ.get("ONNXQ_FUZZ", "0"))
TEXT = (
    "g (float[N,4,8,8] x) => (float[] y, float[] z)"
    "<float[4,1,3,3] w, float[8,4,1,1] v, float[4] s, float[4] b, float[4] m, float[4] var,"
    "float[10,128] f, float[10] fb>"
    "{ d = Conv<group=4,pads=[1,1,1,1]>(x, w) n = BatchNormalization(d, s, b, m, var)"
    "e = Sigmoid(n) h = Mul(n, e) a = Add(h, x)"
    "p = MaxPool<kernel_shape=[2,2],strides=[2,2]>(a) q = Conv(p, v) c = Concat<axis=1>(q, p)"
    "t = Transpose<perm=[0,2,3,1]>(c) o = Softmax(t) u = Flatten(q)"
    "z = Gemm<transB=1>(u, f, fb) k = Constant<value=float {2.0}>() y = Mul(o, k) }"
)
# verb -> its arguments, given a model, samples, encodings and a folder for what it writes
VERBS = {
    "quantize": lambda m, c, e, o: [m, o / "out.onnx", "--calib", c, "--quiet"],
    "compress": lambda m, c, e, o: [
        *(m, o / "out.onnx", "--calib", c, "--macs", "0.7", "--multiple", "1", "--quiet")
    ],
    "run": lambda m, c, e, o: ["per-tensor", m, o / "out.onnx", "--calib", c, "--quiet"],
    "compare": lambda m, c, e, o: [m, m, "--data", c, "--no-latency", "--quiet"],
    "analyze": lambda m, c, e, o: [m, "--calib", c, "--quiet"],
    "inspect": lambda m, c, e, o: [m, "--quiet"],
    "doctor": lambda m, c, e, o: [m, "--fix", o / "out.onnx", "--quiet"],
    "encodings export": lambda m, c, e, o: [m, o / "out.json", "--float", o / "f.onnx", "--quiet"],
    "encodings apply": lambda m, c, e, o: [m, e, o / "out.onnx", "--quiet"],
    "encodings convert": lambda m, c, e, o: [
        *(e, o / "out.json", "--to", "1.0.0", "--model", m, "--quiet")
    ],
    "encodings diff": lambda m, c, e, o: [m, e, "--quiet"],
    "deploy": lambda m, c, e, o: [m, o / "out", "--quiet"],
}


def test_every_verb_that_reads_a_model_is_tried():
    """Models of the zoo are known by their checksums."""
    others = {"encodings", "passes", "zoo", "zoo list", "zoo build", "zoo table"}
    assert set(VERBS) == {name for name, _ in verbs(main)} - others


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A float model, the quantized one, samples and encodings."""
    folder = tmp_path_factory.mktemp("material")
    proto = parse(TEXT)
    onnx.save(proto, folder / "float.onnx")
    calib = folder / "calib"
    calib.mkdir()
    for index in range(2):
        np.savez(calib / f"{index}.npz", **feeds(proto, seed=index, batch=1))
    result = onnxq(
        *("quantize", folder / "float.onnx", folder / "int8.onnx", "--calib", calib),
        *("--save-encodings", folder / "encodings.json"),
    )
    assert result.exit_code == 0, result.output
    return folder


# ------------------------------------------------------------------------------- fuzzing

EXTREMES = st.sampled_from(
    [0, 1, -1, 2, 3, 8, 99, 127, 255, 65536, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63), 2**63 - 1]
)


@st.composite
def damages(draw):
    """A function that damages a model: its bytes, or its fields."""
    if draw(st.booleans()):
        steps = draw(st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), max_size=4))
        end = draw(st.none() | st.integers(0, 2**31))

        def in_bytes(proto):
            data = bytearray(proto.SerializeToString())
            for place, value in steps:
                data[place % len(data)] = value
            return bytes(data if end is None else data[: end % len(data)])

        return in_bytes
    picks = draw(
        st.lists(
            st.tuples(st.integers(0, 2**31), EXTREMES, st.integers(0, 3)), min_size=1, max_size=3
        )
    )

    def in_fields(proto):
        for place, number, way in picks:
            found = [*fields(proto)]
            damage(*found[place % len(found)], number, way, place)
        return proto.SerializeToString()

    return in_fields


def fields(message):
    """Every field that is set, at all depths."""
    for field, value in message.ListFields():
        yield message, field
        if field.message_type is not None:
            for inner in value if is_list(value) else [value]:
                yield from fields(inner)


def is_list(value):
    return hasattr(value, "append") or hasattr(value, "add")


def damage(message, field, number, way, place):
    """Take a field away, double it, or write what does not belong there."""
    value = getattr(message, field.name)
    if way == 0 or (is_list(value) and not len(value)):
        message.ClearField(field.name)
    elif is_list(value):
        index = place % len(value)
        if way == 1:
            del value[index]
        elif field.message_type is not None:
            value[index].Clear() if way == 2 else value.add().CopyFrom(value[index])
        else:
            value[index] = other(field, value[index], number)
    elif field.message_type is not None:
        value.Clear()
    else:
        setattr(message, field.name, other(field, value, number))


def other(field, value, number):
    """Another value of the type of a field."""
    if isinstance(value, bytes):
        return value[: len(value) // 2] if number % 2 else value + b"abcd"
    if isinstance(value, str):
        return ["", "x" * 300, "a\nb", "\x1b[2J", "../x", "y", "x", "c"][number % 8]
    if isinstance(value, float):
        return [0.0, -1.0, float("nan"), float("inf"), 1e38, 1e-45][number % 6]
    if field.enum_type is not None:
        known = sorted(field.enum_type.values_by_number)
        return known[number % len(known)]
    narrow = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32)
    return (number + 2**31) % 2**32 - 2**31 if narrow else number


@settings(
    max_examples=FUZZ or 12,
    derandomize=not FUZZ,
    deadline=None,
    database=None,
    suppress_health_check=[*HealthCheck],
)
@pytest.mark.parametrize("verb", VERBS)
@given(damaged=damages(), quantized=st.booleans())
def test_damaged_models(verb, material, tmp_path_factory, damaged, quantized):
    """It works, or says in one line why not; the input stays as it is, and nothing else appears."""
    folder = tmp_path_factory.mktemp("damaged")
    proto = onnx.load(material / ("int8.onnx" if quantized else "float.onnx"))
    (folder / "in.onnx").write_bytes(damaged(proto))
    (folder / "out").mkdir()
    before = tree(folder)
    given_ = folder / "in.onnx", material / "calib", material / "encodings.json", folder / "out"
    result = onnxq(*verb.split(), *VERBS[verb](*given_))
    if result.exit_code:
        refused(result)
    after = tree(folder)
    written = {name for name in after if name not in before}
    assert all(after[name] == content for name, content in before.items())
    assert not written or (result.exit_code == 0 and all(n.startswith("out/") for n in written))
    shutil.rmtree(folder)


# ------------------------------------------------------------------------------- made by hand


def edit(change):
    """Bytes of the small model, changed."""
    proto = parse(TEXT)
    change(proto)
    return proto.SerializeToString()


def renamed(old, new):
    """Bytes of the small model in which a text is another one of the same length."""
    data = parse(TEXT).SerializeToString()
    assert len(old) == len(new)
    assert old in data
    return data.replace(old, new)


def node(proto, op):
    return next(n for n in proto.graph.node if n.op_type == op)


def laughs(count, calls=2):
    """Local functions, each of which calls the one before it twice: 2^count nodes."""
    proto = parse("g (float[1] x) => (float[1] y) { y = Neg(x) }")
    own = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    proto.opset_import.append(own[1])
    for index in range(count):
        op, domain = (f"f{index - 1}", "f") if index else ("Neg", "")
        ends = ["a", *(f"t{i}" for i in range(calls - 1)), "c"]
        body = [helper.make_node(op, [a], [b], domain=domain) for a, b in itertools.pairwise(ends)]
        proto.functions.append(helper.make_function("f", f"f{index}", ["a"], ["c"], body, own))
    proto.graph.node[0].op_type, proto.graph.node[0].domain = f"f{count - 1}", "f"
    return proto


def recursive():
    proto = laughs(2)
    for inner in proto.functions[0].node:
        inner.op_type, inner.domain = "f1", "f"
    return proto.SerializeToString()


def sparse(dims, index):
    proto = parse("g (float[1] x) => (float[] y) { r = ReduceSum<keepdims=0>(w) y = Add(x, r) }")
    one = numpy_helper.from_array(np.ones(1, np.float32), "w")
    proto.graph.sparse_initializer.add(
        values=one, indices=numpy_helper.from_array(np.array([index])), dims=[dims]
    )
    return proto.SerializeToString()


BROKEN = {
    "name of a node that is no text": (
        renamed(b"Softmax", b"Soft\xffax"),
        ["op_type of a NodeProto is not text"],
    ),
    "name of a weight that is no text": (
        edit(lambda p: p.metadata_props.add(key="key", value="abcdef")).replace(
            b"abcdef", b"\xff" * 6
        ),
        ["value of a StringStringEntryProto is not text"],
    ),
    "attribute without the tensor that it is": (
        edit(lambda p: node(p, "Constant").attribute.add(name="value", type=4)),
        ["attribute value of Constant", "says that it is a TENSOR, and is none"],
    ),
    "attribute of another type": (
        edit(
            lambda p: node(p, "Transpose").attribute[0].CopyFrom(helper.make_attribute("perm", 3))
        ),
        ["attribute perm of Transpose", "is not of the type INTS"],
    ),
    "node without inputs": (
        edit(lambda p: node(p, "Softmax").ClearField("input")),
        ["Softmax", "has no valid inputs"],
    ),
    "node without an input that it needs": (
        edit(lambda p: node(p, "Conv").input.__setitem__(1, "")),
        ["Conv", "has no valid inputs"],
    ),
    "node without outputs": (
        edit(lambda p: node(p, "Flatten").ClearField("output")),
        ["Flatten", "has no valid outputs"],
    ),
    "node with outputs too many": (
        edit(lambda p: node(p, "Flatten").output.append("more")),
        ["Flatten", "has no valid outputs"],
    ),
    "function that calls itself": (recursive(), ["calls itself"]),
    "functions that double": (
        laughs(60).SerializeToString(),
        ["its functions become more than 1,000,000 nodes"],
    ),
    "sparse weight of terabytes": (sparse(10**12, 0), ["more than 2 GB", "sparse tensor w"]),
    "sparse weight outside itself": (sparse(10, 99), ["do not fit", "sparse tensor w"]),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_model(name, verb, material, tmp_path):
    data, says = BROKEN[name]
    (tmp_path / "in.onnx").write_bytes(data)
    before = tree(tmp_path)
    given_ = tmp_path / "in.onnx", material / "calib", material / "encodings.json", tmp_path
    refused(onnxq(*verb.split(), *VERBS[verb](*given_)), *says)
    assert tree(tmp_path) == before
    with pytest.raises(OnnxqError, match=says[-1]):
        load(onnx.load_from_string(data))


@pytest.mark.parametrize("group", [0, -1, 3, 128])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_groups_that_cannot_share_channels(op, group, tmp_path):
    text = "g (float[N,C,8,8] x) => (float[N,D,H,W] y) <float[4,3,3,3] w>"
    proto = parse(f"{text} {{ c = Conv(x, w) y = Relu(c) }}")
    proto.graph.node[0].op_type = op
    proto.graph.node[0].attribute.append(helper.make_attribute("group", group))
    onnx.save(proto, tmp_path / "in.onnx")
    assert load(tmp_path / "in.onnx").layers() == []
    refused(
        onnxq("quantize", tmp_path / "in.onnx", tmp_path / "out.onnx", "--data-free", "--quiet")
    )


# ------------------------------------------------------------------------------- bombs


def const(text, **arrays):
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return proto


BOMBS = {
    "a range": const(
        "g (float[1] x) => (float[] y)"
        "{ c = Range(a, b, d) e = Cast<to=1>(c) r = ReduceSum<keepdims=0>(e) y = Add(x, r) }",
        a=np.int64(0),
        b=np.int64(10**11),
        d=np.int64(1),
    ),
    "an index": const(
        "g (float[1] x) => (float[] y) { q = ConstantOfShape<value=int64[1] {0}>(s)"
        "c = Gather(s, q) e = Cast<to=1>(c) r = ReduceSum<keepdims=0>(e) y = Add(x, r) }",
        s=np.array([10**11]),
    ),
    "a constant": const(
        "g (float[1] x) => (float[] y)"
        "{ c = ConstantOfShape(s) r = ReduceSum<keepdims=0>(c) y = Add(x, r) }",
        s=np.array([10**6, 10**6]),
    ),
    "padding": const(
        "g (float[1,1,8,8] x) => (float[] y) { c = Conv<pads=[99999999,9,99999999,9]>(x, w)"
        "y = ReduceSum(c) }",
        w=np.ones((1, 1, 3, 3), np.float32),
    ),
    "an input": const(
        "g (float[1,1,1000000,1000000] x) => (float[] y) { c = Conv(x, w) y = ReduceSum(c) }",
        w=np.ones((1, 1, 3, 3), np.float32),
    ),
}


def test_models_that_want_terabytes(tmp_path):
    """Where the process may have 4 GiB, nothing of that is even tried, or it ends in one line."""
    for name, bomb in BOMBS.items():
        onnx.save(bomb, tmp_path / f"{name}.onnx")
    before = tree(tmp_path)
    sources = [tmp_path / f"{name}.onnx" for name in BOMBS]
    free = [["quantize", s, tmp_path / "out", "--data-free", "--quiet"] for s in sources]
    looked = [[verb, s, "--quiet"] for s in sources for verb in ("inspect", "doctor")]
    found, peak = limited(*free, *looked)
    for outcome in found[: len(free)]:
        assert outcome.code == 1
        assert "made up" in one_line(outcome.stdout, outcome.stderr)
    assert all(o.code == 0 or one_line(o.stdout, o.stderr) for o in found)
    assert peak < 500 << 20
    assert tree(tmp_path) == before


def test_more_external_data_than_memory(tmp_path, monkeypatch):
    """A file of zeros may be a hole, and two tensors may name the same one."""
    proto = parse("g (float[1,4] x) => (float[] y) <float[4,4] w> { y = MatMul(x, w) }")
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="w.bin")
    (tmp_path / "in.onnx").write_bytes(proto.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(model_io, "memory", lambda: 1 << 34)
    result = onnxq("inspect", tmp_path / "in.onnx")
    refused(result, "external data take 1024 GiB, more than there is memory", "in.onnx")


def test_a_file_larger_than_protobuf_reads(tmp_path):
    with (tmp_path / "in.onnx").open("wb") as file:
        file.truncate(1 << 40)
    result = onnxq("inspect", tmp_path / "in.onnx")
    refused(result, "is of 1024 GiB, and an ONNX file has less than 2", "in.onnx")


def test_what_does_not_fit_into_memory_is_one_line(material, tmp_path, monkeypatch):
    def full(*args, **options):
        raise MemoryError

    monkeypatch.setattr("onnxq.passes.calibrate.place", full)
    arguments = [material / "float.onnx", tmp_path / "out.onnx", "--calib", material / "calib"]
    refused(onnxq("quantize", *arguments, "--quiet"), "not enough memory")


# ------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["[/red]", "[link=http://x]", "\x1b[2J\x07", "\x9b31m", "\u202eevil"]
)
def test_names_are_shown_and_not_obeyed(name, tmp_path):
    """What a model calls its nodes and tensors can neither end a verb nor reach the terminal."""
    proto = parse("g (float[N,4] x) => (float[] y) <float[4,4] w> { a = MatMul(x, w) y = Relu(a) }")
    for index, inner in enumerate(proto.graph.node):
        inner.name = f"{name}{index}"
    proto.graph.node[0].output[0] = proto.graph.node[1].input[0] = name
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(proto, source)
    (tmp_path / "calib").mkdir()
    np.savez(tmp_path / "calib" / "0.npz", x=np.ones((1, 4), np.float32))
    calib = ["--calib", tmp_path / "calib"]
    shown = ""
    for arguments in (
        *(["quantize", source, out, *calib], ["inspect", source], ["doctor", source]),
        *(["doctor", out], ["analyze", source, *calib], ["deploy", out, tmp_path / "folder"]),
        ["encodings", "export", out, tmp_path / "e.json"],
    ):
        result = onnxq(*arguments)
        assert result.exit_code == 0, result.output
        assert not any(c in result.output for c in "\x1b\x07\x9b\u202e")
        shown += result.output
    plain = name.encode("unicode_escape").decode() if not name.isprintable() else name
    assert plain in shown
