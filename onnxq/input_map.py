"""How pictures and sounds become inputs, found out from the model where nobody says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxq.norm_matching import Moments
from onnxq.pictures import PRESETS, Preprocess
from onnxq.signature import TensorSpec

__all__ = [
    "InputMap",
    "Maps",
    "best_match",
    "most_plausible",
    "of_preprocess",
    "picture_maps",
    "sound_maps",
]

# Samples for a first look, and to decide.
FEW, MANY = 8, 24
# Maps that get the second look.
SHORTLIST = 5
# Where a usual map is as near as this, none is made to measure.
GOOD = 0.1
# One that is made to measure has to be nearer than the best usual one by the first factor. Red and
# blue first are nearly the same to the first layers: blue has to be nearer by the second factor.
CLEARLY, BLUE_FIRST = 0.8, 0.9
# The logarithm of the standard deviation of a first layer's results, how far models differ in it,
# and how many standard deviations their means are usually away from zero.
LOG_STD, LOG_STD_SPREAD, SHIFT = -0.4, 0.5, 1.5


@dataclass(frozen=True)
class InputMap:
    """What makes an input of a picture (0..255, red first) or a sound (-1..1).

    Args:
        name: What notes call it.
        apply: Raw array -> input, batch dimension of 1 included.
        blue_first: Whether it turns the channels round.
        rare: Whether few models use it, so that only statistics can speak for it.
    """

    name: str
    apply: Callable[[np.ndarray], np.ndarray]
    blue_first: bool = False
    rare: bool = False


@dataclass(frozen=True)
class Maps:
    """The maps that come into question.

    Args:
        usual: Those that many models use; the first is assumed where nothing speaks for another.
        fitted: Makes the map (raw - centre) / scale, blue first if asked.
        centres: Centres that are tried.
        scales: Scales that are tried, each twice the one before.
        colours: Whether there is a blue to come first.
    """

    usual: Sequence[InputMap]
    fitted: Callable[[float, float, bool], InputMap]
    centres: Sequence[float]
    scales: Sequence[float]
    colours: bool


def of_preprocess(
    preprocess: Preprocess, spec: TensorSpec, name: str, *, rare: bool = False
) -> InputMap:
    """The map that a `Preprocess` stands for."""

    def apply(raw: np.ndarray) -> np.ndarray:
        from PIL import Image

        return preprocess.apply(Image.fromarray(raw), spec)

    return InputMap(name, apply, preprocess.order == "BGR", rare)


def picture_maps(spec: TensorSpec, channels: int) -> Maps:
    """Maps for pictures.

    Args:
        spec: The input, all sizes known.
        channels: How many it has, 1 or 3.
    """
    imagenet, caffe = PRESETS["imagenet"], PRESETS["caffe"]
    named = {
        "-1..1": Preprocess(scale=1, mean=127.5, std=127.5),
        "0..1": Preprocess(),
        "0..255": Preprocess(scale=1),
        "-0.5..0.5": Preprocess(mean=0.5),
        "ImageNet's mean and deviation": Preprocess(mean=imagenet.mean, std=imagenet.std),
        "0..255 less ImageNet's mean": Preprocess(scale=1, mean=_turned(caffe.mean)),
    }
    rare = {"-0.5..0.5", "0..255 less ImageNet's mean"}
    if channels == 1:
        named["ImageNet's mean and deviation"] = Preprocess(mean=0.449, std=0.226)
        named["0..255 less ImageNet's mean"] = Preprocess(scale=1, mean=114.5)
        rare.add("ImageNet's mean and deviation")
    orders = ("RGB", "BGR") if channels == 3 else ("GRAY",)
    usual = [
        of_preprocess(_ordered(p, order), spec, f"{name}, {order}", rare=name in rare)
        for order in orders
        for name, p in named.items()
    ]

    def fitted(centre: float, scale: float, blue_first: bool) -> InputMap:
        order = orders[-1] if blue_first else orders[0]
        preprocess = _ordered(Preprocess(scale=1, mean=centre, std=scale), order)
        return of_preprocess(preprocess, spec, f"(pixel - {centre:g}) / {scale:.4g}, {order}")

    scales = [127.5 * 2.0**k for k in range(-8, 11)]
    return Maps(usual, fitted, (0.0, 64.0, 127.5), scales, channels == 3)


def sound_maps(spec: TensorSpec) -> Maps:
    """Maps for sounds.

    Args:
        spec: The input, all sizes known.
    """

    def scaled(centre: float, scale: float, blue_first: bool) -> InputMap:
        def apply(raw: np.ndarray) -> np.ndarray:
            return ((raw - centre) / scale).astype(spec.dtype or np.float32)

        return InputMap(f"sound / {scale:.4g}", apply)

    usual = [
        replace(scaled(0, 1, False), name="-1..1"),
        replace(scaled(0, 2.0**-15, False), name="-32768..32767", rare=True),
    ]
    return Maps(usual, scaled, (0.0,), [2.0**k for k in range(-16, 5)], False)


def best_match(maps: Maps, error: Callable[[InputMap, int], float]) -> tuple[InputMap, float]:
    """The map under which samples have the moments that training saw, and its error.

    Args:
        maps: The maps in question.
        error: How far a map is from that, on so many samples.
    """
    ranked = sorted(maps.usual, key=lambda m: error(m, FEW))[:SHORTLIST]
    errors = [error(m, MANY) for m in ranked]
    weighed = [e * (1 if m.blue_first else BLUE_FIRST) for e, m in zip(errors, ranked, strict=True)]
    index = int(np.argmin(weighed))
    best, least = ranked[index], errors[index]
    if least > GOOD:
        other = _fit(maps, lambda m: error(m, FEW))
        if (found := error(other, MANY)) < CLEARLY * least:
            return other, found
    return best, least


def _fit(maps: Maps, error: Callable[[InputMap], float]) -> InputMap:
    """The best map (raw - centre) / scale: a coarse grid, then finer steps of the scale."""
    known: dict[tuple[float, float, bool], float] = {}

    def at(centre: float, scale: float, blue_first: bool = False) -> float:
        key = (centre, scale, blue_first)
        if key not in known:
            known[key] = error(maps.fitted(*key))
        return known[key]

    centre, scale = min(
        ((c, s) for c in maps.centres for s in maps.scales), key=lambda key: at(*key)
    )
    for step in (2**0.5, 2**0.25, 2**0.125):
        scale = min((scale, scale / step, scale * step), key=lambda s: at(centre, s))
        around = [centre + d for d in (-16.0, 16.0)] if len(maps.centres) > 1 else []
        centre = min((centre, *around), key=lambda c: at(c, scale))
    blue_first = maps.colours and at(centre, scale, True) < BLUE_FIRST * at(centre, scale)
    return maps.fitted(centre, scale, blue_first)


def most_plausible(
    maps: Maps, response: Callable[[InputMap], Moments]
) -> tuple[InputMap, InputMap, float]:
    """The usual map under which the first layer's results look like those of trained models.

    Training keeps them, with BatchNormalization that was folded away or without, near a standard
    deviation of one, and their means within a few of it.

    Args:
        maps: The maps in question; the rare ones, and those with blue first, cannot be told.
        response: Moments of the first layer's results under a map.

    Returns:
        The map, the runner-up, and how much less plausible that is (a difference of squares).
    """
    scores = {}
    for index, known in enumerate(maps.usual):
        if not (known.rare or known.blue_first):
            scores[index] = _implausibility(response(known))
    first, second = sorted(scores, key=lambda i: scores[i])[:2]
    return maps.usual[first], maps.usual[second], scores[second] - scores[first]


def _implausibility(moments: Moments) -> float:
    mean = moments.mean.mean(axis=0)
    std = np.sqrt(np.maximum(moments.square.mean(axis=0) - mean**2, 1e-24))
    live = std > 1e-3 * np.median(std)
    if not live.any():  # it puts out constants: nothing can be told
        return 0.0
    shift = float(np.median(np.abs(mean[live]) / std[live]))
    size = float(np.median(np.log(std[live])))
    return ((size - LOG_STD) / LOG_STD_SPREAD) ** 2 + (shift / SHIFT) ** 2


def _ordered(preprocess: Preprocess, order: str) -> Preprocess:
    if order == "BGR":
        mean, std = _turned(preprocess.mean), _turned(preprocess.std)
        return replace(preprocess, order="BGR", mean=mean, std=std)
    return replace(preprocess, order=order)  # type: ignore[arg-type]  # RGB or GRAY


def _turned(values: float | tuple[float, ...]) -> float | tuple[float, ...]:
    return values[::-1] if isinstance(values, tuple) else values
