import numpy as np
import onnx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxq.encoding import DTYPES, SMALLEST_SCALE, Encoding, Encodings, Format, limits
from onnxq.errors import RecipeError
from onnxq.runtime import Session
from tests.checks import run

values = st.floats(-1e6, 1e6, width=32)


# ------------------------------------------------------------------------------- Format


@pytest.mark.parametrize(
    ("text", "dtype", "granularity", "block", "bits", "signed"),
    [
        ("int8", "int8", "tensor", 0, 8, True),
        ("int8/tensor", "int8", "tensor", 0, 8, True),
        (" INT8/Channel ", "int8", "channel", 0, 8, True),
        ("int4/block=32", "int4", "block", 32, 4, True),
        ("uint16", "uint16", "tensor", 0, 16, False),
        ("float", "float", "tensor", 0, 32, False),
    ],
)
def test_parse(text, dtype, granularity, block, bits, signed):
    parsed = Format.parse(text)
    assert parsed == Format(dtype, granularity, block)
    assert (parsed.bits, parsed.signed) == (bits, signed)
    assert Format.parse(parsed) is parsed


@given(
    st.sampled_from([*DTYPES, "float"]),
    st.one_of(
        st.sampled_from([("tensor", 0), ("channel", 0)]),
        st.tuples(st.just("block"), st.integers(2, 1024)),
    ),
)
def test_text_of_a_format_parses_back(dtype, sharing):
    wanted = Format(dtype, *sharing)
    assert Format.parse(str(wanted)) == wanted


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("itn8", "no number format 'itn8'; did you mean int8"),
        ("", "no number format ''; types are int2"),
        ("bfloat", "did you mean float"),
        ("int8/chanel", "no number format 'int8/chanel'; write TYPE"),
        ("int8/channel/", "write TYPE"),
        ("int8/channel=4", "write TYPE"),
        ("int4/block", "write TYPE"),
        ("int4/block=", "write TYPE"),
        ("int4/block=1", "write TYPE"),
        ("int4/block=-2", "write TYPE"),
        ("int4/block=3.5", "write TYPE"),
    ],
)
def test_parse_errors(text, match):
    with pytest.raises(RecipeError, match=match):
        Format.parse(text)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        *(("int2", -2, 1), ("uint2", 0, 3), ("int3", -4, 3), ("uint3", 0, 7)),
        *(("int4", -8, 7), ("uint4", 0, 15), ("int8", -128, 127), ("uint16", 0, 65535)),
    ],
)
def test_limits(dtype, low, high):
    assert limits(dtype) == (low, high)
    encoding = Encoding.of_range(-1, 1, dtype)
    assert (encoding.qmin, encoding.qmax, encoding.bits) == (low, high, DTYPES[dtype][0])


# ------------------------------------------------------------------------------- ranges


@given(values, values, st.sampled_from(["int4", "uint4", "int8", "uint8", "int16", "uint16"]))
def test_of_range_covers_its_range(low, high, dtype):
    assume(low <= high)
    encoding = Encoding.of_range(low, high, dtype)
    low, high, step = min(low, 0), max(high, 0), float(encoding.scale)
    assert encoding.scale.dtype == np.float32
    assert encoding.scale.shape == encoding.zero_point.shape == ()
    assert encoding.qmin <= encoding.zero_point <= encoding.qmax
    # the zero point is rounded, so an end may miss its bound by half a step
    slack = step * (0.5 + 1e-3)
    assert encoding.low <= low + slack
    assert encoding.high >= high - slack
    assert encoding.fake_quantize(np.zeros(1, np.float32)) == 0
    x = np.linspace(low, high, 64).astype(np.float32)
    ends = np.clip(x, encoding.low, encoding.high)
    error = np.abs(encoding.fake_quantize(x) - ends)
    assert np.all(error <= step / 2 + 1e-5 * np.abs(ends) + 1e-30)


@given(values, values, st.sampled_from(["int8", "uint8", "int4"]))
def test_symmetric_ranges(low, high, dtype):
    encoding = Encoding.of_range(min(low, high), max(low, high), dtype, symmetric=True)
    assert encoding.zero_point == (0 if DTYPES[dtype][1] else 1 << DTYPES[dtype][0] - 1)
    if bound := max(abs(low), abs(high)):
        least = float(SMALLEST_SCALE) * encoding.qmax  # tinier ranges get a greater scale
        assert encoding.high == pytest.approx(bound, rel=1e-6, abs=least)


def test_range_of_zeros():
    for encoding in (
        Encoding.of_range(0, 0, "uint8"),
        Encoding.symmetric(np.zeros(2), "int8", 0),
    ):
        assert np.all(encoding.scale == 1)
        assert np.all(encoding.zero_point == 0)


def test_tiny_ranges_keep_a_scale():
    assert Encoding.of_range(0, 1e-40, "uint8").scale == SMALLEST_SCALE
    assert Encoding.symmetric(np.array([1e-40, 0, 1]), "int8", 0).scale[0] == SMALLEST_SCALE


@given(
    st.floats(0.001, 1000),
    st.sampled_from(["uint8", "int8"]),
    st.sampled_from([(0.0, 6.0), (0.0, np.inf), (-1.0, 1.0), (-np.inf, 0.5)]),
)
def test_within_never_leaves_its_bounds(high, dtype, bounds):
    low = -high if bounds[0] < 0 else 0.0
    encoding = Encoding.of_range(max(low, bounds[0]), min(high, bounds[1]), dtype).within(*bounds)
    ends = encoding.dequantize(np.array([encoding.qmin, encoding.qmax]))
    assert ends.min() >= bounds[0]
    assert ends.max() <= bounds[1]
    assert encoding.scale > 0


def test_within_looks_at_the_rounded_scale():
    # float32(high / 255) * 255 leaves many a bound by a hair
    for high in np.linspace(1, 8, 101):
        encoding = Encoding.of_range(0, high + 1, "uint8").within(0, high)
        assert np.float32(255) * encoding.scale <= high
        assert encoding.scale == pytest.approx(high / 255, rel=1e-6)


@pytest.mark.parametrize("bounds", [(0.0, 1e-36), (-1e-36, 0.0), (-1e-40, 1e-40)])
def test_within_keeps_a_scale_where_the_bounds_leave_none(bounds):
    encoding = Encoding.of_range(*bounds, "uint8").within(*bounds)
    assert encoding.scale == SMALLEST_SCALE
    assert max(-encoding.low, encoding.high) < 1e-7  # what onnxruntime takes for inside


def test_within_changes_nothing_inside():
    encoding = Encoding.of_range(0, 3, "uint8")
    assert encoding.within(0, 6) == encoding


# ------------------------------------------------------------------------------- arithmetic


def tensor_type(dtype):
    return getattr(onnx.TensorProto, dtype.upper())


def graph(nodes, given, wanted, initializers):
    shape = [None, None]
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", tensor_type(given), shape)],
            [helper.make_tensor_value_info("y", tensor_type(wanted), shape)],
            initializers,
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def parameters(encoding):
    shape = list(encoding.zero_point.shape)
    zero = encoding.zero_point.reshape(-1).tolist()
    return [
        numpy_helper.from_array(encoding.scale, "s"),
        helper.make_tensor("z", tensor_type(encoding.dtype), shape, zero),
    ]


def attributes(encoding):
    return {} if encoding.axis is None else {"axis": encoding.axis}


def onnxruntime_round_trip(encoding, x):
    """Integers (as int32) and float values that onnxruntime makes of x."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes(encoding)),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes(encoding)),
        helper.make_node("Cast", ["q"], ["i"], to=onnx.TensorProto.INT32),
    ]
    model = graph(nodes, "float", "float", parameters(encoding))
    found = Session(model, outputs=["y", "i"], threads=1, level="disabled").run({"x": x})
    return found["i"], found["y"]


@st.composite
def tensors(draw):
    """An encoding and values around its grid, half steps and saturation included."""
    dtype = draw(st.sampled_from(["int4", "uint4", "int8", "uint8", "int16", "uint16"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    axis = draw(st.sampled_from([None, 0, 1]))
    shape = () if axis is None else ((rows, columns)[axis],)
    scale = (10.0 ** rng.uniform(-6, 3, shape)).astype(np.float32)
    zero = rng.integers(*limits(dtype), shape, endpoint=True).astype(np.int32)
    encoding = Encoding(dtype, scale, np.asarray(zero), axis)
    low, high = limits(dtype)
    steps = rng.integers(2 * low - high - 2, 2 * high - low + 2, (rows, columns)) / 2
    steps += draw(st.sampled_from([0, 0.25])) * rng.standard_normal((rows, columns))
    x = steps.astype(np.float32) * encoding.scale.reshape(encoding.grid_shape(2))
    return encoding, x


@given(tensors())
def test_quantize_and_dequantize_are_those_of_onnxruntime(case):
    encoding, x = case
    integers, floats = onnxruntime_round_trip(encoding, x)
    q = encoding.quantize(x)
    np.testing.assert_array_equal(q.astype(np.int32), integers)
    y = encoding.dequantize(q)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, floats)
    np.testing.assert_array_equal(encoding.fake_quantize(x), floats)


def test_infinities_saturate():
    encoding = Encoding.of_range(-1, 3, "uint8")
    x = np.array([[-np.inf, np.inf, -1e9, 1e9, 0.0, -0.0]], np.float32)
    integers, floats = onnxruntime_round_trip(encoding, x)
    np.testing.assert_array_equal(encoding.quantize(x), integers)
    np.testing.assert_array_equal(encoding.fake_quantize(x), floats)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_int32_dequantizes_as_in_onnxruntime(seed, channels):
    rng = np.random.default_rng(seed)
    scale = (10.0 ** rng.uniform(-9, 0, 3 if channels else ())).astype(np.float32)
    axis = 1 if channels else None
    encoding = Encoding("int32", scale, np.zeros(scale.shape, np.int32), axis)
    q = rng.integers(-(2**31), 2**31 - 1, (2, 3), endpoint=True).astype(np.int32)
    node = helper.make_node("DequantizeLinear", ["x", "s"], ["y"], **attributes(encoding))
    model = graph([node], "int32", "float", parameters(encoding)[:1])
    found = Session(model, threads=1, level="disabled").run({"x": q})["y"]
    np.testing.assert_array_equal(encoding.dequantize(q), found)


@given(tensors())
def test_grid_points_stay(case):
    encoding, x = case
    once = encoding.fake_quantize(x)
    np.testing.assert_array_equal(encoding.quantize(once), encoding.quantize(x))
    np.testing.assert_array_equal(encoding.fake_quantize(once), once)


@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        *(("int2", np.int8), ("uint3", np.uint8), ("int4", np.int8), ("uint4", np.uint8)),
        *(("uint8", np.uint8), ("int16", np.int16), ("int32", np.int32)),
    ],
)
def test_storage(dtype, storage):
    encoding = Encoding.of_range(-1, 1, dtype)
    assert encoding.quantize(np.zeros(2)).dtype == encoding.storage == storage


@pytest.mark.parametrize("dtype", ["int2", "int4", "uint4", "int8"])
@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_are_channels_of_their_own(dtype, axis):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 6)).astype(np.float32)
    block = (4, 3)[axis]
    shape = ((3, 6), (12, 2))[axis]
    low, high = limits(dtype)
    scale = rng.uniform(0.1, 0.5, shape).astype(np.float32)
    zero = rng.integers(low, high, shape, endpoint=True).astype(np.int32)
    encoding = Encoding(dtype, scale, zero, axis, block)
    wanted = np.empty_like(x)
    for i, j in np.ndindex(x.shape):
        at = (i // block, j) if axis == 0 else (i, j // block)
        one = Encoding(dtype, scale[at], zero[at])
        wanted[i, j] = one.fake_quantize(x[i, j])
    np.testing.assert_array_equal(encoding.fake_quantize(x), wanted)
    np.testing.assert_array_equal(encoding.dequantize(encoding.quantize(x)), wanted)
    np.testing.assert_array_equal(encoding.transposed.fake_quantize(x.T), wanted.T)


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_the_encoding_of_the_transposed_matrix(axis):
    x = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    bound = np.array(1.0) if axis is None else np.arange(1, 5)
    encoding = Encoding.symmetric(bound, "int4", axis)
    np.testing.assert_array_equal(
        encoding.transposed.fake_quantize(x.T), encoding.fake_quantize(x).T
    )


def test_onnxruntime_dequantizes_blocks_so():
    rng = np.random.default_rng(0)
    encoding = Encoding(
        *("uint4", rng.uniform(0.1, 1, (2, 3)).astype(np.float32)),
        *(rng.integers(0, 16, (2, 3)).astype(np.int32), 0, 16),
    )
    q = rng.integers(0, 16, (32, 3)).astype(np.uint8)
    node = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=0, block_size=16)
    infos = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [32, 3])]
    constants = [
        helper.make_tensor("q", TensorProto.UINT4, q.shape, q.reshape(-1)),
        numpy_helper.from_array(encoding.scale, "s"),
        helper.make_tensor("z", TensorProto.UINT4, (2, 3), encoding.zero_point.reshape(-1)),
    ]
    graph = helper.make_graph([node], "g", [], infos, constants)
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    np.testing.assert_array_equal(run(proto, {})["y"], encoding.dequantize(q))


def test_negative_axis():
    encoding = Encoding.symmetric(np.array([1.0, 2.0, 4.0]), "int8", -1)
    x = np.ones((2, 2, 3), np.float32)
    assert encoding.grid_shape(3) == (1, 1, -1)
    np.testing.assert_array_equal(encoding.quantize(x)[0, 0], [127, 64, 32])


# ------------------------------------------------------------------------------- equality, mapping


def test_equality_and_hash():
    one, same = Encoding.of_range(-1, 1, "uint8"), Encoding.of_range(-1, 1, "uint8")
    assert one == same
    assert hash(one) == hash(same)
    assert one != Encoding.of_range(-1, 2, "uint8")
    assert one != Encoding.of_range(-1, 1, "int8")
    assert one != "uint8"
    channels = Encoding.symmetric(np.array([1.0, 2.0]), "int8", 0)
    assert channels != Encoding.symmetric(np.array([1.0, 2.0]), "int8", 1)
    blocks = Encoding.symmetric(np.ones((2, 3)), "int4", 0, 16)
    assert blocks == Encoding.symmetric(np.ones((2, 3)), "int4", 0, 16)
    assert blocks != Encoding.symmetric(np.ones((2, 3)), "int4", 0, 32)
    assert hash(blocks) != hash(Encoding.symmetric(np.ones((2, 3)), "int4", 0, 32))


def test_encodings_are_a_mapping():
    one = Encoding.of_range(-1, 1, "uint8")
    two = Encoding.of_range(-2, 2, "uint8")
    encodings = Encodings({"a": one}, {"Softmax": "excluded"})
    copy = encodings.copy()
    copy["b"] = two
    copy.float_nodes["Exp"] = "excluded"
    copy.replace({"a": two})
    assert (copy["a"], copy["b"], len(copy), list(copy)) == (two, two, 2, ["a", "b"])
    assert encodings == Encodings({"a": one}, {"Softmax": "excluded"})
    del copy["a"]
    assert "a" not in copy
