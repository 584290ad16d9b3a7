"""Models of free sizes, of several inputs and of a fixed batch, end to end."""

import json

import numpy as np
import onnx
from click.testing import CliRunner
from PIL import Image

import onnxq
from onnxq.cli import main
from onnxq.runtime import Session
from tests.models import parse

# a fully convolutional model whose output is as large as its input
PHOTOS = """g (float[N,3,H,W] x) => (float[N,2,H,W] y)
    <float[8,3,3,3] w, float[8] b, float[2,8,1,1] v>
    { c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) y = Conv(r, v) }"""
# a gain for tokens: one input of integers, which stay what they are, and one of floats
TOKENS = """g (int64[N,T] ids, float[N,T,6] gain) => (float[N,T,5] y)
    <float[20,6] table, float[6,6] w, float[6,5] v>
    { e = Gather(table, ids) g = Mul(e, gain) h = MatMul(g, w) r = Relu(h) y = MatMul(r, v) }"""


def quantize(model, calib, tmp_path, *options):
    source, out, facts = (tmp_path / n for n in ("in.onnx", "out.onnx", "facts.json"))
    onnx.save(model, source)
    args = ["quantize", source, out, "--calib", calib, "--json", facts, *options]
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    onnx.checker.check_model(str(out), full_check=True)
    return Session(source), Session(out), json.loads(facts.read_text()), result


def sqnr(wanted, got):
    return 10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum())


def test_pictures_of_different_sizes(tmp_path):
    rng = np.random.default_rng(0)
    calib = tmp_path / "photos"
    calib.mkdir()
    sizes = [(16, 12), (9, 31), (24, 24), (5, 7), (40, 3)]
    for index in range(15):
        shape = (*sizes[index % 5], 3)
        picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        picture.save(calib / f"{index}.png")
    before, after, facts, _ = quantize(parse(PHOTOS), calib, tmp_path, "--preprocess", "unit")
    assert facts["integers"]["share"] == 1
    assert facts["outputs"][0]["samples"] == 15
    assert facts["outputs"][0]["sqnr_db"] > 30
    assert [spec.shape for spec in after.inputs] == [("N", 3, "H", "W")]
    for shape in ((1, 3, 33, 17), (3, 3, 8, 50)):  # neither size nor batch is that of a sample
        feed = {"x": rng.random(shape, dtype=np.float32)}
        wanted, got = before.run(feed)["y"], after.run(feed)["y"]
        assert got.shape == (shape[0], 2, *shape[2:])
        assert sqnr(wanted, got) > 30


def tokens(rng, length, batch=1):
    return {
        "ids": rng.integers(0, 20, (batch, length)),
        "gain": rng.normal(1, 0.3, (batch, length, 6)).astype(np.float32),
    }


def test_two_inputs_one_of_integers_and_of_free_length(tmp_path):
    rng = np.random.default_rng(1)
    calib = tmp_path / "calib"
    calib.mkdir()
    for index in range(20):
        np.savez(calib / f"{index}.npz", **tokens(rng, 3 + index % 7))
    before, after, facts, _ = quantize(parse(TOKENS), calib, tmp_path)
    assert facts["integers"]["share"] == 1
    assert facts["outputs"][0]["samples"] == 20
    assert facts["outputs"][0]["sqnr_db"] > 25
    assert after.inputs == before.inputs
    assert after.inputs[0].dtype == np.int64
    feed = tokens(rng, 40, batch=3)
    wanted, got = before.run(feed)["y"], after.run(feed)["y"]
    assert sqnr(wanted, got) > 25


def test_two_inputs_from_every_source_give_the_same_model(tmp_path):
    rng = np.random.default_rng(2)
    model = parse(TOKENS)
    samples = [tokens(rng, 5) for _ in range(8)]
    stack = {name: np.concatenate([s[name] for s in samples]) for name in samples[0]}
    np.savez(tmp_path / "stack.npz", **stack)
    for index, sample in enumerate(samples):
        folder = tmp_path / "sets" / f"test_data_set_{index}"
        folder.mkdir(parents=True)
        for number, (name, array) in enumerate(sample.items()):
            tensor = onnx.numpy_helper.from_array(array, name)
            (folder / f"input_{number}.pb").write_bytes(tensor.SerializeToString())
    made = {
        onnxq.quantize(onnxq.load(model), calib=source)[0]
        .to_proto()
        .SerializeToString(deterministic=True)
        for source in (samples, iter(samples), stack, tmp_path / "stack.npz", tmp_path / "sets")
    }
    assert len(made) == 1


def test_what_does_not_fill_a_batch_is_noted(tmp_path):
    model = parse(PHOTOS.replace("[N,", "[32,").replace("H,W", "8,8"))
    np.save(tmp_path / "x.npy", np.random.default_rng(3).random((67, 3, 8, 8), np.float32))
    *_, facts, result = quantize(model, tmp_path / "x.npy", tmp_path)
    note = "3 of 67 samples dropped: the model takes batches of 32"
    assert facts["outputs"][0]["samples"] == 2
    assert facts["notes"] == [note]
    assert result.stdout.count(note) == 1
    same = (tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "x.npy")
    compared = onnxq.compare(*same, timed=False)
    assert (compared.samples, compared.notes) == (2, [note])
    assert onnxq.compare(*same, timed=False, limit=2).notes == []
    shown = CliRunner().invoke(
        main, ["compare", *map(str, same[:2]), "--data", str(same[2]), "--no-latency"]
    )
    assert shown.stdout.count(note) == 1
