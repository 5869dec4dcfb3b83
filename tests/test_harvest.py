"""Scores of live parts: all that somebody vouches for, none that is not one, and every other one counted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import redis

from engines.calibration import CalibrationError
from pipeline import harvest as module
from pipeline.harvest import Period, harvest
from pipeline.parts import UNKNOWN, Finding, Part, Reason, Verdict
from pipeline.records import fields_of
from pipeline.recovery import RedisUnreachableError
from pipeline.wire import Header
from tests.support.books import NG, OK
from tests.support.line import KEYS, NAME

ENGINE = "bright@1"
SECOND = 1_000_000_000


class Book:
    """Writes records as the publisher does; the arrival of a part is its number in seconds."""

    def __init__(self, client: redis.Redis, camera: str = "cam1") -> None:
        self.client, self.camera = client, camera
        self.numbers = itertools.count()

    def add(self, finding: Finding = OK, *, late: bool = False, **header: Any) -> int:
        """Write one record; return its number."""
        seq = next(self.numbers)
        part = Part(self.camera, Header(seq=seq, session=7, **header), 7, seq, 0, seq * SECOND, 0)
        self.client.xadd(KEYS.verdicts(self.camera), dict(fields_of(part, finding, late=late)), id=f"7-{seq + 1}")
        return seq


def scored(score: float, verdict: Verdict = Verdict.OK, engine: str = ENGINE) -> Finding:
    """What an engine found."""
    return Finding(verdict, Reason.BELOW_THRESHOLD, score, 0.5, engine)


def period(**changes: Any) -> Period:
    """Everything of one camera."""
    return Period(**{"line": NAME, "cameras": ("cam1",), "engine": ENGINE, "since": 0, "until": 10**18, **changes})


@pytest.fixture
def book(client: redis.Redis) -> Book:
    """The verdicts of one camera."""
    return Book(client)


def test_parts_that_were_rejected_are_taken_too(client: redis.Redis, book: Book) -> None:
    """OK and NG alike: without the NG ones the tail that the threshold is about would be missing."""
    for finding in (OK, NG, OK):
        book.add(finding)
    found = harvest(client, period())
    assert found.scores == pytest.approx([0.25, 0.75, 0.25], abs=1e-5)
    assert found.counts == {"taken": 3}
    assert [record["seq"] for record in found.rejected] == ["1"]
    assert found.warnings == []


def test_every_record_that_is_left_out_is_counted_by_its_reason(client: redis.Redis, book: Book) -> None:
    """No score, late, simulated, of another engine or version, known to be defective: none is a good part of ours."""
    book.add()
    book.add(UNKNOWN[Reason.DEADLINE])
    book.add(OK, late=True)
    book.add(OK, simulated=True)
    book.add(scored(9.0, engine="bright@2"))
    book.add(scored(9.0, engine="other@1"))
    book.add(NG, truth="scratch")
    book.add(OK, truth="good")
    found = harvest(client, period())
    assert found.counts == {
        "taken": 2,
        "without a score": 1,
        "late": 1,
        "simulated": 1,
        "of another engine": 2,
        "known to be defective": 1,
    }
    assert len(found.scores) == 2
    assert harvest(client, period(simulated=True)).counts["taken"] == 3


def test_only_the_period_counts(client: redis.Redis, book: Book) -> None:
    """By arrival: the first moment belongs to it, the last does not."""
    for score in range(1, 7):
        book.add(scored(score))
    found = harvest(client, period(since=2 * SECOND, until=4 * SECOND))
    assert found.scores == pytest.approx([3, 4], rel=1e-5)
    assert found.counts == {"taken": 2}


def test_a_stream_longer_than_a_page_is_read_whole(
    client: redis.Redis, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each record once, whether or not the last page is full."""
    monkeypatch.setattr(module, "PAGE", 3)
    for count in range(1, 8):
        book.add(scored(count))
        assert harvest(client, period()).scores == pytest.approx(list(range(1, count + 1)), rel=1e-5)


def test_several_cameras_are_taken_together(client: redis.Redis, book: Book) -> None:
    """Those that are named, and no other."""
    book.add(scored(1))
    Book(client, "cam2").add(scored(2))
    Book(client, "cam3").add(scored(3))
    assert harvest(client, period(cameras=("cam1", "cam3"))).scores == pytest.approx([1, 3], rel=1e-5)


def test_parts_that_are_not_good_are_named(client: redis.Redis, book: Book) -> None:
    """By part id, or by camera, session and number where a part has no id."""
    book.add(OK, part="P-1")
    book.add(NG, part="P-2")
    book.add(NG)
    book.add(NG, part="P-3")
    found = harvest(client, period(excluded=frozenset({"P-2", "cam1/7/2"})))
    assert found.counts == {"taken": 2, "excluded": 2}
    assert [record["part"] for record in found.rejected] == ["P-3"]
    assert found.warnings == []


def test_a_name_that_no_part_has_is_refused(client: redis.Redis, book: Book) -> None:
    """A slip of the pen must not leave a defective part among the good ones; nor does the empty name fit any."""
    book.add(OK, part="P-1")
    book.add(NG)
    for wrong in ("P-2", "p-1", "", "cam1/7"):
        with pytest.raises(CalibrationError, match=f"--except {wrong}: no such part in the period"):
            harvest(client, period(excluded=frozenset({wrong})))


def test_leaving_out_every_rejected_part_is_warned_of(client: redis.Redis, book: Book) -> None:
    """It is right only if all of them were looked at and found defective."""
    for name in ("P-1", "P-2", "P-3"):
        book.add(OK if name == "P-1" else NG, part=name)
    (warning,) = harvest(client, period(excluded=frozenset({"P-2", "P-3"}))).warnings
    assert "All 2 parts that were answered NG are left out" in warning


def test_many_parts_without_a_score_are_warned_of(client: redis.Redis, book: Book) -> None:
    """Those that were inspected in time may not be like the rest."""
    for _ in range(10):
        book.add()
    book.add(UNKNOWN[Reason.OVERLOAD])
    assert harvest(client, period()).warnings == []
    book.add(UNKNOWN[Reason.OVERLOAD])
    assert "2 parts of the period have no score, beside 10" in harvest(client, period()).warnings[0]


def test_a_stream_that_begins_later_is_said_to(client: redis.Redis, book: Book) -> None:
    """Redis keeps so many records a camera: what was trimmed is missing."""
    for _ in range(5):
        book.add()
    client.xtrim(KEYS.verdicts("cam1"), maxlen=2, approximate=False)
    found = harvest(client, period(since=SECOND))
    assert found.warnings == ["The verdicts of cam1 in Redis begin only at 1970-01-01T00:00:03+00:00."]
    assert found.counts == {"taken": 2}


def test_a_period_without_a_good_part_is_refused(client: redis.Redis, book: Book) -> None:
    """With what was there instead; a camera that nobody knows is told apart."""
    book.add(UNKNOWN[Reason.DEADLINE])
    book.add(scored(1, engine="bright@2"))
    with pytest.raises(CalibrationError, match=r"1 of another engine, 1 without a score\. Correct --since"):
        harvest(client, period())
    with pytest.raises(CalibrationError, match="no record at all"):
        harvest(client, period(since=10**17))
    with pytest.raises(CalibrationError, match=r"no verdicts of camera 'cam9' on line 't' .* correct --camera"):
        harvest(client, period(cameras=("cam9",)))


@pytest.mark.parametrize("score", [1.234565, 0.1, 123456.5, 1.5e-7, 0.0, -0.3333335, -2e5, 99999.95, 1e-30])
def test_a_rounded_score_is_never_below_the_real_one(client: redis.Redis, book: Book, score: float) -> None:
    """Records have six digits: the part itself stays OK at a threshold that is its own score."""
    book.add(scored(score))
    (taken,) = harvest(client, period()).scores
    assert taken >= score
    assert taken == pytest.approx(score, rel=1.1e-5, abs=0)


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "high", "1,5"])
def test_a_score_that_is_no_number_is_refused(client: redis.Redis, book: Book, text: str) -> None:
    """The remedy is to leave its time out."""
    book.add()
    fields: Any = client.xrange(KEYS.verdicts("cam1"))[0][1]  # type: ignore[index]
    client.xadd(KEYS.verdicts("cam1"), {**fields, b"score": text})
    with pytest.raises(CalibrationError, match="not a finite number: leave its time out"):
        harvest(client, period())


def test_a_redis_that_is_away_is_named() -> None:
    """With its address, and without any password."""
    away = redis.Redis.from_url("redis://:secret@127.0.0.1:1/0", socket_timeout=1)
    with pytest.raises(RedisUnreachableError, match=r"no Redis at 127.0.0.1:1: .* correct --redis") as caught:
        harvest(away, period())
    assert "secret" not in str(caught.value)
