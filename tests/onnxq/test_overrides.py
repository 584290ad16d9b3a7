"""The TensorQuantOverrides of onnxruntime.quantization."""

import json

import numpy as np
import onnx
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from onnxq import encodings_json
from onnxq.encoding import Encoding, Encodings
from onnxq.errors import RecipeError, UnsupportedError
from onnxq.model import load
from onnxq.unquantize import unquantized
from tests import models
from tests.models import parse

X = Encoding("uint8", np.array(0.5, np.float32), np.array(114, np.int32))
W = Encoding("int8", np.array([0.25, 2], np.float32), np.zeros(2, np.int32), 0)
TEXT = {
    "x": [{"quant_type": "QUInt8", "scale": 0.5, "zero_point": 114}],
    "w": [
        {"quant_type": "QInt8", "scale": 0.25, "zero_point": 0, "axis": 0},
        {"quant_type": "QInt8", "scale": 2.0, "zero_point": 0, "axis": 0},
    ],
}


def test_layout():
    text = encodings_json.dumps(Encodings({"x": X, "w": W}), encodings_json.OVERRIDES)
    assert json.loads(text) == TEXT
    assert encodings_json.loads(text).tensors == {"x": X, "w": W}


def test_ranges_become_scales():
    part = {"quant_type": "QUInt8", "rmin": -1.0, "rmax": 3.0}
    got = encodings_json.loads(json.dumps({"x": [part]}))["x"]
    assert got == Encoding.of_range(-1, 3, "uint8")
    part = {"quant_type": "QInt8", "rmin": -1.0, "rmax": 3.0, "symmetric": True}
    got = encodings_json.loads(json.dumps({"x": [part]}))["x"]
    assert got == Encoding.of_range(-1, 3, "int8", symmetric=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quant_type": "QInt9"}, "quant_type: wanted QInt4.*got 'QInt9'"),
        ({"axis": "0"}, "axis: wanted an integer"),
        ({"scale": -1}, "finite float32 above 0"),
        ({"zero_point": 300}, "wanted 0 to 255 for uint8"),
        ({"scael": 1}, "no key 'scael'.*did you mean scale"),
        ({"rmin": "a", "rmax": 1, "scale": None}, "rmin, rmax: wanted finite numbers"),
    ],
)
def test_broken_entries(change, match):
    part = {k: v for k, v in {**TEXT["x"][0], **change}.items() if v is not None}
    with pytest.raises(RecipeError, match=match):
        encodings_json.loads(json.dumps({"x": [part]}))


def test_several_scales_without_an_axis():
    parts = [{k: v for k, v in part.items() if k != "axis"} for part in TEXT["w"]]
    with pytest.raises(RecipeError, match="need the axis"):
        encodings_json.loads(json.dumps({"w": parts}))


@pytest.mark.parametrize("part", [{"quant_type": "QUInt8"}, {**TEXT["x"][0], "convert": {}}])
def test_what_leaves_work_to_calibration(part):
    with pytest.raises(UnsupportedError, match="an override"):
        encodings_json.loads(json.dumps({"x": [part]}))


@pytest.mark.parametrize(
    "encoding",
    [
        Encoding("uint5", np.array(1, np.float32), np.array(0, np.int32)),
        Encoding("int4", np.ones((2, 2), np.float32), np.zeros((2, 2), np.int32), 0, 16),
    ],
)
def test_what_it_has_no_words_for(encoding):
    with pytest.raises(UnsupportedError, match=r"no override for.*tensor x.*2\.0\.0"):
        encodings_json.dumps(Encodings({"x": encoding}), encodings_json.OVERRIDES)


class Reader(CalibrationDataReader):
    def __init__(self, feeds):
        self.feeds = iter(feeds)

    def get_next(self):
        return next(self.feeds, None)


def test_onnxruntime_takes_them_and_gives_them_back(tmp_path):
    proto = parse(
        "g (float[N,3,8,8] x) => (float[] y) <float[4,3,3,3] w, float[2,4,1,1] v>"
        "{ a = Conv(x, w) b = Relu(a) y = Conv(b, v) }"
    )
    onnx.save(proto, tmp_path / "in.onnx")
    wanted = {
        "x": Encoding("uint8", np.array(0.037, np.float32), np.array(119, np.int32)),
        "b": Encoding("uint8", np.array(0.071, np.float32), np.array(0, np.int32)),
        "y": Encoding("uint8", np.array(0.29, np.float32), np.array(131, np.int32)),
        "w": Encoding("int8", np.array([0.02, 0.03, 0.04, 0.05], "f4"), np.zeros(4, np.int32), 0),
        "v": Encoding("int8", np.array([0.021, 0.031], np.float32), np.zeros(2, np.int32), 0),
    }
    overrides = json.loads(encodings_json.dumps(Encodings(wanted), encodings_json.OVERRIDES))
    for parts in overrides.values():
        for part in parts:  # as its own reader of such files does
            part["quant_type"] = QuantType.from_string(part["quant_type"])
            part["scale"] = np.array(part["scale"], np.float32)
            kind = np.uint8 if part["quant_type"] == QuantType.QUInt8 else np.int8
            part["zero_point"] = np.array(part["zero_point"], kind)
    quantize_static(
        tmp_path / "in.onnx",
        tmp_path / "out.onnx",
        Reader([models.feeds(proto, seed=s) for s in range(2)]),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"TensorQuantOverrides": overrides},
    )
    _, found = unquantized(load(tmp_path / "out.onnx"))
    assert {n: found[n] for n in wanted} == wanted
