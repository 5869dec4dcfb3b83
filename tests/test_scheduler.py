"""The scheduler: earliest deadline first, no part made late by its batch, nothing judged in vain."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.part_queue import PartQueue, Rules
from pipeline.parts import UNKNOWN, Part, Reason
from pipeline.scheduler import WELL_KNOWN, ExecutionTimes, Scheduler
from tests.support.books import MS, FakeClock, make_part

ROOMY = 1 << 30


def numbers(parts: list[Part]) -> list[int]:
    """The sequence numbers of parts."""
    return [part.seq for part in parts]


class Bench:
    """A scheduler with a clock that a test turns."""

    def __init__(self, max_batch: int = 8, *, batch_wait_ms: float = 0, **rules: Rules) -> None:
        self.clock = FakeClock(0)
        self.times = ExecutionTimes(max_batch)
        queue = PartQueue(ROOMY, rules)
        self.scheduler = Scheduler(queue, self.times, self.clock, batch_wait_ms=batch_wait_ms)

    def put(self, *deadlines: float, camera: str = "cam1") -> None:
        """Parts come, numbered from 0, due at these milliseconds; none is given up for them."""
        for seq, deadline in enumerate(deadlines):
            assert self.scheduler.offer(self.part(deadline, seq, camera)) == []

    def part(self, deadline: float, seq: int = 0, camera: str = "cam1") -> Part:
        """A part that comes now, due at this millisecond."""
        part = make_part(camera, seq, deadline=int(deadline * MS))
        part.arrival = self.clock()
        return part

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
    """With less time left than one part takes, parts of all cameras are told as hopeless and others are taken."""
    bench.put(9.9, 10, 50)
    bench.put(9.8, 60, camera="cam2")
    bench.learn(n1=10)
    assert bench.take() == ([1], [0, 0])
    assert bench.take() == ([2, 1], [])
    assert bench.scheduler.counts["queue_infeasible"] == 2


def test_a_part_that_comes_too_late_is_told_at_once(bench: Bench) -> None:
    """It does not wait for its turn only to be given up then, and nothing else is."""
    bench.learn(n1=10)
    part = bench.part(9.9)
    assert bench.scheduler.offer(part) == [(part, Reason.INFEASIBLE)]
    assert bench.scheduler.waiting == 0
    assert bench.scheduler.counts == {"queue_infeasible": 1}


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


def test_old_parts_of_a_crowd_do_not_make_batches_small() -> None:
    """Under pressure a flood's parts that are about to be late are given up, so that the others leave together."""
    bench = Bench()
    bench.learn(n1=5, n8=20)
    bench.put(*[12] * 3, *[100] * 7)
    bench.clock.advance(7)
    assert bench.take() == ([3, 4, 5, 6, 7, 8, 9], [0, 1, 2])


def test_urgent_parts_of_a_camera_that_sends_little_are_run() -> None:
    """Under pressure too: a batch is as small as they need it, though it could be full."""
    bench = Bench()
    bench.learn(n1=5, n8=20)
    bench.put(12, camera="calm")
    bench.put(*[40] * 20, camera="flood")
    bench.clock.advance(5)
    assert bench.scheduler._is_pressed(8, bench.clock())
    taken, hopeless = bench.scheduler.take(8, 0)
    assert "calm" in [part.camera for part in taken]
    assert bench.clock() + bench.times.estimate(len(taken)) <= 12 * MS
    assert hopeless == []


def test_an_urgent_part_is_not_taken_into_a_batch_that_is_too_long_for_it() -> None:
    """Where others have their turn before it, it leaves with the next lane, in a batch of its own length."""
    bench = Bench(high=Rules(priority=1), higher=Rules(priority=2))
    bench.learn(n1=5, n8=20)
    bench.put(100, 100, 100, camera="high")
    bench.put(100, 100, 100, camera="higher")
    bench.put(8, camera="urgent")
    bench.put(9, 9, camera="too")
    first, hopeless = bench.scheduler.take(8, 0)
    assert ([part.camera for part in first], hopeless) == (["higher", "high"], [])
    second, hopeless = bench.scheduler.take(8, 0)
    assert (second[0].camera, hopeless) == ("urgent", [])
    assert bench.times.estimate(len(second)) <= 8 * MS


def test_a_young_part_is_not_given_up_for_a_full_batch() -> None:
    """However long a full batch takes: what still has half of its time gets a batch as small as it needs."""
    bench = Bench()
    bench.learn(n1=5, n8=90)
    bench.put(*[20] * 6)
    batch, hopeless = bench.take()
    assert (len(batch) > 0, hopeless) == (True, [])


def test_pressure_that_is_over_samples_nothing() -> None:
    """When a lane has found that there is time for all, the next parts are inspected, a second after the last ones."""
    bench = Bench(cam1=Rules(policy="sample", sample_every=2))
    bench.learn(n1=5, n8=20)
    bench.put(8, 8, 8)
    bench.take()
    assert [len(bench.scheduler.offer(bench.part(9000, seq))) for seq in range(4)] == [0, 1, 0, 1]
    while bench.scheduler.waiting:
        bench.take()
    bench.take()
    bench.clock.advance(1001)
    bench.put(9000, 9000, 9000)


def test_a_batch_leaves_half_of_every_cameras_time() -> None:
    """A part that comes just after a batch has begun waits for all of it; it must still be in time then."""
    bench = Bench(fast=Rules(budget_ns=30 * MS), slow=Rules(budget_ns=900 * MS))
    bench.learn(n1=5, n4=14, n8=26)
    bench.put(*[900] * 8, camera="slow")
    assert len(bench.take()[0]) == 8
    bench.put(*[900] * 8, camera="slow")
    bench.put(900, camera="fast")
    assert len(bench.take()[0]) == 4


def test_a_size_that_is_too_slow_is_tried_again_some_day() -> None:
    """An estimate because of which a size is never run falls, a little each time, until it is run and learned anew."""
    bench = Bench(2, cam1=Rules(budget_ns=30 * MS))
    bench.learn(n1=10, n2=16)
    taken = []
    while len(taken) < 1000 and 2 not in taken:
        bench.put(900, 900)
        taken.append(len(bench.take(2)[0]))
        bench.take(2)
    assert 50 < len(taken) < 500


def test_a_slow_spell_does_not_end_inspection(bench: Bench) -> None:
    """An estimate above every deadline falls until parts are tried again: the line comes back by itself."""
    bench.learn(n1=2000)
    for attempt in range(1000):
        part = make_part(seq=attempt, deadline=bench.clock() + 100 * MS)
        if not bench.scheduler.offer(part):
            assert bench.take() == ([attempt], [])
            break
        bench.clock.advance(100)
    else:
        pytest.fail("no part was tried again")


def test_parts_that_are_already_waiting_end_a_slow_spell_too(bench: Bench) -> None:
    """A lane that finds nothing but hopeless parts doubts its estimate, as an arrival does."""
    bench.learn(n1=90)
    for _ in range(2):  # the first time, a batch has been run since the last doubt
        assert bench.times.shortest == 90 * MS
        bench.put(bench.clock() / MS + 91)
        bench.clock.advance(2)
        assert bench.take() == ([], [0])
    assert bench.times.shortest < 90 * MS


def test_hopeless_parts_of_one_camera_do_not_shake_what_others_teach(bench: Bench) -> None:
    """While batches are run the estimate is that of what was run, however many parts ask for less time."""
    for _ in range(300):
        bench.learn(n1=10)
        assert bench.scheduler.offer(bench.part(5)) != []
    assert bench.times.shortest == pytest.approx(10 * MS, rel=0.1)


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


def test_no_size_is_free_once_one_is_known() -> None:
    """Below the smallest that was run a batch takes as long, between two it is interpolated, above in proportion."""
    times = ExecutionTimes(8)
    assert [times.estimate(count) for count in range(9)] == [0] * 9
    times.observe(2, 10)
    assert [times.estimate(count) for count in range(9)] == [0, 10, 10, 15, 20, 25, 30, 35, 40]
    times.observe(6, 18)
    assert [times.estimate(count) for count in range(9)] == [0, 10, 10, 12, 14, 16, 18, 21, 24]
    assert times.shortest == 5


@given(st.dictionaries(st.integers(1, 16), st.integers(1, 10**9), min_size=1))
def test_estimates_lie_between_those_that_were_observed(observed: dict[int, int]) -> None:
    """Every size has an estimate, what was observed is kept, and no part is thought to take longer than any batch."""
    times = ExecutionTimes(16)
    for count, elapsed in observed.items():
        times.observe(count, elapsed)
    assert all(times.estimate(count) == elapsed for count, elapsed in observed.items())
    assert all(times.estimate(count) > 0 for count in range(1, 17))
    assert 0 < times.shortest <= min(observed.values())


def test_a_large_batch_is_bounded_by_well_known_small_ones() -> None:
    """An estimate from a slow spell does not stand when small batches show that it cannot be so."""
    times = ExecutionTimes(8)
    times.observe(8, 1000)
    times.observe(1, 10)
    assert times.estimate(8) == 1000
    for _ in range(WELL_KNOWN):
        times.observe(1, 10)
    assert times.estimate(8) < 120


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
    scheduler.offer(part)
    thread.join(20)
    assert not thread.is_alive()
    assert taken == [([part], [])]


def test_a_part_that_is_given_back_wakes_a_waiting_lane() -> None:
    """The engine that takes over gets what its predecessor had taken."""
    scheduler = Bench().scheduler
    thread, taken = waiting_lane(scheduler)
    part = make_part()
    assert scheduler.put(part) == []
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


def test_what_one_lane_leaves_wakes_another() -> None:
    """A lane that takes only some of what waits does not leave the others asleep beside it."""
    scheduler = Bench().scheduler
    thread, taken = waiting_lane(scheduler)
    deadline = time.monotonic() + 20
    while not scheduler._arrived._waiters and time.monotonic() < deadline:  # type: ignore[attr-defined]
        time.sleep(0.001)
    with scheduler._arrived:  # two parts come before the lane that waits is awake
        for seq in range(3):
            scheduler._queue.offer(make_part(seq=seq, deadline=seq + 1), 0)
    assert numbers(scheduler.take(2, 0)[0]) == [0, 1]
    thread.join(20)
    assert not thread.is_alive()
    assert numbers(taken[0][0]) == [2]


def test_nothing_is_taken_after_close(bench: Bench) -> None:
    """A closed scheduler hands out no work, though parts may still wait; their deadlines answer them."""
    bench.put(50, 60)
    bench.scheduler.close()
    assert bench.take() == ([], [])


def test_no_batch_waits_unless_it_is_told_to(bench: Bench) -> None:
    """By default an idle lane takes what is there."""
    bench.put(50)
    assert bench.scheduler.leaves_at(8) == 0


def test_a_batch_leaves_when_it_is_full_or_has_waited_or_would_be_late() -> None:
    """With a batching wait: whichever comes first."""
    bench = Bench(batch_wait_ms=10)
    assert bench.scheduler.leaves_at(2) == 0
    bench.clock.advance(3)
    bench.put(100)
    assert bench.scheduler.leaves_at(2) == 13 * MS
    bench.learn(n1=20, n2=90)
    assert bench.scheduler.leaves_at(2) == 10 * MS
    bench.put(100)
    assert bench.scheduler.leaves_at(2) == 0


def test_a_lane_waits_for_its_batch_to_fill() -> None:
    """It leaves with all its parts as soon as the last one comes; alone, after the wait."""
    bench = Bench(batch_wait_ms=1e6)  # the fake clock stands still: only a full batch can leave
    thread, taken = waiting_lane(bench.scheduler)
    bench.put(*[1e9] * 7)
    thread.join(0.05)
    assert thread.is_alive()
    bench.scheduler.offer(bench.part(1e9, 7))
    thread.join(20)
    assert not thread.is_alive()
    assert numbers(taken[0][0]) == list(range(8))
    real = Scheduler(PartQueue(ROOMY), ExecutionTimes(8), batch_wait_ms=20)
    part = make_part(deadline=time.monotonic_ns() + 60_000 * MS)
    part.arrival = time.monotonic_ns()
    real.offer(part)
    assert real.take(8, 0) == ([part], [])
    assert time.monotonic_ns() - part.arrival >= 20 * MS


def test_parts_that_have_waited_too_long_are_told_with_the_batch() -> None:
    """Those past the age limit are not run; they are no reason to doubt how long a part takes."""
    bench = Bench(cam1=Rules(age_ns=20 * MS))
    bench.learn(n1=10)
    bench.put(500)
    bench.clock.advance(21)
    assert bench.take() == ([], [0])
    assert bench.times.shortest == 10 * MS
    assert bench.scheduler.counts["queue_age"] == 1


CAMERAS = {
    "calm": Rules(priority=1, budget_ns=40 * MS),
    "flood": Rules(max_parts=12),
    "heavy": Rules(weight=4, policy="drop_newest", max_parts=6),
    "aging": Rules(age_ns=15 * MS, policy="wait", max_parts=100),
    "sampled": Rules(policy="sample", sample_every=3, max_parts=8),
}


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, batches, execution times, put-backs and deadlines."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock(0)
        self.queue = PartQueue(300, CAMERAS)
        self.scheduler = Scheduler(self.queue, ExecutionTimes(4), self.clock, lanes=2)
        self.waiting: dict[int, Part] = {}
        self.running: list[list[Part]] = []
        self.sent = self.judged = self.given_up = self.passed = 0

    @rule(camera=st.sampled_from(sorted(CAMERAS)), ahead=st.integers(1, 60), count=st.integers(1, 9))
    def offer(self, camera: str, ahead: int, count: int) -> None:
        """Parts come."""
        for _ in range(count):
            part = make_part(camera, self.sent, deadline=self.clock() + ahead * MS)
            part.arrival = self.clock()
            self.waiting[self.sent] = part
            self.sent += 1
            for gone, reason in self.scheduler.offer(part):
                assert reason in {Reason.OVERLOAD, Reason.SAMPLED, Reason.INFEASIBLE}
                self._give_up(gone)

    @rule(limit=st.integers(1, 4))
    def take(self, limit: int) -> None:
        """A lane takes a batch in which every part can be in time, and is told what cannot be."""
        now, times = self.clock(), self.scheduler.times
        estimates, shortest = [times.estimate(count) for count in range(5)], times.shortest
        batch, hopeless = self.scheduler.take(limit, 0)
        assert len(batch) <= limit
        assert all(now + estimates[len(batch)] <= part.deadline for part in batch) or len(batch) == 1
        self._check_order(batch)
        for part in hopeless:
            aged = part.arrival + (CAMERAS[part.camera].age_ns or now + 1) < now
            crowded = now + max(estimates) > part.deadline and now - part.arrival > part.deadline - now
            assert aged or crowded or part.deadline < now + shortest
            self._give_up(part)
        for part in batch:
            del self.waiting[part.seq]
        if batch:
            self.running.append(batch)

    @rule(took=st.integers(1, 40), back=st.booleans())
    def finish(self, took: int, back: bool) -> None:
        """A batch is run, or given back by an engine that has to stand by."""
        if not self.running:
            return
        batch = self.running.pop(0)
        if not back:
            self.scheduler.observe(len(batch), took * MS)
            self.judged += len(batch)
            return
        for part in batch:
            self.waiting[part.seq] = part
            for refused in self.scheduler.put(part):
                assert refused is part
                self._give_up(part)

    @rule(milliseconds=st.integers(1, 20))
    def advance(self, milliseconds: int) -> None:
        """Time goes by; the ledger answers parts whose deadline has come."""
        self.clock.advance(milliseconds)
        for part in self.waiting.values():
            if part.deadline <= self.clock() and part.finding is None:
                part.finding = UNKNOWN[Reason.DEADLINE]

    def _check_order(self, batch: list[Part]) -> None:
        for camera in {part.camera for part in batch}:
            own = [part for part in batch if part.camera == camera]
            assert [p.deadline for p in own] == sorted(p.deadline for p in own)
        if not self.scheduler._pressed:
            assert [p.deadline for p in batch] == sorted(p.deadline for p in batch)

    def _give_up(self, part: Part) -> None:
        del self.waiting[part.seq]
        self.given_up += 1

    @invariant()
    def nothing_is_lost_and_nothing_doubled(self) -> None:
        """Every part waits, runs, was judged, was given up, or was answered at its deadline and passed over: once."""
        self._reconcile()
        running = sum(map(len, self.running))
        assert self.sent == len(self.waiting) + running + self.judged + self.given_up + self.passed
        assert self.scheduler.counts.total() == self.given_up

    def _reconcile(self) -> None:
        inside = {entry[2].seq for line in self.queue._lines.values() for entry in line.parts.values()}
        assert inside <= set(self.waiting)
        for seq in set(self.waiting) - inside:
            assert self.waiting.pop(seq).finding is not None
            self.passed += 1

    @invariant()
    def bounds_hold(self) -> None:
        """In bytes, and in parts a camera."""
        self._reconcile()
        assert self.queue.bytes == 10 * len(self.waiting) <= 300
        assert self.scheduler.waiting == len(self.waiting)
        assert all(len(line.parts) <= CAMERAS[name].max_parts for name, line in self.queue._lines.items())

    def teardown(self) -> None:
        """In the end everything comes out."""
        for _ in range(400):
            if not self.scheduler.waiting:
                break
            self.take(4)
            self.nothing_is_lost_and_nothing_doubled()
            self.advance(1)
        assert self.scheduler.waiting == 0


TestAnySchedule = SchedulerMachine.TestCase
TestAnySchedule.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
