"""Overflow of pairs of products, against every pair multiplied out."""

import numpy as np
import onnx
import onnxruntime.quantization as ortq
import pytest

from onnxq.analysis.saturation import saturation, worst_sums
from onnxq.encoding import Encoding
from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Calibrate, Clean, InsertQDQ
from onnxq.simulation import simulated
from onnxq.targets import target_named
from tests import models
from tests.checks import pair_sums

LIMIT = 32767
AVX2 = target_named("ort-x64-avx2")


def conv(channels, outs, kernel, *, group=1, pad=0, step=1, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.uniform(-1, 1, (outs, channels // group, kernel, kernel)).astype(np.float32)
    pads = f"pads=[{','.join([str(pad)] * 4)}], strides=[{step},{step}]"
    text = f"g (float[N,{channels},6,6] x) => (float[] y) <float{list(w.shape)} w>"
    text += f" {{ y = Conv<group={group}, {pads}>(x, w) }}"
    return models.parse(text, w=w)


def samples(shape, count=3, seed=1):
    rng = np.random.default_rng(seed)
    return [{"x": rng.uniform(-0.3, 1, shape).astype(np.float32)} for _ in range(count)]


def calibrated(proto, feeds, **options):
    model = load(proto)
    PassManager(Clean(), Calibrate(method="minmax", **options)).apply(model, context(feeds))
    return model


def context(feeds):
    return Context(feeds, target=AVX2, threads=1)


def looked_at(model, feeds, **options):
    found = saturation(
        model, lambda session: feeds, rng=np.random.default_rng(0), threads=1, **options
    )
    return {f.op: f for f in found}


def expected(sums):
    return int((sums > LIMIT).sum() + (sums < -LIMIT - 1).sum())


GEOMETRIES = [
    {"channels": 3, "outs": 5, "kernel": 3, "pad": 1},
    {"channels": 5, "outs": 4, "kernel": 3},
    {"channels": 4, "outs": 4, "kernel": 1},
    {"channels": 4, "outs": 6, "kernel": 3, "group": 2, "pad": 1, "step": 2},
    {"channels": 3, "outs": 6, "kernel": 3, "group": 3},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_convolutions_pair_by_pair(geometry, activations):
    feeds = samples((2, geometry["channels"], 6, 6))
    model = calibrated(conv(**geometry), feeds, activations=activations)
    x, w = model.encodings["x"], model.encodings["w"]
    shift = 128 if activations == "int8" else 0
    integers = w.quantize(model.array(model.tensors()["w"]))
    where = {k: v for k, v in geometry.items() if k in ("group", "pad", "step")}
    zero = int(x.zero_point) + shift
    inputs = [x.quantize(f["x"]).astype(np.int64) + shift for f in feeds]
    sums = np.concatenate([pair_sums(i, integers, **where, zero=zero) for i in inputs])
    wanted = expected(sums)
    assert wanted > 20
    written = model.clone()
    InsertQDQ().apply(written, context(feeds))
    for ready in (simulated(model, AVX2), written):
        found = looked_at(ready, feeds)["Conv"]
        assert (found.overflows, found.sums, found.exact) == (wanted, sums.size, "")
        assert found.pairs == sums[0].size
        assert found.worst >= max(sums.max(), -1 - sums.min())
        assert found.possible >= ((sums > LIMIT) | (sums < -LIMIT - 1)).any(axis=0).sum()


def test_the_error_of_what_is_cut_off_beside_that_of_a_bit():
    feeds = samples((2, 4, 6, 6))
    model = calibrated(conv(channels=4, outs=6, kernel=3, group=2), feeds)
    x, w = model.encodings["x"], model.encodings["w"]
    values = model.array(model.tensors()["w"])
    inputs = np.concatenate([x.quantize(f["x"]).astype(np.int64) for f in feeds])
    sums = pair_sums(inputs, w.quantize(values), group=2)
    cut = (sums - np.clip(sums, -LIMIT - 1, LIMIT)) * w.scale[None, :, None].astype(np.float64)
    means = np.square(inputs - int(x.zero_point)).mean(axis=(0, 2, 3))  # a channel counts 9 taps
    steps = np.square(w.scale.astype(np.float64)) * ((127 / 63) ** 2 - 1) / 12
    bit = sum(s * 9 * means[2 * (o // 3) :][:2].sum() for o, s in enumerate(steps))
    found = looked_at(simulated(model, AVX2), feeds)["Conv"]
    assert found.noise == pytest.approx(np.square(cut).sum() / len(sums) / bit, rel=1e-6)
    assert found.noise > 1


@pytest.mark.parametrize("node", ["Gemm<transB=1>(x, w, b)", "Gemm(x, v, b)", "MatMul(x, v)"])
def test_matrices_pair_by_pair(node):
    rng = np.random.default_rng(0)
    w = rng.uniform(-1, 1, (6, 7)).astype(np.float32)
    values = {"w": w, "v": np.ascontiguousarray(w.T), "b": np.zeros(6, np.float32)}
    used = {n: v for n, v in values.items() if n in node.replace("MatMul", "").partition("(")[2]}
    declared = ", ".join(f"float{list(v.shape)} {n}" for n, v in used.items())
    proto = models.parse(f"g (float[N,7] x) => (float[] y) <{declared}> {{ y = {node} }}", **used)
    feeds = samples((30, 7))
    model = calibrated(proto, feeds)
    name = "w" if "w" in used else "v"
    integers = model.encodings[name].quantize(model.array(model.tensors()[name]))
    integers = integers if name == "w" else integers.T
    inputs = np.concatenate([model.encodings["x"].quantize(f["x"]) for f in feeds])
    products = inputs.astype(np.int64)[:, None, :] * integers.astype(np.int64)
    products = np.pad(products, ((0, 0), (0, 0), (0, 1)))
    sums = products[..., ::2] + products[..., 1::2]
    found = looked_at(simulated(model, AVX2), feeds)
    (only,) = found.values()
    assert only.overflows == expected(sums) > 20
    assert (only.sums, only.pairs) == (sums.size, 24)


def test_the_bound_is_reached_by_some_inputs_within_the_ranges():
    rng = np.random.default_rng(2)
    rows = rng.integers(-127, 128, (1, 6, 8))
    low, high = np.sort(rng.integers(0, 256, (2, 1, 8)), axis=0)
    found = worst_sums(rows, low, high)
    corners = [
        [(a, b) for a in (low[0, k], high[0, k]) for b in (low[0, k + 1], high[0, k + 1])]
        for k in range(0, 8, 2)
    ]
    for r in range(6):
        for pair in range(4):
            sums = [
                int(a) * rows[0, r, 2 * pair] + int(b) * rows[0, r, 2 * pair + 1]
                for a, b in corners[pair]
            ]
            assert found[0, r, pair] == max(max(sums), -1 - min(sums))
    assert (worst_sums(rows, low, high, slack=1) >= found).all()


@pytest.mark.parametrize(
    ("geometry", "weights", "why"),
    [
        ({"channels": 4, "outs": 4, "kernel": 3, "group": 4}, "int8/channel", "depthwise"),
        ({"channels": 4, "outs": 4, "kernel": 3}, "uint8/tensor", "type uint8"),
    ],
)
def test_what_is_multiplied_exactly(geometry, weights, why):
    feeds = samples((1, 4, 6, 6))
    model = calibrated(conv(**geometry), feeds, weights=weights)
    found = looked_at(simulated(model, AVX2), feeds)["Conv"]
    assert why in found.exact
    assert str(found) == found.exact
    assert (found.overflows, found.possible) == (0, 0)


@pytest.mark.parametrize("weights", ["int7/channel", "int4/tensor"])
def test_seven_bits_never_overflow(weights):
    """Not even where all inputs are at the end of their grid."""
    feeds = [{"x": np.ones((1, 4, 6, 6), np.float32)}]
    model = calibrated(conv(channels=4, outs=4, kernel=3), feeds, weights=weights)
    found = looked_at(simulated(model, AVX2), feeds)["Conv"]
    assert (found.possible, found.overflows) == (0, 0)
    assert found.worst <= 255 * 64 * 2 < LIMIT


def test_models_of_another_tool(tmp_path):
    proto = conv(channels=3, outs=5, kernel=3, pad=1)
    onnx.save(proto, tmp_path / "float.onnx")
    feeds = samples((2, 3, 6, 6))

    class Reader(ortq.CalibrationDataReader):
        left = iter(feeds)

        def get_next(self):
            return next(self.left, None)

    ortq.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "q.onnx",
        Reader(),
        per_channel=True,
        activation_type=ortq.QuantType.QUInt8,
    )
    model = load(tmp_path / "q.onnx")
    found = looked_at(model, feeds)["Conv"]
    first = next(n for n in model.graph.nodes if n.op == "QuantizeLinear")
    scale, zero = (model.array(t) for t in first.inputs[1:])
    x = Encoding("uint8", np.float32(scale).reshape(()), np.int32(zero).reshape(()))
    arrays = [onnx.numpy_helper.to_array(t) for t in model.to_proto().graph.initializer]
    weight = next(a for a in arrays if a.dtype == np.int8 and a.ndim == 4)
    sums = [pair_sums(x.quantize(f["x"]), weight, pad=1, zero=int(x.zero_point)) for f in feeds]
    assert found.overflows == expected(np.concatenate(sums)) > 20


def test_where_no_sample_comes_by_the_whole_grid_counts():
    feeds = samples((1, 4, 6, 6))
    model = calibrated(conv(channels=4, outs=4, kernel=1), feeds)
    none = looked_at(simulated(model, AVX2), [])["Conv"]
    some = looked_at(simulated(model, AVX2), feeds)["Conv"]
    assert none.sums == 0
    assert none.possible >= some.possible > 0
    integers = model.encodings["w"].quantize(model.array(model.tensors()["w"])).reshape(4, 2, 2)
    ends = np.stack([np.maximum(integers, 0), np.minimum(integers, 0)]).sum(axis=-1) * 255
    assert none.worst == max(ends.max(), -1 - ends.min())


def test_few_positions_stand_for_many():
    feeds = samples((2, 3, 6, 6))
    model = calibrated(conv(channels=3, outs=5, kernel=3, pad=1), feeds)
    ready = simulated(model, AVX2)
    every, some = (looked_at(ready, feeds, patches=n)["Conv"] for n in (4096, 20))
    assert some.sums == 3 * 20 * some.pairs
    assert every.sums == 3 * 72 * every.pairs
    assert some.worst == every.worst
    assert some.overflows / some.sums == pytest.approx(every.overflows / every.sums, rel=0.5)
