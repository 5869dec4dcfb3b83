"""What the ledger knows of one camera: its session, its numbers, the parts that wait for their frames. Pure logic."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final, Literal

import msgspec

from pipeline.config import Camera
from pipeline.parts import Part

Matching = Literal["none", "seq", "part"]

KEEP_SESSIONS: Final = 4
MAX_WAITING: Final = 1024
"""Most parts of a camera that wait for their frames, and frames that wait for their triggers."""
LOOK_BACK: Final = MAX_WAITING
"""A number of a wrapping counter that is at most so far behind is an old one, not one after a wrap."""
MAX_NUMBERS: Final = 1 << 64
"""Redis has 64 bits for a part's number in its stream id."""


class Trigger(msgspec.Struct, frozen=True):
    """A part that the PLC expects.

    Attributes:
        seq: Number that its frame will carry; None where it is matched by ``part``.
        part: Part id; may be empty where it is matched by ``seq``.
        session: Session that ``seq`` counts in; None for the camera's present one.
    """

    seq: int | None = None
    part: str = ""
    session: int | None = None


class CameraBook:
    """What the ledger knows of one camera.

    Args:
        name: Camera id.
        deadline_ns: From a frame's arrival to its verdict; 0 for a camera that is not in the config.
        max_gap: Most missing numbers that are answered one by one.
        first_seq: First number of a session; -1 for any.
        seq_bits: Width of the camera's counter. From 2^bits - 1 it wraps to 0, or to 1 where ``first_seq`` is 1
            (GigE Vision's 16-bit block ids never are 0). With 64 bits a session ends before that.
        window: Most later numbers that may come before a frame.
        expected: How triggers of the PLC are matched with frames.
        strict: Whether a frame without a trigger is UNKNOWN.

    Attributes:
        waits: Whether any but the plain rule applies: numbers ascend, a gap is answered at once.
        stream_ms: Session part of the camera's newest stream id.
        next_seq: The number that is opened next in this session, None before the first one.
        order: Parts in sequence order whose records are not yet handed on.
        waiting: Open parts whose frames have not come, by number, ascending.
        seen: One more than the highest number of a frame; 0 where parts are matched by part id.
        triggered: One more than the highest number of a trigger.
        provisional: Whether the session was made up, for triggers that came before any frame.
        sender: Sessions and numbers as the camera counts them, where the line numbers its parts itself.
        early: Part ids of frames that came before their triggers, if these still come.
        missed: Part ids of triggers that were given up, whose frames may still come.
    """

    __slots__ = (
        "_base", "_period", "deadline_ns", "early", "expected", "first_seq", "max_gap", "missed", "name", "next_seq",
        "old", "order", "provisional", "seen", "sender", "session", "stream_ms", "strict", "triggered", "waiting",
        "waits", "window",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        *,
        deadline_ns: int,
        max_gap: int,
        first_seq: int,
        seq_bits: int = 64,
        window: int = 0,
        expected: Matching = "none",
        strict: bool = False,
    ) -> None:
        self.name, self.deadline_ns, self.max_gap, self.first_seq = name, deadline_ns, max_gap, first_seq
        self.window, self.expected, self.strict = window, expected, strict
        self.waits = window > 0 or expected != "none" or seq_bits < 64
        self._base = max(first_seq, 0)
        self._period = 0 if seq_bits >= 64 else (1 << seq_bits) - self._base
        self.session: int | None = None
        self.stream_ms = 0
        self.next_seq: int | None = None
        self.order: deque[Part] = deque()
        self.old: deque[int] = deque(maxlen=KEEP_SESSIONS)
        self.waiting: OrderedDict[int, Part] = OrderedDict()
        self.seen = self.triggered = 0
        self.provisional = False
        self.early: deque[str] = deque(maxlen=MAX_WAITING)
        self.missed: deque[str] = deque(maxlen=MAX_WAITING)
        self.sender: CameraBook | None = None
        if expected == "part":
            self.sender = CameraBook(
                name, deadline_ns=deadline_ns, max_gap=max_gap, first_seq=first_seq, seq_bits=seq_bits
            )

    @classmethod
    def of(cls, name: str, camera: Camera) -> CameraBook:
        """The book of a camera in the config."""
        return cls(
            name,
            deadline_ns=int(camera.deadline_ms * 1e6),
            max_gap=camera.max_gap,
            first_seq=camera.first_seq,
            seq_bits=camera.seq_bits,
            window=camera.reorder_window,
            expected=camera.expected,
            strict=camera.unexpected == "unknown",
        )

    def resume(self, stream_ms: int, seq: int, session: int) -> None:
        """Go on after the last record that an earlier run of the line has published."""
        self.session, self.stream_ms, self.next_seq = session, stream_ms, seq + 1
        self.seen = seq + 1

    def enter(self, session: int) -> None:
        """Begin a session: its numbers count from the first, its stream ids follow those of the one before.

        Stream ids have to grow even where a camera's clock was set back.
        """
        if self.session is not None:
            self.old.append(self.session)
        self.session = session
        self.stream_ms = max(session // 1_000_000, self.stream_ms + 1)
        self.next_seq = self.first_seq if self.first_seq >= 0 else None
        self.seen = self.triggered = 0
        self.provisional = False

    def own_session(self, wall: int) -> None:
        """Begin a session of the line's own, numbered from 0, for a camera whose parts are matched by part id."""
        self.enter(max(wall, (self.session or 0) + 1))
        self.next_seq = 0

    def number(self, seq: int) -> int | None:
        """The number in its session of a part that a camera calls ``seq``: the same, counted on where that wraps.

        Of a counter that wraps, a number is an old one if it is at most ``max_gap`` (or 1024, if that is more, but
        never half the counter's period) behind the one that is due, and that one has been there in this session.
        Any other is ahead.

        Returns:
            The number; None if the camera cannot have counted so far.
        """
        if not self._period:
            return seq
        if not self._base <= seq < self._base + self._period:
            return None
        if self.next_seq is None:
            return seq
        ahead = (seq - self.next_seq) % self._period
        behind = self._period - ahead
        is_old = behind <= min(self._period // 2, max(self.max_gap, LOOK_BACK)) and self.next_seq - behind >= self._base
        number = self.next_seq - behind if is_old else self.next_seq + ahead
        return number if number < MAX_NUMBERS else None

    def waiting_for(self, part: str) -> Part | None:
        """The oldest open part with this part id whose frame has not come."""
        return next((p for p in self.waiting.values() if p.header.part == part and p.finding is None), None)
