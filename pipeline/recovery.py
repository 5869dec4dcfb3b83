"""What an earlier run of the line has left in Redis and in the spool, so that this one goes on after it."""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec
import redis
import structlog

from pipeline.entries import RECORD, REJECT, Entry, Maker, StreamIds
from pipeline.ledger import CameraBook
from pipeline.records import Fields, Keys
from pipeline.spool import Spool

log = structlog.get_logger(__name__)

RECENT_REJECTS: Final = 5000


class RedisUnreachableError(RuntimeError):
    """Redis did not answer while the line was starting."""


def wait_for(client: redis.Redis, timeout: float) -> None:
    """Wait until Redis answers.

    Raises:
        RedisUnreachableError: if it does not within ``timeout`` seconds, or refuses this client.
    """
    end = time.monotonic() + timeout
    while True:
        try:
            client.ping()
        except redis.RedisError as error:
            if isinstance(error, redis.AuthenticationError) or time.monotonic() >= end:
                where = client.connection_pool.connection_kwargs
                place = where.get("path") or f"{where.get('host')}:{where.get('port')}"
                msg = f"no Redis at {place}: {error}. Start it, or correct redis.url in the config"
                raise RedisUnreachableError(msg) from error
            time.sleep(0.1)
        else:
            return


def recover(client: redis.Redis, keys: Keys, spool: Spool, maker: Maker, books: list[CameraBook]) -> None:
    """Set books and id counters behind what Redis and the spool hold.

    A part that an earlier run has rejected but not yet recorded keeps that verdict.
    """
    spooled = [entry for raw in spool.batches() for entry in msgspec.msgpack.decode(raw, type=list[Entry])]
    for ids, key in ((maker.reject_ids, keys.rejects), (maker.late_ids, keys.late)):
        ids.raise_to(StreamIds.newest(client, key))
        for entry in spooled:
            if entry.key == key:
                ids.raise_to(StreamIds.parse(entry.id))
    rejects = _recent_rejects(client, keys) + [entry.fields for entry in spooled if entry.kind == REJECT]
    for book in books:
        last = _last_record(client, keys, book.name, spooled)
        if last is None:
            continue
        (stream_ms, seq), fields = last
        book.resume(stream_ms, seq, int(fields["session"]))
        maker.published.update(
            {
                (book.name, reject["session"], reject["seq"]): reject
                for reject in rejects
                if reject["camera"] == book.name and reject["session"] == fields["session"] and int(reject["seq"]) > seq
            }
        )
        log.info("camera_resumed", camera=book.name, session=fields["session"], seq=seq)


def _recent_rejects(client: redis.Redis, keys: Keys) -> list[Fields]:
    found: Any = client.xrevrange(keys.rejects, count=RECENT_REJECTS)
    return [_text(fields) for _, fields in found]


def _last_record(
    client: redis.Redis, keys: Keys, camera: str, spooled: list[Entry]
) -> tuple[tuple[int, int], Fields] | None:
    key = keys.verdicts(camera)
    found: Any = client.xrevrange(key, count=1)
    candidates = [(StreamIds.parse(identifier.decode()), _text(fields)) for identifier, fields in found]
    candidates += [
        (StreamIds.parse(entry.id), entry.fields) for entry in spooled if entry.kind == RECORD and entry.key == key
    ]
    return max(candidates, key=lambda candidate: candidate[0], default=None)


def _text(fields: dict[bytes, bytes]) -> Fields:
    return {key.decode(): value.decode() for key, value in fields.items()}
