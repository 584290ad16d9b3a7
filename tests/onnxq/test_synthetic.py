"""Samples made up for a model: what inputs are taken for, how they are scaled, which are taken."""

import numpy as np
import pytest
from PIL import Image

from onnxq import natural
from onnxq.calibration import Calibration
from onnxq.errors import CalibrationError, RecipeError
from onnxq.model import load
from onnxq.norm_matching import MomentSession, NormTargets
from onnxq.pass_manager import Context, PassManager
from onnxq.passes import Clean, FoldBatchNorm
from onnxq.pictures import PRESETS, Preprocess
from onnxq.runtime import Session
from onnxq.signature import TensorSpec
from onnxq.synthetic import POOL, synthesize
from tests.checks import run
from tests.models import parse

CONV = "<float[4,3,3,3] w> { y = Conv(x, w) }"
IMAGENET = Preprocess(mean=PRESETS["imagenet"].mean, std=PRESETS["imagenet"].std)
SIDE = 40


def made_for(text, **options):
    proto = text if not isinstance(text, str) else parse(text)
    options = {"count": 3, **options}
    made = synthesize(load(proto), **options)
    session = Session(proto, threads=1)
    for feed in made:
        assert [*feed] == [s.name for s in session.inputs]
        for spec in session.inputs:
            array = feed[spec.name]
            assert array.dtype == spec.dtype
            assert spec.accepts(array.shape)
        session.run(feed)
    return made


# ---------------------------------------------------------------------- kinds


@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        ("float[N,3,24,20] x", (1, 3, 24, 20)),
        ("float[4,3,9,12] x", (4, 3, 9, 12)),
        ("float[N,3,H,W] x", (1, 3, 224, 224)),
        ("float[batch,3,H,50] x", (1, 3, 224, 50)),
    ],
)
def test_pictures_take_the_shape_of_the_input(declared, shape):
    made = made_for(f"g ({declared}) => (float[] y) {CONV}")
    assert len(made) == 3
    assert all(feed["x"].shape == shape for feed in made)
    assert "pictures" in made.notes[0]
    rows = np.concatenate([feed["x"] for feed in made])
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_gray_pictures():
    made = made_for("g (float[N,1,16,16] x) => (float[] y) <float[4,1,3,3] w> { y = Conv(x, w) }")
    assert made[0]["x"].shape == (1, 1, 16, 16)


def test_pictures_with_channels_last():
    text = """g (float[N,20,24,3] x) => (float[] y) <float[4,3,3,3] w> {
        t = Transpose<perm = [0, 3, 1, 2]>(x)  y = Conv(t, w)
    }"""
    made = made_for(text)
    assert made[0]["x"].shape == (1, 20, 24, 3)
    correlation = np.corrcoef(made[0]["x"].reshape(-1, 3).T)
    assert correlation.min() > 0.3  # of colours, not of rows


def test_pictures_of_bytes_stay_bytes():
    text = """g (uint8[N,3,16,16] x) => (float[] y) <float[4,3,3,3] w> {
        f = Cast<to = 1>(x)  y = Conv(f, w)
    }"""
    made = made_for(text)
    assert made[0]["x"].dtype == np.uint8
    assert "0..255" in made.notes[0]


def test_an_open_size_is_one_that_the_model_runs_with():
    text = """g (float[N,3,H,W] x) => (float[] y) <float[4,3,1,1] w, float[4096,2] v> {
        c = Conv<strides = [2, 2]>(x, w)  f = Flatten(c)  y = MatMul(f, v)
    }"""
    assert made_for(text)[0]["x"].shape == (1, 3, 64, 64)


def test_no_size_that_runs_is_an_error():
    text = """g (float[N,3,H,W] x) => (float[] y) <float[4,3,1,1] w, float[17,2] v> {
        c = Conv(x, w)  f = Flatten(c)  y = MatMul(f, v)
    }"""
    with pytest.raises(CalibrationError, match=r"runs with no sample.*give samples"):
        synthesize(load(parse(text)))


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,1,4000] x) => (float[] y) <float[4,1,9] w> { y = Conv(x, w) }",
        """g (float[N,4000] x) => (float[] y) <int64[1] axes, float[4,1,9] w> {
            u = Unsqueeze(x, axes)  y = Conv(u, w)
        }""",
    ],
)
def test_sounds(text):
    made = made_for(parse(text, axes=1) if "axes" in text else text)
    assert "sounds, assumed to be -1..1" in made.notes[0]
    assert all(0 < np.abs(feed["x"]).max() <= 1 for feed in made)
    row = made[0]["x"].reshape(-1)
    assert np.array_equal(row[:5], np.float32(row[:5]))
    assert abs(np.corrcoef(row[1:], row[:-1])[0, 1]) > 0.2


def test_vectors_are_no_sounds():
    text = "g (float[N,4000] x) => (float[] y) <float[4000,3] w> { y = MatMul(x, w) }"
    made = made_for(text)
    assert "N(0, 1)" in made.notes[0]
    values = np.concatenate([feed["x"] for feed in made])
    assert abs(values.mean()) < 0.05
    assert abs(values.std() - 1) < 0.05


def test_indices_reach_every_row_of_their_table():
    text = """g (int64[N,40] ids) => (float[] y) <float[7,5] table> {
        e = Gather(table, ids)  y = Relu(e)
    }"""
    made = made_for(text, count=16)
    values = np.concatenate([feed["ids"] for feed in made])
    assert np.unique(values).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert np.bincount(values.ravel()).min() > 50  # about 91 of 640 each
    assert "integers of 0..6" in made.notes[0]


def test_indices_through_casts_and_one_hot_codes():
    text = """g (int32[N,6] ids, int64[N,6] more) => (float[] y, float[] z)
        <int64 depth, float[2] values, float[5,3] table> {
            i = Cast<to = 7>(ids)  u = Flatten(i)  o = OneHot(u, depth, values)  y = Relu(o)
            z = Gather<axis = 1>(table, more)
    }"""
    made = made_for(parse(text, depth=9, values=[0, 1]), count=40)
    assert np.unique(np.concatenate([feed["ids"] for feed in made])).tolist() == [*range(9)]
    assert np.unique(np.concatenate([feed["more"] for feed in made])).tolist() == [0, 1, 2]


def test_masks_are_ones():
    text = """g (float[N,6] x, bool[N,6] keep) => (float[] y) <float z> { y = Where(keep, x, z) }"""
    made = made_for(text)
    assert made[0]["keep"].all()
    assert "ones" in made.notes[1]


STREAM = """g (float[batch,T] x, float[1,batch,4] state) => (float[] y, float[1,batch,4] stateN)
    <int64[1] axis, int64[1] first, float[4,1,16] w, float half> {
        u = Unsqueeze(x, axis)  c = Conv<strides = [16]>(u, w)  m = GlobalAveragePool(c)
        f = Flatten(m)  e = Unsqueeze(f, first)  h = Mul(state, half)  stateN = Add(e, h)
        y = Relu(stateN)
    }"""


def test_a_state_is_handed_on_from_frame_to_frame():

    proto = parse(STREAM, axis=1, first=0, half=0.5)
    made = made_for(proto, count=34)
    assert "zeros, then what the model puts out" in made.notes[1]
    assert made[0]["x"].shape == (1, 576)
    for n in range(34):
        before = run(proto, made[n - 1])["stateN"] if n % 32 else np.zeros((1, 1, 4), np.float32)
        assert np.allclose(made[n]["state"], before, atol=1e-6), n
    # one recording runs on over the edges of its frames, the next is another
    joined = np.concatenate([made[n]["x"][0] for n in range(34)])
    steps = np.square(np.diff(joined))
    edges = steps[575::576]
    assert edges[:31].mean() < 3 * steps.mean()
    assert not np.array_equal(made[0]["x"], made[32]["x"])


def test_an_input_is_a_state_by_name_not_by_shape_alone():
    text = """g (float[N,6] x, float[N,1] gate) => (float[N,6] y) <float[6,6] w> {
        p = MatMul(x, w)  y = Mul(p, gate)
    }"""
    assert all("N(0, 1)" in note for note in made_for(text).notes)


def test_the_same_symbol_is_one_size():
    text = """g (float[N,T] a, float[N,T] b) => (float[] y) { y = Add(a, b) }"""
    feed = made_for(text)[0]
    assert feed["a"].shape == feed["b"].shape
    assert not np.array_equal(feed["a"], feed["b"])


def test_an_unknown_rank_is_an_error():
    proto = parse("g (float[N] x) => (float[] y) { y = Relu(x) }")
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(CalibrationError, match="unknown rank"):
        synthesize(load(proto))


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_a_count_that_means_nothing(count):
    with pytest.raises(CalibrationError, match="count"):
        synthesize(load(parse(f"g (float[N,3,8,8] x) => (float[] y) {CONV}")), count=count)


# ---------------------------------------------------------------------- preprocessing that is given


def test_given_preprocessing_is_used():
    made = made_for(f"g (float[N,3,24,24] x) => (float[] y) {CONV}", preprocess="caffe")
    raw = made.samples[1]["x"][0].astype(np.float32)
    wanted = (raw[..., ::-1] - np.float32(PRESETS["caffe"].mean)).transpose(2, 0, 1)
    assert np.allclose(made[1]["x"][0], wanted, atol=1e-3)
    assert "as given" in made.notes[0]


def test_letterboxes_keep_their_frame():
    made = made_for(
        f"g (float[N,3,48,48] x) => (float[] y) {CONV}",
        count=12,
        preprocess=Preprocess(fit="letterbox-top-left", scale=1),
    )
    frames = [
        (feed["x"][0, :, -1] == 114).all() or (feed["x"][0, :, :, -1] == 114).all() for feed in made
    ]
    assert sum(frames) >= 8


def test_preprocessing_without_pictures_is_an_error():
    text = "g (float[N,4] x) => (float[] y) <float[4,3] w> { y = MatMul(x, w) }"
    with pytest.raises(CalibrationError, match="preprocessing is for pictures"):
        synthesize(load(parse(text)), preprocess="imagenet")
    with pytest.raises(RecipeError, match="imagenet"):
        synthesize(load(parse(f"g (float[N,3,8,8] x) => (float[] y) {CONV}")), preprocess="imgenet")


# ---------------------------------------------------------------------- BatchNormalization

NET = f"""g (float[N,3,{SIDE},{SIDE}] x) => (float[] y)
    <float[12,3,3,3] w, float[12] g1, float[12] b1, float[12] m1, float[12] var1,
     float[10,12,3,3] v, float[10] g2, float[10] b2, float[10] m2, float[10] var2> {{
        c1 = Conv(x, w)  n1 = BatchNormalization<epsilon = 0.0>(c1, g1, b1, m1, var1)  r1 = Relu(n1)
        c2 = Conv<strides = [2, 2]>(r1, v)
        n2 = BatchNormalization<epsilon = 0.0>(c2, g2, b2, m2, var2)  y = Relu(n2)
    }}"""


def trained(feeds):
    """The network with the statistics of normalization that training on these feeds would give."""
    rng = np.random.default_rng(7)
    given = {}
    for index, channels in ((1, 12), (2, 10)):
        gamma, beta = rng.uniform(0.5, 1.5, channels), rng.normal(0, 0.6, channels)
        given |= {f"g{index}": gamma, f"b{index}": beta, f"m{index}": 0, f"var{index}": 1}
        model = load(parse(NET, **{"g2": 1, "b2": 0, "m2": 0, "var2": 1, **given}))
        model.infer()
        moments = MomentSession(model, [f"c{index}"]).run(feeds)
        mean = moments.mean.mean(axis=0)
        given[f"m{index}"] = mean
        given[f"var{index}"] = moments.square.mean(axis=0) - mean**2
    return parse(NET, **given)


def feeds_under(preprocess, numbers=range(48), seed=1234):
    spec = TensorSpec("x", np.dtype(np.float32), (1, 3, SIDE, SIDE))
    pictures = natural.Pictures(seed)
    images = (Image.fromarray(pictures.draw(n, SIDE, SIDE)) for n in numbers)
    return [{"x": preprocess.apply(image, spec)} for image in images]


@pytest.mark.parametrize(
    ("name", "preprocess"),
    [
        ("-1..1", Preprocess(scale=1, mean=127.5, std=127.5)),
        ("0..1", Preprocess()),
        ("0..255", Preprocess(scale=1)),
        ("ImageNet's mean and deviation", IMAGENET),
        ("0..255 less ImageNet's mean", Preprocess(scale=1, mean=(123.68, 116.779, 103.939))),
    ],
)
@pytest.mark.parametrize("folded", [False, True])
def test_the_map_of_inputs_is_recovered(name, preprocess, folded):
    model = load(trained(feeds_under(preprocess)))
    if folded:
        FoldBatchNorm().apply(model, Context())
    made = synthesize(model, count=2)
    assert made.notes[0].startswith(f"synthetic samples: x: pictures, {name}, RGB: fits")
    spec = TensorSpec("x", np.dtype(np.float32), (1, 3, SIDE, SIDE))
    for feed, sample in zip(made, made.samples, strict=True):
        wanted = preprocess.apply(Image.fromarray(sample["x"][0]), spec)
        assert np.allclose(feed["x"], wanted, atol=1e-4)


def test_an_unusual_map_is_fitted():
    made = synthesize(load(trained(feeds_under(Preprocess(scale=1, mean=100, std=9000)))), count=2)
    pixels = np.concatenate([s["x"][0].ravel().astype(float) for s in made.samples])
    inputs = np.concatenate([f["x"][0].transpose(1, 2, 0).ravel() for f in made])
    slope, offset = np.polyfit(pixels, inputs, 1)
    assert 1 / slope == pytest.approx(9000, rel=0.2)
    assert -offset / slope == pytest.approx(100, abs=25)


def test_sounds_are_scaled_by_normalization():
    text = """g (float[N,1,2000] x) => (float[] y)
        <float[6,1,9] w, float[6] g, float[6] b, float[6] m, float[6] var> {
            c = Conv(x, w)  n = BatchNormalization(c, g, b, m, var)  y = Relu(n)
        }"""
    rng = np.random.default_rng(5)
    feeds = [{"x": natural.sound(rng, (1, 1, 2000)) * np.float32(3000)} for _ in range(60)]
    model = load(parse(text, g=1, b=0, m=0, var=1))
    model.infer()
    moments = MomentSession(model, ["c"]).run(feeds)
    mean = moments.mean.mean(axis=0)
    variance = moments.square.mean(axis=0) - mean**2
    made = synthesize(load(parse(text, g=1, b=0, m=mean, var=variance)))
    peaks = [
        np.abs(feed["x"]).max() / np.abs(sample["x"][0]).max()
        for feed, sample in zip(made, made.samples, strict=True)
    ]
    assert peaks == pytest.approx([peaks[0]] * len(peaks), rel=1e-5)
    assert 1500 < peaks[0] < 6000


def test_samples_are_taken_that_match_better_than_chance():
    # training saw bright pictures only
    numbers = [n for n in range(160) if natural.Pictures(1234).draw(n, SIDE, SIDE).mean() > 140]
    proto = trained(feeds_under(IMAGENET, numbers))
    model = load(proto)
    model.infer()
    known = NormTargets.of(model)
    session = MomentSession(model, known.names)
    made = synthesize(model, count=16, preprocess=IMAGENET)
    taken = known.divergence(session.run(made))
    chance = [
        known.divergence(session.run(feeds_under(IMAGENET, range(16 * i, 16 * i + 16), seed=0)))
        for i in range(POOL)
    ]
    assert taken < 0.25 * np.median(chance)
    assert taken < 0.5 * min(chance)
    assert f"16 of {16 * POOL} taken" in made.notes[1]


def test_normalization_tells_nothing_of_inputs_that_do_not_reach_it():
    text = """g (float[N,3,16,16] a, float[N,3,16,16] b) => (float[] y, float[] z)
        <float[4,3,3,3] w, float[4] g, float[4] beta, float[4] m, float[4] var> {
            c = Conv(a, w)  y = BatchNormalization(c, g, beta, m, var)  z = Conv(b, w)
        }"""
    made = made_for(text)
    assert "fits BatchNormalization" in made.notes[0]
    assert "assumed" in made.notes[1]


def test_without_normalization_bytes_and_normalized_pixels_are_told_apart():
    for preprocess, wanted in ((Preprocess(scale=1), "0..255"), (Preprocess(), "0..1")):
        model = load(trained(feeds_under(preprocess)))
        FoldBatchNorm().apply(model, Context())
        made = synthesize(load(model.to_proto()), count=2)
        assert "assumed to be" in made.notes[0]
        top = max(feed["x"].max() for feed in made)
        assert (top > 100) == (wanted == "0..255")


def test_without_any_hint_pixels_are_assumed_to_be_normalized():
    text = "g (float[N,3,8,8] x) => (float[] y) { f = Flatten(x)  y = Softmax(f) }"
    made = made_for(text)
    assert "assumed to be -1..1, RGB: nothing in the model tells" in made.notes[0]
    assert made[0]["x"].min() >= -1
    assert made[0]["x"].max() <= 1


# ---------------------------------------------------------------------- the whole


def same(one, two):
    return all(
        np.array_equal(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a
    )


def test_the_same_seed_gives_the_same_samples_on_any_number_of_threads():
    proto = trained(feeds_under(IMAGENET))
    first = synthesize(load(proto), count=4, seed=3, threads=1)
    again = synthesize(load(proto), count=4, seed=3, threads=3)
    assert first.notes == again.notes
    assert same(first, again)
    assert not same(first, synthesize(load(proto), count=4, seed=4))


def test_the_model_is_left_alone():
    model = load(trained(feeds_under(IMAGENET, range(4))))
    before = model.digest()
    synthesize(model, count=2)
    assert model.digest() == before


def test_samples_are_a_sequence_that_calibration_takes_and_reports():
    proto = parse(f"g (float[N,3,12,12] x) => (float[] y) {CONV}")
    made = synthesize(load(proto), count=5)
    assert same(made[1:3], [made[1], made[2]])
    data = Calibration(made)
    assert data.is_synthetic
    assert len(data.bind(Session(proto).inputs)) == 5
    assert same(data.bind(Session(proto).inputs), made)
    _, report = PassManager(Clean())(load(proto), made)
    assert set(made.notes) <= set(report.notes)
    assert Calibration(list(made)).notes == ()


def test_long_work_shows_its_progress():
    seen = {}

    class Progress:
        def task(self, what, total):
            from contextlib import contextmanager

            @contextmanager
            def task():
                seen[what] = [0, total]
                yield lambda steps: seen[what].__setitem__(0, seen[what][0] + steps)

            return task()

        def say(self, line):
            pass

    proto = trained(feeds_under(IMAGENET, range(8)))
    synthesize(load(proto), count=3, progress=Progress())
    assert seen["typical samples"] == [3 * POOL, 3 * POOL]
    assert seen["scale of x"][0] > 0


def test_outputs_on_made_up_samples_are_finite():
    proto = trained(feeds_under(IMAGENET, range(8)))
    for feed in synthesize(load(proto), count=3):
        assert np.isfinite(run(proto, feed)["y"]).all()
