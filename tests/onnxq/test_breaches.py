"""What of a Q/DQ model breaks the contract of a target; sums of pairs on given samples."""

import numpy as np
import pytest

import onnxq
from onnxq.analysis.breaches import breaches
from onnxq.examination import doctor
from onnxq.model import load
from onnxq.targets import TARGETS, target_named
from tests import models
from tests.models import parse
from tests.qdq import SIGNED, build, scale

CONV = "[n] r = Conv(xd, wd, bd)"
NET = (
    "g (float[1,3,8,8] x) => (float[] y) <float[8,3,3,3] w, float[8] b, float[4,8,1,1] v>"
    "{ k = Conv(x, w, b) r = Relu(k) m = MaxPool<kernel_shape=[2,2]>(r) y = Conv(m, v) }"
)


def broken(proto, target):
    faults = breaches(load(proto), target_named(target))
    assert {f.code for f in faults} <= {"contract"}
    return {f.what: f.node for f in faults}


def test_a_sound_model_breaks_nothing():
    assert broken(build(CONV), "ort-cpu") == {}


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_written_for_a_target_obeys_it(target):
    proto = parse(NET)
    small, _ = onnxq.quantize(
        proto, None, [models.feeds(proto, seed=i) for i in range(3)], target=target
    )
    assert broken(small.to_proto(), target) == {}


@pytest.mark.parametrize(
    ("target", "constants", "says"),
    [
        ("tensorrt", {}, "its result is uint8, tensorrt computes in int8 (and 1 more)"),
        ("tensorrt", SIGNED, "its zero point is not 0, as tensorrt wants it (and 1 more)"),
        ("tensorrt", SIGNED, "its bias is int32, tensorrt takes it in float"),
        ("openvino", {}, "its bias is int32, openvino takes it in float"),
        ("nnapi", SIGNED, "its result is int8, nnapi computes in uint8 (and 1 more)"),
        ("xnnpack", {}, "xnnpack has no integer Conv of uint8 and int8"),
    ],
)
def test_other_models_break_rules(target, constants, says):
    assert says in broken(build(CONV, **constants), target)


def test_scales_per_channel_where_one_is_taken():
    text = "[n] r = MatMul(xd, gd)"
    proto = build(text, "float[N,8] x")
    assert broken(proto, "nnapi") == {
        "its int8 weight has a scale per channel, nnapi takes one": "n",
    }
    several = build(
        "[n] r = Relu(x)", "float[N,4,8,8] x", ys=scale(0.03, 4), yz=np.zeros(4, np.uint8)
    )
    assert "it has several scales, qnn takes one per activation tensor" in broken(several, "qnn")


def test_operators_and_operator_sets():
    found = broken(build("[n] r = Sigmoid(xd)", opset=21), "nnapi")
    assert "nnapi has no integer Sigmoid" not in found  # the CPU provider takes it
    assert broken(build("[n] r = Erf(xd)"), "qnn") == {"qnn has no integer Erf": "n"}
    newer = load(build(CONV, opset=21))
    newer.graph.opset = 24
    said = [f.what for f in breaches(newer, target_named("nnapi"))]
    assert "the model has operator set 24, nnapi takes 23" in said


def test_signed_weights_with_zero_points():
    found = broken(build(CONV, wz=np.array([0, 0, 3, 0], np.int8)), "ort-cpu")
    assert found == {"its signed weight has a zero point": "n"}


@pytest.mark.parametrize(("value", "severity"), [(2.5, "warning"), (-2.56, None)])
def test_samples_tell_whether_pairs_overflow(value, severity):
    """The integers 253 and 0 times 100, in pairs: 50,600 and 0."""
    proto = build(CONV, w=np.full((4, 3, 3, 3), 100, np.int8))
    samples = [{"x": np.full((1, 3, 8, 8), value, np.float32)}]
    result = doctor(load(proto), data=samples)
    found = [f for f in result.faults if f.code == "saturation"]
    assert [f.severity for f in found] == ([] if severity is None else [severity])
    (pairs,) = result.saturation
    assert pairs.worst == (50600 if severity else 0)
    assert (pairs.overflows > 0) == (severity is not None)


def test_what_quantizing_leaves_is_no_breach():
    """A subtraction whose result has a grid of its own, for an input in two halves."""
    left, other = build("[n] r = Sub(x, xd)"), build("[n] r = Sub(xd, x)")
    assert broken(left, "ort-cpu") == {}
    assert broken(other, "ort-cpu") == {"ort-cpu has no integer Sub": "n"}
    for proto, says in ((left, "what quantizing its input leaves"), (other, "no integer Sub")):
        (node,) = [n for n in doctor(proto).views[0].nodes if n.name == "n"]
        assert says in node.reason
