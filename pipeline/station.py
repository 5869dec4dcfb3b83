"""A station: one queue of parts, the engine that works on it, and for a while the one that did before.

An engine is exchanged while parts flow: its successor is made ready beside it, then the two change places at
a batch boundary. The predecessor stands by, warm, until the successor is proven; the first fault before that
puts it back to work.
"""

from __future__ import annotations

import threading
import time
from typing import Final, NamedTuple

import structlog

from engines.build import Target
from engines.bundle import Bundle
from pipeline.build_progress import BuildProgress
from pipeline.config import Camera, Limits, Swap
from pipeline.crew import Crew
from pipeline.inspection import Inspection
from pipeline.ledger import Ledger
from pipeline.notify import Notifier
from pipeline.part_queue import PartQueue, Rules
from pipeline.scheduler import ExecutionTimes, Scheduler

log = structlog.get_logger(__name__)

NO_SWAP: Final = Swap()


class Change(NamedTuple):
    """The last thing that happened to an engine while the line ran.

    Attributes:
        state: ``none``, ``preparing``, ``probation``, ``proven``, ``refused`` or ``rolled_back``.
        engine: ``name@version`` of the newcomer.
        detail: Why, in words.
        at: Monotonic nanoseconds.
    """

    state: str = "none"
    engine: str = ""
    detail: str = ""
    at: int = 0


class Reverted(NamedTuple):
    """A swap that was undone: the engine that failed, and the one that works again."""

    failed: Bundle
    back: Bundle
    why: str


class Station:
    """Runs one engine at a time.

    Args:
        bundle: The verified engine.
        target: How to run it, and every successor.
        limits: ``[limits]``.
        cameras: ``[cameras]``.
        ledger: Takes the findings.
        timeout_s: Longest that a batch may take.
        keep_all: Whether good parts keep their heatmaps.
        sample: Whether one good part a second of each camera keeps heatmap and image.
        swap: ``[swap]``.
        alarm: Set when an engine has been put back to work by a fault.
        batch_wait_ms: Longest that an idle lane waits to fill a batch.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: Target,
        limits: Limits,
        cameras: dict[str, Camera],
        ledger: Ledger,
        *,
        timeout_s: float,
        keep_all: bool = False,
        sample: bool = False,
        swap: Swap = NO_SWAP,
        alarm: threading.Event | None = None,
        batch_wait_ms: float = 0.0,
    ) -> None:
        rules = {name: Rules.of(camera, limits) for name, camera in cameras.items()}
        self.scheduler = Scheduler(
            PartQueue(limits.queue_bytes, rules),
            ExecutionTimes(target.max_batch),
            lanes=target.lanes,
            batch_wait_ms=batch_wait_ms,
        )
        self.counts = self.scheduler.counts  # which the crews add to
        self.change = Change()
        self.reverted: list[Reverted] = []
        self._target, self._cameras, self._ledger = target, cameras, ledger
        self._timeout_s, self._keep_all, self._sample = timeout_s, keep_all, sample
        self._swap, self._alarm = swap, alarm or threading.Event()
        self._lock = threading.Lock()
        self._crew = self._crew_of(bundle)
        self._standby: Crew | None = None
        self._retired: list[Crew] = []
        self.fault = ""  # of an engine on probation beside which none stands by; the swapper's to answer
        self._on_probation = False
        self._first_work, self._faulty_batches = 0.0, 0

    @property
    def bundle(self) -> Bundle:
        """The engine that works."""
        return self._crew.bundle

    def resident(self) -> list[Bundle]:
        """Every engine in memory: the one that works, and those that are not yet released."""
        with self._lock:
            others = [*self._retired, *([self._standby] if self._standby else [])]
            return [self._crew.bundle, *(crew.bundle for crew in others)]

    def start(self, notify: Notifier | None = None) -> None:
        """Compile the engine, make every lane, pass each through the parity gate, and begin to work.

        Args:
            notify: Told how far it is, as long as the line has not said that it is ready.

        Raises:
            ParityError: if the compiled engine does not reproduce its reference.
            LaneFault: if a lane fails.
            BuildError: if the engine cannot be built here.
        """
        self._crew.start(progress=BuildProgress(self.bundle.label, notify))
        self.scheduler.times = self._crew.times
        self._crew.working.set()

    def stop(self) -> None:
        """End the lanes' threads, each closing its lane, then release the engines."""
        self.scheduler.close()
        with self._lock:
            crews = [self._crew, *self._retired, *([self._standby] if self._standby else [])]
            self._standby, self._retired = None, []
        for crew in crews:
            crew.dismiss()
        for crew in crews:
            crew.stop()

    def prepare(self, bundle: Bundle) -> Crew:
        """Make a successor ready beside the working engine; the caller stops it or gives it to :meth:`switch`.

        Raises:
            ParityError, LaneFault, BuildError: as :meth:`start`; nothing has changed then.
        """
        crew = self._crew_of(bundle)
        crew.start(measure=True, progress=BuildProgress(bundle.label))
        return crew

    def switch(self, successor: Crew) -> None:
        """Let ``successor`` work from the next batch on; the predecessor stands by until it is proven."""
        with self._lock:
            if self._standby is not None:
                self._retire(self._standby)
            self._standby = predecessor = self._crew
            self._on_probation = True
            self._hand_over(successor)
            self.note("probation", successor.bundle.label, f"takes over from {predecessor.bundle.label}")
        log.info("engine_switched", engine=successor.bundle.label, before=predecessor.bundle.label)

    def continue_probation(self, detail: str) -> None:
        """Put the engine on probation from its start on: a fault sets :attr:`fault`, as no other stands by."""
        self._on_probation = True
        self.note("probation", self._crew.bundle.label, detail)

    def fall_back(self, successor: Crew, why: str) -> None:
        """Let ``successor``, which is proven, work from the next batch on; the one that has failed is released."""
        with self._lock:
            failed, self._standby = self._crew, successor
            self._revert(why)
        log.error("engine_rolled_back", engine=failed.bundle.label, back=successor.bundle.label, error=why)

    def is_proven(self) -> bool:
        """Whether the engine that works has run for as long as a probation takes."""
        with self._lock:
            return self._is_proven()

    def stands_by(self, version: str) -> bool:
        """Whether this version is kept warm."""
        standby = self._standby
        return standby is not None and standby.bundle.version == version

    def revert_to(self, version: str, why: str) -> bool:
        """Put the engine that stands by back to work if it is ``version``; say whether it was."""
        with self._lock:
            if self._standby is None or self._standby.bundle.version != version:
                return False
            self._revert(why)
            return True

    def settle(self) -> None:
        """End a probation that has been passed, and release what is no longer needed. May take seconds."""
        with self._lock:
            if self._on_probation and self._is_proven():
                if self._standby is not None:
                    self._retire(self._standby)
                self._standby, self._on_probation = None, False
                passed = self._crew.batches - self._faulty_batches
                self.note("proven", self._crew.bundle.label, f"no fault in {passed} batches")
                log.info("engine_proven", engine=self._crew.bundle.label, batches=self._crew.batches)
            retired = list(self._retired)
        for crew in retired:
            crew.stop()
        with self._lock:  # only now: until then they take memory
            self._retired = [crew for crew in self._retired if crew not in retired]

    def note(self, state: str, engine: str, detail: str) -> None:
        """Remember what happened to an engine, for the heartbeat."""
        self.change = Change(state, engine, detail, time.monotonic_ns())

    def oldest_beat(self) -> int:
        """Monotonic nanoseconds at which the least recent lane showed that it is alive."""
        return self._crew.oldest_beat()

    def last_healthy(self) -> int:
        """Monotonic nanoseconds at which a lane was last fit to work."""
        return self._crew.last_healthy()

    def healthy_lanes(self) -> int:
        """Lanes of the working engine that are neither faulted nor being made again."""
        return self._crew.healthy_lanes()

    def _crew_of(self, bundle: Bundle) -> Crew:
        inspect = Inspection(
            bundle,
            self._cameras,
            self._ledger,
            timeout_s=self._timeout_s,
            keep_all=self._keep_all,
            sample=self._sample,
        )
        return Crew(bundle, self._target, self.scheduler, inspect, self.counts, self._on_fault)

    def _on_fault(self, crew: Crew, error: str) -> None:
        """Undo the last swap if ``crew`` is on probation; in the thread of the lane that failed."""
        with self._lock:
            if crew is not self._crew or not self._on_probation or self._is_proven():
                return
            why = f"lane fault after {crew.batches} batches: {error}"
            if self._standby is None:
                self.fault, self._faulty_batches, self._first_work = why, crew.batches, 0.0
                self._alarm.set()
                return
            back = self._standby.bundle
            self.reverted.append(Reverted(crew.bundle, back, why))
            self._revert(why)
        log.error("engine_rolled_back", engine=crew.bundle.label, back=back.label, error=error)
        self._alarm.set()

    # Under the lock.

    def _is_proven(self) -> bool:
        """Whether the working engine has passed its probation: enough batches, or enough time since its first."""
        batches = self._crew.batches
        if batches > self._faulty_batches and not self._first_work:
            self._first_work = time.monotonic()
        worked = time.monotonic() - self._first_work if self._first_work else 0.0
        return batches - self._faulty_batches >= self._swap.probation_batches or worked > self._swap.probation_s

    def _revert(self, why: str) -> None:
        failed, back = self._crew, self._standby
        assert back is not None  # noqa: S101 - both callers have looked
        self._standby, self._on_probation = None, False
        self._hand_over(back)
        self._retire(failed)
        self.note("rolled_back", failed.bundle.label, f"{why}; {back.bundle.label} works again")

    def _hand_over(self, crew: Crew) -> None:
        # The predecessor first: a lane of it that waits for parts puts back what it still gets.
        self._crew.working.clear()
        self.fault, self._first_work, self._faulty_batches = "", 0.0, 0
        self.scheduler.times = crew.times
        self._crew = crew
        crew.working.set()

    def _retire(self, crew: Crew) -> None:
        crew.dismiss()
        self._retired.append(crew)
