"""Real models of the zoo, quantized as a user would: integers everywhere, outputs close."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

import onnxq
from onnxq.passes import Calibrate, Clean, Compress, FoldBatchNorm
from onnxq.passes.adaround import AdaRound
from onnxq.quadratic import Quadratic
from onnxq.runtime import Session
from onnxq.synthetic import synthesize
from tests import models

ZOO = os.environ.get("ONNXQ_ZOO")
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(ZOO is None, reason="ONNXQ_ZOO names no model zoo"),
]


def cifar(count, first=0):
    images = np.load(Path(ZOO) / "cifar10" / "cifar10.npz")["calib_images"][first::40][:count]
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


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("cifar_resnet20", "ImageNet's mean and deviation"),
        ("mobilenetv1_075", "-1..1"),
        ("mobilenetv2", "-1..1"),
        ("simplepose", "ImageNet's mean and deviation"),
        ("ultraface_rfb320", "-1..1"),
        ("vww_mobilenetv1_025", "0..1"),
        ("yolox_nano", "0..255"),
    ],
)
def test_the_scale_of_pictures_is_found_in_the_model(name, scale):
    made = synthesize(onnxq.load(Path(ZOO) / "models" / f"{name}.onnx"), count=2)
    assert re.search(rf"pictures, (assumed to be )?{re.escape(scale)}, RGB", made.notes[0])


def test_ranges_from_made_up_samples_are_near_those_from_real_ones(tmp_path):
    source = models.zoo("mobilenetv2")
    found = []
    for data in (
        synthesize(onnxq.load(source), count=32),
        models.zoo_samples("mobilenetv2", tmp_path, 32),
    ):
        model, _ = onnxq.PassManager(Clean(), FoldBatchNorm(), Calibrate())(source, data)
        moving = [n for n, t in model.tensors().items() if not isinstance(t, gs.Constant)]
        found.append(
            {n: e.high - e.low for n in moving if (e := model.encodings.get(n)) is not None}
        )
    made, real = found
    ratios = np.array([made[name] / real[name] for name in real])
    assert 0.9 < np.median(ratios) < 1.25
    assert ratios.min() > 0.6
    assert ratios.max() < 3.5  # of the class scores, which are widened on purpose


def test_weights_of_4_bits_by_adaround_and_an_interrupted_run(tmp_path, monkeypatch):
    """On pictures that were not calibrated with: better than GPTQ, and the same bytes."""
    source = models.zoo("cifar_resnet20")
    data, unseen = cifar(48), cifar(50, first=20)
    files = {name: tmp_path / f"{name}.onnx" for name in ("accurate", "default", "resumed")}
    for recipe in ("default", "accurate"):
        _, report = onnxq.quantize(
            source, files[recipe], data, weights="int4/channel", recipe=recipe
        )
        assert report.facts["integers"]["share_of_possible"] == 1.0
    sessions = {name: Session(files[name]) for name in ("default", "accurate")}
    exact = Session(source)
    noise = dict.fromkeys(sessions, 0.0)
    power = 0.0
    for feed in unseen:
        wanted = exact.run(feed)["logits"]
        power += float(np.square(wanted).sum())
        for name, session in sessions.items():
            noise[name] += float(np.square(session.run(feed)["logits"] - wanted).sum())
    sqnr = {name: 10 * np.log10(power / total) for name, total in noise.items()}
    assert sqnr["accurate"] > 19.0
    assert sqnr["accurate"] > sqnr["default"] + 1.5

    original, count = Quadratic.of, []

    def interrupted(layer, statistics):
        count.append(layer)
        if len(count) == 8:
            raise KeyboardInterrupt
        return original(layer, statistics)

    options = {"weights": "int4/channel", "resume": tmp_path / "kept"}
    monkeypatch.setattr(Quadratic, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        onnxq.quantize(source, files["resumed"], data, **options)
    monkeypatch.setattr(Quadratic, "of", original)
    assert not files["resumed"].exists()
    _, report = onnxq.quantize(source, files["resumed"], data, **options)
    (done,) = (p.changes.done for p in report.passes if p.name == AdaRound.name)
    assert done[0] == "7 weights taken up from an earlier run"
    digests = {hashlib.sha256(files[n].read_bytes()).hexdigest() for n in ("accurate", "resumed")}
    assert len(digests) == 1


def test_compressed_to_three_fifths_of_the_computation():
    """On pictures that were not learned from: much nearer to float than by the plain SVD."""
    source = models.zoo("cifar_resnet20")
    unseen, exact = cifar(50, first=20), Session(source)
    found = {}
    for reconstruct in ("none", "all"):
        steps = (Clean(), FoldBatchNorm(), Compress(share=0.6, reconstruct=reconstruct))
        small, report = onnxq.PassManager(*steps)(source, cifar(50))
        macs = report.facts["compression"]["macs"]
        assert 0.58 < macs["after"] / macs["before"] <= 0.6
        session = Session(small.to_proto())
        pairs = [(exact.run(f)["logits"], session.run(f)["logits"]) for f in unseen]
        noise = sum(float(np.square(a - b).sum()) for a, b in pairs)
        found[reconstruct] = noise / sum(float(np.square(a).sum()) for a, _ in pairs)
    assert 10 * np.log10(found["none"] / found["all"]) > 6
    assert -10 * np.log10(found["all"]) > 9
