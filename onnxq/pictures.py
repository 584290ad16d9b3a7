"""Pictures into model inputs, as the training of the model did it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np

from onnxq.errors import CalibrationError, RecipeError, did_you_mean
from onnxq.files import LARGEST_TOML, parse_toml, read_limited
from onnxq.readers import read_picture
from onnxq.signature import TensorSpec

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PRESETS", "Preprocess"]

_LONGEST = 65_535  # pixels of a side

Fit = Literal["stretch", "crop", "letterbox", "letterbox-top-left"]
Order = Literal["RGB", "BGR", "GRAY"]
Layout = Literal["NCHW", "NHWC"]
Interpolation = Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a picture becomes an input: shape, then ``(pixel * scale - mean) / std``.

    Pixels are 0..255. The height and the width that the model fixes come first; ``size`` stands in
    for those that it leaves open; where neither says, the picture keeps its own.

    Args:
        size: Height and width in pixels, or one number for both.
        fit: How a picture takes that size: ``stretch`` changes its proportions, ``crop`` cuts
            what sticks out around the centre, ``letterbox`` fills the rest of the frame around it,
            ``letterbox-top-left`` to its right and below it.
        crop_pct: For ``crop``: the part of the picture's short side that is kept, as a fraction;
            0.875 is the 224 of 256 of ImageNet.
        interpolation: How pixels are resampled, always with Pillow's antialiasing.
        pad_value: What ``letterbox`` fills with, 0..255.
        order: Channels. ``GRAY`` is the luma of ITU-R 601, the Y of YCbCr.
        layout: Axes. None: where the model's input has the channels, NCHW in doubt.
        scale: Factor on pixels, applied first.
        mean: One number or one per channel, in ``order``, subtracted from scaled pixels.
        std: One number or one per channel, in ``order``; divides last.

    Raises:
        RecipeError: A value that means nothing.

    Examples:
        Means of 0..1 pixels: ``Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))``.
        Means of 0..255 pixels: ``Preprocess(scale=1, mean=127.5, std=127.5)``, which gives -1..1.
    """

    size: int | tuple[int, int] | None = None
    fit: Fit = "stretch"
    crop_pct: float = 1.0
    interpolation: Interpolation = "bilinear"
    pad_value: int = 114
    order: Order = "RGB"
    layout: Layout | None = None
    scale: float = 1 / 255
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):  # as TOML has them
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        for name, (fits, wanted) in _RULES.items():
            if not fits(value := getattr(self, name)):
                raise RecipeError(f"{name}: wanted {wanted}, got {value!r}")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                wanted = ", ".join(map(str, choices))
                raise RecipeError(
                    f"{name}: wanted one of {wanted}, got {value!r}",
                    fix=did_you_mean(value, choices, None),
                )
        if self.crop_pct != 1 and self.fit != "crop":
            raise RecipeError("crop_pct: means nothing unless fit is crop")
        for name in ("mean", "std"):
            if self.channels == 1 and np.size(getattr(self, name)) != 1:
                raise RecipeError(f"{name}: wanted one number for order GRAY")

    @property
    def channels(self) -> int:
        """Channels of the input: 1 or 3."""
        return 1 if self.order == "GRAY" else 3

    @classmethod
    def of(cls, given: str | os.PathLike[str] | Preprocess) -> Preprocess:
        """From the name of a preset, a TOML file, or itself.

        Raises:
            RecipeError: There is no such preset, or the file says nothing that means something.
        """
        if isinstance(given, Preprocess):
            return given
        text = os.fspath(given)
        is_name = isinstance(given, str) and os.path.basename(text) == text
        return cls.named(text) if is_name and not text.endswith(".toml") else cls.load(text)

    @classmethod
    def named(cls, name: str) -> Preprocess:
        """The preset of a name.

        Raises:
            RecipeError: No preset has that name.
        """
        if name in PRESETS:
            return PRESETS[name]
        known = f"presets are {', '.join(PRESETS)}; a TOML file ends in .toml"
        raise RecipeError(
            f"no preset {name!r} for pictures", fix=did_you_mean(name, PRESETS, known)
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Preprocess:
        """From a TOML file: the fields, and ``preset`` for the values of the others.

        Raises:
            RecipeError: The file cannot be read, or a key or a value means nothing.
        """
        try:
            given = parse_toml(read_limited(path, LARGEST_TOML).decode())
        except OSError as error:
            what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
            raise RecipeError(f"preprocessing: {what}", where=path, fix="check the path") from error
        except ValueError as error:  # no TOML, no UTF-8
            raise RecipeError(f"is not TOML: {error}", where=path) from error
        known = [f.name for f in fields(cls)]
        for key in given:
            if key != "preset" and key not in known:
                keys = ["preset", *known]
                hint = did_you_mean(key, keys, f"keys are {', '.join(keys)}")
                raise RecipeError(f"preprocessing has no {key!r}", where=path, fix=hint)
        try:
            preset = given.pop("preset", "unit")
            if not isinstance(preset, str):
                raise RecipeError(f"preset: wanted text, got {preset!r}")
            base = cls.named(preset)
            if given.get("fit", base.fit) != "crop":  # the preset's; one given here is an error
                base = replace(base, crop_pct=1.0)
            return replace(base, **given)
        except RecipeError as error:
            raise RecipeError(error.what, where=path, fix=error.fix) from error

    def apply(self, picture: str | os.PathLike[str] | Image.Image, spec: TensorSpec) -> np.ndarray:
        """One picture as the model takes it, batch dimension included.

        Args:
            picture: A file or a Pillow image. EXIF orientation is applied, palettes, CMYK and 16
                bits become 8-bit colours, alpha is dropped; of several frames the first is taken.
            spec: The model's input, of rank 4.

        Returns:
            ``[1, C, H, W]`` or ``[1, H, W, C]``, of the input's element type.

        Raises:
            CalibrationError: The picture cannot be read, or cannot become such an input.
        """
        layout, target = self._shape(spec)
        is_path = isinstance(picture, (str, os.PathLike))
        where = os.fspath(cast("str", picture)) if is_path else "picture"
        image = read_picture(picture, "L" if self.channels == 1 else "RGB", where)
        pixels = np.asarray(self._fitted(image, target, where), np.float32)
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        if self.order == "BGR":
            pixels = pixels[..., ::-1]
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        x = (pixels * np.float32(self.scale) - mean) / std
        if layout == "NCHW":
            x = x.transpose(2, 0, 1)
        return _typed(np.ascontiguousarray(x)[None], spec, where)

    def for_input(self, spec: TensorSpec) -> Preprocess:
        """The same with the layout, and the size as far as it is fixed, that an input has.

        Raises:
            CalibrationError: The input does not take such pictures.
        """
        layout, (height, width) = self._shape(spec)
        if height is None or width is None:
            return replace(self, layout=layout)
        return replace(self, layout=layout, size=(height, width))

    def _shape(self, spec: TensorSpec) -> tuple[Layout, tuple[int | None, int | None]]:
        """Layout, and height and width as far as they are fixed."""
        shape = (None,) * 4 if spec.shape is None else spec.shape
        if len(shape) != 4:
            raise CalibrationError(
                "pictures need an input of rank 4", where=spec, fix="give .npz samples"
            )
        last = shape[3] in (1, 3) and shape[1] not in (1, 3)
        layout = self.layout or ("NHWC" if last else "NCHW")
        axes = (1, 2, 3) if layout == "NCHW" else (3, 1, 2)
        channels, *sides = (shape[a] for a in axes)
        if isinstance(channels, int) and channels != self.channels:
            fix = {1: "set order = 'GRAY'", 3: "set order = 'RGB'"}.get(channels)
            raise CalibrationError(
                f"wanted channels: {channels} ({layout}), got {self.channels} ({self.order})",
                where=spec,
                fix=fix or "pictures have 1 or 3 channels: give .npz samples",
            )
        own = (None, None) if self.size is None else _pair(self.size)
        height, width = (s if isinstance(s, int) else o for s, o in zip(sides, own, strict=True))
        return layout, (height, width)

    def _fitted(
        self, image: Image.Image, target: tuple[int | None, int | None], where: str
    ) -> Image.Image:
        """The picture in the target's size; a side that is None keeps the proportions."""
        from PIL import Image

        (width, height), (h, w) = image.size, target
        if h is None and w is None:
            return image
        h = h or max(1, round(height * cast("int", w) / width))
        w = w or max(1, round(width * h / height))
        if h * w > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise CalibrationError(
                f"the picture would become one of {h} x {w}", where=where, fix="give a size"
            )
        resample = Image.Resampling[self.interpolation.upper()]
        if self.fit == "stretch":
            return image.resize((w, h), resample)
        if self.fit == "crop":
            return image.resize((w, h), resample, box=self._box(width, height, w, h))
        ratio = min(h / height, w / width)
        inner = image.resize(
            (max(1, round(width * ratio)), max(1, round(height * ratio))), resample
        )
        canvas = Image.new(image.mode, (w, h), (self.pad_value,) * self.channels)
        centred = ((w - inner.width) // 2, (h - inner.height) // 2)
        canvas.paste(inner, centred if self.fit == "letterbox" else (0, 0))
        return canvas

    def _box(self, width: int, height: int, w: int, h: int) -> tuple[float, float, float, float]:
        """The part of the picture that resizing, then cutting out the centre would leave.

        Taking it in one step gives the same pixels and spares the rest. Sides and margins are
        rounded as torchvision does.
        """
        scale = max(round(h / self.crop_pct) / height, round(w / self.crop_pct) / width)
        whole = 1e-6  # what a side that must come out whole may lack, being far below 1e6
        wide, high = (max(n, int(s * scale + whole)) for n, s in ((w, width), (h, height)))
        left, top = round((wide - w) / 2), round((high - h) / 2)
        x, y = width / wide, height / high
        return left * x, top * y, min((left + w) * x, width), min((top + h) * y, height)


# ---------------------------------------------------------------------- values


def _typed(x: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    dtype = np.dtype(np.float32) if spec.dtype is None else spec.dtype
    if dtype.kind == "f":
        return x.astype(dtype, copy=False)
    if dtype.kind in "iu":
        with np.errstate(invalid="ignore"):
            result = x.astype(dtype)
        if np.array_equal(result, x):
            return result
    raise CalibrationError(
        f"wanted {spec}, got fractions, or numbers from {x.min():.4g} to {x.max():.4g}",
        where=where,
        fix="use the preset raw for inputs of 0..255",
    )


# ---------------------------------------------------------------------- options


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_side(value: Any) -> bool:
    return _is_count(value) and value <= _LONGEST


def _is_size(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2 and all(map(_is_side, value))
    return value is None or _is_side(value) or pair


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_per_channel(value: Any) -> bool:
    some = isinstance(value, tuple) and len(value) in (1, 3) and all(map(_is_number, value))
    return _is_number(value) or some


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "fit": get_args(Fit),
    "interpolation": get_args(Interpolation),
    "order": get_args(Order),
    "layout": (*get_args(Layout), None),
}
# Field -> whether a value fits, and what was wanted.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "size": (_is_size, f"pixels, or [height, width], up to {_LONGEST}"),
    "crop_pct": (lambda v: _is_number(v) and 0 < v <= 1, "a fraction above 0, at most 1"),
    "pad_value": (lambda v: type(v) is int and 0 <= v <= 255, "an integer from 0 to 255"),
    "scale": (lambda v: _is_number(v) and v != 0, "a number other than 0"),
    "mean": (_is_per_channel, "a number, or one per channel"),
    "std": (lambda v: _is_per_channel(v) and bool(np.all(v)), "numbers other than 0"),
}

_TF = Preprocess(size=224, fit="crop", crop_pct=0.875, scale=1, mean=127.5, std=127.5)

# What well-known families of models were trained with.
PRESETS: dict[str, Preprocess] = {
    "imagenet": Preprocess(
        size=224, fit="crop", crop_pct=0.875, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
    "mobilenet": _TF,
    "tf": _TF,
    "caffe": Preprocess(
        size=224, fit="crop", crop_pct=0.875, order="BGR", scale=1, mean=(103.939, 116.779, 123.68)
    ),
    "unit": Preprocess(),
    "raw": Preprocess(scale=1),
    "yolox": Preprocess(size=640, fit="letterbox-top-left", order="BGR", scale=1),
    "yolov5": Preprocess(size=640, fit="letterbox"),
    "yolov8": Preprocess(size=640, fit="letterbox"),
}
