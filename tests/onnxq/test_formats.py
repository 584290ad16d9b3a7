"""Formats of weights layer by layer: what they are written as, and which layers they name."""

import pytest

from onnxq.encoding import Format
from onnxq.errors import RecipeError
from onnxq.formats import LayerFormat
from onnxq.model import load
from tests.models import parse

CHAIN = (
    "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[4,1,3,3] d, float[4,4,3,3] v>"
    "{ [stem] c = Conv(x, w) [act] r = Relu(c) [dw] e = Conv<group=4>(r, d) [head] y = Conv(e, v) }"
)


def named(text, selector, **values):
    return LayerFormat.parse(f"{selector}=int8/channel").layers(load(parse(text, **values)))


@pytest.mark.parametrize(
    ("text", "selector", "wanted"),
    [
        ("first=int8/channel", "first", Format("int8", "channel")),
        (" head.* = INT4/channel ", "head.*", Format("int4", "channel")),
        ("MatMul=int4/block=32", "MatMul", Format("int4", "block", 32)),
        ("last=uint8", "last", Format("uint8")),
    ],
)
def test_selector_and_format(text, selector, wanted):
    assert LayerFormat.parse(text) == LayerFormat(selector, wanted)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("first", "'first' is not SELECTOR=FORMAT; write .* as in first=int8/channel"),
        ("int8/channel", "'int8/channel' is not SELECTOR=FORMAT"),
        ("=int8", "'=int8' is not SELECTOR=FORMAT"),
        ("first= ", "'first= ' is not SELECTOR=FORMAT"),
        ("", "'' is not SELECTOR=FORMAT"),
        ("first=in8", r"no number format 'in8' \(format first=in8\); did you mean int8\?"),
        ("fc=int8/chanel", r"no number format 'int8/chanel' \(format fc=int8/chanel\); write TYPE"),
        ("head=float", r"weights in float .* \(format head=float\); use --exclude GLOB"),
    ],
)
def test_what_is_no_format_of_layers(text, match):
    with pytest.raises(RecipeError, match=match):
        LayerFormat.parse(text)


@pytest.mark.parametrize(
    ("selector", "layers"),
    [
        ("first", {"stem"}),
        ("last", {"head"}),
        ("depthwise", {"dw"}),
        ("stem", {"stem"}),
        ("[sh]*", {"stem", "head"}),
        ("Conv", {"stem", "dw", "head"}),
        ("*", {"stem", "dw", "head"}),
    ],
)
def test_selectors(selector, layers):
    assert named(CHAIN, selector) == layers


@pytest.mark.parametrize(
    ("selector", "match"),
    [
        ("haed", r"'haed' matches no node and no operator type; near: head"),
        ("frist", "'frist' matches no node.*near: first"),
        ("depthwize", "near: depthwise"),
        ("zzzzzz", "onnxq inspect"),
        ("Relu", r"'Relu' matches 1 nodes, but none with constant weights \(format Relu=int8/chan"),
    ],
)
def test_globs_that_name_no_layer(selector, match):
    with pytest.raises(RecipeError, match=match):
        named(CHAIN, selector)


@pytest.mark.parametrize("selector", ["first", "last", "depthwise"])
def test_words_may_name_no_layer(selector):
    assert named("g (float[N,8] x) => (float[] y) { y = Add(x, x) }", selector) == set()


def test_several_inputs_and_outputs():
    text = (
        "g (float[N,3,8,8] x, float[N,3,8,8] z) => (float[] y, float[] o)"
        "<float[3,3,1,1] a, float[3,3,1,1] b, float[3,3,1,1] c, float[3,3,1,1] d, float[3,3,1,1] e>"
        "{ t = Relu(x) [a] p = Conv(t, a) [b] q = Conv(z, b) s = Add(p, z) [c] u = Conv(s, c)"
        " [d] y = Conv(u, d) v = Sigmoid(u) w = Add(v, q) [e] f = Conv(w, e) o = Relu(f) }"
    )
    # z reaches c by the shortcut around a, and q reaches e by the one around c
    assert named(text, "first") == {"a", "b", "c"}
    assert named(text, "last") == {"d", "e"}


def test_layers_one_after_the_other_to_an_output_in_the_middle():
    text = (
        "g (float[N,4,8,8] x) => (float[] m, float[] y) <float[4,4,1,1] w, float[4,4,1,1] v>"
        "{ [a] m = Conv(x, w) [b] y = Conv(m, v) }"
    )
    assert named(text, "first") == {"a"}
    assert named(text, "last") == {"a", "b"}


def test_shapes_do_not_lead_to_layers():
    text = (
        "g (float[2,4,8,8] x) => (float[] y) <float[4,4,1,1] w, float[8,8] v, float[8,8] u>"
        "{ [a] c = Conv(x, w) [m] d = MatMul(c, v) s = Shape(x) r = Reshape(d, s)"
        " [n] e = MatMul(r, u) t = Shape(c) y = Reshape(e, t) }"
    )
    assert named(text, "first") == {"a"}  # not n, which x gives nothing but a shape
    assert named(text, "last") == {"n"}  # not a


@pytest.mark.parametrize(
    ("group", "shape", "layers"),
    [(1, "4,4", set()), (2, "4,2", set()), (4, "4,1", {"c"}), (4, "8,1", {"c"})],
)
def test_depthwise_has_a_group_for_each_input_channel(group, shape, layers):
    text = (
        f"g (float[N,4,8,8] x) => (float[] y) <float[{shape},3,3] w>"
        f"{{ [c] y = Conv<group={group}>(x, w) }}"
    )
    assert named(text, "depthwise") == layers


def test_one_channel_is_not_depthwise():
    text = "g (float[N,1,8,8] x) => (float[] y) <float[4,1,3,3] w> { [c] y = Conv(x, w) }"
    assert named(text, "depthwise") == set()


def test_transposed_convolutions_are_not_depthwise():
    text = (
        "g (float[N,4,8,8] x) => (float[] y) <float[4,1,2,2] w>"
        "{ [c] y = ConvTranspose<group=4>(x, w) }"
    )
    assert named(text, "depthwise") == set()


def test_branches_are_gone_through():
    text = (
        "g (float[2,4] x) => (float[2,4] y) <bool k, float[4,4] w, float[4,4] v>"
        "{ [a] m = MatMul(x, w)"
        " h = If(k) <then_branch = t () => (float[2,4] p) { p = Relu(m) },"
        " else_branch = f () => (float[2,4] q) { q = Neg(x) }> [b] y = MatMul(h, v) }"
    )
    assert named(text, "first", k=True) == {"a", "b"}
    text = text.replace("[b] y = MatMul(h, v)", "y = Relu(h)").replace(", float[4,4] v", "")
    assert named(text, "last", k=True) == {"a"}
