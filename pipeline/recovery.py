"""What an earlier run of the line has left in Redis and in the spool, so that this one goes on after it."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Final

import msgspec
import redis
import structlog

from pipeline.entries import EOS, REJECT, Entry, Maker, StreamIds
from pipeline.ledger import CameraBook
from pipeline.records import Fields, Keys
from pipeline.spool import Spool

log = structlog.get_logger(__name__)

RECENT_REJECTS: Final = 5000


class RedisUnreachableError(RuntimeError):
    """Redis did not answer while the line was starting."""


def wait_for(client: redis.Redis, timeout: float, cancelled: threading.Event) -> None:
    """Wait until Redis answers, or until the wait is cancelled.

    Raises:
        RedisUnreachableError: if it does not within ``timeout`` seconds, or refuses this client.
    """
    end = time.monotonic() + timeout
    while not cancelled.is_set():
        try:
            client.ping()
        except redis.RedisError as error:
            if isinstance(error, redis.AuthenticationError) or time.monotonic() >= end:
                where = client.connection_pool.connection_kwargs
                place = where.get("path") or f"{where.get('host')}:{where.get('port')}"
                msg = f"no Redis at {place}: {error}. Start it, or correct redis.url in the config"
                raise RedisUnreachableError(msg) from error
            cancelled.wait(0.1)
        else:
            return


def recover(client: redis.Redis, keys: Keys, spool: Spool, maker: Maker, books: list[CameraBook]) -> None:
    """Set books and id counters behind what Redis and the spool hold.

    A part that an earlier run has rejected but not yet recorded keeps that verdict.
    """
    left = _Left(client, keys, [book.name for book in books])
    for raw in spool.batches():
        for entry in msgspec.msgpack.decode(raw, type=list[Entry]):
            left.add(entry)
    maker.reject_ids.raise_to(left.newest[keys.rejects])
    maker.late_ids.raise_to(left.newest[keys.late])
    for book in books:
        key = keys.verdicts(book.name)
        last = left.last.get(key)
        if last is not None:
            book.resume(*left.newest[key], int(last["session"]))
            log.info("camera_resumed", camera=book.name, session=last["session"], seq=last["seq"])
        maker.published.update(
            {
                (book.name, reject["session"], reject["seq"]): reject
                for reject in left.rejects
                if reject["camera"] == book.name and (last is None or _number(reject) > _number(last))
            }
        )


class _Left:
    """What is left of an earlier run: newest ids, last records and recent rejects."""

    def __init__(self, client: redis.Redis, keys: Keys, cameras: list[str]) -> None:
        self.newest: dict[str, tuple[int, int]] = {}
        self.last: dict[str, Fields] = {}
        for key in (keys.rejects, keys.late, *(keys.verdicts(camera) for camera in cameras)):
            found: Any = client.xrevrange(key, count=1)
            self.newest[key] = StreamIds.parse(found[0][0].decode()) if found else (0, 0)
            if found:
                self.last[key] = _text(found[0][1])
        recent: Any = client.xrevrange(keys.rejects, count=RECENT_REJECTS)
        self.rejects = deque((_text(fields) for _, fields in reversed(recent)), maxlen=RECENT_REJECTS)

    def add(self, entry: Entry) -> None:
        """Take an entry of the spool into account."""
        if entry.kind == REJECT:
            self.rejects.append(entry.fields)
        if entry.kind != EOS and StreamIds.parse(entry.id) > self.newest.get(entry.key, (0, 0)):
            self.newest[entry.key] = StreamIds.parse(entry.id)
            self.last[entry.key] = entry.fields


def _number(fields: Fields) -> tuple[int, int]:
    return int(fields["session"]), int(fields["seq"])


def _text(fields: dict[bytes, bytes]) -> Fields:
    return {key.decode(): value.decode() for key, value in fields.items()}
