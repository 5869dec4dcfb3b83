"""Which parts go to which lane, and when: as many in time as can be, batches as large as time allows.

A lane that is free takes what is waiting, up to its batch size (work-conserving): under light load batches are of
one, under heavy load they grow by themselves. Waiting to fill a batch while a lane is idle delays every part of it,
and gains nothing in throughput: lanes are only short where parts wait anyway, and there batches fill. It pays in one
case: cameras that are triggered together send within a few milliseconds of each other. For them there is
``engine.batch_wait_ms``.

A part that can no longer be judged in time is given up at once, so that it does not make others late. While
everything that waits can be done before the earliest deadline of its camera, the order is plainly by deadline. Else
the line is under pressure, and cameras share it by weight: see :mod:`pipeline.part_queue`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

import numpy as np

from pipeline.part_queue import Drop, PartQueue, Turns
from pipeline.parts import Part, Reason

Clock = Callable[[], int]

WELL_KNOWN: Final = 32
"""Runs of a batch size after which its estimate says something of other sizes."""
RETRY: Final = 0.0005
"""Share by which the estimate of a size falls each time that the size is not run because of it."""
HEADROOM: Final = 1.25
"""How much longer than in proportion a larger batch may take."""


class ExecutionTimes:
    """How long a batch takes, decode to result, learned per batch size as a high quantile.

    Each batch moves its size's estimate by a share of itself, up fast or down slowly, so that it settles near the
    95th percentile and no outlier moves it far: stochastic approximation (Robbins and Monro, Ann. Math. Statist. 22,
    1951) of a quantile, in logarithms. A size is then bounded by smaller ones that are known well, as a batch takes
    hardly longer than the same parts in small batches one after the other; so an estimate from a slow spell does not
    keep its size from being run for ever. A size that was never run is not free: between two that were it is
    interpolated, above them in proportion, below them as long as the smallest one.

    Attributes:
        shortest: Nanoseconds that a part takes at least, however it is run; 0 while nothing is known.
    """

    def __init__(self, max_batch: int, quantile: float = 0.95, rate: float = 0.05) -> None:
        self._observed: list[float] = [0.0] * (max_batch + 1)
        self._table = self._observed
        self._runs = [0] * (max_batch + 1)
        self._up, self._down = 1 + rate * quantile, 1 - rate * (1 - quantile)
        self._doubt = 1 - rate
        self.shortest = 0.0

    def observe(self, count: int, elapsed: int) -> None:
        """Learn that a batch of ``count`` took ``elapsed`` nanoseconds."""
        estimate = self._observed[count]
        step = self._up if elapsed > estimate else self._down
        self._observed[count] = estimate * step if estimate else float(elapsed)
        self._runs[count] += 1
        self._tabulate()

    def doubt(self) -> None:
        """Lower the estimate because of which nothing is run, and so nothing learned, until something is."""
        self._observed[1] = self.shortest * self._doubt
        self._tabulate()

    def retry(self, count: int) -> None:
        """Lower a little the estimate because of which no batch of ``count`` is run, so that one is some day."""
        self._observed[count] = self._table[count] * (1 - RETRY)
        self._tabulate()

    def estimate(self, count: int) -> float:
        """Nanoseconds that a batch of ``count`` will take; 0 while nothing is known."""
        return self._table[count]

    def _tabulate(self) -> None:
        """Bound the sizes that were run, and fill in the others."""
        known = [count for count, observed in enumerate(self._observed) if observed]
        bounded, each = [], float("inf")
        for count in known:
            bounded.append(min(self._observed[count], count * each))
            if self._runs[count] >= WELL_KNOWN:
                each = min(each, HEADROOM * self._observed[count] / count)
        counts = np.arange(len(self._observed))
        table = np.interp(counts, known, bounded)
        table[known[-1] :] = counts[known[-1] :] * bounded[-1] / known[-1]
        table[0] = 0
        self._table = table.tolist()
        self.shortest = min(self._observed[1] or bounded[0] / known[0], *bounded)


class Scheduler:
    """Hands waiting parts to whichever lane asks. Thread-safe; no lock is held while a lane waits.

    Args:
        queue: The waiting parts.
        times: Execution times of this engine.
        clock: Monotonic nanoseconds.
        lanes: How many lanes there are.
        batch_wait_ms: Longest that an idle lane waits for more parts; 0 takes what is there.
    """

    def __init__(
        self,
        queue: PartQueue,
        times: ExecutionTimes,
        clock: Clock = time.monotonic_ns,
        *,
        lanes: int = 1,
        batch_wait_ms: float = 0.0,
    ) -> None:
        self._queue, self.times, self._clock = queue, times, clock
        self._lanes, self._batch_wait = lanes, int(batch_wait_ms * 1e6)
        self._arrived = threading.Condition()
        self._closed = False
        self._pressed = False
        self._learned = False

    @property
    def waiting(self) -> int:
        """Parts in the queue."""
        return self._queue.waiting

    @property
    def counts(self) -> Counter[str]:
        """Parts that were given up, by what made them give way."""
        return self._queue.counts

    def offer(self, part: Part) -> list[Drop]:
        """Queue a newcomer by its camera's policy.

        Returns:
            The parts that are given up, the newcomer itself perhaps, each with its reason.
        """
        now = self._clock()
        with self._arrived:
            if part.deadline < now + self.times.shortest:
                self._give_up([part], now)
                return [Drop(part, Reason.INFEASIBLE)]
            dropped = self._queue.offer(part, now, pressed=self._pressed)
            self._arrived.notify()
        return dropped

    def put(self, part: Part) -> list[Part]:
        """Queue a part again that a lane gave back; return it where there is no room."""
        with self._arrived:
            refused = self._queue.put(part)
            self._arrived.notify()
        return refused

    def take(self, limit: int, timeout: float) -> tuple[list[Part], list[Part]]:
        """Wait for work and take a batch.

        Args:
            limit: Most parts to take.
            timeout: Seconds to wait for the first part.

        Returns:
            The batch, and the parts that are past saving or have waited too long. Both are empty on timeout and
            after :meth:`close`.
        """
        with self._arrived:
            if not self._queue.waiting and not self._closed:
                self._arrived.wait(timeout)
            while not self._closed and (pause := self.leaves_at(limit) - self._clock()) > 0:
                self._arrived.wait(pause / 1e9)
            if self._closed:
                return [], []
            taken = self._fill(limit)
            if self._queue.waiting:  # this lane may have been woken in the place of another
                self._arrived.notify()
            return taken

    def leaves_at(self, limit: int) -> int:
        """When the next batch leaves, in monotonic nanoseconds; 0 is at once.

        That is when it is full, when its first part has waited ``batch_wait_ms``, or when waiting longer would
        make its most urgent part late.
        """
        if not self._batch_wait or self._queue.waiting >= limit:
            return 0
        earliest = self._queue.earliest()
        if earliest is None:
            return 0
        arrival, deadline = earliest
        return min(arrival + self._batch_wait, int(deadline - self.times.estimate(self._queue.waiting + 1)))

    def observe(self, count: int, elapsed: int) -> None:
        """Learn from a batch that was run."""
        with self._arrived:
            self._learned = True
            self.times.observe(count, elapsed)

    def close(self) -> None:
        """Wake every waiting lane."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()

    def _fill(self, limit: int) -> tuple[list[Part], list[Part]]:
        now = self._clock()
        aged = self._queue.aged(now)
        hopeless = self._queue.due_before(int(now + self.times.shortest))
        most, limit = limit, self._largest(limit)
        if limit < min(most, self._queue.waiting):
            self.times.retry(limit + 1)
        self._pressed = self._is_pressed(limit, now)
        batch = self._batch(limit, now, hopeless)
        if not batch:
            self._give_up(hopeless, now)
        else:
            self._queue.counts["queue_infeasible"] += len(hopeless)
        return batch, aged + hopeless

    def _largest(self, limit: int) -> int:
        """The largest batch after which a part that came when it began can still be judged in a batch as large.

        A lane is not interrupted, so a batch must not take more than half of any camera's time.
        """
        while limit > 1 and 2 * self.times.estimate(limit) > self._queue.tightest:
            limit -= 1
        return limit

    def _batch(self, limit: int, now: int, hopeless: list[Part]) -> list[Part]:
        """Hand out a batch; what would hold up the others is added to ``hopeless``."""
        batch: list[Part] = []
        estimate, wanted = self.times.estimate, min(limit, self._queue.waiting)
        turns = self._queue.turns(fair=self._pressed)
        while len(batch) < wanted and (part := turns.peek()) is not None:
            slack = part.deadline - now
            if self._holds_up(part, slack, wanted, turns):
                hopeless.append(turns.pass_over())
                continue
            if batch and estimate(len(batch) + 1) > slack:
                break  # it is first in the next lane's batch
            batch.append(turns.serve())
            # No part may be made late by those that leave with it.
            while wanted > len(batch) and estimate(wanted) > slack:
                wanted -= 1
        return batch

    def _holds_up(self, part: Part, slack: int, wanted: int, turns: Turns) -> bool:
        """Whether a part would only make a batch small: one camera's old parts must not cost all the others' time.

        Under sustained overload the earliest deadline is always about to pass. To run such parts, each in a batch
        of its own, would cost most of the throughput. A camera that sends no more than its share has few parts
        waiting, and its urgent part is run; so is any that still has half of its time.
        """
        if not self._pressed or not turns.crowded():
            return False
        return slack < min(self.times.estimate(wanted), (part.deadline - part.arrival) / 2)

    def _is_pressed(self, limit: int, now: int) -> bool:
        """Whether what waits may not all be done in time, each camera's before its earliest deadline."""
        full = self.times.estimate(limit)
        each, ahead = full / (limit * self._lanes), 0
        for deadline, count in self._queue.demand():
            ahead += count
            needed = self.times.estimate(ahead) if ahead <= limit else full + (ahead - limit) * each
            if now + needed > deadline:
                return True
        return False

    def _give_up(self, hopeless: list[Part], now: int) -> None:
        """Count parts for which there is no time; where nothing was run since the last ones, doubt the estimate."""
        self._queue.counts["queue_infeasible"] += len(hopeless)
        if not any(part.deadline > now for part in hopeless):
            return
        if self._learned:
            self._learned = False
        else:
            self.times.doubt()
