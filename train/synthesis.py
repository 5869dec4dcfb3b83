"""Foreground-aware anomaly synthesis: normal-anomaly image pairs from good images alone.

Follows the scheme of DRAEM and of DMDD's Figure 5, where beta is an opacity and the products are
element-wise::

    I_a = (1 - M) * I_n  +  M * ((1 - beta) * A + beta * I_n)

M is a Perlin-noise mask times a foreground mask, A an anomaly source. Three things are ours and named
so: the strokes and blobs among the mask shapes, the photometric source, and the procedural textures
that stand in for the DTD texture set where the user names no folder of textures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.frames import Pixels

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

REAL_SHARE: Final = 0.5
VISIBLE: Final = 5.0
"""Mean change, in gray levels over 5 x 5 pixels, from which a synthetic defect counts as one."""


def perlin(height: int, width: int, rng: np.random.Generator, max_octave: int = 5) -> Floats:
    """Return Perlin gradient noise, float32 ``(height, width)``, about [-1, 1], turned by a random angle.

    Each axis has 2^t cells, t uniform in 0..max_octave, as in DRAEM.
    """
    rows, cols = 2 ** int(rng.integers(0, max_octave + 1)), 2 ** int(rng.integers(0, max_octave + 1))
    angles = rng.uniform(0, 2 * np.pi, (rows + 1, cols + 1))
    y = np.linspace(0, rows, height, endpoint=False, dtype=np.float32)
    x = np.linspace(0, cols, width, endpoint=False, dtype=np.float32)
    iy, ix = y.astype(np.intp), x.astype(np.intp)
    fy, fx = (y - iy)[:, None], (x - ix)[None, :]
    gy, gx = np.sin(angles).astype(np.float32), np.cos(angles).astype(np.float32)

    def corner(dy: int, dx: int) -> Floats:
        at = np.ix_(iy + dy, ix + dx)
        return np.asarray(gy[at] * (fy - dy) + gx[at] * (fx - dx))

    wy, wx = (t * t * t * (t * (t * 6 - 15) + 10) for t in (fy, fx))
    top = corner(0, 0) + wx * (corner(0, 1) - corner(0, 0))
    bottom = corner(1, 0) + wx * (corner(1, 1) - corner(1, 0))
    noise = np.sqrt(2) * (top + wy * (bottom - top))
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), float(rng.uniform(-90, 90)), 1.0)
    return np.asarray(cv2.warpAffine(noise.astype(np.float32), turn, (width, height), borderMode=cv2.BORDER_REFLECT))


def perlin_mask(height: int, width: int, rng: np.random.Generator) -> Mask:
    """Perlin noise above 0.5 (DRAEM)."""
    return perlin(height, width, rng) > 0.5


def stroke_mask(height: int, width: int, rng: np.random.Generator) -> Mask:
    """A wandering stroke of varying width, as a crack or a scratch."""
    canvas = np.zeros((height, width), np.uint8)
    point = rng.uniform((0, 0), (width, height))
    heading, size = rng.uniform(0, 2 * np.pi), max(height, width)
    wander, step = rng.uniform(0.05, 0.6), rng.uniform(0.02, 0.06) * size
    thickness = np.exp(rng.uniform(np.log(0.8), np.log(5))) * size / 256
    for _ in range(int(rng.integers(2, 14))):
        heading += rng.normal(0, wander)
        end = point + step * np.array([np.cos(heading), np.sin(heading)])
        width_here = max(1, round(thickness * rng.uniform(0.6, 1.4)))
        cv2.line(canvas, _pixel(point), _pixel(end), 1, width_here)
        point = end
    return np.asarray(canvas > 0)


def _pixel(point: NDArray[np.float64]) -> tuple[int, int]:
    return int(point[0]), int(point[1])


def blob_mask(height: int, width: int, rng: np.random.Generator) -> Mask:
    """One to three small ellipses, as pits, holes and inclusions."""
    canvas = np.zeros((height, width), np.uint8)
    size = max(height, width)
    for _ in range(int(rng.integers(1, 4))):
        centre = (int(rng.integers(0, width)), int(rng.integers(0, height)))
        radius = size * np.exp(rng.uniform(np.log(0.008), np.log(0.08)))
        axes = (max(1, round(radius)), max(1, round(radius * rng.uniform(0.4, 1.0))))
        cv2.ellipse(canvas, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
    return np.asarray(canvas > 0)


@dataclass(frozen=True)
class Kind:
    """A kind of synthetic defect: how often it is drawn, its shape, and the odds of each source for it."""

    share: float
    shape: Callable[[int, int, np.random.Generator], Mask]
    texture: float
    structural: float
    photometric: float


KINDS: Final = (
    Kind(0.5, perlin_mask, texture=0.35, structural=0.3, photometric=0.35),
    Kind(0.3, stroke_mask, texture=0.25, structural=0.05, photometric=0.7),
    Kind(0.2, blob_mask, texture=0.3, structural=0.2, photometric=0.5),
)


@dataclass
class Synthesizer:
    """Makes a defective twin of a good image, with its mask.

    Attributes:
        images: Good images, uint8 ``(n, H, W, C)``; also the source of structural anomalies.
        foregrounds: Where anomalies may lie, bool ``(n, H, W)``, or None for anywhere.
        textures: Foreign textures, uint8 ``(m, H, W, C)``; procedural ones where empty.
        defects: Real defects, uint8 ``(H, W, C)`` with a bool mask ``(H, W)``: half of the anomalies are then cut out
            of these and put on a good image.
        probability: Share of samples that get an anomaly at all; the rest stay good.
    """

    images: Pixels
    foregrounds: Mask | None = None
    textures: Pixels | None = None
    defects: Sequence[tuple[Pixels, Mask]] = ()
    probability: float = 0.85
    retries: int = 4

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Pixels, Mask]:
        """Return the twin of image ``index``, uint8 ``(H, W, C)``, and its mask, bool ``(H, W)``."""
        image = self.images[index]
        if rng.random() >= self.probability:
            return image, np.zeros(image.shape[:2], bool)
        if self.defects and rng.random() < REAL_SHARE:
            return self._transplanted(index, rng)
        kind = KINDS[rng.choice(len(KINDS), p=[kind.share for kind in KINDS])]
        mask = self._mask(kind, index, rng)
        source = self._source(kind, index, rng)
        beta = 0.8 * rng.random()
        clean = image.astype(np.float32)
        mixed = (1 - beta) * source + beta * clean
        weight = _soften(mask, rng)[..., None]
        twin = np.clip(clean + weight * (mixed - clean), 0, 255).astype(np.uint8)
        return twin, mask & _visible(twin, image)

    def _transplanted(self, index: int, rng: np.random.Generator) -> tuple[Pixels, Mask]:
        """A real defect on a good image: moved, turned and mirrored a little, at a soft edge."""
        source, mask = self.defects[int(rng.integers(len(self.defects)))]
        height, width = mask.shape
        turn = cv2.getRotationMatrix2D(
            (width / 2, height / 2), float(rng.uniform(-20, 20)), float(rng.uniform(0.8, 1.2))
        )
        turn[:, 2] += rng.uniform(-0.1, 0.1, 2) * np.array([width, height])
        moved = np.asarray(cv2.warpAffine(source, turn, (width, height), borderMode=cv2.BORDER_REFLECT), np.uint8)
        where = np.asarray(cv2.warpAffine(mask.astype(np.uint8), turn, (width, height), flags=cv2.INTER_NEAREST)) > 0
        if self.foregrounds is not None:
            where &= self.foregrounds[index]
        weight = np.asarray(cv2.GaussianBlur(where.astype(np.float32), (0, 0), 1.0))[..., None]
        clean = self.images[index].astype(np.float32)
        mixed = clean + weight * (moved.reshape(source.shape) - clean)
        twin = np.clip(mixed, 0, 255).astype(np.uint8)
        return twin, where & _visible(twin, self.images[index])

    def _mask(self, kind: Kind, index: int, rng: np.random.Generator) -> Mask:
        """A shape on the part; drawn again a few times where it misses the part."""
        height, width = self.images.shape[1:3]
        mask = np.zeros((height, width), bool)
        for _ in range(self.retries):
            mask = kind.shape(height, width, rng)
            if self.foregrounds is not None:
                mask &= self.foregrounds[index]
            if mask.any():
                break
        return mask

    def _source(self, kind: Kind, index: int, rng: np.random.Generator) -> Floats:
        draw = rng.random()
        if draw < kind.photometric:
            return _photometric(self.images[index], rng)
        if draw < kind.photometric + kind.structural:
            return _structural(self.images[rng.integers(len(self.images))], rng)
        if self.textures is not None and len(self.textures):
            return np.asarray(self.textures[rng.integers(len(self.textures))], np.float32)
        return procedural_texture(self.images.shape[1:], rng)


def _visible(twin: Pixels, image: Pixels) -> Mask:
    """Where a twin differs enough to be seen: one that looks like its original teaches that good is bad."""
    change = np.abs(twin.astype(np.int16) - image).max(axis=2).astype(np.float32)
    return np.asarray(cv2.blur(change, (5, 5)) > VISIBLE)


def _soften(mask: Mask, rng: np.random.Generator) -> Floats:
    """Blur the mask's edge now and then, so that a hard edge is not what the head learns."""
    weight = mask.astype(np.float32)
    if rng.random() < 0.5:
        sigma = float(rng.uniform(0.4, 2.0)) * mask.shape[0] / 256
        weight = np.asarray(cv2.GaussianBlur(weight, (0, 0), sigma))
    return weight


def _photometric(image: Pixels, rng: np.random.Generator) -> Floats:
    """The same place darker, brighter, flatter or blurred: stains, dents, wear, poor light."""
    source = image.astype(np.float32)
    if rng.random() < 0.3:
        source = np.asarray(cv2.GaussianBlur(source, (0, 0), float(rng.uniform(2, 8))), np.float32).reshape(image.shape)
    mean = source.mean(axis=(0, 1), keepdims=True)
    contrast = rng.uniform(0.3, 1.7)
    shift = rng.choice([-1, 1]) * np.exp(rng.uniform(np.log(18), np.log(140)))
    tint = rng.normal(0, 15, (1, 1, image.shape[2])) if image.shape[2] > 1 else 0.0
    return np.asarray((source - mean) * contrast + mean + shift + tint, np.float32)


def _structural(image: Pixels, rng: np.random.Generator) -> Floats:
    """A good image cut into a grid, shuffled, turned and re-coloured (MemSeg's structural source)."""
    height, width, channels = image.shape
    cells = int(rng.choice([2, 4, 8]))
    rows, cols = height // cells, width // cells
    tiles = image[: rows * cells, : cols * cells].reshape(cells, rows, cells, cols, channels)
    tiles = tiles.transpose(0, 2, 1, 3, 4).reshape(-1, rows, cols, channels)
    tiles = tiles[rng.permutation(len(tiles))].reshape(cells, cells, rows, cols, channels)
    mixed = tiles.transpose(0, 2, 1, 3, 4).reshape(rows * cells, cols * cells, channels)
    mixed = np.ascontiguousarray(mixed[:, :: 1 - 2 * int(rng.integers(2))])
    if mixed.shape[:2] != (height, width):
        mixed = np.array(cv2.resize(mixed, (width, height)), np.uint8).reshape(height, width, channels)
    gain, shift = rng.uniform(0.6, 1.4), rng.uniform(-50, 50)
    return np.asarray(mixed.astype(np.float32) * gain + shift)


def procedural_texture(shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Multi-octave noise of random grain, direction and colour, float32 ``(H, W, C)`` in 0..255."""
    height, width, channels = shape
    total = np.zeros((height, width), np.float32)
    grain = rng.uniform(0.3, 1.0)
    stretch = np.exp2(rng.uniform(-2, 2))
    for octave in range(2, 8):
        size = (max(2, int(2**octave * stretch)), max(2, int(2**octave / stretch)))
        cells = rng.standard_normal((min(size[1], height), min(size[0], width))).astype(np.float32)
        total += grain ** (7 - octave) * np.asarray(cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC))
    low, high = np.percentile(total[::4, ::4], (2, 98))
    unit = np.clip((total - low) / max(high - low, 1e-6), 0, 1)[..., None]
    dark, bright = np.sort(rng.uniform(0, 255, (2, 1, 1, channels)), axis=0)
    return np.asarray(dark + unit * (bright - dark), np.float32)
