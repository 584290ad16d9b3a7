"""Broken models: the doctor names the fault, and mends it where that is safe."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import onnxq
from onnxq.cli import main
from onnxq.errors import ModelError
from onnxq.examination import doctor
from onnxq.mending import Mend, mend
from onnxq.model import load
from tests import checks
from tests.models import feeds, parse
from tests.qdq import SIGNED, build, integers, packed, rows, scale

CONV = "[n] r = Conv(xd, wd, bd)"
PAIR = "[{0}q] {0}q = QuantizeLinear({1}, {2}s, {2}z) {0} = DequantizeLinear({0}q, {2}s, {2}z) "
LIMITS = {"low": scale(0), "high": scale(6)}
PADS = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
SAME = {"ys": scale(0.02), "yz": np.uint8(128)}
EIGHT = {"s8": (np.arange(8) + 1).astype(np.float32) / 100, "z8": np.zeros(8, np.int8)}


def diagnose(proto, **options):
    feed = feeds(proto)
    return doctor(load(proto), data=[feed, {k: -v for k, v in feed.items()}], **options)


def found(result, node):
    """What is said of a node: reasons of both views, then faults."""
    states = [n for v in result.views for n in v.nodes if n.name == node and n.reason]
    said = [(n.code, n.reason, n.mend) for n in states]
    return said + [(f.code, f.what, f.mend) for f in result.faults if f.node == node]


def in_integers(proto, node="n", view=0):
    return next(n.measured for n in diagnose(proto).views[view].nodes if n.name == node)


# ------------------------------------------------------------------------------- planted faults
#
# model, node, code, what the reason says

FAULTS = {
    "result is an output": (
        build(CONV, outputs="float[] y, float[N,4,6,6] r"),
        "n",
        "graph-output",
        "r is also an output of the model",
    ),
    "bias of another scale": (
        build(CONV, bs=scale(0.002, 4)),
        "n",
        "bias-scale",
        "bias is 2 x s_x * s_w",
    ),
    "bias of a Gemm of another scale": (
        rows("[n] r = Gemm(xd, gd, bd)", bs=scale(0.002, 4)),
        "n",
        "bias-scale",
        "bias is 2 x s_x * s_w, which integer kernels take for s_x * s_w",
    ),
    "bias with a zero point": (
        rows(
            "t = DequantizeLinear<axis=0>(b, bs, bz) [n] r = Gemm(xd, gd, t)",
            bz=np.full(4, 400, np.int32),
        ),
        "n",
        "bias-zero-point",
        "zero point, which integer kernels leave out",
    ),
    "bias cut off": (
        build(CONV, b=np.array([0, 2**31 - 1, 0, 0], np.int32)),
        "n",
        "bias-overflow",
        "cut off at the end of int32",
    ),
    "bias near the end": (
        build(CONV, b=np.array([0, 2**30 + 1, 0, 0], np.int32)),
        "n",
        "bias-overflow",
        "reaches 1,073,741,825 of 2,147,483,647",
    ),
    "symmetric int8 behind Relu": (
        build("[n] c = Conv(xd, wd, bd) r = Relu(c)", xz=np.int8(0), yz=np.int8(0)),
        "n",
        "activation",
        "is 0 (symmetric), not -128",
    ),
    "range beyond a Clip": (
        build("[n] c = Conv(xd, wd, bd) r = Clip(c, low, high)", ys=scale(0.04), **LIMITS),
        "n",
        "activation",
        "reaches from 0 to 10.2, beyond its bounds 0 and 6",
    ),
    "scale of shape [1]": (
        build(
            "[n] c = Conv(xd, wd, bd) r = Clip(c, low, high)",
            ys=scale(6 / 255, 1),
            yz=np.zeros(1, np.uint8),
            **LIMITS,
        ),
        "n",
        "activation",
        "scales of shape [1], not a scalar",
    ),
    "three scales into a Concat": (
        build(
            PAIR.format("v", "x", "z")
            + PAIR.format("u", "x", "y")
            + "[n] r = Concat<axis=1>(xd, v, u)"
        ),
        "n",
        "concat-grids",
        "other grids than its result, 2 of 3",
    ),
    "types into a Concat": (
        build(PAIR.format("v", "x", "z") + "[n] r = Concat<axis=1>(xd, v)", zz=np.int8(3)),
        "n",
        "types",
        "reads uint8 and int8",
    ),
    "grids around MaxPool": (
        build("[n] r = MaxPool<kernel_shape=[2,2]>(xd)"),
        "n",
        "grids",
        "reads uint8, scale 0.02, zero point 128 and gives uint8, scale 0.03, zero point 0",
    ),
    "weight scales along the input channels": (
        build(
            "t = DequantizeLinear<axis=1>(v, s8, z8) [n] r = Conv(xd, t)",
            "float[N,8,4,4] x",
            v=integers(8, 8, 1, 1),
            **EIGHT,
        ),
        "n",
        "weight-axis",
        "run along axis 1, its output channels along 0",
    ),
    "weight scales along the rows": (
        rows("t = DequantizeLinear<axis=0>(g, s8, z8) [n] r = MatMul(xd, t)", **EIGHT),
        "n",
        "weight-axis",
        "scales along axis 0",
    ),
    "zero point of a weight": (
        build(CONV, wz=np.full(4, 3, np.int8)),
        "n",
        "weight-zero-point",
        "int8 weight has a zero point",
    ),
    "input not quantized": (
        build("[n] r = Conv(x, wd, bd)"),
        "n",
        "unquantized-input",
        "its input x is not quantized",
    ),
    "16-bit activations": (
        build("[n] r = Conv(xd, wd)", xz=np.uint16(9), yz=np.uint16(9)),
        "n",
        "bits",
        "no integer Conv of uint16",
    ),
    "4-bit weights that are not unpacked": (
        build("t = DequantizeLinear(v, wst) [n] r = Conv(xd, t)", v=packed(4, 3, 3, 3)),
        "n",
        "bits",
        "no integer Conv of int4",
    ),
    "int8 that two nodes read": (
        build(f"{CONV} z = Conv(xd, wd)", outputs="float[] y, float[] z", **SIGNED),
        "n",
        "int8-on-x64",
        "needs uint8",
    ),
    "quantized twice on one grid": (
        build(PAIR.format("v", "xd", "x") + "[n] r = Conv(v, wd, bd)"),
        "vq",
        "duplicate-pair",
        "on the same grid",
    ),
    "quantized twice on two grids": (
        build(PAIR.format("v", "xd", "z") + "[n] r = Conv(v, wd)"),
        "vq",
        "requantized",
        "rounded twice",
    ),
    "dead pair": (
        build(f"{CONV} [dead] v = QuantizeLinear(xd, zs, zz)"),
        "dead",
        "dead",
        "nothing reads its result",
    ),
    "pair around nothing": (
        build("t = Tanh(x) " + PAIR.format("v", "t", "z") + "y = Exp(v)"),
        "vq",
        "useless-pair",
        "nothing around it runs in integers",
    ),
    "float reader": (
        build(f"{CONV} [soft] z = Softplus(r)", outputs="float[] y, float[] z"),
        "n",
        "float-reader",
        "soft reads its result in float",
    ),
    "float bias at the end": (
        rows("[n] y = Gemm(xd, gd, fb)"),
        "n",
        "float-bias",
        "its bias is float",
    ),
    "Add at the end": (
        rows("[n] c = MatMul(xd, gd) [add] y = Add(c, fb)"),
        "n",
        "float-bias",
        "the bias that add adds to it is float",
    ),
    "float weight in the file": (
        build(
            "[fq] q = QuantizeLinear(fw, wst, wzt) t = DequantizeLinear(q, wst, wzt)"
            " [n] r = Conv(xd, t)"
        ),
        "fq",
        "float-weight",
        "fw is stored in float",
    ),
    "scale of zero": (
        build(PAIR.format("v", "x", "z") + "[n] r = Sigmoid(v)", zs=scale(0)),
        "vq",
        "bad-scale",
        "zero, negative, infinite or NaN",
    ),
    "scales of an activation": (
        build(
            "[vq] vq = QuantizeLinear<axis=1>(x, s3, z3) v = DequantizeLinear<axis=1>(vq, s3, z3)"
            " [n] r = Conv(v, wd)",
            s3=scale(0.02, 3),
            z3=np.zeros(3, np.uint8),
        ),
        "n",
        "per-channel-input",
        "has 3 scales",
    ),
    "Pad between pairs": (
        build("[n] r = Pad(xd, pads)", **SAME, **PADS),
        "n",
        "no-kernel",
        "no integer Pad",
    ),
    "sums beyond int32": (
        build(
            "t = DequantizeLinear(v, wst, wzt) [n] r = Conv(xd, t)",
            "float[1,70000,1,1] x",
            v=np.full((1, 70000, 1, 1), 127, np.int8),
            xz=np.uint8(0),
        ),
        "n",
        "sum-overflow",
        "beyond int32",
    ),
    "pairs of weights beyond int16": (
        build(CONV, w=np.full((4, 3, 3, 3), 100, np.int8)),
        "n",
        "saturation",
        "sums of pairs reach 51,000 of 32,767 in 52 of 56",
    ),
    "old operator set": (
        build("t = DequantizeLinear(w, wst, wzt) [n] r = Conv(xd, t)", opset=11),
        "QuantizeLinear_0",
        "opset",
        "operator set 11",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name):
    proto, node, code, says = FAULTS[name]
    result = diagnose(proto)
    said = found(result, node)
    assert [s for s in said if s[0] == code and says in s[1]], said
    assert all(what and advice for _, what, advice in said)
    assert result.views[0].disagreements == result.views[1].disagreements == []


def test_a_sound_model_has_no_faults():
    body = "[n] c = Conv(xd, wd, bd) r = Relu(c)"
    result = diagnose(build(body, w=integers(4, 3, 3, 3) // 4))
    assert (result.kind, result.faults, result.notes) == ("Q/DQ", [], [])
    for view in result.views:
        assert view.in_float == []
        assert [view.share(w, macs=m) for w in ("predicted", "measured") for m in (0, 1)] == [
            1.0
        ] * 4


def test_shares():
    body = (
        "[n] r = Conv(xd, wd, bd) yq = QuantizeLinear(r, ys, yz) d = DequantizeLinear(yq, ys, yz)"
        " [up] u = ConvTranspose(d, k) y = Tanh(u)"
    )
    result = diagnose(build(body, "float[2,3,8,8] x", k=np.ones((4, 1, 2, 2), np.float32)))
    macs = {"n": 4 * 36 * 27, "up": 4 * 36 * 4}
    view = result.views[0]
    assert {n.name: n.macs for n in view.nodes if n.macs} == macs
    assert view.share("measured", macs=True) == macs["n"] / sum(macs.values())
    assert view.share("predicted", macs=False) == 1 / 3
    assert [n.op for n in view.in_float] == ["ConvTranspose", "Tanh"]


# ------------------------------------------------------------------------------- other numbers


def test_numbers_that_integer_kernels_change_are_seen():
    right, wrong = (
        diagnose(rows("[n] r = Gemm(xd, gd, bd)", bs=scale(s, 4), b=np.full(4, 400, np.int32)))
        for s in (0.001, 0.002)
    )
    assert all(a.steps["y"] <= 1 for a in right.agreement)
    assert all(a.steps["y"] >= 10 for a in wrong.agreement)  # 400 x 0.001 is 13 steps of 0.03


def test_convolutions_with_tiny_scales_take_any_bias():
    tiny = {"ws": scale(1e-5, 4), "ys": scale(1e-5), "b": np.full(4, 400, np.int32)}
    result = diagnose(build(CONV, bs=scale(1e-6, 4), **tiny))
    assert [(f.code, f.severity) for f in result.faults if f.severity == "error"] == [
        ("bias-scale", "error")
    ]
    assert "bias is 5 x s_x * s_w, which integer kernels take" in result.faults[0].what
    assert all(a.steps["y"] > 20 for a in result.agreement)  # 400 x 8e-7 is 32 steps of 1e-5


def test_models_that_fail_once_optimized_are_seen():
    proto = FAULTS["scales of an activation"][0]
    result = diagnose(proto)
    assert [a.level for a in result.agreement if a.failure] == ["extended", "all"]
    assert next(f.severity for f in result.faults) == "error"


def test_models_that_no_sample_can_be_made_up_for(tmp_path):
    proto = build("t = Gather(xd, k) [n] r = Sigmoid(t)", "float[N,C,H,W] x, int32[K] k")
    result = doctor(load(proto))
    assert (result.samples, result.agreement) == (0, [])
    assert "numbers are not compared, give samples (--data)" in result.notes[0]
    assert len(result.views[0].nodes) == 2
    dead = build("[d] v = QuantizeLinear(xd, zs, zz) " + "t = Gather(xd, k) [n] r = Sigmoid(t)",
                 "float[N,C,H,W] x, int32[K] k")  # fmt: skip
    mended = doctor(load(dead), fix=tmp_path / "out.onnx").mended
    assert mended.outputs == []
    assert (tmp_path / "out.onnx").exists()


def test_samples_are_made_up_where_none_are_given():
    result = doctor(load(build(CONV)))
    assert (result.samples, result.samples_made_up) == (4, True)
    assert diagnose(build(CONV)).samples_made_up is False


# ------------------------------------------------------------------------------- mending
#
# fault, whether every bit is kept, node that then runs in integers

MENDS = {
    "bias of another scale": (False, "n"),
    "bias of a Gemm of another scale": (False, "n"),
    "bias with a zero point": (False, "n"),
    "scale of shape [1]": (True, "n"),
    "grids around MaxPool": (None, None),
    "4-bit weights that are not unpacked": (True, "n"),
    "quantized twice on one grid": (True, "n"),
    "dead pair": (True, "n"),
    "float bias at the end": (False, "n"),
    "Add at the end": (False, "n"),
    "float weight in the file": (True, "n"),
    "Pad between pairs": (True, "n"),
}


@pytest.mark.parametrize("name", MENDS)
def test_faults_are_mended(name, tmp_path):
    proto, node, code, _ = FAULTS[name]
    exact, integer = MENDS[name]
    out = tmp_path / "out.onnx"
    result = diagnose(proto, fix=out)
    if exact is None:  # the new grid would hold less
        assert result.mends == []
        assert not out.exists()
        return
    assert {m.keeps for m in result.mends} == {"every bit" if exact else "half a step"}
    mended = onnx.load(out)
    onnx.checker.check_model(mended, full_check=True)
    after = diagnose(mended)
    assert code not in [s[0] for s in found(after, node) if s[0] != "saturation"]
    assert in_integers(mended, integer)
    assert all(v.share("measured", macs=True) in (1, None) for v in result.mended.views)
    feed = feeds(proto)
    before, got = checks.run(proto, feed)["y"], checks.run(mended, feed)["y"]
    if exact:
        np.testing.assert_array_equal(got, before)
    else:  # half a step of the bias, that is 0.0005, rarely turns a step of the result, 0.03
        assert np.abs(got - before).max() <= 0.031
        assert np.mean(np.abs(got - before) > 0.001) < 0.05
    optimized = checks.run(mended, feed, "all")["y"]
    assert np.abs(optimized - got).max() <= 0.031  # a step, where the sum is at the edge of two


def test_int8_becomes_uint8(tmp_path):
    body = (
        "[a] a = Conv(xd, wd, bd) aq = QuantizeLinear(a, ys, yz) ad = DequantizeLinear(aq, ys, yz)"
        " [c] c = Conv(xd, wd) cq = QuantizeLinear(c, ys, yz) cd = DequantizeLinear(cq, ys, yz)"
        " od = DequantizeLinear(o, xs, wzt) [s] s = Add(ad, cd) sq = QuantizeLinear(s, zs, zz)"
        " sd = DequantizeLinear(sq, zs, zz) [n] r = Add(sd, od)"
    )
    proto = build(body, o=np.int8(7), **SIGNED)
    result = diagnose(proto, fix=tmp_path / "out.onnx")
    assert result.views[0].share("measured", macs=True) == 0
    assert [m.keeps for m in result.mends] == ["every bit"]
    assert [v.share("measured", macs=False) for v in result.mended.views] == [1, 1]
    mended, feed = onnx.load(tmp_path / "out.onnx"), feeds(proto)
    wanted = checks.run(proto, feed)["y"]
    np.testing.assert_array_equal(checks.run(mended, feed)["y"], wanted)
    kinds = {t.data_type for t in mended.graph.initializer if t.name.startswith(("xz", "o"))}
    assert kinds == {onnx.TensorProto.UINT8}
    assert next(t for t in mended.graph.initializer if t.name == "w").data_type == 3  # still int8


@pytest.mark.parametrize(
    "move", ["Transpose<perm=[0,1,3,2]>(xd)", "MaxPool<kernel_shape=[2,2]>(xd)"]
)
def test_models_that_x64_does_not_load_are_mended(move, tmp_path):
    proto = build(f"[n] m = {move} y = Tanh(m)", **SIGNED)
    result = diagnose(proto, fix=tmp_path / "out.onnx")
    assert [(f.code, f.severity, f.node) for f in result.faults] == [("unloadable", "error", "n")]
    assert [bool(v.operators) for v in result.views] == [False, True]
    assert all("output_dtype INT8" in a.failure for a in result.agreement)
    assert [m.code for m in result.mends] == ["int8-on-x64"]
    mended, feed = onnx.load(tmp_path / "out.onnx"), feeds(proto)
    wanted = checks.run(proto, feed)["y"]
    np.testing.assert_array_equal(checks.run(mended, feed)["y"], wanted)
    np.testing.assert_array_equal(checks.run(mended, feed, "all")["y"], wanted)
    older = diagnose(build(f"[n] m = {move} y = Tanh(m)", opset=17, **SIGNED))
    assert older.faults == []
    assert older.views[0].operators


def test_grids_of_movement_are_mended_where_the_old_one_held_more():
    body = PAIR.format("v", "m", "z") + "[n] r = Conv(v, wd, bd)"
    grid = {"zs": scale(0.03), "zz": np.uint8(128)}
    proto = build("[m] m = MaxPool<kernel_shape=[2,2]>(xd) " + body, bs=scale(0.0015, 4), **grid)
    model = load(proto)
    done = mend(model)
    assert [(m.code, m.node) for m in done] == [("grids", "m"), ("bias-scale", "n")]
    mended = model.to_proto()
    assert in_integers(mended, "m")
    assert in_integers(mended, "n")
    feed = feeds(proto)
    middle = [checks.run(load(p).to_proto(extra_outputs=["v"]), feed)["v"] for p in (proto, mended)]
    assert np.abs(middle[0] - middle[1]).max() <= 0.015 + 1e-6  # half a step of 0.03


def test_a_bias_that_layers_share_is_written_for_each():
    body = (
        PAIR.format("v", "x", "z") + "[one] r = Conv(xd, wd, bd) [two] c = Conv(v, wd, bd)"
        + PAIR.format(" z", "c", "y").replace("[ zq]", "[zq]")
    )  # fmt: skip
    proto = build(body, outputs="float[] y, float[] z", zz=np.uint8(128))
    assert "two" in [f.node for f in diagnose(proto).faults if f.code == "bias-scale"]
    model = load(proto)
    assert [m.node for m in mend(model)] == ["two"]
    mended = model.to_proto()
    assert in_integers(mended, "one")
    assert in_integers(mended, "two")
    biases = [n.input[2] for n in mended.graph.node if n.op_type == "Conv"]
    assert len(set(biases)) == 2


def test_zero_points_are_written():
    body = "q = QuantizeLinear(x, xs) d = DequantizeLinear(q, xs) [n] r = Transpose(d)"
    proto = build(f"{body} p = QuantizeLinear(r, xs) y = DequantizeLinear(p, xs)")
    assert not in_integers(proto)
    model = load(proto)
    assert {m.code for m in mend(model)} == {"no-zero-point"}
    assert in_integers(model.to_proto())
    checks.assert_same_function(proto, model, tol=0, feed=feeds(proto))


def test_bias_that_would_overflow_is_left():
    big = np.array([0, 2**31 - 1, 0, 0], np.int32)
    model = load(build(CONV, bs=scale(0.002, 4), b=big))
    assert mend(model) == []


def test_a_mend_that_changes_numbers_is_not_written(tmp_path, monkeypatch):
    def wrong(model):
        scale_ = next(n for n in model.graph.nodes if n.op == "QuantizeLinear").inputs[1]
        scale_.values = np.array(2 * scale_.values, np.float32)
        return [Mend("dead", "n", "something", "every bit")]

    monkeypatch.setattr("onnxq.examination.mend", wrong)
    with pytest.raises(ModelError, match="output y of the mended copy is not the same"):
        diagnose(build(CONV), fix=tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_input_is_never_touched(tmp_path):
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(FAULTS["dead pair"][0], source)
    before = source.read_bytes()
    doctor(source, fix=out)
    assert source.read_bytes() == before
    again = doctor(out, fix=tmp_path / "again.onnx")
    assert again.mends == []
    assert "nothing that is safe to mend" in again.notes[-1]
    assert not (tmp_path / "again.onnx").exists()


# ------------------------------------------------------------------------------- other kinds


def test_operators_on_integers():
    body = (
        "xq = QuantizeLinear(x, xs, xz) [n] q = QLinearConv(xq, xs, xz, w, ws, wz, ys, yz)"
        " d = DequantizeLinear(q, ys, yz) y = Tanh(d)"
    )
    result = diagnose(build(body))
    assert (result.kind, result.faults) == ("QOperator", [])
    view = result.views[0]
    assert view.share("measured", macs=True) == view.share("predicted", macs=True) == 1
    assert view.share("measured", macs=False) == 1 / 2
    assert next(n.macs for n in view.nodes) == 4 * 36 * 27


def test_float_models_are_told_what_would_be():
    text = (
        "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[4,2,2,2] k>"
        "{ [n] c = Conv(x, w) [up] u = ConvTranspose(c, k) y = Tanh(u) }"
    )
    result = diagnose(parse(text))
    assert (result.kind, result.agreement, result.mends) == ("float", [], [])
    (view,) = result.views
    assert {n.name: n.predicted for n in view.nodes if n.macs} == {"n": True, "up": False}
    macs = {"n": 4 * 36 * 27, "up": 4 * 36 * 8}
    assert view.share("predicted", macs=True) == macs["n"] / sum(macs.values())
    assert next(n.reason for n in view.nodes if n.name == "up").endswith("no integer ConvTranspose")


def test_models_that_do_not_load_once_optimized():
    body = (
        "vq = QuantizeLinear<axis=1>(x, s3, z3) v = DequantizeLinear<axis=1>(vq, s3, z3)"
        " [n] r = Sigmoid(v)"
    )
    result = diagnose(build(body, s3=scale(0.02, 3), z3=np.zeros(3, np.uint8)))
    assert [
        n for n in result.notes if n.startswith("optimized for x86-64, the model does not load")
    ]
    assert result.views[0].share("measured", macs=False) is None
    assert all(a.failure for a in result.agreement)


# ------------------------------------------------------------------------------- command line


def run(*args):
    return CliRunner().invoke(main, ["doctor", *map(str, args)])


def save(folder, proto):
    path = folder / "in.onnx"
    onnx.save(proto, path)
    return path


def test_what_is_printed(tmp_path):
    source = save(tmp_path, FAULTS["bias of another scale"][0])
    out = tmp_path / "out.onnx"
    result = run(source, "--json", tmp_path / "d.json", "--fix", out)
    assert result.exit_code == 0, result.output
    for part in (
        "Q/DQ, operator set 21",
        "MACs, measured    0.0%",
        "the scale of its bias is 2 x s_x * s_w",
        "write the bias anew",
        "mended: n: its bias has the scale s_x * s_w (keeps half a step)",
        "MACs in integers 100.0% on x86-64, 100.0% on ARM",
    ):
        assert part in result.stdout
    plain = json.loads((tmp_path / "d.json").read_text(), parse_constant=pytest.fail)
    assert [v["macs_in_integers_measured"] for v in plain["views"]] == [0, 0]
    assert [v["macs_in_integers_measured"] for v in plain["mended"]["views"]] == [1, 1]
    node = next(n for n in plain["views"][0]["nodes"] if n["name"] == "n")
    assert (node["code"], node["predicted"], node["measured"]) == ("bias-scale", False, False)
    assert plain["mends"][0]["keeps"] == "half a step"


def test_float_models_on_the_command_line(tmp_path):
    text = "g (float[1,3,8,8] x) => (float[] y) <float[4,3,3,3] w> { y = Conv(x, w) }"
    result = run(save(tmp_path, parse(text)))
    assert result.exit_code == 0
    assert "not quantized: nothing runs in integers" in result.stdout
    assert "100.0% of 3,888 MACs, 100.0% of the nodes" in result.stdout


def test_nothing_to_show(tmp_path):
    source = save(tmp_path, build(CONV))
    ort = tmp_path / "m.ort"
    ort.write_bytes(b"\0\0\0\0ORTM" + bytes(99))
    custom = tmp_path / "custom.onnx"
    onnx.save(
        onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>'
            " g (float[2] x) => (float[2] y) { [f] y = mine.Frobnicate(x) }"
        ),
        custom,
    )
    for args, says in (
        ([ort], "is a model in ORT format"),
        ([custom], "f is mine.Frobnicate, which onnxruntime does not have"),
        ([source, "--target", "ort-cup"], "did you mean ort-cpu?"),
        ([tmp_path / "none.onnx"], "no such file"),
        ([source, "--fix", source], "is the input"),
        ([source, "--fix", tmp_path / "no" / "out.onnx"], "no such folder"),
    ):
        result = run(*args)
        assert result.exit_code == 1
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert says in line


def test_public_name():
    assert onnxq.doctor is doctor
