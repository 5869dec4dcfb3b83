"""Random programs of streams and events, and what CUDA's rules say about them, worked out apart from the driver.

A program is plain data. :func:`has_race` reads it as a graph: each queued operation and each wait of the host is a
node, an edge leads from what must have happened before, and two conflicting accesses race if no path joins them.
:func:`play` runs it on the simulated driver.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from tests.sim.driver import DriverError, Simulator

Kind = Literal["upload", "download", "copy", "fill", "kernel", "record", "wait", "sync stream", "sync event"]
KINDS: tuple[Kind, ...] = (
    *("upload", "download", "copy", "fill", "kernel"),
    *("record", "wait", "sync stream", "sync event"),
)
WEIGHTS = (2, 2, 2, 1, 2, 6, 8, 2, 2)
BUFFER = 256
BUFFERS, PINNED, EVENTS = 4, 2, 3


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        kind: What to do.
        stream: Index of the stream.
        event: Index of the event.
        target: Index of the device buffer that is written; the one that is read, in a download.
        source: Index of the device buffer that is read, in copies and kernels.
        pinned: Index of the pinned buffer.
        low: First byte, in all buffers.
        size: In bytes.
    """

    kind: Kind
    stream: int
    event: int
    target: int
    source: int
    pinned: int
    low: int
    size: int


@dataclass(frozen=True)
class Program:
    """Streams by whether they are blocking, as to the legacy default stream, which is the last if it is there."""

    blocking: tuple[bool, ...]
    has_default: bool
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Access:
    """Bytes that a node of the graph reads or writes."""

    node: int
    buffer: tuple[str, int]
    low: int
    high: int
    writes: bool


def generate(seed: int) -> Program:
    """Make a program of 5 to 20 calls on 3 or 4 streams."""
    draw = random.Random(seed)
    has_default = draw.random() < 0.5
    blocking = (*(draw.random() < 0.5 for _ in range(3)), *([True] if has_default else []))
    return Program(blocking, has_default, tuple(_step(draw, len(blocking)) for _ in range(draw.randint(5, 20))))


def _step(draw: random.Random, streams: int) -> Step:
    target, source = draw.sample(range(BUFFERS), 2)
    low = draw.choice((0, 0, BUFFER // 2))
    size = BUFFER // 2 if low else draw.choice((BUFFER // 2, BUFFER))
    (kind,) = draw.choices(KINDS, WEIGHTS)
    stream, event, pinned = draw.randrange(streams), draw.randrange(EVENTS), draw.randrange(PINNED)
    return Step(kind, stream, event, target, source, pinned, low, size)


def accesses_of(step: Step) -> list[tuple[tuple[str, int], bool]]:
    """The buffers that a step uses, and whether it writes them."""
    target, source, pinned = ("device", step.target), ("device", step.source), ("pinned", step.pinned)
    return {
        "upload": [(pinned, False), (target, True)],
        "download": [(target, False), (pinned, True)],
        "copy": [(source, False), (target, True)],
        "fill": [(target, True)],
        "kernel": [(source, False), (target, True)],
    }.get(step.kind, [])


@dataclass
class Graph:
    """What must have happened before what, while a program is read."""

    program: Program
    past: list[frozenset[int]] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)
    last: dict[int, int] = field(default_factory=dict)
    recorded: dict[int, int] = field(default_factory=dict)
    host: int | None = None

    def add(self, *before: int | None) -> int:
        """Add a node after the given ones and after all that the host has waited for."""
        direct = {node for node in (*before, self.host) if node is not None}
        self.past.append(frozenset(direct.union(*(self.past[node] for node in direct))))
        return len(self.past) - 1

    def queue(self, stream: int, *before: int | None) -> int:
        """Add an operation of a stream."""
        node = self.add(*before, self.last.get(stream), *(self.last.get(other) for other in self._peers(stream)))
        self.last[stream] = node
        return node

    def _peers(self, stream: int) -> list[int]:
        blocking, default = self.program.blocking, len(self.program.blocking) - 1
        if not self.program.has_default or not blocking[stream]:
            return []
        return [other for other, waits in enumerate(blocking) if waits] if stream == default else [default]

    def read(self, step: Step) -> None:
        """Add what a step does."""
        if step.kind == "record":
            self.recorded[step.event] = self.queue(step.stream)
        elif step.kind == "wait":
            if step.event in self.recorded:
                self.queue(step.stream, self.recorded[step.event])
        elif step.kind == "sync stream":
            self.host = self.add(self.last.get(step.stream))
        elif step.kind == "sync event":
            self.host = self.add(self.recorded.get(step.event))
        else:
            node = self.queue(step.stream)
            high = step.low + step.size
            self.accesses += [Access(node, buffer, step.low, high, writes) for buffer, writes in accesses_of(step)]


def has_race(program: Program) -> bool:
    """Whether two conflicting accesses are in no order."""
    graph = Graph(program)
    for step in program.steps:
        graph.read(step)
    return any(
        a.buffer == b.buffer
        and (a.writes or b.writes)
        and a.low < b.high
        and b.low < a.high
        and a.node not in graph.past[b.node]
        for a, b in itertools.combinations(graph.accesses, 2)
        if a.node != b.node
    )


class Calls:
    """CUDA's calls by name, raising where they fail; every argument has to be a ctypes value."""

    def __init__(self, sim: Simulator) -> None:
        self._sim = sim

    def __call__(self, name: str, *arguments: object) -> None:
        """Make a call."""
        code = getattr(self._sim.library, name)(*arguments)
        if code:
            raise DriverError(name, code)

    def made(self, name: str, *arguments: object) -> int:
        """Make a call that gives a handle or an address."""
        handle = ctypes.c_void_p()
        self(name, ctypes.byref(handle), *arguments)
        return int(handle.value or 0)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Have the primary context current, from ``cuInit`` on."""
        self("cuInit", 0)
        handle = self.made("cuDevicePrimaryCtxRetain", 0)
        self("cuCtxPushCurrent_v2", ctypes.c_void_p(handle))
        try:
            yield
        finally:
            self("cuCtxPopCurrent_v2", None)
            self("cuDevicePrimaryCtxRelease_v2", 0)


class Player:
    """A program's streams, events and buffers on the simulated driver. The context has to be current."""

    def __init__(self, sim: Simulator, program: Program) -> None:
        self._sim, self._call = sim, Calls(sim)
        made, size = self._call.made, ctypes.c_size_t(BUFFER)
        own = program.blocking[: len(program.blocking) - program.has_default]
        self._streams = [made("cuStreamCreate", 0 if blocking else 1) for blocking in own]
        self._all = [*self._streams, *([0] if program.has_default else [])]
        self._events = [made("cuEventCreate", 0) for _ in range(EVENTS)]
        self._device = [made("cuMemAlloc_v2", size) for _ in range(BUFFERS)]
        self._pinned = [made("cuMemHostAlloc", size, 0) for _ in range(PINNED)]

    def do(self, step: Step) -> None:
        """Make a step's call."""
        pointer, size = ctypes.c_void_p, ctypes.c_size_t(step.size)
        stream, event = pointer(self._all[step.stream]), pointer(self._events[step.event])
        target, source = self._device[step.target] + step.low, self._device[step.source] + step.low
        pinned = self._pinned[step.pinned] + step.low
        if step.kind == "upload":
            self._call("cuMemcpyHtoDAsync_v2", pointer(target), pointer(pinned), size, stream)
        elif step.kind == "download":
            self._call("cuMemcpyDtoHAsync_v2", pointer(pinned), pointer(target), size, stream)
        elif step.kind == "copy":
            self._call("cuMemcpyDtoDAsync_v2", pointer(target), pointer(source), size, stream)
        elif step.kind == "fill":
            self._call("cuMemsetD8Async", pointer(target), ctypes.c_ubyte(1), size, stream)
        elif step.kind == "kernel":
            ranges = [(source, step.size)], [(target, step.size)]
            self._sim.launch(self._all[step.stream], lambda: None, reads=ranges[0], writes=ranges[1])
        else:
            self._wait_or_record(step.kind, stream, event)

    def _wait_or_record(self, kind: Kind, stream: ctypes.c_void_p, event: ctypes.c_void_p) -> None:
        if kind == "record":
            self._call("cuEventRecord", event, stream)
        elif kind == "wait":
            self._call("cuStreamWaitEvent", stream, event, 0)
        elif kind == "sync stream":
            self._call("cuStreamSynchronize", stream)
        else:
            self._call("cuEventSynchronize", event)

    def close(self) -> None:
        """Wait for everything and free it."""
        self._call("cuCtxSynchronize")
        freeing = {
            "cuStreamDestroy_v2": self._streams,
            "cuEventDestroy_v2": self._events,
            "cuMemFree_v2": self._device,
            "cuMemFreeHost": self._pinned,
        }
        for name, handles in freeing.items():
            for handle in handles:
                self._call(name, ctypes.c_void_p(handle))


def play(sim: Simulator, program: Program) -> bool:
    """Run a program on the simulated driver, and return whether it reports a race."""
    before = sim.counts().races
    player = Player(sim, program)
    try:
        for step in program.steps:
            player.do(step)
    finally:
        player.close()
    return sim.counts().races > before
