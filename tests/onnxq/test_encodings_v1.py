"""AIMET's encodings of versions 0.6.1 and 1.0.0."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq import encodings_json
from onnxq.encoding import DTYPES, Encoding, Encodings, limits
from onnxq.encodings_json import Channels
from onnxq.errors import OnnxqError, RecipeError, UnsupportedError

TYPES = [t for t in DTYPES if t != "int32"]
SCALES = st.floats(2.0**-20, 2.0**20, width=32)


@st.composite
def encodings(draw):
    dtype, count = draw(st.sampled_from(TYPES)), draw(st.integers(0, 4))
    shape = (count,) if count else ()
    size = max(count, 1)
    scale = draw(st.lists(SCALES, min_size=size, max_size=size))
    zero = draw(st.lists(st.integers(*limits(dtype)), min_size=size, max_size=size))
    return Encoding(
        dtype,
        np.array(scale, np.float32).reshape(shape),
        np.array(zero, np.int32).reshape(shape),
        1 if count else None,
    )


@given(st.dictionaries(st.text("abc/._", min_size=1), encodings(), max_size=4), st.data())
def test_round_trip(tensors, data):
    weights = set(data.draw(st.lists(st.sampled_from([*tensors]))) if tensors else ())
    known = {n: Channels(1, e.scale.size) for n, e in tensors.items() if n in weights}
    for version in encodings_json.OLD:
        text = encodings_json.dumps(Encodings(tensors, {"n": "why"}), version, weights)
        back = encodings_json.loads(text, channels=known)
        assert back.float_nodes == {"n": "why"}
        assert back.tensors.keys() == tensors.keys()
        for name, encoding in tensors.items():
            if version == "0.6.1" and encoding.scale.size == 1:  # a list of one is one scale
                encoding = Encoding(
                    encoding.dtype, encoding.scale.reshape(()), encoding.zero_point.reshape(())
                )
            assert back[name] == encoding


X = Encoding("uint8", np.array(0.5, np.float32), np.array(114, np.int32))
W = Encoding("int8", np.array([0.25, 2], np.float32), np.array([0, -3], np.int32), 0)


def test_layout_of_061():
    text = encodings_json.dumps(Encodings({"x": X, "w": W}), "0.6.1", {"w"})
    document = json.loads(text)
    assert document["version"] == "0.6.1"
    assert document["activation_encodings"] == {
        "x": [
            {
                "bitwidth": 8,
                "dtype": "int",
                "is_symmetric": "False",
                "min": -57.0,
                "max": 70.5,
                "scale": 0.5,
                "offset": -114,
            }
        ]
    }
    first, second = document["param_encodings"]["w"]
    assert (first["offset"], first["min"], first["max"]) == (-128, -32.0, 31.75)
    assert (second["offset"], second["min"], second["max"]) == (-125, -250.0, 260.0)
    assert second["is_symmetric"] == "True"


def test_layout_of_100():
    blocks = Encoding(
        "int4", np.arange(1, 7, dtype=np.float32).reshape(3, 2), np.zeros((3, 2), np.int32), 0, 16
    )
    text = encodings_json.dumps(Encodings({"x": X, "w": W, "b": blocks}), "1.0.0", {"w", "b"})
    document = json.loads(text)
    assert document["activation_encodings"] == [
        {
            "name": "x",
            "dtype": "INT",
            "enc_type": "PER_TENSOR",
            "bw": 8,
            "is_sym": False,
            "scale": [0.5],
            "offset": [-114],
        }
    ]
    weight, matrix = document["param_encodings"]
    assert weight["enc_type"] == "PER_CHANNEL"
    assert weight["offset"] == [-128, -125]
    # blocks along the inputs of a [in, out] matrix: those of a channel stand side by side
    assert matrix["scale"] == [1, 3, 5, 2, 4, 6]
    assert (matrix["enc_type"], matrix["block_size"], matrix["bw"]) == ("PER_BLOCK", 16, 4)
    back = encodings_json.loads(text, channels={"w": Channels(0, 2), "b": Channels(1, 2)})
    assert back["b"] == blocks
    transposed = encodings_json.loads(text, channels={"w": Channels(0, 2), "b": Channels(0, 2)})
    assert transposed["b"] == blocks.transposed


# ---------------------------------------------------------------------- what others write


ENTRY = {"bitwidth": 8, "dtype": "int", "is_symmetric": "False", "scale": 0.5, "offset": -114.0}
NEW = {
    "name": "x",
    "dtype": "INT",
    "enc_type": "PER_TENSOR",
    "bw": 8,
    "is_sym": False,
    "scale": [0.5],
    "offset": [-114.0],
}


def old(entry=None, section="activation_encodings", **more):
    entries = {"x": [{**ENTRY, **more}] if entry is None else entry}
    sections = {"activation_encodings": {}, "param_encodings": {}, section: entries}
    return json.dumps({"version": "0.6.1", **sections})


def new(section="activation_encodings", **more):
    entry = {k: v for k, v in {**NEW, **more}.items() if v is not None}
    sections = {"activation_encodings": [], "param_encodings": [], section: [entry]}
    return json.dumps({"version": "1.0.0", **sections, "quantizer_args": {"param_bitwidth": 8}})


def test_offsets_may_be_floats():
    assert encodings_json.loads(old())["x"] == X
    assert encodings_json.loads(new())["x"] == X
    signed = encodings_json.loads(new(is_sym=True, offset=[-128.0]))["x"]
    assert (signed.dtype, int(signed.zero_point)) == ("int8", 0)
    assert encodings_json.loads(new(bw=4, offset=[-15.0]))["x"].qmax == 15


def test_floats_are_told_apart():
    found = encodings_json.loads(old([{"bitwidth": 16, "dtype": "float"}]))
    assert (dict(found), found.float_tensors) == ({}, {"x": "float16"})
    found = encodings_json.loads(new(dtype="FLOAT", bw=32, scale=None, offset=None))
    assert found.float_tensors == {"x": "float32"}


def test_axes_are_those_of_the_model():
    text = new("param_encodings", enc_type="PER_CHANNEL", scale=[1, 2], offset=[0, 0])
    assert encodings_json.loads(text, channels={"x": Channels(3, 2)})["x"].axis == 3
    with pytest.raises(RecipeError, match=r"does not say along which axis.*give the model"):
        encodings_json.loads(text)
    text = new(enc_type="PER_CHANNEL", scale=[1, 2], offset=[0, 0])
    assert encodings_json.loads(text)["x"].axis == 1  # activations: channels are the second axis


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"version": "0.6.1"}', "activation_encodings: wanted an object of entries by name"),
        ('{"version": "1.0.0"}', "activation_encodings: wanted a list of entries in version 1.0.0"),
        (old().replace("0.6.1", "1.0.0"), "wanted a list of entries in version 1.0.0, got an obj"),
        (new().replace("1.0.0", "0.6.1"), "wanted an object of entries by name in version 0.6.1"),
        (old([]), r"wanted a list of channels.*x, activation_encodings of e.json"),
        (old([3]), "wanted an object, got an integer"),
        (old([{"dtype": "int"}]), "scale is missing"),
        (old(bw=8), "'bw' is no key of version 0.6.1.*all in one version"),
        (old(y_scale=1.0), "'y_scale' is no key of version 0.6.1"),
        (old(scale=float("nan")), "scale: wanted a finite float32 above 0, got nan"),
        (old(scale=float("inf")), "scale: wanted a finite float32 above 0, got inf"),
        (old(scale=0), "above 0, got 0"),
        (old(scale="1"), "scale: wanted a number, got text"),
        (old(offset=-300), "-offset: wanted 0 to 255 for uint8, got 300"),
        (old(offset=0.5), "-offset: wanted an integer, got a number"),
        (old(bitwidth=17), "no integer type 'uint17'"),
        (old(bitwidth="8"), "wanted a number of bits"),
        (old(is_symmetric="maybe"), "wanted a number of bits and a symmetry"),
        (old(dtype="complex"), "dtype: wanted int or float, got 'complex'"),
        (old([ENTRY, {**ENTRY, "bitwidth": 4}]), "its channels are of different types"),
        (new(name=""), "an encoding without a name"),
        (new(scale=None), "scale is missing"),
        (new(bitwidth=8), "'bitwidth' is no key of version 1.0.0"),
        (new(output_dtype="uint8"), "'output_dtype' is no key of version 1.0.0"),
        (new(scale=[1, 2], offset=[0, 0]), "PER_TENSOR with 2 scales"),
        (new(scale=[1, 2], offset=[0]), "-offset has 1 values, the scale has 2"),
        (new(scale=[]), "scale holds no scale"),
        (new("param_encodings", enc_type="PER_BLOCK"), "give the model"),
    ],
)
def test_broken_files(text, match):
    with pytest.raises(RecipeError, match=match):
        encodings_json.loads(text, where="e.json")


@pytest.mark.parametrize("kind", ["LPBQ", "VECTOR"])
def test_granularities_that_onnxq_does_not_know(kind):
    with pytest.raises(UnsupportedError, match=f"of type {kind}"):
        encodings_json.loads(new(enc_type=kind))
    with pytest.raises(UnsupportedError, match="zero points between integers"):
        encodings_json.loads(new(zero_point_shift=[0.5]))


@pytest.mark.parametrize(("size", "count"), [(1, 2), (16, 4), (16, 0), ("16", 2)])
def test_blocks_that_do_not_add_up(size, count):
    text = new(
        "param_encodings", enc_type="PER_BLOCK", block_size=size, scale=[1] * 6, offset=[0] * 6
    )
    with pytest.raises(RecipeError, match="block"):
        encodings_json.loads(text, channels={"x": Channels(1, count)})


def test_a_name_in_both_sections():
    both = json.loads(new())
    both["param_encodings"] = both["activation_encodings"]
    with pytest.raises(RecipeError, match="second encoding of the same name"):
        encodings_json.loads(json.dumps(both))


def test_what_cannot_be_written():
    blocks = Encoding("int4", np.ones((2, 2), np.float32), np.zeros((2, 2), np.int32), 0, 16)
    with pytest.raises(UnsupportedError, match=r"0\.6\.1 knows no scales in blocks.*take version"):
        encodings_json.dumps(Encodings({"w": blocks}), "0.6.1", {"w"})
    with pytest.raises(RecipeError, match="keeps weights and activations apart; give the model"):
        encodings_json.dumps(Encodings({"x": X}), "1.0.0")
    with pytest.raises(OnnxqError, match=r"no version '2'.*versions are|did you mean"):
        encodings_json.dumps(Encodings({"x": X}), "2")
