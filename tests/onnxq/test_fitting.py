"""Encodings of a file, fitted to a model."""

import numpy as np
import pytest

from onnxq.encoding import Encoding, Encodings
from onnxq.errors import RecipeError
from onnxq.fitting import channels, constants, fit, lacking, share_moves, unused, without_moves
from onnxq.model import load
from onnxq.targets import target_named
from tests.models import parse

TARGET = target_named("ort-cpu")
TEXT = (
    "g (float[N,4,8,8] x) => (float[] y) <float[6,4,3,3] w, float[6] b, float[4,96] v>"
    "{ a = Conv(x, w, b) r = Relu(a) p = MaxPool<kernel_shape=[2,2]>(r) q = MaxPool<kernel_shape="
    "[2,2]>(p) f = Flatten(q) y = Gemm<transB=1>(f, v) }"
)


def grid(scale=0.1, dtype="uint8", zero=0):
    return Encoding(dtype, np.array(scale, np.float32), np.array(zero, np.int32))


def model():
    return load(parse(TEXT))


WEIGHTS = {"w": grid(dtype="int8"), "v": grid(dtype="int8")}


def test_moved_data_share_an_encoding_both_ways():
    for known in ("r", "p", "f"):
        encodings = Encodings({known: grid(0.3)})
        assert share_moves(model(), encodings, TARGET) == 3
        assert encodings.tensors == dict.fromkeys((known, "r", "p", "q", "f"), grid(0.3))
    encodings = Encodings({"r": grid(0.3), "q": grid(0.2)})
    share_moves(model(), encodings, TARGET)
    assert (encodings["p"], encodings["f"]) == (grid(0.3), grid(0.2))


def test_what_stays_in_float_moves_no_encoding():
    names = [n.name for n in model().graph.nodes if n.op == "MaxPool"]
    encodings = Encodings({"r": grid()}, dict.fromkeys(names[1:], "excluded"))
    share_moves(model(), encodings, TARGET)
    assert set(encodings) == {"r", "p"}


def test_moved_data_are_left_out_where_they_come_back():
    whole = Encodings({n: grid(0.3) for n in ("r", "p", "q", "f")} | {"q": grid(0.2)} | WEIGHTS)
    lean = without_moves(model(), whole, TARGET)
    assert set(lean) == {"r", "q", "f", *WEIGHTS}
    assert len(whole) == 6
    same = Encodings({n: grid(0.3) for n in ("r", "p", "q", "f")})
    lean = without_moves(model(), same, TARGET)
    assert set(lean) == {"r"}
    share_moves(model(), lean, TARGET)
    assert lean.tensors == same.tensors


def test_what_follows_from_the_rest_is_left_out():
    given = Encodings({"x": grid(), "r": grid(), "b": grid(dtype="int32"), **WEIGHTS})
    found, notes = fit(model(), given, TARGET, "e.json")
    assert set(found) == {"x", "r", "p", "q", "f", "w", "v"}
    assert notes == [
        "1 encodings of int32, which inputs and weights determine",
        "3 tensors of moved data share the encoding of their source or result",
    ]
    assert set(given) == {"x", "r", "b", "w", "v"}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"xx": grid(), "rr": grid()}, r"no tensor 'xx', nor 1 more of 2.*did you mean x\?.*r\?"),
        ({"none": grid()}, r"no tensor 'none' \(e\.json\); use the encodings of this model"),
        ({"w": Encoding("int8", np.ones(5, "f4"), np.zeros(5, "i4"), 0)}, "w: 5 scales for 6 cha"),
        ({"x": Encoding("uint8", np.ones(4, "f4"), np.zeros(4, "i4"), 1)}, "x: only the result of"),
        ({"x": grid(dtype="uint16")}, "x: ort-cpu has no integer kernels for uint16"),
    ],
)
def test_misfits(tensors, match):
    with pytest.raises(RecipeError, match=match):
        fit(model(), Encodings(tensors), TARGET, "e.json")


def test_names_of_another_model_may_be_passed_over():
    given = Encodings({"xx": grid(), "x": grid()}, {"node": "why"})
    found, notes = fit(model(), given, TARGET, "e.json", strict=False)
    assert (set(found), found.float_nodes) == ({"x"}, {})
    assert notes == ["1 encodings of tensors that the model does not have"]


def test_nodes_that_lack_an_encoding_are_named():
    m = model()
    m.encodings = Encodings({"x": grid(), "w": grid(dtype="int8")})
    assert dict(lacking(m, TARGET)) == {
        "Conv_0": "r has no encoding",
        "Gemm_5": "f has no encoding",
    }
    m.encodings = Encodings(
        {"x": grid(), "r": grid(), "p": grid(), "q": grid(), "f": grid(), **WEIGHTS}
    )
    assert dict(lacking(m, TARGET)) == {}
    assert unused(m, TARGET) == []


def test_encodings_that_nothing_reads_are_named():
    m = model()
    m.encodings = Encodings(
        {"x": grid(), "w": grid(dtype="int8"), "r": grid(), "y": grid(), "a": grid()}
    )
    assert set(unused(m, TARGET)) == {"y"}


def test_what_files_need_to_know_of_a_model():
    m = load(
        parse(
            "g (float[N,3,6,6] x) => (float[] y) <float[3,5,3,3] w, float[5,7] v>"
            "{ a = ConvTranspose(x, w) b = Transpose<perm=[0,2,3,1]>(a) y = MatMul(b, v) }"
        )
    )
    assert {n: (c.axis, c.count) for n, c in channels(m).items()} == {"w": (1, 5), "v": (1, 7)}
    assert constants(m) == {"w", "v"}
