"""Pictures and sounds drawn at random, with the statistics of natural ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["Pictures", "sound"]

# Colours vary along these axes (gray, yellow-blue, green-magenta), about 90, 8 and 2 % of the
# variance in photographs (Krizhevsky et al. 2012); an analysis of any set of them finds about that.
_AXES = np.array([[0.58, 0.58, 0.58], [0.74, -0.04, -0.67], [-0.36, 0.81, -0.46]], np.float32)
# Mean colour of ImageNet, red, green and blue.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
# Textures are periodic, so that one tile covers a picture of any size.
_TILE = 256
_TEXTURES = 12
# More leaves take time and change nothing that can be seen.
_MOST_LEAVES = 1500


class Pictures:
    """Scenes of overlapping leaves, the size of which follows a power law ("dead leaves").

    Occlusion and the power law give what natural images have: edges at all scales, a 1/f spectrum,
    sparse filter responses (Lee, Mumford and Huang 2001). Each leaf has a colour, a gradient of
    light and a 1/f texture; each picture its own clutter, contrast, colours and sharpness.

    Args:
        seed: Pictures depend on it and on their number alone.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._textures = _textures(np.random.default_rng([seed, 0]))

    def draw(self, index: int, height: int, width: int) -> np.ndarray:
        """One picture, uint8 [H, W, 3], red first."""
        from PIL import Image, ImageFilter

        rng = np.random.default_rng([self.seed, 1, index])
        leaves, x, y, radius = _leaves(rng, height, width)
        looks = _looks(rng, np.concatenate([[0.6 * max(height, width)], radius]))
        # light is linear within a leaf, and does not change its mean colour
        looks[:, :3] -= looks[:, 3:4] * np.concatenate([[width / 2], x])[:, None]
        looks[:, :3] -= looks[:, 4:5] * np.concatenate([[height / 2], y])[:, None]
        scene = looks[leaves]
        down, right = np.ogrid[:height, :width]
        light = scene[..., 3] * right.astype(np.float32) + scene[..., 4] * down.astype(np.float32)
        for column, texture in enumerate(rng.integers(0, _TEXTURES, 3), 5):
            at = rng.integers(0, _TILE, 2)
            tile = self._textures[texture][(down + at[0]) % _TILE, (right + at[1]) % _TILE]
            light += scene[..., column] * tile
        light += (rng.normal(0, 0.1) * (right / width - 0.5)).astype(np.float32)
        light += (rng.normal(0, 0.14) * (down / height - 0.5)).astype(np.float32)
        colours = np.clip(scene[..., :3] + light[..., None], 0, 1)
        image = Image.fromarray(np.rint(colours * 255).astype(np.uint8))
        blur = rng.choice([0, 0.5, 0.7, 1.0, 1.6], p=[0.2, 0.35, 0.25, 0.15, 0.05])
        return np.asarray(image.filter(ImageFilter.GaussianBlur(float(blur))))


def _textures(rng: np.random.Generator) -> np.ndarray:
    """Periodic fields with spectra 1/f^a, some stretched along a direction; unit variance."""
    down, right = np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None]
    fields = []
    for _ in range(_TEXTURES):
        angle, power = rng.uniform(0, np.pi), rng.uniform(0.4, 2.0)
        stretch = np.exp(rng.uniform(0, 1.5)) if rng.random() < 0.5 else 1.0
        along = np.cos(angle) * right + np.sin(angle) * down
        across = stretch * (np.cos(angle) * down - np.sin(angle) * right)
        frequency = np.maximum(np.hypot(along, across), 1.5 / _TILE)
        spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        spectrum *= frequency**-power
        spectrum[0, 0] = 0
        field = np.fft.irfft2(spectrum, (_TILE, _TILE))
        fields.append((field / field.std()).astype(np.float32))
    return np.stack(fields)


def _leaves(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which leaf is seen at each pixel (0: the ground), and centre and radius of each."""
    from PIL import Image, ImageDraw

    side = min(height, width)
    least = max(1.2, side * np.exp(rng.uniform(np.log(0.008), np.log(0.06))))
    most = max(2 * least, side * rng.uniform(0.35, 0.8))
    power = rng.uniform(2.2, 3.4)
    area = np.pi * _mean_square(power, least, most)
    count = int(np.clip(rng.uniform(0.7, 3.0) * height * width / area, 4, _MOST_LEAVES))
    ends = least ** (1 - power), most ** (1 - power)
    radius = (ends[0] + rng.random(count) * (ends[1] - ends[0])) ** (1 / (1 - power))
    x, y = rng.uniform(-0.1, 1.1, (2, count)) * [[width], [height]]
    stretch = np.exp(rng.normal(0, 0.22, count))
    turn = rng.uniform(0, 2 * np.pi, count)
    kind = rng.random(count)
    image = Image.new("I", (width, height), 0)
    canvas = ImageDraw.Draw(image)
    for i in range(count):
        a, b = radius[i] * stretch[i], radius[i] / stretch[i]
        if kind[i] < 0.4:
            canvas.ellipse((x[i] - a, y[i] - b, x[i] + a, y[i] + b), fill=i + 1)
            continue
        if kind[i] < 0.65:  # a rectangle, upright or turned
            corners, angle = np.pi * np.array([0.25, 0.75, 1.25, 1.75]), turn[i] * (kind[i] > 0.5)
        else:
            corners = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
            angle = turn[i]
        across, along = 1.3 * a * np.cos(corners), 1.3 * b * np.sin(corners)
        right = x[i] + np.cos(angle) * across - np.sin(angle) * along
        down = y[i] + np.sin(angle) * across + np.cos(angle) * along
        canvas.polygon(np.stack([right, down], 1).ravel().tolist(), fill=i + 1)
    return np.asarray(image), x, y, radius


def _mean_square(power: float, least: float, most: float) -> float:
    """E[r^2] where r has the density r^-power between least and most."""

    def moment(n: float) -> float:
        e = n + 1 - power
        return float(np.log(most / least)) if abs(e) < 1e-9 else (most**e - least**e) / e

    return moment(2) / moment(0)


def _looks(rng: np.random.Generator, radius: np.ndarray) -> np.ndarray:
    """Looks of each leaf: red, green, blue, light to the right, light down, three textures."""
    count = radius.size
    mean, spread = rng.normal(0, 0.16), rng.uniform(0.12, 0.36)
    vivid = np.exp(rng.normal(-0.15, 0.75))
    if rng.random() < 0.6:
        gray = rng.normal(0, spread, count)
    else:  # light and dark things
        gray = 1.2 * spread * np.sign(rng.normal(size=count)) * rng.beta(4, 2, count)
    tint = rng.normal(0, [0.078, 0.033]) * vivid
    chroma = rng.standard_t(4, (count, 2)) * np.array([0.06, 0.028]) * vivid + tint
    colour = np.column_stack([(mean + gray) / _AXES[0, 0], chroma]).astype(np.float32) @ _AXES
    light = rng.normal(size=(count, 2)) * rng.uniform(0, 0.7) * spread / radius[:, None]
    rough = np.exp(rng.normal(-2.9, 0.9, count)) * (rng.random(count) < 0.7)
    rough *= 2.0 if rng.random() < 0.3 else 1.0
    texture = rough[:, None] * (rng.integers(0, 3, count)[:, None] == np.arange(3))
    return np.concatenate([colour + _MEAN, light, texture], axis=1).astype(np.float32)


# ---------------------------------------------------------------------- sounds


def sound(rng: np.random.Generator, shape: Sequence[int], rate: float = 16000.0) -> np.ndarray:
    """Voices and noises that swell and fade, float32 between -1 and 1.

    Args:
        rng: Draws them.
        shape: Shape; time runs along the last axis, and each row is a sound of its own.
        rate: Samples per second.
    """
    rows = [_sound(rng, shape[-1], rate) for _ in range(int(np.prod(shape[:-1])))]
    return np.stack(rows).reshape(shape).astype(np.float32)


def _sound(rng: np.random.Generator, length: int, rate: float) -> np.ndarray:
    time = np.arange(length) / rate
    total = 0.05 * np.exp(rng.normal(-1, 1)) * _colored(rng, length, rng.uniform(0, 1.5))
    for _ in range(rng.integers(1, 4)):
        if rng.random() < 0.7:  # a voice: harmonics of a gliding pitch under a few resonances
            pitch = np.exp(rng.uniform(np.log(80), np.log(400)))
            glide = 1 + 0.2 * rng.normal() * np.sin(2 * np.pi * rng.uniform(0.5, 3) * time)
            phase = 2 * np.pi * np.cumsum(pitch * glide) / rate + rng.uniform(0, 2 * np.pi)
            tones = np.arange(1, max(2, min(40, int(0.45 * rate / pitch))))
            centres = rng.uniform([200, 700, 2000], [900, 2300, 3500])
            widths = rng.uniform(80, 300, 3)
            peaks = 1 / (1 + ((pitch * tones[:, None] - centres) / widths) ** 2)
            strength = (0.05 + peaks.sum(1)) / tones ** rng.uniform(0.3, 1.2)
            part = sum(s * np.sin(k * phase + 2 * k) for k, s in zip(tones, strength, strict=True))
        else:
            part = _colored(rng, length, rng.uniform(-0.5, 1.0))
        part = part / max(float(np.std(part)), 1e-9)
        total = total + np.exp(rng.normal(-0.3, 0.6)) * _envelope(rng, time) * part
    peak = np.exp(rng.uniform(np.log(0.05), 0))
    result: np.ndarray = total * peak / max(float(np.abs(total).max()), 1e-9)
    return result


def _colored(rng: np.random.Generator, length: int, power: float) -> np.ndarray:
    """Noise with the power spectrum 1/f^(2 power), unit variance."""
    frequency = np.maximum(np.fft.rfftfreq(length), 1e-3)
    spectrum = np.fft.rfft(rng.normal(size=length)) * frequency**-power
    noise = np.fft.irfft(spectrum, length)
    return np.asarray(noise / max(float(noise.std()), 1e-9))


def _envelope(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """Swells of a tenth to a third of a second, with silence between some of them."""
    total = np.zeros_like(time)
    seconds = float(time[-1]) if time.size else 0.0
    for _ in range(1 + rng.poisson(3 * seconds)):
        centre, width = rng.uniform(-0.05, seconds + 0.05), rng.uniform(0.04, 0.15)
        total += rng.uniform(0.2, 1) * np.exp(-(((time - centre) / width) ** 2))
    return total
