"""A crew: one compiled engine with its lanes, each in a thread of its own, which work or stand by.

The thread that makes a lane runs it and closes it: accelerators want that. A crew that stands by keeps its
lanes warm, so that it can take over at once.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

from engines.build import Progress, Target, compile_engine, parity_gate
from engines.bundle import Bundle
from engines.lane import Engine, Lane, LaneFault
from pipeline.inspection import Inspection
from pipeline.parts import Part, Reason
from pipeline.scheduler import ExecutionTimes, Scheduler

log = structlog.get_logger(__name__)

IDLE_S: Final = 0.2
REBUILD_S: Final = (0.1, 5.0)
"""First and longest pause before a faulted lane is made again."""

MEASURED: Final = 3
"""Runs of each batch size from which the fastest is taken: lanes beside it only ever make it slower."""

OnFault = Callable[["Crew", str], None]


class Crew:
    """Runs one engine on parts from a scheduler that it may share with its predecessor.

    Args:
        bundle: The verified engine.
        target: How to run it.
        scheduler: Where the parts wait.
        inspect: What is done with a batch.
        counts: The counters ``batches``, ``inspected`` and ``lane_faults``.
        on_fault: Called, in the lane's thread, when a lane of this crew has failed.

    Attributes:
        working: Set while the crew takes parts; the others stand by.
        times: What is known of this engine's execution times.
    """

    def __init__(
        self,
        bundle: Bundle,
        target: Target,
        scheduler: Scheduler,
        inspect: Inspection,
        counts: Counter[str],
        on_fault: OnFault = lambda *_: None,
    ) -> None:
        self.bundle, self.scheduler, self.inspect, self.counts, self.on_fault = (
            bundle, scheduler, inspect, counts, on_fault,
        )  # fmt: skip
        self.working = threading.Event()
        self.times = ExecutionTimes(target.max_batch)
        self._target = target
        self._engine: Engine | None = None
        self._workers: list[LaneWorker] = []

    def start(self, *, measure: bool = False, progress: Progress = lambda *_: None) -> None:
        """Compile the engine, make every lane and pass each through the parity gate; then stand by.

        Args:
            measure: Whether to learn at once how long batches take: a successor begins under full load.
            progress: Told how far it is: before and after compiling, by every step of a TensorRT build, and after
                each lane. What it raises ends the start.

        Raises:
            ParityError: if the compiled engine does not reproduce its reference.
            LaneFault: if a lane fails.
            BuildError: if the engine cannot be built here.
        """
        progress("compile", 0, 1)
        self._engine = compile_engine(self.bundle, self._target, progress)
        self._workers = [
            LaneWorker(self, number, measure=measure and number == 0) for number in range(self._target.lanes)
        ]
        for worker in self._workers:
            worker.thread.start()
        try:
            for made, worker in enumerate(self._workers):
                progress("lanes", made, len(self._workers))
                worker.wait_started()
            progress("lanes", 1, 1)
        except BaseException:
            self.stop()
            raise
        log.info("engine_ready", engine=self.bundle.label, lanes=len(self._workers), target=self._target.kind)

    def dismiss(self) -> None:
        """Tell the lanes to end after the batch that they are at; return at once."""
        self.working.clear()
        for worker in self._workers:
            worker.stopping.set()

    def stop(self) -> None:
        """End the lanes' threads, each closing its lane, then release the engine."""
        self.dismiss()
        for worker in self._workers:
            worker.thread.join(self.inspect.timeout_s + 5)
        held = [worker.thread.name for worker in self._workers if worker.thread.is_alive()]
        if held:  # an engine that is released under a running lane takes the process with it
            log.error("engine_not_released", engine=self.bundle.label, lanes=held)
        elif self._engine is not None:
            self._engine.close()
        self._workers, self._engine = [], None

    @property
    def batches(self) -> int:
        """Batches run so far."""
        return sum(worker.batches for worker in self._workers)

    def oldest_beat(self) -> int:
        """Monotonic nanoseconds at which the least recent lane showed that it is alive."""
        return min((worker.beat for worker in self._workers), default=0)

    def last_healthy(self) -> int:
        """Monotonic nanoseconds at which a lane was last fit to work."""
        return max((worker.healthy_at for worker in self._workers), default=0)

    def healthy_lanes(self) -> int:
        """Lanes that are neither faulted nor being made again."""
        return sum(worker.healthy for worker in self._workers)

    def make_lane(self) -> Lane:
        """Make a lane and pass it through the parity gate."""
        engine = self._engine
        if engine is None:
            msg = "the engine is released"
            raise LaneFault(msg)
        lane = engine.make_lane()
        try:
            parity_gate(self.bundle, lane)
        except BaseException:
            lane.close()
            raise
        return lane

    def measure(self, lane: Lane) -> None:
        """Learn from a lane that has passed the gate how long a batch of each size takes, decoding aside."""
        for count in range(1, len(lane.frames) + 1):
            elapsed = []
            for _ in range(MEASURED):
                started = time.monotonic_ns()
                lane.submit(count)
                lane.wait(self.inspect.timeout_s)
                elapsed.append(time.monotonic_ns() - started)
            self.times.observe(count, min(elapsed))

    def take(self, limit: int) -> list[Part]:
        """Take a batch; none where the crew was told to stand by while it waited for one."""
        batch, hopeless = self.scheduler.take(limit, IDLE_S)
        self.inspect.give_up(hopeless, Reason.INFEASIBLE)
        if batch and not self.working.is_set():  # the crew that works now is woken by it
            for part in batch:
                self.inspect.give_up(self.scheduler.put(part), Reason.OVERLOAD)
            return []
        return batch

    def learn(self, count: int, elapsed: int) -> None:
        """Learn that a batch of ``count`` took ``elapsed`` nanoseconds."""
        if self.scheduler.times is self.times:
            self.scheduler.observe(count, elapsed)
        self.counts["batches"] += 1
        self.counts["inspected"] += count


class LaneWorker:
    """One lane and the thread that owns it."""

    def __init__(self, crew: Crew, number: int, *, measure: bool = False) -> None:
        self._crew, self._measure = crew, measure
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"lane-{number}", daemon=True)
        self.beat = time.monotonic_ns()
        self.healthy = False
        self.healthy_at = self.beat
        self.batches = 0
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._pause = REBUILD_S[0]

    def wait_started(self) -> None:
        """Wait until the lane is made and validated; raise what prevented it."""
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        lane: Lane | None = None
        try:
            lane = self._crew.make_lane()
            if self._measure:
                self._crew.measure(lane)
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for the start
            self._failure = error
            self.stopping.set()
        finally:
            self._started.set()
        try:
            while not self.stopping.is_set():
                lane = self._turn(lane)
        finally:
            # The thread that made a lane must close it, whatever happens: CUDA aborts the process otherwise.
            self.healthy = False
            if lane is not None:
                lane.close()

    def _turn(self, lane: Lane | None) -> Lane | None:
        """Run one batch, or make a lost lane again after a pause; return the lane, None if it is lost."""
        if lane is None:
            self.stopping.wait(self._pause)
            self._pause = min(self._pause * 2, REBUILD_S[1])
            return None if self.stopping.is_set() else self._make_again()
        self.beat = time.monotonic_ns()
        self.healthy, self.healthy_at = True, self.beat
        if not self._crew.working.wait(IDLE_S):
            return lane
        try:
            if self._step(lane):
                self._pause = REBUILD_S[0]
        except LaneFault as error:
            self.healthy = False
            self._crew.counts["lane_faults"] += 1
            log.error("lane_fault", engine=self._crew.bundle.label, error=str(error))
            lane.close()
            return None
        return lane

    def _step(self, lane: Lane) -> bool:
        """Take a batch and inspect it; say whether there was one."""
        batch = self._crew.take(len(lane.frames))
        self.beat = started = time.monotonic_ns()
        if not batch:
            return False
        try:
            count = self._crew.inspect(lane, batch)
        except LaneFault as error:
            self._fail(batch, error)
            raise
        except Exception as error:
            # Not foreseen, so nothing is known of the lane either: it counts as faulted.
            self._fail(batch, error)
            log.exception("inspection_failed", engine=self._crew.bundle.label)
            raise LaneFault(str(error)) from error
        if count:
            self.batches += 1
            self._crew.learn(count, time.monotonic_ns() - started)
        return True

    def _fail(self, batch: list[Part], error: Exception) -> None:
        # First, so that whoever sees the verdicts finds the engine that takes over at work.
        self._crew.on_fault(self._crew, str(error))
        self._crew.inspect.fail(batch)

    def _make_again(self) -> Lane | None:
        self.beat = time.monotonic_ns()
        try:
            return self._crew.make_lane()
        except Exception as error:  # noqa: BLE001 - whatever it is, the lane stays out and is tried again
            log.error("lane_not_rebuilt", engine=self._crew.bundle.label, error=str(error))
            return None
