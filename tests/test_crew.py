"""A crew that is told to stand by lets go of the work at once; its successor gets all of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import crew
from pipeline.config import Swap
from tests.support.line import until
from tests.support.swap import Bench, Orders


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench whose station runs version 1; at the end everything has to be released."""
    orders = Orders()
    monkeypatch.setattr(crew, "compile_engine", orders.compile)
    made = Bench(tmp_path, orders)
    made.station.start()
    yield made
    made.station.stop()
    assert orders.all_released()


def test_lanes_that_wait_for_parts_do_not_get_them_after_a_switch(bench: Bench) -> None:
    """The first part after a switch is the successor's, though the predecessor's lanes were waiting for it."""
    for _ in range(5):
        bench.judged(bench.send())
        time.sleep(0.02)  # now the lanes of the engine that works wait for parts
        before = bench.station.bundle.version
        after = {"1": "2", "2": "1"}[before]
        bench.station.switch(bench.station.prepare(bench.store.get("bright", after)))
        started = time.monotonic()
        assert bench.judged(bench.send()).engine == f"bright@{after}"
        assert time.monotonic() - started < crew.IDLE_S, "a hand-over wakes the successor"
        bench.station.settle()


def test_after_a_roll_back_the_faulty_engine_gets_no_part(bench: Bench) -> None:
    """Its other lane, which waited for parts, leaves the next one to the old engine."""
    bench.station.switch(bench.station.prepare(bench.store.get("bright", "2")))
    assert bench.judged(bench.send()).engine == "bright@2"
    bench.orders.faulty.add("bright@2")
    time.sleep(0.02)
    assert bench.judged(bench.send()).reason == "engine_fault"
    until(lambda: bench.station.bundle.version == "1")
    assert [bench.judged(bench.send()).engine for _ in range(10)] == ["bright@1"] * 10
    assert [undone.failed.label for undone in bench.station.reverted] == ["bright@2"]


def test_a_successor_begins_with_measured_times(bench: Bench) -> None:
    """Every batch size has an estimate before the first part, and the old engine's is kept for a roll back."""
    bench.judged(bench.send())
    old = bench.station.scheduler.times
    bench.station.switch(bench.station.prepare(bench.store.get("bright", "2")))
    new = bench.station.scheduler.times
    assert new is not old
    assert all(new.estimate(count) > 0 for count in range(1, 5))
    known = new.estimate(1)
    assert bench.station._standby is not None
    bench.station._standby.learn(1, 10**12)  # a batch that the old engine has just finished
    assert new.estimate(1) == known
    assert bench.station.revert_to("1", "a test")
    assert bench.station.scheduler.times is old


def test_a_newcomer_that_fails_its_gate_is_released(bench: Bench) -> None:
    """Its lanes are closed by their threads, its engine after them, and the station goes on."""
    bench.orders.faulty.add("bright@2")
    with pytest.raises(crew.LaneFault):
        bench.station.prepare(bench.store.get("bright", "2"))
    assert bench.orders.open_engines() == ["bright@1"]
    assert bench.judged(bench.send()).engine == "bright@1"
    assert bench.station.counts["lane_faults"] == 0


def test_a_start_tells_how_far_it_is(bench: Bench) -> None:
    """Before the build, in it, and before and after each lane: whoever waits for it hears of it."""
    told: list[tuple[str, int, int]] = []
    bench.orders.hold.add("bright@2")
    newcomer = bench.station._crew_of(bench.store.get("bright", "2"))

    def hear(phase: str, done: int, steps: int) -> None:
        told.append((phase, done, steps))
        if len(told) == 4:
            bench.orders.release.set()

    newcomer.start(progress=hear)
    newcomer.stop()
    assert told[:4] == [("compile", 0, 1), *(("Tactics", step, 3000) for step in range(3))]
    assert told[-3:] == [("lanes", 0, 2), ("lanes", 1, 2), ("lanes", 1, 1)]


@pytest.mark.parametrize("phase", ["compile", "Tactics", "lanes"])
def test_a_start_can_be_broken_off(bench: Bench, phase: str) -> None:
    """What the callback raises ends the start, and all that was made for it is released."""
    bench.orders.hold.add("bright@2")
    if phase == "lanes":
        bench.orders.release.set()

    def refuse(name: str, *_: int) -> None:
        if name == phase:
            raise InterruptedError(name)

    with pytest.raises(InterruptedError, match=phase):
        bench.station._crew_of(bench.store.get("bright", "2")).start(progress=refuse)
    assert bench.orders.open_engines() == ["bright@1"]
    assert all(lane.closed_by for engine in bench.orders.engines[1:] for lane in engine.lanes)


@pytest.mark.parametrize(("batches", "seconds"), [(2, 1e9), (1000, 0.01)])
def test_probation_ends_with_the_batch_not_with_the_next_look(bench: Bench, batches: int, seconds: float) -> None:
    """A fault after enough batches, or enough time, rolls nothing back, though the old engine still stands by."""
    bench.station._swap = Swap(probation_batches=batches, probation_s=min(seconds, 86400))
    bench.station.switch(bench.station.prepare(bench.store.get("bright", "2")))
    assert [bench.judged(bench.send()).engine for _ in range(2)] == ["bright@2"] * 2
    until(bench.station._is_proven)
    bench.orders.faulty.add("bright@2")
    assert bench.judged(bench.send()).reason == "engine_fault"
    until(lambda: bench.station.counts["lane_faults"] == 1)
    bench.orders.faulty.clear()
    assert bench.judged(bench.send()).engine == "bright@2"
    assert bench.station.reverted == []
