"""The ledger: which parts are open, when they are due, and that each gets exactly one first verdict.

The deadline timer is a thread of its own on the monotonic clock; it waits for nobody: no engine, no
Redis, no socket.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, Protocol

from pipeline.parts import UNKNOWN, Finding, Part, Reason, Verdict
from pipeline.wire import Header

Clock = Callable[[], int]

MAX_UNKNOWN_CAMERAS: Final = 64
KEEP_SESSIONS: Final = 4


class Outbox(Protocol):
    """Where answered parts go. Both calls are made under the ledger's lock and must return at once."""

    def reject(self, part: Part) -> None:
        """Take a reject as soon as it is known."""
        ...

    def record(self, part: Part) -> None:
        """Take a part in its camera's sequence order."""
        ...

    def late(self, part: Part, finding: Finding) -> None:
        """Take a result that came after the part's first verdict."""
        ...


class CameraBook:
    """What the ledger knows of one camera.

    Attributes:
        stream_ms: Session part of the camera's newest stream id.
        next_seq: The sequence number that comes next in this session, None before the first frame.
        order: Parts in sequence order whose records are not yet handed on.
    """

    __slots__ = ("deadline_ns", "first_seq", "max_gap", "name", "next_seq", "old", "order", "session", "stream_ms")

    def __init__(self, name: str, *, deadline_ns: int, max_gap: int, first_seq: int) -> None:
        self.name, self.deadline_ns, self.max_gap, self.first_seq = name, deadline_ns, max_gap, first_seq
        self.session: int | None = None
        self.stream_ms = 0
        self.next_seq: int | None = None
        self.order: deque[Part] = deque()
        self.old: deque[int] = deque(maxlen=KEEP_SESSIONS)

    def resume(self, stream_ms: int, seq: int, session: int) -> None:
        """Go on after the last record that an earlier run of the line has published."""
        self.session, self.stream_ms, self.next_seq = session, stream_ms, seq + 1


class Ledger:
    """Open parts, their deadlines and their first verdicts. All methods may be called from any thread.

    Args:
        outbox: Takes answered parts.
        clock: Monotonic nanoseconds.
        wall: Wall-clock nanoseconds, for records only.
    """

    def __init__(self, outbox: Outbox, clock: Clock = time.monotonic_ns, wall: Clock = time.time_ns) -> None:
        self._outbox, self._clock, self._wall = outbox, clock, wall
        self._lock = threading.Lock()
        self._due: list[tuple[int, int, Part]] = []
        self._entries = 0
        self._wake = threading.Condition(self._lock)
        self._next_alarm = 0
        self._closed = False
        self._books: dict[str, CameraBook] = {}
        self.counts: Counter[str] = Counter()
        self.open = 0
        self.beat = 0

    def register(self, book: CameraBook) -> None:
        """Make a camera known."""
        self._books[book.name] = book

    def admit(self, camera: str, header: Header) -> Part | None:
        """Open the part that a frame names, and answer the parts before it that never came.

        Returns:
            The open part; or None if it was answered at once, or had been answered before.
        """
        now, wall = self._clock(), self._wall()
        with self._lock:
            book = self._books.get(camera) or self._stranger(camera)
            if book is None or not self._enter_session(book, header):
                return None
            if not self._close_gap(book, header, header.seq, now, wall):
                return None
            part = self._open_part(book, header, header.seq, now, wall)
            if book.deadline_ns == 0:
                self._answer(part, UNKNOWN[Reason.UNKNOWN_CAMERA])
                return None
            if self._closed:  # it was on its way in when the line stopped: no timer would answer it
                self._answer(part, UNKNOWN[Reason.SHUTDOWN])
                return None
            return part

    def end_of_stream(self, camera: str, header: Header) -> None:
        """Answer every part of a finished session that never came; ``header.seq`` follows the last one's."""
        now, wall = self._clock(), self._wall()
        with self._lock:
            book = self._books.get(camera)
            if book is None or not book.deadline_ns or not self._enter_session(book, header):
                return
            if self._close_gap(book, header, header.seq, now, wall):
                book.order.append(Part(camera, header, book.stream_ms, header.seq, now, wall, now))
                self._flush(book)

    def answer(self, part: Part, finding: Finding) -> bool:
        """Give ``part`` its verdict unless it has one; say whether this was the first.

        A later one changes nothing: it is recorded as late. So is an OK at or after the deadline, even where
        the timer has not yet run.
        """
        with self._lock:
            if part.finding is None and finding.verdict is Verdict.OK and self._clock() >= part.deadline:
                self._answer(part, UNKNOWN[Reason.DEADLINE])
            if part.finding is None:
                self._answer(part, finding)
                return True
            self.counts["late_results"] += 1
            self._outbox.late(part, finding)
            return False

    def expire(self) -> int | None:
        """Answer every open part whose deadline has passed.

        Returns:
            The next deadline, or None if no part is open.
        """
        with self._lock:
            return self._expire()

    def run_timer(self) -> None:
        """Answer overdue parts until :meth:`close`; the body of the timer thread."""
        with self._lock:
            while not self._closed:
                due = self._expire()
                self.beat = now = self._clock()
                # Woken at least once a second, so that the beat shows the thread alive.
                self._next_alarm = min(due or now + 1_000_000_000, now + 1_000_000_000)
                self._wake.wait(max(self._next_alarm - now, 0) / 1e9)

    def close(self, reason: Reason = Reason.SHUTDOWN) -> None:
        """Answer whatever is open as UNKNOWN and end the timer."""
        with self._lock:
            for _, _, part in sorted(self._due, key=lambda entry: entry[:2]):
                if part.finding is None:
                    self._answer(part, UNKNOWN[reason])
            self._due.clear()
            self._closed = True
            self._wake.notify_all()

    def _stranger(self, camera: str) -> CameraBook | None:
        """A book for a camera that is not in the config, of which a bounded number is kept."""
        if sum(book.deadline_ns == 0 for book in self._books.values()) >= MAX_UNKNOWN_CAMERAS:
            self.counts["refused_unknown_camera"] += 1
            return None
        self._books[camera] = CameraBook(camera, deadline_ns=0, max_gap=0, first_seq=-1)
        return self._books[camera]

    def _enter_session(self, book: CameraBook, header: Header) -> bool:
        if header.session == book.session:
            return True
        if header.session in book.old:
            self.counts["refused_old_session"] += 1
            return False
        if book.session is not None:
            book.old.append(book.session)
        book.session = header.session
        # Stream ids have to grow even where a camera's clock was set back.
        book.stream_ms = max(header.session // 1_000_000, book.stream_ms + 1)
        book.next_seq = book.first_seq if book.first_seq >= 0 else None
        return True

    def _close_gap(self, book: CameraBook, header: Header, seq: int, now: int, wall: int) -> bool:
        """Answer the parts before ``seq`` that never came; False if ``seq`` itself was answered before."""
        expected = seq if book.next_seq is None else book.next_seq
        if seq < expected:
            self.counts["refused_repeated"] += 1
            return False
        missing = seq - expected
        if missing > book.max_gap and book.deadline_ns:
            # Too many to be believed and answered one by one: one record says so, and counting starts anew.
            self.counts["sequence_jumps"] += 1
            lost = self._open_part(book, header, seq - 1, now, wall)
            self._answer(lost, UNKNOWN[Reason.SEQUENCE_JUMP])
        elif book.deadline_ns:
            for number in range(expected, seq):
                lost = self._open_part(book, header, number, now, wall)
                self._answer(lost, UNKNOWN[Reason.MISSING_FRAME])
        book.next_seq = seq
        return True

    def _open_part(self, book: CameraBook, header: Header, seq: int, now: int, wall: int) -> Part:
        if seq != header.seq:  # a part that never came has nothing of the frame that named it
            header = Header(seq=seq, session=header.session, recipe=header.recipe)
        allowed = book.deadline_ns
        if header.deadline_ms:
            allowed = int(min(allowed, header.deadline_ms * 1e6))
        part = Part(book.name, header, book.stream_ms, seq, now, wall, now + allowed)
        book.next_seq = seq + 1
        book.order.append(part)
        self.open += 1
        self.counts["parts"] += 1
        self._entries += 1
        heapq.heappush(self._due, (part.deadline, self._entries, part))
        if part.deadline < self._next_alarm:
            self._wake.notify_all()
        return part

    def _answer(self, part: Part, finding: Finding) -> None:
        now = self._clock()
        part.finding = finding
        part.latency_us = (now - part.arrival) // 1000
        part.verdict_ns = part.arrival_ns + (now - part.arrival)
        self.open -= 1
        self.counts[finding.verdict] += 1
        self.counts[finding.reason] += 1
        if finding.verdict is Verdict.OK:
            part.pixels = None
        else:
            self._outbox.reject(part)
        self._flush(self._books[part.camera])

    def _flush(self, book: CameraBook) -> None:
        """Hand on what is answered, in sequence order; an end of stream follows the parts before it."""
        order = book.order
        while order and (order[0].finding is not None or order[0].header.eos):
            self._outbox.record(order.popleft())

    def _expire(self) -> int | None:
        now = self._clock()
        while self._due and (self._due[0][2].finding is not None or self._due[0][0] <= now):
            part = heapq.heappop(self._due)[2]
            if part.finding is None:
                self._answer(part, UNKNOWN[Reason.DEADLINE])
        return self._due[0][0] if self._due else None
