"""Cheap statistics of a decoded frame: how bright, how sharp, how much of it is clipped."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from engines.frames import Pixels

GRID: Final = 64
"""Rows and columns that are looked at, of a frame that has so many; up to twice as many where it does not divide."""
BESIDE: Final = 2
"""Pixels between the two of a pair whose difference is taken."""
DARK: Final = 2
BRIGHT: Final = 253
"""Levels from which on, down and up, a pixel counts as clipped."""


class Optics(NamedTuple):
    """Statistics of one frame as the engine sees it.

    Attributes:
        brightness: Mean level, 0..255.
        sharpness: Energy of the differences between near pixels over that of the mean level: it falls when an image
            blurs and is the same where only the light changes.
        clipping: Share of pixels at an end of the scale, 0..1.
        size: Height and width of the frame.
    """

    brightness: float
    sharpness: float
    clipping: float
    size: tuple[int, int]


def measure(slot: Pixels) -> Optics:
    """Take the statistics of a frame on a coarse grid.

    Sharpness is Brenner's focus measure (Brenner et al., Journal of Histochemistry and Cytochemistry 24 (1), 1976),
    the squared difference of pixels two apart, normalised by the squared mean as the measures in Santos et al.,
    Journal of Microscopy 188 (3), 1997. Of three channels the second one, green, is looked at.

    Args:
        slot: uint8 ``(h, w, c)`` with 1 or 3 channels; only read.
    """
    height, width, channels = slot.shape
    down, across = max(1, height // GRID), max(1, width // GRID)
    rows = slot[::down, :, channels // 2]
    grid = rows[:, : max(width - BESIDE, 1) : across].astype(np.float32)
    beside = rows[:, min(BESIDE, width - 1) :: across]
    mean = float(grid.mean())
    differences = (grid - beside).ravel()
    energy = float(differences @ differences) / differences.size
    clipped = np.count_nonzero((grid <= DARK) | (grid >= BRIGHT)) / grid.size
    return Optics(mean, energy / (mean * mean + 1.0), clipped, (height, width))
