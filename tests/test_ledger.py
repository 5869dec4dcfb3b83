"""The ledger: each part has exactly one first verdict, in time, whatever comes when."""

from __future__ import annotations

import pytest

from pipeline.ledger import MAX_UNKNOWN_CAMERAS
from pipeline.parts import UNKNOWN, Reason
from tests.support.books import DEADLINE, MS, NG, OK, Desk


@pytest.fixture
def desk() -> Desk:
    """A ledger of this test's own."""
    return Desk()


def test_an_answered_part_is_recorded_with_its_verdict_and_times(desk: Desk) -> None:
    """The finding, the latency and both clocks of a verdict are those of the moment of the answer."""
    part = desk.open(0)
    desk.clock.advance(7)
    assert desk.ledger.answer(part, OK)
    assert desk.out.records == [part]
    assert (part.finding, part.latency_us) == (OK, 7000)
    assert part.verdict_ns - part.arrival_ns == 7 * MS
    assert part.deadline - part.arrival == DEADLINE * MS
    assert (desk.ledger.open, desk.ledger.counts["parts"], desk.ledger.counts["OK"]) == (0, 1, 1)


def test_every_verdict_but_ok_is_reported_as_a_reject_at_once(desk: Desk) -> None:
    """NG and UNKNOWN go out before the records of the parts ahead of them; OK is no reject."""
    parts = [desk.open(seq) for seq in range(3)]
    desk.ledger.answer(parts[2], UNKNOWN[Reason.OVERLOAD])
    desk.ledger.answer(parts[1], NG)
    assert desk.out.rejects == [parts[2], parts[1]]
    assert desk.out.records == []
    desk.ledger.answer(parts[0], OK)
    assert desk.out.records == parts
    assert desk.out.rejects == [parts[2], parts[1]]


def test_a_late_result_changes_nothing(desk: Desk) -> None:
    """Whatever comes after the first verdict is told as late, and is neither a record nor a reject."""
    part = desk.open(0)
    assert desk.ledger.answer(part, NG)
    desk.clock.advance(5)
    before = part.finding, part.latency_us, part.verdict_ns
    assert not desk.ledger.answer(part, OK)
    assert (part.finding, part.latency_us, part.verdict_ns) == before
    assert desk.out.lates == [(part, OK)]
    assert (desk.out.records, desk.out.rejects) == ([part], [part])
    assert desk.ledger.counts["late_results"] == 1


def test_a_part_is_unknown_from_its_deadline_on(desk: Desk) -> None:
    """The deadline itself is too late; a nanosecond before it is not. expire() names the next deadline."""
    part = desk.open(0)
    desk.clock.now = part.deadline - 1
    assert desk.ledger.expire() == part.deadline
    assert part.finding is None
    desk.clock.now = part.deadline
    assert desk.ledger.expire() is None
    assert part.finding is UNKNOWN[Reason.DEADLINE]
    assert desk.out.rejects == [part]
    assert not desk.ledger.answer(part, OK)


def test_an_ok_after_the_deadline_is_late_even_where_the_timer_has_not_run(desk: Desk) -> None:
    """No OK is ever given at or after the deadline, however long the timer's thread was kept waiting."""
    part = desk.open(0)
    desk.clock.now = part.deadline
    assert not desk.ledger.answer(part, OK)
    assert part.finding is UNKNOWN[Reason.DEADLINE]
    assert (desk.out.rejects, desk.out.lates) == ([part], [(part, OK)])


def test_a_reject_after_the_deadline_keeps_its_evidence(desk: Desk) -> None:
    """An NG that comes before the timer has noticed the deadline is as safe as UNKNOWN and says more."""
    part = desk.open(0)
    desk.clock.now = part.deadline
    assert desk.ledger.answer(part, NG)
    assert part.finding is NG


def test_a_camera_may_wish_for_an_earlier_deadline_only(desk: Desk) -> None:
    """deadline_ms of the header counts where it is earlier than the configured one."""
    early = desk.open(0, deadline_ms=20)
    late = desk.open(1, deadline_ms=5000)
    assert early.deadline - early.arrival == 20 * MS
    assert late.deadline - late.arrival == DEADLINE * MS


@pytest.mark.parametrize("wish", [float("inf"), 1e308, 1e-300])
def test_no_wish_for_a_deadline_stops_the_line(desk: Desk, wish: float) -> None:
    """A deadline_ms beyond all measure is a number like any other: the part is admitted and due in time."""
    part = desk.open(0, deadline_ms=wish)
    assert part.arrival <= part.deadline <= part.arrival + DEADLINE * MS


def test_a_camera_that_is_not_configured_is_answered_at_once(desk: Desk) -> None:
    """Its part is UNKNOWN with its reason; no gap is guessed at, and a repeated number is not answered twice."""
    for seq in (5, 9, 9, 3):
        assert desk.admit(seq, camera="stranger") is None
    desk.end(20, camera="stranger")
    assert desk.out.said() == [(5, "unknown_camera"), (9, "unknown_camera")]
    assert desk.ledger.open == 0


def test_cameras_that_are_not_configured_are_bounded(desk: Desk) -> None:
    """After so many made-up names the next ones are refused and counted; configured cameras are not concerned."""
    for number in range(MAX_UNKNOWN_CAMERAS + 5):
        desk.admit(0, camera=f"x{number}")
    assert len(desk.out.records) == MAX_UNKNOWN_CAMERAS
    assert desk.ledger.counts["refused_unknown_camera"] == 5
    desk.admit(1, camera="x0")
    assert len(desk.out.records) == MAX_UNKNOWN_CAMERAS + 1
    desk.open(0)


def test_close_answers_every_open_part(desk: Desk) -> None:
    """Whatever is open at the end is UNKNOWN because of the shutdown, in order of deadlines, records in sequence."""
    parts = [desk.open(seq) for seq in range(3)]
    desk.ledger.answer(parts[1], OK)
    desk.ledger.close()
    assert desk.out.said() == [(0, "shutdown"), (1, "below_threshold"), (2, "shutdown")]
    assert desk.out.rejects == [parts[0], parts[2]]
    assert desk.ledger.open == 0
    assert not desk.ledger.answer(parts[2], OK)


def test_a_frame_that_comes_after_close_is_answered_too(desk: Desk) -> None:
    """A frame that was still on its way in when the ledger closed is no part without a verdict."""
    desk.ledger.close()
    assert desk.admit(1) is None
    assert desk.out.said() == [(0, "missing_frame"), (1, "shutdown")]
    assert desk.ledger.open == 0


def test_answered_parts_keep_no_pixels_they_do_not_need(desk: Desk) -> None:
    """The frame of a good part is let go at once; that of a reject is kept for its record."""
    good, bad = desk.open(0), desk.open(1)
    good.pixels = bad.pixels = b"frame"
    desk.ledger.answer(good, OK)
    desk.ledger.answer(bad, NG)
    assert (good.pixels, bad.pixels) == (None, b"frame")


def test_an_ok_is_dated_by_the_clock_that_judged_it_in_time(desk: Desk) -> None:
    """No record of an OK says that it came after its deadline: time that passes while it is given does not show."""
    part = desk.open(0)
    desk.clock.now = part.deadline - 1
    read = iter([part.deadline - 1, part.deadline])
    desk.ledger._clock = lambda: next(read)
    assert desk.ledger.answer(part, OK)
    assert part.verdict_ns - part.arrival_ns == DEADLINE * MS - 1
