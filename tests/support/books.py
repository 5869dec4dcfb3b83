"""A clock that a test turns, parts made by hand, an outbox that only remembers, and a ledger with both."""

from __future__ import annotations

import threading
from typing import Any

from pipeline.books import Trigger
from pipeline.ledger import CameraBook, Ledger
from pipeline.parts import Finding, Part, Reason, Verdict
from pipeline.wire import Header

MS = 1_000_000
DEADLINE = 100
MAX_GAP = 10
SESSION = 1_700_000_000_000 * MS
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


class Desk:
    """A ledger with its clocks and its outbox, and one camera ``cam1``.

    Attributes:
        wall_offset: How far the wall clock, and it alone, was set.
    """

    def __init__(self, **book: Any) -> None:
        self.clock, self.out = FakeClock(), Recorder()
        self.wall_offset = 0
        self.ledger = Ledger(self.out, self.clock, lambda: SESSION + self.wall_offset + self.clock.now)
        self.register("cam1", **book)

    def register(self, name: str, *, max_gap: int = MAX_GAP, first_seq: int = 0, **book: Any) -> CameraBook:
        """Make one more camera known."""
        made = CameraBook(name, deadline_ns=DEADLINE * MS, max_gap=max_gap, first_seq=first_seq, **book)
        self.ledger.register(made)
        return made

    def expect(self, seq: int | None = None, part: str = "", session: int | None = None, camera: str = "cam1") -> None:
        """A trigger comes."""
        self.ledger.expect(camera, Trigger(seq, part, session))

    def admit(self, seq: int, session: int = SESSION, camera: str = "cam1", **header: Any) -> Part | None:
        """A frame comes."""
        return self.ledger.admit(camera, Header(seq=seq, session=session, **header))

    def open(self, seq: int, session: int = SESSION, camera: str = "cam1", **header: Any) -> Part:
        """A frame comes whose part is then open."""
        part = self.admit(seq, session, camera, **header)
        assert part is not None
        return part

    def end(self, seq: int, session: int = SESSION, camera: str = "cam1") -> None:
        """The camera says that its session is over."""
        self.ledger.end_of_stream(camera, Header(seq=seq, session=session, eos=True))
