"""The flow of AIMET on real models: equalize, simulate, compute encodings, evaluate, export."""

import os
from pathlib import Path

import numpy as np
import pytest

import onnxq
from onnxq.runtime import Session
from tests import models

ZOO = os.environ.get("ONNXQ_ZOO")
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(ZOO is None, reason="ONNXQ_ZOO names no model zoo"),
]


def pictures(kind):
    """Pictures of the CIFAR-10 test set as the model takes them, and their labels."""
    file = np.load(Path(ZOO) / "cifar10" / "cifar10.npz")
    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    scaled = (file[f"{kind}_images"].astype(np.float32) - mean) / std
    return scaled.transpose(0, 3, 1, 2), file.get(f"{kind}_labels")


def test_the_seed_flow(tmp_path):
    calibration, _ = pictures("calib")
    x, labels = pictures("test")

    def feed(session, count):
        for picture in calibration[:: len(calibration) // count][:count]:
            session.run(None, {"input": picture[None]})

    def scores(session):
        batches = [session.run(None, {"input": x[i : i + 100]})[0] for i in range(0, 5000, 100)]
        return np.concatenate(batches).argmax(axis=1)

    model, _ = onnxq.equalize_model(models.zoo("cifar_resnet20"))
    sim = onnxq.QuantizationSimModel(model)
    sim.compute_encodings(feed, 100)
    files = sim.export(tmp_path, "resnet20")
    found = scores(sim.session)

    integers = Session(files.qdq)
    whole = Session(files.model)
    deployed = [integers.run({"input": x[i : i + 100]})["logits"] for i in range(0, 5000, 100)]
    exact = [whole.run({"input": x[i : i + 100]})["logits"] for i in range(0, 5000, 100)]
    np.testing.assert_array_equal(found, np.concatenate(deployed).argmax(axis=1))
    right = [100 * np.mean(f == labels[:5000]) for f in (found, np.concatenate(exact).argmax(1))]
    assert right[0] >= right[1] - 0.5


WIDTHS = [
    ("cifar_resnet20", {"param_type": "int4"}),
    ("cifar_resnet20", {"param_type": "int5", "activation_type": "int7"}),
    ("cifar_vit", {"param_type": "int16", "activation_type": "int12"}),
    ("cifar_vit", {"activation_type": "float"}),
]


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in models.ZOO), *WIDTHS], ids=str
)
def test_the_simulation_is_the_exported_model_to_the_bit(name, options, tmp_path):
    """In integers as onnxruntime runs the file by default, in floats as it does unoptimized."""
    feeds = models.zoo_samples(name, tmp_path / "calib", 8)
    feeds = [*onnxq.Calibration(feeds).bind(Session(models.zoo(name)).inputs)]
    sim = onnxq.QuantizationSimModel(models.zoo(name), **options)
    sim.compute_encodings(feeds)
    files = sim.export(tmp_path, name)
    for arithmetic, level in (("integer", "all"), ("float", "disabled")):
        written = Session(files.qdq, level=level)
        again = onnxq.QuantizationSimModel(files.model, arithmetic=arithmetic, **options)
        again.load_encodings(files.encodings)
        sessions = [again.session, *([sim.session] if arithmetic == "integer" else [])]
        for feed in feeds[:3]:
            wanted = [*written.run(feed).values()]
            for session in sessions:
                for got, want in zip(session.run(None, feed), wanted, strict=True):
                    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["cifar_vit", "mobilenetv1_075", "silero_vad", "yolox_nano"])
def test_a_callback_is_observed_as_samples_are(name, tmp_path):
    feeds = models.zoo_samples(name, tmp_path, 6)
    feeds = [*onnxq.Calibration(feeds).bind(Session(models.zoo(name)).inputs)]
    found = []
    for given in (feeds, lambda session: [session.run(None, feed) for feed in feeds]):
        sim = onnxq.QuantizationSimModel(models.zoo(name))
        sim.compute_encodings(given)
        found.append(dict(sim.encodings))
    assert found[0] == found[1]
