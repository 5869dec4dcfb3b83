"""A station: one engine with its queue and its lanes, each lane in a thread of its own.

The thread that makes a lane runs it and closes it: accelerators want that.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Final

import cv2
import structlog

from engines.build import Target, compile_engine, parity_gate
from engines.bundle import Bundle
from engines.frames import FrameError
from engines.lane import Engine, Lane, LaneFault
from pipeline.config import Camera, Limits
from pipeline.decode import into_slot
from pipeline.judge import Judge
from pipeline.ledger import Ledger
from pipeline.parts import UNKNOWN, Part, Reason
from pipeline.scheduler import ExecutionTimes, PartQueue, Scheduler

log = structlog.get_logger(__name__)

IDLE_S: Final = 0.2
REBUILD_S: Final = (0.1, 5.0)
"""First and longest pause before a faulted lane is made again."""


class Station:
    """Runs one engine.

    Args:
        bundle: The verified engine.
        target: How to run it.
        limits: ``[limits]``.
        cameras: ``[cameras]``.
        ledger: Takes the findings.
        timeout_s: Longest that a batch may take.
        keep_all: Whether good parts keep their heatmaps.
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
    ) -> None:
        self.bundle = bundle
        self.scheduler = Scheduler(PartQueue(limits.queue_parts, limits.queue_bytes), ExecutionTimes(target.max_batch))
        self.counts: Counter[str] = Counter()
        self._target, self._cameras, self._ledger = target, cameras, ledger
        self._timeout_s = timeout_s
        self._judge = Judge(bundle, keep_all=keep_all)
        self._engine: Engine | None = None
        self._workers: list[LaneWorker] = []

    def start(self) -> None:
        """Compile the engine, make every lane and pass each through the parity gate.

        Raises:
            ParityError: if the compiled engine does not reproduce its reference.
            LaneFault: if a lane fails.
            BuildError: if the engine cannot be built here.
        """
        self._engine = compile_engine(self.bundle, self._target)
        self._workers = [LaneWorker(self, number) for number in range(self._target.lanes)]
        for worker in self._workers:
            worker.thread.start()
        try:
            for worker in self._workers:
                worker.wait_started()
        except BaseException:
            self.stop()
            raise
        log.info("engine_ready", engine=self.bundle.label, lanes=len(self._workers), target=self._target.kind)

    def stop(self) -> None:
        """End the lanes' threads, each closing its lane, then release the engine."""
        self.scheduler.close()
        for worker in self._workers:
            worker.stopping.set()
        for worker in self._workers:
            worker.thread.join(self._timeout_s + 5)
        self._workers = []
        if self._engine is not None:
            self._engine.close()
            self._engine = None

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
        if self._engine is None:
            msg = "the station is stopped"
            raise LaneFault(msg)
        lane = self._engine.make_lane()
        try:
            parity_gate(self.bundle, lane)
        except BaseException:
            lane.close()
            raise
        return lane

    def give_up(self, parts: list[Part]) -> None:
        """Answer parts that can no longer be judged in time."""
        for part in parts:
            self._ledger.answer(part, UNKNOWN[Reason.INFEASIBLE])

    def fail(self, parts: list[Part]) -> None:
        """Answer what is still open of a batch that could not be run."""
        for part in parts:
            if part.finding is None:
                self._ledger.answer(part, UNKNOWN[Reason.ENGINE_FAULT])

    def inspect(self, lane: Lane, batch: list[Part]) -> None:
        """Decode a batch into the lane's slots, run it and answer every part of it.

        Raises:
            LaneFault: after the batch's parts have been answered UNKNOWN.
        """
        started = time.monotonic_ns()
        kept: list[Part] = []
        for part in batch:
            if self._load(part, lane, len(kept)):
                kept.append(part)
        if not kept:
            return
        try:
            lane.submit(len(kept))
            lane.wait(self._timeout_s)
        except LaneFault:
            self.fail(kept)
            raise
        for slot, part in enumerate(kept):
            self._ledger.answer(part, self._judge(float(lane.scores[slot]), lane.heatmaps[slot]))
        self.scheduler.observe(len(kept), time.monotonic_ns() - started)
        self.counts["batches"] += 1
        self.counts["inspected"] += len(kept)

    def _load(self, part: Part, lane: Lane, slot: int) -> bool:
        """Decode a part into a slot; answer it UNKNOWN and say False where that cannot be done."""
        pixels = part.pixels
        if pixels is None:  # its deadline has just passed, and its record is already published
            return False
        try:
            into_slot(part.header, pixels, self._cameras[part.camera], lane.frames[slot])
        except (FrameError, cv2.error) as error:
            log.debug("undecodable", camera=part.camera, seq=part.seq, error=str(error))
            self._ledger.answer(part, UNKNOWN[Reason.UNDECODABLE])
            return False
        return True


class LaneWorker:
    """One lane and the thread that owns it."""

    def __init__(self, station: Station, number: int) -> None:
        self._station = station
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, name=f"lane-{number}", daemon=True)
        self.beat = time.monotonic_ns()
        self.healthy = False
        self.healthy_at = self.beat
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._pause = REBUILD_S[0]

    def wait_started(self) -> None:
        """Wait until the lane is made and validated; raise what prevented it."""
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            lane: Lane | None = self._station.make_lane()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for the start
            self._failure = error
            return
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
            return self._make_again()
        self.healthy, self.healthy_at = True, time.monotonic_ns()
        try:
            if self._step(lane):
                self._pause = REBUILD_S[0]
        except LaneFault as error:
            self.healthy = False
            self._station.counts["lane_faults"] += 1
            log.error("lane_fault", engine=self._station.bundle.label, error=str(error))
            lane.close()
            return None
        return lane

    def _step(self, lane: Lane) -> bool:
        """Take a batch and inspect it; say whether there was one."""
        batch, hopeless = self._station.scheduler.take(len(lane.frames), IDLE_S)
        self.beat = time.monotonic_ns()
        self._station.give_up(hopeless)
        if batch:
            try:
                self._station.inspect(lane, batch)
            except LaneFault:
                raise
            except Exception as error:
                # Not foreseen, so nothing is known of the lane either: it counts as faulted.
                log.exception("inspection_failed", engine=self._station.bundle.label)
                self._station.fail(batch)
                raise LaneFault(str(error)) from error
        return bool(batch)

    def _make_again(self) -> Lane | None:
        self.beat = time.monotonic_ns()
        try:
            return self._station.make_lane()
        except Exception as error:  # noqa: BLE001 - whatever it is, the lane stays out and is tried again
            log.error("lane_not_rebuilt", engine=self._station.bundle.label, error=str(error))
            return None
