"""The way of single parts through the line: when each stage was reached."""

from __future__ import annotations

import time
from typing import Any, Final

import structlog

from pipeline.intake import Queue
from pipeline.parts import Part

log = structlog.get_logger(__name__)

STAMPS: Final = ("queued", "taken", "submitted", "done", "judged", "published")


class StampingQueue:
    """A queue that notes when a part is put into it.

    Args:
        queue: Where the part then goes.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def put(self, part: Part) -> None:
        """Queue a part."""
        part.queued = time.monotonic_ns()
        self._queue.put(part)


def times_of(part: Part) -> dict[str, Any]:
    """What a trace says of a part: who it is, its verdict, and microseconds since its arrival for each stage.

    A stage that the part did not reach is left out.
    """
    finding = part.finding
    stamps = {f"{name}_us": (at - part.arrival) // 1000 for name in STAMPS if (at := getattr(part, name))}
    return {
        "camera": part.camera,
        "session": part.header.session,
        "seq": part.seq,
        "verdict": str(finding.verdict) if finding else "",
        "reason": str(finding.reason) if finding else "",
        "engine": finding.engine if finding else "",
        "arrival_ns": part.arrival_ns,
        "verdict_us": part.latency_us,
        **stamps,
    }


class Tracer:
    """Logs the times of every so manieth part.

    Args:
        every: So manieth; 0 for none.
    """

    def __init__(self, every: int) -> None:
        self._every, self._seen = every, 0

    def see(self, part: Part) -> None:
        """Take an answered part, and log it if it is its turn."""
        if not self._every or part.finding is None:
            return
        self._seen += 1
        if self._seen % self._every == 0:
            log.info("part_trace", **times_of(part))
