"""Frames that can be told from each other by the score that they get.

The engine of the soak scores the mean of all pixels, so a verdict's score says which pixels were judged: there are
about a million different sums, and the record shows six digits. ``part`` carries a digest of the pixels, so a record
says which frame its header came with. Both together tie a verdict to one frame, as a hash of the pixels in the record
would; no hash has to be computed while parts wait.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np

SIDE: Final = 64
THRESHOLD: Final = 0.5
GOOD: Final = (0.10, 0.45)
"""Range of the scores of good frames; nothing that is sent scores near the threshold."""
BAD: Final = (0.55, 0.90)
SCORE_TOLERANCE: Final = 2e-6
"""How far a recorded score may be from the frame's: six digits, and single precision."""


@dataclass(frozen=True)
class Picture:
    """A sound frame: ``SIDE`` x ``SIDE``, ``mono8``.

    Attributes:
        pixels: Row by row.
        score: What the engine gives for them.
        expect: ``OK`` or ``NG``.
    """

    pixels: bytes
    score: float
    expect: str

    @property
    def sha256(self) -> str:
        """Of the pixels."""
        return hashlib.sha256(self.pixels).hexdigest()

    @property
    def part(self) -> str:
        """What its header carries as ``part``."""
        return part_of(self.sha256)


def part_of(sha256: str) -> str:
    """The part id of a frame with this digest."""
    return sha256[:32]


def picture(rng: np.random.Generator, bad_share: float = 0.15) -> Picture:
    """A frame whose sum of pixels is drawn at random, good or bad."""
    bad = bool(rng.random() < bad_share)
    total = round(float(rng.uniform(*(BAD if bad else GOOD))) * 255 * SIDE * SIDE)
    level, more = divmod(total, SIDE * SIDE)
    pixels = np.full(SIDE * SIDE, level, np.uint8)
    pixels[:more] += 1
    rng.shuffle(pixels)
    return Picture(pixels.tobytes(), total / (255 * SIDE * SIDE), "NG" if bad else "OK")
