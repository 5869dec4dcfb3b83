"""Showing one result after the other to a PLC: a toggle tells a new one, an acknowledge asks for the next.

Pure logic; the caller has the clock (monotonic nanoseconds).
"""

from __future__ import annotations

from collections import deque
from typing import Final

from pipeline.plc.results import Result

MS: Final = 1_000_000


class Handshake:
    """The result that stands before the PLC, and those behind it.

    Args:
        hold_ms: Least time that a result stands.
        ack_timeout_ms: Time after which the next one comes though the last was not acknowledged.
        most: Results that may wait; the oldest gives way.
        acknowledged: Whether the PLC answers at all.

    Attributes:
        shown: The result that stands, None before the first and while the line is not trusted.
        toggle: Flips with every new result: two equal ones in a row are still two.
        lost: Results that the PLC never saw, or did not acknowledge. Their parts had no OK.
    """

    def __init__(self, *, hold_ms: float, ack_timeout_ms: float, most: int, acknowledged: bool) -> None:
        self._hold, self._timeout = hold_ms * MS, ack_timeout_ms * MS
        self._most, self._acknowledged = most, acknowledged
        self._queue: deque[Result] = deque()
        self._since = 0
        self.shown: Result | None = None
        self.toggle = False
        self.lost = 0

    @property
    def waiting(self) -> int:
        """Results behind the one that stands."""
        return len(self._queue)

    def offer(self, result: Result) -> None:
        """Take a result to be shown."""
        if len(self._queue) >= self._most:
            self._queue.popleft()
            self.lost += 1
        self._queue.append(result)

    def step(self, now: int, ack: bool) -> None:
        """Show the next result if it is its turn; ``ack`` is the PLC's copy of the toggle."""
        if not self._queue or not self._is_done(now, ack):
            return
        self.shown = self._queue.popleft()
        self.toggle = not self.toggle
        self._since = now

    def blank(self) -> None:
        """Show nothing, which means reject, and drop what waits: the line is not trusted."""
        self.lost += len(self._queue)
        self._queue.clear()
        self.shown = None

    def _is_done(self, now: int, ack: bool) -> bool:
        if self.shown is None:
            return True
        stood = now - self._since
        if stood < self._hold:
            return False
        if not self._acknowledged or ack == self.toggle:
            return True
        if stood < self._timeout:
            return False
        self.lost += 1
        return True
