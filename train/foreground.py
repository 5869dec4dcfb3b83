"""Where the part is in the image, so that synthetic anomalies are put on it and not beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.frames import Pixels

Mask = NDArray[np.bool_]
Method = Literal["auto", "grabcut", "otsu", "otsu-inverse", "none"]

RATIO = (0.05, 0.9)
"""A foreground outside these shares of the image says that the method has failed on it."""
MAX_BORDER, MAX_SPREAD = 0.35, 0.15
GRABCUT_SIDE = 128


def grabcut(image: Pixels) -> Mask:
    """Foreground by GrabCut from a rectangle inset by one pixel, 5 iterations, on a reduced image: it is slow."""
    colour = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
    factor = min(1.0, GRABCUT_SIDE / max(colour.shape[:2]))
    colour = np.asarray(cv2.resize(colour, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), np.uint8)
    height, width = colour.shape[:2]
    labels = np.zeros((height, width), np.uint8)
    box = (1, 1, width - 2, height - 2)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    try:
        cv2.grabCut(colour, labels, box, *models, 5, cv2.GC_INIT_WITH_RECT)
    except cv2.error:  # one flat colour: no model can be fitted, so nothing is foreground
        return np.zeros(image.shape[:2], bool)
    found = ((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)).astype(np.uint8)
    return np.asarray(cv2.resize(found, image.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0)


def otsu(image: Pixels) -> Mask:
    """Foreground brighter than Otsu's threshold."""
    gray = image[..., 0] if image.shape[2] == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    _, binary = cv2.threshold(np.ascontiguousarray(gray), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return np.asarray(binary > 0)


def otsu_inverse(image: Pixels) -> Mask:
    """Foreground darker than Otsu's threshold."""
    return ~otsu(image)


METHODS: dict[str, Callable[[Pixels], Mask]] = {
    "grabcut": grabcut,
    "otsu": otsu,
    "otsu-inverse": otsu_inverse,
}


def plausible(masks: Mask) -> bool:
    """Whether masks ``(n, H, W)`` look like one part on a ground: sizes agree, borders are mostly ground."""
    ratios = masks.mean(axis=(1, 2))
    border = np.concatenate([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]], axis=1).mean()
    inside = bool(np.all((ratios > RATIO[0]) & (ratios < RATIO[1])))
    return inside and border < MAX_BORDER and float(ratios.std()) < MAX_SPREAD


def choose(images: Pixels, probe: int = 8) -> str:
    """Return the first method whose masks on a few images are plausible, else ``none``."""
    sample = images[np.linspace(0, len(images) - 1, min(probe, len(images))).astype(int)]
    for name in ("otsu", "otsu-inverse", "grabcut"):
        if plausible(np.stack([METHODS[name](image) for image in sample])):
            return name
    return "none"


def foregrounds(images: Pixels, method: Method = "auto") -> tuple[Mask | None, str, float]:
    """Find the part in every image.

    Args:
        images: uint8 ``(n, H, W, C)``.
        method: One method for all images; ``auto`` takes the first that is plausible on a sample.

    Returns:
        Masks, bool ``(n, H, W)``, closed and grown a little so that the part's edge belongs to it (None for
        the whole image); the method taken; the mean share of the image that is foreground.
    """
    name = choose(images) if method == "auto" else method
    if name == "none":
        return None, "none", 1.0
    size = max(3, images.shape[1] // 48) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    masks = np.empty(images.shape[:3], bool)
    for slot, image in zip(masks, images, strict=True):
        found = METHODS[name](image).astype(np.uint8)
        found = np.asarray(cv2.morphologyEx(found, cv2.MORPH_CLOSE, kernel), np.uint8)
        slot[:] = cv2.dilate(found, kernel) > 0
        if not RATIO[0] < slot.mean() < 1:
            slot[:] = True
    return masks, name, float(masks.mean())
