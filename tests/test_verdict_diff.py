"""What counts as a changed verdict."""

from __future__ import annotations

from pathlib import Path

from pipeline.recording import Recording
from pipeline.records import Fields
from pipeline.verdict_diff import Name, compare, recorded
from tests.support.recordings import verdict, write

SPANS = {("cam1", 7): (2, 9)}


def parts(**said: str) -> dict[Name, Fields]:
    """Verdicts by ``p3="NG 0.7"``: number, verdict, score."""
    found = {}
    for name, text in said.items():
        what, _, score = text.partition(" ")
        found["cam1", 7, int(name[1:])] = verdict(int(name[1:]), what, score=score, part="P-1").fields
    return found


class TestCompare:
    def test_equal(self) -> None:
        """The same verdicts pass, whatever the scores; differences of scores are their distances."""
        diff = compare(
            parts(p3="OK 0.25", p4="NG 0.75", p5="UNKNOWN"), parts(p3="OK 0.5", p4="NG 0.75", p5="UNKNOWN"), SPANS
        )
        assert diff.passed
        figures = diff.figures()
        assert (figures["parts"], figures["equal"], figures["scores"]) == (3, 3, 2)
        assert (figures["score_difference_max"], figures["score_difference_mean"]) == (0.25, 0.125)

    def test_changed(self) -> None:
        """Another verdict fails, is named, and counted by its kind."""
        diff = compare(parts(p3="OK 0.4", p4="NG 0.6"), parts(p3="NG 0.6", p4="OK 0.4"), SPANS)
        assert not diff.passed
        figures = diff.figures()
        assert (figures["changed"], figures["OK -> NG"], figures["NG -> OK"]) == (2, 1, 1)
        assert diff.changes[0].text == (
            "cam1/7/3 (P-1): OK (below_threshold, score 0.4) -> NG (below_threshold, score 0.6)"
        )

    def test_unanswered(self) -> None:
        """A part that got a verdict then and none now fails, too."""
        diff = compare(parts(p3="OK 0.1", p4="OK 0.1"), parts(p3="OK 0.1"), SPANS)
        assert (diff.passed, diff.unanswered) == (False, [("cam1", 7, 4)])

    def test_outside(self) -> None:
        """Verdicts of frames that were under way before or after the recording are no difference."""
        diff = compare(parts(p1="OK 0.1", p3="OK 0.1", p10="NG 1"), parts(p0="NG 1", p3="OK 0.1"), SPANS)
        assert (diff.passed, diff.equal, diff.unrecorded) == (True, 1, 0)

    def test_unrecorded(self) -> None:
        """A part whose verdict was not recorded is counted, and proves nothing."""
        diff = compare(parts(p3="OK 0.1"), parts(p3="OK 0.1", p4="NG 0.9"), SPANS)
        assert (diff.passed, diff.unrecorded) == (True, 1)

    def test_nothing(self) -> None:
        """A comparison of nothing proves nothing: it fails, and has no difference of scores, not one of zero."""
        diff = compare({}, parts(p3="OK 0.1"), SPANS)
        assert not diff.passed
        assert diff.figures()["score_difference_max"] is None


def test_cameras_that_the_line_numbers_are_left_out(tmp_path: Path) -> None:
    """A frame's number says nothing of a record's there: to compare them would be to compare other parts."""
    strange = verdict(1, camera="cam2")
    with Recording(write(tmp_path / "r", [], [verdict(1), strange], renumbered=["cam2"])) as recording:
        assert set(recorded(recording)) == {("cam1", 7, 1)}
