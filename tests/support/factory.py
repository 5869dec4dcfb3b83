"""A factory in fake time: cameras that send, lanes that take their time, and what becomes of every part."""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from pipeline.part_queue import Drop, PartQueue, Rules
from pipeline.parts import Part, Reason
from pipeline.scheduler import ExecutionTimes, Scheduler
from pipeline.wire import Header
from tests.support.books import MS, FakeClock

FIXED_MS, EACH_MS = 4.0, 4.0
"""A batch takes so long, and so much longer for each of its parts, give or take a tenth."""
BATCH = 8


class Source(NamedTuple):
    """A camera: parts a second, milliseconds to the deadline, how its parts wait, and when it sends, in seconds."""

    name: str
    rate: float
    deadline_ms: float = 100.0
    rules: Rules = Rules()
    begin: float = 0.0
    end: float = 1e9


class Desk(Protocol):
    """What decides which parts leave."""

    def offer(self, part: Part) -> list[Drop]:
        """Queue a part; return what is given up."""
        ...

    def take(self, limit: int, timeout: float) -> tuple[list[Part], list[Part]]:
        """Take a batch; return what is past saving with it."""
        ...

    def observe(self, count: int, elapsed: int) -> None:
        """Learn how long a batch took."""
        ...


class Fifo:
    """First come, first served, without a look at any deadline."""

    def __init__(self) -> None:
        self._parts: list[Part] = []

    def offer(self, part: Part) -> list[Drop]:
        """Queue a part; the oldest of all gives way."""
        self._parts.append(part)
        return [Drop(self._parts.pop(0), Reason.OVERLOAD)] if len(self._parts) > 64 else []

    def take(self, limit: int, timeout: float) -> tuple[list[Part], list[Part]]:
        """Take the oldest ones."""
        batch, self._parts = self._parts[:limit], self._parts[limit:]
        return batch, []

    def observe(self, count: int, elapsed: int) -> None:
        """Learn nothing."""


class PlainEdf(Scheduler):
    """The line's scheduler, which never finds itself under pressure: earliest deadline first, whoever sends it."""

    def _is_pressed(self, limit: int, now: int) -> bool:
        return False


class Factory:
    """Runs cameras against lanes.

    Args:
        sources: The cameras.
        kind: ``Scheduler``, or what it is compared with.
        lanes: How many lanes.
        seed: Of the jitter of arrivals and of execution times.
        slow: From when until when, in seconds, batches take five times as long.

    Attributes:
        fates: What became of each camera's parts: ``judged``, or the reason why they were not in time.
        batches: Cameras and sequence numbers of each batch.
        lost_at: Seconds at which a part was answered that was not judged.
    """

    def __init__(
        self,
        sources: list[Source],
        kind: type[Scheduler] | type[Fifo] = Scheduler,
        *,
        lanes: int = 2,
        seed: int = 0,
        slow: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        self.clock = FakeClock(0)
        rules = {each.name: each.rules._replace(budget_ns=int(each.deadline_ms * MS)) for each in sources}
        queue, times = PartQueue(1 << 30, rules), ExecutionTimes(BATCH)
        self.desk: Desk = Fifo() if issubclass(kind, Fifo) else kind(queue, times, self.clock, lanes=lanes)
        self.fates: dict[str, Counter[str]] = defaultdict(Counter)
        self.batches: list[list[tuple[str, int]]] = []
        self.lost_at: list[float] = []
        self.sent: Counter[str] = Counter()
        self._sources, self._idle, self._slow = sources, lanes, slow
        self._random = random.Random(seed)
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._number = 0
        self._open: set[Part] = set()

    def run(self, seconds: float) -> Factory:
        """Send for so long, then let the lanes finish; every part must have been answered exactly once."""
        for source in self._sources:
            for seq, at in enumerate(self._times(source, seconds)):
                self._at(at, lambda source=source, seq=seq: self._arrive(source, seq))  # type: ignore[misc]
        while self._events:
            self.clock.now, _, event = heapq.heappop(self._events)
            event()
        assert not self._open
        assert {name: fates.total() for name, fates in self.fates.items()} == dict(self.sent)
        return self

    def lost(self, camera: str) -> int:
        """Parts of a camera that were not judged in time."""
        return self.fates[camera].total() - self.fates[camera]["judged"]

    def judged(self) -> int:
        """Parts that were judged in time."""
        return sum(fates["judged"] for fates in self.fates.values())

    def _times(self, source: Source, seconds: float) -> Iterator[int]:
        step = 1 / source.rate
        at = source.begin + self._random.random() * step
        while at < min(seconds, source.end):
            yield int(1e9 * (at + 0.2 * step * self._random.random()))
            at += step

    def _at(self, when: int, event: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, event))

    def _arrive(self, source: Source, seq: int) -> None:
        now = self.clock.now
        part = Part(source.name, Header(seq=seq, session=1), 1, seq, now, now, now + int(source.deadline_ms * MS))
        part.pixels = b"pixels"
        self.sent[source.name] += 1
        self._open.add(part)
        for dropped, reason in self.desk.offer(part):
            self._answer(dropped, reason)
        self._work()

    def _work(self) -> None:
        while self._idle:
            batch, hopeless = self.desk.take(BATCH, 0)
            for part in hopeless:
                self._answer(part, Reason.INFEASIBLE)
            if not batch:
                return
            self._idle -= 1
            self.batches.append([(part.camera, part.seq) for part in batch])
            took = int((FIXED_MS + EACH_MS * len(batch)) * MS * self._random.uniform(0.9, 1.1))
            if self._slow[0] <= self.clock.now / 1e9 < self._slow[1]:
                took *= 5
            self._at(self.clock.now + took, lambda batch=batch, took=took: self._finish(batch, took))  # type: ignore[misc]

    def _finish(self, batch: list[Part], took: int) -> None:
        self._idle += 1
        self.desk.observe(len(batch), took)
        for part in batch:
            self._answer(part, "judged" if self.clock.now < part.deadline else Reason.DEADLINE)
        self._work()

    def _answer(self, part: Part, fate: str) -> None:
        self._open.remove(part)
        self.fates[part.camera][str(fate)] += 1
        if fate != "judged":
            self.lost_at.append(self.clock.now / 1e9)
