"""Expected parts in the ledger: a trigger opens a part, its frame is matched with it, or it is answered as missing."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.books import MAX_WAITING
from pipeline.parts import UNKNOWN, Reason
from tests.support.books import DEADLINE, MAX_GAP, MS, OK, SESSION, Desk


def due(desk: Desk) -> None:
    """Let every deadline pass."""
    desk.clock.advance(DEADLINE)
    desk.ledger.expire()


class TestByNumber:
    """Triggers that carry the number of the frame."""

    @pytest.fixture
    def desk(self) -> Desk:
        """A ledger whose camera's parts are announced by number."""
        return Desk(expected="seq")

    def test_a_part_whose_frame_never_comes_is_answered_at_its_deadline(self, desk: Desk) -> None:
        """The deadline counts from the trigger; the record names the part that the PLC announced."""
        desk.expect(0, "P-1", SESSION)
        assert desk.ledger.open == 1
        desk.clock.advance(DEADLINE - 1)
        desk.ledger.expire()
        assert desk.out.rejects == []
        desk.clock.advance(1)
        desk.ledger.expire()
        (record,) = desk.out.records
        assert (record.finding, record.header.part, record.latency_us) == (
            UNKNOWN[Reason.MISSING_FRAME],
            "P-1",
            DEADLINE * 1000,
        )
        assert desk.admit(0) is None
        assert desk.ledger.counts["refused_repeated"] == 1

    def test_a_camera_that_is_dead_from_the_start_is_noticed(self, desk: Desk) -> None:
        """Triggers without a session, and no frame ever: every part is answered, in order, under growing ids."""
        for seq in range(3):
            desk.expect(seq)
        due(desk)
        assert desk.out.said() == [(seq, "missing_frame") for seq in range(3)]
        ids = [(part.stream_ms, part.seq) for part in desk.out.records]
        assert ids == sorted(set(ids))

    def test_a_frame_is_inspected_within_its_triggers_deadline(self, desk: Desk) -> None:
        """It is the part that the trigger opened; the part id may be left to either of the two."""
        desk.expect(0, "P-1", SESSION)
        desk.expect(1, "", SESSION)
        desk.clock.advance(60)
        parts = desk.open(0), desk.open(1, part="P-2")
        assert [part.deadline - desk.clock() for part in parts] == [(DEADLINE - 60) * MS] * 2
        assert [part.header.part for part in parts] == ["P-1", "P-2"]
        for part in parts:
            desk.ledger.answer(part, OK)
        assert desk.out.said() == [(0, "below_threshold"), (1, "below_threshold")]
        assert desk.ledger.counts["parts"] == 2

    def test_a_trigger_without_a_session_is_of_the_present_one(self, desk: Desk) -> None:
        """Also where it came before the first frame, which then goes on with its numbers under its own session."""
        desk.expect(0)
        desk.ledger.answer(desk.open(0), OK)
        desk.expect(1)
        desk.ledger.answer(desk.open(1), OK)
        assert desk.out.said() == [(0, "below_threshold"), (1, "below_threshold")]
        assert {part.header.session for part in desk.out.records} == {SESSION}
        assert len({part.stream_ms for part in desk.out.records}) == 1

    def test_what_waits_for_the_first_frame_takes_its_session(self, desk: Desk) -> None:
        """Once the camera has said its session, no further record has another: a restart goes on in the right one."""
        for seq in range(3):
            desk.expect(seq)
        desk.ledger.answer(desk.open(1), OK)
        due(desk)
        assert [part.header.session for part in desk.out.records] == [SESSION] * 3

    def test_a_session_may_begin_with_its_trigger(self, desk: Desk) -> None:
        """A trigger of a new session ends the old one, as its first frame would; an old one's is refused."""
        desk.open(0)
        desk.expect(1)
        desk.expect(0, session=SESSION + MS)
        assert [part.seq for part in desk.out.rejects] == [1]
        assert desk.open(0, SESSION + MS).stream_ms == SESSION // MS + 1
        desk.expect(2, session=SESSION)
        assert desk.ledger.counts["refused_old_session"] == 1

    def test_triggers_that_were_lost_are_noticed(self, desk: Desk) -> None:
        """A gap in the triggers opens the parts in it: their frames may come, or they are answered in time."""
        desk.expect(0, session=SESSION)
        desk.expect(3, session=SESSION)
        assert desk.ledger.open == 4
        assert desk.out.rejects == []
        desk.ledger.answer(desk.open(2), OK)
        due(desk)
        assert sorted(desk.out.said()) == [
            (0, "missing_frame"),
            (1, "missing_frame"),
            (2, "below_threshold"),
            (3, "missing_frame"),
        ]

    def test_a_later_frame_gives_up_the_parts_before_it(self, desk: Desk) -> None:
        """Frames ascend: what has been passed is answered at once, what is announced behind it is not."""
        for seq in range(4):
            desk.expect(seq, session=SESSION)
        desk.open(2)
        assert [part.seq for part in desk.out.rejects] == [0, 1]
        assert desk.ledger.open == 2

    def test_the_window_holds_for_announced_parts(self) -> None:
        """A frame that was overtaken by no more than the window is still matched with its trigger."""
        desk = Desk(expected="seq", window=1)
        for seq in range(3):
            desk.expect(seq, f"P-{seq}", SESSION)
        desk.open(1)
        assert desk.open(0).header.part == "P-0"
        assert desk.out.rejects == []

    def test_a_trigger_that_comes_after_its_frame_opens_nothing(self, desk: Desk) -> None:
        """The part is open or answered already: a trigger behind its frame, and one that comes twice, is counted."""
        part = desk.open(0)
        desk.expect(0)
        desk.ledger.answer(part, OK)
        desk.expect(0)
        assert desk.ledger.counts["triggers_behind"] == 2
        assert desk.ledger.counts["parts"] == 1

    def test_a_trigger_gives_its_part_id_to_a_part_that_a_gap_has_named(self) -> None:
        """The record of a missing part says which it was, whatever came first."""
        desk = Desk(expected="seq", window=5)
        desk.open(1)
        desk.expect(0, "P-0")
        due(desk)
        assert desk.out.records[0].header.part == "P-0"
        assert desk.ledger.counts["triggers_behind"] == 0

    def test_frames_without_a_trigger_are_accepted_by_default(self, desk: Desk) -> None:
        """Nobody announced them; they are inspected."""
        desk.ledger.answer(desk.open(0), OK)
        assert desk.out.said() == [(0, "below_threshold")]

    def test_frames_without_a_trigger_are_unknown_where_that_is_the_rule(self) -> None:
        """They are answered at once with a reason of their own; the announced ones are inspected."""
        desk = Desk(expected="seq", strict=True)
        desk.expect(0, session=SESSION)
        desk.ledger.answer(desk.open(0), OK)
        assert desk.admit(1) is None
        desk.expect(1)
        desk.expect(2)
        desk.ledger.answer(desk.open(2), OK)
        assert desk.out.said() == [(0, "below_threshold"), (1, "unexpected"), (2, "below_threshold")]

    def test_a_trigger_that_comes_twice_takes_back_no_later_one(self) -> None:
        """What was announced stays so, whatever the PLC repeats."""
        desk = Desk(expected="seq", strict=True)
        for seq in (0, 1, 0):
            desk.expect(seq, session=SESSION)
        for seq in (0, 1):
            desk.ledger.answer(desk.open(seq), OK)
        assert desk.out.rejects == []

    def test_a_late_frame_that_nobody_announced_is_unknown_too(self) -> None:
        """That a gap had named it is no announcement."""
        desk = Desk(expected="seq", strict=True, window=2)
        desk.expect(0, session=SESSION)
        for seq in (2, 1):
            assert desk.admit(seq) is None
        assert [(part.seq, part.finding) for part in desk.out.rejects] == [
            (2, UNKNOWN[Reason.UNEXPECTED]),
            (1, UNKNOWN[Reason.UNEXPECTED]),
        ]

    def test_a_frame_of_another_part_than_announced_is_unknown(self, desk: Desk) -> None:
        """Where trigger and frame name different parts, no verdict may stand for either."""
        desk.expect(0, "P-1", SESSION)
        assert desk.admit(0, part="P-2") is None
        assert desk.out.said() == [(0, "unexpected")]

    def test_triggers_wrap_with_the_camera(self) -> None:
        """A PLC that counts with the camera's bits announces the parts behind the wrap."""
        desk = Desk(expected="seq", first_seq=-1, seq_bits=16)
        for seq in (65535, 0):
            desk.expect(seq, session=SESSION)
        assert [desk.open(seq).seq for seq in (65535, 0)] == [65535, 65536]

    def test_the_end_of_a_stream_leaves_announced_parts_to_their_deadlines(self, desk: Desk) -> None:
        """The camera says that it is done, the PLC that there is one more: that one is answered, then the end."""
        for seq in range(3):
            desk.expect(seq, session=SESSION)
        desk.ledger.answer(desk.open(0), OK)
        desk.ledger.answer(desk.open(1), OK)
        desk.end(2)
        due(desk)
        assert desk.out.said() == [(0, "below_threshold"), (1, "below_threshold"), (2, "missing_frame"), (2, "eos")]

    def test_an_end_of_stream_before_a_frame_that_came_is_refused(self, desk: Desk) -> None:
        """It contradicts what came, announced or not."""
        desk.open(0)
        desk.open(1)
        desk.end(1)
        assert desk.ledger.counts["refused_repeated"] == 1


class TestByPartId:
    """Triggers that carry a part id alone."""

    @pytest.fixture
    def desk(self) -> Desk:
        """A ledger whose camera's parts are announced by part id."""
        return Desk(expected="part")

    def test_frames_find_their_triggers_by_part_id(self, desk: Desk) -> None:
        """Whatever the camera's numbers say: one of a part that was never exposed is not missing in them."""
        for name in ("A", "B", "C"):
            desk.expect(part=name)
        desk.ledger.answer(desk.open(0, part="A"), OK)
        desk.ledger.answer(desk.open(1, part="C"), OK)
        due(desk)
        assert [(part.header.part, part.finding.reason) for part in desk.out.records if part.finding] == [
            ("A", "below_threshold"),
            ("B", "missing_frame"),
            ("C", "below_threshold"),
        ]
        assert [part.seq for part in desk.out.records] == [0, 1, 2]

    def test_a_part_id_that_comes_again_is_matched_in_order_of_arrival(self, desk: Desk) -> None:
        """The oldest trigger that waits is meant."""
        desk.expect(part="A")
        desk.clock.advance(10)
        desk.expect(part="A")
        first, second = desk.open(0, part="A"), desk.open(1, part="A")
        assert (first.seq, second.seq) == (0, 1)
        assert second.deadline - first.deadline == 10 * MS

    def test_a_camera_that_begins_anew_goes_on_in_the_lines_numbers(self, desk: Desk) -> None:
        """The line numbers the parts, in one session of its own: what waits outlives the camera's restart."""
        desk.expect(part="A")
        desk.expect(part="B")
        desk.ledger.answer(desk.open(7, part="A"), OK)
        desk.ledger.answer(desk.open(0, SESSION + MS, part="B"), OK)
        assert [part.seq for part in desk.out.records] == [0, 1]
        assert len({(part.header.session, part.stream_ms) for part in desk.out.records}) == 1

    def test_a_new_run_of_the_line_begins_a_session_of_its_own(self) -> None:
        """Behind the newest record of the run before, also where the wall clock was set back since."""
        desk = Desk()
        later = SESSION + 3600 * 1000 * MS
        book: Any = desk.register("other")
        book.resume(later // MS, 9, later)
        fresh = type(book)("cam2", deadline_ns=DEADLINE * MS, max_gap=MAX_GAP, first_seq=0, expected="part")
        fresh.resume(later // MS, 9, later)
        desk.ledger.register(fresh)
        desk.expect(part="A", camera="cam2")
        due(desk)
        (record,) = desk.out.records
        assert (record.stream_ms, record.seq) == (later // MS + 1, 0)
        assert record.header.session > later

    def test_a_frame_that_comes_after_its_trigger_was_given_up_is_refused(self, desk: Desk) -> None:
        """The part has its verdict; a late frame never gets it a second one."""
        desk.expect(part="A")
        due(desk)
        assert desk.admit(0, part="A") is None
        desk.expect(part="B")
        desk.clock.advance(DEADLINE)
        assert desk.admit(1, part="B") is None
        assert [part.header.part for part in desk.out.records] == ["A", "B"]
        assert desk.ledger.counts["refused_repeated"] == 2
        assert desk.ledger.counts["missing_frame"] == 2

    def test_a_trigger_that_comes_after_its_frame_opens_nothing(self, desk: Desk) -> None:
        """A part that was inspected is not answered again as missing."""
        desk.ledger.answer(desk.open(0, part="A"), OK)
        desk.expect(part="A")
        due(desk)
        assert desk.out.said() == [(0, "below_threshold")]
        assert desk.ledger.counts["triggers_behind"] == 1
        desk.expect(part="A")
        assert desk.ledger.open == 1

    def test_a_frame_that_comes_twice_is_refused(self, desk: Desk) -> None:
        """By the camera's own session and number."""
        desk.expect(part="A")
        desk.open(0, part="A")
        assert desk.admit(0, part="A") is None
        assert desk.ledger.counts["refused_repeated"] == 1
        desk.open(0, SESSION + 1, part="X")
        assert desk.admit(5, part="Y") is None
        assert desk.ledger.counts["refused_old_session"] == 1

    @pytest.mark.parametrize("strict", [False, True])
    @pytest.mark.parametrize("name", ["", "B"])
    def test_frames_without_a_trigger(self, name: str, strict: bool) -> None:
        """By the stated rule; a frame without a part id has no trigger."""
        desk = Desk(expected="part", strict=strict)
        desk.expect(part="A")
        part = desk.admit(0, part=name)
        assert (part is None) == strict
        due(desk)
        assert desk.out.said()[0] == (0, "missing_frame")
        assert desk.out.said()[1] == (1, "unexpected" if strict else "deadline")

    def test_the_end_of_a_stream_comes_behind_what_was_announced(self, desk: Desk) -> None:
        """It is confirmed under the line's own session, when the parts before it are answered."""
        desk.expect(part="A")
        desk.end(4)
        assert desk.out.records == []
        due(desk)
        assert desk.out.said() == [(0, "missing_frame"), (1, "eos")]
        assert len({part.header.session for part in desk.out.records}) == 1


@pytest.mark.parametrize("matching", ["seq", "part"])
class TestBounds:
    """What a flood of triggers, and the end of the line, leave behind."""

    def test_parts_that_wait_are_bounded(self, matching: Any) -> None:
        """Of too many the oldest is given up, and answered: a PLC that counts wild makes the line hold no more."""
        desk = Desk(expected=matching)
        for seq in range(MAX_WAITING + 10):
            desk.expect(seq, f"P-{seq}")
        assert [part.seq for part in desk.out.rejects] == list(range(10))
        assert desk.ledger.counts["overload"] == 10
        assert desk.ledger.open == MAX_WAITING
        assert len(desk.ledger._books["cam1"].waiting) == MAX_WAITING

    def test_triggers_of_a_dead_camera_leave_nothing_behind(self, matching: Any) -> None:
        """Answered parts are let go, however long no frame comes."""
        desk = Desk(expected=matching)
        for seq in range(3000):
            desk.expect(seq, f"P-{seq}")
            desk.clock.advance(1)
            desk.ledger.expire()
        due(desk)
        book = desk.ledger._books["cam1"]
        assert [len(kept) for kept in (book.waiting, book.order, desk.ledger._due)] == [0, 0, 0]
        assert len(book.missed) <= MAX_WAITING
        assert [part.seq for part in desk.out.records] == list(range(3000))

    def test_a_trigger_after_close_is_answered(self, matching: Any) -> None:
        """What waits when the line stops, and what is announced then, is UNKNOWN because of it."""
        desk = Desk(expected=matching)
        desk.expect(0, "A")
        desk.ledger.close()
        desk.expect(1, "B")
        assert desk.out.said() == [(0, "shutdown"), (1, "shutdown")]
        assert desk.ledger.open == 0

    def test_the_wall_clock_changes_nothing(self, matching: Any) -> None:
        """A clock that is set between trigger and frame moves no deadline and no number."""
        desk = Desk(expected=matching)
        desk.expect(0, "A")
        desk.wall_offset = -3600 * 1000 * MS
        part = desk.open(0, part="A")
        desk.expect(1, "B")
        assert part.deadline - part.arrival == DEADLINE * MS
        desk.ledger.answer(part, OK)
        due(desk)
        ids = [(part.stream_ms, part.seq) for part in desk.out.records]
        assert ids == sorted(set(ids))
        assert [part.seq for part in desk.out.records] == [0, 1]
