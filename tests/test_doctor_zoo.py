"""Real models, quantized by onnxq and by onnxruntime: predicted as they are measured."""

import contextlib
import io
import logging
import os
import warnings

import numpy as np
import pytest

import onnxq
from onnxq.analysis.faults import faults
from onnxq.analysis.measurement import measure
from onnxq.analysis.prediction import predict
from onnxq.model import load
from tests.models import ZOO, zoo, zoo_samples

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif("ONNXQ_ZOO" not in os.environ, reason="ONNXQ_ZOO names no model zoo"),
]
SAMPLES = 2


def theirs(source, destination, files, *, signed=False, per_channel=False):
    """A model as onnxruntime quantizes it."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.files = iter(files)

        def get_next(self):
            file = next(self.files, None)
            return None if file is None else dict(np.load(file))

    root, level = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            quantize_static(
                source,
                destination,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=per_channel,
                activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
    finally:
        root.setLevel(level)
    return destination


def disagreements(path):
    model = load(path)
    found = []
    for arm in (False, True):
        measured = measure(model, arm=arm).nodes
        predictions = predict(model, arm=arm)
        assert {p.name for p in predictions} == set(measured)
        assert any(p.integer for p in predictions)
        found += [
            (arm, p, measured[p.name])
            for p in predictions
            if None not in (p.integer, measured[p.name].integer)
            and p.integer != measured[p.name].integer
        ]
    return found


@pytest.mark.parametrize("name", ZOO)
def test_predictions_are_what_is_measured(name, tmp_path):
    source, samples = zoo(name), zoo_samples(name, tmp_path / "calib", SAMPLES)
    files = sorted(samples.iterdir())
    onnxq.quantize(source, tmp_path / "ours.onnx", samples)
    assert disagreements(tmp_path / "ours.onnx") == []
    ours = load(tmp_path / "ours.onnx")
    wrong = [f for f in faults(ours, predict(ours)) if f.severity != "note"]
    # the last layer of magika, MatMul and Add, is made a Gemm with a float bias
    assert [f.code for f in wrong] == (["useless-pair"] if name == "magika" else [])
    assert disagreements(theirs(source, tmp_path / "tensor.onnx", files)) == []
    if name == "magika":  # onnxruntime's quantizer stumbles over its shapes
        return
    out = tmp_path / "channel.onnx"
    assert disagreements(theirs(source, out, files, per_channel=True)) == []


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_vit"])
def test_int8_is_mended_to_the_bit(name, tmp_path):
    source, samples = zoo(name), zoo_samples(name, tmp_path / "calib", SAMPLES)
    made = theirs(source, tmp_path / "int8.onnx", sorted(samples.iterdir()), signed=True)
    assert disagreements(made) == []
    result = onnxq.doctor(made, data=samples, fix=tmp_path / "mended.onnx")
    assert result.views[0].share("measured", macs=True) < 0.6
    assert [v.share("measured", macs=True) for v in result.mended.views] == [1, 1]
    assert {m.keeps for m in result.mends} == {"every bit"}
    assert [o.max_abs_error for o in result.mended.outputs] == [0]
