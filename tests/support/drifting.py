"""A camera's judged parts whose images, pace and scores are drawn from known distributions, and change when told."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from pipeline.drift import CameraDrift, Change
from pipeline.optics import Optics, measure
from pipeline.parts import UNKNOWN, Finding, Part, Reason, Verdict
from pipeline.wire import Header

EVERY = 7
THRESHOLD = 0.6


@dataclass
class Scene:
    """What the camera sees. The defaults are those of a line on which all is well.

    Attributes:
        light: The lamp, 1 as it was.
        blur: Standard deviation of a Gaussian in pixels, 0 in focus.
        haze: Share of the image that is an even gray, as of a dirty lens.
        glare: Share of the image that is white.
        pace: Seconds between two parts.
        shift: Added to every score.
    """

    light: float = 1.0
    blur: float = 0.0
    haze: float = 0.0
    glare: float = 0.0
    pace: float = 0.1
    shift: float = 0.0


@dataclass
class Camera:
    """Sends parts, one after the other; images are real ones, 128 x 128 pixels, every seventh part."""

    seed: int = 0
    engine: str = "lid@1"
    seq: int = 0
    now: int = 0
    session: int = 1
    scene: Scene = field(default_factory=Scene)

    def __post_init__(self) -> None:
        """Make the part that it looks at, and its random numbers."""
        self.rng = np.random.default_rng(self.seed)
        self.texture = np.random.default_rng(42).normal(0, 15, (128, 128)).astype(np.float32)

    def part(self) -> Part:
        """The next part, judged."""
        self.now += int(self.scene.pace * self.rng.lognormal(0, 0.15) * 1e9)
        part = Part("cam1", Header(seq=self.seq, session=self.session), 0, self.seq, self.now, 0, self.now + 10**9)
        score = float(self.rng.gumbel(0.2, 0.05)) + self.scene.shift
        verdict, reason = Verdict.OK, Reason.BELOW_THRESHOLD
        if score > THRESHOLD:
            verdict, reason = Verdict.NG, Reason.ABOVE_THRESHOLD
        part.finding = Finding(verdict, reason, score, THRESHOLD, self.engine)
        if self.seq % EVERY == 0:
            part.optics = self.optics()
        self.seq += 1
        return part

    def optics(self) -> Optics:
        """Statistics of an image of the scene; lamp and part vary by some per cent, the sensor is noisy."""
        scene, rng = self.scene, self.rng
        image = (110 * rng.normal(1, 0.02) + self.texture * rng.normal(1, 0.05)) * scene.light
        if scene.blur:
            image = cv2.GaussianBlur(image, (0, 0), scene.blur)
        image = image * (1 - scene.haze) + 200 * scene.haze + rng.normal(0, 1, image.shape)
        image[: int(128 * scene.glare)] = 255
        return measure(np.clip(image, 0, 255).astype(np.uint8)[..., None])

    def feed(self, drift: CameraDrift, parts: int) -> list[tuple[int, Change]]:
        """Feed so many parts; return each change with the number of parts that it took."""
        changes = [(number, drift.feed(self.part())) for number in range(1, parts + 1)]
        return [(number, change) for number, change in changes if change is not None]

    def lost(self, reason: Reason) -> Part:
        """The next part, not judged, of an image that would be a drift."""
        part = self.part()
        part.finding, part.optics = UNKNOWN[reason], Optics(0.0, 0.0, 1.0, (128, 128))
        return part
