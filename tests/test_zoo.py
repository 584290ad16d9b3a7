"""Real models of the zoo, quantized as a user would: integers everywhere, outputs close."""

import os
from pathlib import Path

import numpy as np
import pytest

import onnxq

ZOO = os.environ.get("ONNXQ_ZOO")
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(ZOO is None, reason="ONNXQ_ZOO names no model zoo"),
]


def cifar(count):
    images = np.load(Path(ZOO) / "cifar10" / "cifar10.npz")["calib_images"][::40][:count]
    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    scaled = ((images - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    return [{"input": picture[None]} for picture in scaled]


@pytest.mark.parametrize(("name", "least"), [("cifar_resnet20", 25.0), ("cifar_vit", 30.0)])
def test_quantized_zoo_models_stay_close(name, least, tmp_path):
    source = Path(ZOO) / "models" / f"{name}.onnx"
    before = source.read_bytes()
    _, report = onnxq.quantize(source, tmp_path / "out.onnx", cifar(32))
    assert source.read_bytes() == before
    assert report.facts["integers"]["share_of_possible"] >= 0.95
    assert report.facts["outputs"][0]["sqnr_db"] > least
    assert report.facts["outputs"][0]["top1_agreement"] > 0.9
