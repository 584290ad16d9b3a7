"""Layers written as two: the same function where the weight has that rank, and reasons why not."""

import numpy as np
import pytest

from onnxq.model import load
from onnxq.patches import rows_of, weight_of
from onnxq.runtime import Session
from onnxq.splits import Rows, Spatial
from tests.models import feeds, parse


def conv(attrs="", weight="7,4,3,3", size="9,11", extra=""):
    return parse(
        f"g (float[N,4,{size}] x) => (float[] y) <float[{weight}] w, float[7] b>"
        f"{{ y = Conv{f' <{attrs}>' if attrs else ''}(x, w, b) {extra} }}"
    )


def lowered(model, split, rank):
    """The one layer of a model, its weight brought to a rank by the plain SVD."""
    (layer,) = model.layers()
    rows = rows_of(layer)[0].astype(np.float64)
    made = split.nearest(layer, rows, None, rank)
    layer.set_weight(weight_of(layer, made[None]).astype(np.float32))
    return layer


def same(before, after, proto, atol=2e-5):
    for seed in range(2):
        feed = feeds(proto, seed=seed)
        wanted, got = (Session(m.to_proto()).run(feed)["y"] for m in (before, after))
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, atol=atol * np.abs(wanted).max())


@pytest.mark.parametrize(
    "attrs",
    [
        "",
        "pads = [1, 1, 1, 1]",
        "pads = [0, 2, 1, 0], strides = [2, 1]",
        "strides = [1, 3]",
        "dilations = [2, 3], pads = [2, 3, 2, 3]",
        "kernel_shape = [3, 3], dilations = [1, 2], strides = [2, 2], pads = [1, 2, 0, 1]",
        'auto_pad = "SAME_UPPER", strides = [2, 2]',
        'auto_pad = "SAME_LOWER", strides = [1, 2]',
        'auto_pad = "VALID"',
    ],
)
@pytest.mark.parametrize("split", [Spatial(1), Rows(1)])
def test_two_convolutions_make_what_one_made(split, attrs):
    proto = conv(attrs)
    model = load(proto)
    layer = lowered(model, split, 3)
    before = model.clone()
    split.write(model, layer, 3)
    model.check()
    assert [n.op for n in model.graph.nodes] == ["Conv", "Conv"]
    assert sum(layer.weight.size for layer in model.layers()) == 3 * split.weights(
        before.layers()[0]
    )
    same(before, model, proto)


@pytest.mark.parametrize("size", ["9", "5,4,6"])
def test_windows_of_other_axes_have_rows(size):
    proto = conv(weight=f"7,4,{','.join('2' for _ in size.split(','))}", size=size)
    model = load(proto)
    (layer,) = model.layers()
    assert "two axes" in Spatial(1).why_not(layer)
    layer = lowered(model, Rows(1), 2)
    before = model.clone()
    Rows(1).write(model, layer, 2)
    same(before, model, proto)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("MatMul(x, w)", "8,6"),
        ("Gemm(x, w, b)", "8,6"),
        ("Gemm <transB = 1> (x, w, b)", "6,8"),
        ("Gemm <transB = 1, alpha = 0.5, beta = 3.0> (x, w, b)", "6,8"),
        ("Gemm <alpha = 2.0> (x, w)", "8,6"),
    ],
)
def test_two_matrices_make_what_one_made(text, shape):
    proto = parse(
        f"g (float[N,8] x) => (float[] y) <float[{shape}] w, float[6] b> {{ y = {text} }}"
    )
    model = load(proto)
    layer = lowered(model, Rows(1), 2)
    before = model.clone()
    Rows(1).write(model, layer, 2)
    model.check()
    assert [layer.weight.size for layer in model.layers()] == [16, 12]
    same(before, model, proto)


def test_products_of_more_axes():
    proto = parse("g (float[N,3,8] x) => (float[] y) <float[8,6] w> { y = MatMul(x, w) }")
    model = load(proto)
    layer = lowered(model, Rows(1), 2)
    before = model.clone()
    Rows(1).write(model, layer, 2)
    same(before, model, proto)


def why(text, split, **values):
    model = load(parse(text, **values))
    return split.why_not(model.layers()[0])


def layer_of(weight, node, more=""):
    return (
        f"g (float[N,8,9,9] x) => (float[] y) <float[{weight}] w, float[8] b> {{ {more} {node} }}"
    )


@pytest.mark.parametrize(
    ("weight", "node", "split", "says"),
    [
        ("8,1,3,3", "y = Conv <group = 8> (x, w)", Spatial(1), "it has 8 groups"),
        ("8,4,3,3", "y = Conv <group = 2> (x, w)", Rows(1), "it has 2 groups"),
        ("8,8,1,1", "y = Conv(x, w)", Spatial(1), "its window is 1 x 1: nothing to take apart"),
        ("8,8,1,3", "y = Conv(x, w)", Spatial(1), "its window is 1 x 3: nothing to take apart"),
        ("8,8,3,3", "y = ConvTranspose(x, w)", Spatial(1), "transposed convolutions"),
        ("8,8,3,3", "c = Relu(b) y = Conv(x, w, c)", Spatial(1), "its bias is computed"),
        ("8,8,3,3", "y = Conv(x, w)", Spatial(32), "multiple of 32 saves anything"),
        ("8,8,1,1", "y = Conv(x, w)", Rows(4), "multiple of 4 saves anything"),
        ("8,8,3,3", "c = Conv(x, w) d = Conv(x, w) y = Add(c, d)", Rows(1), "is shared"),
        ("9,9", "y = MatMul(w, x)", Rows(1), "MatMul of this kind"),
        ("9,9", "y = MatMul(x, w)", Spatial(1), "MatMul has no window"),
    ],
)
def test_why_not(weight, node, split, says):
    assert says in why(layer_of(weight, node), split)


def test_weights_that_are_not_float32():
    text = "g (double[N,8] x) => (double[] y) <double[8,8] w> { y = MatMul(x, w) }"
    assert why(text, Rows(1)) == "its weight is float64, not float32"


def test_ranks_save_something_and_lose_something():
    (layer,) = load(conv()).layers()  # 252 weights
    assert list(Spatial(1).ranks(layer)) == [*range(1, 8)]  # 33 weights each
    assert list(Spatial(2, 3).ranks(layer)) == [4, 6]
    assert list(Rows(1).ranks(layer)) == [*range(1, 6)]  # 43 weights each
    (flat,) = load(conv(weight="7,4,1,1")).layers()
    assert list(Rows(1).ranks(flat)) == [1, 2]  # 11 weights each of 28


def test_the_rank_nearest_to_a_ratio():
    (layer,) = load(conv()).layers()
    split = Spatial(2)
    assert split.rank_at(layer, 0.5) == 4  # 3.8
    assert split.rank_at(layer, 0.01) == 2
    assert split.rank_at(layer, 0.99) == 6  # 7.6
    assert split.rank_at(layer, 1.0) is None
    for rank in split.ranks(layer):
        assert split.rank_at(layer, rank * 33 / 252) == rank
