"""A clock that a test turns, parts made by hand, and an outbox that only remembers."""

from __future__ import annotations

import threading
from typing import Any

from pipeline.parts import Finding, Part, Reason, Verdict
from pipeline.wire import Header

MS = 1_000_000
OK = Finding(Verdict.OK, Reason.BELOW_THRESHOLD, 0.25, 0.5, "bright@1")
NG = Finding(Verdict.NG, Reason.ABOVE_THRESHOLD, 0.75, 0.5, "bright@1", 12, (1, 2, 3, 4), 200)


class FakeClock:
    """Nanoseconds that pass only when told to."""

    def __init__(self, now: int = 1_000 * MS) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def advance(self, milliseconds: float) -> None:
        """Let time pass."""
        self.now += int(milliseconds * MS)


class Recorder:
    """An outbox. What it was given first is written down at once, so that a later change of a part shows."""

    def __init__(self) -> None:
        self.records: list[Part] = []
        self.rejects: list[Part] = []
        self.lates: list[tuple[Part, Finding]] = []
        self.rejected = threading.Semaphore(0)

    def reject(self, part: Part) -> None:
        """Remember a reject."""
        self.rejects.append(part)
        self.rejected.release()

    def record(self, part: Part) -> None:
        """Remember a record."""
        self.records.append(part)

    def late(self, part: Part, finding: Finding) -> None:
        """Remember a late result."""
        self.lates.append((part, finding))

    def said(self) -> list[tuple[int, str]]:
        """Sequence number and reason of every record, ``eos`` for the end of a stream."""
        return [(part.seq, part.finding.reason if part.finding else "eos") for part in self.records]


def make_part(
    camera: str = "cam1", seq: int = 0, *, deadline: int = 100 * MS, size: int = 10, session: int = 1, **header: Any
) -> Part:
    """An open part with so many bytes of pixels, as intake hands it to a queue."""
    part = Part(camera, Header(seq=seq, session=session, **header), session, seq, 0, 0, deadline)
    part.pixels = bytes(size)
    return part
