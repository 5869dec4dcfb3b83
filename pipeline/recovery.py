"""What an earlier run of the line has left in Redis and in the spool, so that this one goes on after it."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any, Final

import redis
import structlog

from pipeline.books import KEEP_SESSIONS
from pipeline.entries import EOS, REJECT, Entry, Maker, StreamIds
from pipeline.ledger import CameraBook
from pipeline.outlet import Spools
from pipeline.records import Fields, Keys

log = structlog.get_logger(__name__)

RECENT_REJECTS: Final = 5000


class RedisUnreachableError(RuntimeError):
    """Redis did not answer while the line was starting."""


def wait_for(client: redis.Redis, where: str, timeout: float, cancelled: threading.Event) -> None:
    """Wait until Redis answers, or until the wait is cancelled.

    Args:
        client: Its client.
        where: Its address, for the error.
        timeout: Seconds.
        cancelled: Ends the wait.

    Raises:
        RedisUnreachableError: if it does not within ``timeout`` seconds, or refuses this client.
    """
    end = time.monotonic() + timeout
    while not cancelled.is_set():
        try:
            client.ping()
        except redis.RedisError as error:
            if isinstance(error, redis.AuthenticationError) or time.monotonic() >= end:
                msg = f"no Redis at {where}: {error}. Start it, or correct [redis] in the config"
                raise RedisUnreachableError(msg) from error
            cancelled.wait(0.1)
        else:
            return


def recover(client: redis.Redis, keys: Keys, spools: Spools, maker: Maker, books: list[CameraBook]) -> None:
    """Set books and id counters behind what Redis and the spools hold.

    A part that an earlier run has rejected but not yet recorded keeps that verdict.
    """
    left = _Left(client, keys, [book.name for book in books])
    for outlet in (spools.rejects, spools.records):
        for entry in outlet.entries():
            left.add(entry)
    maker.reject_ids.raise_to(left.newest[keys.rejects])
    maker.late_ids.raise_to(left.newest[keys.late])
    for book in books:
        key = keys.verdicts(book.name)
        last = left.last.get(key)
        if last is not None:
            book.resume(*left.newest[key], int(last["session"]))
            book.old.extend(_sessions_before(client, key, int(last["session"])))
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


def _sessions_before(client: redis.Redis, key: str, session: int) -> list[int]:
    """The sessions that a stream holds of a camera beside ``session``, the newest last, as many as a line remembers.

    A late frame of one of these must be refused by the next run too: else it would count as a new session, and all of
    its numbers, and those of the present one, would be answered anew.
    """
    found: list[int] = []
    entries: Any = client.xrevrange(key, count=1)
    while entries and len(found) <= KEEP_SESSIONS:
        found.append(int(entries[0][1][b"session"]))
        before = StreamIds.parse(entries[0][0].decode())[0]  # all records of a session share this part of the id
        entries = client.xrevrange(key, max=str(before - 1), count=1) if before else []
    return [number for number in reversed(found) if number != session][-KEEP_SESSIONS:]


def _number(fields: Fields) -> tuple[int, int]:
    return int(fields["session"]), int(fields["seq"])


def _text(fields: dict[bytes, bytes]) -> Fields:
    return {key.decode(): value.decode() for key, value in fields.items()}
