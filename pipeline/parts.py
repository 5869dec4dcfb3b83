"""The part: one object from admission to its record, and the closed sets of verdicts and reasons."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from engines.frames import Pixels
from pipeline.optics import Optics
from pipeline.wire import Header


class Verdict(StrEnum):
    """What the PLC acts on. ``UNKNOWN`` is a reject."""

    OK = "OK"
    NG = "NG"
    UNKNOWN = "UNKNOWN"


class Reason(StrEnum):
    """Why a part has its verdict. The set is closed and documented in ``docs/contracts.md``."""

    BELOW_THRESHOLD = "below_threshold"
    ABOVE_THRESHOLD = "above_threshold"
    DEADLINE = "deadline"
    INFEASIBLE = "infeasible"
    OVERLOAD = "overload"
    SAMPLED = "sampled"
    MISSING_FRAME = "missing_frame"
    SEQUENCE_JUMP = "sequence_jump"
    UNEXPECTED = "unexpected"
    INCOMPLETE = "incomplete"
    TRUNCATED = "truncated"
    BAD_VERSION = "bad_version"
    BAD_FORMAT = "bad_format"
    BAD_SIZE = "bad_size"
    TOO_LARGE = "too_large"
    UNDECODABLE = "undecodable"
    UNKNOWN_CAMERA = "unknown_camera"
    UNKNOWN_RECIPE = "unknown_recipe"
    ENGINE_FAULT = "engine_fault"
    SHUTDOWN = "shutdown"


class Finding(msgspec.Struct, frozen=True, gc=False):
    """A verdict with what led to it.

    Attributes:
        score, threshold: The engine's; NaN where no engine judged the part.
        engine: ``name@version``.
        area: Pixels of the engine's input above the threshold.
        bbox: ``x, y, width, height`` around them, in the same pixels.
        peak: Highest heatmap level, 0..255.
        heatmap: uint8 ``(h, w)``, where it is to be published.
        sampled: Whether this good part is one of those that are shown now and then.
    """

    verdict: Verdict
    reason: Reason
    score: float = float("nan")
    threshold: float = float("nan")
    engine: str = ""
    area: int = 0
    bbox: tuple[int, int, int, int] | None = None
    peak: int = 0
    heatmap: Pixels | None = None
    sampled: bool = False


UNKNOWN = {reason: Finding(Verdict.UNKNOWN, reason) for reason in Reason}
"""The finding for each reason why a part could not be judged."""


class Part:
    """One part of one camera. Open until ``finding`` is set, which only the ledger does, once.

    Attributes:
        camera: Camera id.
        stream_ms: Milliseconds of the session as used in the camera's stream ids; grows with every session.
        arrival: Monotonic nanoseconds at which the frame, or the gap that names the part, was seen.
        arrival_ns: The same instant on the wall clock.
        deadline: Monotonic nanoseconds by which the verdict is due.
        pixels: The frame as it came (a view of the message), kept until nobody needs it.
        verdict_ns: Wall clock of the verdict.
        latency_us: From arrival to verdict.
        queued, taken, submitted, done, judged, published: Monotonic nanoseconds at which it was put into a queue, was
            taken out of it with its batch, was decoded and given to the lane, came back from it, had its finding, and
            was in Redis or in the spool; 0 for a stage that it has not reached.
        optics: Statistics of its image, where they were taken.
    """

    __slots__ = (
        "arrival", "arrival_ns", "camera", "deadline", "done", "finding", "header", "judged", "latency_us", "optics",
        "pixels", "published", "queued", "seq", "stream_ms", "submitted", "taken", "verdict_ns",
    )  # fmt: skip

    def __init__(
        self, camera: str, header: Header, stream_ms: int, seq: int, arrival: int, arrival_ns: int, deadline: int
    ) -> None:
        self.camera, self.header, self.stream_ms, self.seq = camera, header, stream_ms, seq
        self.arrival, self.arrival_ns, self.deadline = arrival, arrival_ns, deadline
        self.pixels: Any = None
        self.finding: Finding | None = None
        self.optics: Optics | None = None
        self.verdict_ns = self.latency_us = 0
        self.queued = self.taken = self.submitted = self.done = self.judged = self.published = 0
