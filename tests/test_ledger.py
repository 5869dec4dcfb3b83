"""The ledger: each part has exactly one first verdict, in time, in order, whatever comes when."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipeline.ledger import KEEP_SESSIONS, MAX_UNKNOWN_CAMERAS, CameraBook, Ledger
from pipeline.parts import UNKNOWN, Part, Reason, Verdict
from pipeline.wire import Header
from tests.support.books import MS, NG, OK, FakeClock, Recorder

DEADLINE = 100
MAX_GAP = 10
SESSION = 1_700_000_000_000 * MS


class Desk:
    """A ledger with its clock and its outbox, and one camera ``cam1``."""

    def __init__(self, **book: Any) -> None:
        self.clock, self.out = FakeClock(), Recorder()
        self.ledger = Ledger(self.out, self.clock, lambda: SESSION + self.clock.now)
        self.register("cam1", **book)

    def register(self, name: str, *, max_gap: int = MAX_GAP, first_seq: int = 0) -> CameraBook:
        """Make one more camera known."""
        book = CameraBook(name, deadline_ns=DEADLINE * MS, max_gap=max_gap, first_seq=first_seq)
        self.ledger.register(book)
        return book

    def admit(self, seq: int, session: int = SESSION, camera: str = "cam1", **header: Any) -> Part | None:
        """A frame comes."""
        return self.ledger.admit(camera, Header(seq=seq, session=session, **header))

    def open(self, seq: int, session: int = SESSION, camera: str = "cam1", **header: Any) -> Part:
        """A frame comes whose part is then open."""
        part = self.admit(seq, session, camera, **header)
        assert part is not None
        return part

    def end(self, seq: int, session: int = SESSION, camera: str = "cam1") -> None:
        """The camera says that its session is over."""
        self.ledger.end_of_stream(camera, Header(seq=seq, session=session, eos=True))


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


CAMERAS = ("cam0", "cam1", "any")


@dataclass
class Sheet:
    """What a camera's records have to be, worked out from the rules alone."""

    first: int
    session: int | None = None
    next: int | None = None
    old: list[int] = field(default_factory=list)
    order: list[tuple[int, int]] = field(default_factory=list)

    def enter(self, session: int) -> bool:
        """Begin or go on with a session; False for one of the last few before it."""
        if session == self.session:
            return True
        if session in self.old[-KEEP_SESSIONS:]:
            return False
        if self.session is not None:
            self.old.append(self.session)
        self.session, self.next = session, None if self.first < 0 else self.first
        return True

    def skipped(self, seq: int) -> list[tuple[int, str]] | None:
        """Numbers that are answered because ``seq`` shows them lost; None if ``seq`` itself is an old one."""
        expected = seq if self.next is None else self.next
        if seq < expected:
            return None
        if seq - expected > MAX_GAP:
            return [(seq - 1, "sequence_jump")]
        return [(lost, "missing_frame") for lost in range(expected, seq)]


class LedgerMachine(RuleBasedStateMachine):
    """Any order of frames, gaps, restarts, answers and time, against a sheet kept by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.desk.register("cam0", first_seq=1)
        self.desk.register("any", first_seq=-1)
        self.sheets = {"cam0": Sheet(1), "cam1": Sheet(0), "any": Sheet(-1)}
        self.open: list[Part] = []
        self.seen: list[Part] = []
        self.reasons: dict[tuple[str, int, int], str] = {}
        self.answers = 0

    @rule(camera=st.sampled_from(CAMERAS), step=st.integers(-4, MAX_GAP + 4), wish=st.sampled_from([0, 0, 30]))
    def frame(self, camera: str, step: int, wish: float) -> None:
        """The next number, a gap, a jump, or one from before."""
        sheet = self.sheets[camera]
        session = SESSION if sheet.session is None else sheet.session
        self._send(camera, session, max((sheet.next or 0) + step, 0), wish)

    @rule(camera=st.sampled_from(CAMERAS), session=st.integers(SESSION, SESSION + 3 * MS), seq=st.integers(0, 3))
    def restart(self, camera: str, session: int, seq: int) -> None:
        """A session that is new, old or the present one, its clock before or behind; none that is forgotten."""
        if session not in self.sheets[camera].old[:-KEEP_SESSIONS]:
            self._send(camera, session, seq, 0)

    @rule(camera=st.sampled_from(CAMERAS), back=st.integers(1, KEEP_SESSIONS))
    def echo(self, camera: str, back: int) -> None:
        """A frame of an earlier session that was on its way for long."""
        old = self.sheets[camera].old
        if len(old) >= back:
            self._send(camera, old[-back], 0, 0)

    @rule(camera=st.sampled_from(CAMERAS), more=st.integers(-1, MAX_GAP + 2))
    def finish(self, camera: str, more: int) -> None:
        """The camera ends its session, having lost some of its last parts."""
        sheet = self.sheets[camera]
        session = SESSION if sheet.session is None else sheet.session
        seq = max((sheet.next or 0) + more, 0)
        if sheet.enter(session) and (lost := sheet.skipped(seq)) is not None:
            self._expect(camera, lost)
            sheet.next = seq
            sheet.order.append((session, -1))
        self.desk.end(seq, session, camera)

    @precondition(lambda self: self.seen)
    @rule(data=st.data(), finding=st.sampled_from([OK, NG, UNKNOWN[Reason.ENGINE_FAULT]]))
    def answer(self, data: st.DataObject, finding: Any) -> None:
        """A lane answers a part, open or not."""
        part = data.draw(st.sampled_from(self.seen))
        first = part.finding is None
        in_time = self.desk.clock() < part.deadline or finding.verdict is not Verdict.OK
        before = part.finding
        assert self.desk.ledger.answer(part, finding) == (first and in_time)
        self.answers += 1
        if not first:
            assert part.finding is before
        if first and in_time:
            assert part.finding is finding
        self._note(part)

    @rule(milliseconds=st.sampled_from([0.5, 1, 29, 30, 70, 100, 500]))
    def wait(self, milliseconds: float) -> None:
        """Time passes; the timer may or may not get to run."""
        self.desk.clock.advance(milliseconds)

    @rule()
    def expire(self) -> None:
        """The timer runs: nothing that is due stays open, and the next deadline is named."""
        due = self.desk.ledger.expire()
        still = [part for part in self.seen if part.finding is None]
        assert all(part.deadline > self.desk.clock() for part in still)
        assert due == min((part.deadline for part in still), default=None)
        for part in self.seen:
            self._note(part)

    def _send(self, camera: str, session: int, seq: int, wish: float) -> None:
        sheet = self.sheets[camera]
        entered = sheet.enter(session)
        lost = sheet.skipped(seq) if entered else None
        part = self.desk.admit(seq, session, camera, deadline_ms=wish)
        assert (part is not None) == (lost is not None)
        if part is None or lost is None:
            return
        self._expect(camera, lost)
        assert (part.camera, part.header.session, part.seq) == (camera, session, seq)
        sheet.order.append((session, seq))
        sheet.next = seq + 1
        self.seen.append(part)

    def _expect(self, camera: str, lost: list[tuple[int, str]]) -> None:
        sheet = self.sheets[camera]
        assert sheet.session is not None
        for seq, reason in lost:
            sheet.order.append((sheet.session, seq))
            self.reasons[camera, sheet.session, seq] = reason

    def _note(self, part: Part) -> None:
        if part.finding is not None:
            self.reasons.setdefault((part.camera, part.header.session, part.seq), part.finding.reason)

    @invariant()
    def records_are_the_answered_beginning_of_the_sheet(self) -> None:
        """In order, without a gap, each once, with the first reason, ids growing."""
        for camera, sheet in self.sheets.items():
            records = [part for part in self.desk.out.records if part.camera == camera]
            told = [(part.header.session, -1 if part.header.eos else part.seq) for part in records]
            answered = 0
            while answered < len(sheet.order) and (
                sheet.order[answered][1] == -1 or (camera, *sheet.order[answered]) in self.reasons
            ):
                answered += 1
            assert told == sheet.order[:answered]
            parts = [part for part in records if not part.header.eos]
            ids = [(part.stream_ms, part.seq) for part in parts]
            assert ids == sorted(set(ids))
            for part in parts:
                assert part.finding is not None
                assert part.finding.reason == self.reasons[camera, part.header.session, part.seq]

    @invariant()
    def rejects_are_all_answers_but_ok_once_each(self) -> None:
        """A reject is told exactly once, and for every part that is not OK."""
        rejects = [(part.camera, part.header.session, part.seq) for part in self.desk.out.rejects]
        assert len(rejects) == len(set(rejects))
        assert set(rejects) == {key for key, reason in self.reasons.items() if reason != Reason.BELOW_THRESHOLD}

    @invariant()
    def no_ok_is_past_its_deadline(self) -> None:
        """Nothing fails open, not even by a nanosecond."""
        for part in self.seen:
            if part.finding is OK:
                assert part.verdict_ns - part.arrival_ns < part.deadline - part.arrival

    @invariant()
    def counters_add_up(self) -> None:
        """Parts are open or have one verdict; answers were first or late."""
        ledger = self.desk.ledger
        assert ledger.counts["parts"] == ledger.open + sum(ledger.counts[verdict] for verdict in Verdict)
        assert ledger.open == sum(part.finding is None for part in self.seen)
        assert ledger.counts["late_results"] == len(self.desk.out.lates)

    def teardown(self) -> None:
        """At the end every part has its record."""
        self.desk.ledger.close()
        for camera, sheet in self.sheets.items():
            records = [part for part in self.desk.out.records if part.camera == camera]
            assert [(p.header.session, -1 if p.header.eos else p.seq) for p in records] == sheet.order
        assert self.desk.ledger.open == 0


TestAnyOrder = LedgerMachine.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40)
