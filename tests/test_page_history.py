"""What the page remembers of each camera."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.page.history import KEPT, History

SECOND = 1_000_000_000


def record(
    seq: int, verdict: str = "OK", *, at_s: int = 100, camera: str = "cam1", ms: int = 20, score: str = "0.1"
) -> dict[str, str]:
    """A record, as far as the page reads it."""
    return {
        "camera": camera, "session": "1", "seq": str(seq), "verdict": verdict, "reason": "deadline", "score": score,
        "threshold": "0.5", "engine": "e@1", "t_verdict_ns": str(at_s * SECOND), "latency_us": str(ms * 1000),
    }  # fmt: skip


def history(*records: dict[str, str]) -> History:
    """A history of two cameras."""
    made = History(("cam1", "cam2"))
    for one in records:
        made.add(one)
    return made


class TestFigures:
    def test_the_last_minute(self) -> None:
        """Rate, yield and latency are those of the last minute; older parts do not count."""
        old = [record(n, "NG", at_s=10) for n in range(5)]
        new = [record(n, "OK" if n % 4 else "UNKNOWN", at_s=100 + n // 4, ms=n) for n in range(40)]
        found = history(*old, *new).cameras["cam1"].figures(109)
        assert (found["OK"], found["NG"], found["UNKNOWN"], found["yield"], found["rate"]) == (30, 0, 10, 0.75, 4.0)
        assert (found["p50"], found["p99"]) == (19.5, 38.6)

    def test_without_parts(self) -> None:
        """A camera that is silent has a rate of zero, and no yield."""
        found = history().cameras["cam1"].figures(109)
        assert (found["rate"], found["yield"], found["p50"]) == (0.0, None, None)

    def test_chart(self) -> None:
        """One point a second, by verdict, with the slowest part."""
        found = history(record(1, ms=5), record(2, "NG", ms=9), record(3, at_s=102)).cameras["cam1"].chart(110)
        assert found == [
            {"s": -10, "OK": 1, "NG": 1, "UNKNOWN": 0, "ms": 9.0},
            {"s": -8, "OK": 1, "NG": 0, "UNKNOWN": 0, "ms": 20.0},
        ]

    def test_scores_are_those_of_judged_parts(self) -> None:
        """A part without a score is not re-judged."""
        found = history(record(1, score=""), record(2, score="0.7")).cameras["cam1"].scores()
        assert found == {"scores": [0.7], "threshold": 0.5, "engine": "e@1"}


class TestSelect:
    def test_filters(self) -> None:
        """By camera, verdict and reason; the newest first."""
        made = history(record(1), record(2, "NG"), record(3, "NG", camera="cam2"), record(4, "UNKNOWN"))
        found = made.select("cam1", frozenset({"NG", "UNKNOWN"}), "", 10)
        assert [part["seq"] for part in found] == ["4", "2"]
        assert made.select("", frozenset(), "overload", 10) == []
        assert made.select("nobody", frozenset(), "", 10) == []

    def test_strangers_are_passed_over(self) -> None:
        """A record of a camera that is not in the config takes no memory."""
        assert history(record(1, camera="cam9")).serial == 0


@given(st.lists(st.integers(0, 30), max_size=12))
def test_a_reader_misses_nothing(steps: list[int]) -> None:
    """Whoever asks again and again gets each part once, in order."""
    made, place, seen, sent = history(), 0, [], 0
    for step in steps:
        for _ in range(step):
            made.add(record(sent))
            sent += 1
        seen += [part["seq"] for part in made.since(place, 1000)]
        place = made.serial
    assert seen == [str(number) for number in range(sent)]


def test_memory_is_bounded() -> None:
    """Old parts are forgotten; the newest can still be found."""
    made = History(("cam1",))
    for number in range(KEPT + 50):
        made.add(record(number))
    assert made.find(("cam1", "1", "10")) is None
    assert made.find(("cam1", "1", str(KEPT + 49))) is not None
    assert len(made._known) == KEPT
