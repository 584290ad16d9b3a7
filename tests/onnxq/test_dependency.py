"""Which channels go together, and that taking them out leaves what the others compute."""

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.cut import cut
from onnxq.dependency import find_groups, is_depthwise
from onnxq.model import BatchNormStatistics, load
from tests import models
from tests.checks import assert_same_function
from tests.models import parse

X = "g (float[N,3,9,9] x) => (float[] y)"


def groups(proto):
    """Name of a group -> how many classes it has, who puts them out, who mixes them."""
    found = find_groups(load(proto))
    return {
        g.name: (g.classes.size, g.members, [s.layer.name for s in g.readers]) for g in found.groups
    }


def without(model, found, keep):
    """The model in full size, with weights of zero where channels are read that do not stay."""
    masked = model.clone()
    for layer in masked.layers():
        side = found.inputs.get(layer.name)
        if side is not None and not is_depthwise(layer):
            weight = np.where(layer.along_inputs(keep[side.classes]), layer.weight, 0)
            layer.set_weight(weight.astype(layer.weight.dtype))
    return masked


def taken_out(proto, seed=0, share=0.5):
    """The model with some of each group taken out, which must compute what the others do."""
    model = load(proto)
    found = find_groups(model)
    rng, keep = np.random.default_rng(seed), np.ones(found.count, bool)
    for group in found.groups:
        stay = max(1, int(group.classes.size * share))
        keep[rng.permutation(group.classes)[stay:]] = False
    masked = without(model, found, keep)
    cut(model, found, keep)
    model.check()
    after = model.to_proto()
    onnx.checker.check_model(after, full_check=True)
    assert_same_function(masked, model, 1e-4)
    assert_same_function(masked, model, 1e-4, feed=models.feeds(after, batch=3))
    assert shapes(after) == fresh_shapes(after)
    return model, found, keep


def shapes(proto):
    return {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*proto.graph.value_info, *proto.graph.output)
    }


def fresh_shapes(proto):
    """What shape inference says of the weights alone."""
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True, strict_mode=True)
    known = shapes(inferred)
    return {name: known[name] for name in shapes(proto)}


# name -> a model, and its groups: classes, who puts them out, who mixes them
GRAPHS = {
    "chain": (
        "<float[4,3,3,3] w, float[4] b, float[5,4,3,3] v> { c = Conv(x, w, b) r = Relu(c)"
        " y = Conv(r, v) }",
        {"c": (4, ["c"], ["y"])},
    ),
    "normalized": (
        "<float[4,3,3,3] w, float[4] s, float[4] o, float[4] m, float[4] var, float[5,4,3,3] v>"
        "{ c = Conv(x, w) n = BatchNormalization(c, s, o, m, var) r = Relu(n) y = Conv(r, v) }",
        {"c": (4, ["c"], ["y"])},
    ),
    "instance norm": (
        "<float[4,3,3,3] w, float[4] s, float[4] o, float[5,4,3,3] v>"
        "{ c = Conv(x, w) n = InstanceNormalization(c, s, o) y = Conv(n, v) }",
        {"c": (4, ["c"], ["y"])},
    ),
    "constants": (
        "<float[4,3,3,3] w, float[4,1,1] p, float[4,1,1] top, float[1,4,1,1] f, float one,"
        " float[5,4,3,3] v> { c = Conv(x, w) r = PRelu(c, p) s = Min(r, top) t = Mul(f, s)"
        " u = Add(t, one) y = Conv(u, v) }",
        {"c": (4, ["c"], ["y"])},
    ),
    "residual": (
        "<float[4,3,1,1] w, float[4,4,3,3] a, float[4,4,3,3] b, float[5,4,1,1] v>"
        "{ c = Conv(x, w) i = Conv<pads=[1,1,1,1]>(c, a) o = Conv<pads=[1,1,1,1]>(i, b)"
        " s = Add(o, c) y = Conv(s, v) }",
        {"c": (4, ["c", "o"], ["i", "y"]), "i": (4, ["i"], ["o"])},
    ),
    "shortcut without parameters": (
        "<float[2,3,1,1] w, float[6,2,3,3] a, float[6,6,3,3] b, int64[8] pads, float[5,6,1,1] v,"
        " int64[1] from, int64[1] to, int64[1] axis, int64[1] step>"
        "{ c = Conv(x, w) i = Conv<pads=[1,1,1,1], strides=[2,2]>(c, a)"
        " o = Conv<pads=[1,1,1,1]>(i, b) h = Slice(c, from, to, axis, step) q = Pad(h, pads)"
        " k = MaxPool<kernel_shape=[1,1], strides=[1,2]>(q) s = Add(o, k) y = Conv(s, v) }",
        {"c": (2, ["c", "o"], ["i", "y"]), "i": (6, ["i"], ["o"]), "o": (4, ["o"], ["y"])},
    ),
    "depthwise": (
        "<float[4,3,3,3] w, float[4,1,3,3] d, float[5,4,1,1] v>"
        "{ c = Conv(x, w) r = Relu(c) e = Conv<group=4>(r, d) y = Conv(e, v) }",
        {"c": (4, ["c", "e"], ["y"])},
    ),
    "depthwise of several": (
        "<float[4,3,3,3] w, float[8,1,3,3] d, float[8] b, float[5,8,1,1] v>"
        "{ c = Conv(x, w) e = Conv<group=4>(c, d, b) y = Conv(e, v) }",
        {"c": (4, ["c", "e"], ["y"])},
    ),
    "grouped": (
        "<float[4,3,3,3] w, float[6,2,3,3] d, float[5,6,1,1] v>"
        "{ c = Conv(x, w) e = Conv<group=2>(c, d) y = Conv(e, v) }",
        {"c": (2, ["c"], ["e"]), "e": (3, ["e"], ["y"])},
    ),
    "transposed": (
        "<float[3,4,3,3] w, float[4] b, float[4,5,2,2] v>"
        "{ c = ConvTranspose<strides=[2,2]>(x, w, b) y = ConvTranspose(c, v) }",
        {"c": (4, ["c"], ["y"])},
    ),
    "transposed depthwise": (
        "<float[4,3,1,1] w, float[4,2,3,3] d, float[5,8,1,1] v>"
        "{ c = Conv(x, w) e = ConvTranspose<group=4>(c, d) y = Conv(e, v) }",
        {"c": (4, ["c", "e"], ["y"])},
    ),
    "transposed grouped": (
        "<float[4,3,1,1] w, float[4,3,3,3] d, float[5,6,1,1] v>"
        "{ c = Conv(x, w) e = ConvTranspose<group=2>(c, d) y = Conv(e, v) }",
        {"c": (2, ["c"], ["e"]), "e": (3, ["e"], ["y"])},
    ),
    "concat": (
        "<float[4,3,1,1] w, float[2,3,1,1] u, float[5,9,1,1] v>"
        "{ a = Conv(x, w) b = Conv(x, u) c = Concat<axis=1>(a, x, b) y = Conv(c, v) }",
        {"a": (4, ["a"], ["y"]), "b": (2, ["b"], ["y"])},
    ),
    "one twice": (
        "<float[4,3,1,1] w, float[5,8,1,1] v>"
        "{ a = Conv(x, w) r = Relu(a) c = Concat<axis=1>(a, r) y = Conv(c, v) }",
        {"a": (4, ["a"], ["y"])},
    ),
    "split": (
        "<float[6,3,1,1] w, int64[2] sizes, float[5,4,1,1] v, float[5,2,1,1] u>"
        "{ c = Conv(x, w) a, b = Split<axis=1>(c, sizes) p = Conv(a, v) q = Conv(b, u)"
        " y = Add(p, q) }",
        {"c": (4, ["c"], ["p"]), "c#2": (2, ["c"], ["q"])},
    ),
    "equal split": (
        "<float[6,3,1,1] w, float[5,3,1,1] v, float[5,3,1,1] u>"
        "{ c = Conv(x, w) a, b = Split<axis=1>(c) p = Conv(a, v) q = Conv(b, u) y = Add(p, q) }",
        {"c": (3, ["c"], ["p"]), "c#2": (3, ["c"], ["q"])},
    ),
    "slices": (
        "<float[6,3,1,1] w, int64[1] zero, int64[1] two, int64[1] last, int64[1] axis,"
        " float[5,2,1,1] v, float[5,4,1,1] u>"
        "{ c = Conv(x, w) a = Slice(c, zero, two, axis) b = Slice(c, two, last, axis)"
        " p = Conv(a, v) q = Conv(b, u) y = Add(p, q) }",
        {"c": (2, ["c"], ["p"]), "c#2": (4, ["c"], ["q"])},
    ),
    "pooled": (
        "<float[4,3,3,3] w, float[4,6] v, float[6] b, float[6,3] u>"
        "{ c = Conv(x, w) m = MaxPool<kernel_shape=[2,2]>(c) a = AveragePool<kernel_shape=[2,2]>(m)"
        " h = GlobalAveragePool(a) f = Flatten(h) e = Gemm(f, v, b) r = Relu(e)"
        " y = MatMul(r, u) }",
        {"c": (4, ["c"], ["e"]), "e": (6, ["e"], ["y"])},
    ),
    "flattened": (
        "<float[4,3,7,7] w, float[6,36] v, float[6] b, float[6,3] u>"
        "{ c = Conv(x, w) f = Flatten(c) e = Gemm<transB=1>(f, v, b) y = MatMul(e, u) }",
        {"c": (4, ["c"], ["e"]), "e": (6, ["e"], ["y"])},
    ),
    "reshaped": (
        "<float[4,3,7,7] w, int64[2] to, float[36,6] v>"
        "{ c = Conv(x, w) f = Reshape(c, to) y = MatMul(f, v) }",
        {"c": (4, ["c"], ["y"])},
    ),
    "viewed": (
        "<float[4,3,7,7] w, int64 first, int64[1] axes, int64[1] rest, float[36,6] v>"
        "{ c = Conv(x, w) z = Shape(c) n = Gather<axis=0>(z, first) u = Unsqueeze(n, axes)"
        " t = Concat<axis=0>(u, rest) f = Reshape(c, t) y = MatMul(f, v) }",
        {"c": (4, ["c"], ["y"])},
    ),
    "mean": (
        "<float[4,3,7,7] w, float[4,6] v>"
        "{ c = Conv(x, w) m = ReduceMean<axes=[2,3], keepdims=0>(c) y = MatMul(m, v) }",
        {"c": (4, ["c"], ["y"])},
    ),
    "padded and resized": (
        "<float[4,3,3,3] w, int64[8] pads, float value, float[] roi, float[] no, int64[4] sizes,"
        " float[5,4,1,1] v> { c = Conv(x, w) p = Pad(c, pads, value)"
        " r = Resize(p, roi, no, sizes) y = Conv(r, v) }",
        {"c": (4, ["c"], ["y"])},
    ),
    "pixel shuffle": (
        "<float[8,3,3,3] w, float[5,2,1,1] v>"
        "{ c = Conv(x, w) d = DepthToSpace<blocksize=2>(c) y = Conv(d, v) }",
        {"c": (2, ["c"], ["y"])},
    ),
    "pixel shuffle by column": (
        "<float[8,3,3,3] w, float[5,2,1,1] v>"
        '{ c = Conv(x, w) d = DepthToSpace<blocksize=2, mode="CRD">(c) y = Conv(d, v) }',
        {"c": (2, ["c"], ["y"])},
    ),
    "space to depth": (
        "<float[4,3,2,2] w, float[5,16,1,1] v>"
        "{ c = Conv(x, w) d = SpaceToDepth<blocksize=2>(c) y = Conv(d, v) }",
        {"c": (4, ["c"], ["y"])},
    ),
    "squeeze and excite": (
        "<float[4,3,3,3] w, float[2,4,1,1] a, float[4,2,1,1] b, float[5,4,1,1] v>"
        "{ c = Conv(x, w) p = GlobalAveragePool(c) s = Conv(p, a) r = Relu(s) e = Conv(r, b)"
        " g = Sigmoid(e) m = Mul(c, g) y = Conv(m, v) }",
        {"c": (4, ["c", "e"], ["s", "y"]), "s": (2, ["s"], ["e"])},
    ),
    "spatial attention": (
        "<float[4,3,3,3] w, float[1,4,1,1] a, float[5,4,1,1] v>"
        "{ c = Conv(x, w) s = Conv(c, a) g = Sigmoid(s) m = Mul(c, g) y = Conv(m, v) }",
        {"c": (4, ["c"], ["s", "y"])},
    ),
    "channels last": (
        "<float[4,3,1,1] w, float[4,6] v, float[6] b, float[6,4] u>"
        "{ c = Conv(x, w) t = Transpose<perm=[0,2,3,1]>(c) h = MatMul(t, v) a = Add(h, b)"
        " e = Erf(a) o = MatMul(e, u) y = Add(o, t) }",
        {"h": (6, ["h"], ["o"])},
    ),
}
VALUES = {
    "pads": [0, 1, 0, 0, 0, 3, 0, 0],
    "from": 0,
    "to": [-1],
    "axis": 2,
    "step": 2,
    "sizes": [4, 2],
    "zero": 0,
    "two": 2,
    "last": 2**31,
    "first": 0,
    "axes": 0,
    "rest": -1,
    "roi": np.zeros(0),
    "no": np.zeros(0),
}
SPECIAL = {
    "slices": {"axis": 1},
    "reshaped": {"to": [-1, 36]},
    "shortcut without parameters": {"to": 9},
    "padded and resized": {"pads": [0, 0, 1, 2, 0, 0, 0, 1], "sizes": [2, 4, 16, 20]},
}


def graph(name):
    text, _ = GRAPHS[name]
    head = X.replace("N,", "2,") if name == "padded and resized" else X
    shapes = {"float[] roi": "float[0] roi", "float[] no": "float[0] no"}
    for old, new in shapes.items():
        text = text.replace(old, new)
    values = VALUES | SPECIAL.get(name, {})
    proto = parse(f"{head} {text}", **{k: v for k, v in values.items() if f" {k}" in text})
    for node in proto.graph.node:
        node.name = node.output[0]
    return proto


@pytest.mark.parametrize("name", GRAPHS)
def test_groups(name):
    assert groups(graph(name)) == GRAPHS[name][1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_left_computes_what_it_did(name, seed):
    model, found, keep = taken_out(graph(name), seed)
    sizes = {g.name: keep[g.classes].sum() for g in found.groups}
    assert sizes == {n: max(1, c // 2) for n, (c, _, _) in GRAPHS[name][1].items()}
    weights = {layer.name: layer.weight.size for layer in load(graph(name)).layers()}
    for group in found.groups:  # really smaller
        for side in (*group.outputs, *group.inputs):
            now = next(x for x in model.layers() if x.name == side.layer.name)
            assert now.weight.size < weights[now.name]


@given(models.chains(), st.integers(0, 99))
def test_random_chains(proto, seed):
    taken_out(proto, seed)


@given(models.networks(), st.integers(0, 99))
def test_random_networks(proto, seed):
    taken_out(proto, seed)


# ---------------------------------------------------------------------- what stays

REFUSED = {
    "output": ("{ y = Conv(x, w) }", "y", "y is an output of the model"),
    "inner output": (
        "<float[4,4,1,1] v> { y = Conv(x, w) z = Conv(y, v) }",
        "y",
        "y is an output of the model",
    ),
    "mixed": (
        "<float[5,4,1,1] v> { c = Conv(x, w) s = Softmax<axis=1>(c) y = Conv(s, v) }",
        "c",
        "s (Softmax) reads it",
    ),
    "summed": (
        "{ c = Conv(x, w) y = ReduceMean<axes=[1]>(c) }",
        "c",
        "y (ReduceMean) reads it",
    ),
    "shuffled": (
        "<int64[5] to, int64[4] back, float[5,4,1,1] v> { c = Conv(x, w) r = Reshape(c, to)"
        " t = Transpose<perm=[0,2,1,3,4]>(r) u = Reshape(t, back) y = Conv(u, v) }",
        "c",
        "r (Reshape) reads it",
    ),
    "every second": (
        "<int64[1] from, int64[1] to, int64[1] axis, int64[1] step, float[5,2,1,1] v>"
        "{ c = Conv(x, w) s = Slice(c, from, to, axis, step) y = Conv(s, v) }",
        "c",
        "s (Slice) reads it",
    ),
    "counted": (
        "<float[5,4,1,1] v> { c = Conv(x, w) s = Shape(c) k = Cast<to=1>(s) p = ReduceProd(k)"
        " z = Conv(c, v) y = Mul(z, p) }",
        "c",
        "s (Shape) reads it",
    ),
    "tied to an input": (
        "<float[3,3,1,1] o> { c = Conv(x, o) y = Add(c, x) }",
        "c",
        "y (Add) reads it",
    ),
    "shared weight": (
        "<float[5,4,1,1] v> { c = Conv(x, w) d = Conv(x, w) s = Add(c, d) y = Conv(s, v) }",
        "c",
        "c shares its parameters",
    ),
    "depthwise on an input": (
        "<float[3,1,1,1] o, float[5,3,1,1] v> { c = Conv<group=3>(x, o) y = Conv(c, v) }",
        "c",
        "c reads channels that cannot be taken out",
    ),
    "attention": (
        "<float[9,6] q> { c = MatMul(x, q) y = MatMul(c, c) }",
        "c",
        "y (MatMul) reads it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_channels_out_of_reach_have_a_reason(name):
    text, layer, why = REFUSED[name]
    declared = text if text.startswith("<") else f"<> {text}"
    declared = declared.replace("<", "<float[4,3,1,1] w, ", 1).replace("w, >", "w>")
    values = {
        "to": [2, 2, 2, 9, 9] if name == "shuffled" else 4,
        "back": [2, 4, 9, 9],
        "from": 0,
        "axis": 1,
        "step": 2,
    }
    head = X.replace("N,", "2,") if name == "shuffled" else X
    if name == "attention":
        head = "g (float[2,6,9] x) => (float[] y)"
    if name == "inner output":
        head = "g (float[N,3,9,9] x) => (float[] y, float[] z)"
    given = {k: v for k, v in values.items() if f" {k}" in declared.partition("{")[0]}
    proto = parse(f"{head} {declared}", **given)
    for node in proto.graph.node:
        node.name = node.output[0]
    found = find_groups(load(proto))
    assert found.refused[layer] == why
    assert layer not in [m for g in found.groups for m in g.members]


def test_the_inner_channels_of_a_block_can_go_where_the_others_cannot():
    proto = parse(
        "g (float[N,4,9,9] x) => (float[] y) <float[8,4,3,3] a, float[4,8,3,3] b>"
        "{ i = Conv<pads=[1,1,1,1]>(x, a) r = Relu(i) o = Conv<pads=[1,1,1,1]>(r, b)"
        " y = Add(o, x) }"
    )
    (group,) = find_groups(load(proto)).groups
    assert group.classes.size == 8
    taken_out(proto)


def test_what_is_known_of_folded_normalization_goes_along():
    proto = graph("chain")
    model = load(proto)
    model.batch_norms["c"] = BatchNormStatistics(np.arange(4.0), -np.arange(4.0))
    found = find_groups(model)
    keep = np.ones(found.count, bool)
    keep[found.groups[0].classes[[0, 2]]] = False
    cut(model, found, keep)
    assert model.batch_norms["c"].gamma.tolist() == [1, 3]
    assert model.batch_norms["c"].beta.tolist() == [-1, -3]


def test_others_keep_the_constants_that_they_share():
    proto = parse(
        f"{X} <float[4,3,1,1] w, float[4,3,1,1] u, float[4,1,1] p, float[5,4,1,1] v,"
        " float[5,4,1,1] s> { a = Conv(x, w) b = Mul(a, p) c = Conv(b, v) d = Conv(x, u)"
        " e = Mul(d, p) f = Softmax<axis=1>(e) g = Conv(f, s) y = Add(c, g) }"
    )
    model, _, _ = taken_out(proto)
    sizes = [n.inputs[1].values.size for n in model.graph.nodes if n.op == "Mul"]
    assert sizes == [2, 4]


@pytest.mark.zoo
@pytest.mark.parametrize("name", models.ZOO)
def test_zoo(name):
    proto = load(models.zoo(name)).to_proto()
    model = load(proto)
    found = find_groups(model)
    rng, keep = np.random.default_rng(0), np.ones(found.count, bool)
    for group in found.groups:
        keep[rng.permutation(group.classes)[max(1, group.classes.size // 2) :]] = False
    masked = without(model, found, keep)
    cut(model, found, keep)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    assert_same_function(masked, model, 1e-4, feed=models.feeds(proto, size=576))
