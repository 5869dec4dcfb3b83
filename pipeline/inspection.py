"""The inspection of one batch: decode it into a lane, run it, answer every part of it."""

from __future__ import annotations

import cv2
import structlog

from engines.bundle import Bundle
from engines.frames import FrameError
from engines.lane import Lane
from pipeline.config import Camera
from pipeline.decode import into_slot
from pipeline.judge import Judge
from pipeline.ledger import Ledger
from pipeline.parts import UNKNOWN, Part, Reason

log = structlog.get_logger(__name__)


class Inspection:
    """Inspects batches for one engine, and judges them by that engine's own threshold.

    Args:
        bundle: The engine.
        cameras: ``[cameras]``.
        ledger: Takes the findings.
        timeout_s: Longest that a batch may take.
        keep_all: Whether good parts keep their heatmaps.
    """

    def __init__(
        self, bundle: Bundle, cameras: dict[str, Camera], ledger: Ledger, *, timeout_s: float, keep_all: bool = False
    ) -> None:
        self.timeout_s = timeout_s
        self._cameras, self._ledger = cameras, ledger
        self._judge = Judge(bundle, keep_all=keep_all)

    def __call__(self, lane: Lane, batch: list[Part]) -> int:
        """Inspect a batch; return how many parts of it were run.

        Raises:
            LaneFault: if the lane failed; what is open of the batch is then for :meth:`fail`.
        """
        kept: list[Part] = []
        for part in batch:
            if self._load(part, lane, len(kept)):
                kept.append(part)
        if not kept:
            return 0
        lane.submit(len(kept))
        lane.wait(self.timeout_s)
        for slot, part in enumerate(kept):
            self._ledger.answer(part, self._judge(float(lane.scores[slot]), lane.heatmaps[slot]))
        return len(kept)

    def give_up(self, parts: list[Part], reason: Reason) -> None:
        """Answer parts that are not inspected."""
        for part in parts:
            self._ledger.answer(part, UNKNOWN[reason])

    def fail(self, parts: list[Part]) -> None:
        """Answer what is still open of a batch that could not be run."""
        self.give_up([part for part in parts if part.finding is None], Reason.ENGINE_FAULT)

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
