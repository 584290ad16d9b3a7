import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq.analysis.error import LARGEST_SQNR_DB, OutputError, between, class_axis, compare
from onnxq.errors import CalibrationError, ModelError
from onnxq.runtime import Session
from onnxq.signature import TensorSpec


class Fixed:
    """A session that gives the arrays of its script, one feed after the other."""

    def __init__(self, *arrays, name="y", inputs=("x",)):
        self.arrays = iter(arrays)
        self.name = name
        dtype = arrays[0].dtype if arrays else np.dtype("f4")
        self.inputs = [TensorSpec(i, np.dtype("f4"), None) for i in inputs]
        self.outputs = [TensorSpec(name, dtype, None)]

    def run_shared(self, feed):
        return {self.name: next(self.arrays)}


def both(wanted, got, **options):
    """The error of one output, over the first axis of two arrays."""
    wanted, got = np.asarray(wanted), np.asarray(got)
    (error,) = compare(Fixed(*wanted), Fixed(*got), [{}] * len(wanted), **options)
    return error


def session(body):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g {body}')
    return Session(proto.SerializeToString(), threads=1, level="disabled")


arrays = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    elements=st.floats(-100, 100, width=32),
)


@given(arrays, st.integers(0, 2**32 - 1))
def test_streamed_measures_are_those_of_everything_at_once(x, seed):
    noise = np.random.default_rng(seed).normal(0, 1, x.shape).astype(np.float32)
    error = both(x, x + noise)
    a, b = x.astype(np.float64).reshape(-1), (x + noise).astype(np.float64).reshape(-1)
    d = a - b
    assert error.samples == len(x)
    assert error.equal is None
    assert error.max_abs_error == np.abs(d).max()
    if np.any(a):
        expected = 10 * np.log10(np.sum(a**2) / np.sum(d**2)) if np.any(d) else LARGEST_SQNR_DB
        assert error.sqnr_db == pytest.approx(np.clip(expected, -LARGEST_SQNR_DB, LARGEST_SQNR_DB))
        expected = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
        assert error.cosine == pytest.approx(expected)
    if x.shape[2] > 1:
        same = x.argmax(2) == (x + noise).argmax(2)
        assert error.top1_agreement == pytest.approx(same.mean())
    else:
        assert error.top1_agreement is None


def test_known_values():
    error = both([[3.0, 4.0]], [[3.0, 3.5]])
    assert error.sqnr_db == pytest.approx(20)
    assert error.max_abs_error == 0.5
    assert error.cosine == pytest.approx(23 / 5 / np.sqrt(21.25))


@pytest.mark.parametrize(
    ("wanted", "got", "sqnr", "cosine"),
    [
        ([[1.0]], [[1.0]], LARGEST_SQNR_DB, 1),
        ([[0.0]], [[0.0]], LARGEST_SQNR_DB, 1),
        ([[0.0]], [[1.0]], -LARGEST_SQNR_DB, 0),
        ([[1.0]], [[0.0]], 0, 0),
        ([[1.0]], [[-1.0]], -20 * np.log10(2), -1),
        ([[1e-30]], [[1e30]], -LARGEST_SQNR_DB, 1),
        ([[1e30]], [[np.nextafter(1e30, 1)]], LARGEST_SQNR_DB, 1),
    ],
)
def test_ends_of_the_scales(wanted, got, sqnr, cosine):
    error = both(wanted, got)
    assert error.sqnr_db == pytest.approx(sqnr)
    assert error.cosine == pytest.approx(cosine)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((), None),
        ((5,), None),
        ((1, 10), 1),
        ((10, 1), None),
        ((1, 7, 10), 2),
        ((1, 10, 4, 4), 1),
        ((1, 10, 1, 1), 1),
        ((1, 1, 4, 4), None),
        ((1, 10, 4, 4, 4), 1),
    ],
)
def test_class_axis(shape, axis):
    assert class_axis(shape) == axis


def test_top1_of_maps_counts_positions():
    wanted = np.zeros((1, 1, 2, 2, 2), np.float32)
    got = wanted.copy()
    wanted[..., 1, :, :] = 1
    got[..., 1, :, :] = [[1, 1], [1, -1]]
    assert both(wanted, got).top1_agreement == 0.75


def test_integers_and_booleans_are_equal_or_not():
    for dtype in (np.int64, np.uint8, bool):
        wanted = np.array([[0, 1], [1, 0]]).astype(dtype)
        got = np.array([[0, 1], [1, 1]]).astype(dtype)
        assert both(wanted, got) == OutputError("y", 2, equal=0.75)


def test_shared_infinities_are_left_out():
    inf, nan = np.inf, np.nan
    error = both([[-inf, nan, 3.0, 4.0]], [[-inf, nan, 3.0, 3.5]])
    assert error.sqnr_db == pytest.approx(20)
    assert error.left_out == 4 / 2
    nothing = both([[nan, inf]], [[nan, inf]])
    assert nothing == OutputError("y", 1, left_out=2)  # not "equal": there is nothing to compare
    for wanted, got in (([[1.0]], [[nan]]), ([[inf]], [[1.0]]), ([[inf]], [[-inf]])):
        with pytest.raises(ModelError, match=r"output y: NaN or infinite in one .*\(sample 1\)"):
            both(wanted, got)


def test_half_floats_do_not_overflow():
    x = np.full((1, 1, 1000), 60000, np.float16)
    assert both(x, x - np.float16(32)).sqnr_db == pytest.approx(20 * np.log10(60000 / 32))


def test_progress_counts_feeds():
    steps = []
    both(np.ones((3, 1, 2)), np.ones((3, 1, 2)), progress=steps.append)
    assert steps == [1, 1, 1]


def test_plain_types():
    error = both(np.float32([[1, 2]]), np.float32([[1, 3]]))
    plain = json.loads(json.dumps(error.to_dict()))
    assert set(plain) == {
        "name",
        "samples",
        "sqnr_db",
        "cosine",
        "max_abs_error",
        "top1_agreement",
        "equal",
        "left_out",
    }
    assert plain["samples"] == 1


def test_outputs_without_values():
    assert both(np.ones((2, 0, 3)), np.ones((2, 0, 3))) == OutputError("y", 2)


def test_real_sessions():
    first = session(
        """(float[N,3] x) => (float[N,3] a, int64[N] b) {
            a = Relu(x) b = ArgMax<axis=1, keepdims=0>(x)
        }"""
    )
    other = session(
        """(float[N,3] x) => (int64[N] b, float[N,3] a) {
            a = Abs(x) b = ArgMax<axis=1, keepdims=0>(a)
        }"""
    )
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.normal(size=(n, 3)).astype(np.float32)} for n in (1, 4, 2)]
    x = np.concatenate([f["x"] for f in feeds])
    a, b = compare(first, other, iter(feeds))
    assert (a.name, a.samples, b.name, b.samples) == ("a", 3, "b", 3)
    noise = np.minimum(x, 0).astype(float)
    expected = 10 * np.log10(np.sum(np.maximum(x, 0).astype(float) ** 2) / np.sum(noise**2))
    assert a.sqnr_db == pytest.approx(expected, rel=1e-6)
    assert a.max_abs_error == pytest.approx(-noise.min())
    assert b.equal == np.mean(x.argmax(1) == np.abs(x).argmax(1))
    assert compare(first, first, feeds)[0].sqnr_db == LARGEST_SQNR_DB


def test_what_is_no_tensor_has_no_measures():
    model = session(
        "(float[3] x) => (float[3] a, seq(float[3]) b) { a = Relu(x) b = SequenceConstruct(a) }"
    )
    a, b = compare(model, model, [{"x": np.ones(3, np.float32)}])
    assert a.sqnr_db == LARGEST_SQNR_DB
    assert b == OutputError("b", 1)


# ------------------------------------------------------------------------------- errors

FLOAT = "(float[N] x) => (float[N] y) { y = Relu(x) }"


@pytest.mark.parametrize(
    ("other", "match"),
    [
        ("(float[N] x) => (float[N] z) { z = Relu(x) }", "different outputs: wanted y: .*; got z:"),
        ("(float[N] z) => (float[N] y) { y = Relu(z) }", "different inputs: wanted x: .*; got z:"),
        ("(double[N] x) => (float[N] y) { y = Cast<to=1>(x) }", "different inputs: .*float64"),
        ("(float[N] x) => (int64[N] y) { y = Cast<to=7>(x) }", r"outputs: .*float32 \[N\].*int64"),
        (
            "(float[N] x) => (float[N] y, float[N] z) { y = Relu(x) z = Abs(x) }",
            "different outputs",
        ),
    ],
)
def test_different_signatures(other, match):
    with pytest.raises(ModelError, match=match):
        compare(session(FLOAT), session(other), [])


def test_different_shapes():
    other = session("(float[N] x) => (float[M] y) { y = Concat<axis=0>(x, x) }")
    feed = {"x": np.ones(3, np.float32)}
    with pytest.raises(ModelError, match=r"output y: wanted 3, got 6 \(sample 1\)"):
        compare(session(FLOAT), other, [feed])
    with pytest.raises(ModelError, match="output y: wanted a scalar, got 2"):
        compare(Fixed(np.array(1.0)), Fixed(np.ones(2)), [{}])


def test_no_samples():
    with pytest.raises(CalibrationError, match="no samples to compare on"):
        compare(session(FLOAT), session(FLOAT), [])


def test_samples_that_do_not_fit():
    with pytest.raises(CalibrationError):
        compare(session(FLOAT), session(FLOAT), [{"z": np.ones(3, np.float32)}])


def test_squares_beyond_float64():
    huge = np.array([1e200, -1e200])
    (same,) = between([({"y": huge}, {"y": huge})], ["y"])
    assert (same.sqnr_db, same.cosine) == (LARGEST_SQNR_DB, 1.0)
    (other,) = between([({"y": huge}, {"y": -huge})], ["y"])
    assert (other.sqnr_db, other.cosine, other.max_abs_error) == (0.0, -1.0, 2e200)
