"""The simulated driver's race check: every missing wait is reported, and nothing else, whatever the timing was."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sim.driver import load
from tests.sim.isolation import isolated, missing
from tests.sim.programs import Calls, Program, Step, generate, has_race, play

pytestmark = pytest.mark.skipif(bool(missing(pycuda=False)), reason=missing(pycuda=False))

PROGRAMS = 600


def step(kind: str, stream: int = 0, event: int = 0, **details: int) -> Step:
    """A step on the whole of the first buffers."""
    usual = {"target": 0, "source": 1, "pinned": 0, "low": 0, "size": 256}
    return Step(kind, stream, event, **(usual | details))  # type: ignore[arg-type]


UP, ACROSS = step("upload", 0), step("kernel", 1, target=1, source=0)
DOWN = step("download", 2, target=1, pinned=1)
PIPELINE = (UP, step("record", 0, 0), step("wait", 1, 0), ACROSS, step("record", 1, 1), step("wait", 2, 1), DOWN)
"""Upload, kernel and download on a stream each, in order by two events."""

ORDERED = {
    "one stream": (replace(ACROSS, stream=0), UP, replace(DOWN, stream=0)),
    "events": PIPELINE,
    "the host waits for a stream": (UP, step("sync stream", 0), ACROSS),
    "the host waits for an event": (UP, step("record", 0), step("sync event"), ACROSS),
    "reads alone": (step("download", 0, pinned=0), step("download", 1, pinned=1)),
    "halves": (step("upload", 0, size=128), step("fill", 1, low=128, size=128)),
    "a wait taken over": (*PIPELINE[:3], step("record", 1, 1), step("wait", 2, 1), step("fill", 2)),
}
RACY = {
    "no wait at all": (UP, ACROSS),
    "waits before the event is recorded": (step("wait", 1, 0), UP, step("record", 0, 0), ACROSS),
    "waits for another event": (UP, step("record", 0, 0), step("wait", 1, 1), ACROSS),
    "records too early": (step("record", 0, 0), UP, step("wait", 1, 0), ACROSS),
    "two writers": (step("upload", 0), step("fill", 1)),
    "a pinned buffer used again": (UP, step("download", 1, target=3, pinned=0)),
    "the last byte": (step("upload", 0, size=129), step("fill", 1, low=128, size=128)),
    "the host waits for the wrong stream": (UP, step("sync stream", 1), ACROSS),
}
TIMINGS: tuple[dict[str, float], ...] = (
    {},
    {"htod_us": 2000.0, "dtoh_us": 500.0},
    {"launch_us": 1000.0, "jitter_us": 1000.0},
)


def reported(program: Program, timing: dict[str, float]) -> bool:
    """Whether the driver reports a race, at the given timing."""
    sim = load()
    with Calls(sim).context():
        sim.configure(**timing)  # type: ignore[arg-type]
        found = play(sim, program)
        assert found == bool(sim.reports())
    return found


@pytest.mark.parametrize("name", ORDERED)
@isolated
def test_what_is_in_order_is_silent(name: str) -> None:
    """A program in which everything is waited for is not reported at any timing."""
    program = Program((False, False, False), has_default=False, steps=ORDERED[name])
    assert not has_race(program)
    assert [reported(program, timing) for timing in TIMINGS] == [False, False, False]


@pytest.mark.parametrize("name", RACY)
@isolated
def test_a_missing_wait_is_reported(name: str) -> None:
    """A program that lacks a wait is reported at every timing, also where its data come out right."""
    program = Program((False, False, False), has_default=False, steps=RACY[name])
    assert has_race(program)
    assert [reported(program, timing) for timing in TIMINGS] == [True, True, True]


@pytest.mark.parametrize("index", [2, 5])
@isolated
def test_each_wait_of_a_pipeline_counts(index: int) -> None:
    """A three-stream pipeline is in order, and no longer when either of its waits is taken out."""
    mutant = (*PIPELINE[:index], *PIPELINE[index + 1 :])
    assert not reported(Program((False, False, False), has_default=False, steps=PIPELINE), {})
    assert reported(Program((False, False, False), has_default=False, steps=mutant), {})


@pytest.mark.parametrize(("blocking", "racy"), [(True, False), (False, True)])
@isolated
def test_the_default_stream_waits_for_blocking_streams_alone(blocking: bool, racy: bool) -> None:
    """The legacy default stream is in order with blocking streams, and races with non-blocking ones."""
    program = Program((blocking, True), has_default=True, steps=(UP, ACROSS))
    assert has_race(program) == racy
    assert reported(program, {}) == racy


@isolated
def test_random_programs() -> None:
    """Over random programs the driver and the happens-before graph agree, both ways, without exception."""
    sim = load()
    verdicts = []
    with Calls(sim).context():
        for seed in range(PROGRAMS):
            sim.reset()
            program = generate(seed)
            verdicts.append((seed, has_race(program), play(sim, program)))
    assert [seed for seed, expected, found in verdicts if expected != found] == []
    racy = sum(expected for _, expected, _ in verdicts)
    assert PROGRAMS // 5 < racy < PROGRAMS * 4 // 5, racy  # the agreement is about both kinds
