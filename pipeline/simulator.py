"""The part simulator: rendered parts with believable variation, and defects with known truth.

It is the demo's camera, the load generator and test data. It is no substitute for real images.
Every frame is a function of (seed, index): two runs show the same parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.frames import Pixels

GOOD: Final = "good"
Mask = NDArray[np.bool_]
Colour = tuple[float, float, float]
Rng = np.random.Generator


@dataclass(frozen=True)
class Shot:
    """One simulated photograph.

    Attributes:
        image: uint8 ``(height, width, 3)``, BGR.
        label: ``good`` or the defect's name.
        mask: bool ``(height, width)``, true on the defect.
    """

    image: Pixels
    label: str
    mask: Mask


@dataclass(frozen=True)
class _Canvas:
    """A part before it is posed: colour, where it is, and room for a defect."""

    colour: Pixels
    alpha: Pixels
    size: int

    def at(self, x: float, y: float) -> tuple[int, int]:
        """Pixel of unit coordinates, -1..1 across the part's square."""
        half = self.size / 2
        return int(half + x * half), int(half + y * half)

    def length(self, units: float) -> int:
        """Pixels of a length in the same units, at least 1."""
        return max(1, round(units * self.size / 2))


def _new_canvas(size: int) -> _Canvas:
    return _Canvas(np.zeros((size, size, 3), np.uint8), np.zeros((size, size), np.uint8), size)


def _grain(size: int, rng: Rng, stretch: tuple[int, int], strength: float) -> NDArray[np.float32]:
    """Directional surface texture, multiplicative, about 1."""
    rows, cols = max(4, size // stretch[0]), max(4, size // stretch[1])
    noise = rng.normal(0, strength, (rows, cols)).astype(np.float32)
    return np.asarray(1 + cv2.resize(noise, (size, size), interpolation=cv2.INTER_LINEAR))


def _washer(size: int, rng: Rng) -> _Canvas:
    """A turned steel washer: concentric tool marks, a hole, a stamped mark."""
    canvas = _new_canvas(size)
    cv2.circle(canvas.alpha, canvas.at(0, 0), canvas.length(0.8), 255, -1, cv2.LINE_AA)
    cv2.circle(canvas.alpha, canvas.at(0, 0), canvas.length(0.34), 0, -1, cv2.LINE_AA)
    rings = _grain(size, rng, (size, 2), 0.10)
    flags = cv2.WARP_INVERSE_MAP | cv2.WARP_FILL_OUTLIERS | cv2.INTER_LINEAR | cv2.WARP_POLAR_LINEAR
    polar = cv2.warpPolar(rings, (size, size), canvas.at(0, 0), size / 2, flags)
    shade = np.asarray(polar)[..., None] * np.array([168, 165, 160], np.float32)
    canvas.colour[:] = np.clip(shade, 0, 255)
    cv2.circle(canvas.colour, canvas.at(0, 0), canvas.length(0.77), (120, 118, 115), 2, cv2.LINE_AA)
    cv2.circle(canvas.colour, canvas.at(0, 0), canvas.length(0.38), (110, 108, 105), 2, cv2.LINE_AA)
    return canvas


def _washer_feature(canvas: _Canvas) -> None:
    cv2.circle(canvas.colour, canvas.at(0, -0.57), canvas.length(0.09), (70, 68, 66), -1, cv2.LINE_AA)


def _cap(size: int, rng: Rng) -> _Canvas:
    """A moulded bottle cap: knurled rim, raised ring, printed star."""
    canvas = _new_canvas(size)
    angles = np.linspace(0, 2 * np.pi, 192, endpoint=False)
    radius = 0.80 + 0.025 * np.sign(np.sin(24 * angles))
    rim = [canvas.at(r * np.cos(a), r * np.sin(a)) for r, a in zip(radius, angles, strict=True)]
    cv2.fillPoly(canvas.alpha, [np.array(rim, np.int32)], 255, cv2.LINE_AA)
    canvas.colour[:] = np.clip(_grain(size, rng, (3, 3), 0.02)[..., None] * np.array([150, 70, 30]), 0, 255)
    cv2.circle(canvas.colour, canvas.at(0, 0), canvas.length(0.66), (185, 100, 55), canvas.length(0.05), cv2.LINE_AA)
    cv2.circle(canvas.colour, canvas.at(0, 0), canvas.length(0.60), (120, 52, 20), 2, cv2.LINE_AA)
    return canvas


def _cap_feature(canvas: _Canvas) -> None:
    tips = [canvas.at(r * np.sin(k * np.pi / 5), -r * np.cos(k * np.pi / 5)) for k, r in enumerate([0.36, 0.15] * 5)]
    cv2.fillPoly(canvas.colour, [np.array(tips, np.int32)], (235, 230, 225), cv2.LINE_AA)


def _plate(size: int, rng: Rng) -> _Canvas:
    """A brushed plate with four holes and a printed bar."""
    canvas = _new_canvas(size)
    cv2.rectangle(canvas.alpha, canvas.at(-0.82, -0.6), canvas.at(0.82, 0.6), 255, -1, cv2.LINE_AA)
    brushed = _grain(size, rng, (2, size), 0.07)[..., None] * np.array([140, 160, 165])
    canvas.colour[:] = np.clip(brushed, 0, 255)
    for x in (-0.68, 0.68):
        for y in (-0.46, 0.46):
            cv2.circle(canvas.alpha, canvas.at(x, y), canvas.length(0.08), 0, -1, cv2.LINE_AA)
            cv2.circle(canvas.colour, canvas.at(x, y), canvas.length(0.11), (95, 110, 115), 2, cv2.LINE_AA)
    return canvas


def _plate_feature(canvas: _Canvas) -> None:
    cv2.rectangle(canvas.colour, canvas.at(-0.35, -0.12), canvas.at(0.35, 0.12), (60, 60, 65), -1, cv2.LINE_AA)
    for k in range(5):
        x = -0.26 + 0.13 * k
        cv2.rectangle(canvas.colour, canvas.at(x, -0.06), canvas.at(x + 0.06, 0.06), (200, 205, 205), -1, cv2.LINE_AA)


PRODUCTS: Final[dict[str, tuple[Callable[[int, Rng], _Canvas], Callable[[_Canvas], None]]]] = {
    "washer": (_washer, _washer_feature),
    "cap": (_cap, _cap_feature),
    "plate": (_plate, _plate_feature),
}


def _spot(canvas: _Canvas, rng: Rng) -> tuple[float, float]:
    """A random place well on the part."""
    inner = cv2.erode(canvas.alpha, np.ones((canvas.length(0.12),) * 2, np.uint8))
    ys, xs = np.nonzero(inner > 128)
    k = int(rng.integers(len(xs)))
    half = canvas.size / 2
    return float(xs[k] / half - 1), float(ys[k] / half - 1)


def _wander(canvas: _Canvas, rng: Rng, steps: int, step: float, wobble: float) -> NDArray[np.int32]:
    x, y = _spot(canvas, rng)
    heading, points = rng.uniform(0, 2 * np.pi), []
    for _ in range(steps):
        points.append(canvas.at(x, y))
        heading += rng.normal(0, wobble)
        x, y = x + step * np.cos(heading), y + step * np.sin(heading)
    return np.array(points, np.int32)


def _scratch(canvas: _Canvas, hit: Pixels, rng: Rng) -> None:
    points = _wander(canvas, rng, 8, rng.uniform(0.06, 0.1), 0.12)
    shade = float(rng.choice([40, 245]))
    for image, value in ((canvas.colour, (shade,) * 3), (hit, 255)):
        cv2.polylines(image, [points], False, value, canvas.length(rng.uniform(0.012, 0.02)), cv2.LINE_AA)


def _crack(canvas: _Canvas, hit: Pixels, rng: Rng) -> None:
    points = _wander(canvas, rng, 10, rng.uniform(0.05, 0.08), 0.6)
    for image, value in ((canvas.colour, (18, 18, 20)), (hit, 255)):
        cv2.polylines(image, [points], False, value, canvas.length(0.015), cv2.LINE_AA)


def _dent(canvas: _Canvas, hit: Pixels, rng: Rng) -> None:
    radius = canvas.length(rng.uniform(0.08, 0.14))
    x, y = canvas.at(*_spot(canvas, rng))
    yy, xx = np.mgrid[: canvas.size, : canvas.size]
    distance = np.hypot(xx - x, yy - y) / radius
    slope = ((xx - x) + (yy - y)) / (1.4 * radius) * np.exp(-(distance**2) * 1.2)
    canvas.colour[:] = np.clip(canvas.colour + (110 * slope)[..., None], 0, 255)
    hit[distance < 1.1] = 255


def _stain(canvas: _Canvas, hit: Pixels, rng: Rng) -> None:
    centre = canvas.at(*_spot(canvas, rng))
    axes = canvas.length(rng.uniform(0.08, 0.2)), canvas.length(rng.uniform(0.06, 0.12))
    blot = np.zeros(canvas.alpha.shape, np.uint8)
    cv2.ellipse(blot, centre, axes, float(rng.uniform(0, 180)), 0, 360, 255, -1, cv2.LINE_AA)
    hit |= blot
    soft = cv2.GaussianBlur(blot, (0, 0), canvas.size / 90)[..., None] / 255 * rng.uniform(0.35, 0.7)
    tint = np.array([30, 60, 85]) if rng.random() < 0.5 else np.array([35, 35, 35])
    canvas.colour[:] = np.clip(canvas.colour * (1 - soft) + tint * soft, 0, 255)


def _foreign(canvas: _Canvas, hit: Pixels, rng: Rng) -> None:
    points = _wander(canvas, rng, 6, 0.05, 1.3)
    colour = tuple(float(c) for c in rng.uniform(0, 255, 3))
    for image, value in ((canvas.colour, colour), (hit, 255)):
        cv2.fillPoly(image, [cv2.convexHull(points)], value, cv2.LINE_AA)
        cv2.polylines(image, [points], True, value, canvas.length(0.03), cv2.LINE_AA)


DEFECTS: Final[dict[str, Callable[[_Canvas, Pixels, Rng], None]]] = {
    "scratch": _scratch,
    "crack": _crack,
    "dent": _dent,
    "stain": _stain,
    "foreign": _foreign,
}
MISSING: Final = "missing"


class Simulator:
    """Photographs of one product on a belt.

    Args:
        product: ``washer``, ``cap`` or ``plate``.
        width, height: Size of the image in pixels.
        seed: Fixes every frame.
        defects: Share of defective parts, 0..1.

    Raises:
        ValueError: for an unknown product, or a size under 32 pixels.
    """

    def __init__(
        self, product: str = "washer", *, width: int = 320, height: int = 320, seed: int = 0, defects: float = 0.1
    ) -> None:
        if product not in PRODUCTS:
            msg = f"product {product!r}: one of {', '.join(PRODUCTS)}"
            raise ValueError(msg)
        if min(width, height) < 32:
            msg = f"{width}x{height}: at least 32 pixels a side"
            raise ValueError(msg)
        self.width, self.height, self.seed, self.defects = width, height, seed, defects
        make, self._feature = PRODUCTS[product]
        # The surface belongs to the product, not to the seed of the run: all runs show the same kind of part.
        material = np.random.default_rng(7)
        self._plain = make(min(width, height), material)
        self._belt = np.clip(material.normal(42, 5, (height * 2, width * 2, 1)), 0, 255).astype(np.uint8)
        self._noise = material.normal(0, 3.0, (height * 2, width * 2, 1)).astype(np.float32)
        self._yy, self._xx = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)

    def shot(self, index: int) -> Shot:
        """Photograph part ``index``; one in ``1 / defects`` is defective, which and how the seed decides."""
        rng = np.random.default_rng([self.seed, index])
        label = GOOD
        if rng.random() < self.defects:
            names = [*DEFECTS, MISSING]
            label = names[int(rng.integers(len(names)))]
        return self.render(label, rng)

    def render(self, label: str, rng: Rng) -> Shot:
        """Photograph one part with the named defect, or ``good``."""
        canvas = _Canvas(self._plain.colour.copy(), self._plain.alpha, self._plain.size)
        hit = np.zeros(canvas.alpha.shape, np.uint8)
        if label == MISSING:
            whole = canvas.colour.copy()
            self._feature(_Canvas(whole, canvas.alpha, canvas.size))
            hit[np.any(whole != canvas.colour, axis=2)] = 255
        else:
            self._feature(canvas)
        if label in DEFECTS:
            DEFECTS[label](canvas, hit, rng)
        return self._photograph(canvas, hit & canvas.alpha, label, rng)

    def _photograph(self, canvas: _Canvas, hit: Pixels, label: str, rng: Rng) -> Shot:
        """Pose, light, blur and noise."""
        pose = self._pose(canvas.size, rng)
        size = (self.width, self.height)
        part: Any = cv2.warpAffine(canvas.colour, pose, size, flags=cv2.INTER_LINEAR)
        alpha: Any = cv2.warpAffine(canvas.alpha, pose, size, flags=cv2.INTER_LINEAR)[..., None] / np.float32(255)
        mask: Any = cv2.warpAffine(hit, pose, size, flags=cv2.INTER_NEAREST) > 127
        tilt = rng.normal(0, 0.05, 2)
        light = rng.uniform(0.92, 1.08) + tilt[0] * self._xx + tilt[1] * self._yy
        scene = (self._crop(self._belt, rng) * (1 - alpha) + part * alpha) * light[..., None]
        image = np.clip(scene + self._crop(self._noise, rng), 0, 255).astype(np.uint8)
        return Shot(np.asarray(cv2.GaussianBlur(image, (3, 3), 0), np.uint8), label, np.asarray(mask))

    def _pose(self, size: int, rng: Rng) -> NDArray[np.float64]:
        """Rotation within 6 degrees, shift within 2 %, scale within 1.5 %, as a mechanical fixture leaves them."""
        pose = cv2.getRotationMatrix2D(
            (size / 2, size / 2), float(rng.uniform(-6, 6)), float(rng.uniform(0.985, 1.015))
        )
        shift = rng.uniform(-0.02, 0.02, 2) * size
        pose[:, 2] += ((self.width - size) / 2 + shift[0], (self.height - size) / 2 + shift[1])
        return np.asarray(pose, np.float64)

    def _crop(self, field: NDArray[Any], rng: Rng) -> NDArray[Any]:
        y, x = int(rng.integers(0, self.height)), int(rng.integers(0, self.width))
        return field[y : y + self.height, x : x + self.width]
