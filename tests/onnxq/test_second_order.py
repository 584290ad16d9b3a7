"""Moments of patches against unfolding with numpy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq.errors import CalibrationError
from onnxq.model import load
from onnxq.patches import PatchSource
from onnxq.second_order import (
    Accumulator,
    collect,
    collect_means,
    input_session,
    rows_of,
    supports,
    weight_of,
)
from tests import models
from tests.checks import run
from tests.models import ChainBuilder, parse
from tests.passes.test_gptq import LAYERS

TRANSPOSED = {
    name: f"g (float[N,4,5,6] x) => (float[] y) <float[4,3,{size}] w>"
    f"{{ y = ConvTranspose<{attrs}>(x, w) }}"
    for name, (size, attrs) in {
        "plain": ("3,2", "group=1"),
        "strided": ("3,2", "strides=[2,3]"),
        "padded": ("3,3", "strides=[2,2], pads=[1,0,1,2]"),
        "dilated": ("3,2", "strides=[2,1], dilations=[2,3]"),
        "longer": ("3,3", "strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]"),
        "grouped": ("3,2", "group=2, strides=[2,2]"),
        "same-upper": ("4,3", 'auto_pad="SAME_UPPER", strides=[2,2]'),
        "same-lower": ("4,3", 'auto_pad="SAME_LOWER", strides=[2,2]'),
        "valid": ("4,3", 'auto_pad="VALID", strides=[2,2]'),
        "of-shape": ("3,3", "strides=[2,2], output_shape=[10,12]"),
    }.items()
}


def collected(proto, data, patches=10**6, seed=0, expected=None):
    model = load(proto)
    found = collect(
        model.layers(),
        input_session(model, model.layers(), threads=1),
        data,
        expected=len(data) if expected is None else expected,
        rng=np.random.default_rng(seed),
        patches=patches,
    )
    return model, found


def samples(proto, count=5):
    return [{n: a + 1 for n, a in models.feeds(proto, seed=s).items()} for s in range(count)]


@pytest.mark.parametrize("name", [*LAYERS, *TRANSPOSED])
def test_rows_and_weights_are_inverse(name):
    layer = load(parse({**LAYERS, **TRANSPOSED}[name])).layers()[0]
    rows = rows_of(layer)
    assert rows.ndim == 3
    np.testing.assert_array_equal(weight_of(layer, rows), layer.weight)


@pytest.mark.parametrize("name", [*LAYERS, *TRANSPOSED])
def test_moments_predict_the_error_of_outputs(name):
    """E|dW x|^2 = tr(dW H dW^T) and E[dW x] = dW m, for any change of the weight."""
    proto = parse({**LAYERS, **TRANSPOSED}[name])
    data = samples(proto)
    model, found = collected(proto, data)
    layer = model.layers()[0]
    moments = found[layer.name]
    change = np.random.default_rng(9).normal(size=layer.weight.shape).astype(np.float32)
    rows = rows_of(layer)
    layer.set_weight(layer.weight + change)
    delta = (rows_of(model.layers()[0]) - rows).astype(np.float64)
    errors = []
    for feed in data:
        error = (run(model, feed)["y"] - run(proto, feed)["y"]).astype(np.float64)
        error = np.moveaxis(error, 1, -1) if "Conv" in layer.op else error
        errors.append(error.reshape(-1, error.shape[-1]))
    error = np.concatenate(errors) / float(layer.node.attrs.get("alpha", 1.0))
    assert moments.sampled == len(error)
    wanted = np.einsum("gok,gkl,gol->go", delta, moments.moment, delta).reshape(-1)
    np.testing.assert_allclose(np.square(error).mean(axis=0), wanted, rtol=1e-3)
    mean = np.einsum("gok,gk->go", delta, moments.mean).reshape(-1)
    np.testing.assert_allclose(error.mean(axis=0), mean, atol=1e-4 * np.abs(error).max())
    spread = np.einsum("gok,gkl,gol->go", delta, moments.covariance, delta).reshape(-1)
    np.testing.assert_allclose(error.var(axis=0), spread, rtol=1e-2)


def test_fewer_patches_estimate_the_same():
    proto = parse(LAYERS["conv"])
    data = samples(proto, 40)
    whole = collected(proto, data)[1]["Conv_0"]
    part = collected(proto, data, patches=300)[1]["Conv_0"]
    assert part.sampled < whole.sampled
    np.testing.assert_array_equal(part.mean, whole.mean)
    assert np.abs(part.moment - whole.moment).mean() < 0.3 * np.abs(whole.moment).mean()


def test_layers_with_the_same_input_and_window_share():
    text = (
        "g (float[N,4,8,8] x) => (float[] y, float[] z, float[] q) <float[6,4,3,3] w,"
        "float[2,4,3,3] v, float[2,4,3,3] u>"
        "{ y = Conv(x, w) z = Conv(x, v) q = Conv<strides=[2,2]>(x, u) }"
    )
    proto = parse(text)
    _, found = collected(proto, samples(proto))
    assert found["Conv_0"] is found["Conv_1"]
    assert found["Conv_2"] is not found["Conv_0"]


def test_no_samples_give_nothing():
    assert collected(parse(LAYERS["conv"]), [], expected=0)[1] == {}


def test_what_is_supported():
    texts = {
        True: [*LAYERS.values(), *TRANSPOSED.values()],
        False: [
            "g (float[N,6,8] x) => (float[] y) <float[5,6] w> { y = MatMul(w, x) }",
            "g (float[6,N] x) => (float[] y) <float[6,5] w> { y = Gemm<transA=1>(x, w) }",
            "g (float[2,6,8] x) => (float[] y) <float[2,8,5] w> { y = MatMul(x, w) }",
        ],
    }
    for wanted, group in texts.items():
        for text in group:
            assert supports(load(parse(text)).layers()[0]) is wanted, text


# ------------------------------------------------------------------ against unfolding by loops


def unfolded(x, size, strides, dilations, begin, positions):
    """Every patch that a convolution reads, one loop an axis: [N * positions, C * size]."""
    patches = []
    for sample in x:
        for at in itertools.product(*map(range, positions)):
            patch = np.zeros((len(sample), *size))
            for k in itertools.product(*map(range, size)):
                place = [
                    a * s + i * d - b
                    for a, s, i, d, b in zip(at, strides, k, dilations, begin, strict=True)
                ]
                if all(0 <= p < n for p, n in zip(place, sample.shape[1:], strict=True)):
                    patch[(slice(None), *k)] = sample[(slice(None), *place)]
            patches.append(patch.reshape(-1))
    return np.array(patches)


def assert_moments(found, patches, groups):
    """The moments are those of these patches [P, G * K]."""
    grouped = patches.astype(np.float64).reshape(len(patches), groups, -1)
    mean = grouped.mean(axis=0)
    moment = np.einsum("pgk,pgl->gkl", grouped, grouped) / len(patches)
    centred = grouped - mean
    covariance = np.einsum("pgk,pgl->gkl", centred, centred) / len(patches)
    assert found.sampled == len(patches)
    np.testing.assert_allclose(found.mean, mean, atol=1e-5)
    np.testing.assert_allclose(found.sampled_mean, mean, atol=1e-5)
    np.testing.assert_allclose(found.moment, moment, atol=1e-5 * (1 + np.abs(moment).max()))
    np.testing.assert_allclose(found.covariance, covariance, atol=2e-5 * (1 + moment.max()))


@st.composite
def convolutions(draw):
    """A Conv on one to three axes, and how its window lies: a model, and the loops' arguments."""
    rank = draw(st.integers(1, 3))
    group, inputs, outputs = (draw(st.integers(1, n)) for n in (3, 2, 2))
    size = [draw(st.integers(1, 3 if rank < 3 else 2)) for _ in range(rank)]
    strides = [draw(st.integers(1, 3)) for _ in range(rank)]
    padding = draw(st.sampled_from(["explicit", "explicit", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    # onnxruntime has no auto_pad with dilations
    dilations = [draw(st.integers(1, 2)) if padding == "explicit" else 1 for _ in range(rank)]
    extent = [d * (k - 1) + 1 for k, d in zip(size, dilations, strict=True)]
    spatial = tuple(draw(st.integers(e, e + 4)) for e in extent)
    begin, end = [0] * rank, [0] * rank
    attrs = {"kernel_shape": size, "strides": strides, "dilations": dilations, "group": group}
    if padding == "explicit":
        begin = [draw(st.integers(0, 3)) for _ in range(rank)]
        end = [draw(st.integers(0, 3)) for _ in range(rank)]
        attrs["pads"] = begin + end
    else:
        attrs["auto_pad"] = padding
    if padding.startswith("SAME"):  # the specification: ceil(n / s) positions, the rest padded
        for i, (n, s, k) in enumerate(zip(spatial, strides, size, strict=True)):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            begin[i] = total // 2 if padding == "SAME_UPPER" else total - total // 2
            end[i] = total - begin[i]
    positions = [
        (n + b + e - x) // s + 1
        for n, b, e, x, s in zip(spatial, begin, end, extent, strides, strict=True)
    ]
    chain = ChainBuilder(spatial, group * inputs, draw(st.integers(0, 99)))
    weight = chain.rng.normal(size=(group * outputs, inputs, *size))
    chain.name = chain.node("Conv", "x", chain.constant(weight), **attrs)
    chain.channels, chain.spatial = group * outputs, tuple(positions)
    return chain.build(), group, (size, strides, dilations, begin, positions)


@given(convolutions())
def test_moments_of_convolutions_are_those_of_unfolded_inputs(drawn):
    proto, group, window = drawn
    data = samples(proto, 2)
    patches = np.concatenate([unfolded(feed["x"], *window) for feed in data])
    model, found = collected(proto, data)
    layer = model.layers()[0]
    assert_moments(found[layer.name], patches, group)
    # and the loops are right: multiplied by the weight they give what onnxruntime gives
    grouped = patches.reshape(len(patches), group, -1)
    wanted = np.einsum("gok,pgk->pgo", rows_of(layer), grouped).reshape(len(patches), -1)
    name = proto.graph.output[0].name
    got = [np.moveaxis(run(proto, feed)[name], 1, -1) for feed in data]
    got = np.concatenate([y.reshape(-1, y.shape[-1]) for y in got])
    np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("g (float[N,6] x) => (float[] y) <float[6,5] w> { y = Gemm(x, w) }", (3, 6)),
        ("g (float[N,6] x) => (float[] y) <float[5,6] w> { y = Gemm<transB=1>(x, w) }", (3, 6)),
        ("g (float[N,6] x) => (float[] y) <float[6,5] w> { y = MatMul(x, w) }", (3, 6)),
        ("g (float[N,4,6] x) => (float[] y) <float[6,5] w> { y = MatMul(x, w) }", (3, 4, 6)),
        ("g (float[N,2,4,6] x) => (float[] y) <float[6,5] w> { y = MatMul(x, w) }", (3, 2, 4, 6)),
    ],
)
def test_moments_of_matrix_products_are_those_of_rows(text, shape):
    proto = parse(text)
    data = [{"x": 1 + models.feeds(proto, seed=s, batch=shape[0])["x"]} for s in range(3)]
    rows = np.concatenate([feed["x"].reshape(-1, 6) for feed in data])
    model, found = collected(proto, data)
    layer = model.layers()[0]
    assert_moments(found[layer.name], rows, 1)
    y = np.concatenate([run(proto, feed)["y"].reshape(-1, 5) for feed in data])
    np.testing.assert_allclose(rows @ rows_of(layer)[0].T, y, atol=1e-4)


def test_samples_of_different_sizes_weigh_as_their_positions():
    proto = parse("g (float[N,2,L] x) => (float[] y) <float[3,2,3] w> { y = Conv(x, w) }")
    data = [models.feeds(proto, seed=s, batch=1 + s, size=4 + 3 * s) for s in range(3)]
    window = ([3], [1], [1], [0])
    patches = [unfolded(f["x"], *window, [f["x"].shape[2] - 2]) for f in data]
    assert len({len(p) for p in patches}) == 3
    assert_moments(collected(proto, data)[1]["Conv_0"], np.concatenate(patches), 1)


def test_inputs_inside_of_the_model():
    text = (
        "g (float[N,3,6,6] x) => (float[] y) <float[4,3,3,3] w, float[2,4,2,2] v>"
        "{ c = Conv(x, w) r = Relu(c) y = Conv(r, v) }"
    )
    proto = parse(text)
    data = samples(proto)
    _, found = collected(proto, data)
    inner = [run(load(proto).to_proto(["r"]), feed)["r"] for feed in data]
    window = ([2, 2], [1, 1], [1, 1], [0, 0], [3, 3])
    patches = np.concatenate([unfolded(r, *window) for r in inner])
    assert_moments(found["Conv_2"], patches, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_means_alone_are_the_same_means(name):
    proto = parse(LAYERS[name])
    data = samples(proto)
    model, found = collected(proto, data, patches=1)
    session = input_session(model, model.layers(), threads=1)
    steps = []
    means = collect_means(model.layers(), session, data, progress=steps.append)
    (layer,) = model.layers()
    np.testing.assert_array_equal(means[layer.name], found[layer.name].mean)
    assert steps == [1] * len(data)


# ------------------------------------------------------------------ which layers share


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [
        ("Gemm(x, w)", "MatMul(x, v)", True),
        ("Gemm<transB=1>(x, w)", "Gemm(x, v)", True),
        ("MatMul(x, w)", "MatMul(z, v)", False),
    ],
)
def test_matrix_products_of_one_input_share(first, second, share):
    text = (
        "g (float[N,6] x, float[N,6] z) => (float[] a, float[] b) <float[6,6] w, float[6,6] v>"
        f"{{ a = {first} b = {second} }}"
    )
    proto = parse(text)
    one, two = collected(proto, samples(proto))[1].values()
    assert (one is two) is share
    assert np.array_equal(one.moment, two.moment) is share


@pytest.mark.parametrize(
    ("attrs", "share"),
    [
        ("", True),
        ("kernel_shape=[3,3], group=1", True),
        ("pads=[1,1,1,1]", False),
        ("strides=[2,2]", False),
        ("dilations=[2,2]", False),
        ('auto_pad="SAME_UPPER"', False),
    ],
)
def test_convolutions_share_only_the_same_window(attrs, share):
    text = (
        "g (float[N,4,8,8] x) => (float[] a, float[] b) <float[2,4,3,3] w, float[5,4,3,3] v>"
        f"{{ a = Conv(x, w) b = Conv<{attrs}>(x, v) }}"
    )
    proto = parse(text)
    one, two = collected(proto, samples(proto))[1].values()
    assert (one is two) is share


def test_groups_do_not_share_with_the_whole():
    text = (
        "g (float[N,4,8,8] x) => (float[] a, float[] b) <float[2,4,3,3] w, float[4,2,3,3] v>"
        "{ a = Conv(x, w) b = Conv<group=2>(x, v) }"
    )
    proto = parse(text)
    one, two = collected(proto, samples(proto))[1].values()
    assert (one.moment.shape, two.moment.shape) == ((1, 36, 36), (2, 18, 18))
    np.testing.assert_allclose(two.moment[1], one.moment[0, 18:, 18:], rtol=1e-5)


# ------------------------------------------------------------------ sampling


def test_every_position_is_drawn_as_often_as_any_other():
    """x shows at position p the p-th unit vector, so the mean patch counts the draws."""
    text = "g (float[N,6,2,3] x) => (float[] y) <float[1,6,1,1] w> { y = Conv(x, w) }"
    x = np.broadcast_to(np.eye(6, dtype=np.float32).reshape(6, 2, 3), (100, 6, 2, 3))
    found = collected(parse(text), [{"x": np.array(x)}] * 100, patches=6000)[1]["Conv_0"]
    assert found.sampled == 6000
    np.testing.assert_array_equal(found.mean, np.full((1, 6), 1 / 6))
    spread = np.sqrt(1 / 6 * 5 / 6 / found.sampled)
    assert np.abs(found.sampled_mean - 1 / 6).max() < 4 * spread
    np.testing.assert_allclose(found.moment[0], np.diag(found.sampled_mean[0]), atol=1e-6)


def test_the_mean_of_many_draws_is_the_whole():
    proto = parse(LAYERS["conv"])
    data = samples(proto, 20)
    whole = collected(proto, data)[1]["Conv_0"]
    drawn = [collected(proto, data, patches=1, seed=s)[1]["Conv_0"] for s in range(40)]
    assert {d.sampled for d in drawn} == {160}  # four per weight of an output, 8 of each sample
    for name in ("sampled_mean", "moment"):
        parts = np.array([getattr(d, name) for d in drawn])
        error = np.abs(parts.mean(axis=0) - getattr(whole, name))
        assert (error / (parts.std(axis=0, ddof=1) / np.sqrt(40) + 1e-9)).max() < 5, name


def test_draws_depend_on_the_seed_alone():
    proto = parse(LAYERS["conv"])
    data = samples(proto)
    one, same, other = (
        collected(proto, data, patches=1, seed=seed)[1]["Conv_0"] for seed in (0, 0, 1)
    )
    for name in ("mean", "moment", "sampled_mean"):
        np.testing.assert_array_equal(getattr(one, name), getattr(same, name))
    assert not np.array_equal(one.moment, other.moment)
    np.testing.assert_array_equal(one.mean, other.mean)


def test_patches_are_spread_over_the_samples():
    proto = parse(LAYERS["matmul"])
    data = samples(proto, 10)
    rows = 10  # of each sample
    for patches, per_sample in ((0, 4), (50, 5), (51, 6), (1000, rows)):
        found = collected(proto, data, patches=patches)[1]["MatMul_0"]
        assert found.sampled == 10 * per_sample


def test_an_empty_batch_adds_nothing():
    proto = parse(LAYERS["gemm"])
    data = samples(proto)
    empty = {"x": np.zeros((0, 8), np.float32)}
    with_it, without = collected(proto, [empty, *data])[1], collected(proto, data)[1]
    np.testing.assert_array_equal(with_it["Gemm_0"].moment, without["Gemm_0"].moment)
    assert collected(proto, [empty])[1] == {}


# ------------------------------------------------------------------ quantized against float inputs


def pairs(count=6, seed=0):
    """Inputs of a layer [N, 4, 9, 9] as they are, and near to that."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        x = rng.normal(3, 1, size=(2, 4, 9, 9)).astype(np.float32)
        yield x + rng.normal(0.1, 0.3, x.shape).astype(np.float32), x


def accumulated(layer, given, patches=10**6, shifted=True):
    total = Accumulator(PatchSource.of(layer), patches, np.random.default_rng(0), shifted=shifted)
    total.add_all(given)
    return total.result()


@pytest.mark.parametrize("name", ["conv", "grouped", "depthwise"])
def test_both_inputs_predict_the_error_of_outputs(name):
    """E|Q x' - W x|^2 about the mean, from H, C and what rounding does not change."""
    layer = load(parse(LAYERS[name])).layers()[0]
    found = accumulated(layer, pairs())
    assert found.is_shifted
    weight = rows_of(layer).astype(np.float64)
    changed = weight + np.random.default_rng(9).normal(size=weight.shape)
    source = PatchSource.of(layer)
    every = np.arange(source.positions(next(pairs())[0]))
    drawn = [[source.draw(a, every).astype(np.float64) for a in pair] for pair in pairs()]
    got, wanted = (np.concatenate(part) for part in zip(*drawn, strict=True))
    error = np.einsum("gok,pgk->pgo", changed, got) - np.einsum("gok,pgk->pgo", weight, wanted)
    h, c = found.covariance, found.cross_covariance
    power = np.einsum("pgk,gok->pgo", wanted, weight).var(axis=0)
    expected = (
        np.einsum("gok,gkl,gol->go", changed, h, changed)
        - 2 * np.einsum("gok,gkl,gol->go", weight, c, changed)
        + power
    )
    np.testing.assert_allclose(error.var(axis=0), expected, rtol=1e-3)
    shift = np.einsum("gok,gk->go", changed, found.mean)
    shift -= np.einsum("gok,gk->go", weight, found.reference_mean)
    np.testing.assert_allclose(error.mean(axis=0), shift, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        found.cross_moment,
        np.einsum("pgk,pgl->gkl", wanted, got) / len(got),
        atol=1e-4 * found.cross_moment.max(),
    )


@pytest.mark.parametrize("shifted", [False, True])
def test_parts_merge_to_the_whole(shifted):
    layer = load(parse(LAYERS["grouped"])).layers()[0]
    given = [*pairs(7)]
    whole = accumulated(layer, given, shifted=shifted)
    merged = accumulated(layer, given[:2], shifted=shifted)
    for part in (given[2:3], given[3:]):
        merged = merged.merge(accumulated(layer, part, shifted=shifted))
    assert (merged.count, merged.sampled) == (whole.count, whole.sampled)
    assert merged.is_shifted is shifted
    for name in ("mean", "reference_mean", "covariance", "cross_covariance", "moment"):
        np.testing.assert_allclose(
            getattr(merged, name), getattr(whole, name), rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_a_small_spread_beside_a_large_mean_survives():
    """In float32, squares of 1000 leave nothing of a variance of 1e-4."""
    layer = load(parse(LAYERS["matmul"])).layers()[0]
    rng = np.random.default_rng(0)
    x = (1000 + 0.01 * rng.normal(size=(50, 40, 8))).astype(np.float32)
    found = accumulated(layer, [(a, a) for a in x], shifted=False)
    wanted = np.cov(x.reshape(-1, 8).astype(np.float64), rowvar=False, bias=True)
    np.testing.assert_allclose(found.covariance[0], wanted, atol=0.02 * wanted.max())


def test_many_chunks_are_as_one(monkeypatch):
    layer = load(parse(LAYERS["conv"])).layers()[0]
    whole = accumulated(layer, pairs())
    monkeypatch.setattr("onnxq.second_order._CHUNK", 4 * 36 * 100)
    parts = accumulated(layer, pairs())
    np.testing.assert_allclose(parts.covariance, whole.covariance, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(parts.cross_covariance, whole.cross_covariance, atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_values_that_are_not_finite_are_named(bad):
    layer = load(parse(LAYERS["conv"])).layers()[0]
    x = np.ones((1, 4, 9, 9), np.float32)
    x[0, 0, 3, 3] = bad
    with pytest.raises(CalibrationError, match="tensor x"):
        accumulated(layer, [(x, x)])


def test_no_patch_gives_nothing():
    layer = load(parse(LAYERS["matmul"])).layers()[0]
    assert accumulated(layer, [(np.zeros((0, 5, 8), np.float32),) * 2]) is None


def with_rows(layer, given, rows=None, halves=False):
    total = Accumulator(
        PatchSource.of(layer),
        10**6,
        np.random.default_rng(0),
        shifted=True,
        halves=halves,
        rows=rows,
    )
    total.add_all(given)
    return total.result()


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("chunk", [1 << 25, 4 * 36 * 100])
@pytest.mark.parametrize("name", ["conv", "grouped", "matmul"])
def test_differences_of_outputs_give_the_drift(name, chunk, halves, monkeypatch):
    """W (H - C) from W (x' - x), about the means or not."""
    monkeypatch.setattr("onnxq.second_order._CHUNK", chunk)
    layer = load(parse(LAYERS[name])).layers()[0]
    given = [*pairs(7)]
    if name == "matmul":
        given = [
            (a.reshape(-1, 4)[:, [0, 1, 2, 3] * 2], b.reshape(-1, 4)[:, [3, 1, 2, 0] * 2])
            for a, b in given
        ]
    rows = rows_of(layer)
    whole, short = with_rows(layer, given, None, halves), with_rows(layer, given, rows, halves)
    assert whole.is_shifted
    assert short.is_shifted
    assert short.cross is None
    np.testing.assert_array_equal(short.scatter, whole.scatter)
    for centred in (True, False):
        wanted = whole.drift(rows, centred=centred)
        got = short.drift(rows, centred=centred)
        np.testing.assert_allclose(got, wanted, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("shifted", [False, True])
def test_sums_over_long_patches_stay_in_float32(shifted, monkeypatch):
    layer = load(parse(LAYERS["conv"])).layers()[0]
    whole = accumulated(layer, pairs(), shifted=shifted)
    monkeypatch.setattr("onnxq.second_order.LONG", 8)
    monkeypatch.setattr("onnxq.second_order._CHUNK", 4 * 36 * 100)
    found = accumulated(layer, pairs(), shifted=shifted)
    assert found.scatter.dtype == np.float32
    assert found.covariance.dtype == np.float64
    for name in ("covariance", "cross_covariance", "moment", "cross_moment"):
        wanted = getattr(whole, name)
        np.testing.assert_allclose(
            getattr(found, name), wanted, atol=1e-5 * np.abs(wanted).max(), err_msg=name
        )
