"""The queue: each camera's parts by deadline, within bounds, each given up by its camera's policy; shares by weight."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipeline.config import Camera, Limits
from pipeline.part_queue import SAMPLING_NS, Drop, PartQueue, Rules
from pipeline.parts import UNKNOWN, Part, Reason
from tests.support.books import MS, make_part

ROOMY = 1 << 30
ANSWERED = UNKNOWN[Reason.DEADLINE]


def numbers(parts: list[Part]) -> list[int]:
    """The sequence numbers of parts."""
    return [part.seq for part in parts]


def said(drops: list[Drop]) -> list[tuple[int, str]]:
    """Sequence number and reason of parts that are given up."""
    return [(drop.part.seq, str(drop.reason)) for drop in drops]


def drained(queue: PartQueue, *, fair: bool = False) -> list[Part]:
    """Take all there is."""
    turns, parts = queue.turns(fair=fair), []
    while turns.peek() is not None:
        parts.append(turns.serve())
    return parts


def queue_of(max_bytes: int = ROOMY, **rules: Rules) -> PartQueue:
    """A queue with these cameras."""
    return PartQueue(max_bytes, rules)


def fill(queue: PartQueue, camera: str, count: int, *, size: int = 10, deadline: int = 1000) -> list[Part]:
    """Offer parts of one camera, numbered from 0; none of them may be given up."""
    parts = [make_part(camera, seq, size=size, deadline=deadline + seq) for seq in range(count)]
    assert [queue.offer(part, 0) for part in parts] == [[]] * count
    return parts


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5))))
def test_the_earliest_deadline_comes_first(arrivals: list[tuple[str, int]]) -> None:
    """Without pressure parts leave by deadline, those with the same deadline as they came, whatever their cameras."""
    queue = queue_of(a=Rules(weight=7), b=Rules(priority=5), c=Rules(policy="sample"))
    for number, (camera, deadline) in enumerate(arrivals):
        assert queue.offer(make_part(camera, number, deadline=deadline), 0) == []
    wanted = sorted(range(len(arrivals)), key=lambda number: (arrivals[number][1], number))
    assert numbers(drained(queue)) == wanted
    assert (queue.waiting, queue.bytes) == (0, 0)


def test_a_full_line_gives_up_its_own_oldest_part() -> None:
    """``drop_oldest``: the camera that sends too much loses its oldest part; another camera loses nothing."""
    queue = queue_of(busy=Rules(max_parts=2))
    queue.offer(make_part("other", 9, deadline=1), 0)
    fill(queue, "busy", 2)
    assert said(queue.offer(make_part("busy", 2, deadline=1002), 0)) == [(0, "overload")]
    assert said(queue.offer(make_part("busy", 3, deadline=1003), 0)) == [(1, "overload")]
    assert queue.counts == {"queue_drop_oldest": 2}
    assert numbers(drained(queue)) == [9, 2, 3]


def test_a_full_line_keeps_what_it_has() -> None:
    """``drop_newest``: what waits is not displaced; the newcomer is answered."""
    queue = queue_of(busy=Rules(policy="drop_newest", max_parts=2))
    fill(queue, "busy", 2)
    assert said(queue.offer(make_part("busy", 2), 0)) == [(2, "overload")]
    assert queue.counts == {"queue_drop_newest": 1}
    assert numbers(drained(queue)) == [0, 1]


def test_a_camera_that_waits_is_bounded_in_bytes_alone() -> None:
    """``wait``: nothing is displaced, and newcomers are taken until the bytes are used up."""
    rules = Rules.of(Camera(drop_policy="wait"), Limits(queue_parts=2))
    queue = queue_of(100, busy=rules)
    fill(queue, "busy", 10)
    assert said(queue.offer(make_part("busy", 10, size=1), 0)) == [(10, "overload")]
    assert queue.counts == {"queue_wait": 1}
    assert numbers(drained(queue)) == list(range(10))


def test_of_a_sample_every_nth_is_kept_under_pressure() -> None:
    """``sample``: the first of every few is inspected, the others are told at once, with a reason of their own."""
    queue = queue_of(busy=Rules(policy="sample", sample_every=4))
    drops = [queue.offer(make_part("busy", seq), 0, pressed=True) for seq in range(12)]
    assert [drop.part.seq for each in drops for drop in each] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert {drop.reason for each in drops for drop in each} == {Reason.SAMPLED}
    assert queue.counts == {"queue_sample": 9}
    assert numbers(drained(queue)) == [0, 4, 8]


def test_without_pressure_a_sample_is_everything() -> None:
    """Every part is inspected, from a second after the last pressure on."""
    queue = queue_of(busy=Rules(policy="sample"))
    queue.offer(make_part("busy", 0), 0, pressed=True)
    assert said(queue.offer(make_part("busy", 1), SAMPLING_NS - 1)) == [(1, "sampled")]
    assert [queue.offer(make_part("busy", seq), SAMPLING_NS) for seq in range(2, 20)] == [[]] * 18


def test_a_line_that_is_half_full_is_sampled() -> None:
    """A lane that hangs is pressure too, though no batch has shown it; at the bound the oldest gives way."""
    queue = queue_of(busy=Rules(policy="sample", sample_every=2, max_parts=8))
    kept = [queue.offer(make_part("busy", seq, deadline=seq), 0) == [] for seq in range(12)]
    assert kept == [True] * 4 + [True, False] * 4
    assert said(queue.offer(make_part("busy", 12, deadline=12), 0)) == [(0, "overload")]


def test_other_policies_are_never_sampled() -> None:
    """Pressure alone makes no part of theirs give way."""
    for policy in ("wait", "drop_oldest", "drop_newest"):
        queue = queue_of(busy=Rules(policy=policy))  # type: ignore[arg-type]
        assert [queue.offer(make_part("busy", seq), 0, pressed=True) for seq in range(9)] == [[]] * 9


def test_the_bytes_are_given_back_by_whoever_holds_most() -> None:
    """A flood of large frames cannot keep a quiet camera out: it loses its own part, by its own policy."""
    for policy, gone in (("drop_oldest", 0), ("sample", 0), ("drop_newest", 8), ("wait", 8)):
        queue = queue_of(100, flood=Rules(policy=policy))  # type: ignore[arg-type]
        fill(queue, "flood", 9)
        assert said(queue.offer(make_part("quiet", 20, size=20), 0)) == [(gone, "overload")]
        assert (queue.waiting, queue.bytes) == (9, 100)


def test_a_newcomer_that_would_hold_most_gives_way_itself_or_its_elders() -> None:
    """Oldest parts of the newcomer's camera give way until it fits; another camera's that holds less never do."""
    queue = queue_of(100)
    queue.offer(make_part("other", 9, size=40, deadline=1), 0)
    parts = fill(queue, "busy", 3, size=20)
    big = make_part("busy", 3, size=50, deadline=2000)
    assert queue.offer(big, 0) == [Drop(part, Reason.OVERLOAD) for part in parts]
    assert (queue.bytes, numbers(drained(queue))) == (90, [9, 3])
    queue.offer(make_part("other", 9, size=45), 0)
    assert said(queue.offer(make_part("busy", 4, size=60), 0)) == [(4, "overload")]
    assert queue.bytes == 45


def test_bytes_are_shared_by_weight() -> None:
    """A camera of three times the weight may hold three times the bytes of the others."""
    queue = queue_of(100, heavy=Rules(weight=3, max_parts=99), light=Rules(max_parts=99))
    fill(queue, "heavy", 70, size=1)
    fill(queue, "light", 30, size=1)
    for camera in ("heavy", "light"):
        drops = [drop for seq in range(5) for drop in queue.offer(make_part(camera, seq, size=1), 0)]
        assert [drop.part.camera for drop in drops] == ["light"] * 5


def test_a_part_larger_than_all_the_room_displaces_nothing() -> None:
    """What can never fit is answered, and costs no other part its place, be it of its own camera."""
    queue = queue_of(100)
    fill(queue, "other", 5)
    fill(queue, "busy", 4)
    assert said(queue.offer(make_part("busy", 4, size=101), 0)) == [(4, "overload")]
    assert queue.waiting == 9


def test_answered_parts_are_passed_over() -> None:
    """A part that has its verdict, as one whose deadline has passed, is not taken to a lane."""
    queue = queue_of()
    parts = fill(queue, "busy", 4)
    parts[0].finding = parts[2].finding = ANSWERED
    assert numbers(drained(queue)) == [1, 3]
    assert (queue.waiting, queue.bytes) == (0, 0)


def test_answered_parts_hold_no_room() -> None:
    """Parts that are past their deadlines, with every lane hanging, keep neither their bytes nor their places."""
    queue = queue_of(100, busy=Rules(policy="wait"), other=Rules(policy="drop_newest", max_parts=5))
    for part in fill(queue, "busy", 5) + fill(queue, "other", 5):
        part.finding = ANSWERED
    assert queue.offer(make_part("busy", 5, size=60), 0) == []
    assert queue.offer(make_part("other", 5, size=40), 0) == []
    assert (queue.waiting, queue.bytes) == (2, 100)


def test_parts_that_have_left_do_not_count_against_their_camera() -> None:
    """A camera of mixed deadlines has its whole bound for the parts that still wait."""
    queue = queue_of(cam1=Rules(max_parts=3))
    queue.offer(make_part(seq=0, deadline=900), 0)
    for seq in range(1, 50):
        assert queue.offer(make_part(seq=seq, deadline=seq), 0) == []
        assert queue.turns(fair=False).serve().seq == seq
    assert numbers(drained(queue)) == [0]


def test_a_queue_that_nobody_empties_stays_small() -> None:
    """With every lane out of order, memory does not grow with the parts that come and give way."""
    queue = queue_of(busy=Rules(max_parts=4))
    queue.offer(make_part("quiet", 0, deadline=0), 0)
    line = queue._line("busy")
    for seq in range(5000):
        queue.offer(make_part("busy", seq, deadline=seq * 7919 % 5003), 0)
        assert queue.first(line) == min(line.parts.values(), key=lambda entry: entry[0])
        assert len(line._heap) < 200
    assert queue.waiting == 5
    assert sorted(numbers(drained(queue))) == [0, 4996, 4997, 4998, 4999]


def test_parts_grow_too_old() -> None:
    """A camera's age limit takes out what has waited longer, at the next look or at its next part, and counts it."""
    queue = queue_of(old=Rules(age_ns=100), cam=Rules())
    for camera in ("old", "cam"):
        fill(queue, camera, 2)
    assert queue.aged(100) == []
    assert numbers(queue.aged(101)) == [0, 1]
    late = make_part("old", 2)
    late.arrival = 150
    assert queue.offer(late, 200) == []
    assert said(queue.offer(make_part("old", 3), 260)) == [(2, "infeasible")]
    assert queue.counts["queue_age"] == 3
    assert queue.waiting == 3


def test_hopeless_parts_are_taken_out_of_every_line() -> None:
    """Those whose deadline is before a time, and no other."""
    queue = queue_of()
    for camera, deadline in (("a", 5), ("a", 20), ("b", 7), ("b", 8), ("c", 30)):
        queue.offer(make_part(camera, deadline, deadline=deadline), 0)
    assert numbers(queue.due_before(8)) == [5, 7]
    assert numbers(drained(queue)) == [8, 20, 30]


def test_a_part_that_a_lane_gave_back_waits_again() -> None:
    """Whatever its camera's policy; where there is no room any more, it is the one that gives way."""
    queue = queue_of(20, cam1=Rules(policy="sample", sample_every=2, max_parts=3))
    for seq in range(2):
        assert queue.put(make_part(seq=seq)) == []
    again = make_part(seq=9)
    assert queue.put(again) == [again]
    assert queue.counts == {"queue_sample": 1}
    assert numbers(drained(queue)) == [0, 1]


def test_demand_is_told_by_camera() -> None:
    """The earliest deadline and the number of waiting parts of each camera, the most urgent first."""
    queue = queue_of()
    assert (queue.demand(), queue.earliest()) == ([], None)
    fill(queue, "a", 3, deadline=500)
    fill(queue, "b", 1, deadline=100)
    assert queue.demand() == [(100, 1), (500, 3)]
    assert queue.earliest() == (0, 100)


weights = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0, 10.0])


@given(
    st.lists(st.tuples(weights, st.integers(0, 9), st.integers(1, 1000)), min_size=1, max_size=6),
    st.integers(1, 200),
)
def test_who_always_waits_gets_its_share(cameras: list[tuple[float, int, int]], served: int) -> None:
    """Under pressure, by weight, but for fewer parts than there are cameras; whatever priorities and deadlines say."""
    rules = {f"cam{at}": Rules(weight, priority) for at, (weight, priority, _) in enumerate(cameras)}
    queue = PartQueue(ROOMY, rules)
    got: Counter[str] = Counter()
    for at, (_, _, deadline) in enumerate(cameras):
        for _ in range(2):
            queue.offer(make_part(f"cam{at}", deadline=deadline), 0)
    for _ in range(served):
        part = queue.turns(fair=True).serve()
        got[part.camera] += 1
        queue.offer(make_part(part.camera, deadline=part.deadline), 0)
    total = sum(weight for weight, _, _ in cameras)
    for name, each in rules.items():
        due = served * each.weight / total
        assert due - (len(cameras) - 1) - 1e-6 <= got[name] <= due + 1 + 1e-6


@given(st.lists(weights, min_size=1, max_size=6), st.integers(0, 60))
def test_who_sends_little_does_not_wait_long(floods: list[float], before: int) -> None:
    """A part of a camera that sent none lately has its turn, though all others have earlier deadlines, in so many."""
    rules = {f"flood{at}": Rules(weight) for at, weight in enumerate(floods)}
    queue = PartQueue(ROOMY, {**rules, "quiet": Rules(weight=1)})
    for name in rules:
        for seq in range(100):
            queue.offer(make_part(name, seq, deadline=seq), 0)
    for _ in range(before):
        queue.turns(fair=True).serve()
    queue.offer(make_part("quiet", deadline=1 << 40), 0)
    turns = queue.turns(fair=True)
    most = len(floods) * (1 + sum(floods)) + 1
    assert "quiet" in [turns.serve().camera for _ in range(math.ceil(most))]


def test_a_camera_is_not_owed_what_it_did_not_use() -> None:
    """One that comes back after a long rest shares from then on; it does not catch up at the others' cost."""
    queue = queue_of()
    fill(queue, "busy", 60)
    assert len([queue.turns(fair=True).serve() for _ in range(40)]) == 40
    fill(queue, "rested", 20, deadline=1)
    turns = queue.turns(fair=True)
    assert Counter(turns.serve().camera for _ in range(20)) == {"busy": 10, "rested": 10}


def test_virtual_time_goes_by_the_weights_of_those_that_wait() -> None:
    """A camera whose last part has left slows the others' clock no longer, within one batch already."""
    queue = queue_of(heavy=Rules(weight=8))
    queue.offer(make_part("heavy", deadline=1), 0)
    fill(queue, "a", 5)
    fill(queue, "b", 5)
    turns = queue.turns(fair=True)
    assert turns.serve().camera == "heavy"
    assert queue.virtual == pytest.approx(1 / 10)
    assert {turns.serve().camera for _ in range(2)} == {"a", "b"}
    assert queue.virtual == pytest.approx(1 / 10 + 1)


def test_the_higher_priority_goes_first_within_the_shares() -> None:
    """Under pressure: then the earliest deadline. It gets no more than its share by it."""
    queue = queue_of(high=Rules(priority=2), low=Rules(), other=Rules())
    for camera, deadlines in (("low", [1, 4]), ("other", [2, 3]), ("high", [50, 60])):
        for deadline in deadlines:
            queue.offer(make_part(camera, deadline, deadline=deadline), 0)
    assert numbers(drained(queue, fair=True)) == [50, 1, 2, 60, 3, 4]


def test_what_is_passed_over_is_not_at_its_cameras_expense() -> None:
    """A part that is given up has used no lane: its camera's share is still whole."""
    queue = queue_of()
    fill(queue, "a", 3, deadline=1)
    fill(queue, "b", 2, deadline=100)
    turns = queue.turns(fair=True)
    assert turns.pass_over().camera == "a"
    assert [turns.serve().camera for _ in range(4)] == ["a", "b", "a", "b"]


def test_rules_are_those_of_the_config() -> None:
    """A camera's own age limit counts before that of all; its count is that of all, but for ``wait``."""
    limits = Limits(queue_parts=7, queue_age_ms=40)
    plain = Rules.of(Camera(), limits)
    assert (plain.weight, plain.priority, plain.policy, plain.max_parts) == (1, 0, "drop_oldest", 7)
    assert (plain.age_ns, plain.budget_ns) == (40 * MS, 500 * MS)
    own = Rules.of(Camera(drop_policy="wait", queue_age_ms=0, weight=2, priority=3, deadline_ms=20), limits)
    assert (own.weight, own.priority, own.policy, own.max_parts) == (2, 3, "wait", 100_000)
    assert (own.age_ns, own.budget_ns) == (0, 20 * MS)


def test_the_tightest_budget_is_that_of_cameras_that_send() -> None:
    """A camera that never sends a part to this engine does not make its batches small."""
    queue = queue_of(a=Rules(budget_ns=50), b=Rules(budget_ns=20), c=Rules(budget_ns=1))
    queue.offer(make_part("a"), 0)
    queue.offer(make_part("b"), 0)
    assert queue.tightest == 20


RULES = {
    "oldest": Rules(max_parts=3, policy="drop_oldest"),
    "newest": Rules(weight=2, max_parts=3, policy="drop_newest"),
    "wait": Rules(priority=1, max_parts=100, policy="wait"),
    "sample": Rules(weight=0.5, sample_every=3, max_parts=4, policy="sample"),
    "aging": Rules(max_parts=4, age_ns=20),
}


class QueueMachine(RuleBasedStateMachine):
    """Any order of arrivals, answers, takes and looks at the clock, against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = PartQueue(100, RULES)
        self.waiting: list[Part] = []
        self.now = 0
        self.number = 0
        self.given_up = 0

    @rule(
        camera=st.sampled_from(sorted(RULES)),
        ahead=st.integers(0, 20),
        size=st.sampled_from([0, 10, 30, 60, 100, 101]),
        pressed=st.booleans(),
    )
    def offer(self, camera: str, ahead: int, size: int, pressed: bool) -> None:
        """A part comes; whoever is given up for it was waiting, or is the newcomer, and goes by the rules."""
        part = self._part(camera, ahead, size)
        for gone, reason in self.queue.offer(part, self.now, pressed=pressed):
            self._check(gone, reason, part)
            self.waiting.remove(gone)
            self.given_up += 1

    @rule(camera=st.sampled_from(sorted(RULES)), ahead=st.integers(0, 20), size=st.sampled_from([0, 40, 101]))
    def put(self, camera: str, ahead: int, size: int) -> None:
        """A lane gives a part back: it waits, or is the one that is given up."""
        part = self._part(camera, ahead, size)
        if refused := self.queue.put(part):
            assert refused == [part]
            self.waiting.remove(part)
            self.given_up += 1

    @rule(later=st.integers(1, 15))
    def advance(self, later: int) -> None:
        """Time goes by; parts past their deadlines are answered, as the ledger does."""
        self.now += later
        for part in self.waiting:
            if part.deadline < self.now:
                part.finding = ANSWERED

    @rule()
    def look_at_ages(self) -> None:
        """Exactly the parts that have waited too long are taken out, unless they are answered and gone already."""
        gone = self.queue.aged(self.now)
        assert all(self.now - part.arrival > 20 and part.camera == "aging" for part in gone)
        self.given_up += len(gone)
        self._left(gone)
        assert not [p for p in self.waiting if p.camera == "aging" and self.now - p.arrival > 20 and not p.finding]

    @rule(after=st.integers(0, 10))
    def look_at_deadlines(self, after: int) -> None:
        """Exactly the open parts that are due before a time are taken out."""
        when = self.now + after
        gone = self.queue.due_before(when)
        assert {p.seq for p in gone} == {p.seq for p in self.waiting if p.deadline < when and p.finding is None}
        self._left(gone)

    @precondition(lambda self: self.waiting)
    @rule(count=st.integers(1, 6), fair=st.booleans(), passing=st.booleans())
    def take(self, count: int, fair: bool, passing: bool) -> None:
        """A lane takes parts: open ones, each the earliest of its camera, and of all where there is no pressure."""
        turns = self.queue.turns(fair=fair)
        for _ in range(count):
            part = turns.peek()
            if part is None:
                assert all(each.finding for each in self.waiting)
                return
            assert (turns.pass_over() if passing else turns.serve()) is part
            rivals = [p for p in self.waiting if p.finding is None and (not fair or p.camera == part.camera)]
            assert part is min(rivals, key=lambda p: (p.deadline, p.seq))
            self._left([part])

    def _part(self, camera: str, ahead: int, size: int) -> Part:
        part = make_part(camera, self.number, deadline=self.now + ahead, size=size)
        part.arrival = self.now
        self.number += 1
        self.waiting.append(part)
        return part

    def _check(self, gone: Part, reason: Reason, newcomer: Part) -> None:
        rules, own = RULES[gone.camera], [p for p in self.waiting if p.camera == gone.camera and p is not newcomer]
        if reason is Reason.SAMPLED:
            assert (gone, rules.policy) == (newcomer, "sample")
        elif reason is Reason.INFEASIBLE:
            assert self.now - gone.arrival > rules.age_ns > 0
        elif gone is not newcomer:
            own = [p for p in own if p.finding is None] or own
            keeps = rules.policy in ("wait", "drop_newest")
            assert not (keeps and gone.camera == newcomer.camera)
            assert gone.finding or gone is own[-1 if keeps else 0]

    def _left(self, parts: list[Part]) -> None:
        for part in parts:
            self.waiting.remove(part)

    @invariant()
    def bounds_hold_and_counts_are_exact(self) -> None:
        """What the queue says of itself is so, and every part is where it should be, once."""
        inside = [entry[2] for line in self.queue._lines.values() for entry in line.parts.values()]
        gone = {p.seq for p in self.waiting} - {p.seq for p in inside}
        self.waiting = [p for p in self.waiting if p.seq not in gone or p.finding is None]  # answered, passed over
        assert sorted(numbers(inside)) == sorted(numbers(self.waiting))
        assert self.queue.waiting == len(inside)
        assert self.queue.bytes == sum(len(p.pixels) for p in inside) <= 100
        for camera, line in self.queue._lines.items():
            assert len(line.parts) <= RULES[camera].max_parts
            assert line.bytes == sum(entry[3] for entry in line.parts.values())
            assert len(line._heap) <= 2 * len(line.parts) + 64
        assert self.queue.counts.total() == self.given_up

    @invariant()
    def no_camera_is_far_from_its_share(self) -> None:
        """A camera with waiting parts is neither far ahead of virtual time nor far behind it."""
        for line in self.queue.waiting_lines():
            assert line.tag <= self.queue.virtual + 1 / line.rules.weight + 1e-9


TestAnyQueue = QueueMachine.TestCase
TestAnyQueue.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("waiting", [64, 4096])
def test_the_cost_of_a_part_hardly_grows_with_those_that_wait(waiting: int) -> None:
    """A part looks at few entries of the heap however many wait: comparisons are counted, not seconds."""

    class Counted(int):
        compared = 0

        def __lt__(self, other: int) -> bool:
            Counted.compared += 1
            return int(self) < int(other)

    queue = queue_of(cam1=Rules(max_parts=waiting))
    for seq in range(waiting):
        queue.offer(make_part(seq=seq, deadline=Counted(seq)), 0)
    Counted.compared = 0
    for seq in range(100):
        queue.turns(fair=True).serve()
        queue.offer(make_part(seq=seq, deadline=Counted(waiting + seq)), 0)
    assert Counted.compared <= 100 * 40
