"""Small pictures of inspected parts: the photo with the mask's outline, and the heatmap over it."""

from __future__ import annotations

from base64 import b64encode
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.frames import Pixels
from train import data
from train.data import Sample

SIDE: Final = 280
"""Longer side of a picture, in pixels."""
QUALITY: Final = 80
OUTLINE: Final = (255, 235, 0)
"""Cyan in BGR: seen on parts of most colours, and never mistaken for the heat."""


def part_pictures(sample: Sample, heatmap: Pixels, level: float) -> tuple[str, str]:
    """The photo with the outline of its mask, and the same with the heatmap over it, as data URIs.

    Args:
        sample: The image and its mask, if it has one.
        heatmap: uint8 ``(h, w)`` of the engine.
        level: The heatmap's level at the threshold.

    Raises:
        DataError: if the image or the mask cannot be decoded.
    """
    photo = _shrunk(data.read_image(sample.path, 3))
    outline = None if sample.mask is None else _mask(sample, photo.shape[0], photo.shape[1])
    return tuple(_jpeg(_outlined(picture, outline)) for picture in (photo, heated(photo, heatmap, level)))  # type: ignore[return-value]


def heated(photo: Pixels, heatmap: Pixels, level: float) -> Pixels:
    """The photo in gray with the heatmap over it: clear far below the threshold, yellow at it, red far above.

    Args:
        photo: uint8 BGR ``(h, w, 3)``.
        heatmap: uint8 of any size; it is stretched over the photo.
        level: The heatmap's level at the threshold.
    """
    level = min(max(level, 1.0), 254.0)
    enlarged = cv2.resize(heatmap.astype(np.float32), photo.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    strength = np.interp(enlarged, [0.6 * level, level, level + 0.5 * (255 - level)], [0.0, 0.5, 1.0])
    gray = cv2.cvtColor(cv2.cvtColor(photo, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    yellow, red = np.array([20.0, 210.0, 255.0]), np.array([30.0, 20.0, 225.0])
    ramp = np.clip(2 * strength - 1, 0, 1)[..., None]
    opacity = 0.8 * np.clip(2 * strength, 0, 1)[..., None] ** 1.5
    mixed = gray * (1 - opacity) + ((1 - ramp) * yellow + ramp * red) * opacity
    return np.asarray(mixed + 0.5, np.uint8)


def _shrunk(image: Pixels) -> Pixels:
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    rule = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size, interpolation=rule), np.uint8)


def _mask(sample: Sample, height: int, width: int) -> Pixels:
    """The mask at a picture's size; a defect smaller than a pixel of it still shows."""
    mask = cv2.imread(str(sample.mask), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        msg = f"{sample.mask}: not a mask that OpenCV can decode"
        raise data.DataError(msg)
    small = cv2.resize((mask > 0).astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return (small > 0).astype(np.uint8)


def _outlined(picture: Pixels, mask: Pixels | None) -> Pixels:
    """A line around the mask, outside of it, so that it does not hide a small defect."""
    if mask is None:
        return picture
    wide = cv2.dilate(mask, np.ones((9, 9), np.uint8))
    contours, _ = cv2.findContours(wide, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    drawn: NDArray[Any] = cv2.drawContours(picture.copy(), contours, -1, (0, 0, 0), 4)
    return np.asarray(cv2.drawContours(drawn, contours, -1, OUTLINE, 2), np.uint8)


def _jpeg(picture: Pixels) -> str:
    done, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    if not done:
        raise RuntimeError("OpenCV could not encode a JPEG picture")
    return "data:image/jpeg;base64," + b64encode(encoded.tobytes()).decode()
