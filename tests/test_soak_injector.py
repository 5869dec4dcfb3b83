"""The injector: faults that are called up do happen, and nothing happens where none is."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.build import Target, compile_engine
from engines.lane import LaneFault
from pipeline.soak import engine
from pipeline.soak.injector import Control, FaultyLane, Injector
from tests.support.line import until


@pytest.fixture
def injector(tmp_path: Path) -> Injector:
    """An injector and its control file."""
    return Injector(tmp_path / "control.json")


@pytest.fixture
def lane(tmp_path: Path, injector: Injector) -> Iterator[FaultyLane]:
    """A lane of a real engine, wrapped, with two frames in it."""
    compiled = injector.wrap(compile_engine)(engine.write(tmp_path / "bundle"), Target(lanes=1, max_batch=2, threads=1))
    made = compiled.make_lane()
    made.frames[0], made.frames[1] = 51, 102
    yield made
    made.close()
    compiled.close()


def order(tmp_path: Path, injector: Injector, fault: str) -> None:
    """Call a fault up and wait until it is in force."""
    Control(fault).write(tmp_path / "control.json")
    until(lambda: injector.control.engine == fault)


def run(lane: FaultyLane, timeout: float = 10.0) -> list[float]:
    """Run the two frames."""
    lane.submit(2)
    lane.wait(timeout)
    return [round(float(score), 3) for score in lane.scores[:2]]


def test_without_a_fault_a_lane_is_itself(lane: FaultyLane) -> None:
    """Its results are the engine's."""
    assert run(lane) == [0.2, 0.4]
    assert lane.ready()


@pytest.mark.parametrize(("fault", "raised"), [("nan", LaneFault), ("hang", LaneFault), ("error", ValueError)])
def test_failures(tmp_path: Path, injector: Injector, lane: FaultyLane, fault: str, raised: type[Exception]) -> None:
    """A lane that fails says so as a real one does, and works again when the fault is over."""
    order(tmp_path, injector, fault)
    with pytest.raises(raised):
        run(lane, 0.1)
    order(tmp_path, injector, "")
    assert run(lane) == [0.2, 0.4]


def test_wrong_shape(tmp_path: Path, injector: Injector, lane: FaultyLane) -> None:
    """Fewer results than frames."""
    order(tmp_path, injector, "shape")
    assert run(lane) == []


def test_slow(tmp_path: Path, injector: Injector, lane: FaultyLane) -> None:
    """Right, but later."""
    order(tmp_path, injector, "slow")
    started = time.monotonic()
    assert run(lane) == [0.2, 0.4]
    assert time.monotonic() - started >= 0.2


def test_stale(tmp_path: Path, injector: Injector, lane: FaultyLane) -> None:
    """The results of the batch before, without a word."""
    run(lane)
    order(tmp_path, injector, "stale")
    lane.frames[0] = 204
    assert run(lane) == [0.2, 0.4]


def test_stuck(tmp_path: Path, injector: Injector, lane: FaultyLane) -> None:
    """A call that never comes back."""
    order(tmp_path, injector, "stuck")
    caller = threading.Thread(target=lane.submit, args=(1,), daemon=True)
    caller.start()
    caller.join(0.2)
    assert caller.is_alive()


def test_the_clock_is_turned_and_nothing_else(tmp_path: Path) -> None:
    """The wall clock is an hour ahead; the monotonic clock, by which everything is decided, is not."""
    Control(clock_s=3600.0).write(tmp_path / "control.json")
    program = (
        "import sys, time; from pathlib import Path; from pipeline.soak.injector import Injector\n"
        "Injector(Path(sys.argv[1])).turn_clock(); print(time.time(), time.time_ns(), time.monotonic())"
    )
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "control.json"], check=True, capture_output=True, timeout=60
    )
    seconds, nanoseconds, monotonic = (float(word) for word in done.stdout.split())
    assert seconds - time.time() == pytest.approx(3600, abs=60)
    assert nanoseconds / 1e9 - time.time() == pytest.approx(3600, abs=60)
    assert before < monotonic < time.monotonic()


def test_a_line_without_a_control_file_is_refused() -> None:
    """The injecting line is for soaks: without their environment it does not start."""
    done = subprocess.run([sys.executable, "-m", "pipeline.soak.line"], check=False, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"DMDD_SOAK_CONTROL" in done.stderr


def test_the_product_never_imports_it() -> None:
    """Loading all of the line loads nothing of the soak."""
    program = (
        "import sys, pipeline.service, pipeline.crew; print([m for m in sys.modules if m.startswith('pipeline.soak')])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)
    assert done.stdout.strip() == b"[]"
