"""A camera whose parts are matched by part id: any order of triggers, frames and time, against rules kept by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipeline.parts import UNKNOWN, Part, Reason, Verdict
from tests.support.books import DEADLINE, MS, NG, OK, SESSION, Desk

NAMES = ("A", "B", "C")


class PartIdMachine(RuleBasedStateMachine):
    """Few part ids, so that they recur in every way: waiting, come early, come too late, twice."""

    strict = False

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(expected="part", strict=self.strict)
        self.waiting: list[tuple[str, int]] = []
        self.early: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.sender = (SESSION, 0)
        self.parts: list[Part] = []
        self.reasons: Counter[str] = Counter()
        self.opened = 0

    @rule(name=st.sampled_from(NAMES))
    def trigger(self, name: str) -> None:
        """The PLC announces a part, or one whose frame has come already."""
        if self.early[name]:
            self.early[name] -= 1
        else:
            self.waiting.append((name, self.desk.clock() + DEADLINE * MS))
            self.opened += 1
        self.desk.expect(part=name)

    @rule(name=st.sampled_from((*NAMES, "")), step=st.integers(-1, 2), after=st.sampled_from([0, 0, DEADLINE]))
    def frame(self, name: str, step: int, after: float) -> None:
        """A frame, whose number may be an old one or leave a gap."""
        self.desk.clock.advance(after)
        session, expected = self.sender
        number = max(expected + step, 0)
        is_new = number >= expected
        if is_new:
            self.sender = session, number + 1
        part = self.desk.admit(number, session, part=name)
        what = self._rule(name, is_new)
        assert (part is not None) == (what == "open")
        if part is not None:
            assert part.header.part == name
            self.parts.append(part)

    @rule()
    def restart(self) -> None:
        """The camera begins a new session; the line's own goes on."""
        self.sender = (self.sender[0] + MS, 0)

    @precondition(lambda self: self.parts)
    @rule(data=st.data(), finding=st.sampled_from([OK, OK, NG, UNKNOWN[Reason.ENGINE_FAULT]]))
    def answer(self, data: st.DataObject, finding: Any) -> None:
        """A lane answers a part, open or not."""
        part = data.draw(st.sampled_from(self.parts))
        in_time = finding.verdict is not Verdict.OK or self.desk.clock() < part.deadline
        first = part.finding is None
        assert self.desk.ledger.answer(part, finding) == (first and in_time)

    @rule(milliseconds=st.sampled_from([1, 30, 99, 100]))
    def wait(self, milliseconds: float) -> None:
        """Time passes."""
        self.desk.clock.advance(milliseconds)

    @rule()
    def expire(self) -> None:
        """The timer runs: what is due is answered."""
        self.desk.ledger.expire()
        now = self.desk.clock()
        for entry in [entry for entry in self.waiting if entry[1] <= now]:
            self._miss(entry)
        assert all(part.deadline > now for part in self.parts if part.finding is None)

    def _rule(self, name: str, is_new: bool) -> str:
        entry = next((entry for entry in self.waiting if entry[0] == name), None)
        if entry is not None:
            if entry[1] > self.desk.clock():
                self.waiting.remove(entry)
                return "open"
            self._miss(entry)
        if self.missed[name]:
            self.missed[name] -= 1
            return "refused"
        if not is_new:
            return "refused"
        self.opened += 1
        if name:
            self.early[name] += 1
        if self.strict:
            self.reasons["unexpected"] += 1
            return "unexpected"
        return "open"

    def _miss(self, entry: tuple[str, int]) -> None:
        self.waiting.remove(entry)
        self.missed[entry[0]] += 1
        self.reasons["missing_frame"] += 1

    @invariant()
    def counters_add_up(self) -> None:
        """Parts that wait and parts in inspection are what is open; each trigger without a frame is answered once."""
        ledger = self.desk.ledger
        assert ledger.open == len(self.waiting) + sum(part.finding is None for part in self.parts)
        assert ledger.counts["parts"] == self.opened
        for reason in ("missing_frame", "unexpected"):
            assert ledger.counts[reason] == self.reasons[reason]

    @invariant()
    def records_are_numbered_by_the_line(self) -> None:
        """One session, numbers from 0 without a gap, ids growing."""
        records = self.desk.out.records
        assert [part.seq for part in records] == list(range(len(records)))
        assert len({(part.stream_ms, part.header.session) for part in records}) <= 1
        rejects = [part.seq for part in self.desk.out.rejects]
        assert len(rejects) == len(set(rejects))

    @invariant()
    def no_ok_is_past_its_deadline(self) -> None:
        """Nothing fails open."""
        for part in self.parts:
            if part.finding is OK:
                assert part.verdict_ns - part.arrival_ns < part.deadline - part.arrival

    def teardown(self) -> None:
        """At the end every part has its record."""
        self.desk.ledger.close()
        assert len(self.desk.out.records) == self.opened


class StrictPartIdMachine(PartIdMachine):
    """The same where a frame without a trigger is UNKNOWN."""

    strict = True


TestAnyOrder = PartIdMachine.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=40)
TestAnyOrderStrict = StrictPartIdMachine.TestCase
TestAnyOrderStrict.settings = settings(max_examples=100, stateful_step_count=40)
