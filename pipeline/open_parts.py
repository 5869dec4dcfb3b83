"""Open parts, their deadlines and their first verdicts: the part of the ledger that its timer works on.

The deadline timer is a thread of its own on the monotonic clock; it waits for nobody: no engine, no
Redis, no socket. The wall clock is only written down: no deadline, order or stream id depends on its steps.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from pipeline.books import CameraBook
from pipeline.parts import UNKNOWN, Finding, Part, Reason, Verdict
from pipeline.wire import Header

Clock = Callable[[], int]


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


class OpenParts:
    """Parts from when they are opened to their one first verdict. Every method may be called from any thread.

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

    def answer(self, part: Part, finding: Finding) -> bool:
        """Give ``part`` its verdict unless it has one; say whether this was the first.

        A later one changes nothing: it is recorded as late. So is an OK at or after the deadline, even where
        the timer has not yet run.
        """
        with self._lock:
            now = self._clock()
            if part.finding is None and finding.verdict is Verdict.OK and now >= part.deadline:
                self._answer(part, UNKNOWN[Reason.DEADLINE], now)
            if part.finding is None:
                self._answer(part, finding, now)
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

    def _open_part(self, book: CameraBook, header: Header, seq: int, now: int, wall: int) -> Part:
        allowed = book.deadline_ns
        if header.deadline_ms:
            allowed = int(min(allowed, header.deadline_ms * 1e6))
        part = Part(book.name, header, book.stream_ms, seq, now, wall, now + allowed)
        book.next_seq = seq + 1
        book.order.append(part)
        self.open += 1
        self.counts["parts"] += 1
        self._schedule(part)
        return part

    def _schedule(self, part: Part) -> None:
        """Have the timer look at a part at its deadline."""
        self._entries += 1
        heapq.heappush(self._due, (part.deadline, self._entries, part))
        if part.deadline < self._next_alarm:
            self._wake.notify_all()

    def _answer(self, part: Part, finding: Finding, now: int | None = None) -> None:
        """Give an open part its verdict; ``now`` is the reading of the clock by which it was judged in time."""
        now = self._clock() if now is None else now
        part.finding = finding
        part.latency_us = (now - part.arrival) // 1000
        part.verdict_ns = part.arrival_ns + (now - part.arrival)
        self.open -= 1
        self.counts[finding.verdict] += 1
        self.counts[finding.reason] += 1
        if finding.verdict is not Verdict.OK:
            self._outbox.reject(part)
        elif not finding.sampled:
            part.pixels = None
        self._flush(self._books[part.camera])

    def _answer_lost(self, book: CameraBook, part: Part, reason: Reason) -> None:
        """Answer a part whose frame has not come. Should it come yet, it is known by its number or part id."""
        if book.sender is not None:
            book.missed.append(part.header.part)
        self._answer(part, UNKNOWN[reason])

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
                book = self._books[part.camera]
                if book.waiting.get(part.seq) is part:
                    del book.waiting[part.seq]
                    self._answer_lost(book, part, Reason.MISSING_FRAME)
                else:
                    self._answer(part, UNKNOWN[Reason.DEADLINE])
        return self._due[0][0] if self._due else None
