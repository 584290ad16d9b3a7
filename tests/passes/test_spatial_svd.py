"""Spatial SVD on small models: exact where a kernel has the rank, better with samples."""

import numpy as np
import pytest

from onnxq.errors import CalibrationError, RecipeError
from onnxq.model import load
from onnxq.pass_manager import PassManager
from onnxq.passes import Calibrate, FoldBatchNorm, SpatialSVD, WeightSVD
from onnxq.runtime import Session
from tests.models import parse

BLOCKS = (
    "g (float[N,3,12,12] x) => (float[] y) <float[8,3,3,3] a, float[8,8,3,3] b, float[8,8,3,3] c,"
    "float[8,8,3,3] d, float[8] e, float[8] f, float[5,8] g, float[5] h> {"
    "  p = Conv <pads = [1, 1, 1, 1]> (x, a, e) q = Relu(p)"
    "  r = Conv <pads = [1, 1, 1, 1]> (q, b, f) s = Relu(r)"
    "  t = Conv <pads = [1, 1, 1, 1]> (s, c) u = Add(t, q) v = Relu(u)"
    "  w = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (v, d) z = Relu(w)"
    "  m = GlobalAveragePool(z) k = Flatten(m) y = Gemm <transB = 1> (k, g, h) }"
)


def blocks():
    """A residual block and a stride, with weights that do not blow activations up."""
    model = load(parse(BLOCKS))
    for layer in model.layers():
        layer.set_weight(layer.weight / np.sqrt(layer.weight[0].size).astype(np.float32))
    return model


def samples(count=64):
    """Pictures as smooth as pictures are."""
    rng = np.random.default_rng(5)
    noise = np.cumsum(np.cumsum(rng.normal(size=(count, 1, 3, 12, 12)), 3), 4)
    return [{"x": (n / noise.std()).astype(np.float32)} for n in noise]


def sqnr(before, after, data):
    pair = [Session(m.to_proto()) for m in (before, after)]
    runs = [tuple(s.run(feed)["y"] for s in pair) for feed in data]
    wanted, got = (np.concatenate(part) for part in zip(*runs, strict=True))
    return 10 * np.log10(np.square(wanted).sum() / np.square(wanted - got).sum())


@pytest.mark.parametrize("step", [SpatialSVD, WeightSVD])
def test_samples_beat_the_plain_svd_at_every_ratio(step):
    model, data = blocks(), samples()
    unseen = samples(96)[64:]
    for ratio in (0.3, 0.5, 0.7):
        found = {}
        for reconstruct in ("none", "split", "all"):
            options = {"ratio": ratio, "multiple": 1, "reconstruct": reconstruct}
            small, report = PassManager(step(exclude=("Gemm",), **options))(model, data)
            assert len(report.passes[0].changes.done) == 4
            found[reconstruct] = sqnr(model, small, unseen)
        assert found["split"] > found["none"] + 3
        assert found["all"] > found["split"] - 0.5
        assert found["all"] > 10


def test_kernels_that_have_the_rank_lose_nothing():
    model = blocks()
    rng = np.random.default_rng(0)
    for layer in model.layers()[:4]:
        outputs, channels = layer.weight.shape[:2]
        parts = rng.normal(size=(outputs, 2, 3)), rng.normal(size=(2, channels, 3))
        layer.set_weight(0.2 * np.einsum("orj,rci->ocij", *parts).astype(np.float32))
    before = model.clone()
    ratios = tuple((layer.name, 2 / 5) for layer in model.layers()[1:3])  # ranks 2 of 12, 48 each
    small, report = PassManager(SpatialSVD(ratio=1.0, ratios=ratios, multiple=2))(model, samples())
    assert sum("rank" in line for line in report.passes[0].changes.done) == 2
    assert sqnr(before, small, samples()) > 60
    sizes = [layer.weight.shape for layer in small.layers()]
    assert sizes[1:3] == [(4, 8, 3, 1), (8, 4, 1, 3)]


def test_names_shapes_and_batches_stay():
    model = blocks()
    small, _ = PassManager(SpatialSVD(ratio=0.5, multiple=4))(model, samples())
    assert (small.inputs, small.outputs) == (model.inputs, model.outputs)
    names = {n.name for n in small.graph.nodes}
    assert {n.name for n in model.graph.nodes} < names
    batch = np.concatenate([feed["x"] for feed in samples(3)])
    session = Session(small.to_proto())
    whole = session.run({"x": batch})["y"]
    single = [session.run({"x": x[None]})["y"] for x in batch]
    np.testing.assert_allclose(whole, np.concatenate(single), atol=1e-5)


def test_the_mean_of_the_outputs_stays():
    model, data = blocks(), samples()
    small, _ = PassManager(SpatialSVD(ratio=0.4, multiple=1))(model, data)
    for name in ("p", "u"):
        means = []
        for given in (model, small):
            session = Session(given.to_proto([name]), outputs=[name])
            means.append(np.mean([session.run(f)[name].mean((0, 2, 3)) for f in data], 0))
        np.testing.assert_allclose(means[1], means[0], atol=0.01)


def test_what_is_left_whole_has_a_reason():
    model = blocks()
    small, report = PassManager(SpatialSVD(ratio=0.5, exclude=("Conv_2",)))(model, samples())
    (record,) = report.passes
    assert not any("Conv_2" in line for line in record.changes.done)
    skipped = {s.layer: s.why for s in record.changes.skipped}
    gemm = model.layers()[-1].name
    assert skipped[gemm] == "Gemm has no window"
    assert len(small.layers()) > len(model.layers())


def test_a_product_of_two_activations_is_left_alone():
    text = "g (float[N,4,4] x) => (float[] y) { y = MatMul(x, x) }"
    _, report = PassManager(WeightSVD())(load(parse(text)))
    assert [s.why for s in report.passes[0].changes.skipped] == ["its weight is computed"]


def test_the_plain_svd_needs_no_samples_and_the_other_does():
    small, _ = PassManager(SpatialSVD(reconstruct="none"))(blocks())
    assert len(small.layers()) > 5
    with pytest.raises(CalibrationError, match="needs calibration samples"):
        PassManager(SpatialSVD())(blocks())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 0.0}, r"ratio: wanted a share in \(0, 1\], got 0"),
        ({"ratio": 1.5}, "got 1.5"),
        ({"ratios": (("Conv_0", -1.0),)}, "Conv_0: wanted a share"),
        ({"multiple": 0}, "multiple: wanted at least 1"),
        ({"samples": -1}, "samples: wanted 0 or more"),
    ],
)
def test_options_that_mean_nothing(options, says):
    with pytest.raises(RecipeError, match=says):
        SpatialSVD(**options)


def test_layers_that_are_not_there():
    with pytest.raises(RecipeError, match="no layer 'Conv_9'; did you mean Conv_"):
        PassManager(SpatialSVD(ratios=(("Conv_9", 0.5),)))(blocks(), samples())


def test_it_comes_before_integers():
    steps = (Calibrate(), SpatialSVD())
    with pytest.raises(RecipeError, match="put it before calibrate"):
        PassManager(*steps)(blocks(), samples())


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, monkeypatch):
    model, data = blocks(), samples()
    step = SpatialSVD(multiple=1)
    whole, _ = PassManager(step)(model, data)
    from onnxq.responses import Response

    original, count = Response.solution, []

    def interrupted(self):
        count.append(self)
        if len(count) == 3:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Response, "solution", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PassManager(step)(model, data, resume=tmp_path)
    monkeypatch.setattr(Response, "solution", original)
    again, report = PassManager(step)(model, data, resume=tmp_path)
    assert "2 layers taken up from an earlier run" in report.passes[0].changes.done
    assert again.digest() == whole.digest()


def test_after_batch_normalization_is_folded():
    text = (
        "g (float[N,4,8,8] x) => (float[] y) <float[8,4,3,3] a, float[8] s, float[8] b, float[8] m,"
        "float[8] var> { c = Conv(x, a) y = BatchNormalization(c, s, b, m, var) }"
    )
    model = load(parse(text))
    rng = np.random.default_rng(3)
    data = [{"x": rng.normal(size=(2, 4, 8, 8)).astype(np.float32)} for _ in range(20)]
    small, _ = PassManager(FoldBatchNorm(), SpatialSVD(ratio=0.9, multiple=1))(model, data)
    assert [n.op for n in small.graph.nodes] == ["Conv", "Conv"]
    assert sqnr(model, small, data) > 8  # of noise, rank 7 of 12
