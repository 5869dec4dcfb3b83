"""The parts that wait for a lane: a line for each camera, bounded in parts, bytes and age, and whose turn it is.

While there is time for all, the earliest deadline has its turn, whatever its camera (EDF: Liu and Layland, "Scheduling
algorithms for multiprogramming in a hard-real-time environment", J. ACM 20, 1973). Under pressure, cameras share the
lanes by weight, after Stoica and Abdel-Wahab, "Earliest eligible virtual deadline first", TR 95-22, Old Dominion
University, 1995. Virtual time goes on by 1 / (sum of the weights of the cameras that wait) for every part that is
handed out; a camera's part moves the camera's tag on by 1 / weight; and a camera is eligible while its tag is not
ahead of virtual time. Of those that are eligible the highest priority has its turn, then the earliest deadline (the
paper: the earliest virtual deadline). Whatever is chosen among the eligible, each is at most one part ahead of its
share, so that a camera that always has parts waiting gets its share but for fewer parts than there are cameras.
Nothing here needs to know how fast the lanes are.

Where bytes run out, the camera that holds most of them for its weight gives way (longest queue drop: Suter et al.,
"Design considerations for supporting TCP with per-flow queueing", INFOCOM 1998).
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from pipeline.config import MOST_PARTS, Camera, DropPolicy, Limits
from pipeline.parts import Part, Reason

SPARE_ENTRIES: Final = 64
"""Entries of parts that have left which a line may keep besides as many as there are waiting parts."""

CROWD: Final = 4
"""A camera with more waiting parts than so many, under pressure, sends more than it is given."""

SAMPLING_NS: Final = 1_000_000_000
"""Policy ``sample`` goes on for so long after the last pressure, which it takes away itself."""

GAVE_WAY: Final[dict[DropPolicy, str]] = {
    "wait": "queue_wait",
    "drop_oldest": "queue_drop_oldest",
    "drop_newest": "queue_drop_newest",
    "sample": "queue_sample",
}
"""Counter of the parts that were given up by each policy."""

Entry = tuple[int, int, Part, int]
"""Deadline, number in order of arrival, part, bytes; the number decides before parts would be compared."""


class Rules(NamedTuple):
    """How a camera's parts wait.

    Attributes:
        weight: Share of the lanes, and of the bytes, under pressure.
        priority: The higher goes first within the shares.
        policy: Who gives way when there is no room.
        sample_every: Under pressure, policy ``sample`` keeps one of so many.
        max_parts: Most waiting parts.
        age_ns: Longest wait in nanoseconds, 0 for no limit.
        budget_ns: Nanoseconds from a part's arrival to its verdict; a header may shorten them.
    """

    weight: float = 1.0
    priority: int = 0
    policy: DropPolicy = "drop_oldest"
    sample_every: int = 10
    max_parts: int = 64
    age_ns: int = 0
    budget_ns: int = 60_000_000_000

    @classmethod
    def of(cls, camera: Camera, limits: Limits) -> Rules:
        """The rules in ``[cameras.NAME]`` and ``[limits]``."""
        policy = camera.drop_policy
        age_ms = limits.queue_age_ms if camera.queue_age_ms is None else camera.queue_age_ms
        parts = MOST_PARTS if policy == "wait" else limits.queue_parts
        return cls(
            camera.weight,
            camera.priority,
            policy,
            camera.sample_every,
            parts,
            age_ns=int(age_ms * 1e6),
            budget_ns=int(camera.deadline_ms * 1e6),
        )


class Drop(NamedTuple):
    """A part that is given up, and the reason to answer it with."""

    part: Part
    reason: Reason


class CameraLine:
    """One camera's waiting parts, in order of arrival and by deadline.

    Attributes:
        bytes: Of the waiting parts.
        tag: Virtual time at which the camera's next part is eligible.
    """

    __slots__ = ("_heap", "_sampled", "_until", "bytes", "parts", "rules", "tag")

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.parts: OrderedDict[int, Entry] = OrderedDict()
        self._heap: list[Entry] = []
        self._sampled = self._until = 0
        self.bytes = 0
        self.tag = 0.0

    def add(self, entry: Entry) -> None:
        """Add a part."""
        self.parts[entry[1]] = entry
        self.bytes += entry[3]
        if len(self._heap) >= 2 * len(self.parts) + SPARE_ENTRIES:
            self._heap = list(self.parts.values())
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, entry)

    def remove(self, number: int) -> Entry:
        """Remove a part; its entry in the heap goes when it comes to the top."""
        entry = self.parts.pop(number)
        self.bytes -= entry[3]
        return entry

    def first(self) -> Entry | None:
        """The part with the earliest deadline."""
        heap = self._heap
        while heap and heap[0][1] not in self.parts:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def keeps(self, now: int, *, pressed: bool) -> bool:
        """Whether a newcomer is inspected: under pressure, policy ``sample`` keeps the first of every few."""
        if self.rules.policy != "sample":
            return True
        if pressed or 2 * len(self.parts) >= self.rules.max_parts:
            self._until = now + SAMPLING_NS
        if now >= self._until:
            self._sampled = 0
            return True
        self._sampled += 1
        return self._sampled % self.rules.sample_every == 1


class PartQueue:
    """Waiting parts of all cameras. Pure logic: the caller locks and tells the time.

    A call costs O(log n) in the waiting parts; :meth:`turns` and :meth:`demand` look once at each camera.

    Args:
        max_bytes: Most waiting bytes of pixels in all.
        rules: How each camera's parts wait.
        other: How the parts of any other camera wait.

    Attributes:
        virtual: Virtual time.
        counts: Parts that gave way, by policy, and those that grew too old.
        tightest: The shortest budget of the cameras that have sent parts, in nanoseconds.
    """

    def __init__(self, max_bytes: int, rules: Mapping[str, Rules] | None = None, other: Rules = Rules()) -> None:
        self._max_bytes, self._rules, self._other = max_bytes, rules or {}, other
        self._lines: dict[str, CameraLine] = {}
        self._number = 0
        self.tightest = other.budget_ns
        self.counts: Counter[str] = Counter()
        self.virtual = 0.0
        self.bytes = 0
        self.waiting = 0

    def offer(self, part: Part, now: int, *, pressed: bool = False) -> list[Drop]:
        """Add a newcomer by its camera's policy.

        Args:
            part: The part, open, with its pixels.
            now: Monotonic nanoseconds.
            pressed: Whether there is not time for all that waits.

        Returns:
            The parts that are given up, the newcomer itself perhaps; the caller answers them.
        """
        line = self._line(part.camera)
        self.first(line)
        dropped = [Drop(old, Reason.INFEASIBLE) for old in self._aged(line, now)]
        if not line.keeps(now, pressed=pressed):
            self.counts[GAVE_WAY["sample"]] += 1
            return [*dropped, Drop(part, Reason.SAMPLED)]
        size = _size(part)
        refused = self._make_room(line, size, dropped)
        if refused is None:
            self._add(line, part, size)
        else:
            dropped.append(self._give_up(refused, part))
        return dropped

    def put(self, part: Part) -> list[Part]:
        """Add a part whatever its camera's policy; return it where there is no room."""
        line, size = self._line(part.camera), _size(part)
        if len(line.parts) >= line.rules.max_parts or self.bytes + size > self._max_bytes:
            return [self._give_up(line, part).part]
        self._add(line, part, size)
        return []

    def turns(self, *, fair: bool) -> Turns:
        """The order in which parts leave now."""
        return Turns(self, fair=fair)

    def demand(self) -> list[tuple[int, int]]:
        """Earliest deadline and number of waiting parts of each camera, by deadline."""
        firsts = ((self.first(line), len(line.parts)) for line in self._lines.values() if line.parts)
        return sorted((first[0], count) for first, count in firsts if first is not None)

    def earliest(self) -> tuple[int, int] | None:
        """The earliest arrival and the earliest deadline of what waits."""
        demand = self.demand()
        if not demand:
            return None
        return min(next(iter(line.parts.values()))[2].arrival for line in self.waiting_lines()), demand[0][0]

    def aged(self, now: int) -> list[Part]:
        """Take out all parts that have waited longer than they may."""
        return [part for line in self.waiting_lines() for part in self._aged(line, now)]

    def due_before(self, when: int) -> list[Part]:
        """Take out all parts whose deadline is before ``when``."""
        out = []
        for line in self._lines.values():
            while (first := self.first(line)) is not None and first[0] < when:
                out.append(self.remove(line, first))
        return out

    def waiting_lines(self) -> Iterator[CameraLine]:
        """The lines in which parts wait."""
        return (line for line in self._lines.values() if line.parts)

    def first(self, line: CameraLine) -> Entry | None:
        """The earliest deadline of a line; parts that are answered are taken out and passed over."""
        while (first := line.first()) is not None and first[2].finding is not None:
            self.remove(line, first)
        return first

    def remove(self, line: CameraLine, entry: Entry) -> Part:
        """Take a part out."""
        line.remove(entry[1])
        self.waiting -= 1
        self.bytes -= entry[3]
        return entry[2]

    def _line(self, camera: str) -> CameraLine:
        line = self._lines.get(camera)
        if line is None:
            line = self._lines[camera] = CameraLine(self._rules.get(camera, self._other))
            self.tightest = min(self.tightest, line.rules.budget_ns)
        return line

    def _add(self, line: CameraLine, part: Part, size: int) -> None:
        if not line.parts:  # what it did not use while it was away is not owed to it
            line.tag = max(line.tag, self.virtual)
        self._number += 1
        line.add((part.deadline, self._number, part, size))
        self.waiting += 1
        self.bytes += size

    def _make_room(self, line: CameraLine, size: int, dropped: list[Drop]) -> CameraLine | None:
        """Displace parts until there is room for a newcomer; return its line where it has to give way itself."""
        if size > self._max_bytes:
            return line
        while len(line.parts) >= line.rules.max_parts:
            if _keeps_old(line):
                return line
            dropped.append(self._displace(line))
        if self.bytes + size > self._max_bytes:
            for each in self._lines.values():  # parts that are answered hold bytes until they are passed over
                self.first(each)
        while self.bytes + size > self._max_bytes:
            most = max(
                self._lines.values(),
                key=lambda each: (each.bytes + (size if each is line else 0)) / each.rules.weight,
            )
            if most is line and (_keeps_old(line) or not line.parts):
                return line
            dropped.append(self._displace(most))
        return None

    def _displace(self, line: CameraLine) -> Drop:
        """Take out the part that a line loses first."""
        number = next(reversed(line.parts) if _keeps_old(line) else iter(line.parts))
        return self._give_up(line, self.remove(line, line.parts[number]))

    def _give_up(self, line: CameraLine, part: Part) -> Drop:
        self.counts[GAVE_WAY[line.rules.policy]] += 1
        return Drop(part, Reason.OVERLOAD)

    def _aged(self, line: CameraLine, now: int) -> list[Part]:
        out: list[Part] = []
        if not line.rules.age_ns:
            return out
        while line.parts:
            oldest = next(iter(line.parts.values()))
            if oldest[2].arrival + line.rules.age_ns >= now:
                break
            out.append(self.remove(line, oldest))
        self.counts["queue_age"] += len(out)
        return out


class Turns:
    """The order in which parts leave one queue at one instant; see the module for how it is chosen.

    Args:
        queue: The queue, which nobody else may change meanwhile.
        fair: Whether cameras share by weight; else the earliest deadline of all comes first.
    """

    def __init__(self, queue: PartQueue, *, fair: bool) -> None:
        self._queue, self._fair = queue, fair
        self._ready: list[tuple[int, int, int, CameraLine, Entry]] = []
        self._later: list[tuple[float, int, CameraLine, Entry]] = []
        self._weight = 0.0
        for line in queue.waiting_lines():
            self._weight += line.rules.weight
            self._enter(line)

    def peek(self) -> Part | None:
        """Whose turn it is, None where nothing waits."""
        if not self._ready and self._later:
            self._advance(self._later[0][0])
        return self._ready[0][4][2] if self._ready else None

    def crowded(self) -> bool:
        """Whether more parts wait of that one's camera than of one that sends no more than its share."""
        return len(self._ready[0][3].parts) > CROWD

    def serve(self) -> Part:
        """Hand out the part whose turn it is, at its camera's expense."""
        line, part = self._pop()
        weight = self._weight
        if self._fair:
            line.tag += 1 / line.rules.weight
        self._enter(line)
        if self._fair:
            self._advance(self._queue.virtual + 1 / weight)
        return part

    def pass_over(self) -> Part:
        """Take out the part whose turn it is without handing it out: its camera has had nothing of it."""
        line, part = self._pop()
        self._enter(line)
        return part

    def _pop(self) -> tuple[CameraLine, Part]:
        self.peek()
        line, entry = heapq.heappop(self._ready)[3:]
        return line, self._queue.remove(line, entry)

    def _enter(self, line: CameraLine) -> None:
        """Let a line's next part wait for its turn; a line without one no longer has a weight."""
        entry = self._queue.first(line)
        if entry is None:
            self._weight -= line.rules.weight
        elif self._fair and line.tag > self._queue.virtual:
            heapq.heappush(self._later, (line.tag, entry[1], line, entry))
        else:
            priority = line.rules.priority if self._fair else 0
            heapq.heappush(self._ready, (-priority, entry[0], entry[1], line, entry))

    def _advance(self, virtual: float) -> None:
        self._queue.virtual = virtual
        while self._later and self._later[0][0] <= virtual:
            self._enter(heapq.heappop(self._later)[2])


def _size(part: Part) -> int:
    pixels = part.pixels  # once: the publisher takes them away from a part whose deadline has just passed
    return 0 if pixels is None else len(pixels)


def _keeps_old(line: CameraLine) -> bool:
    """Whether a newcomer gives way to what waits; with ``sample`` the newest that is kept tells most."""
    return line.rules.policy in ("wait", "drop_newest")
