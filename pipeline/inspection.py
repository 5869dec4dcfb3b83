"""The inspection of one batch: decode it into a lane, run it, answer every part of it."""

from __future__ import annotations

import time
from typing import Final

import cv2
import structlog

from engines.bundle import Bundle
from engines.frames import FrameError
from engines.lane import Lane
from pipeline.config import Camera
from pipeline.decode import into_slot
from pipeline.judge import Judge
from pipeline.ledger import Ledger
from pipeline.optics import measure
from pipeline.parts import UNKNOWN, Part, Reason

log = structlog.get_logger(__name__)

SAMPLE_EVERY_NS: Final = 1_000_000_000


class Inspection:
    """Inspects batches for one engine, and judges them by that engine's own threshold.

    Args:
        bundle: The engine.
        cameras: ``[cameras]``.
        ledger: Takes the findings.
        timeout_s: Longest that a batch may take.
        keep_all: Whether good parts keep their heatmaps.
        sample: Whether one good part a second of each camera keeps heatmap and image.
    """

    def __init__(
        self,
        bundle: Bundle,
        cameras: dict[str, Camera],
        ledger: Ledger,
        *,
        timeout_s: float,
        keep_all: bool = False,
        sample: bool = False,
    ) -> None:
        self.timeout_s = timeout_s
        self._cameras, self._ledger = cameras, ledger
        self._judge = Judge(bundle, keep_all=keep_all)
        self._next_sample = dict.fromkeys(cameras, 0) if sample else {}

    def __call__(self, lane: Lane, batch: list[Part]) -> int:
        """Inspect a batch; return how many parts of it were run.

        Raises:
            LaneFault: if the lane failed; what is open of the batch is then for :meth:`fail`.
        """
        taken = time.monotonic_ns()
        kept: list[Part] = []
        for part in batch:
            part.taken = taken
            if self._load(part, lane, len(kept)):
                kept.append(part)
        if not kept:
            return 0
        submitted = time.monotonic_ns()
        lane.submit(len(kept))
        self._look_at(kept, lane)
        lane.wait(self.timeout_s)
        done = time.monotonic_ns()
        for slot, part in enumerate(kept):
            sampled = self._is_sampled(part.camera, done)
            finding = self._judge(float(lane.scores[slot]), lane.heatmaps[slot], sampled=sampled)
            part.submitted, part.done, part.judged = submitted, done, time.monotonic_ns()
            self._ledger.answer(part, finding)
        return len(kept)

    def give_up(self, parts: list[Part], reason: Reason) -> None:
        """Answer parts that are not inspected."""
        for part in parts:
            self._ledger.answer(part, UNKNOWN[reason])

    def fail(self, parts: list[Part]) -> None:
        """Answer what is still open of a batch that could not be run."""
        self.give_up([part for part in parts if part.finding is None], Reason.ENGINE_FAULT)

    def _is_sampled(self, camera: str, now: int) -> bool:
        """Whether it is time to show a part of this camera. Two lanes may show one each: that does no harm."""
        if now < self._next_sample.get(camera, now + 1):
            return False
        self._next_sample[camera] = now + SAMPLE_EVERY_NS
        return True

    def _look_at(self, parts: list[Part], lane: Lane) -> None:
        """Take the statistics of every so manieth part's image, while the lane works and this thread would wait."""
        for slot, part in enumerate(parts):
            every = self._cameras[part.camera].drift_every
            if every and part.seq % every == 0:
                part.optics = measure(lane.frames[slot])

    def _load(self, part: Part, lane: Lane, slot: int) -> bool:
        """Decode a part into a slot; answer it UNKNOWN and say False where that cannot be done."""
        pixels = part.pixels
        if pixels is None:  # its deadline has just passed, and its record is already published
            return False
        try:
            into_slot(part.header, pixels, self._cameras[part.camera], lane.frames[slot])
        except (FrameError, cv2.error) as error:
            log.debug("undecodable", camera=part.camera, seq=part.seq, error=str(error))
            self.give_up([part], Reason.UNDECODABLE)
            return False
        return True
