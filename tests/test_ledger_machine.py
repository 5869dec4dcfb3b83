"""Cameras whose parts may be open before their frames come: any order of events, against rules kept by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.books import KEEP_SESSIONS, MAX_WAITING
from pipeline.parts import UNKNOWN, Part, Reason, Verdict
from tests.support.books import DEADLINE, MAX_GAP, MS, NG, OK, SESSION, Desk

BITS = 5
CAMERAS: dict[str, dict[str, Any]] = {
    "window": {"window": 3},
    "wrap": {"window": 2, "seq_bits": BITS, "first_seq": 1},
    "seq": {"expected": "seq"},
    "strict": {"expected": "seq", "strict": True, "window": 2},
}


class Rules:
    """What has to become of each number of a camera, worked out from the documented rules alone."""

    def __init__(self, window: int = 0, first_seq: int = 0, strict: bool = False, **_: Any) -> None:
        self.window, self.first, self.strict = window, first_seq, strict
        self.session: int | None = None
        self.old: list[int] = []
        self.provisional = False
        self.reasons: Counter[str] = Counter()
        self.waiting: dict[int, int] = {}
        self.next, self.seen, self.triggered = first_seq, 0, 0

    def enter(self, session: int) -> bool:
        """A message of a session; False if that is over."""
        if session == self.session:
            return True
        if session in self.old[-KEEP_SESSIONS:]:
            return False
        if not self.provisional:
            self.give_up(lambda _: True)
            self.next, self.seen, self.triggered = self.first, 0, 0
            if self.session is not None:
                self.old.append(self.session)
        self.session, self.provisional = session, False
        return True

    def give_up(self, which: Any) -> None:
        """Answer the waiting numbers of which this holds as missing."""
        for number in [n for n in self.waiting if which(n)]:
            del self.waiting[number]
            self.reasons["missing_frame"] += 1

    def gap(self, number: int, now: int) -> None:
        """Name the numbers before this one that were not there."""
        if number - self.next > MAX_GAP:
            self.reasons["sequence_jump"] += 1
        else:
            self.waiting.update(dict.fromkeys(range(self.next, number), now + DEADLINE * MS))
        self.next = number

    def frame(self, number: int, now: int) -> str:
        """What becomes of a frame: ``refused``, ``unexpected`` or ``open``."""
        if number < self.next:
            if self.waiting.get(number, 0) <= now:
                self.give_up(lambda n: n == number)
                return "refused"
            del self.waiting[number]
        else:
            self.gap(number, now)
            self.next = number + 1
        self.seen = max(self.seen, number + 1)
        self.give_up(lambda n: self.seen - 1 - n > self.window)
        if self.strict and number >= self.triggered:
            self.reasons["unexpected"] += 1
            return "unexpected"
        return "open"

    def trigger(self, number: int, now: int) -> None:
        """The PLC announces a number."""
        self.triggered = max(self.triggered, number + 1)
        if number >= self.next:
            self.gap(number, now)
            self.waiting[number] = now + DEADLINE * MS
            self.next = number + 1

    def end(self, number: int, now: int) -> bool:
        """The camera is done; False if that contradicts what came."""
        if number < self.seen:
            return False
        if number >= self.next:
            self.gap(number, now)
        self.seen = number
        self.give_up(lambda n: number - n > self.window)
        return True


class WaitingMachine(RuleBasedStateMachine):
    """Frames, late frames, repeats, restarts, triggers, ends, answers and time in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        for name, book in CAMERAS.items():
            self.desk.register(name, **book)
        self.rules = {name: Rules(**book) for name, book in CAMERAS.items()}
        self.parts: list[Part] = []
        self.ends = 0
        self.sessions = 0

    @initialize()
    def first_frames(self) -> None:
        """The cameras without triggers begin; those with triggers may begin with one."""
        for camera in ("window", "wrap"):
            self._frame(camera, SESSION, self.rules[camera].first)

    @rule(camera=st.sampled_from(list(CAMERAS)), step=st.integers(-4, MAX_GAP + 3))
    def frame(self, camera: str, step: int) -> None:
        """The next number, a late one, a repeat, a gap or a jump."""
        rules = self.rules[camera]
        session = SESSION if rules.session is None or rules.provisional else rules.session
        self._frame(camera, session, max(rules.next + step, rules.first))

    @precondition(lambda self: any(rules.waiting for rules in self.rules.values()))
    @rule(data=st.data(), after=st.sampled_from([0, 0, DEADLINE - 1, DEADLINE]))
    def late_frame(self, data: st.DataObject, after: float) -> None:
        """A frame that is waited for, in time, at the last moment, or too late where the timer has not run."""
        self.desk.clock.advance(after)
        camera = data.draw(st.sampled_from([name for name, rules in self.rules.items() if rules.waiting]))
        rules = self.rules[camera]
        session = SESSION if rules.provisional else rules.session
        assert session is not None
        self._frame(camera, session, data.draw(st.sampled_from(sorted(rules.waiting))))

    @rule(camera=st.sampled_from(list(CAMERAS)), shift=st.sampled_from([-3600, 0, 3600]), first=st.integers(1, 3))
    def restart(self, camera: str, shift: int, first: int) -> None:
        """A new session, its clock set back or ahead."""
        self.sessions += 1
        self._frame(camera, SESSION + shift * 1000 * MS + self.sessions, first)

    @rule(camera=st.sampled_from(list(CAMERAS)), back=st.integers(1, KEEP_SESSIONS))
    def echo(self, camera: str, back: int) -> None:
        """A frame of a session that is over."""
        old = self.rules[camera].old
        if len(old) >= back:
            self._frame(camera, old[-back], 1)

    @rule(camera=st.sampled_from(["seq", "strict"]), step=st.integers(-3, MAX_GAP + 2), named=st.booleans())
    def trigger(self, camera: str, step: int, named: bool) -> None:
        """A trigger, with or without its session."""
        rules = self.rules[camera]
        number = max(rules.next + step, 0)
        if named and rules.session is not None and not rules.provisional:
            self.desk.expect(number, session=rules.session, camera=camera)
        else:
            if rules.session is None:
                rules.enter(0)
                rules.provisional = True
            self.desk.expect(number, camera=camera)
        rules.trigger(number, self.desk.clock())

    @rule(camera=st.sampled_from(list(CAMERAS)), more=st.integers(-2, MAX_GAP + 2))
    def finish(self, camera: str, more: int) -> None:
        """A camera ends its stream."""
        rules = self.rules[camera]
        number = max(rules.next + more, rules.first)
        session = SESSION if rules.session is None or rules.provisional else rules.session
        rules.enter(session)
        self.ends += rules.end(number, self.desk.clock())
        self.desk.end(self._raw(camera, number), session, camera)

    @precondition(lambda self: self.parts)
    @rule(data=st.data(), finding=st.sampled_from([OK, OK, NG, UNKNOWN[Reason.ENGINE_FAULT]]))
    def answer(self, data: st.DataObject, finding: Any) -> None:
        """A lane answers a part, open or not."""
        part = data.draw(st.sampled_from(self.parts))
        before = part.finding
        in_time = finding.verdict is not Verdict.OK or self.desk.clock() < part.deadline
        assert self.desk.ledger.answer(part, finding) == (before is None and in_time)
        assert part.finding is (before or (finding if in_time else UNKNOWN[Reason.DEADLINE]))

    @rule(milliseconds=st.sampled_from([1, 30, 99, 100]), wall=st.sampled_from([0, 0, -3600, 3600]))
    def wait(self, milliseconds: float, wall: int) -> None:
        """Time passes, the wall clock may be set; the timer may or may not get to run."""
        self.desk.clock.advance(milliseconds)
        self.desk.wall_offset += wall * 1000 * MS

    @rule()
    def expire(self) -> None:
        """The timer runs: nothing that is due stays open, whether its frame came or not."""
        now = self.desk.clock()
        due = self.desk.ledger.expire()
        for rules in self.rules.values():
            rules.give_up(lambda n, rules=rules: rules.waiting[n] <= now)
        open_until = [part.deadline for part in self.parts if part.finding is None]
        open_until += [at for rules in self.rules.values() for at in rules.waiting.values()]
        assert all(at > now for at in open_until)
        assert due == min(open_until, default=None)
        assert len(self.desk.ledger._due) <= len(self.parts) + sum(len(r.waiting) for r in self.rules.values()) + len(
            [part for part in self.desk.out.rejects if part.deadline > now]
        )

    def _raw(self, camera: str, number: int) -> int:
        """What the camera's counter says at this number."""
        return 1 + (number - 1) % (2**BITS - 1) if camera == "wrap" else number

    def _frame(self, camera: str, session: int, number: int) -> None:
        rules = self.rules[camera]
        what = rules.frame(number, self.desk.clock()) if rules.enter(session) else "refused"
        part = self.desk.admit(self._raw(camera, number), session, camera)
        assert (part is not None) == (what == "open")
        if part is not None:
            assert (part.seq, part.header.session, part.camera) == (number, session, camera)
            self.parts.append(part)

    @invariant()
    def open_parts_are_counted(self) -> None:
        """Parts that wait, and parts in inspection, are what is open, exactly."""
        ledger = self.desk.ledger
        waiting = sum(len(rules.waiting) for rules in self.rules.values())
        assert ledger.open == waiting + sum(part.finding is None for part in self.parts)
        assert ledger.counts["parts"] == ledger.open + sum(ledger.counts[verdict] for verdict in Verdict)

    @invariant()
    def every_missing_number_is_answered_for_its_reason(self) -> None:
        """No more and no fewer than the rules say."""
        for reason in ("missing_frame", "sequence_jump", "unexpected", "overload"):
            assert self.desk.ledger.counts[reason] == sum(rules.reasons[reason] for rules in self.rules.values())

    @invariant()
    def records_are_in_order_and_leave_no_gap(self) -> None:
        """Ids grow strictly; a number that does not follow the one before it is a session's first, or a jump's."""
        for camera, rules in self.rules.items():
            records = [part for part in self.desk.out.records if part.camera == camera and not part.header.eos]
            ids = [(part.stream_ms, part.seq) for part in records]
            assert ids == sorted(set(ids))
            last = (-1, -1)
            for part in records:
                assert part.finding is not None
                begun = last if last[0] == part.stream_ms else (part.stream_ms, rules.first - 1)
                assert part.seq == begun[1] + 1 or part.finding.reason == Reason.SEQUENCE_JUMP
                last = part.stream_ms, part.seq

    @invariant()
    def each_part_has_one_first_verdict(self) -> None:
        """A reject for all that is not OK, once each; no OK at or after its deadline, on either clock's account."""
        rejects = [(part.camera, part.stream_ms, part.seq) for part in self.desk.out.rejects]
        assert len(rejects) == len(set(rejects))
        told = [part for part in self.desk.out.records if not part.header.eos]
        wanted = {(p.camera, p.stream_ms, p.seq) for p in told if p.finding and p.finding.verdict is not Verdict.OK}
        assert wanted <= set(rejects)
        for part in self.parts:
            if part.finding is OK:
                assert part.verdict_ns - part.arrival_ns < part.deadline - part.arrival

    @invariant()
    def what_waits_is_bounded(self) -> None:
        """The ledger holds no more of it than the rules know of."""
        for camera, rules in self.rules.items():
            book = self.desk.ledger._books[camera]
            assert len([part for part in book.waiting.values() if part.finding is None]) == len(rules.waiting)
            assert len(book.waiting) <= MAX_WAITING

    def teardown(self) -> None:
        """At the end every part has its record, and every end of a stream is confirmed."""
        self.desk.ledger.close()
        assert self.desk.ledger.open == 0
        assert sum(part.header.eos for part in self.desk.out.records) == self.ends
        assert len(self.desk.out.records) - self.ends == self.desk.ledger.counts["parts"]


TestAnyOrder = WaitingMachine.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=40)
