"""Versions of the brightness engine, and a stand-in for its accelerator that is watched and told what to do."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from engines import bundle
from engines.build import Progress, Target
from engines.bundle import Bundle, Parity
from engines.lane import LaneFault, check_scores
from engines.store import Store
from pipeline.commands import Commands
from pipeline.config import Camera, Limits, Swap
from pipeline.ledger import CameraBook, Ledger
from pipeline.parts import Finding, Part
from pipeline.station import Station
from pipeline.swap import Swapper
from pipeline.trial import Trials
from pipeline.wire import Header
from tests.support.books import Recorder
from tests.support.engine import CELL, SIDE, brightness_model, write_bundle
from tests.support.line import until


def add_version(store: Store, threshold: float, *, name: str = "bright", off_by: float = 0.0) -> str:
    """Add a version that differs by its threshold; return its number. It is not active.

    Args:
        store: The store.
        threshold: Its threshold.
        name: Its name.
        off_by: How far its stored scores are from what its graph gives: the parity gate has to refuse it.
    """
    number = len(store.versions(name)) + 1
    base = write_bundle(store.root.parent / f"base-{name}-{number}", name)
    stored = base.parity()
    manifest = msgspec.structs.replace(
        base.manifest, threshold=msgspec.structs.replace(base.manifest.threshold, value=threshold), files={}
    )
    folder = store.root.parent / f"bundle-{name}-{number}"
    bundle.write(folder, manifest, brightness_model(), Parity(stored.frames, stored.scores + off_by, stored.heatmaps))
    return store.add(folder, name).version


@dataclass
class Orders:
    """What the stand-ins are told, and what has become of them.

    Attributes:
        faulty: Labels of engines whose batches fail, once their lanes have passed the gate.
        hold: Labels of engines whose compilation waits for ``release``.
        engines: Every engine that was made.
        steps: How many steps of a build were told while it was held.
    """

    faulty: set[str] = field(default_factory=set)
    hold: set[str] = field(default_factory=set)
    compiling: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    release: threading.Event = field(default_factory=threading.Event)
    engines: list[PlainEngine] = field(default_factory=list)
    steps: int = 0

    def compile(self, made_from: Bundle, _: object, progress: Progress = lambda *_: None) -> PlainEngine:
        """Stand in for ``compile_engine``."""
        if made_from.label in self.hold:
            self.compiling.release()
            while not self.release.wait(0.01):
                progress("Tactics", self.steps, 3000)
                self.steps += 1
                assert self.steps < 3000, "held for ever"
        self.engines.append(PlainEngine(made_from, self))
        return self.engines[-1]

    def open_engines(self) -> list[str]:
        """Engines that are not closed."""
        return [engine.label for engine in self.engines if not engine.closed]

    def all_released(self) -> bool:
        """Whether each lane was closed by the thread that made it, and each engine after its lanes."""
        assert not self.open_engines()
        assert all(lane.closed_by == lane.owner for engine in self.engines for lane in engine.lanes)
        return True


class PlainEngine:
    """The brightness engine in NumPy."""

    def __init__(self, made_from: Bundle, orders: Orders) -> None:
        self.manifest, self.max_batch, self.label = made_from.manifest, 4, made_from.label
        self.orders, self.closed = orders, False
        self.lanes: list[PlainLane] = []

    def make_lane(self) -> PlainLane:
        """Make a lane; not of a closed engine."""
        assert not self.closed
        self.lanes.append(PlainLane(self))
        return self.lanes[-1]

    def close(self) -> None:
        """Close it; its lanes have to be closed."""
        assert all(lane.closed_by for lane in self.lanes), "an engine is closed after its lanes"
        self.closed = True


class PlainLane:
    """A lane that knows which thread made it and refuses any other."""

    def __init__(self, engine: PlainEngine) -> None:
        size = engine.max_batch
        self.frames = np.zeros((size, SIDE, SIDE, 1), np.uint8)
        self.scores = np.zeros(size, np.float32)
        self.heatmaps = np.zeros((size, SIDE // CELL, SIDE // CELL), np.uint8)
        self._engine, self._count = engine, 0
        self.owner, self.closed_by = threading.get_ident(), 0

    def submit(self, count: int) -> None:
        """Compute at once."""
        assert threading.get_ident() == self.owner
        cells = self.frames[:count, ..., 0].reshape(count, SIDE // CELL, CELL, SIDE // CELL, CELL).mean((2, 4))
        self.scores[:count], self.heatmaps[:count] = cells.mean((1, 2)) / 255, cells.astype(np.uint8)
        self._count = count

    def ready(self) -> bool:
        """Always."""
        return True

    def wait(self, timeout: float) -> None:
        """Fail where it is told to."""
        assert not self.closed_by
        if self._engine.label in self._engine.orders.faulty:
            msg = "told to fail"
            raise LaneFault(msg)
        check_scores(self.scores[: self._count])

    def close(self) -> None:
        """Remember who closed it."""
        self.closed_by = self.closed_by or threading.get_ident()


def make_versions(folder: Path, *thresholds: float, name: str = "bright") -> Store:
    """A store with a version for each threshold, of which the first is active."""
    store = Store(folder / "store")
    for threshold in thresholds:
        add_version(store, threshold, name=name)
    store.activate(name, "1")
    return store


class Bench:
    """A station without sockets and Redis, whose engines are stand-ins."""

    def __init__(self, folder: Path, orders: Orders, swap: Swap | None = None) -> None:
        self.store, self.orders, self.out = make_versions(folder, 0.5, 0.9), orders, Recorder()
        self.ledger = Ledger(self.out)
        self.ledger.register(CameraBook("cam1", deadline_ns=10**10, max_gap=0, first_seq=0))
        target, cameras = Target(lanes=2, max_batch=4), {"cam1": Camera()}
        self.station = Station(
            self.store.get("bright", "1"), target, Limits(), cameras, self.ledger, timeout_s=1, swap=swap or Swap()
        )
        self.trials = Trials(folder)
        self.sent = 0

    def swapper(self, commands: Commands | None = None) -> Swapper:
        """A swapper for the station, whose turns a test takes by itself."""
        stations, alarm = {"bright": self.station}, threading.Event()
        return Swapper(self.store, stations, 1.0, lambda _: None, self.trials, commands, alarm)

    def stop(self) -> None:
        """Release the engines, and the record of trials."""
        self.station.stop()
        self.trials.close()

    def send(self) -> Part:
        """Admit and queue a part."""
        header = Header(seq=self.sent, session=1, w=SIDE, h=SIDE)
        part = self.ledger.admit("cam1", header)
        assert part is not None
        part.pixels = np.full((SIDE, SIDE), 180, np.uint8).tobytes()
        self.sent += 1
        assert self.station.scheduler.put(part) == []
        return part

    def judged(self, part: Part) -> Finding:
        """Wait for a part's finding."""
        until(lambda: part.finding is not None)
        assert part.finding is not None
        return part.finding
