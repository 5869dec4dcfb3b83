"""Lanes at work on the simulated driver: a failed call costs its own batch and no more, and leaves nothing behind."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from engines.build import BuildError, Target
from engines.lane import LaneFault
from engines.tensorrt_lane import TensorRtEngine, TensorRtLane
from pipeline.config import Camera, Limits
from pipeline.ledger import CameraBook, Ledger
from pipeline.parts import Part, Reason
from pipeline.station import Station
from pipeline.wire import Header
from tests.sim import trt
from tests.sim.driver import ECC_UNCORRECTABLE, OUT_OF_MEMORY, Stage
from tests.sim.isolation import isolated, missing, run_apart
from tests.support.books import Recorder
from tests.support.engine import SIDE, make_store
from tests.support.line import until

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

MAX_BATCH = 4
TIMEOUT_S = 0.3


class Bench:
    """A station with two real lanes on the simulated driver, without sockets and Redis."""

    def __init__(self, folder: Path) -> None:
        self.library = trt.install()
        self.sim = self.library.sim
        self.sim.configure(guard=True, jitter_us=200)
        self.ledger, self.sent = Ledger(Recorder()), 0
        self.attempts = 0
        self.ledger.register(CameraBook("cam1", deadline_ns=10**11, max_gap=0, first_seq=0))
        target = Target("tensorrt", lanes=2, max_batch=MAX_BATCH, cache=str(folder / "cache"))
        self.station = Station(
            make_store(folder).resolve("bright"), target, Limits(), {"cam1": Camera()}, self.ledger, timeout_s=TIMEOUT_S
        )

    @property
    def faults(self) -> int:
        """How many times a lane has failed."""
        return self.station.counts["lane_faults"]

    def count_attempts(self, patch: pytest.MonkeyPatch) -> None:
        """Count in ``attempts`` how often a lane is made, or would have been."""
        make = TensorRtEngine.make_lane

        def make_lane(engine: TensorRtEngine) -> TensorRtLane:
            self.attempts += 1
            return make(engine)

        patch.setattr(TensorRtEngine, "make_lane", make_lane)

    def inject(self, name: str, nth: int = 1) -> None:
        """Let a call of the driver fail, or one of TensorRT be refused."""
        if not name.startswith("cu"):
            self.library.refusals[name] += 1
        elif name == "cuMemAlloc":  # pycuda tries it once more
            self.sim.fail(name, nth=nth, code=OUT_OF_MEMORY, times=2)
        else:
            self.sim.fail(name, nth=nth, code=ECC_UNCORRECTABLE)

    def send(self) -> Part:
        """Admit and queue a bright part."""
        part = self.ledger.admit("cam1", Header(seq=self.sent, session=1, w=SIDE, h=SIDE))
        assert part is not None
        part.pixels = np.full((SIDE, SIDE), 180, np.uint8).tobytes()
        self.sent += 1
        assert self.station.scheduler.put(part) == []
        return part

    def judge(self, count: int) -> list[Reason]:
        """Send parts one after another, and return what was said of each."""
        return [self.answer(self.send()) for _ in range(count)]

    @staticmethod
    def answer(part: Part) -> Reason:
        """Wait for a part's finding."""
        until(lambda: part.finding is not None)
        assert part.finding is not None
        return part.finding.reason

    def judge_until_fault(self) -> list[Reason]:
        """Send parts until one is lost; return what was said of all."""
        said: list[Reason] = []
        until(lambda: said.extend(self.judge(1)) or Reason.ENGINE_FAULT in said)
        return said

    def recover(self) -> None:
        """Wait for both lanes, and see that the line goes on."""
        until(lambda: self.station.healthy_lanes() == 2)
        self.see_work()

    def see_work(self) -> None:
        """See that parts are judged."""
        assert set(self.judge(6)) == {Reason.ABOVE_THRESHOLD}


@contextmanager
def benched(folder: Path, **left: int) -> Iterator[Bench]:
    """A station at work; at the end it is stopped, no wait was missing, and no more is on the device than ``left``."""
    bench = Bench(folder)
    bench.station.start()
    try:
        bench.see_work()
        yield bench
    finally:
        bench.sim.release()
        bench.station.stop()
    counts = bench.sim.counts()
    assert (counts.alive(), counts.faults()) == (left, {}), bench.sim.reports()
    assert bench.ledger.open == 0


BATCH_CALLS = ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuEventRecord", "cuEventQuery")
"""Every call of the driver that a batch makes; the launch is TensorRT's."""
STAGES: tuple[Stage, ...] = ("run:htod", "run:launch", "run:dtoh", "run:record")
BATCH_REFUSALS = ("set_input_shape", "execute_async_v3")
MAKING_CALLS = ("cuCtxPushCurrent", "cuStreamCreate", "cuEventCreate", "cuMemHostAlloc", "cuMemAlloc")
"""Every call that a lane makes when it is made, before it makes those of a batch at the parity gate."""
MAKING_REFUSALS = ("create_execution_context", "set_optimization_profile_async", "set_tensor_address", "infer_shapes")
CLOSING_CALLS = {
    "cuMemFree": "device",
    "cuMemFreeHost": "pinned",
    "cuStreamDestroy": "streams",
    "cuEventDestroy": "events",
    "cuStreamSynchronize": "",
}
"""Every call of a lane that is closed besides cuCtxPopCurrent, and what stays behind if it fails."""


def start_and_stop(folder: Path) -> None:
    """Judge some parts, stop, and say how many contexts there are then."""
    bench = Bench(folder)
    bench.station.start()
    bench.see_work()
    during = bench.sim.counts().contexts
    bench.station.stop()
    (folder / "contexts").write_text(f"{during} {bench.sim.counts().contexts}")


def work_with_a_stuck_context(folder: Path) -> None:
    """Lose a lane whose context cannot be popped, go on, then stop."""
    bench = Bench(folder)
    bench.station.start()
    bench.inject("set_input_shape")
    bench.inject("cuCtxPopCurrent")
    bench.judge_until_fault()
    bench.recover()
    (folder / "worked on").touch()
    bench.station.stop()
    time.sleep(10)  # the thread that was joined may not quite have ended yet


class TestFaults:
    """A failure costs its own batch; the lane is made again, the other works on, and nothing is left behind."""

    @isolated
    def test_these_are_all_the_calls(self, tmp_path: Path) -> None:
        """The calls that the tests below let fail are those that lanes make, and no others."""
        with benched(tmp_path) as bench:
            bench.sim.reset()
            bench.judge(20)
            assert _driver_calls(bench) == set(BATCH_CALLS)
            bench.inject("execute_async_v3")
            bench.judge_until_fault()
            bench.recover()
            assert _driver_calls(bench) == {*BATCH_CALLS, *MAKING_CALLS, *CLOSING_CALLS, "cuCtxPopCurrent"}

    @isolated
    def test_a_batch_fails(self, tmp_path: Path) -> None:
        """Whichever call of a batch fails, its part alone is UNKNOWN, and both lanes work again soon."""
        with benched(tmp_path) as bench:
            trouble = [*((name, 1) for name in (*BATCH_CALLS, *BATCH_REFUSALS)), ("cuMemcpyDtoHAsync", 2)]
            for turn, (name, nth) in enumerate(trouble, 1):
                bench.inject(name, nth)
                said = bench.judge_until_fault()
                assert said.count(Reason.ENGINE_FAULT) == 1, name
                bench.see_work()  # on the other lane
                bench.recover()
                assert bench.faults == turn

    @isolated
    def test_a_lane_cannot_be_made_again(self, tmp_path: Path) -> None:
        """Whatever fails while a lost lane is made again, the other works on and the next attempt succeeds."""
        with benched(tmp_path) as bench, pytest.MonkeyPatch.context() as patch:
            bench.count_attempts(patch)
            for turn, name in enumerate((*MAKING_CALLS, *MAKING_REFUSALS), 1):
                bench.inject("execute_async_v3")
                bench.inject(name)
                bench.judge_until_fault()
                bench.see_work()
                bench.recover()
                assert (bench.attempts, bench.faults) == (2 * turn, turn), name

    @isolated
    def test_the_new_lane_fails_at_the_gate(self, tmp_path: Path) -> None:
        """A lane made again that fails in its first batches is not put to work, but made once more."""
        with benched(tmp_path) as bench, pytest.MonkeyPatch.context() as patch:
            bench.count_attempts(patch)
            for turn, name in enumerate(BATCH_CALLS, 1):
                bench.inject("execute_async_v3")
                bench.inject(name, 2 if name == "cuMemcpyHtoDAsync" else 1)  # the batch that is refused uploads first
                assert bench.judge(1) == [Reason.ENGINE_FAULT]
                bench.recover()
                assert (bench.attempts, bench.faults) == (2 * turn, turn), name

    @pytest.mark.parametrize("name", CLOSING_CALLS)
    @isolated
    def test_a_lane_cannot_be_closed(self, tmp_path: Path, name: str) -> None:
        """What the driver refuses to free stays, and no more than that; the lane is made again all the same."""
        kind = CLOSING_CALLS[name]
        with benched(tmp_path, **({kind: 1} if kind else {})) as bench:
            bench.inject("set_input_shape")
            bench.inject(name)
            bench.judge_until_fault()
            bench.recover()
            assert bench.faults == 1

    def test_a_context_cannot_be_popped(self, tmp_path: Path) -> None:
        """The line works on, until the lane's thread ends: pycuda then aborts the process, and nothing hangs."""
        code, text = run_apart(__name__, "work_with_a_stuck_context", (tmp_path,))
        assert (code, text) == (-signal.SIGABRT, "")
        assert (tmp_path / "worked on").exists()

    @isolated
    def test_a_start_fails(self, tmp_path: Path) -> None:
        """A station whose lanes cannot be made says so at its start, leaves nothing behind and can be started later."""
        bench = Bench(tmp_path)
        for name in (*MAKING_CALLS, *MAKING_REFUSALS, *BATCH_CALLS, *BATCH_REFUSALS):
            bench.inject(name)
            with pytest.raises((LaneFault, BuildError)):
                bench.station.start()
            assert bench.sim.counts().alive() == {}, name
            bench.sim.reset()
        bench.station.start()
        bench.recover()
        bench.station.stop()
        assert (bench.sim.counts().alive(), bench.sim.counts().faults()) == ({}, {})
        assert bench.sim.counts().contexts == 0


class TestEnd:
    """The process's end, in a process that comes to it: pycuda's own clean-up runs, and would complain."""

    @staticmethod
    def end_of(folder: Path, before: str = "pass") -> str:
        """Run a station to the end of its process; return what was written to standard error."""
        code = f"import sys, pathlib, {__name__} as tests; {before}; tests.start_and_stop(pathlib.Path(sys.argv[1]))"
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        return done.stderr

    def test_the_context_is_given_back(self, tmp_path: Path) -> None:
        """After the stop there is no context, and the process ends without a word."""
        assert self.end_of(tmp_path) == ""
        assert (tmp_path / "contexts").read_text() == "1 0"

    def test_else_pycuda_complains(self, tmp_path: Path) -> None:
        """Without that the context stays, and pycuda warns at the end: what the test above would see."""
        keep = "from engines import cuda; kept = []; cuda._detach = kept.append"
        assert "PyCUDA WARNING: a clean-up operation failed" in self.end_of(tmp_path, keep)
        assert (tmp_path / "contexts").read_text() == "1 1"


class TestHangs:
    """A device that does not answer costs its own batch, within the time allowed, and its lane until it answers."""

    @isolated
    def test_a_batch_hangs(self, tmp_path: Path) -> None:
        """Wherever a batch hangs, its part is UNKNOWN in time, the other lane works on, and this one comes back."""
        with benched(tmp_path) as bench:
            for turn, stage in enumerate(STAGES, 1):
                bench.sim.hang(stage)
                begin = time.monotonic()
                bench.judge_until_fault()
                assert TIMEOUT_S <= time.monotonic() - begin < TIMEOUT_S + 2
                bench.see_work()
                assert (bench.sim.hanging(), bench.station.healthy_lanes()) == (1, 1)
                bench.sim.release()
                bench.recover()
                assert bench.faults == turn

    @isolated
    def test_a_lane_hangs_at_the_gate(self, tmp_path: Path) -> None:
        """While a new lane hangs in its first batch the other works on; when it answers, both do."""
        with benched(tmp_path) as bench:
            for stage in STAGES:
                bench.sim.hang(stage, nth=2 if stage == "run:htod" else 1)
                bench.inject("execute_async_v3")
                assert bench.judge(1) == [Reason.ENGINE_FAULT]
                bench.sim.wait_hanging()
                bench.see_work()
                bench.sim.release()
                bench.recover()

    @isolated
    def test_a_stop_while_a_lane_hangs(self, tmp_path: Path) -> None:
        """The stop comes back although the lane does not; what it holds is freed as soon as the device answers."""
        bench = Bench(tmp_path)
        bench.station.start()
        bench.see_work()
        idle = threading.active_count()
        bench.sim.hang("run:launch")
        bench.judge_until_fault()
        begin = time.monotonic()
        bench.station.stop()
        assert time.monotonic() - begin < TIMEOUT_S + 6
        assert bench.sim.counts().contexts == 1, "the context is not taken from under a lane"
        bench.sim.release()
        until(lambda: threading.active_count() <= idle - 2)
        gc.collect()
        assert (bench.sim.counts().pushed, bench.sim.counts().faults()) == (0, {})
        assert bench.sim.counts().streams == 0

    @isolated
    def test_a_kernel_fails(self, tmp_path: Path) -> None:
        """A failed kernel breaks the device for both lanes until the process ends: UNKNOWN, and no lane is fit."""
        bench = Bench(tmp_path)
        bench.station.start()
        bench.see_work()
        bench.sim.fail("run:launch")
        assert bench.judge(2) == [Reason.ENGINE_FAULT] * 2
        until(lambda: bench.station.healthy_lanes() == 0)
        held = bench.station.last_healthy()
        time.sleep(0.5)
        assert bench.station.last_healthy() == held  # by which the watchdog knows that the process has to go
        bench.station.stop()
        assert bench.sim.counts().alive() == {}


def _driver_calls(bench: Bench) -> set[str]:
    return {name for name in bench.sim.calls() if name.startswith("cu")}
