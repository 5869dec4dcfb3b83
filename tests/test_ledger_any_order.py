"""Cameras whose numbers ascend: any order of events, against a sheet that is kept by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipeline.ledger import KEEP_SESSIONS
from pipeline.parts import UNKNOWN, Part, Reason, Verdict
from tests.support.books import MAX_GAP, MS, NG, OK, SESSION, Desk

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
