"""The publisher: verdicts to Redis, rejects first; to disk where Redis does not take them, and back.

One thread owns the Redis client and the spool. Nothing else in the line ever waits for Redis.

Exactly once: every record has an explicit stream id that was fixed when the record was made. A batch is
one transaction, so after a failure in doubt the newest ids in Redis tell which records it holds; the
others are sent again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
import redis
import structlog

from pipeline.config import Redis as RedisSettings
from pipeline.entries import EOS, Entry, Maker, StreamIds
from pipeline.parts import Finding, Part
from pipeline.records import Keys
from pipeline.spool import Spool, SpoolFullError

log = structlog.get_logger(__name__)

MAX_TRANSACTION: Final = 256
RETRY_S: Final = (0.05, 1.0)
"""First and longest pause between attempts to reach a lost Redis."""


class Publisher:
    """Takes answered parts from the ledger and publishes them.

    Args:
        client: A Redis client of its own, with short timeouts and no retries.
        keys: Names of this line's keys.
        settings: ``[redis]``.
        maker: Makes entries of parts.
        spool: Where records wait; this thread owns it from :meth:`run` on.
        health: Fields of the heartbeat, asked for once a period; None while the line is stuck, so that the
            heartbeat lapses.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        settings: RedisSettings,
        maker: Maker,
        spool: Spool,
        health: Callable[[], dict[str, str] | None],
    ) -> None:
        self._client, self._keys, self._settings, self._spool = client, keys, settings, spool
        self._make = maker
        self._health = health
        self._rejects: deque[Part] = deque()
        self._records: deque[Part] = deque()
        self._late: deque[tuple[Part, Finding]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._connected = True
        self._retry_at = 0.0
        self._pause = RETRY_S[0]
        self._next_beat = 0.0
        self.counts: Counter[str] = Counter()
        self.beat = 0
        self._decode = msgspec.msgpack.Decoder(list[Entry])
        self._encode = msgspec.msgpack.Encoder()

    # The ledger's outbox: called under its lock, so these only append.

    def reject(self, part: Part) -> None:
        """Take a reject; it goes out before anything else."""
        self._rejects.append(part)
        self._wake.set()

    def record(self, part: Part) -> None:
        """Take a part in its camera's order."""
        self._records.append(part)
        self._wake.set()

    def late(self, part: Part, finding: Finding) -> None:
        """Take a result that came too late."""
        self._late.append((part, finding))
        self._wake.set()

    # The publisher's thread.

    def run(self) -> None:
        """Publish until :meth:`stop`, then publish or spool what is left."""
        period = self._settings.heartbeat_ms / 1000
        while not self._stopping:
            self._wake.wait(min(period, 0.25) if not self._spool else min(self._pause, 0.25))
            self._wake.clear()
            self._cycle()
        self._cycle()
        self._beat_heart(last=True)

    def stop(self) -> None:
        """Ask the thread to end. What Redis does not take by then stays in the spool."""
        self._stopping = True
        self._wake.set()

    def backlog(self) -> int:
        """Parts that were answered and are neither published nor spooled."""
        return len(self._rejects) + len(self._records)

    def _cycle(self) -> None:
        if self._spool:
            self._replay()
        self._beat_heart()
        while self._rejects or self._records or self._late:
            # Records are taken first, rejects sent first: no record may go out before its part's reject.
            records, late = _drain(self._records), _drain(self._late)
            self._deliver([entry for part in _drain(self._rejects) for entry in self._make.reject(part)])
            self._deliver([entry for part in records for entry in self._make.record(part)])
            self._deliver([self._make.late(part, finding) for part, finding in late])
            self._beat_heart()

    def _deliver(self, entries: list[Entry]) -> None:
        if not entries:
            return
        # Behind a spool there is a queue: only an empty one lets new records go straight to Redis.
        if self._spool or not self._attempt(lambda: self._send(entries)):
            self._store(entries)

    def _store(self, entries: list[Entry]) -> None:
        try:
            self._spool.append(self._encode.encode(entries))
            self.counts["spooled"] += len(entries)
        except (SpoolFullError, OSError) as error:
            self.counts["lost"] += len(entries)
            log.error("records_lost", count=len(entries), error=str(error), remedy="bring Redis back or free the disk")

    def _replay(self) -> None:
        """Send what the spool holds, then empty it; leave it as it is where Redis still does not answer."""
        if time.monotonic() < self._retry_at and not self._stopping:
            return
        if self._attempt(self._replay_all):
            log.info("spool_replayed", bytes=self._spool.size)
            self._spool.clear()

    def _replay_all(self) -> None:
        for raw in self._spool.batches():
            entries = self._decode.decode(raw)
            streams = {entry.key for entry in entries if entry.kind != EOS}
            newest = {key: StreamIds.newest(self._client, key) for key in streams}
            self._send([entry for entry in entries if StreamIds.parse(entry.id) > newest.get(entry.key, (0, 0))])
            self.beat = time.monotonic_ns()
            if self._beat_is_due():
                self._send_heartbeat()

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Do something with Redis; say whether it worked, and pace the next attempt where it did not."""
        try:
            action()
        except redis.RedisError as error:
            if self._connected:
                log.warning("redis_lost", error=str(error), remedy="records are kept in the spool until it is back")
            self._connected = False
            self.counts["redis_failures"] += 1
            self._retry_at = time.monotonic() + self._pause
            self._pause = min(self._pause * 2, RETRY_S[1])
            return False
        if not self._connected:
            log.info("redis_back")
        self._connected, self._pause = True, RETRY_S[0]
        return True

    def _send(self, entries: list[Entry]) -> None:
        """Send entries in transactions, all or nothing each.

        Raises:
            redis.RedisError: if Redis does not take one; what came before it is in.
        """
        for start in range(0, len(entries), MAX_TRANSACTION):
            chunk = entries[start : start + MAX_TRANSACTION]
            with self._client.pipeline(transaction=True) as pipe:
                for entry in chunk:
                    self._make.commands(pipe, entry)
                results: list[Any] = pipe.execute(raise_on_error=False)
            refused = [result for result in results if isinstance(result, redis.ResponseError)]
            self.counts["published"] += len(chunk)
            if refused:
                self.counts["refused_by_redis"] += len(refused)
                log.error("redis_refused", count=len(refused), first=str(refused[0]))

    def _beat_heart(self, *, last: bool = False) -> None:
        """Show that this thread lives; once a period, show Redis that the line does."""
        self.beat = time.monotonic_ns()
        if last or (self._beat_is_due() and (self._connected or time.monotonic() >= self._retry_at)):
            self._attempt(lambda: self._send_heartbeat(last=last))

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


def _drain(queue: deque[Any]) -> list[Any]:
    """Take what is in the queue now, without waiting for more."""
    return [queue.popleft() for _ in range(len(queue))]
