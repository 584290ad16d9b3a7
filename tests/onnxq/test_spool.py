"""Samples that can be read only once: every pass finds all of them, in any order of reading."""

import errno
import gc
import os
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from itertools import islice, permutations, product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnxq.calibration import Calibration
from onnxq.errors import CalibrationError
from onnxq.signature import TensorSpec
from onnxq.spool import Spool

X = TensorSpec("x", np.dtype("float32"), ("N", 4))


class Source:
    """An iterator that counts what is taken from it."""

    def __init__(self, count):
        self.taken, self.count = 0, count

    def __iter__(self):
        return self

    def __next__(self):
        if self.taken == self.count:
            raise StopIteration
        self.taken += 1
        return sample(self.taken - 1)


class Reader:
    """As onnxruntime's CalibrationDataReader: not an iterator that works, not to be rewound."""

    def __init__(self, count):
        self.source = Source(count)

    def get_next(self):
        return next(self.source, None)


def generator(count):
    yield from Source(count)


def sample(index):
    return {"x": np.full((1, 4), index, np.float32)}


def numbers(feeds):
    return [int(feed["x"][0, 0]) for feed in feeds]


# ------------------------------------------------------------------------------- interleavings


@pytest.mark.parametrize("make", [generator, Source, Reader])
def test_a_second_pass_finds_what_the_first_one_found(make):
    samples = Calibration(make(5)).bind([X])
    for _ in range(3):
        assert numbers(samples) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("make", [generator, Source, Reader])
@pytest.mark.parametrize("read", range(6))
def test_a_first_pass_that_breaks_off_loses_nothing(make, read):
    samples = Calibration(make(5)).bind([X])
    assert numbers(islice(samples, read)) == list(range(read))
    assert numbers(samples) == [0, 1, 2, 3, 4]
    assert numbers(samples) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("order", sorted(set(permutations("AAABBB"))))
def test_any_two_passes_side_by_side(order):
    source = Source(2)
    samples = Calibration(source).bind([X])
    passes, found = {"A": iter(samples), "B": iter(samples)}, {"A": [], "B": []}
    for name in order:  # two samples each, then the end
        found[name] += islice(passes[name], 1)
    assert {name: numbers(feeds) for name, feeds in found.items()} == {"A": [0, 1], "B": [0, 1]}
    assert source.taken == 2


@pytest.mark.parametrize(("first", "second", "third"), list(product([1, 2, 4, None], repeat=3)))
def test_limits_mix(first, second, third):
    source = Source(3)
    data = Calibration(source)
    most = 0
    for limit in (first, second, third):
        limited = data if limit is None else data.limited(limit)
        wanted = min(limit or 3, 3)
        assert numbers(limited.bind([X])) == list(range(wanted))
        most = max(most, wanted)
        assert source.taken == most  # nothing is read before it is wanted
    assert numbers(data.bind([X])) == [0, 1, 2]


def test_a_pass_that_is_left_open_goes_on_later():
    samples = Calibration(Source(4)).bind([X])
    left = iter(samples)
    assert numbers(islice(left, 2)) == [0, 1]
    assert numbers(samples) == [0, 1, 2, 3]
    assert numbers(left) == [2, 3]


def test_passes_in_many_threads():
    source = Source(200)
    samples = Calibration(source).bind([X])
    found = [[] for _ in range(8)]
    threads = [threading.Thread(target=lambda f=f: f.extend(numbers(samples))) for f in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [list(range(200))] * 8
    assert source.taken == 200


def test_a_pass_over_a_model_with_other_inputs():
    data = Calibration(np.full((1, 4), i, np.float64) for i in range(3))
    half = TensorSpec("y", np.dtype("float16"), ("N", 4))
    assert numbers(data.bind([X])) == [0, 1, 2]
    assert [feed["y"].dtype for feed in data.bind([half])] == [np.float16] * 3


def test_no_samples():
    for make in (generator, Source, Reader):
        samples = Calibration(make(0)).bind([X])
        for _ in range(2):
            with pytest.raises(CalibrationError, match="there are no samples"):
                list(samples)


# ------------------------------------------------------------------------------- values


def stored(*given):
    spool = Spool(iter(given))
    first, second = list(spool), list(spool)
    assert spool.count == len(first) == len(second) == len(given)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_equal(a, b)
    return second


@pytest.mark.parametrize(
    "dtype",
    [*("?", "i1", "u1", "i2", "u8", "f2", "f4", "f8", "c8", ">f4", ">i8", "U3", "S3", "M8[s]")],
)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (3, 0, 2), (1, 2, 3, 4)])
def test_arrays_of_every_type_and_shape_come_back(dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    unnamed, named = stored(array, {"a": array, "é \n": array})
    assert list(named) == ["a", "é \n"]
    for got in (unnamed, *named.values()):
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(got, array)
        assert got.flags.writeable


def test_bits_come_back():
    values = np.array([np.nan, -0.0, np.inf, 5e-324])
    values[0] = np.frombuffer(b"\x01\0\0\0\0\0\xf8\x7f")[0]
    assert stored(values)[0].tobytes() == values.tobytes()


def test_any_order_in_memory_comes_back():
    base = np.arange(24.0).reshape(2, 3, 4)
    for array in (
        base.T,
        base[:, ::-1, ::2],
        np.asfortranarray(base),
        np.broadcast_to(base, (2, 2, 3, 4)),
    ):
        np.testing.assert_array_equal(stored({"x": array})[0]["x"], array)


def test_texts_lists_and_scalars_come_back():
    texts = np.array([["a", "b\0"], ["", "ü€😀"]], object)
    (got,) = stored({"text": texts, "list": [[1, 2], [3, 4]], "scalar": 7})
    assert got["text"].dtype == object
    assert got["text"].tolist() == texts.tolist()
    assert got["list"].tolist() == [[1, 2], [3, 4]]
    assert (got["scalar"].shape, int(got["scalar"])) == ((), 7)


def test_samples_of_differing_names_and_shapes():
    given = [{"a": np.ones(n), "b": np.zeros((n, 2))} for n in (3, 1, 5)] + [{}, {"c": np.ones(1)}]
    for got, wanted in zip(stored(*given), given, strict=True):
        np.testing.assert_equal(got, wanted)


def test_a_buffer_that_the_source_uses_again():
    buffer = np.zeros((1, 4), np.float32)

    def source():
        for i in range(3):
            buffer[:] = i
            yield {"x": buffer}

    samples = Calibration(source()).bind([X])
    for _ in range(2):
        found = []
        for feed in samples:
            found.append(int(feed["x"][0, 0]))
            feed["x"][:] = 99  # nor do readers disturb one another
        assert found == [0, 1, 2]


def test_what_cannot_be_kept():
    for given, says in (
        ({"x": np.zeros(2, ml_dtypes.bfloat16)}, "arrays of type bfloat16 cannot be kept"),
        ({"x": [[1], [2, 3]]}, "'x' in sample 0"),
        ({"x": object()}, "got Python objects"),
        ((1, 2), "wanted a dict of arrays by input name, got tuple (sample 0)"),
    ):
        with pytest.raises(CalibrationError) as caught:
            next(iter(Spool(iter([given]))))
        assert says in str(caught.value)


# ------------------------------------------------------------------------------- faults


def test_a_source_that_fails_is_not_taken_for_one_that_ended():
    def source():
        yield sample(0)
        raise ZeroDivisionError

    samples = Calibration(source()).bind([X])
    with pytest.raises(ZeroDivisionError):
        list(samples)
    assert numbers(islice(samples, 1)) == [0]
    with pytest.raises(CalibrationError, match=r"broke off in an earlier pass \(sample 1\); give"):
        list(samples)


def test_a_sample_that_does_not_fit_is_refused_in_every_pass():
    samples = Calibration(iter([sample(0), {"y": np.ones(3)}, sample(2)])).bind([X])
    for _ in range(2):
        with pytest.raises(CalibrationError, match=r"wanted input 'x', got 'y' \(sample 1\)"):
            list(samples)
    samples = Calibration(iter([sample(0), {"x": object()}, sample(2)])).bind([X])
    for says in ("got Python objects", "broke off in an earlier pass"):
        with pytest.raises(CalibrationError, match=says):
            list(samples)


class Full:
    """A temporary file on a disk that has room for so many bytes."""

    def __init__(self, room):
        self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by its user
        self.room = room

    def write(self, data):
        part = data[: self.room]
        if not part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(part)
        return self.file.write(part)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 5, 50, 150])
def test_a_full_disk(monkeypatch, room):
    full = Full(room)
    monkeypatch.setattr("onnxq.spool.tempfile.TemporaryFile", lambda **_: full)
    samples = Calibration(Source(9)).bind([X])
    says = r"only once are kept in a temporary file: No space left on device \(.+\); point TMPDIR"
    with pytest.raises(CalibrationError, match=says):
        list(samples)
    with pytest.raises(CalibrationError, match="broke off in an earlier pass"):
        list(samples)
    del samples
    gc.collect()
    assert full.closed


def test_a_disk_that_writes_a_part_at_a_time(monkeypatch):
    slow = Full(1 << 20)
    write = slow.write
    slow.write = lambda data: write(data[:7])
    monkeypatch.setattr("onnxq.spool.tempfile.TemporaryFile", lambda **_: slow)
    samples = Calibration(Source(3)).bind([X])
    assert numbers(samples) == numbers(samples) == [0, 1, 2]


def test_no_folder_for_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(
        CalibrationError, match=r"No such file or directory \(.*gone\); point TMPDIR"
    ):
        list(Calibration(Source(3)).bind([X]))


# ------------------------------------------------------------------------------- the file


def test_the_file_goes_with_the_calibration(monkeypatch, tmp_path):
    files = []
    make = tempfile.TemporaryFile
    monkeypatch.setattr(
        "onnxq.spool.tempfile.TemporaryFile", lambda **k: files.append(make(**k)) or files[-1]
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = Calibration(Source(3))
    assert files == []
    limited = data.limited(2)
    numbers(limited.bind([X]))
    numbers(data.bind([X]))
    assert len(files) == 1
    del data
    gc.collect()
    assert not files[0].closed
    assert numbers(limited.bind([X])) == [0, 1]
    del limited
    gc.collect()
    assert files[0].closed
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import os, sys
import numpy as np
from onnxq.calibration import Calibration
from onnxq.signature import TensorSpec
data = Calibration({"x": np.ones((1, 4), np.float32)} for _ in range(3))
samples = data.bind([TensorSpec("x", np.dtype("float32"), ("N", 4))])
keep = iter(samples)
next(keep)
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0", "os._exit(3)"])
def test_nothing_is_left_at_exit(tmp_path, end):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT + end],
        cwd=Path(__file__).parents[2], env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == {"": 0, "1 / 0": 1}.get(end, 3), done.stderr
    assert "warning" not in done.stderr.lower()
    if os.name == "posix" or "_exit" not in end:
        left = [f.name for f in tmp_path.iterdir()]
        assert [n for n in left if n != ".ses"] == []  # .ses is onnxruntime's own


def test_memory_does_not_grow_with_the_number_of_samples():
    row = 64 << 10  # bytes

    def source():
        for _ in range(100):
            yield {"x": np.zeros((1, row // 4), np.float32)}

    samples = Calibration(source()).bind([TensorSpec("x", np.dtype("float32"), ("N", row // 4))])
    tracemalloc.start()
    for _ in range(2):
        for _ in samples:
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * row
