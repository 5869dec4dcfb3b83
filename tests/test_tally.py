"""The tally: who was answered, how often, how well, how fast, counted from records alone."""

from __future__ import annotations

import pytest

from pipeline.tally import Tally


def record(seq: int, verdict: str = "OK", truth: str = "", latency_us: int = 1000, **fields: str) -> dict[str, str]:
    """The fields of a record that are counted."""
    base = {"camera": "cam1", "session": "5", "seq": str(seq), "verdict": verdict, "truth": truth}
    return {**base, "latency_us": str(latency_us), **fields}


def counted(*records: dict[str, str], parts: int) -> Tally:
    """A tally of one session of so many parts."""
    tally = Tally()
    tally.expect("cam1", "5", parts)
    for fields in records:
        tally.add(fields)
    return tally


def test_a_session_answered_once_a_part_has_no_failure() -> None:
    """Every part of what was sent has one verdict, in whatever order they came."""
    tally = counted(record(2), record(0, "NG"), record(1, "UNKNOWN"), parts=3)
    assert tally.failures() == []
    assert (tally.parts, tally.unanswered(), tally.doubled()) == (3, 0, 0)
    figures = tally.figures()
    assert (figures["ok"], figures["ng"], figures["unknown"]) == (1, 1, 1)


def test_a_part_without_a_verdict_is_a_failure() -> None:
    """A lost part, at the end too, is counted against the session it was sent in."""
    assert counted(record(0), parts=3).failures() == ["2 parts without a verdict"]
    other = record(1, session="6"), record(1, camera="cam2")
    assert counted(record(0), *other, parts=2).unanswered() == 1


def test_a_part_with_two_verdicts_is_a_failure() -> None:
    """Even where both are the same; a part of that number in another session is another part."""
    tally = counted(record(0), record(0), record(0, session="6"), parts=1)
    assert tally.failures() == ["1 parts with more than one verdict"]
    assert tally.parts == 2


def test_a_failed_camera_is_a_failure() -> None:
    """What a camera did not send cannot be counted as answered."""
    tally = counted(record(0), parts=1)
    tally.camera_failures = 2
    assert tally.failures() == ["2 cameras failed"]


def test_nothing_seen_is_a_failure() -> None:
    """An empty run proves nothing."""
    assert Tally().failures() == ["no part was seen"]
    assert Tally().figures()["parts"] == 0


def test_known_defects_are_counted_as_caught_or_missed() -> None:
    """Any reject of a defective part catches it; any reject of a good part is a false one."""
    tally = counted(
        *(record(0, "NG", "crack"), record(1, "UNKNOWN", "crack"), record(2, "OK", "stain")),
        *(record(3, "OK", "good"), record(4, "NG", "good"), record(5, "UNKNOWN", "good")),
        record(6, "NG"),
        parts=7,
    )
    figures = tally.figures()
    assert (figures["defective_parts"], figures["defective_parts_caught"]) == (3, 2)
    assert (figures["good_parts"], figures["good_parts_rejected"]) == (3, 2)


def test_latencies_are_told_in_milliseconds() -> None:
    """Median and 99th percentile over all parts."""
    figures = counted(*(record(n, latency_us=1000 * n) for n in range(101)), parts=101).figures()
    assert figures["latency_p50_ms"] == pytest.approx(50)
    assert figures["latency_p99_ms"] == pytest.approx(99)
