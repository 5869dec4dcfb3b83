"""Which parts go to which lane, and when: earliest deadline first, batches as large as time allows.

A lane that is free takes what is waiting, up to its batch size (work-conserving): under light load
batches are of one, under heavy load they grow by themselves. A part that can no longer be judged in
time is given up at once, so that it does not make the next one late.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from pipeline.parts import Part

Clock = Callable[[], int]

SPARE_ENTRIES: Final = 64
"""Entries of displaced parts that a queue may keep besides as many as there are waiting parts."""


class ExecutionTimes:
    """How long a batch takes, decode to result, learned per batch size as a high quantile.

    Each batch moves the estimate by a share of itself, up fast or down slowly, so that it settles near the
    95th percentile and no outlier moves it far.
    """

    def __init__(self, max_batch: int, quantile: float = 0.95, rate: float = 0.05) -> None:
        self._estimates: list[float] = [0.0] * (max_batch + 1)
        self._up, self._down = 1 + rate * quantile, 1 - rate * (1 - quantile)
        self._doubt = 1 - rate

    def observe(self, count: int, elapsed: int) -> None:
        """Learn that a batch of ``count`` took ``elapsed`` nanoseconds."""
        estimate = self._estimates[count]
        step = self._up if elapsed > estimate else self._down
        self._estimates[count] = estimate * step if estimate else float(elapsed)

    def doubt(self, count: int) -> None:
        """Lower an estimate because of which nothing is run, and so nothing learned, until something is."""
        self._estimates[count] *= self._doubt

    def estimate(self, count: int) -> float:
        """Nanoseconds that a batch of ``count`` will take; 0 while nothing is known."""
        return self._estimates[count]


class PartQueue:
    """Waiting parts by deadline, bounded per camera and in bytes. Pure logic: the caller locks.

    Args:
        max_parts: Most waiting parts a camera; the camera's oldest gives way.
        max_bytes: Most waiting bytes of pixels in all; the oldest of the newcomer's camera gives way.
    """

    def __init__(self, max_parts: int, max_bytes: int) -> None:
        # By deadline, then arrival; an entry whose number is no longer in its camera's line has left.
        self._heap: list[tuple[int, int, str]] = []
        self._lines: dict[str, OrderedDict[int, tuple[Part, int]]] = {}
        self._max_parts, self._max_bytes = max_parts, max_bytes
        self._number = 0
        self.bytes = 0
        self.waiting = 0

    def put(self, part: Part) -> list[Part]:
        """Add a part; return those that had to give way, which are the caller's to answer.

        Where even an empty line leaves no room in bytes, the newcomer itself gives way.
        """
        line = self._lines.setdefault(part.camera, OrderedDict())
        pixels = part.pixels
        size = len(pixels) if pixels is not None else 0
        displaced = []
        while line and (len(line) >= self._max_parts or self.bytes + size > self._max_bytes):
            _, (oldest, freed) = line.popitem(last=False)
            self._count(-1, -freed)
            displaced.append(oldest)
        if self.bytes + size > self._max_bytes:
            return [*displaced, part]
        self._number += 1
        line[self._number] = part, size
        heapq.heappush(self._heap, (part.deadline, self._number, part.camera))
        self._count(1, size)
        if len(self._heap) > 2 * self.waiting + SPARE_ENTRIES:
            self._heap = [entry for entry in self._heap if entry[1] in self._lines[entry[2]]]
            heapq.heapify(self._heap)
        return displaced

    def pop(self) -> Part | None:
        """Take the part with the earliest deadline, passing over those that are answered or displaced."""
        while self._heap:
            _, number, camera = heapq.heappop(self._heap)
            found = self._lines[camera].pop(number, None)
            if found is None:
                continue
            part, size = found
            self._count(-1, -size)
            if part.finding is None:
                return part
        return None

    def _count(self, parts: int, size: int) -> None:
        self.waiting += parts
        self.bytes += size


class Scheduler:
    """Hands waiting parts to whichever lane asks. Thread-safe.

    Args:
        queue: The waiting parts.
        times: Execution times of this engine.
        clock: Monotonic nanoseconds.
    """

    def __init__(self, queue: PartQueue, times: ExecutionTimes, clock: Clock = time.monotonic_ns) -> None:
        self._queue, self.times, self._clock = queue, times, clock
        self._arrived = threading.Condition()
        self._closed = False

    @property
    def waiting(self) -> int:
        """Parts in the queue."""
        return self._queue.waiting

    def put(self, part: Part) -> list[Part]:
        """Queue a part; return the parts that gave way to it."""
        with self._arrived:
            displaced = self._queue.put(part)
            self._arrived.notify()
        return displaced

    def take(self, limit: int, timeout: float) -> tuple[list[Part], list[Part]]:
        """Wait for work and take a batch.

        Args:
            limit: Most parts to take.
            timeout: Seconds to wait for the first part.

        Returns:
            The batch, earliest deadline first, and the parts that are past saving. Both are empty on
            timeout and after :meth:`close`.
        """
        with self._arrived:
            if not self._queue.waiting and not self._closed:
                self._arrived.wait(timeout)
            return ([], []) if self._closed else self._fill(limit)

    def observe(self, count: int, elapsed: int) -> None:
        """Learn from a batch that was run."""
        with self._arrived:
            self.times.observe(count, elapsed)

    def close(self) -> None:
        """Wake every waiting lane."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()

    def _fill(self, limit: int) -> tuple[list[Part], list[Part]]:
        batch: list[Part] = []
        hopeless: list[Part] = []
        now, wanted = self._clock(), min(limit, max(self._queue.waiting, 1))
        # The first part's deadline bounds the batch: more parts may not make it late.
        while len(batch) < wanted:
            part = self._queue.pop()
            if part is None:
                break
            if part.deadline < now + self.times.estimate(1):
                hopeless.append(part)
                continue
            batch.append(part)
            slack = batch[0].deadline - now
            while wanted > len(batch) and self.times.estimate(wanted) > slack:
                wanted -= 1
        if not batch and hopeless and hopeless[-1].deadline > now:
            self.times.doubt(1)
        return batch, hopeless
