"""Image statistics: each answers to its own cause, and not to the others'."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.optics import measure

Image = NDArray[np.uint8]


@pytest.fixture
def part() -> Image:
    """A textured gray part, uint8 (256, 256, 1), far from both ends of the scale."""
    rng = np.random.default_rng(0)
    return np.clip(rng.normal(110, 18, (256, 256, 1)), 30, 200).astype(np.uint8)


def test_brightness_is_the_mean_level(part: Image) -> None:
    """Of the grid, which is near that of the image."""
    assert measure(part).brightness == pytest.approx(part.mean(), abs=2)


def test_a_weaker_lamp_takes_brightness_alone(part: Image) -> None:
    """Half the light is half the brightness, and the same sharpness."""
    full, half = measure(part), measure((part // 2).astype(np.uint8))
    assert half.brightness == pytest.approx(full.brightness / 2, abs=1)
    assert half.sharpness == pytest.approx(full.sharpness, rel=0.05)
    assert half.clipping == full.clipping == 0


def test_blur_takes_sharpness_alone(part: Image) -> None:
    """A defocused image is as bright, and far less sharp."""
    blurred = cv2.GaussianBlur(part, (0, 0), 1.5)[..., None]
    before, after = measure(part), measure(np.asarray(blurred, np.uint8))
    assert after.sharpness < before.sharpness / 4
    assert after.brightness == pytest.approx(before.brightness, rel=0.02)


def test_both_ends_of_the_scale_are_clipped(part: Image) -> None:
    """A quarter white and a quarter black are one half."""
    part[:64], part[64:128] = 255, 0
    assert measure(part).clipping == pytest.approx(0.5, abs=0.02)


def test_green_is_looked_at_in_colour() -> None:
    """Of three channels it is the second."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[..., 1] = 77
    assert measure(image).brightness == 77


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 2), (3, 7), (31, 33), (640, 480)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_has_figures(size: tuple[int, int], channels: int) -> None:
    """However small an engine's input is; the frame is not written to."""
    image = np.full((*size, channels), 9, np.uint8)
    image.flags.writeable = False
    found = measure(image)
    assert np.isfinite([found.brightness, found.sharpness, found.clipping]).all()
    assert (found.brightness, found.sharpness, found.size) == (9, 0, size)
