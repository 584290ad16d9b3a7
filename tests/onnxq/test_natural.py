"""Pictures and sounds that are made up: the statistics that natural ones have."""

import numpy as np
import pytest

from onnxq.natural import Pictures, sound


@pytest.fixture(scope="module")
def pictures():
    drawn = Pictures(0)
    return np.stack([drawn.draw(i, 128, 160) for i in range(96)]) / 255.0


def test_pictures_have_size_and_type():
    picture = Pictures(0).draw(3, 20, 33)
    assert (picture.shape, picture.dtype) == ((20, 33, 3), np.uint8)
    assert Pictures(0).draw(0, 1, 1).shape == (1, 1, 3)


def test_a_picture_depends_on_seed_and_number_alone():
    one, two = Pictures(5), Pictures(5)
    two.draw(7, 40, 40)
    assert np.array_equal(one.draw(2, 24, 24), two.draw(2, 24, 24))
    assert not np.array_equal(one.draw(2, 24, 24), one.draw(3, 24, 24))
    assert not np.array_equal(one.draw(2, 24, 24), Pictures(6).draw(2, 24, 24))


def test_colours_are_those_of_photographs(pictures):
    # ImageNet: means 0.485, 0.456, 0.406, deviations 0.28, and nearly all of it in brightness
    pixels = pictures.reshape(-1, 3)
    assert np.abs(pixels.mean(axis=0) - [0.485, 0.456, 0.406]).max() < 0.06
    assert np.abs(pixels.std(axis=0) - 0.28).max() < 0.05
    shares = np.linalg.eigvalsh(np.cov(pixels.T))[::-1]
    shares /= shares.sum()
    assert 0.8 < shares[0] < 0.97
    assert 0.02 < shares[1] < 0.15
    assert np.corrcoef(pixels.T).min() > 0.7


def test_edges_are_sparse_and_come_at_all_scales(pictures):
    gray = pictures.mean(axis=-1)
    steps = np.diff(gray, axis=2)
    kurtosis = (steps**4).mean((1, 2)) / (steps**2).mean((1, 2)) ** 2
    assert np.median(kurtosis) > 10  # 3 in Gaussian noise
    # the amplitude of natural images falls as 1/f: about -1 on logarithmic axes
    window = np.outer(np.hanning(128), np.hanning(128))
    middle = gray[:, :, :128] - gray[:, :, :128].mean((1, 2), keepdims=True)
    amplitude = np.sqrt((np.abs(np.fft.fft2(middle * window)) ** 2).mean(axis=0))
    row = amplitude[0, 2:40]
    slope = np.polyfit(np.log(np.arange(2, 40)), np.log(row), 1)[0]
    assert -1.7 < slope < -0.8


@pytest.mark.parametrize("shape", [(16000,), (1, 8000), (3, 2, 700)])
def test_sounds_swell_between_minus_one_and_one(shape):
    drawn = [sound(np.random.default_rng(i), shape) for i in range(20)]
    assert all(x.shape == shape and x.dtype == np.float32 for x in drawn)
    peaks = [np.abs(row).max() for x in drawn for row in x.reshape(-1, shape[-1])]
    assert 0.01 < min(peaks) < max(peaks) <= 1
    assert max(peaks) > 3 * min(peaks)  # loud ones and quiet ones
    again = sound(np.random.default_rng(4), shape)
    assert np.array_equal(again, drawn[4])


def test_sounds_come_and_go():
    crests = []
    for i in range(20):
        x = sound(np.random.default_rng(i), (16000,))
        crests.append(np.abs(x).max() / x.std())
    assert np.median(crests) > 5  # 1.4 for a tone, about 4 for steady noise
