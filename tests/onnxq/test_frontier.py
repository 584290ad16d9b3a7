"""Activations at a cut of the graph against those that a whole run gives."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxq.errors import ModelError
from onnxq.frontier import Frontier
from onnxq.model import load
from tests import models
from tests.checks import run
from tests.models import parse

BRANCHES = (
    "g (float[N,3,8,8] x) => (float[] y, float[] z)"
    "<float[4,3,3,3] w, float[4,4,1,1] v, float[4,4,1,1] u>"
    "{ a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Sigmoid(b) e = Mul(c, d)"
    " f = Conv(e, u) y = Add(f, b) z = GlobalAveragePool(x) }"
)


def samples(proto, count=3):
    return [models.feeds(proto, seed=s) for s in range(count)]


def whole(proto, names, feed):
    return run(load(proto).to_proto(names), feed)


@pytest.mark.parametrize("threads", [1, 3])
def test_tensors_are_those_of_a_whole_run(threads):
    proto = parse(BRANCHES)
    data = samples(proto)
    frontier = Frontier(proto, data, threads=threads)
    for name in ("x", "b", "d", "e", "y", "z"):
        frontier.advance(name)
        for feed, got in zip(data, frontier.values(name), strict=True):
            wanted = feed["x"] if name == "x" else whole(proto, [name], feed)[name]
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_each_node_runs_once_and_what_nothing_reads_is_gone(monkeypatch):
    proto = parse(BRANCHES)
    seen = []
    original = Frontier._session

    def watched(self, stretch, kept):
        seen.extend(self._nodes[i].output[0] for i in stretch)
        return original(self, stretch, kept)

    monkeypatch.setattr(Frontier, "_session", watched)
    frontier = Frontier(proto, samples(proto))
    kept = []
    for name in ("b", "e", "f"):
        frontier.advance(name)
        kept.append(sorted(frontier._live[0]))
    assert seen == ["a", "b", "c", "d", "e", "f"]
    assert kept == [["b", "x"], ["b", "e", "x"], ["b", "f", "x"]]  # z still reads x
    assert frontier.nbytes == sum(a.nbytes for live in frontier._live for a in live.values())
    assert len(frontier) == 3


def test_constants_change_for_what_is_still_to_be_run():
    proto = parse(BRANCHES)
    data = samples(proto)
    frontier = Frontier(proto, data)
    frontier.advance("b")
    other = np.ones((4, 4, 1, 1), np.float32)
    frontier.set_constant("v", other)
    frontier.set_constant("w", np.zeros((4, 3, 3, 3), np.float32))  # has run: too late
    frontier.advance("e")
    for tensor in proto.graph.initializer:
        if tensor.name == "v":
            tensor.CopyFrom(numpy_helper.from_array(other, "v"))
    for feed, got in zip(data, frontier.values("e"), strict=True):
        np.testing.assert_allclose(got, whole(proto, ["e"], feed)["e"], atol=1e-5)
    with pytest.raises(ModelError, match="no constant 'q'"):
        frontier.set_constant("q", other)


@pytest.mark.parametrize("axis", [None, 1])
def test_integers_are_kept_in_place_of_what_they_stand_for(axis):
    """A quarter of the bytes; readers, and the caller, see the values."""
    attrs = "" if axis is None else "<axis=1>"
    shape = "" if axis is None else "4"
    proto = parse(
        "g (float[N,3,8,8] x) => (float[] y)"
        f"<float[4,3,3,3] w, float[4,4,1,1] v, float[{shape}] s, uint8[{shape}] z>"
        f"{{ a = Conv(x, w) q = QuantizeLinear{attrs}(a, s, z) d = DequantizeLinear{attrs}(q, s, z)"
        " b = Conv(d, v) r = Relu(d) y = Add(b, r) }",
        s=np.array([0.05, 0.04, 0.03, 0.06])[: None if axis else 1].reshape(
            () if axis is None else -1
        ),
        z=np.array([120, 130, 128, 100])[: None if axis else 1].reshape(() if axis is None else -1),
    )
    data = samples(proto)
    frontier = Frontier(proto, data)
    frontier.advance("d")
    assert {*frontier._live[0]} == {"q"}
    for feed, got in zip(data, frontier.values("d"), strict=True):
        np.testing.assert_array_equal(got, whole(proto, ["d"], feed)["d"])
    frontier.advance("b")
    frontier.advance("y")
    for feed, got in zip(data, frontier.values("y"), strict=True):
        np.testing.assert_allclose(got, run(proto, feed)["y"], atol=1e-5)


def test_subgraphs_read_from_outside():
    then = onnx.parser.parse_graph("t () => (float[N,4] p) { p = Mul(a, k) }")
    other = onnx.parser.parse_graph("e () => (float[N,4] p) { p = Neg(a) }")
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("If", ["c"], ["i"], then_branch=then, else_branch=other),
            helper.make_node("Exp", ["i"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 4])],
        [helper.make_tensor_value_info("y", 1, ["N", 4])],
        [
            numpy_helper.from_array(np.array(True), "c"),
            numpy_helper.from_array(np.full(4, 3, np.float32), "k"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = np.array([[1, -1, 2, 0.5]], np.float32)
    frontier = Frontier(proto, [{"x": x}])
    frontier.advance("a")
    frontier.advance("i")
    np.testing.assert_allclose(next(frontier.values("i")), 3 * np.maximum(x, 0))


def test_samples_of_different_sizes():
    proto = parse(
        "g (float[N,2,L] x) => (float[] y) <float[3,2,3] w> { a = Conv(x, w) y = Exp(a) }"
    )
    data = [models.feeds(proto, seed=s, batch=1 + s, size=4 + 3 * s) for s in range(3)]
    frontier = Frontier(proto, data)
    frontier.advance("a")
    for feed, got in zip(data, frontier.values("a"), strict=True):
        np.testing.assert_allclose(got, whole(proto, ["a"], feed)["a"], atol=1e-5)


def test_no_samples():
    frontier = Frontier(parse(BRANCHES), [])
    frontier.advance("e")
    assert [*frontier.values("e")] == []


@given(models.chains(), st.integers(0, 3))
def test_any_graph_gives_the_same_cut_by_cut(proto, seed):
    names = [o for n in load(proto).to_proto().graph.node for o in n.output]
    data = [models.feeds(proto, seed=seed)]
    frontier = Frontier(load(proto).to_proto(), data)
    wanted = whole(proto, names, data[0])
    for name in names:
        frontier.advance(name)
        got = next(frontier.values(name))
        np.testing.assert_allclose(got, wanted[name], rtol=1e-4, atol=1e-4)


def test_float_weights_between_integers_stay_as_they_are():
    """onnxruntime would round them to 8 bits, and fails where there are zero points per channel."""
    proto = parse(
        "g (float[N,3,8,8] x) => (float[] y)"
        "<float[4,3,3,3] w, float s, uint8 z, float[4] t, uint8[4] u, float[4,4,1,1] v>"
        "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) a = Conv(d, w)"
        " p = QuantizeLinear<axis=1>(a, t, u) e = DequantizeLinear<axis=1>(p, t, u)"
        " f = Sigmoid(e) y = Conv(f, v) }",
        s=np.array(0.1),
        z=np.array(128),
        t=np.full(4, 1e-3),
        u=np.array([120, 130, 128, 100]),
    )
    data = samples(proto)
    frontier = Frontier(proto, data)
    frontier.advance("e")
    for feed, got in zip(data, frontier.values("e"), strict=True):
        np.testing.assert_allclose(got, whole(proto, ["e"], feed)["e"], atol=1.1e-3)
