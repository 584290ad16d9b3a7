import io
import os
import re
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from onnxq import readers
from onnxq.calibration import Calibration
from onnxq.errors import CalibrationError, RecipeError
from onnxq.pictures import Preprocess
from onnxq.readers import natural, spread
from onnxq.signature import TensorSpec


def spec(name, *shape, dtype="float32"):
    return TensorSpec(name, np.dtype(dtype), shape)


X = spec("x", "N", 3, 4)
IDS = spec("ids", "batch", "sequence", dtype="int64")
MASK = spec("mask", "batch", "sequence", dtype="int64")


def rows(count, *shape, start=0):
    """Rows that differ: row i starts at i * size."""
    size = int(np.prod(shape))
    values = np.arange(start, start + count * size, dtype=np.float32)
    return values.reshape(count, *shape)


def feeds(source, *inputs, optional=(), **options):
    return list(Calibration(source, **options).bind(inputs or [X], optional))


def same(got, wanted):
    assert len(got) == len(wanted)
    for feed, arrays in zip(got, wanted, strict=True):
        assert list(feed) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(feed[name], array)
            assert feed[name].dtype == np.asarray(array).dtype
            assert type(feed[name]) is np.ndarray


def refused(source, *inputs, match, **options):
    with pytest.raises(CalibrationError) as caught:
        feeds(source, *inputs, **options)
    for part in [match] if isinstance(match, str) else match:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def picture(path, value=0, size=(4, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


# ------------------------------------------------------------------------------- folders


def test_a_folder_of_npz_gives_one_feed_per_file(tmp_path):
    data = rows(3, 1, 3, 4)
    for i in (0, 1, 2):
        np.savez(tmp_path / f"{i}.npz", x=data[i])
    same(feeds(tmp_path), [{"x": d} for d in data])
    same(feeds(str(tmp_path)), [{"x": d} for d in data])


def test_several_inputs_come_in_the_order_of_the_model_and_may_vary_in_shape(tmp_path):
    wanted = []
    for i, length in enumerate((5, 9, 2)):
        arrays = {"ids": np.arange(length)[None], "mask": np.ones((1, length), np.int64)}
        np.savez(tmp_path / f"{i}.npz", **dict(reversed(arrays.items())))
        wanted.append(arrays)
    same(feeds(tmp_path, IDS, MASK), wanted)


def test_a_batch_in_one_file_stays_one_feed(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=rows(8, 3, 4))
    same(feeds(tmp_path), [{"x": rows(8, 3, 4)}])


def test_npy_files_get_the_batch_dimension_that_they_lack(tmp_path):
    data = rows(2, 3, 4)
    np.save(tmp_path / "with.npy", data[:1])
    np.save(tmp_path / "without.NPY", data[1])
    (tmp_path / "without.NPY.npy").rename(tmp_path / "without.NPY")
    same(feeds(tmp_path), [{"x": data[:1]}, {"x": data[1:]}])


def test_fortran_order_and_byte_order_do_not_matter(tmp_path):
    data = rows(5, 3, 4)
    np.save(tmp_path / "a.npy", np.asfortranarray(data.astype(">f4")))
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(data.astype(">f8")))
    for name in ("a.npy", "a.npz"):
        same(feeds(tmp_path / name), [{"x": data[i : i + 1]} for i in range(5)])
    np.savez(tmp_path / "b.npz", x=np.asfortranarray(data))
    for name in ("a.npy", "a.npz"):
        os.remove(tmp_path / name)
    same(feeds(tmp_path), [{"x": data}])


def test_an_array_saved_without_a_name_is_the_only_input(tmp_path):
    np.savez(tmp_path / "a.npz", rows(2, 3, 4))
    same(feeds(tmp_path), [{"x": rows(2, 3, 4)}])
    same(feeds(tmp_path / "a.npz"), [{"x": r[None]} for r in rows(2, 3, 4)])
    refused(tmp_path, IDS, MASK, match=["wanted arrays by name for 2 inputs", "ids: int64"])


def test_files_come_in_natural_order_through_nested_folders(tmp_path):
    names = ["a/2.npy", "a/10.npy", "a10/1.npy", "b.npy", "b2.npy", "b10.npy"]
    data = rows(len(names), 1, 3, 4)
    for name, array in zip(names, data, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, array)
    same(feeds(tmp_path), [{"x": d} for d in data])


@given(st.lists(st.text("a0129²É_- ", min_size=1), min_size=2))
def test_any_names_can_be_ordered(names):
    keys = sorted(natural(Path(n)) for n in names)  # raises if parts cannot be compared
    assert len(set(keys)) == len({Path(n) for n in names})


def test_hidden_files_and_folders_are_no_samples(tmp_path):
    np.save(tmp_path / "a.npy", rows(1, 3, 4))
    (tmp_path / "._a.npy").write_bytes(b"resource fork")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.npz").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("x")
    assert len(feeds(tmp_path)) == 1


def test_links_to_files_are_followed_and_links_to_folders_are_not(tmp_path):
    folder, other = tmp_path / "data", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    np.save(other / "a.npy", rows(1, 3, 4))
    try:
        (folder / "a.npy").symlink_to(other / "a.npy")
        (folder / "more").symlink_to(other)
    except OSError:
        pytest.skip("no symbolic links here")
    assert len(feeds(folder)) == 1


def test_a_dangling_link_is_named(tmp_path):
    try:
        (tmp_path / "a.npy").symlink_to(tmp_path / "gone.npy")
    except OSError:
        pytest.skip("no symbolic links here")
    refused(tmp_path, match=["cannot be read: No such file", "a.npy"])


def test_an_empty_folder(tmp_path):
    refused(tmp_path, match=["the folder is empty", str(tmp_path), "put .npz, .npy, pictures"])


def test_a_folder_without_samples_says_what_is_there(tmp_path):
    for name in ("a.txt", "b.txt", "c.csv", "README"):
        (tmp_path / name).write_text("x")
    refused(tmp_path, match=["holds only 2 .txt, ", "1 .csv", "1 README"])


def test_a_folder_of_several_kinds_is_not_guessed_at(tmp_path):
    np.save(tmp_path / "labels.npy", rows(1, 3, 4))
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    refused(tmp_path, match=["several kinds: 1 .npy and 2 pictures", "keep one kind"])
    assert len(feeds(tmp_path, spec("x", "N", 3, 4, 4), preprocess="raw")) == 2


def test_no_such_path(tmp_path):
    with pytest.raises(CalibrationError, match=r"no such file or folder \(.*gone\)"):
        Calibration(tmp_path / "gone")


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    scandir = os.scandir

    def locked(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    refused(tmp_path, match=["the folder cannot be read: Permission denied", "a)"])


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"")
    refused(tmp_path / "a.zip", match=["neither .npz nor .npy nor a picture", "a.zip"])


def test_preprocessing_of_arrays_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", rows(1, 3, 4))
    refused(tmp_path, preprocess="unit", match=["preprocessing is for pictures, got .npy"])
    refused([{"x": rows(1, 3, 4)}], preprocess="unit", match="preprocessing is for files")


# ------------------------------------------------------------------------------- pictures


PHOTO = spec("x", "N", 3, 4, 4)


def test_a_folder_of_pictures_in_class_folders(tmp_path):
    for i, name in enumerate(("cat/1.PNG", "cat/2.bmp", "dog/1.tiff", "dog/2.webp")):
        picture(tmp_path / name, (i, i, i))
    got = feeds(tmp_path, PHOTO, preprocess=Preprocess(scale=1))
    same(got, [{"x": np.full((1, 3, 4, 4), i, np.float32)} for i in range(4)])


def test_one_picture(tmp_path):
    picture(tmp_path / "a.png", (1, 2, 3))
    (feed,) = feeds(tmp_path / "a.png", PHOTO, preprocess="raw")
    assert feed["x"][0, :, 0, 0].tolist() == [1, 2, 3]


def test_pictures_need_preprocessing(tmp_path):
    picture(tmp_path / "a.png")
    fault = refused(
        tmp_path, PHOTO, match=["nothing says how pictures become inputs", "--preprocess"]
    )
    assert "imagenet" in str(fault)
    assert "TOML" in str(fault)


def test_preprocessing_is_checked_at_once(tmp_path):
    with pytest.raises(RecipeError, match="did you mean imagenet"):
        Calibration(tmp_path, preprocess="imagnet")


def test_pictures_fill_a_fixed_batch(tmp_path):
    for i in range(7):
        picture(tmp_path / f"{i}.png", (i, i, i))
    data = Calibration(tmp_path, preprocess="raw").bind([spec("x", 3, 3, 4, 4)])
    assert (data.length, data.dropped) == (2, 1)
    assert data.note == "1 of 7 samples dropped: the model takes batches of 3"
    got = [feed["x"][:, 0, 0, 0].tolist() for feed in data]
    assert got == [[0, 1, 2], [3, 4, 5]]
    data = Calibration(tmp_path, preprocess="raw", limit=1).bind([spec("x", 3, 3, 4, 4)])
    assert (data.length, data.dropped, data.note) == (1, 0, None)
    assert [feed["x"][:, 0, 0, 0].tolist() for feed in data] == [[0, 2, 4]]
    few = spec("x", 8, 3, 4, 4)
    refused(
        tmp_path, few, preprocess="raw", match=["8 x 3 x 4 x 4], got only 7 rows", "a whole batch"]
    )


def test_pictures_of_a_fixed_batch_need_one_size(tmp_path):
    picture(tmp_path / "1.png", size=(4, 4))
    picture(tmp_path / "2.png", size=(4, 5))
    inputs = spec("x", 2, 3, "H", "W")
    refused(tmp_path, inputs, preprocess="unit", match=["differ in size", "1.png", "give a size"])
    assert len(feeds(tmp_path, spec("x", "N", 3, "H", "W"), preprocess="unit")) == 2


def test_pictures_feed_one_input(tmp_path):
    picture(tmp_path / "a.png")
    refused(tmp_path, PHOTO, IDS, preprocess="raw", match=["for 2 inputs", "ids: int64"])


def test_an_unreadable_picture_is_named(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    match = ["picture", "b.png", "remove or replace it"]
    refused(tmp_path, PHOTO, preprocess="raw", strict=True, match=match)


# ------------------------------------------------------------------------------- unreadable files


def damage(path):
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize("kind", ["npz", "npy", "pb"])
def test_files_that_cannot_be_read_are_left_out(kind, tmp_path):
    values = rows(4, 1, 3, 4)
    for i, value in enumerate(values):
        if kind == "pb":
            write_pb(tmp_path / f"test_data_set_{i}", numpy_helper.from_array(value, "x"))
        elif kind == "npz":
            np.savez(tmp_path / f"{i}.npz", x=value)
        else:
            np.save(tmp_path / f"{i}.npy", value)
    broken = [tmp_path / "test_data_set_2/input_0.pb" if kind == "pb" else tmp_path / f"2.{kind}"]
    if kind != "pb":
        broken.append(tmp_path / f"1.{kind}")
    for path in broken:
        damage(path)
    data = Calibration(tmp_path)
    samples = data.bind([X])
    assert data.skip_note is None
    kept = [0, 3] if kind != "pb" else [0, 1, 3]
    for _ in range(2):  # each pass leaves out the same, and counts it once
        same(list(samples), [{"x": values[i]} for i in kept])
        assert len(data.skipped) == len(broken)
    assert data.limited(4).skipped is data.skipped
    assert str(broken[-1].parent if kind == "pb" else broken[-1]) in data.skip_note
    assert data.skip_note.startswith(f"{len(broken)} sample")
    refused(tmp_path, strict=True, match=["read", broken[-1].name])


def test_a_batch_is_filled_with_pictures_that_can_be_read(tmp_path):
    for i in range(5):
        picture(tmp_path / f"{i}.png", (i, i, i))
    damage(tmp_path / "1.png")
    data = Calibration(tmp_path, preprocess="raw")
    got = list(data.bind([spec("x", 2, 3, 4, 4)]))
    assert [feed["x"][:, 0, 0, 0].tolist() for feed in got] == [[0, 2], [3, 4]]
    assert list(data.skipped) == [str(tmp_path / "1.png")]


def test_a_folder_of_which_nothing_can_be_read(tmp_path):
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", x=rows(1, 3, 4))
        damage(tmp_path / f"{name}.npz")
    refused(tmp_path, match=["cannot be read", "a.npz", "copy or save it again"])


def test_what_can_be_read_and_does_not_fit_is_an_error(tmp_path):
    np.savez(tmp_path / "a.npz", x=rows(1, 3, 4))
    np.savez(tmp_path / "b.npz", x=rows(1, 3, 5))
    refused(tmp_path, match=["wanted", "b.npz"])


# ------------------------------------------------------------------------------- test_data_set_*


def write_pb(folder, *tensors):
    folder.mkdir(parents=True, exist_ok=True)
    for i, tensor in enumerate(tensors):
        (folder / f"input_{i}.pb").write_bytes(tensor.SerializeToString())
    (folder / "output_0.pb").write_bytes(b"not read")


def test_test_data_sets_by_position(tmp_path):
    ids, mask = np.arange(6).reshape(1, 6), np.ones((1, 6), np.int64)
    for i in (0, 2, 10):
        tensors = (numpy_helper.from_array(ids + i), numpy_helper.from_array(mask))
        write_pb(tmp_path / f"test_data_set_{i}", *tensors)
    same(feeds(tmp_path, IDS, MASK), [{"ids": ids + i, "mask": mask} for i in (0, 2, 10)])
    same(feeds(tmp_path / "test_data_set_2", IDS, MASK), [{"ids": ids + 2, "mask": mask}])


def test_test_data_sets_by_name(tmp_path):
    ids, mask = np.arange(6).reshape(1, 6), np.ones((1, 6), np.int64)
    tensors = (numpy_helper.from_array(mask, "mask"), numpy_helper.from_array(ids, "ids"))
    write_pb(tmp_path / "test_data_set_0", *tensors)
    same(feeds(tmp_path, IDS, MASK), [{"ids": ids, "mask": mask}])


def test_eleven_inputs_go_by_number(tmp_path):
    inputs = [spec(f"v{i}", 1) for i in range(11)]
    tensors = [numpy_helper.from_array(np.array([i], np.float32)) for i in range(11)]
    write_pb(tmp_path / "test_data_set_0", *tensors)
    (feed,) = feeds(tmp_path, *inputs)
    assert [float(a[0]) for a in feed.values()] == list(range(11))


def test_test_data_sets_that_do_not_fit(tmp_path):
    folder = tmp_path / "test_data_set_0"
    write_pb(folder, numpy_helper.from_array(rows(1, 3, 4)), numpy_helper.from_array(rows(1, 2)))
    refused(tmp_path, match=["wanted input files: 1 at most, got 2", "test_data_set_0"])
    refused(tmp_path, X, spec("y", "N", 3), match=["wanted y: float32 [N x 3]", "[1 x 2]"])
    (folder / "input_1.pb").write_bytes(b"\xff" * 9)
    refused(tmp_path, match=["does not hold a tensor", "input_1.pb"])
    tensor = helper.make_tensor("x", TensorProto.FLOAT, [1, 3, 4], rows(1, 3, 4).ravel())
    tensor.dims[2] = 7
    write_pb(folder, tensor)
    os.remove(folder / "input_1.pb")
    refused(tmp_path, match=["cannot be read", "input_0.pb"])


def test_tensors_in_other_files_are_refused(tmp_path):
    tensor = TensorProto(name="x", data_type=1, dims=[1, 3, 4], data_location=1)
    tensor.external_data.add(key="location", value="/etc/passwd")
    write_pb(tmp_path, tensor)
    refused(tmp_path, match="its data lies in another file")


# ------------------------------------------------------------------------------- stacked arrays


@pytest.fixture(params=["dict", "array", "npz", "npy"])
def stacked(request, tmp_path):
    """One array for the input x as each of the stacked sources."""

    def make(array):
        if request.param == "npz":
            np.savez_compressed(tmp_path / "s.npz", x=array)
        if request.param == "npy":
            np.save(tmp_path / "s.npy", array)
        given = {"dict": {"x": array}, "array": array}
        return given.get(request.param, tmp_path / f"s.{request.param}")

    return make


def test_rows_become_batches_of_one(stacked):
    data = rows(5, 3, 4)
    same(feeds(stacked(data)), [{"x": data[i : i + 1]} for i in range(5)])
    same(feeds(stacked(data), spec("x", 1, 3, 4)), [{"x": data[i : i + 1]} for i in range(5)])
    same(feeds(stacked(data), TensorSpec("x", None, None))[:1], [{"x": data[:1]}])


def test_rows_fill_a_fixed_batch(stacked):
    data = rows(7, 3, 4)
    samples = Calibration(stacked(data)).bind([spec("x", 3, 3, 4)])
    assert (len(samples), samples.dropped) == (2, 1)
    assert samples.note == "1 of 7 samples dropped: the model takes batches of 3"
    same(list(samples), [{"x": data[:3]}, {"x": data[3:6]}])
    for limit, dropped in ((1, 0), (2, 0), (3, 1)):  # what the limit leaves out is not dropped
        limited = Calibration(stacked(data), limit=limit).bind([spec("x", 3, 3, 4)])
        assert limited.dropped == dropped
        assert (limited.note is None) == (dropped == 0)
    assert Calibration(stacked(data)).bind([X]).note is None
    refused(
        stacked(data), spec("x", 8, 3, 4), match="wanted x: float32 [8 x 3 x 4], got only 7 rows"
    )


def test_whole_inputs_can_be_stacked(stacked):
    data = rows(3, 2, 3, 4)
    same(feeds(stacked(data)), [{"x": d} for d in data])
    same(feeds(stacked(data), spec("x", 2, 3, 4)), [{"x": d} for d in data])


def test_limit_takes_the_first_rows(stacked):
    data = rows(5, 3, 4)
    samples = Calibration(stacked(data), limit=2).bind([X])
    assert samples.length == 2
    same(list(samples), [{"x": data[:1]}, {"x": data[1:2]}])
    assert len(feeds(stacked(data), limit=9)) == 5


def test_stacks_that_do_not_fit(stacked):
    refused(
        stacked(rows(3, 4)), match=["wanted stacked samples of x: float32 [N x 3 x 4]", "3 x 4]"]
    )
    refused(stacked(rows(3, 4, 4)), match=["wanted x: float32 [N x 3 x 4], got", "1 x 4 x 4]"])
    refused(stacked(np.zeros((0, 3, 4), np.float32)), match="there are no samples")
    refused(stacked(np.zeros((2, 0, 3, 4), np.float32)), match="the array is empty")
    data = rows(3, 3, 4)
    data[1, 2, 0] = np.nan
    refused(stacked(data), match=["holds NaN", "'x' in ", "sample 1"])


def test_a_state_is_stacked_whole_and_a_scalar_serves_every_sample(tmp_path):
    inputs = [X, spec("state", 2, "N", 5), spec("rate", dtype="int64")]
    data = {"x": rows(4, 3, 4), "state": rows(4, 2, 1, 5), "rate": np.int64(16000)}
    wanted = [
        {"x": data["x"][i : i + 1], "state": data["state"][i], "rate": np.array(16000)}
        for i in range(4)
    ]
    same(feeds(data, *inputs), wanted)
    np.savez(tmp_path / "a.npz", **data)
    same(feeds(tmp_path / "a.npz", *inputs), wanted)
    data["rate"] = np.arange(4)
    assert [int(feed["rate"]) for feed in feeds(data, *inputs)] == [0, 1, 2, 3]


def test_stacks_of_different_length():
    data = {"ids": np.ones((4, 6), int), "mask": np.ones((3, 6), int)}
    refused(data, IDS, MASK, match="got 4 of 'ids', 3 of 'mask'")


def test_names_of_stacks_are_checked_before_reading(tmp_path):
    np.savez(tmp_path / "a.npz", imput=rows(2, 3, 4))
    data = Calibration(tmp_path / "a.npz")
    with pytest.raises(CalibrationError, match=r"wanted input 'input', got 'imput' \(.*a.npz\)"):
        data.bind([spec("input", "N", 3, 4)])


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path, name):
    row, count = 64 << 10, 100  # bytes
    data = np.zeros((count, row // 4), np.float32)
    np.save(tmp_path / name, data) if name == "a.npy" else np.savez(tmp_path / name, x=data)
    del data
    tracemalloc.start()
    for _ in Calibration(tmp_path / name).bind([spec("x", "N", row // 4)]):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * row


# ------------------------------------------------------------------------------- iterables


def test_a_list_can_be_read_again():
    data = [{"x": r[None]} for r in rows(4, 3, 4)]
    samples = Calibration(data).bind([X])
    assert samples.length == 4
    same(list(samples), data)
    same(list(samples), data)
    same(feeds(data, limit=2), data[:2])
    assert Calibration(data, limit=2).bind([X]).length == 2


def test_a_list_of_arrays_feeds_the_only_input():
    data = rows(2, 3, 4)
    same(feeds([data[:1], data[1]]), [{"x": data[:1]}, {"x": data[1:]}])


def test_array_likes_are_taken():
    (feed,) = feeds([{"x": rows(1, 3, 4).tolist()}])
    assert feed["x"].dtype == np.float32


def test_a_generator_can_be_read_again():
    source = ({"x": r[None]} for r in rows(3, 3, 4))
    wanted = [{"x": r[None]} for r in rows(2, 3, 4)]
    data = Calibration(source, limit=2)
    samples = data.bind([X])
    assert samples.length is None
    with pytest.raises(TypeError, match="not known"):
        len(samples)
    for again in (samples, samples, data.bind([X])):
        same(list(again), wanted)
    assert data.bind([X]).length == 2
    same([next(source)], [{"x": rows(1, 3, 4, start=24)}])  # the limit was kept


def test_the_length_of_what_was_read_is_known():
    data = Calibration({"x": r[None]} for r in rows(5, 3, 4))
    assert data.bind([X]).length is None
    next(iter(data.bind([X])))
    assert [data.limited(n).bind([X]).length for n in (1, 2)] == [1, None]
    list(data.bind([X]))
    assert [data.limited(n).bind([X]).length for n in (1, 5, 9)] == [1, 5, 5]
    assert data.bind([X]).length == 5


def test_a_function_gives_a_fresh_iterable():
    samples = Calibration(lambda: ({"x": r[None]} for r in rows(3, 3, 4))).bind([X])
    assert samples.length is None
    assert [len(list(samples)) for _ in range(2)] == [3, 3]
    refused(lambda: 3, match="the function returned int, wanted an iterable of dicts")


class Reader:
    """As onnxruntime's CalibrationDataReader."""

    def __init__(self):
        self.left = iter(rows(3, 1, 3, 4))

    def get_next(self):
        x = next(self.left, None)
        return None if x is None else {"x": x}

    def __iter__(self):
        return self

    def __next__(self):
        raise NotImplementedError

    def __len__(self):
        raise NotImplementedError


class Rewinding(Reader):
    def rewind(self):
        self.__init__()


def test_a_reader_of_onnxruntime():
    same(feeds(Reader()), [{"x": x} for x in rows(3, 1, 3, 4)])
    samples = Calibration(Reader()).bind([X])
    assert samples.length is None
    next(iter(samples))
    for _ in range(2):
        same(list(samples), [{"x": x} for x in rows(3, 1, 3, 4)])


def test_a_reader_that_rewinds_can_be_read_again():
    samples = Calibration(Rewinding()).bind([X])
    next(iter(samples))
    assert [len(list(samples)) for _ in range(2)] == [3, 3]


def test_fewer_samples_of_the_same():
    data = Calibration([{"x": r[None]} for r in rows(5, 3, 4)], limit=3)
    assert [len(list(data.limited(n).bind([X]))) for n in (2, 4)] == [2, 3]
    assert len(list(data.bind([X]))) == 3
    data = Calibration({"x": r[None]} for r in rows(5, 3, 4))
    assert [len(list(data.limited(n).bind([X]))) for n in (2, 4, 1)] == [2, 4, 1]
    same(list(data.bind([X])), [{"x": r[None]} for r in rows(5, 3, 4)])
    data = Calibration(Rewinding())
    assert [len(list(data.limited(n).bind([X]))) for n in (2, 1)] == [2, 1]
    assert len(list(data.bind([X]))) == 3


def test_a_source_that_hides_that_it_can_be_read_once():
    source = ({"x": r[None]} for r in rows(3, 3, 4))
    samples = Calibration(lambda: source).bind([X])
    assert len(list(samples)) == 3
    with pytest.raises(
        CalibrationError, match=r"only once.* \(function\); give the iterator itself"
    ):
        list(samples)


def test_faults_of_the_users_own_code_are_not_hidden():
    def data():
        yield {"x": rows(1, 3, 4)}
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        feeds(data)


@pytest.mark.parametrize("empty", [[], lambda: []])
def test_no_samples(empty):
    refused(empty, match="there are no samples")


def test_what_is_no_source():
    with pytest.raises(CalibrationError, match="samples cannot come from int; give a path"):
        Calibration(3)
    refused(
        [(rows(1, 3, 4), 7)], match=["wanted a dict of arrays", "got tuple (sample 0)", "{'x':"]
    )
    refused([{"x": [[1.0], [2.0, 3.0]]}], match=["is not an array", "'x' in sample 0"])
    refused([{"x": np.array([[[None]]])}], match=["got Python objects", "'x' in sample 0"])
    refused({"x": [object()]}, match=["got Python objects", "'x' of the dict"])


def test_a_model_without_inputs():
    with pytest.raises(CalibrationError, match="the model has no inputs"):
        Calibration([]).bind([])


def test_the_representation_is_one_line(tmp_path):
    assert repr(Calibration(tmp_path, limit=3)).startswith(
        f"Calibration({str(tmp_path)!r}, limit=3"
    )
    assert repr(Calibration([])) == "Calibration('list', limit=None, preprocess=None)"


# ------------------------------------------------------------------------------- limit


@pytest.mark.parametrize("limit", [0, -1, 2.0, True, "3"])
def test_limit_is_a_count(limit):
    with pytest.raises(CalibrationError, match=re.escape(f"at least 1 sample, got {limit!r}")):
        Calibration([], limit=limit)


@given(st.integers(1, 400), st.integers(1, 400))
def test_limit_is_spread_evenly(count, limit):
    files = [Path(f"{i}.npy") for i in range(count)]
    taken = [files.index(f) for f in spread(files, limit)]
    assert len(taken) == min(count, limit)
    assert taken == sorted(set(taken))
    gaps = np.diff([*taken, count])
    assert gaps.max() - gaps.min() <= 1
    assert spread(files, None) == files


def test_every_class_keeps_its_share(tmp_path):
    for i in range(12):
        picture(tmp_path / "abc"[i // 4] / f"{i}.png", (i, i, i))
    got = feeds(tmp_path, PHOTO, preprocess="raw", limit=3)
    assert [int(feed["x"][0, 0, 0, 0]) for feed in got] == [0, 4, 8]


# ------------------------------------------------------------------------------- fit


def test_names():
    x = rows(1, 3, 4)
    refused([{}], match=["wanted input 'x', got no arrays (sample 0)", "takes x: float32 [N x 3"])
    refused([{"y": x}], match=["wanted input 'x', got 'y'"])
    refused([{"pixels": x}], spec("pixel", "N", 3, 4), match="rename 'pixels' to 'pixel'")
    refused([{"x": x, "label": x}], match=["no input 'label' (sample 0)", "leave it out"])
    refused([{"ids": x, "mask_": x, "mask": x}], IDS, MASK, match="did you mean 'mask'?")


def test_optional_inputs():
    x, gain = rows(1, 3, 4), spec("gain", 1)
    same(feeds([{"x": x}], optional=[gain]), [{"x": x}])
    given = {"gain": np.ones(1, np.float32), "x": x}
    same(feeds([given], optional=[gain]), [{"x": x, "gain": given["gain"]}])


def test_an_array_of_a_type_and_shape_that_fit_is_not_copied():
    x = rows(1, 3, 4)
    assert feeds([{"x": x}])[0]["x"] is x


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("float64", "float32"),
        ("float16", "float32"),
        ("float32", "float16"),
        ("int64", "int32"),
        ("int64", "uint8"),
        ("uint8", "int64"),
        (">i4", "int32"),
    ],
)
def test_types_of_one_kind_are_cast(given, wanted):
    (feed,) = feeds([{"v": np.arange(5).astype(given)}], spec("v", "N", dtype=wanted))
    assert feed["v"].dtype == wanted
    assert feed["v"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("given", "wanted", "match"),
    [
        (np.array([1, 70000.0], "f4"), "float16", "wanted float16, got float32 ('v' in sample 0);"),
        (np.array([1, 70000.0], "f4"), "float16", "its largest value is 70000"),
        (
            np.array([-1, 3]),
            "uint8",
            "wanted uint8, got int64 ('v' in sample 0); its values are -1",
        ),
        (np.array([2**40]), "int32", "its values are 1099511627776 to 1099511627776"),
        (np.array([2**63], "u8"), "int64", "its values are 9223372036854775808"),
        (np.array([1, 2], "u1"), "float32", "wanted float32, got uint8"),
        (np.array([1, 2], "u1"), "float32", "convert and scale it as in training"),
        (np.array([1.0, 2.0]), "int64", "wanted int64, got float64 ('v' in sample 0); save it as"),
        (np.array([0, 1]), "bool", "wanted bool, got int64"),
        (np.array(["a"]), "float32", "wanted float32, got str"),
    ],
)
def test_other_casts_are_refused(given, wanted, match):
    refused([{"v": given}], spec("v", "N", dtype=wanted), match=match)


def test_text_inputs_pass():
    text = TensorSpec("text", None, ("N",))
    for array in (np.array(["a", "b"]), np.array(["a", "b"], object)):
        assert feeds([{"text": array}], text)[0]["text"].tolist() == ["a", "b"]


def test_shapes():
    refused(
        [{"x": rows(3, 4)}], match=["wanted x: float32 [N x 3 x 4], got x: float32 [3 x 4] (sam"]
    )
    refused([{"x": rows(3, 4)}], match="add the batch dimension: array[None]")
    refused([{"x": rows(1, 3, 5)}], match="got x: float32 [1 x 3 x 5] (sample 0)")
    refused([{"x": rows(2, 3, 4)}], spec("x", 1, 3, 4), match="wanted x: float32 [1 x 3 x 4]")
    nchw, nhwc = spec("x", "N", 3, "H", "W"), spec("x", "N", "H", "W", 3)
    refused([{"x": rows(1, 8, 9, 3)}], nchw, match="move the channels: array.transpose(0, 3, 1, 2)")
    refused([{"x": rows(1, 3, 8, 9)}], nhwc, match="move the channels: array.transpose(0, 2, 3, 1)")


def test_a_symbol_has_one_size_within_a_sample():
    sample = {"ids": np.ones((1, 6), int), "mask": np.ones((1, 5), int)}
    match = "'sequence' is 6 in input 'ids', but 5 in 'mask' (sample 1)"
    refused([{"ids": sample["ids"], "mask": sample["ids"]}, sample], IDS, MASK, match=match)
    loose = [spec("a", "?", None), spec("b", "?", None)]
    assert feeds([{"a": rows(1, 2), "b": rows(2, 3)}], *loose)


@pytest.mark.parametrize(
    ("value", "says"), [(np.nan, "NaN"), (np.inf, "an infinite value"), (-np.inf, "an infinite")]
)
def test_values_that_are_not_finite(tmp_path, value, says):
    x = rows(1, 3, 4)
    x[0, 0, 0] = value
    np.savez(tmp_path / "bad.npz", x=x.astype(np.float64))
    refused(tmp_path, match=[f"the array holds {says}", "'x' in ", "bad.npz"])


def test_empty_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((0, 3, 4), np.float32))
    refused(tmp_path, match=["the array is empty: x: float32 [0 x 3 x 4]", "a.npz"])
    np.save(tmp_path / "b.npy", np.zeros((0, 3, 4), np.float32))
    os.remove(tmp_path / "a.npz")
    refused(tmp_path, match=["the array is empty", "b.npy"])


# ------------------------------------------------------------------------------- damaged files


def test_pickles_are_never_loaded(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    objects = np.array([{"a": 1}], object)
    np.savez(tmp_path / "a.npz", x=objects, allow_pickle=True)
    np.save(tmp_path / "b.npy", objects, allow_pickle=True)
    np.save(folder / "c.npy", objects, allow_pickle=True)
    objects.dump(tmp_path / "d.npy")
    for path in (tmp_path / "a.npz", tmp_path / "b.npy", tmp_path / "d.npy", folder):
        refused(path, match=["holds pickled Python objects, which are never loaded", "np.savez"])


def test_a_truncated_npz(tmp_path):
    np.savez(tmp_path / "whole.npz", x=rows(9, 3, 4))
    data = (tmp_path / "whole.npz").read_bytes()
    os.remove(tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    refused(tmp_path, match=["cannot be read: File is not a zip file", "cut.npz"])


def test_a_truncated_npy(tmp_path):
    np.save(tmp_path / "a.npy", rows(9, 3, 4))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-40])
    for path in (tmp_path, tmp_path / "a.npy"):
        refused(path, match=["it is cut off: wanted 432 bytes", "a.npy"])
    (tmp_path / "a.npy").write_bytes(b"")
    refused(tmp_path, match=["does not hold an array: it is empty", "a.npy"])
    (tmp_path / "a.npy").write_bytes(b"hello")
    refused(tmp_path, match=["does not hold an array in numpy's format", "a.npy"])


def npz(path, name, content, **options):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content, **options)


def header(shape):
    file = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, fields)
    return file.getvalue()


@pytest.mark.parametrize(
    ("shape", "says"),
    [((10**12,), "it is cut off"), ((-4,), "no valid shape"), ((-2, -2), "no valid shape")],
)
def test_a_header_that_claims_what_is_not_there(tmp_path, shape, says):
    npz(tmp_path / "a.npz", "x.npy", header(shape) + b"\0" * 16)
    refused(tmp_path, match=["cannot be read", says, "a.npz"])
    refused(tmp_path / "a.npz", match=says)


def test_an_archive_that_claims_too_much(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((9, 3, 4), np.float32))
    monkeypatch.setattr(readers, "LARGEST_NPZ", 500)
    refused(tmp_path, match=["the archive claims", "a.npz", "save it as .npy"])
    assert not hasattr(readers, "LARGEST_NPY")


def test_archives_that_are_not_numpys(tmp_path):
    path = tmp_path / "a.npz"
    npz(path, "notes.txt", "hello")
    refused(path, match=["does not hold an array in numpy's format", "'notes.txt' in"])
    npz(path, "x.npy", header((0,)), compress_type=zipfile.ZIP_LZMA)
    refused(path, match="compressed in a way that numpy does not use")
    with zipfile.ZipFile(path, "w"):
        pass
    refused(path, match="the archive holds no arrays")
    npz(path, "x.npy", np.lib.format.MAGIC_PREFIX + b"\x09\x00")
    refused(path, match="version (9, 0) of numpy's format")


def test_values_that_changed_on_the_disk(tmp_path):
    np.savez(tmp_path / "a.npz", x=rows(9, 3, 4))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[-200] ^= 0xFF
    (tmp_path / "a.npz").write_bytes(data)
    for path in (tmp_path, tmp_path / "a.npz"):
        refused(path, match=["cannot be read: Bad CRC-32", "a.npz"])


@given(st.data())
def test_no_damage_goes_unnoticed_or_unexplained(data):
    """A damaged file gives one line, or arrays where the damage left it readable."""
    kind = data.draw(st.sampled_from(["npz", "npy", "pb"]))
    file = io.BytesIO()
    if kind == "pb":
        file.write(numpy_helper.from_array(rows(2, 3, 4), "x").SerializeToString())
    else:
        np.savez_compressed(file, x=rows(2, 3, 4)) if kind == "npz" else np.save(
            file, rows(2, 3, 4)
        )
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, len(content))) :]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"input_0.{kind}").write_bytes(content)
        try:
            says = str(feeds(folder)[0]["x"].dtype)
        except CalibrationError as error:
            says = str(error)
        assert says == "float32" or re.fullmatch(r".+ \(.*input_0.*\).*", says)
