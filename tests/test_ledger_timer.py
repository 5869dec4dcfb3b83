"""The ledger's timer and its threads, on the real clock."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from pipeline.ledger import CameraBook, Ledger
from pipeline.parts import UNKNOWN, Part, Reason
from pipeline.wire import Header
from tests.support.books import MS, NG, OK, SESSION, Recorder


class Patient(threading.Condition):
    """Makes the timer's longest wait so long that only a notification ends it while the test looks."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(60 if timeout is None or timeout > 0.5 else timeout)


def patient_ledger(out: Recorder) -> Ledger:
    """A ledger on the real clock whose timer does not wake of itself without a deadline."""
    ledger = Ledger(out)
    ledger._wake = Patient(ledger._lock)
    return ledger


@pytest.fixture
def live() -> Any:
    """A ledger on the real clock with its timer thread, which has ended when the test is over."""
    out = Recorder()
    ledger = patient_ledger(out)
    thread = threading.Thread(target=ledger.run_timer)
    thread.start()
    yield ledger, out
    ledger.close()
    thread.join(10)
    assert not thread.is_alive()


def test_the_timer_answers_on_the_real_clock(live: tuple[Ledger, Recorder]) -> None:
    """Nobody answers a part: the timer's thread does, when it is due and not before."""
    ledger, out = live
    ledger.register(CameraBook("cam1", deadline_ns=30 * MS, max_gap=0, first_seq=0))
    part = ledger.admit("cam1", Header(seq=0, session=SESSION))
    assert out.rejected.acquire(timeout=20)
    assert out.rejects == [part]
    assert part is not None
    assert part.finding is UNKNOWN[Reason.DEADLINE]
    assert part.latency_us >= 30_000
    assert ledger.beat > 0


def test_the_timer_wakes_for_an_earlier_deadline(live: tuple[Ledger, Recorder]) -> None:
    """A part that is due before the one that the timer waits for is answered first."""
    ledger, out = live
    ledger.register(CameraBook("slow", deadline_ns=3_600_000 * MS, max_gap=0, first_seq=0))
    ledger.register(CameraBook("fast", deadline_ns=20 * MS, max_gap=0, first_seq=0))
    slow = ledger.admit("slow", Header(seq=0, session=SESSION))
    fast = ledger.admit("fast", Header(seq=0, session=SESSION))
    assert out.rejected.acquire(timeout=20)
    assert out.rejects == [fast]
    ledger.close()
    assert out.rejects == [fast, slow]


def test_the_timer_ends_when_the_ledger_is_closed() -> None:
    """A timer that waits for a far deadline does not keep the line from stopping."""
    ledger = patient_ledger(Recorder())
    ledger.register(CameraBook("cam1", deadline_ns=3_600_000 * MS, max_gap=0, first_seq=0))
    thread = threading.Thread(target=ledger.run_timer)
    thread.start()
    ledger.admit("cam1", Header(seq=0, session=SESSION))
    ledger.close()
    thread.join(20)
    assert not thread.is_alive()


def test_many_threads_give_each_part_one_verdict() -> None:
    """Lanes that answer the same parts at the same time, with the timer between them, get one record a part."""
    out = Recorder()
    ledger = Ledger(out)
    ledger.register(CameraBook("cam1", deadline_ns=2 * MS, max_gap=0, first_seq=0))
    timer = threading.Thread(target=ledger.run_timer)
    timer.start()
    parts: list[Part] = []
    done = threading.Event()
    firsts = [0, 0, 0]

    def lane(number: int) -> None:
        at = 0
        while not done.is_set() or at < len(parts):
            if at < len(parts):
                firsts[number] += ledger.answer(parts[at], OK if number else NG)
                at += 1

    lanes = [threading.Thread(target=lane, args=(number,)) for number in range(3)]
    for thread in lanes:
        thread.start()
    for seq in range(300):
        part = ledger.admit("cam1", Header(seq=seq, session=SESSION))
        assert part is not None
        parts.append(part)
    done.set()
    for thread in lanes:
        thread.join(20)
    ledger.close()
    timer.join(20)
    assert [part.seq for part in out.records] == list(range(300))
    assert len(out.rejects) == ledger.counts["NG"] + ledger.counts["UNKNOWN"]
    assert sum(firsts) + ledger.counts["deadline"] == 300
    assert len(out.lates) == 3 * 300 - sum(firsts)
