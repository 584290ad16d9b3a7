"""Gate equalization: the float function stays, the integers gain precision."""

import numpy as np
import onnx
import pytest

from onnxq.model import load
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Calibrate, GateEqualization, InsertQDQ
from tests import models
from tests.checks import ops, proto_of, reasons, run
from tests.models import parse

HEAD = "g (float[N,3,18,18] x) => (float[] y) <float[8,3,3,3] w, float[8] b"
GATE = "c = Conv(x, w, b) s = Sigmoid(c) m = Mul(c, s)"
PLAIN = f"{HEAD}, float[4,8,3,3] v> {{ {GATE} y = Conv(m, v) }}"
# Half of the channels are small, and the weights that read them are large.
SIZES = np.array([1, 1, 1, 1, 4e-3, 4e-3, 4e-3, 4e-3])


def imbalanced(text=PLAIN, weight="v", shape=(4, 8, 3, 3), axis=1, **more):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 3, 3, 3)) * 4 * SIZES[:, None, None, None]
    by = [1] * len(shape)
    by[axis] = -1
    sizes = np.repeat(SIZES, shape[axis] // 8).reshape(by)
    v = rng.normal(size=shape) / sizes if weight else None
    given = {"w": w, "b": np.zeros(8), **({weight: v} if weight else {}), **more}
    return parse(text, **given)


def samples(proto):
    return [models.feeds(proto, seed=seed) for seed in range(8)]


def equalized(proto):
    model = load(proto)
    changes = GateEqualization().apply(model, Context(samples(proto)))
    model.check()
    onnx.checker.check_model(model.to_proto(), full_check=True)
    return model, changes


def sqnr(wanted, got):
    error = np.square(wanted.astype(np.float64) - got).sum()
    return 10 * np.log10(np.square(wanted.astype(np.float64)).sum() / error)


@pytest.mark.parametrize("kind", ["full", "depthwise", "multiplied", "two readers", "swapped"])
def test_the_float_function_stays(kind):
    texts = {
        "full": (PLAIN, (4, 8, 3, 3), 1),
        "depthwise": (
            f"{HEAD}, float[8,1,3,3] v> {{ {GATE} y = Conv<group=8>(m, v) }}",
            (8, 1, 3, 3),
            0,
        ),
        "multiplied": (
            f"{HEAD}, float[16,1,3,3] v> {{ {GATE} y = Conv<group=8>(m, v) }}",
            (16, 1, 3, 3),
            0,
        ),
        "two readers": (
            f"{HEAD}, float[4,8,3,3] v, float[4,8,3,3] u> {{ {GATE} d = Conv(m, v)"
            " e = Conv(m, u) y = Add(d, e) }",
            (4, 8, 3, 3),
            1,
        ),
        "swapped": (PLAIN.replace("Mul(c, s)", "Mul(s, c)"), (4, 8, 3, 3), 1),
    }
    text, shape, axis = texts[kind]
    proto = imbalanced(text, shape=shape, axis=axis)
    model, changes = equalized(proto)
    assert changes
    assert ops(model).count("Mul") == 2
    feed = models.feeds(proto, seed=50)
    np.testing.assert_array_equal(run(model, feed)["y"], run(proto, feed)["y"])
    wanted = run(proto, feed, "all")["y"]
    np.testing.assert_allclose(
        run(model, feed, "all")["y"], wanted, atol=1e-6 * np.abs(wanted).max(), rtol=0
    )


def test_scales_are_powers_of_two():
    model, _ = equalized(imbalanced())
    scale = next(t for n, t in model.tensors().items() if n.endswith("_scale"))
    values = model.array(scale)
    assert values.shape == (8, 1, 1)
    np.testing.assert_array_equal(np.log2(values), np.rint(np.log2(values)))
    assert values.min() == 1
    assert values.max() > 1


def test_integers_gain_precision():
    text = f"{HEAD}, float[8,1,3,3] v> {{ {GATE} y = Conv<group=8>(m, v) }}"
    proto = imbalanced(text, shape=(8, 1, 3, 3), axis=0)
    data = samples(proto)
    plain, _ = PassManager(Calibrate(), InsertQDQ())(proto, data)
    better, _ = PassManager(GateEqualization(), Calibrate(), InsertQDQ())(proto, data)
    wanted = run(proto, data[0])["y"]
    before, after = (sqnr(wanted, run(m, data[0], "all")["y"]) for m in (plain, better))
    assert after > before + 6
    assert after > 20


def test_integers_gain_precision_where_weights_share_their_scales():
    proto = imbalanced()
    data = samples(proto)
    plain, _ = PassManager(Calibrate(), InsertQDQ())(proto, data)
    better, _ = PassManager(GateEqualization(), Calibrate(), InsertQDQ())(proto, data)
    wanted = run(proto, data[0])["y"]
    before, after = (sqnr(wanted, run(m, data[0], "all")["y"]) for m in (plain, better))
    assert after > before + 2


def test_balanced_channels_are_left_alone():
    proto = parse(PLAIN)
    model, changes = equalized(proto)
    assert not changes
    assert not changes.skipped
    assert ops(model) == ops(proto)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (PLAIN.replace("(float[] y)", "(float[] y, float[] m)"), "output"),
        (f"{HEAD}, float[4,8,3,3] v> {{ {GATE} n = Neg(m) d = Conv(n, v) e = Conv(m, v)"
         " y = Add(d, e) }", "reads it, too"),
        (f"{HEAD}, float[4,8,3,3] v> {{ {GATE} d = Conv(m, v) e = Conv(m, v) y = Add(d, e) }}",
         "shared"),
        (f"{HEAD}, float[4,8,3,3] v> {{ {GATE} d = Conv(m, v) p = MaxPool<kernel_shape=[3,3]>(m)"
         " q = ReduceMean<keepdims=1>(p) y = Add(d, q) }", "reads it, too"),
        (f"{HEAD}, float[4,8,3,3] v, float[4] u> {{ {GATE} k = Neg(u) y = Conv(m, v, k) }}",
         "computed"),
    ],
)  # fmt: skip
def test_what_it_declines(text, why):
    proto = imbalanced(text)
    proto.graph.node[2].name = "gate"
    model, changes = equalized(proto)
    assert not changes
    assert [*reasons(changes)] == ["gate"]
    assert why in reasons(changes)["gate"]
    assert ops(model) == ops(proto)


def test_a_grouped_reader_is_declined():
    text = f"{HEAD}, float[4,4,3,3] v> {{ {GATE} y = Conv<group=2>(m, v) }}"
    _, changes = equalized(imbalanced(text, weight=None))
    assert not changes
    assert len(changes.skipped) == 1


def test_models_without_gates_need_no_samples():
    proto = parse("g (float[N,6] x) => (float[] y) <float[6,6] w> { y = MatMul(x, w) }")
    assert not GateEqualization().apply(load(proto), Context())


def test_a_second_run_changes_nothing_more():
    proto = imbalanced(
        f"{HEAD}, float[8,1,3,3] v> {{ {GATE} y = Conv<group=8>(m, v) }}",
        shape=(8, 1, 3, 3),
        axis=0,
    )
    model, _ = equalized(proto)
    _, again = equalized(proto_of(model))
    assert not again


def scales_of(model):
    (name,) = (n for n in model.tensors() if n.endswith("_scale"))
    return model.array(model.tensors()[name]).reshape(-1)


@pytest.mark.parametrize("group", [1, 8])
def test_scales_even_out_what_the_samples_showed(group):
    shape = (8, 1, 3, 3) if group == 8 else (4, 8, 3, 3)
    text = (
        f"{HEAD}, float{str([*shape]).replace(' ', '')} v>"
        f"{{ {GATE} y = Conv<group={group}>(m, v) }}"
    )
    proto = imbalanced(text, shape=shape, axis=int(group == 1))
    model, _ = equalized(proto)
    exposed = load(proto).to_proto(["m"])
    values = np.stack([run(exposed, feed)["m"] for feed in samples(proto)])
    low, high = (f(values, axis=(0, 1, 3, 4)) for f in (np.min, np.max))
    bound = np.maximum(high, -4 * low)
    ratio = np.minimum(bound.max() / bound, 1024)
    power = 1 if group == 8 else 0.5  # wholly where each channel has weights of its own
    np.testing.assert_array_equal(scales_of(model), 2 ** np.rint(power * np.log2(ratio)))
    after = model.layers()[-1].weight
    along = scales_of(model).reshape((8, 1, 1, 1) if group == 8 else (1, 8, 1, 1))
    np.testing.assert_array_equal(after * along, load(proto).layers()[-1].weight)


def test_no_scale_passes_the_largest():
    proto = imbalanced()
    model = load(proto)
    GateEqualization(largest=16.0).apply(model, Context(samples(proto)))
    assert scales_of(model).max() == 4  # the root of 16


@pytest.mark.parametrize(("size", "largest"), [(1.2e-2, 8), (4e-3, 16), (1e-3, 32)])
def test_the_gate_runs_in_float_however_small_the_scales(size, largest):
    """The product by the scales, quantized with one scale for all, would undo their effect."""
    rng = np.random.default_rng(0)
    sizes = np.repeat([size, 1], 4)
    text = (
        "g (float[N,8,18,18] x) => (float[] y) <float[8,8,3,3] w, float[6,8,1,1] v>"
        "{ c = Conv(x, w) s = Sigmoid(c) m = Mul(c, s) y = Conv(m, v) }"
    )
    proto = parse(
        text,
        w=3 * rng.normal(size=(8, 8, 3, 3)) * sizes[:, None, None, None],
        v=rng.normal(size=(6, 8, 1, 1)) / sizes[:, None, None],
    )
    data = samples(proto)
    found = []
    for steps in ((), (GateEqualization(),)):
        model, _ = PassManager(*steps, Calibrate(), InsertQDQ())(proto, data)
        found.append(sqnr(run(proto, data[0])["y"], run(model, data[0], "all")["y"]))
    (why,) = (w for n, w in model.encodings.float_nodes.items() if "_equalize" in n)
    assert "even out" in why
    assert ops(model).count("QuantizeLinear") == 4  # of x, c, m and y, none between
    assert ops(model).count("Mul") == 1  # the scales are those of the quantization of m
    finer = next(n for n in model.graph.nodes if n.op == "QuantizeLinear" and n.attrs.get("axis"))
    scales = model.array(finer.inputs[1])
    assert scales.max() / scales.min() == largest
    assert found[1] > found[0] + 8
