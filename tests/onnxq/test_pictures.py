import tomllib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from onnxq.errors import CalibrationError, RecipeError
from onnxq.pictures import PRESETS, Preprocess
from onnxq.signature import TensorSpec


def spec(*shape, dtype="float32"):
    return TensorSpec("images", np.dtype(dtype), shape)


OPEN = spec("N", 3, "H", "W")
RAW = Preprocess(scale=1)


def photo(width, height, seed=0):
    """A smooth picture, as photographs are: noise of a few pixels, enlarged."""
    few = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image, order="RGB"):
    """[H, W, 3] in 0..255."""
    array = np.asarray(image, np.float32)
    return array if order == "RGB" else array[:, :, ::-1]


def nchw(array):
    return array.transpose(2, 0, 1)[None]


def resized_and_cropped(image, short, size):
    """What torchvision's Resize(short) and CenterCrop(size) leave."""
    w, h = image.size
    wide, high = (short, short * h // w) if w <= h else (short * w // h, short)
    image = image.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return image.crop((left, top, left + size, top + size))


SIZES = [(500, 375), (375, 500), (256, 256), (1000, 333), (64, 80), (224, 3000)]


# ------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("size", SIZES)
def test_imagenet(size):
    image = photo(*size)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    wanted = nchw((pixels(resized_and_cropped(image, 256, 224)) / 255 - mean) / std)
    got = Preprocess.named("imagenet").apply(image, OPEN)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    # one step instead of two may round a pixel the other way
    np.testing.assert_allclose(got, wanted, atol=1.001 / 255 / 0.224)
    assert np.mean(np.abs(got - wanted) > 1e-5) < 0.01


@pytest.mark.parametrize("name", ["mobilenet", "tf"])
def test_mobilenet(name):
    image = photo(300, 256)
    wanted = nchw(pixels(resized_and_cropped(image, 256, 224)) / 127.5 - 1)
    got = Preprocess.named(name).apply(image, OPEN)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert got.min() >= -1
    assert got.max() <= 1


def test_caffe():
    image = photo(256, 256)
    mean = np.array([103.939, 116.779, 123.68])
    wanted = nchw(pixels(resized_and_cropped(image, 256, 224), "BGR") - mean)
    got = Preprocess.named("caffe").apply(image, OPEN)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("size", [(500, 375), (100, 200), (416, 416)])
def test_yolox(size):
    image, side = photo(*size), 416
    ratio = min(side / size[0], side / size[1])
    inner = image.resize(
        (round(size[0] * ratio), round(size[1] * ratio)), Image.Resampling.BILINEAR
    )
    wanted = np.full((side, side, 3), 114, np.float32)
    wanted[: inner.height, : inner.width] = pixels(inner, "BGR")
    got = Preprocess.named("yolox").apply(image, spec("N", 3, side, side))
    np.testing.assert_array_equal(got, nchw(wanted))
    assert Preprocess.named("yolox").apply(image, OPEN).shape == (1, 3, 640, 640)


@pytest.mark.parametrize("name", ["yolov5", "yolov8"])
def test_yolov5_and_yolov8(name):
    image = photo(100, 50)
    wanted = np.full((64, 64, 3), 114, np.float32)
    wanted[16:48] = pixels(image.resize((64, 32), Image.Resampling.BILINEAR))
    got = Preprocess.named(name).apply(image, spec(1, 3, 64, 64))
    np.testing.assert_allclose(got, nchw(wanted) / 255, atol=1e-7)


def test_unit_and_raw():
    image = photo(6, 5)
    np.testing.assert_array_equal(Preprocess.named("raw").apply(image, OPEN), nchw(pixels(image)))
    got = Preprocess.named("unit").apply(image, OPEN)
    np.testing.assert_allclose(got, nchw(pixels(image)) / 255, atol=1e-7)


def test_an_unknown_preset():
    with pytest.raises(
        RecipeError, match="no preset 'imagnet' for pictures; did you mean imagenet"
    ):
        Preprocess.named("imagnet")
    with pytest.raises(RecipeError, match=r"presets are imagenet, mobilenet, .*TOML file ends in"):
        Preprocess.named("x")


# ------------------------------------------------------------------------------- sizes


def test_the_models_size_comes_first_and_keeps_the_proportion_of_the_crop():
    image = photo(500, 375)
    got = Preprocess(size=224, fit="crop", crop_pct=0.875, scale=1).apply(
        image, spec("N", 3, 96, 96)
    )
    wanted = nchw(pixels(resized_and_cropped(image, 110, 96)))  # 110 = 96 * 256 / 224, rounded
    np.testing.assert_allclose(got, wanted, atol=1)


def test_a_side_that_nobody_fixes_keeps_the_proportions():
    image = photo(40, 20)
    assert RAW.apply(image, spec("N", 3, 10, "W")).shape == (1, 3, 10, 20)
    assert RAW.apply(image, spec("N", 3, None, 10)).shape == (1, 3, 5, 10)
    assert RAW.apply(image, OPEN).shape == (1, 3, 20, 40)
    assert RAW.apply(image, TensorSpec("x", None, None)).shape == (1, 3, 20, 40)
    assert replace(RAW, size=(7, 9)).apply(image, OPEN).shape == (1, 3, 7, 9)
    assert replace(RAW, size=[7, 9]).apply(image, spec("N", 3, 5, "W")).shape == (1, 3, 5, 9)


@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
    st.sampled_from(["stretch", "crop", "letterbox", "letterbox-top-left"]),
    st.floats(0.3, 1),
    st.sampled_from(["nearest", "box", "bilinear", "bicubic", "lanczos"]),
)
def test_any_picture_takes_any_size(given_size, wanted, fit, crop_pct, interpolation):
    preprocess = Preprocess(
        fit=fit, crop_pct=crop_pct if fit == "crop" else 1, interpolation=interpolation, scale=1
    )
    got = preprocess.apply(Image.new("RGB", given_size, (9, 9, 9)), spec("N", 3, *wanted))
    assert got.shape == (1, 3, *wanted)
    assert set(np.unique(got)) <= ({9, 114} if fit.startswith("letterbox") else {9})


def test_a_crop_is_centred():
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    got = Preprocess(size=10, fit="crop", interpolation="nearest").apply(image, OPEN)
    assert got.min() == 1
    got = Preprocess(size=20, fit="crop", interpolation="nearest").apply(image, OPEN)
    assert got.min() == 1  # no margins: the short side is enlarged


def test_fill_of_the_letterbox():
    image = Image.new("RGB", (8, 4), "white")
    got = Preprocess(fit="letterbox", pad_value=0).apply(image, spec("N", 3, 8, 8))
    assert got[0, 0, :, 0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    got = Preprocess(fit="letterbox-top-left", pad_value=0).apply(image, spec("N", 3, 8, 8))
    assert got[0, 0, :, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


# ------------------------------------------------------------------------------- channels, types


def test_means_go_by_the_order_of_channels():
    image = Image.new("RGB", (2, 2), (10, 20, 30))
    for order, wanted in (("RGB", [10, 19, 28]), ("BGR", [30, 19, 8])):
        got = Preprocess(order=order, scale=1, mean=(0, 1, 2)).apply(image, OPEN)
        assert got[0, :, 0, 0].tolist() == wanted
    got = Preprocess(scale=2, mean=(0, 10, 20), std=(1, 2, 4)).apply(image, OPEN)
    assert got[0, :, 0, 0].tolist() == [20, 15, 10]


def test_gray_is_the_luma():
    image = photo(20, 10)
    got = Preprocess(order="GRAY", scale=1).apply(image, spec("N", 1, "H", "W"))
    luma = pixels(image) @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(got[0, 0], luma, atol=0.51)
    np.testing.assert_allclose(got[0, 0], np.asarray(image.convert("YCbCr"))[..., 0], atol=1)


def test_the_layout_is_the_models():
    image = photo(8, 6)
    nhwc = RAW.apply(image, spec("N", "H", "W", 3))
    np.testing.assert_array_equal(nhwc, pixels(image)[None])
    np.testing.assert_array_equal(nhwc, RAW.apply(image, spec(1, 6, 8, 3)))
    dynamic = spec("N", None, None, None)
    assert RAW.apply(image, dynamic).shape == (1, 3, 6, 8)
    assert replace(RAW, layout="NHWC").apply(image, dynamic).shape == (1, 6, 8, 3)
    gray = replace(RAW, order="GRAY")
    assert gray.apply(image, spec("N", 6, 8, 1)).shape == (1, 6, 8, 1)


@pytest.mark.parametrize(
    ("shape", "order", "match"),
    [
        (
            (1, 1, 8, 8),
            "RGB",
            "wanted channels: 1 .NCHW.*got 3 .RGB.*images: float32.*order = 'GRAY'",
        ),
        ((1, 8, 8, 1), "RGB", "wanted channels: 1 .NHWC., got 3"),
        ((1, 3, 8, 8), "GRAY", "wanted channels: 3 .NCHW., got 1 .GRAY.*set order = 'RGB'"),
        ((1, 4, 8, 8), "RGB", "wanted channels: 4 .NCHW., got 3.*pictures have 1 or 3"),
        ((1, 8), "RGB", "pictures need an input of rank 4 .images: float32 .1 x 8."),
    ],
)
def test_inputs_that_are_no_pictures(shape, order, match):
    with pytest.raises(CalibrationError, match=match):
        Preprocess(order=order).apply(photo(8, 8), spec(*shape))


def test_types():
    image = photo(8, 6)
    for dtype in ("float16", "float64", "uint8", "int32"):
        got = RAW.apply(image, spec("N", 3, "H", "W", dtype=dtype))
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, nchw(pixels(image)))
    got = Preprocess(scale=1, mean=128).apply(image, spec("N", 3, "H", "W", dtype="int8"))
    np.testing.assert_array_equal(got, nchw(pixels(image)) - 128)


@pytest.mark.parametrize(
    ("preset", "dtype"), [("unit", "uint8"), ("raw", "int8"), ("caffe", "uint8"), ("raw", "bool")]
)
def test_values_that_the_type_cannot_hold(preset, dtype):
    with pytest.raises(
        CalibrationError, match=rf"wanted images: {dtype} .*got .*use the preset raw"
    ):
        Preprocess.named(preset).apply(photo(8, 6), spec("N", 3, 6, 8, dtype=dtype))


# ------------------------------------------------------------------------------- files


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned right by 90 degrees to be upright
    image = photo(8, 6)
    image.save(tmp_path / "a.png", exif=exif)
    got = RAW.apply(tmp_path / "a.png", OPEN)
    np.testing.assert_array_equal(got, nchw(np.rot90(pixels(image), -1)))


def test_modes(tmp_path):
    red = Image.new("RGB", (2, 2), (255, 0, 0))
    transparent = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = bytes([0, 128])
    for image in (red, transparent, palette, red.convert("CMYK"), red.convert("P")):
        image.save(tmp_path / "a.tif") if image.mode == "CMYK" else image.save(tmp_path / "a.png")
        file = tmp_path / ("a.tif" if image.mode == "CMYK" else "a.png")
        for source in (file, str(file), image):
            got = RAW.apply(source, OPEN)
            np.testing.assert_allclose(got[0, :, 0, 0], [255, 0, 0], atol=2)
    for mode in ("L", "LA", "1"):
        image = Image.new("L", (2, 2), 255).convert(mode)
        assert RAW.apply(image, OPEN)[0, :, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_become_eight(tmp_path, mode):
    values = np.array([[0, 255, 256], [32768, 65280, 65535]])
    image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    assert image.mode == mode
    got = RAW.apply(image, OPEN)
    assert got[0, 0].tolist() == [[0, 0, 1], [128, 255, 255]]
    file = tmp_path / ("a.png" if mode == "I;16" else "a.tif")
    image.save(file)
    np.testing.assert_array_equal(RAW.apply(file, OPEN), got)


def test_pictures_of_floats_are_refused():
    with pytest.raises(
        CalibrationError, match=r"floats of unknown range \(picture\); save it with 8"
    ):
        RAW.apply(Image.new("F", (2, 2)), OPEN)


def test_the_first_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (2, 2), c) for c in ("white", "black")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert RAW.apply(tmp_path / "a.gif", OPEN).min() == 255


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "gif"])
def test_a_truncated_picture_is_named(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    photo(60, 50).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with pytest.raises(
        CalibrationError, match=rf"picture.* \(.*a\.{suffix}\); remove or replace it"
    ):
        RAW.apply(file, OPEN)


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "a.jpg").write_text("hello")
    with pytest.raises(CalibrationError, match=r"not a picture that can be read \(.*a\.jpg\)"):
        RAW.apply(tmp_path / "a.jpg", OPEN)
    with pytest.raises(CalibrationError, match=r"cannot be read: No such file .*\(.*b\.jpg\)"):
        RAW.apply(tmp_path / "b.jpg", OPEN)


def test_formats_that_run_programs_are_not_opened(tmp_path):
    photo(8, 8).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(CalibrationError, match="not a picture that can be read"):
        RAW.apply(tmp_path / "a.png", OPEN)


@pytest.mark.parametrize("limit", [60, 20])  # pixels: Pillow warns above, and raises at twice that
def test_a_decompression_bomb(tmp_path, monkeypatch, limit):
    photo(10, 10).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    match = rf"the picture has more than {limit} pixels \(.*a\.png\); make it smaller"
    with pytest.raises(CalibrationError, match=match):
        RAW.apply(tmp_path / "a.png", OPEN)


# ------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": 0}, r"size: wanted pixels, or \[height, width\], up to 65535, got 0"),
        ({"size": (224, 224, 3)}, "size: wanted pixels"),
        ({"size": 224.0}, "size: wanted pixels.*got 224.0"),
        ({"size": True}, "size: wanted pixels.*got True"),
        ({"fit": "croop"}, "fit: wanted one of stretch, crop, .*got 'croop'; did you mean crop"),
        ({"fit": ["crop"]}, "fit: wanted one of"),
        ({"interpolation": "linear"}, "interpolation: wanted one of .*did you mean bilinear"),
        ({"order": "rgb"}, "order: wanted one of RGB, BGR, GRAY, got 'rgb'"),
        ({"layout": "CHW"}, "layout: wanted one of NCHW, NHWC, None, .*did you mean NCHW"),
        ({"pad_value": 300}, "pad_value: wanted an integer from 0 to 255, got 300"),
        ({"pad_value": 0.5}, "pad_value: wanted an integer"),
        ({"scale": 0}, "scale: wanted a number other than 0, got 0"),
        ({"scale": "1/255"}, "scale: wanted a number other than 0, got '1/255'"),
        ({"mean": (1, 2)}, r"mean: wanted a number, or one per channel, got \(1, 2\)"),
        ({"mean": float("nan")}, "mean: wanted a number"),
        ({"std": (1, 0, 1)}, "std: wanted numbers other than 0"),
        ({"crop_pct": 87.5, "fit": "crop"}, "crop_pct: wanted a fraction above 0, at most 1"),
        ({"crop_pct": 0.5}, "crop_pct: means nothing unless fit is crop"),
        ({"order": "GRAY", "mean": (1, 2, 3)}, "mean: wanted one number for order GRAY"),
    ],
)
def test_options_that_mean_nothing(options, match):
    with pytest.raises(RecipeError, match=match):
        Preprocess(**options)


def test_options_are_keyword_only_and_comparable():
    with pytest.raises(TypeError):
        Preprocess(224)
    assert Preprocess(size=[3, 4], mean=[1, 2, 3]) == Preprocess(size=(3, 4), mean=(1, 2, 3))
    assert hash(Preprocess(size=[3, 4])) == hash(Preprocess(size=(3, 4)))
    assert Preprocess(std=np.float64(2)) == Preprocess(std=2.0)


# ------------------------------------------------------------------------------- TOML


def load(tmp_path, text):
    (tmp_path / "p.toml").write_text(text)
    return Preprocess.load(tmp_path / "p.toml")


def test_a_file(tmp_path):
    got = load(
        tmp_path, 'size = [360, 480]\norder = "BGR"\nscale = 1\nmean = [1, 2, 3]\nstd = 58.0'
    )
    assert got == Preprocess(size=(360, 480), order="BGR", scale=1, mean=(1, 2, 3), std=58.0)
    assert load(tmp_path, "") == Preprocess()


def test_a_file_starts_from_a_preset(tmp_path):
    got = load(tmp_path, 'preset = "imagenet"\nsize = 160\ninterpolation = "bicubic"')
    assert got == replace(PRESETS["imagenet"], size=160, interpolation="bicubic")
    got = load(tmp_path, 'preset = "imagenet"\nfit = "stretch"')
    assert got == replace(PRESETS["imagenet"], fit="stretch", crop_pct=1)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("sise = 3", r"preprocessing has no 'sise' \(.*p\.toml\); did you mean size"),
        ("zzz = 3", "has no 'zzz' .*keys are preset, size, fit"),
        (
            "size = 'x'",
            r"size: wanted pixels, or \[height, width\], up to 65535, got 'x' \(.*p\.toml\)",
        ),
        ("scale = true", "scale: wanted a number other than 0, got True"),
        ("mean = [[1]]", "mean: wanted a number"),
        ("fit = 'letterbocks'", r"fit: wanted .*\(.*p\.toml\); did you mean letterbox"),
        ("preset = 'yolo'", r"no preset 'yolo' for pictures \(.*p\.toml\); did you mean yolo"),
        ("preset = 3", r"preset: wanted text, got 3 \(.*p\.toml\)"),
        ("crop_pct = 0.9", "crop_pct: means nothing unless fit is crop"),
        ("preset = 'tf'\nfit = 'stretch'\ncrop_pct = 0.9", "crop_pct: means nothing"),
        ("size = 3\nsize = ]", r"is not TOML: .*line 2.* \(.*p\.toml\)"),
    ],
)
def test_faults_of_a_file(tmp_path, text, match):
    with pytest.raises(RecipeError, match=match):
        load(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match=r"preprocessing: no such file \(.*gone\.toml\)"):
        Preprocess.load(tmp_path / "gone.toml")
    with pytest.raises(RecipeError, match="preprocessing: Is a directory"):
        Preprocess.load(tmp_path)
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="is not TOML"):
        Preprocess.load(tmp_path / "a.toml")


def test_names_and_paths_are_told_apart(tmp_path):
    (tmp_path / "p.toml").write_text('preset = "raw"')
    (tmp_path / "raw").write_text('preset = "tf"')
    for path in (tmp_path / "p.toml", str(tmp_path / "p.toml")):
        assert Preprocess.of(path) == PRESETS["raw"]
    assert Preprocess.of(tmp_path / "raw") == PRESETS["tf"]
    assert Preprocess.of("raw") == PRESETS["raw"]
    assert Preprocess.of(RAW) is RAW
    with pytest.raises(RecipeError, match="no such file"):
        Preprocess.of("gone.toml")


# ------------------------------------------------------------------------------- documentation


def test_the_guide_is_right(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "calibration-data.md").read_text()
    for name in (*PRESETS, *(f.name for f in fields(Preprocess))):
        assert f"`{name}`" in guide, name
    blocks = guide.split("```toml\n")[1:]
    assert blocks
    for block in blocks:
        text = block.split("```")[0]
        assert tomllib.loads(text)
        load(tmp_path, text)
