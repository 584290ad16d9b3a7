import gc
import re
import tempfile

import numpy as np
import onnx
import onnx.parser
import pytest

from onnxq import blocked
from onnxq.blocked import any_order, relieved
from onnxq.errors import ModelError
from onnxq.model import Model
from onnxq.pass_manager import Context
from onnxq.runtime import Session
from onnxq.statistics import observe
from tests.models import parse

# Channels that fill blocks of 8 and 16, of 8 alone, and none.
CHANNELS = (16, 24, 32, 48, 20, 13)
NAMES = ("x", "a", "b", "c", "d", "e", "f", "g", "h", "i", "y")


def net(first, second, size=12):
    """Convolutions, ordinary and depthwise, with a residual Add, Concat and pooling."""
    return parse(
        f"""g (float[N,3,{size},{size}] x) => (float[N,7] y)
        <float[{first},3,3,3] v, float[{first},1,3,3] w, float[{second},{first},1,1] u,
         float[{first},{second},1,1] s, float[{first}] bias, float[{second + first},7] last>
        {{
            a = Conv<pads=[1,1,1,1]>(x, v, bias)
            b = Relu(a)
            c = Conv<group={first}, pads=[1,1,1,1]>(b, w)
            d = Conv(c, u)
            e = Clip(d)
            f = Conv(e, s)
            g = Add(f, b)
            h = Concat<axis=1>(e, g)
            p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h)
            i = GlobalAveragePool(p)
            k = Flatten(i)
            y = MatMul(k, last)
        }}"""
    )


def exposed(proto, names=NAMES):
    made = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in made)
    return proto


def draw(count=3, size=12, rows=2):
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(rows, 3, size, size)).astype(np.float32)} for _ in range(count)]


def assert_same_values(free, plain, feed, names):
    """The same bytes in any order, and in order where the names say so."""
    got, wanted = free.run(feed), plain.run(feed)
    assert got.keys() == wanted.keys()
    for name, array in wanted.items():
        assert got[name].shape == array.shape, name
        if name in names:
            np.testing.assert_array_equal(np.sort(got[name], None), np.sort(array, None), name)
        else:
            np.testing.assert_array_equal(got[name], array, name)


def blocks(proto, tmp_path):
    """What onnxruntime reorders for the caller alone -> its channels."""
    path = tmp_path / "optimized.onnx"
    Session(proto, threads=1, optimized_path=path)
    graph = onnx.load(path).graph
    read = {name for node in graph.node for name in node.input}
    return {
        node.output[0]: node.attribute[[a.name for a in node.attribute].index("channels")].i
        for node in graph.node
        if node.op_type == "ReorderOutput" and node.output[0] not in read
    }


# ------------------------------------------------------------------ the same statistics


@pytest.mark.parametrize("first", CHANNELS)
@pytest.mark.parametrize("second", CHANNELS)
def test_the_same_statistics(first, second):
    proto = exposed(net(first, second))
    plain = Session(proto, threads=1)
    free = any_order(proto, NAMES, threads=1)
    assert (free.inputs, free.threads) == (plain.inputs, 1)
    assert [spec.name for spec in free.outputs] == [spec.name for spec in plain.outputs]
    assert_same_values(free, plain, draw(1)[0], NAMES)
    for histogram in (False, True):
        found = observe(free, NAMES, draw(), histogram=histogram)
        wanted = observe(plain, NAMES, draw(), histogram=histogram)
        assert found.keys() == wanted.keys() == set(NAMES)
        for name, w in wanted.items():
            f = found[name]
            for field in ("count", "minimum", "maximum", "zeros", "batches", "exponent", "offset"):
                assert getattr(f, field) == getattr(w, field), (name, field)
            assert (f.ema_minimum, f.ema_maximum) == (w.ema_minimum, w.ema_maximum), name
            np.testing.assert_array_equal(f.bins, w.bins)
            # sums are rounded, and so depend on the order
            assert f.sum == pytest.approx(w.sum, rel=1e-9, abs=1e-9 * w.count)
            assert f.sum_squares == pytest.approx(w.sum_squares, rel=1e-12)


@pytest.mark.parametrize("first", CHANNELS)
def test_what_keeps_its_blocks(first, tmp_path):
    """Tensors of whole blocks are put out as they are; others would bring what fills them up."""
    proto = exposed(net(first, 32))
    reordered = blocks(proto, tmp_path)
    if not reordered:
        pytest.skip("onnxruntime does not block channels on this processor")
    feed = draw(1)[0]
    plain, free = Session(proto, threads=1).run(feed), any_order(proto, NAMES, threads=1).run(feed)
    moved = {name for name, array in plain.items() if not np.array_equal(free[name], array)}
    assert moved <= reordered.keys()
    assert {name for name, channels in reordered.items() if channels % 16 == 0} <= moved
    assert not any(channels % 8 for name, channels in reordered.items() if name in moved)


def test_other_names_stay_in_order():
    proto, free = exposed(net(32, 48)), {"b", "e"}
    assert_same_values(
        any_order(proto, free, threads=1), Session(proto, threads=1), draw(1)[0], free
    )


def test_sizes_may_vary():
    text = """g (float[N,3,H,W] x) => (float[N,16,H,W] y) <float[16,3,3,3] v, float[16,16,3,3] w> {
        a = Conv<pads=[1,1,1,1]>(x, v) b = Relu(a) y = Conv<pads=[1,1,1,1]>(b, w)
    }"""
    proto = exposed(parse(text), ("b", "y"))
    free, plain = any_order(proto, ("b", "y"), threads=1), Session(proto, threads=1)
    for size, rows in ((5, 1), (12, 3)):
        assert_same_values(free, plain, draw(1, size, rows)[0], ("b", "y"))


def test_channels_are_observed_in_order():
    """Where channels are told apart, the order matters."""
    model = Model(net(32, 48))
    found = Context(draw()).statistics(model, NAMES, channels=["e"])
    plain = Session(exposed(net(32, 48)), threads=1)
    arrays = np.concatenate([plain.run(feed)["e"] for feed in draw()])
    np.testing.assert_array_equal(found["e"].channels[0], arrays.min((0, 2, 3)))
    np.testing.assert_array_equal(found["e"].channels[1], arrays.max((0, 2, 3)))
    assert found["b"].channels is None


# ------------------------------------------------------------------ where it does not apply


IF = """g (float[N,3,12,12] x, bool flag) => (float[N,32,12,12] b, float[N,32,12,12] y)
    <float[32,3,1,1] v, float[32,32,1,1] w> {
        b = Conv(x, v)
        a = Relu(b)
        y = If(flag) <then_branch = t () => (float[N,32,12,12] p) { p = Conv(a, w) },
                      else_branch = e () => (float[N,32,12,12] q) { q = Neg(a) }>
    }"""


def test_models_with_subgraphs():
    proto = parse(IF)
    feed = {**draw(1)[0], "flag": np.array(True)}
    assert_same_values(any_order(proto, ("b", "y")), Session(proto), feed, ())


@pytest.mark.parametrize("what", ["limit", "load", "shapes"])
def test_plain_sessions(monkeypatch, what):
    """Too large; not to be loaded again; with more channels than there should be."""
    proto = exposed(net(20, 32))
    if what == "limit":
        monkeypatch.setattr(blocked, "TWO_GB", 1000)
    elif what == "load":
        _cannot_load_again(monkeypatch)
    else:
        monkeypatch.setattr(blocked, "_block", lambda graph: 1)  # 20 channels lie in 24 or 32
    assert_same_values(any_order(proto, NAMES, threads=1), Session(proto), draw(1)[0], ())


def _cannot_load_again(monkeypatch):
    def session(model, level="all", **options):
        if level == "disabled":
            raise ModelError("onnxruntime cannot load the model")
        return Session(model, level=level, **options)

    monkeypatch.setattr(blocked, "Session", session)


def test_models_that_are_not_valid():
    proto = exposed(net(16, 16))
    proto.graph.node[0].op_type = "Convolve"
    with pytest.raises(ModelError, match="Convolve"):
        any_order(proto, NAMES)


def test_nothing_stays_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    session = any_order(exposed(net(16, 32)), NAMES, threads=1)
    session.run(draw(1)[0])
    del session
    gc.collect()
    broken = exposed(net(16, 16))
    broken.graph.node[-1].input[1] = "nothing"
    with pytest.raises(ModelError):
        any_order(broken, NAMES)
    assert not [*tmp_path.iterdir()]


# ------------------------------------------------------------------ which tensors


def optimized(body, *, channels=32, outputs="r"):
    """What onnxruntime might make of a model: a blocked t of so many channels, reordered."""
    domain = "com.microsoft.nchwc"
    head = f'<ir_version: 8, opset_import: ["": 17, "{domain}": 1]>'
    outs = ", ".join(f"float[1,{channels},4,4] {name}" for name in outputs)
    text = f"""{head} g (float[1,3,4,4] x, bool flag) => ({outs}) {{
        t = {domain}.Conv(x, w)
        {body}
    }}"""
    text = re.sub(r"\b(Conv2|Reorder\w*)\b", lambda m: f"{domain}.{m[1].rstrip('2')}", text)
    proto = onnx.parser.parse_model(text)
    for name, size in (("w", -(-channels // 16) * 16), ("w2", 64)):
        proto.graph.initializer.append(onnx.TensorProto(name=name, dims=(size, 3, 1, 1)))
    return proto


REORDER = "r = ReorderOutput<channels=32>(t)"


def nodes(proto):
    return [(n.op_type, [*n.input], [*n.output]) for n in proto.graph.node]


def test_blocked_tensors_take_the_names_of_their_results():
    proto = optimized(f"{REORDER} u = Conv2(t, w2) s = ReorderOutput<channels=64>(u)", outputs="rs")
    assert relieved(proto, {"r"}) == ["r"]
    assert nodes(proto) == [
        ("Conv", ["x", "w"], ["r"]),
        ("Conv", ["r", "w2"], ["u"]),
        ("ReorderOutput", ["u"], ["s"]),
    ]
    assert [o.name for o in proto.graph.output] == ["r", "s"]
    assert relieved(proto, {"r", "s"}) == ["s"]
    assert nodes(proto)[1:] == [("Conv", ["r", "w2"], ["s"])]


@pytest.mark.parametrize(
    ("body", "channels", "outputs"),
    [
        (f"{REORDER} y = Neg(r)", 32, "ry"),  # read by a node
        (f"{REORDER} y = Neg(r)", 32, "y"),  # no output
        ("r = ReorderOutput<channels=20>(t)", 20, "r"),  # in a block of 32
        ("r = ReorderOutput<channels=32, channels_last=1>(t)", 32, "r"),  # of another shape
        ("r = Neg(t)", 32, "r"),
        (
            f"{REORDER} y = If(flag) <then_branch = a () => (p) {{ p = Neg(r) }},"
            " else_branch = b () => (q) { q = Abs(r) }>",
            32,
            "ry",
        ),
    ],
)
def test_what_is_left_alone(body, channels, outputs):
    proto = optimized(body, channels=channels, outputs=outputs)
    before = proto.SerializeToString()
    assert relieved(proto, {"r"}) == []
    assert nodes(proto) == nodes(onnx.ModelProto.FromString(before))


def test_one_of_two_reorders_of_a_tensor_is_left():
    proto = optimized(f"{REORDER} s = ReorderOutput<channels=32>(t)", outputs="rs")
    assert relieved(proto, {"r", "s"}) == ["r"]
    assert nodes(proto)[1:] == [("ReorderOutput", ["r"], ["s"])]


def test_a_graph_without_blocked_weights_is_left_alone():
    proto = optimized(REORDER)
    del proto.graph.initializer[:]
    assert relieved(proto, {"r"}) == []
