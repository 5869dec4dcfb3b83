"""The scheduler: earliest deadline first, no batch that makes its first part late, nothing judged in vain."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.parts import UNKNOWN, Part, Reason
from pipeline.scheduler import ExecutionTimes, PartQueue, Scheduler
from tests.support.books import MS, FakeClock, make_part

ROOMY = 1 << 30
ANSWERED = UNKNOWN[Reason.DEADLINE]


def numbers(parts: list[Part]) -> list[int]:
    """The sequence numbers of parts."""
    return [part.seq for part in parts]


def drained(queue: PartQueue) -> list[int]:
    """Take all there is."""
    parts = []
    while (part := queue.pop()) is not None:
        parts.append(part)
    return numbers(parts)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5))))
def test_the_earliest_deadline_comes_first(arrivals: list[tuple[str, int]]) -> None:
    """Parts leave by deadline, those with the same deadline as they came, whatever their cameras."""
    queue = PartQueue(100, ROOMY)
    for number, (camera, deadline) in enumerate(arrivals):
        assert queue.put(make_part(camera, number, deadline=deadline)) == []
    wanted = sorted(range(len(arrivals)), key=lambda number: (arrivals[number][1], number))
    assert drained(queue) == wanted
    assert (queue.waiting, queue.bytes) == (0, 0)


def test_a_full_line_gives_up_its_own_oldest_part() -> None:
    """The camera that sends too much loses its oldest part; another camera loses nothing."""
    queue = PartQueue(2, ROOMY)
    other = make_part("other", 9, deadline=1)
    queue.put(other)
    parts = [make_part("busy", seq, deadline=100 + seq) for seq in range(4)]
    assert [queue.put(part) for part in parts] == [[], [], [parts[0]], [parts[1]]]
    assert drained(queue) == [9, 2, 3]


def test_the_bound_in_bytes_is_kept_at_the_newcomers_cost() -> None:
    """Oldest parts of the newcomer's camera give way until it fits; another camera's never do."""
    queue = PartQueue(100, 100)
    queue.put(make_part("other", 9, size=40, deadline=1))
    parts = [make_part("busy", seq, size=20, deadline=1000 + seq) for seq in range(3)]
    assert [queue.put(part) for part in parts] == [[], [], []]
    big = make_part("busy", 3, size=50, deadline=2000)
    assert queue.put(big) == parts
    assert (queue.bytes, drained(queue)) == (90, [9, 3])


def test_a_part_that_fits_nowhere_gives_way_itself() -> None:
    """Where other cameras' parts fill the bytes, the newcomer and its elders are told to the caller."""
    queue = PartQueue(100, 100)
    queue.put(make_part("other", 9, size=80))
    old, new = make_part("busy", 0, size=20), make_part("busy", 1, size=30)
    queue.put(old)
    assert queue.put(new) == [old, new]
    assert (queue.waiting, queue.bytes) == (1, 80)


def test_answered_parts_are_passed_over() -> None:
    """A part that has its verdict, as one whose deadline has passed, is not taken to a lane."""
    queue = PartQueue(100, ROOMY)
    parts = [make_part(seq=seq, deadline=seq) for seq in range(4)]
    for part in parts:
        queue.put(part)
    parts[0].finding = parts[2].finding = ANSWERED
    assert drained(queue) == [1, 3]
    assert (queue.waiting, queue.bytes) == (0, 0)


def test_parts_that_have_left_do_not_count_against_their_camera() -> None:
    """A camera of mixed deadlines has its whole bound for the parts that still wait."""
    queue = PartQueue(3, ROOMY)
    queue.put(make_part(seq=0, deadline=900))
    for seq in range(1, 50):
        assert queue.put(make_part(seq=seq, deadline=seq)) == []
        taken = queue.pop()
        assert taken is not None
        assert taken.seq == seq
    assert drained(queue) == [0]


def test_a_queue_that_nobody_empties_stays_small() -> None:
    """With every lane out of order, memory does not grow with the parts that come and give way."""
    queue = PartQueue(4, ROOMY)
    queue.put(make_part("quiet", 0, deadline=0))
    for seq in range(5000):
        queue.put(make_part("busy", seq, deadline=1 + seq))
    assert queue.waiting == 5
    assert len(queue._heap) < 200
    assert drained(queue) == [0, 4996, 4997, 4998, 4999]


class QueueMachine(RuleBasedStateMachine):
    """Any order of arrivals, answers and takes, against a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = PartQueue(3, 100)
        self.waiting: list[Part] = []
        self.number = 0

    @rule(camera=st.sampled_from("ab"), deadline=st.integers(0, 20), size=st.sampled_from([0, 10, 30, 60, 100, 101]))
    def put(self, camera: str, deadline: int, size: int) -> None:
        """A part comes."""
        part = make_part(camera, self.number, deadline=deadline, size=size)
        self.number += 1
        gone = []
        own = [p for p in self.waiting if p.camera == camera]
        while own and (len(own) >= 3 or self._bytes() + size > 100):
            gone.append(own.pop(0))
            self.waiting.remove(gone[-1])
        if self._bytes() + size > 100:
            gone.append(part)
        else:
            self.waiting.append(part)
        assert self.queue.put(part) == gone

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        """A waiting part's deadline passes."""
        if self.waiting:
            data.draw(st.sampled_from(self.waiting)).finding = ANSWERED

    @rule()
    def pop(self) -> None:
        """A lane takes a part."""
        taken = self.queue.pop()
        for part in sorted(self.waiting, key=lambda p: (p.deadline, p.seq)):
            self.waiting.remove(part)
            if part.finding is None:
                assert taken is part
                return
        assert taken is None

    def _bytes(self) -> int:
        return sum(len(part.pixels) for part in self.waiting)

    @invariant()
    def counts_are_those_of_what_waits(self) -> None:
        """The queue counts what is in it, and keeps little more."""
        assert (self.queue.waiting, self.queue.bytes) == (len(self.waiting), self._bytes())
        assert len(self.queue._heap) <= 2 * len(self.waiting) + 64


TestAnyQueue = QueueMachine.TestCase
TestAnyQueue.settings = settings(max_examples=100, stateful_step_count=40)


class Bench:
    """A scheduler with a clock that a test turns."""

    def __init__(self, max_batch: int = 8) -> None:
        self.clock = FakeClock(0)
        self.times = ExecutionTimes(max_batch)
        self.scheduler = Scheduler(PartQueue(100, ROOMY), self.times, self.clock)

    def put(self, *deadlines: float) -> None:
        """Parts come, numbered from 0, due at these milliseconds."""
        for seq, deadline in enumerate(deadlines):
            self.scheduler.put(make_part(seq=seq, deadline=int(deadline * MS)))

    def learn(self, **milliseconds: float) -> None:
        """Batches of ``n1``, ``n2``, ... parts took so long."""
        for name, took in milliseconds.items():
            self.scheduler.observe(int(name[1:]), int(took * MS))

    def take(self, limit: int = 8) -> tuple[list[int], list[int]]:
        """Take a batch without waiting."""
        batch, hopeless = self.scheduler.take(limit, 0)
        return numbers(batch), numbers(hopeless)


@pytest.fixture
def bench() -> Bench:
    """A scheduler of this test's own."""
    return Bench()


def test_a_free_lane_takes_all_that_waits_up_to_its_size(bench: Bench) -> None:
    """Batches grow by themselves: what is there is taken, earliest first, and no lane waits for more."""
    bench.put(50, 30, 40)
    assert bench.take(2) == ([1, 2], [])
    assert bench.take(2) == ([0], [])
    assert bench.take(2) == ([], [])
    assert bench.scheduler.waiting == 0


def test_a_part_that_cannot_be_judged_in_time_is_given_up(bench: Bench) -> None:
    """With less time left than one part takes, a part is told as hopeless and the next one is taken."""
    bench.learn(n1=10)
    bench.put(9.9, 10, 50)
    assert bench.take() == ([1, 2], [0])


def test_nothing_is_hopeless_while_no_time_is_known(bench: Bench) -> None:
    """Before the first batch has been run, every part that is not yet due is tried."""
    bench.put(0.001)
    assert bench.take() == ([0], [])


def test_a_batch_is_small_enough_for_its_first_part(bench: Bench) -> None:
    """The largest batch that is done by the first deadline is taken; the others wait for the next lane."""
    bench.learn(n1=5, n2=9, n3=13, n4=17)
    bench.put(13, 90, 90, 90)
    assert bench.take() == ([0, 1, 2], [])
    assert bench.take() == ([3], [])


def test_a_batch_may_be_of_one_where_time_is_short(bench: Bench) -> None:
    """A part with room for itself alone is run alone."""
    bench.learn(n1=5, n2=9, n3=13)
    bench.put(6, 90, 90)
    assert bench.take() == ([0], [])


def test_a_slow_spell_does_not_end_inspection(bench: Bench) -> None:
    """An estimate above every deadline falls until parts are tried again: the line comes back by itself."""
    bench.learn(n1=2000)
    for attempt in range(1000):
        bench.scheduler.put(make_part(seq=attempt, deadline=bench.clock() + 100 * MS))
        batch, hopeless = bench.scheduler.take(8, 0)
        assert len(batch) + len(hopeless) == 1
        if batch:
            break
        bench.clock.advance(100)
    else:
        pytest.fail("no part was tried again")


def test_a_single_outlier_moves_an_estimate_little(bench: Bench) -> None:
    """A hiccup of a hundred times the usual does not make the line give up parts that it can judge."""
    bench.learn(n1=10)
    bench.learn(n1=1000)
    assert bench.times.estimate(1) < 11 * MS


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
def test_estimates_settle_near_the_95th_percentile(seed: int, spread: float) -> None:
    """Whatever the shape, about one batch in twenty takes longer than estimated; a bad first one is forgotten."""
    durations = 20 * MS * np.random.default_rng(seed).lognormal(0, spread, 20_000)
    times = ExecutionTimes(1)
    times.observe(1, 500 * MS)
    exceeded = []
    for took in durations:
        exceeded.append(took > times.estimate(1))
        times.observe(1, int(took))
    assert 0.03 < np.mean(exceeded[5000:]) < 0.07


def test_each_batch_size_is_learned_for_itself() -> None:
    """What is known of one size says nothing of one that was never run."""
    times = ExecutionTimes(4)
    times.observe(2, 7)
    assert [times.estimate(count) for count in range(5)] == [0, 0, 7, 0, 0]


def test_an_idle_lane_waits_and_goes_on() -> None:
    """With nothing to do, take comes back empty after its time."""
    assert Bench().scheduler.take(8, 0.01) == ([], [])


def waiting_lane(scheduler: Scheduler) -> tuple[threading.Thread, list[tuple[list[Part], list[Part]]]]:
    """A thread that waits for a batch for an hour."""
    taken: list[tuple[list[Part], list[Part]]] = []
    thread = threading.Thread(target=lambda: taken.append(scheduler.take(8, 3600)), daemon=True)
    thread.start()
    return thread, taken


def test_a_part_wakes_a_waiting_lane() -> None:
    """A lane that waits gets a part as soon as it comes."""
    scheduler = Bench().scheduler
    thread, taken = waiting_lane(scheduler)
    part = make_part()
    scheduler.put(part)
    thread.join(20)
    assert not thread.is_alive()
    assert taken == [([part], [])]


def test_close_wakes_a_waiting_lane() -> None:
    """A lane that waits when the line stops ends at once, with nothing."""
    scheduler = Bench().scheduler
    thread, taken = waiting_lane(scheduler)
    scheduler.close()
    thread.join(20)
    assert not thread.is_alive()
    assert taken == [([], [])]


def test_nothing_is_taken_after_close(bench: Bench) -> None:
    """A closed scheduler hands out no work, though parts may still wait; their deadlines answer them."""
    bench.put(50, 60)
    bench.scheduler.close()
    assert bench.take() == ([], [])
