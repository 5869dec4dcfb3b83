"""The publisher: verdicts to Redis, rejects first; to disk where Redis does not take them, and back.

One thread owns the Redis client and the spools. Nothing else in the line ever waits for Redis.

There are three outlets, each in order, each with a spool: rejects, then records, then pictures. None is served while
something waits in one before it. So a reject is never behind its record, new rejects overtake an old backlog of
records, and pictures wait for everything.

Exactly once: every record has an explicit stream id that was fixed when the record was made; see ``sender.py``.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final

import redis
import structlog

from pipeline.config import Redis as RedisSettings
from pipeline.entries import Entry, Maker
from pipeline.outlet import Outlet, Spools
from pipeline.parts import Finding, Part
from pipeline.records import Keys
from pipeline.redis_client import Gate
from pipeline.refusals import is_final, remedy_of
from pipeline.sender import Sender

log = structlog.get_logger(__name__)

RETRY_S: Final = (0.05, 1.0)
"""First and longest pause between attempts to reach a lost Redis."""
MOST_PARTS: Final = 100_000
"""Parts that may wait for this thread; only a disk that hangs makes so many of them wait."""
MOST_PIXELS: Final = 64 << 20
"""Bytes of frames that may wait to become pictures."""
MOST_PICTURES: Final = 1024
"""Parts that may wait to become pictures."""
AT_ONCE: Final = 1024
PICTURE_RETRY_S: Final = 5.0
PICTURE_TRIES: Final = 5
"""After so many connections that ended with the same picture it is given up."""
STOP_S: Final = 3.0
"""So long a stop goes on sending what waits on disk."""
QUIET_S: Final = 1.0
"""Shortest time between two lines in the log about lost records."""


class Publisher:
    """Takes answered parts from the ledger and publishes them.

    Args:
        client: A Redis client of its own, with short timeouts and no retries.
        keys: Names of this line's keys.
        settings: ``[redis]``.
        maker: Makes entries of parts.
        spools: Where records wait; this thread owns them from :meth:`run` on.
        health: Fields of the heartbeat, asked for once a period; None while the line is stuck, so that the
            heartbeat lapses.
        gate: Told of each new connection of the client; without one, what a failover loses is not noticed.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        settings: RedisSettings,
        maker: Maker,
        spools: Spools,
        health: Callable[[], dict[str, str] | None],
        gate: Gate | None = None,
    ) -> None:
        self._client, self._keys, self._settings, self._spools = client, keys, settings, spools
        self._make = maker
        self._health = health
        self.counts: Counter[str] = Counter()
        self._sender = Sender(client, maker, self.counts, settings.resend_records, gate)
        self._rejects: deque[Part] = deque()
        self._records: deque[Part] = deque()
        self._late: deque[tuple[Part, Finding]] = deque()
        self._pictures: deque[Part] = deque()
        self._pixels_in = self._pixels_out = self._picture_tries = 0
        self._wake = threading.Event()
        self._stopping = False
        self.connected = True
        self._retry_at = self._picture_retry_at = 0.0
        self._pause = RETRY_S[0]
        self._next_beat = self._next_loss = 0.0
        self._lost_since = self._overflowed = self._overflows_seen = 0
        self.beat = 0

    # The ledger's outbox: called under its lock, so these only append. What does not fit is counted, not waited for.

    def reject(self, part: Part) -> None:
        """Take a reject; it goes out before anything else."""
        self._take(self._rejects, part)

    def record(self, part: Part) -> None:
        """Take a part in its camera's order."""
        if part.pixels is not None:
            room = len(self._records) < MOST_PARTS and self._pixels_in - self._pixels_out < MOST_PIXELS
            if room and self._make.keeps_pictures(part):
                self._pixels_in += len(part.pixels)
            else:
                part.pixels = None
        self._take(self._records, part)

    def late(self, part: Part, finding: Finding) -> None:
        """Take a result that came too late."""
        self._take(self._late, (part, finding))

    def _take(self, queue: deque[Any], item: Any) -> None:
        if len(queue) < MOST_PARTS:
            queue.append(item)
        else:
            self._overflowed += 1
        self._wake.set()

    # The publisher's thread.

    def run(self) -> None:
        """Publish until :meth:`stop`, then publish or spool what is left."""
        period = min(self._settings.heartbeat_ms / 1000, 0.25)
        while not self._stopping:
            self._wake.wait(min(self._pause, period) if self._spools else period)
            self._wake.clear()
            self._cycle()
        self._retry_at = self._picture_retry_at = 0.0
        self._cycle(until=time.monotonic() + STOP_S)
        self._end()

    def stop(self) -> None:
        """Ask the thread to end. What Redis does not take by then stays in the spool."""
        self._stopping = True
        self._wake.set()

    def backlog(self) -> int:
        """Parts that were answered and are neither published nor spooled."""
        return len(self._rejects) + len(self._records)

    def _cycle(self, until: float = math.inf) -> None:
        """Do what there is to do, until a stop is asked for: new parts first, between any two steps of what waits."""
        while True:
            self._beat_heart()
            self._take_in()
            for outlet in self._spools.all:
                outlet.settle()
            told_to_stop = self._stopping and until == math.inf
            if told_to_stop or time.monotonic() >= until or not (self._replay_one() or self._picture_one()):
                return

    def _take_in(self) -> None:
        """Publish or store all new parts."""
        if self._overflowed != self._overflows_seen:
            self._overflows_seen, count = self._overflowed, self._overflowed - self._overflows_seen
            self._lose(count)
        while self._rejects or self._records or self._late:
            # Records are taken first, rejects sent first: no record may go out before its part's reject.
            records, late = _drain(self._records, AT_ONCE), _drain(self._late, AT_ONCE)
            rejects = _drain(self._rejects, MOST_PARTS)
            self._deliver(self._spools.rejects, [entry for part in rejects for entry in self._make.reject(part)])
            self._deliver(self._spools.records, [entry for part in records for entry in self._make.record(part)])
            now = time.monotonic_ns()
            for part in records:
                part.published = now
            self._deliver(self._spools.records, [self._make.late(part, finding) for part, finding in late])
            self._pictures += (part for part in records if self._make.keeps_pictures(part))
            while len(self._pictures) > MOST_PICTURES:
                self._release(self._pictures.popleft())
                self.counts["pictures_lost"] += 1
            self._beat_heart()

    def _deliver(self, outlet: Outlet, entries: list[Entry]) -> None:
        """Send entries where nothing waits before them, else put them behind it."""
        if entries and (self._is_blocked(outlet) or not self._attempt(lambda: self._sender.send(entries))):
            self._store(outlet, entries)

    def _is_blocked(self, outlet: Outlet) -> bool:
        waits = bool(outlet) or (outlet is self._spools.records and bool(self._spools.rejects))
        return waits or (not self.connected and time.monotonic() < self._retry_at)

    def _store(self, outlet: Outlet, entries: list[Entry]) -> None:
        lost = outlet.put(entries)
        self.counts["spooled"] += len(entries) - lost
        if lost:
            self._lose(lost)

    def _lose(self, count: int) -> None:
        self.counts["lost"] += count
        self._lost_since += count
        if time.monotonic() >= self._next_loss:
            self._next_loss = time.monotonic() + QUIET_S
            remedy = "bring Redis back; free the disk or raise spool.max_bytes"
            log.error("records_lost", count=self._lost_since, remedy=remedy)
            self._lost_since = 0

    def _replay_one(self) -> bool:
        """Send the oldest batch that waits; say whether that went well and another may follow."""
        outlet = self._spools.rejects or self._spools.records
        if not outlet or (not self.connected and time.monotonic() < self._retry_at):
            return False
        entries = outlet.head()
        if entries is not None:
            if not self._attempt(lambda: self._sender.send(entries, doubt=True)):
                return False
            outlet.done()
            self.counts["replayed"] += len(entries)
        if not self._spools.rejects and not self._spools.records:
            log.info("spool_replayed")
        return True

    def _picture_one(self) -> bool:
        """Make and send, or send, or store one picture; say whether there was one and all went well."""
        outlet, waits = self._spools.pictures, bool(self._spools.rejects or self._spools.records)
        blocked = waits or not self.connected or time.monotonic() < self._picture_retry_at
        if self._pictures:
            part = self._pictures.popleft()
            entries = self._make.pictures(part)
            self._release(part)
            if outlet or blocked or not self._send_pictures(entries):
                self.counts["pictures_lost"] += outlet.put(entries)
            return True
        if blocked or not outlet:
            return False
        stored = outlet.head()
        if stored is None:
            return True
        if not self._send_pictures(stored):
            if self._picture_tries < PICTURE_TRIES:
                return False
            self.counts["pictures_lost"] += len(stored)
        self._picture_tries = 0
        outlet.done()
        return True

    def _release(self, part: Part) -> None:
        """The frame has served."""
        if part.pixels is not None:
            self._pixels_out += len(part.pixels)
            part.pixels = None

    def _send_pictures(self, entries: list[Entry]) -> bool:
        for entry in entries:
            commands = self._make.picture_commands(entry)
            if not commands:
                self.counts["pictures_lost"] += 1
                continue
            try:
                self._sender.store(commands)
            except redis.ResponseError as error:  # the records may get through all the same
                if not is_final(error):
                    self._picture_retry_at = time.monotonic() + RETRY_S[1]
                    return False
                self.counts["pictures_lost"] += 1
            except redis.RedisError as error:  # perhaps because it is large: records must not suffer from it again
                self._picture_retry_at = time.monotonic() + PICTURE_RETRY_S
                self._picture_tries += 1
                self._failed(error)
                return False
            else:
                self.counts["pictures"] += 1
        return True

    def _end(self) -> None:
        """Leave nothing in memory that the disk can hold; take the heartbeat away."""
        while self._pictures:
            part = self._pictures.popleft()
            self.counts["pictures_lost"] += self._spools.pictures.put(self._make.pictures(part))
        for outlet in (self._spools.rejects, self._spools.records):
            outlet.settle(at_once=True)
            if left := outlet.in_memory():
                self._next_loss = 0.0
                self._lose(left)
        self._beat_heart(last=True)

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Do something with Redis; say whether it worked, and pace the next attempt where it did not."""
        try:
            action()
        except redis.RedisError as error:
            self._failed(error)
            return False
        if not self.connected:
            log.info("redis_back")
        self.connected, self._pause = True, RETRY_S[0]
        return True

    def _failed(self, error: redis.RedisError) -> None:
        if self.connected:
            log.warning("redis_lost", error=str(error), remedy=remedy_of(error))
        self.connected = False
        self.counts["redis_failures"] += 1
        self._retry_at = time.monotonic() + self._pause
        self._pause = min(self._pause * 2, RETRY_S[1])
        # Another server may be the right one by now; so the next attempt begins with a new connection.
        self._client.connection_pool.disconnect()
        self._sender.distrust()

    def _beat_heart(self, *, last: bool = False) -> None:
        """Show that this thread lives; once a period, show Redis that the line does.

        While a reject waits there is no heartbeat: a PLC must not believe that it knows of all of them.
        """
        self.beat = time.monotonic_ns()
        if last:
            self._attempt(lambda: self._send_heartbeat(last=True))
            return
        waits = bool(self._spools.rejects or self._spools.records)
        if self._spools.rejects or (not self.connected and (waits or time.monotonic() < self._retry_at)):
            return
        if self._beat_is_due():
            self._attempt(self._renew)

    def _renew(self) -> None:
        """The heartbeat of a line that is idle is what notices a failover."""
        self._sender.verify()
        self._send_heartbeat()

    def _beat_is_due(self) -> bool:
        now = time.monotonic()
        if now < self._next_beat:
            return False
        self._next_beat = now + self._settings.heartbeat_ms / 1000
        return True

    def _send_heartbeat(self, *, last: bool = False) -> None:
        """Renew the heartbeat; take it away at the end. While the line is stuck, leave it to lapse."""
        if last:
            self._client.delete(self._keys.heartbeat)
            return
        fields = self._health()
        if fields is None:
            return
        self.counts["heartbeats"] += 1
        beat: Any = {
            **fields,
            "counter": str(self.counts["heartbeats"]),
            "period_ms": str(self._settings.heartbeat_ms),
            "t_ns": str(time.time_ns()),
        }
        with self._client.pipeline(transaction=True) as pipe:
            pipe.hset(self._keys.heartbeat, mapping=beat)
            pipe.pexpire(self._keys.heartbeat, 4 * self._settings.heartbeat_ms)
            pipe.execute()


def _drain(queue: deque[Any], most: int) -> list[Any]:
    """Take what is in the queue now, without waiting for more."""
    return [queue.popleft() for _ in range(min(len(queue), most))]
