"""Entries: ids that grow whatever the clock does, and pictures that are stored whole, in pieces, and not too late."""

from __future__ import annotations

import os
import time

import pytest

from pipeline.config import Redis
from pipeline.entries import PICTURE, PIECE_BYTES, Entry, Maker, StreamIds
from pipeline.records import Keys
from tests.support.fake_redis import NG, OK, FakeRedis, answered

KEYS = Keys("l")


def maker(**changes: object) -> Maker:
    """A maker with these settings of Redis."""
    return Maker(KEYS, Redis(**changes), {})  # type: ignore[arg-type]


def picture(size: int, age_s: float = 0.0) -> Entry:
    """A picture that was made so long ago."""
    return Entry(PICTURE, "k", "", {"t_ns": str(time.time_ns() - int(age_s * 1e9))}, os.urandom(size))


class TestStreamIds:
    """Ids of the streams that carry all cameras."""

    def test_they_grow_when_the_clock_goes_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the counter, until the clock is ahead again."""
        ids, now = StreamIds(), [5_000_000_000]
        monkeypatch.setattr(time, "time_ns", lambda: now[0])
        given = [ids.next()]
        for step in (0, -3_000_000_000, 1_000_000, 4_000_000_000):
            now[0] += step
            given.append(ids.next())
        assert given == ["5000-0", "5000-1", "5000-2", "5000-3", "6001-0"]

    def test_they_go_on_after_what_is_there(self) -> None:
        """Even behind an id from the future."""
        ids = StreamIds()
        ids.raise_to((1 << 50, 7))
        assert ids.next() == f"{1 << 50}-8"


class TestPictures:
    """Heatmaps and images on their way."""

    @pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
    def test_stored_whole(self, size: int) -> None:
        """However many pieces; repeating any of them changes nothing."""
        redis, entry = FakeRedis(), picture(size)
        commands = maker().picture_commands(entry)
        for command in [*commands[:2], *commands]:
            redis.execute_command(*command)
        assert redis.strings["k"] == entry.blob
        assert max(len(part) for command in commands for part in command if isinstance(part, bytes)) <= PIECE_BYTES

    def test_lives_as_long_as_if_it_had_not_waited(self) -> None:
        """What waited too long is not stored at all; a clock that was set back does not lengthen it."""
        made = maker(blob_ttl_s=100)
        assert made.picture_commands(picture(5, age_s=40.5))[0][-1] == 60
        assert made.picture_commands(picture(5, age_s=100.5)) == []
        assert made.picture_commands(picture(5, age_s=-50))[0][-1] == 100
        assert made.picture_commands(picture(PIECE_BYTES + 1, age_s=40.5))[-1] == ("EXPIRE", "k", 60)

    def test_only_where_there_is_one(self) -> None:
        """A part without heatmap and image costs nothing."""
        assert not maker().keeps_pictures(answered("a", 0, OK))
        assert not maker().keeps_pictures(answered("a", 0, NG))


def test_a_reject_of_an_earlier_run_is_told_once() -> None:
    """Its part's record says the same as that reject, and then it is forgotten."""
    made = maker()
    part = answered("a", 3, OK)
    identity = ("a", str(part.header.session), "3")
    made.published[identity] = {"camera": "a", "verdict": "UNKNOWN"}
    assert made.reject(part) == []
    assert made.record(part)[0].fields["verdict"] == "UNKNOWN"
    assert made.record(part)[0].fields["verdict"] == "OK"
