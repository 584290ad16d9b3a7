import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq import encodings_json
from onnxq.encoding import DTYPES, Encoding, Encodings, limits
from onnxq.errors import OnnxqError, RecipeError, UnsupportedError

scales = st.floats(2.0**-149, 3.4028234663852886e38, width=32)


@st.composite
def encodings(draw):
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    zeros = st.one_of(st.just(0), st.integers(*limits(dtype)))
    if draw(st.booleans()):
        scale, zero = draw(scales), draw(zeros)
        return Encoding(dtype, np.array(scale, np.float32), np.array(zero, np.int32))
    n = draw(st.integers(1, 4))
    scale = draw(st.lists(scales, min_size=n, max_size=n))
    zero = draw(st.lists(zeros, min_size=n, max_size=n))
    axis = draw(st.integers(0, 3))
    return Encoding(dtype, np.array(scale, np.float32), np.array(zero, np.int32), axis)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(st.dictionaries(names, encodings(), max_size=4), st.dictionaries(names, names, max_size=2))
def test_round_trip(tensors, float_nodes):
    text = encodings_json.dumps(Encodings(tensors, float_nodes))
    back = encodings_json.loads(text)
    assert back.tensors == tensors
    assert list(back) == list(tensors)
    assert back.float_nodes == float_nodes
    assert encodings_json.dumps(back) == text
    for encoding in back.values():
        assert encoding.scale.dtype == np.float32
        assert encoding.zero_point.dtype == np.int32
        assert encoding.scale.shape == encoding.zero_point.shape


def test_layout():
    tensors = {
        "x": Encoding("uint8", np.float32(0.5), np.array(114, np.int32)),
        "w": Encoding("int8", np.array([0.25, 2], np.float32), np.zeros(2, np.int32), 0),
    }
    document = json.loads(encodings_json.dumps(Encodings(tensors, {"Softmax": "excluded"})))
    assert document.pop("producer")["package"] == "onnxq"
    assert document == {
        "version": "2.0.0",
        "encodings": [
            {"name": "x", "output_dtype": "uint8", "y_scale": 0.5, "y_zero_point": 114},
            {"name": "w", "output_dtype": "int8", "y_scale": [0.25, 2.0], "axis": 0},
        ],
        "float_nodes": {"Softmax": "excluded"},
    }


def test_file(tmp_path):
    tensors = {"x": Encoding("uint8", np.array(0.1, np.float32), np.array(3, np.int32))}
    encodings_json.save(Encodings(tensors), tmp_path / "e.json")
    assert encodings_json.load(tmp_path / "e.json").tensors == tensors
    assert [f.name for f in tmp_path.iterdir()] == ["e.json"]


def test_unreadable(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        encodings_json.load(tmp_path / "missing.json")
    with pytest.raises(RecipeError, match="cannot be read"):
        encodings_json.load(tmp_path)
    with pytest.raises(OnnxqError, match="cannot be written"):
        encodings_json.save(Encodings(), tmp_path / "no" / "folder.json")
    (tmp_path / "latin.json").write_bytes(b'{"version": "\xff"}')
    with pytest.raises(RecipeError, match=r"not JSON.*latin\.json"):
        encodings_json.load(tmp_path / "latin.json")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"version": "2.0.0",\n "encodings": [,]}', "not JSON: .* in line 2, column 16"),
        ("[" * 100_000, "not JSON"),
        ("[]", "wanted an object with encodings, got a list"),
        ("{}", "version None, wanted 0.6.1, 1.0.0, 2.0.0"),
        ('{"version": "3.0.0"}', "version '3.0.0', wanted 0.6.1.*; export them in version"),
        ('{"version": "2.0.0"}', "wanted a list of encodings, got nothing"),
        ('{"version": "2.0.0", "encodings": 3}', "wanted a list of encodings, got an integer"),
        ('{"version": "2.0.0", "encoding": []}', "no key 'encoding'.*did you mean encodings"),
        ('{"version": "2.0.0", "encodings": [], "x": 1}', "no key 'x'.*keys are version"),
        ('{"version": "2.0.0", "encodings": [], "float_nodes": []}', "float_nodes: wanted"),
        ('{"version": "2.0.0", "encodings": [], "float_nodes": {"n": 1}}', "float_nodes: wanted"),
    ],
)
def test_broken_documents(text, match):
    with pytest.raises(RecipeError, match=match):
        encodings_json.loads(text)


BLOCKS = {"axis": 0, "block_size": 32}
CHANNELS = {"y_scale": [1.0, 2.0], "axis": 0}


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"y_scale": None}, r"y_scale: wanted a number, got nothing \(w, encoding 2 of e\.json\)"),
        ({"name": 3}, r"an encoding without a name \(encoding 2 of e\.json\)"),
        ({"name": ""}, "an encoding without a name"),
        ({"name": "x"}, "a second encoding of the same name.*x, encoding 2"),
        ({"output_dtype": "int17"}, "no integer type 'int17'.*types are int2"),
        ({"output_dtype": ["int8"]}, "no integer type"),
        ({"y_scale": 0}, "wanted a finite float32 above 0, got 0"),
        ({"y_scale": -1.5}, r"above 0, got -1\.5"),
        ({"y_scale": float("nan")}, "above 0, got nan"),
        ({"y_scale": float("inf")}, "above 0, got inf"),
        ({"y_scale": 1e-50}, "above 0, got 1e-50"),
        ({"y_scale": 1e39}, r"above 0, got 1e\+39"),
        ({"y_scale": 10**400}, "above 0, got 1000"),
        ({"y_scale": True}, "wanted a number, got true or false"),
        ({"y_scale": "1"}, "wanted a number, got text"),
        ({"y_scale": []}, "y_scale holds no scale"),
        ({"y_scale": [[1.0]], "axis": 0}, "lists of scales without a block_size"),
        ({"y_scale": [[1.0], [1.0, 2.0]], **BLOCKS}, "wanted a number, got a list"),
        ({"y_scale": [[1.0], 2.0], **BLOCKS}, "wanted a number, got a list"),
        ({"y_scale": [[]], **BLOCKS}, "y_scale holds no scale"),
        ({"y_scale": [1.0], **BLOCKS}, "a block_size.*blocks need nested lists of scales"),
        ({"y_scale": [[1.0]], **BLOCKS, "block_size": 1}, "an integer above 1, got 1"),
        ({"y_scale": [[1.0]], **BLOCKS, "block_size": True}, "an integer above 1, got True"),
        ({"y_scale": [[1.0]], "block_size": 32}, "a list of scales without an axis"),
        (
            {"y_scale": [[1.0]], **BLOCKS, "y_zero_point": [1]},
            "1 values, the scale has 1, in lists",
        ),
        ({"y_scale": [1.0, 2.0]}, "a list of scales without an axis"),
        ({"axis": 0}, "one scale with an axis"),
        ({**CHANNELS, "axis": 0.5}, "axis: wanted an integer, got a number"),
        ({**CHANNELS, "axis": True}, "axis: wanted an integer, got true or false"),
        ({"y_zero_point": 128}, "wanted -128 to 127 for int8, got 128"),
        ({"y_zero_point": 1.0}, "y_zero_point: wanted an integer, got a number"),
        ({"y_zero_point": {}}, "y_zero_point: wanted an integer, got an object"),
        ({"y_zero_point": [1]}, "y_zero_point has 1 values, the scale has 1 and is no list"),
        ({**CHANNELS, "y_zero_point": [1]}, "y_zero_point has 1 values, the scale has 2"),
        ({"bw": 8}, "'bw' belongs to an older version"),
        ({"y_scal": 1}, "no key 'y_scal'.*did you mean y_scale"),
    ],
)
def test_broken_entries(entry, match):
    entries = [
        {"name": "x", "output_dtype": "uint8", "y_scale": 1.0},
        {"name": "w", "output_dtype": "int8", "y_scale": 1.0} | entry,
    ]
    text = json.dumps({"version": "2.0.0", "encodings": entries})
    with pytest.raises(RecipeError, match=match):
        encodings_json.loads(text, where="e.json")


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"name": "w", "y_scale": 1.0}, "output_dtype is missing"),
        ({"name": "w", "output_dtype": "int8"}, "y_scale is missing"),
        (["w"], "wanted an object, got a list.*encoding 1"),
    ],
)
def test_incomplete_entries(entry, match):
    with pytest.raises(RecipeError, match=match):
        encodings_json.loads(json.dumps({"version": "2.0.0", "encodings": [entry]}))


def test_blocks():
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 1, (3, 5)).astype(np.float32)
    for zero in (np.zeros((3, 5), np.int32), rng.integers(0, 16, (3, 5)).astype(np.int32)):
        encodings = Encodings({"w": Encoding("uint4", scale, zero, 0, 32)})
        text = encodings_json.dumps(encodings)
        assert '"axis": 0, "block_size": 32' in text
        assert encodings_json.loads(text) == encodings


def test_scales_that_are_integers_themselves_are_refused():
    entry = {"name": "w", "output_dtype": "int4", "axis": 1, "block_size": 64}
    entry |= {"per_channel_float_scale": [1.0], "per_block_int_scale": [[1]]}
    with pytest.raises(UnsupportedError, match="scales in two levels"):
        encodings_json.loads(json.dumps({"version": "2.0.0", "encodings": [entry]}))


def test_one_zero_point_for_all_channels():
    entry = {"name": "w", "output_dtype": "uint8", **CHANNELS, "y_zero_point": 7}
    text = json.dumps({"version": "2.0.0", "encodings": [entry]})
    assert encodings_json.loads(text.encode())["w"].zero_point.tolist() == [7, 7]
