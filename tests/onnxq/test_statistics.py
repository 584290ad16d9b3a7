import json
import math
import threading

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq import statistics
from onnxq.errors import CalibrationError, ModelError, RecipeError
from onnxq.kernels import _jit, ranges
from onnxq.kernels import observe as kernels
from onnxq.runtime import Session
from onnxq.statistics import Statistics, TensorStatistics, observe

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
tiny (float[N,M] x, int64[1] k) => (float[N,M] y, int64[2] shape, float16[N,M] half) {
    clipped = Relu(x)
    y = Sub(clipped, x)
    shape = Shape(x)
    half = Cast<to=10>(x)
}
"""
NAMES = ("x", "k", "clipped", "y", "shape", "half")
X = np.arange(8, dtype=np.float32)
X.flags.writeable = False
METHODS = ("minmax", "moving-average", "percentile", "entropy", "mse")


@pytest.fixture(scope="module")
def session():
    data = onnx.parser.parse_model(MODEL).SerializeToString()
    outputs = [name for name in NAMES if name not in ("x", "k")]
    return Session(data, outputs=outputs, threads=1)


def draw(count, seed=0, shape=(3, 50)):
    rng = np.random.default_rng(seed)
    k = np.array([0])
    return [{"x": rng.normal(i / 9, 1, shape).astype(np.float32), "k": k} for i in range(count)]


def tensor(x, histogram=True):
    """Statistics of one array, as one sample."""
    bins, grid = np.zeros(kernels.BINS, np.int64), kernels.empty_grid()
    m = kernels.observe(x, bins, grid)
    return TensorStatistics(
        *(m.size, m.minimum, m.maximum, m.total, m.squares, m.zeros, 1, m.minimum, m.maximum),
        *((bins, int(grid[2]), int(grid[3])) if histogram else ()),
    )


def assert_same(a, b, rel=0.0):
    for name in ("bins", "channels"):
        assert (getattr(a, name) is None) == (getattr(b, name) is None)
    if a.channels is not None:
        np.testing.assert_array_equal(a.channels, b.channels)
    if a.bins is not None:
        np.testing.assert_array_equal(a.bins, b.bins)
        assert (a.exponent, a.offset) == (b.exponent, b.offset)
    for name in ("count", "minimum", "maximum", "zeros", "batches", "ema_minimum", "ema_maximum"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.sum == pytest.approx(b.sum, rel=rel, abs=1e-9 * rel)
    assert a.sum_squares == pytest.approx(b.sum_squares, rel=rel)


@pytest.fixture
def no_thread_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


# ------------------------------------------------------------------ observe


def test_observe(session, no_thread_left):
    samples = draw(7)
    steps = []
    found = observe(session, NAMES, iter(samples), progress=steps.append)
    assert list(found) == ["x", "clipped", "y", "half"]  # integers have no statistics
    assert steps == [1] * 7
    x = np.stack([s["x"] for s in samples])
    for name, values in {"x": x, "clipped": np.maximum(x, 0), "y": np.maximum(x, 0) - x}.items():
        t = found[name]
        assert t.count == x.size
        assert t.batches == 7
        assert (t.minimum, t.maximum) == (values.min(), values.max())
        assert t.zeros == np.count_nonzero(values == 0)
        assert t.sum == pytest.approx(values.sum(dtype=np.float64))
        assert t.mean == pytest.approx(values.mean(dtype=np.float64))
        assert t.std == pytest.approx(values.std(dtype=np.float64))
        low, high = values[0].min(), values[0].max()
        for sample in values[1:]:
            low, high = 0.99 * low + 0.01 * sample.min(), 0.99 * high + 0.01 * sample.max()
        assert (t.ema_minimum, t.ema_maximum) == pytest.approx((low, high))
        expected = tensor(values)
        np.testing.assert_array_equal(t.bins, expected.bins)
        assert (t.exponent, t.offset) == (expected.exponent, expected.offset)


def test_observe_without_histograms(session):
    with_bins = observe(session, ["x"], draw(3))["x"]
    without = observe(session, ["x"], draw(3), histogram=False)["x"]
    assert without.bins is None
    with_bins.bins = None
    assert_same(with_bins, without)


def test_extremes_of_channels(session):
    samples = draw(7)
    found = observe(session, NAMES, samples, channels=["clipped", "half"])
    assert [n for n, t in found.items() if t.channels is not None] == ["clipped", "half"]
    x = np.concatenate([s["x"] for s in samples])
    for name, values in {"clipped": np.maximum(x, 0), "half": x.astype(np.float16)}.items():
        np.testing.assert_array_equal(found[name].channels, [values.min(0), values.max(0)])


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_channels_lie_along_the_second_axis(rank):
    shape = (2, 5, 3, 1, 4)[:rank]
    sides = ",".join("N" * rank)
    text = f"g (float[{sides}] x) => (float[{sides}] y) {{ y = Neg(x) }}"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = observe(Session(proto.SerializeToString()), ["y"], [{"x": x}], channels=["y"])
    rows = np.moveaxis(-x, 1, 0).reshape(5, -1)
    np.testing.assert_array_equal(found["y"].channels, [rows.min(1), rows.max(1)])


def test_channels_that_are_not_there(session):
    k = np.array([0])
    samples = [{"x": np.ones((2, width), np.float32), "k": k} for width in (3, 4)]
    with pytest.raises(ModelError, match=r"number of its channels varies.*tensor y"):
        observe(session, ["y"], samples, channels=["y"])
    text = "g (float[N] x) => (float[N] y) { y = Neg(x) }"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    flat = Session(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"no channels.*tensor y"):
        observe(flat, ["y"], [{"x": np.ones(3, np.float32)}], channels=["y"])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(session, threads):
    expected = observe(session, NAMES, draw(20), channels=["y"])
    found = observe(session, NAMES, draw(20), channels=["y"], threads=threads)
    assert list(found) == list(expected)
    for name in expected:
        assert_same(found[name], expected[name])


@pytest.mark.parametrize("threads", [0, 2])
def test_sessions_with_more_threads(threads):
    data = onnx.parser.parse_model(MODEL).SerializeToString()
    parallel = Session(data, outputs=["y"], threads=threads)
    assert observe(parallel, ["y"], draw(5))["y"].count == 750


def test_shapes_may_vary(session):
    samples = [draw(1, i, (i, 4))[0] for i in (3, 0, 70, 1)]
    found = observe(session, ["clipped"], samples)["clipped"]
    assert found.count == 4 * 74
    assert found.batches == 4
    assert found.minimum == 0


def test_readers_may_use_their_arrays_again(session):
    def samples():
        x, k = np.empty((3, 50), np.float32), np.array([0])
        for sample in draw(20):
            x[:] = sample["x"]
            yield {"x": x, "k": k}

    found, expected = (
        observe(session, ["y"], samples(), threads=3),
        observe(session, ["y"], draw(20)),
    )
    assert_same(found["y"], expected["y"])


def test_tensors_without_values(session):
    found = observe(session, ["clipped"], draw(2, shape=(0, 4)))["clipped"]
    assert found.count == 0
    assert (found.mean, found.std) == (0, 0)
    for method in METHODS:
        assert found.range(method) == (0, 0)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_inputs_of_other_types(dtype):
    kind = {np.float16: "float16", np.float64: "double"}[dtype]
    text = f"g ({kind}[N] x) => ({kind}[N] y) {{ y = Neg(x) }}"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    x = np.random.default_rng(0).normal(size=100).astype(dtype)
    found = observe(Session(proto.SerializeToString()), ["x", "y"], [{"x": x}])
    assert found["x"].minimum == -found["y"].maximum == x.astype(np.float32).min()


def test_memory_bounds_the_samples_in_flight(session, monkeypatch):
    started, most = 0, 0

    def samples():
        nonlocal started
        for sample in draw(12):
            started += 1
            yield sample

    def progress(steps):
        nonlocal started, most
        most = max(most, started)
        started -= steps

    observe(session, ["x"], samples(), progress=progress, threads=4)
    assert most <= 5
    most = 0
    monkeypatch.setattr(statistics, "_ROOM", 1)
    monkeypatch.setattr(statistics, "cores", lambda: 8)
    observe(session, ["x"], samples(), progress=progress)
    assert most <= 2


def test_no_samples(session, no_thread_left):
    with pytest.raises(CalibrationError, match="no samples"):
        observe(session, ["x"], [])


def test_unknown_tensor(session):
    with pytest.raises(ModelError, match="does not put out 'nope'"):
        observe(session, ["x", "nope"], draw(1))


@pytest.mark.parametrize("histogram", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(session, no_thread_left, bad, histogram):
    samples = draw(9)
    samples[4]["x"][1, 7] = samples[6]["x"][0, 0] = bad
    message = r"1 of 150 values are NaN or infinite \(tensor x, sample 4\)"
    with pytest.raises(CalibrationError, match=message):
        observe(session, ["x"], samples, histogram=histogram, threads=3)


def test_samples_that_do_not_fit(session, no_thread_left):
    samples = draw(5)
    samples[3] = {"x": np.zeros((2, 2)), "k": np.array([0])}
    with pytest.raises(CalibrationError, match="does not fit the input"):
        observe(session, ["clipped"], samples)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["samples", "progress"])
def test_interruptions(session, no_thread_left, error, place):
    def samples():
        yield from draw(5)
        if place == "samples":
            raise error

    def progress(steps):
        if place == "progress":
            raise error

    with pytest.raises(error):
        observe(session, ["clipped"], samples(), progress=progress)


# ------------------------------------------------------------------ ranges


@pytest.fixture(scope="module")
def laplace():
    return tensor(np.random.default_rng(0).laplace(0.5, 1, 50_000).astype(np.float32))


def test_methods(laplace):
    low, high = laplace.range("minmax")
    assert (low, high) == (laplace.minimum, laplace.maximum)
    assert laplace.range("moving-average") == (low, high)
    for method in ("percentile", "entropy", "mse"):
        for symmetric in (False, True):
            a, b = laplace.range(method, symmetric=symmetric)
            assert low <= a < -1
            assert 1 < b <= high
    assert laplace.range("percentile", percentile=99)[1] < laplace.range("percentile")[1]
    assert laplace.range("mse", bits=4)[1] < laplace.range("mse", bits=8)[1] <= high


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_mse_has_the_least_noise(laplace, bits):
    noise = {m: laplace.noise(*laplace.range(m, bits=bits), 2**bits) for m in METHODS}
    assert noise["mse"] <= min(noise.values()) * 1.001


@given(
    hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-9, 9, width=32)),
    st.sampled_from(METHODS),
    st.booleans(),
)
def test_ranges_hold_zero_and_stay_within_the_values(x, method, symmetric):
    low, high = tensor(x).range(method, symmetric=symmetric)
    assert min(x.min(), 0) <= low <= 0 <= high <= max(x.max(), 0)


def test_moving_average_stays_within_the_values(session):
    samples = [{"x": np.full((1, 1), 5.9999, np.float32), "k": np.array([0])}] * 500
    t = observe(session, ["x"], samples)["x"]
    assert t.range("moving-average") == t.range("minmax")


@pytest.mark.parametrize(
    ("method", "message"),
    [("msee", "did you mean 'mse'"), ("kl", "take minmax, moving-average, percentile, entropy")],
)
def test_unknown_method(laplace, method, message):
    with pytest.raises(RecipeError, match=message):
        laplace.range(method)


@pytest.mark.parametrize("options", [{"bits": 1}, {"percentile": 0}, {"percentile": 100.1}])
def test_numbers_that_mean_nothing(laplace, options):
    with pytest.raises(RecipeError, match="means nothing"):
        laplace.range("percentile", **options)


def test_ranges_that_need_a_histogram():
    t = tensor(np.float32([1, 2]), histogram=False)
    assert t.range("minmax") == (0, 2)
    for method in ("percentile", "entropy", "mse"):
        with pytest.raises(CalibrationError, match="no histogram was kept"):
            t.range(method)
    with pytest.raises(CalibrationError, match="no histogram was kept"):
        t.noise(0, 1, 256)


# ------------------------------------------------------------------ merge, save, load


def test_merged_shards_are_the_whole(session):
    samples = draw(9)
    whole = observe(session, NAMES, samples, channels=["x", "y"])
    parts = [
        observe(session, NAMES, samples[a:b], channels=["x", "y"])
        for a, b in ((0, 2), (2, 3), (3, 9))
    ]
    merged = parts[2].merge(parts[0]).merge(parts[1])
    for name, t in whole.items():
        m = merged[name]
        assert m.ema_minimum == min(p[name].ema_minimum for p in parts)
        m.ema_minimum, m.ema_maximum = t.ema_minimum, t.ema_maximum
        assert_same(m, t, rel=1e-12)


def test_merging_leaves_both_alone():
    a, b = tensor(np.float32([1, 2])), tensor(np.float32([-300]))
    before = a.bins.copy(), b.bins.copy()
    merged = a.merge(b)
    assert merged.bins.sum() == 3
    np.testing.assert_array_equal(a.bins, before[0])
    np.testing.assert_array_equal(b.bins, before[1])
    assert (a.exponent, a.maximum) == (-10, 2)


def test_merging_nothing(laplace):
    empty = TensorStatistics(bins=np.zeros(kernels.BINS, np.int64))
    assert_same(empty.merge(laplace), laplace)
    assert_same(laplace.merge(empty), laplace)
    assert laplace.merge(TensorStatistics()).bins is None


def test_channels_are_merged_where_both_have_them():
    a, b = (tensor(np.float32(v)) for v in ([1, 4], [2, 3]))
    a.channels, b.channels = np.float32([[1, 3], [2, 4]]), np.float32([[2, 2], [2, 3]])
    np.testing.assert_array_equal(a.merge(b).channels, [[1, 2], [2, 4]])
    np.testing.assert_array_equal(a.channels, [[1, 3], [2, 4]])
    b.channels = b.channels[:, :1]
    assert a.merge(b).channels is None
    assert a.merge(tensor(np.float32([0]))).channels is None


def test_histograms_that_do_not_merge(laplace):
    with pytest.raises(CalibrationError, match="2048 and 16 bins do not merge"):
        laplace.merge(TensorStatistics(bins=np.zeros(16, np.int64)))


def test_merged_names_and_metadata():
    a = Statistics({"a": tensor(np.float32([1]))}, {"model": "m", "who": "a"})
    b = Statistics({"a": tensor(np.float32([2])), "b": tensor(np.float32([3]))}, {"who": "b"})
    merged = a.merge(b)
    assert {name: t.count for name, t in merged.items()} == {"a": 2, "b": 1}
    assert merged.metadata == {"model": "m", "who": "a"}
    assert repr(merged) == "<Statistics of 2 tensors>"
    assert len(a) == 1


def test_save_and_load(session, laplace, tmp_path):
    tensors = dict(observe(session, NAMES, draw(3), channels=["y"])) | {"λ/é:0": laplace}
    tensors |= {"no bins": tensor(np.float32([-1]), histogram=False), "none": TensorStatistics()}
    tensors["empty"] = TensorStatistics(bins=np.zeros(kernels.BINS, np.int64))
    saved = Statistics(tensors, {"model": "abc", "samples": "3"})
    saved.save(tmp_path / "s.npz")
    assert [f.name for f in tmp_path.iterdir()] == ["s.npz"]
    loaded = Statistics.load(tmp_path / "s.npz")
    assert list(loaded) == list(saved)
    assert loaded.metadata == saved.metadata
    for name, t in saved.items():
        assert_same(loaded[name], t)
        assert loaded[name].range("minmax") == t.range("minmax")
    first = (tmp_path / "s.npz").read_bytes()
    loaded.save(tmp_path / "s.npz")  # over itself, to the same bytes
    assert (tmp_path / "s.npz").read_bytes() == first
    Statistics().save(tmp_path / "empty.npz")
    assert len(Statistics.load(tmp_path / "empty.npz")) == 0


def test_save_where_nothing_can_be_written(tmp_path):
    with pytest.raises(CalibrationError, match=r"cannot write.*none.s\.npz"):
        Statistics().save(tmp_path / "none" / "s.npz")


def test_a_failed_save_leaves_no_file(tmp_path, monkeypatch, laplace):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(CalibrationError, match="No space left"):
        Statistics({"x": laplace}).save(tmp_path / "s.npz")
    assert list(tmp_path.iterdir()) == []


def write(path, about, **arrays):
    np.savez(path, about=np.array(json.dumps(about)), **arrays)


def test_broken_files(tmp_path, laplace):
    good = tmp_path / "good.npz"
    Statistics({"x": laplace}).save(good)
    data = good.read_bytes()
    file = tmp_path / "broken.npz"
    for broken in (b"", b"abc", data[: len(data) // 2], data[:200] + bytes(40) + data[240:]):
        file.write_bytes(broken)
        with pytest.raises(CalibrationError, match=r"not a file of statistics.*broken\.npz"):
            Statistics.load(file)
    with pytest.raises(CalibrationError, match="no such file"):
        Statistics.load(tmp_path / "none.npz")


def test_files_that_are_something_else(tmp_path, laplace):
    file = tmp_path / "other.npz"
    with np.load(_saved(tmp_path, laplace)) as good:
        arrays = {name: good[name] for name in good}
    about = json.loads(str(arrays.pop("about")))
    wrong = arrays["bins0"].copy()
    wrong[0] += 1
    low, high = laplace.minimum, laplace.maximum
    for change, text in (
        ({"channels0": np.float32([[low, 0], [1, 2 * high]])}, "do not add up"),
        ({"channels0": np.float32([[low / 2, 0], [1, high]])}, "do not add up"),
        ({"channels0": np.float32([low, high])}, "do not add up"),
        ({"channels0": np.float32([[low], [1], [high]])}, "do not add up"),
        ({"about": about | {"format": "other"}}, "its format is 'other'"),
        ({"about": {}}, "format"),
        ({"bins0": wrong}, "do not add up"),
        ({"bins0": arrays["bins0"].astype(np.float32)}, "do not add up"),
        ({"bins0": arrays["bins0"][None]}, "do not add up"),
        ({"bins0": arrays["bins0"][:100]}, "do not add up"),
        ({"zeros": arrays["zeros"] - 1}, "do not add up"),
        ({"exponent": arrays["exponent"] - 9}, "do not add up"),
        ({"offset": arrays["offset"] + 1}, "do not add up"),
        ({"maximum": arrays["maximum"] * np.inf}, "do not add up"),
        ({"minimum": arrays["minimum"] * np.nan}, "do not add up"),
        ({"bins0": np.array([print])}, "pickled Python objects"),
        ({"count": np.array([])}, "not a file of statistics"),
    ):
        write(file, **({"about": about} | arrays | change))
        with pytest.raises(CalibrationError, match=text):
            Statistics.load(file)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(CalibrationError, match="not a file of statistics"):
        Statistics.load(tmp_path / "array.npy")


def _saved(folder, t):
    Statistics({"x": t}).save(folder / "saved.npz")
    return folder / "saved.npz"


# ------------------------------------------------------------------ compilation


def test_kernels_are_compiled_in_one_form(session, laplace, tmp_path):
    loaded = Statistics.load(_saved(tmp_path, laplace))["x"]
    for t in (laplace, loaded, loaded.merge(laplace), tensor(np.full(3, -1.0)), tensor(X[::2])):
        for method in METHODS:
            t.range(method)
            t.range(method, bits=np.int64(4), symmetric=True)
        t.noise(np.float32(-1), 1, 256)
    kernels.moments(X)
    observe(session, NAMES, draw(3))
    modules = (kernels.__name__, ranges.__name__)
    forms = [getattr(k, "signatures", []) for k in _jit._kernels if k.__module__ in modules]
    assert [f for f in forms if len(f) > 1] == []


def test_std_is_never_imaginary():
    t = TensorStatistics(count=3, sum=3 * 0.1, sum_squares=3 * 0.1**2 * (1 - 1e-15))
    assert t.std == 0
    assert not math.isnan(t.std)
