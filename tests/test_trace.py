"""Traces: a sample of parts is logged with the time of every stage that they reached."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from pipeline.parts import UNKNOWN, Part, Reason
from pipeline.trace import StampingQueue, Tracer, times_of
from pipeline.wire import Header
from tests.support.books import OK


def answered(seq: int = 3) -> Part:
    """A part that has been everywhere, a millisecond for each stage."""
    part = Part("cam1", Header(seq=seq, session=9), 0, seq, 5_000_000, 77, 100_000_000)
    part.queued, part.taken, part.submitted, part.done, part.judged, part.published = (
        5_000_000 + 1_000_000 * stage for stage in range(1, 7)
    )
    part.latency_us, part.finding = 5_050, OK
    return part


def test_a_trace_has_every_stage() -> None:
    """In microseconds since the arrival, with who the part is and what was said of it."""
    assert times_of(answered()) == {
        "camera": "cam1",
        "session": 9,
        "seq": 3,
        "verdict": "OK",
        "reason": "below_threshold",
        "engine": "bright@1",
        "arrival_ns": 77,
        "verdict_us": 5050,
        "queued_us": 1000,
        "taken_us": 2000,
        "submitted_us": 3000,
        "done_us": 4000,
        "judged_us": 5000,
        "published_us": 6000,
    }


def test_a_stage_that_was_not_reached_is_left_out() -> None:
    """A part that gave way in the queue was never taken."""
    part = answered()
    part.taken = part.submitted = part.done = part.judged = part.published = 0
    part.finding = UNKNOWN[Reason.OVERLOAD]
    assert [name for name in times_of(part) if name.endswith("_us")] == ["verdict_us", "queued_us"]


@pytest.mark.parametrize(("every", "expected"), [(0, []), (1, list(range(10))), (4, [3, 7])])
def test_every_so_manieth_part_is_logged(every: int, expected: list[int]) -> None:
    """No part where none is asked for."""
    tracer = Tracer(every)
    with capture_logs() as logs:
        for seq in range(10):
            tracer.see(answered(seq))
    assert [entry["seq"] for entry in logs] == expected
    assert {entry["event"] for entry in logs} <= {"part_trace"}


def test_the_end_of_a_stream_is_no_part() -> None:
    """It is not counted and not logged."""
    tracer = Tracer(1)
    with capture_logs() as logs:
        tracer.see(Part("cam1", Header(seq=3, session=9, eos=True), 0, 3, 0, 0, 0))
    assert logs == []


def test_a_part_is_stamped_before_it_is_queued() -> None:
    """As soon as it is in the queue a lane may take it."""
    seen: list[Part] = []

    class Strict:
        def put(self, part: Part) -> None:
            assert part.queued
            seen.append(part)

    part = Part("cam1", Header(seq=0, session=9), 0, 0, 0, 0, 0)
    StampingQueue(Strict()).put(part)
    assert seen == [part]
