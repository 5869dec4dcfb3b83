"""Sessions and numbers: what a gap, a restart, a repeated frame, a wrap and the end of a stream mean."""

from __future__ import annotations

import pytest

from pipeline.ledger import KEEP_SESSIONS
from pipeline.parts import UNKNOWN, Reason
from pipeline.wire import Header
from tests.support.books import DEADLINE, MAX_GAP, MS, OK, SESSION, Desk


@pytest.fixture
def desk() -> Desk:
    """A ledger of this test's own."""
    return Desk()


def test_missing_numbers_are_answered_in_order_before_the_part_that_shows_them(desk: Desk) -> None:
    """A gap gives one MISSING_FRAME a part, with nothing of the frame behind the gap but its recipe."""
    desk.ledger.answer(desk.open(0), OK)
    part = desk.open(4, part="serial", truth="good", recipe="m8", w=9, h=9, t_ns=5, deadline_ms=1)
    assert desk.out.said() == [(0, "below_threshold"), *((seq, "missing_frame") for seq in (1, 2, 3))]
    assert [p.seq for p in desk.out.rejects] == [1, 2, 3]
    assert {p.header for p in desk.out.rejects} == {Header(seq=seq, session=SESSION, recipe="m8") for seq in (1, 2, 3)}
    assert part.header.part == "serial"
    assert desk.ledger.open == 1


def test_a_gap_beyond_belief_is_one_sequence_jump(desk: Desk) -> None:
    """More than max_gap missing numbers give one record, with the last of them; counting goes on behind it."""
    desk.ledger.answer(desk.open(0), OK)
    desk.ledger.answer(desk.open(MAX_GAP + 2), OK)
    desk.ledger.answer(desk.open(MAX_GAP + 3), OK)
    assert desk.out.said() == [
        (0, "below_threshold"),
        (MAX_GAP + 1, "sequence_jump"),
        (MAX_GAP + 2, "below_threshold"),
        (MAX_GAP + 3, "below_threshold"),
    ]
    assert desk.ledger.counts["sequence_jumps"] == 1


def test_a_gap_of_exactly_the_limit_is_answered_one_by_one(desk: Desk) -> None:
    """max_gap missing numbers are still answered each."""
    desk.ledger.answer(desk.open(0), OK)
    desk.open(MAX_GAP + 1)
    assert [p.seq for p in desk.out.rejects] == list(range(1, MAX_GAP + 1))


def test_the_largest_jump_is_as_cheap_as_any(desk: Desk) -> None:
    """A sequence number of 64 bits gives one record more and not one for each missing number."""
    desk.open(2**64 - 1)
    assert desk.out.said() == [(2**64 - 2, "sequence_jump")]


def test_a_number_that_was_answered_before_is_refused_and_counted(desk: Desk) -> None:
    """A repeated frame, and one that comes after it was given up as missing, opens no second part."""
    desk.ledger.answer(desk.open(0), OK)
    desk.ledger.answer(desk.open(2), OK)
    assert [desk.admit(seq) for seq in (0, 1, 2)] == [None, None, None]
    assert desk.out.said() == [(0, "below_threshold"), (1, "missing_frame"), (2, "below_threshold")]
    assert desk.ledger.counts["refused_repeated"] == 3


@pytest.mark.parametrize(("first_seq", "missing"), [(0, [0, 1, 2]), (1, [1, 2]), (-1, [])])
def test_the_first_number_of_a_session_is_as_configured(first_seq: int, missing: list[int]) -> None:
    """With 0 or 1 a session that begins later has lost its first parts; with -1 it begins with what comes first."""
    desk = Desk(first_seq=first_seq)
    desk.open(3)
    assert [p.seq for p in desk.out.rejects] == missing
    desk.open(4)
    assert desk.ledger.open == 2


def test_numbers_before_the_first_one_are_refused() -> None:
    """Where sessions begin with 1, a frame 0 is none of them."""
    desk = Desk(first_seq=1)
    assert desk.admit(0) is None
    assert desk.ledger.counts["refused_repeated"] == 1
    desk.open(1)
    assert desk.out.records == []


def test_an_old_session_is_refused_and_counted(desk: Desk) -> None:
    """Frames of the sessions before the present one are not mixed into it."""
    desk.open(0)
    for later in range(1, KEEP_SESSIONS + 1):
        desk.open(0, SESSION + later)
    for old in range(KEEP_SESSIONS):
        assert desk.admit(1, SESSION + old) is None
    desk.end(9, SESSION)
    assert desk.ledger.counts["refused_old_session"] == KEEP_SESSIONS + 1
    assert desk.ledger.counts["parts"] == KEEP_SESSIONS + 1


@pytest.mark.parametrize("session", [SESSION + 1, SESSION - 3600 * 1000 * MS, 0])
def test_stream_ids_grow_with_every_session(desk: Desk, session: int) -> None:
    """A session in the same millisecond, or with a clock that was set back, still gets ids behind the last ones."""
    desk.ledger.answer(desk.open(0), OK)
    desk.ledger.answer(desk.open(1), OK)
    desk.ledger.answer(desk.open(0, session), OK)
    ids = [(part.stream_ms, part.seq) for part in desk.out.records]
    assert ids == sorted(set(ids))
    assert ids[0] == (SESSION // MS, 0)
    assert ids[2][0] == SESSION // MS + 1


def test_a_new_session_waits_for_the_parts_of_the_one_before(desk: Desk) -> None:
    """Records stay in order across a restart of the camera."""
    first, second = desk.open(0), desk.open(0, SESSION + MS)
    desk.ledger.answer(second, OK)
    assert desk.out.records == []
    desk.ledger.answer(first, OK)
    assert desk.out.records == [first, second]


def test_cameras_do_not_wait_for_one_another(desk: Desk) -> None:
    """An open part holds back the records of its own camera only."""
    desk.register("cam2")
    desk.open(0)
    other = desk.open(0, camera="cam2")
    desk.ledger.answer(other, OK)
    assert desk.out.records == [other]


def test_the_end_of_a_stream_answers_its_lost_tail_and_comes_last(desk: Desk) -> None:
    """Parts that never came are MISSING_FRAME; the end is confirmed only when every part before it is answered."""
    part = desk.open(0)
    desk.end(3)
    assert [p.seq for p in desk.out.rejects] == [1, 2]
    assert desk.out.records == []
    desk.ledger.answer(part, OK)
    assert desk.out.said() == [(0, "below_threshold"), (1, "missing_frame"), (2, "missing_frame"), (3, "eos")]
    assert desk.out.records[-1].header.eos
    assert desk.ledger.counts["parts"] == 3


def test_the_end_of_a_stream_of_which_nothing_came_is_answered(desk: Desk) -> None:
    """A session whose frames were all lost is known from its end."""
    desk.end(2)
    assert desk.out.said() == [(0, "missing_frame"), (1, "missing_frame"), (2, "eos")]


def test_the_end_of_a_stream_after_all_its_parts_opens_none(desk: Desk) -> None:
    """Where nothing was lost, the end is confirmed and no part is made up."""
    desk.ledger.answer(desk.open(0), OK)
    desk.end(1)
    assert desk.out.said() == [(0, "below_threshold"), (1, "eos")]
    assert desk.ledger.open == 0


def test_an_end_of_stream_before_the_last_answered_part_is_refused(desk: Desk) -> None:
    """An end that contradicts what came is not confirmed."""
    desk.open(0)
    desk.open(1)
    desk.end(1)
    assert desk.ledger.counts["refused_repeated"] == 1


def test_the_end_of_a_stream_that_began_with_1_is_the_number_after_its_last() -> None:
    """The seq of an end is one more than the last part's number, wherever the session began."""
    desk = Desk(first_seq=1)
    desk.ledger.answer(desk.open(1), OK)
    desk.end(4)
    assert desk.out.said() == [(1, "below_threshold"), (2, "missing_frame"), (3, "missing_frame"), (4, "eos")]


def test_a_resumed_camera_goes_on_behind_what_was_published(desk: Desk) -> None:
    """Parts published by an earlier run are refused, parts lost between the runs are answered, ids keep growing."""
    book = desk.register("cam2")
    book.resume(SESSION // MS + 7, 41, SESSION)
    assert desk.admit(41, camera="cam2") is None
    desk.open(44, camera="cam2")
    assert [p.seq for p in desk.out.rejects] == [42, 43]
    assert {p.stream_ms for p in desk.out.rejects} == {SESSION // MS + 7}
    assert desk.open(0, SESSION + 1, camera="cam2").stream_ms == SESSION // MS + 8


class TestTheCountersEnd:
    """What comes after a counter's largest number."""

    @pytest.mark.parametrize("bits", [16, 32])
    def test_numbers_go_on_where_the_counter_wraps(self, bits: int) -> None:
        """No gap and no repeat is seen in it; records are numbered on, so that ids grow and no part has two names."""
        desk, last = Desk(first_seq=-1, seq_bits=bits), 2**bits - 1
        for seq in (last - 1, last, 0, 1):
            desk.ledger.answer(desk.open(seq), OK)
        assert [part.seq for part in desk.out.records] == [last - 1, last, last + 1, last + 2]
        assert len({part.stream_ms for part in desk.out.records}) == 1
        assert desk.out.rejects == []

    def test_a_gap_across_the_wrap_names_the_parts_in_it(self) -> None:
        """Numbers that are missing on both sides of the wrap are answered each."""
        desk = Desk(first_seq=-1, seq_bits=16)
        for seq in (65533, 2):
            desk.ledger.answer(desk.open(seq), OK)
        missing = [(seq, "missing_frame") for seq in (65534, 65535, 65536, 65537)]
        assert desk.out.said() == [(65533, "below_threshold"), *missing, (65538, "below_threshold")]

    def test_a_counter_that_never_is_0_wraps_to_1(self) -> None:
        """Where sessions begin with 1, as GigE Vision's 16-bit block ids do, 0 is no number at all."""
        desk = Desk(first_seq=1, max_gap=70_000, seq_bits=16)
        desk.open(65535)
        assert desk.admit(0) is None
        assert desk.open(1).seq == 65536
        assert desk.open(2).seq == 65537
        assert desk.ledger.counts["refused_bad_number"] == 1

    def test_a_number_that_the_counter_does_not_have_is_refused_and_counted(self) -> None:
        """A frame that contradicts the config's width of the counter has no place in the sequence."""
        desk = Desk(seq_bits=16)
        desk.open(0)
        assert desk.admit(65536) is None
        assert desk.ledger.counts["refused_bad_number"] == 1
        assert desk.open(1).seq == 1

    def test_repeated_numbers_are_known_on_both_sides_of_the_wrap(self) -> None:
        """Numbers shortly behind are old ones, also where the counter has wrapped since."""
        desk = Desk(first_seq=-1, seq_bits=16)
        for seq in (65534, 65535, 0):
            desk.open(seq)
        assert [desk.admit(seq) for seq in (0, 65535, 65534, 65000)] == [None] * 4
        assert desk.ledger.counts["refused_repeated"] == 4

    def test_after_a_long_outage_counting_goes_on(self) -> None:
        """More than half a round of the counter is a jump, and does not shut the camera out until it has caught up."""
        desk = Desk(seq_bits=16)
        for seq in range(3):
            desk.open(seq)
        desk.open(40_000)
        assert desk.open(40_001).seq == 40_001
        assert [part.seq for part in desk.out.rejects] == [39_999]
        assert desk.ledger.counts["sequence_jumps"] == 1

    def test_a_free_running_counter_at_the_start_of_a_session_is_a_jump(self) -> None:
        """A number just before the first one of a session has not been there: it is no repeat."""
        desk = Desk(seq_bits=16)
        assert desk.open(65_530).seq == 65_530
        assert [part.finding for part in desk.out.rejects if part.seq == 65_529] == [UNKNOWN[Reason.SEQUENCE_JUMP]]

    def test_the_end_of_a_stream_wraps_too(self) -> None:
        """The number after the largest is 0 in an end of stream as well; what is confirmed is the number of parts."""
        desk = Desk(first_seq=-1, seq_bits=16)
        desk.ledger.answer(desk.open(65534), OK)
        desk.end(0)
        assert desk.out.said() == [(65534, "below_threshold"), (65535, "missing_frame"), (65536, "eos")]
        assert desk.out.records[-1].header.seq == 65536

    def test_a_session_ends_with_the_largest_number_of_64_bits(self) -> None:
        """Redis has no id for a number behind it: what comes is refused and counted until a new session begins."""
        desk = Desk(first_seq=-1)
        desk.ledger.answer(desk.open(2**64 - 1), OK)
        assert desk.admit(0) is None
        assert desk.ledger.counts["refused_repeated"] == 1
        desk.ledger.answer(desk.open(0, SESSION + 1), OK)
        ids = [(part.stream_ms, part.seq) for part in desk.out.records]
        assert ids == [(SESSION // MS, 2**64 - 1), (SESSION // MS + 1, 0)]

    def test_numbers_of_a_wrapping_counter_end_there_too(self) -> None:
        """No number gets longer than 64 bits, however often a counter wraps."""
        desk = Desk(first_seq=-1, seq_bits=16)
        book = desk.register("cam2", first_seq=-1, seq_bits=16)
        book.resume(SESSION // MS, 2**64 - 2, SESSION)
        assert desk.open(65535, camera="cam2").seq == 2**64 - 1
        assert desk.admit(0, camera="cam2") is None
        assert desk.ledger.counts["refused_bad_number"] == 1

    def test_a_resumed_camera_knows_where_its_counter_stands(self) -> None:
        """After a restart of the line the numbers go on behind the published ones, rounds of the counter included."""
        desk = Desk()
        desk.register("cam2", seq_bits=16).resume(SESSION // MS, 3 * 65536 + 9, SESSION)
        assert desk.admit(9, camera="cam2") is None
        assert desk.open(10, camera="cam2").seq == 3 * 65536 + 10


@pytest.mark.parametrize("step", [-3600, 3600], ids=["back", "forward"])
def test_steps_of_the_wall_clock_change_no_deadline_and_no_order(desk: Desk, step: int) -> None:
    """A clock set by an hour shows in what is written down of later parts, and nowhere else."""
    before = desk.open(0)
    desk.wall_offset = step * 1000 * MS
    after = desk.open(1)
    assert (before.deadline, after.deadline) == (before.arrival + DEADLINE * MS, after.arrival + DEADLINE * MS)
    desk.clock.advance(DEADLINE - 1)
    assert desk.ledger.answer(after, OK)
    desk.clock.advance(1)
    desk.ledger.expire()
    assert desk.out.said() == [(0, "deadline"), (1, "below_threshold")]
    for part in desk.out.records:
        assert part.verdict_ns - part.arrival_ns == part.latency_us * 1000
    assert after.arrival_ns - before.arrival_ns == step * 1000 * MS
    assert len({part.stream_ms for part in desk.out.records}) == 1


@pytest.mark.parametrize("step", [-3600, 3600], ids=["back", "forward"])
def test_steps_of_a_cameras_clock_keep_its_ids_growing(desk: Desk, step: int) -> None:
    """Whatever time a camera takes for its next session, the ids of its records grow."""
    for session in (SESSION, SESSION + step * 1000 * MS, SESSION + 1):
        desk.ledger.answer(desk.open(0, session), OK)
    ids = [(part.stream_ms, part.seq) for part in desk.out.records]
    assert ids == sorted(set(ids))
