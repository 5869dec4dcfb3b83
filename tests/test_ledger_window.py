"""The reordering window: a number that is missing may still come, until it is due or too many have passed it."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.parts import UNKNOWN, Reason
from tests.support.books import DEADLINE, MAX_GAP, MS, OK, SESSION, Desk

WINDOW = 3


@pytest.fixture
def desk() -> Desk:
    """A ledger whose camera may be overtaken by three frames."""
    return Desk(window=WINDOW)


def lost(desk: Desk) -> list[int]:
    """Numbers that were answered as missing, in the order of their rejects."""
    return [part.seq for part in desk.out.rejects if part.finding is UNKNOWN[Reason.MISSING_FRAME]]


def test_a_missing_number_is_open_and_not_yet_answered(desk: Desk) -> None:
    """The gap opens its parts: they count as open, and hold back the records behind them."""
    desk.ledger.answer(desk.open(2), OK)
    assert desk.ledger.open == 2
    assert (desk.out.rejects, desk.out.records) == ([], [])


def test_a_late_frame_is_inspected_like_any_other(desk: Desk) -> None:
    """It is the part that the gap opened, with the frame's own header; records come in order."""
    desk.ledger.answer(desk.open(1, part="second"), OK)
    late = desk.open(0, part="first", recipe="m8", w=9)
    assert (late.header.part, late.header.recipe, late.header.w, late.seq) == ("first", "m8", 9, 0)
    desk.ledger.answer(late, OK)
    assert desk.out.said() == [(0, "below_threshold"), (1, "below_threshold")]
    assert [part.header.part for part in desk.out.records] == ["first", "second"]
    assert desk.ledger.counts["parts"] == 2
    assert desk.out.rejects == []


def test_a_late_frame_is_due_when_the_gap_made_it_due(desk: Desk) -> None:
    """Coming late gives a part no more time: it passed the camera before those that overtook it."""
    desk.open(1)
    desk.clock.advance(60)
    late = desk.open(0)
    assert late.deadline - desk.clock() == (DEADLINE - 60) * MS
    desk.clock.now = late.deadline
    assert not desk.ledger.answer(late, OK)
    assert late.finding is UNKNOWN[Reason.DEADLINE]


@pytest.mark.parametrize(("wish", "left"), [(10, 10), (90, 40), (1e9, 40)])
def test_a_late_frame_may_wish_for_an_earlier_deadline_only(desk: Desk, wish: float, left: int) -> None:
    """Its deadline_ms counts from when it came, and the timer knows of it."""
    desk.open(1)
    desk.clock.advance(DEADLINE - 40)
    late = desk.open(0, deadline_ms=wish)
    assert late.deadline - desk.clock() == left * MS
    desk.clock.now = late.deadline
    desk.ledger.expire()
    assert late.finding is UNKNOWN[Reason.DEADLINE]


def test_a_number_that_never_comes_is_answered_by_its_deadline(desk: Desk) -> None:
    """With nothing behind it, it waits for its deadline: the one of the moment when the gap named it."""
    part = desk.open(1)
    assert desk.ledger.expire() == part.arrival + DEADLINE * MS
    desk.clock.advance(DEADLINE)
    desk.ledger.expire()
    assert lost(desk) == [0]
    assert desk.admit(0) is None
    assert desk.ledger.counts["refused_repeated"] == 1


def test_a_late_frame_at_its_deadline_is_too_late_even_where_the_timer_has_not_run(desk: Desk) -> None:
    """Nothing is admitted that could not be answered in time."""
    desk.open(1)
    desk.clock.advance(DEADLINE)
    assert desk.admit(0) is None
    assert lost(desk) == [0]


def test_a_number_is_given_up_when_the_window_has_passed(desk: Desk) -> None:
    """So many later numbers may overtake it; the next one answers it."""
    for seq in range(1, 1 + WINDOW):
        desk.open(seq)
        assert lost(desk) == []
    desk.open(1 + WINDOW)
    assert lost(desk) == [0]
    assert desk.admit(0) is None


@pytest.mark.parametrize("order", [(1, 2, 3, 0), (3, 0, 2, 1), (3, 2, 1, 0)])
def test_every_order_within_the_window_is_taken(desk: Desk, order: tuple[int, ...]) -> None:
    """No frame is refused that is overtaken by at most so many numbers."""
    for seq in order:
        desk.ledger.answer(desk.open(seq), OK)
    assert desk.out.said() == [(seq, "below_threshold") for seq in range(4)]


def test_of_a_gap_wider_than_the_window_only_its_end_may_come(desk: Desk) -> None:
    """Numbers that are too far behind are answered at once, the others wait."""
    desk.open(MAX_GAP)
    assert lost(desk) == list(range(MAX_GAP - WINDOW))
    assert desk.open(MAX_GAP - WINDOW).seq == MAX_GAP - WINDOW


def test_a_gap_beyond_belief_leaves_nothing_waiting(desk: Desk) -> None:
    """Its one record says that the numbers before it will not be taken any more."""
    desk.open(1)
    desk.open(MAX_GAP + 3)
    assert [(part.seq, part.finding.reason) for part in desk.out.rejects if part.finding] == [
        (MAX_GAP + 2, "sequence_jump"),
        (0, "missing_frame"),
    ]


def test_a_frame_that_comes_twice_is_taken_once(desk: Desk) -> None:
    """Neither a late frame nor one that was never missing opens a second part."""
    for seq in (1, 0):
        desk.open(seq)
    assert [desk.admit(seq) for seq in (0, 1)] == [None, None]
    assert desk.ledger.counts["refused_repeated"] == 2
    assert desk.ledger.open == 2


def test_a_new_session_gives_up_what_waits_of_the_old_one(desk: Desk) -> None:
    """Frames of an old session are refused, so nothing can come any more."""
    desk.ledger.answer(desk.open(1), OK)
    desk.open(0, SESSION + MS)
    assert lost(desk) == [0]
    assert [part.seq for part in desk.out.records] == [0, 1]


def test_frames_may_come_behind_the_end_of_their_stream(desk: Desk) -> None:
    """The end overtakes no frame of the window; it is confirmed when all parts before it are answered."""
    desk.ledger.answer(desk.open(0), OK)
    desk.end(3)
    late = desk.open(1)
    desk.ledger.answer(late, OK)
    assert desk.out.said() == [(0, "below_threshold"), (1, "below_threshold")]
    desk.clock.advance(DEADLINE)
    desk.ledger.expire()
    assert desk.out.said()[2:] == [(2, "missing_frame"), (3, "eos")]


def test_the_window_works_across_a_wrap() -> None:
    """A frame that a wrapped number has overtaken is still known as the one that is missing."""
    desk = Desk(window=WINDOW, first_seq=-1, seq_bits=16)
    for seq in (65534, 0, 65535):
        desk.ledger.answer(desk.open(seq), OK)
    assert [part.seq for part in desk.out.records] == [65534, 65535, 65536]
    assert desk.out.rejects == []


@pytest.mark.parametrize("late", [False, True], ids=["gap", "frame"])
def test_nothing_waits_after_close(desk: Desk, late: bool) -> None:
    """What waits at the end, and what comes or is missed after it, is answered: no timer would do it later."""
    if late:
        desk.open(1)
    desk.ledger.close()
    assert desk.admit(0 if late else 2) is None
    assert desk.ledger.open == 0
    assert {part.finding for part in desk.out.rejects} == {UNKNOWN[Reason.SHUTDOWN]}


def test_a_part_that_waits_keeps_nothing_alive(desk: Desk) -> None:
    """What has been answered or taken is no longer kept in the list of those that wait."""
    book: Any = desk.ledger._books["cam1"]
    for seq in range(1, 400, 2):
        desk.ledger.answer(desk.open(seq), OK)
        desk.clock.advance(DEADLINE / 4)
        desk.ledger.expire()
        assert len(book.waiting) <= WINDOW
    desk.clock.advance(DEADLINE)
    desk.ledger.expire()
    assert not book.waiting
    assert not book.order
    assert not desk.ledger._due
