"""Recovery: a new run goes on behind what an earlier one has left in Redis and in its spool."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import Camera, Redis, Spool
from pipeline.entries import Maker, StreamIds
from pipeline.ledger import CameraBook, Ledger
from pipeline.outlet import Spools
from pipeline.records import Keys
from pipeline.recovery import RedisUnreachableError, recover, wait_for
from pipeline.redis_client import connect, describe
from pipeline.wire import Header
from tests.support.books import Recorder
from tests.support.fake_redis import NG, OK, SESSION, FakeRedis, answered

KEYS = Keys("l")


class Run:
    """What one run of a line has: a Redis that outlives it, and a spool."""

    def __init__(self, folder: Path) -> None:
        self.redis: Any = FakeRedis()
        self.spools = Spools(Spool(path=folder))
        self.maker = Maker(KEYS, Redis(), {})
        self.book = CameraBook.of("a", Camera())

    def publish(self, *entries: Any) -> None:
        """Straight to Redis."""
        for entry in entries:
            self.redis._apply(("XADD", entry.key, entry.id, entry.fields))

    def recovered(self) -> Run:
        """The next run's start."""
        self.maker = Maker(KEYS, Redis(), {})
        recover(self.redis, KEYS, self.spools, self.maker, [self.book])
        return self


@pytest.fixture
def earlier(tmp_path: Path) -> Iterator[Run]:
    """A run that has ended."""
    run = Run(tmp_path)
    yield run
    run.spools.close()


def test_first_start(earlier: Run) -> None:
    """With nothing there, nothing is resumed."""
    run = earlier.recovered()
    assert run.book.session is None
    assert run.maker.published == {}


@pytest.mark.parametrize("where", ["redis", "spool"])
def test_the_newest_record_says_where_to_go_on(earlier: Run, where: str) -> None:
    """Wherever it is: the camera's session and number, and all ids behind it."""
    reject = earlier.maker.reject(answered("a", 6, NG))
    records = [entry for seq in range(7) for entry in earlier.maker.record(answered("a", seq, OK))]
    if where == "redis":
        earlier.publish(*reject, *records)
    else:
        earlier.spools.rejects.put(reject)
        earlier.spools.records.put(records)
    run = earlier.recovered()
    assert (run.book.session, run.book.next_seq) == (SESSION, 7)
    assert StreamIds.parse(run.maker.reject(answered("a", 7, NG))[0].id) > StreamIds.parse(reject[0].id)
    assert run.maker.published == {}
    assert run.spools or where == "redis", "what waits is read, not taken"


@pytest.mark.parametrize("where", ["redis", "spool"])
def test_a_reject_without_its_record_keeps_its_verdict(earlier: Run, where: str) -> None:
    """Told is told: the part's record says the same, whatever the next run would have said."""
    earlier.publish(*earlier.maker.record(answered("a", 0, OK)))
    reject = earlier.maker.reject(answered("a", 1, NG))
    if where == "redis":
        earlier.publish(*reject)
    else:
        earlier.spools.rejects.put(reject)
    run = earlier.recovered()
    assert list(run.maker.published) == [("a", str(SESSION), "1")]
    assert run.maker.record(answered("a", 1, OK))[0].fields["verdict"] == "NG"


def test_waiting_for_redis_ends_with_its_address() -> None:
    """Unreachable: the error says where it was looked for, and no password."""
    settings = Redis(url="redis://u:secret@127.0.0.1:1/0")
    with connect(settings) as client, pytest.raises(RedisUnreachableError, match=r"redis://127\.0\.0\.1:1/0") as error:
        wait_for(client, describe(settings), 0.2, threading.Event())
    assert "secret" not in str(error.value)


def test_waiting_can_be_cancelled() -> None:
    """A line that is told to stop while it waits stops."""
    cancelled = threading.Event()
    cancelled.set()
    with connect(Redis(url="redis://127.0.0.1:1/0")) as client:
        wait_for(client, "", 60, cancelled)


def test_ended_sessions_are_remembered(earlier: Run) -> None:
    """A late frame of a session that an earlier run has seen end is refused by the next run too, not answered anew."""
    before = SESSION - 5_000_000_000
    for session in (before, SESSION):
        part = answered("a", 0, OK)
        part.header, part.stream_ms = Header(seq=0, session=session), session // 1_000_000
        earlier.publish(*earlier.maker.record(part))
    book = earlier.recovered().book
    assert (book.session, list(book.old)) == (SESSION, [before])
    ledger = Ledger(Recorder())
    ledger.register(book)
    assert ledger.admit("a", Header(seq=7, session=before)) is None
    assert ledger.counts["refused_old_session"] == 1
