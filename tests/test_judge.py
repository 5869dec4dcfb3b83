"""The judge: from a score and a heatmap to a verdict with its evidence."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from engines.bundle import Bundle, OutputSpec
from pipeline.judge import Judge
from pipeline.parts import Reason, Verdict
from tests.support.engine import THRESHOLD, write_bundle

COLD = np.zeros((8, 8), np.uint8)


@pytest.fixture
def engine(tmp_path: Path) -> Bundle:
    """An engine with input 32x32, heatmap 8x8 and a threshold of 0.5 on a scale of 0 to 1."""
    return write_bundle(tmp_path / "bundle")


def scaled(engine: Bundle, low: float, high: float) -> Bundle:
    """The engine with another scale of its heatmap."""
    manifest = msgspec.structs.replace(engine.manifest, output=OutputSpec(8, 8, low, high))
    return Bundle(engine.folder, manifest, engine.digest, engine.version)


def hot(level: int = 200) -> np.ndarray:
    """A heatmap with a block of 2 rows and 3 columns at row 1, column 4."""
    heatmap = COLD.copy()
    heatmap[1:3, 4:7] = level
    return heatmap


def test_a_score_up_to_the_threshold_is_good(engine: Bundle) -> None:
    """The threshold itself is good; what led to the verdict is told, a heatmap is not kept."""
    for score in (-1.0, 0.0, THRESHOLD):
        finding = Judge(engine)(score, hot())
        assert (finding.verdict, finding.reason) == (Verdict.OK, Reason.BELOW_THRESHOLD)
        assert (finding.score, finding.threshold, finding.engine) == (score, THRESHOLD, engine.label)
        assert (finding.heatmap, finding.area, finding.bbox, finding.peak) == (None, 0, None, 0)


def test_a_score_above_the_threshold_is_defective(engine: Bundle) -> None:
    """The least bit above is too much: NG with its score, its engine and the hottest level."""
    score = float(np.nextafter(THRESHOLD, 1))
    finding = Judge(engine)(score, hot(231))
    assert (finding.verdict, finding.reason) == (Verdict.NG, Reason.ABOVE_THRESHOLD)
    assert (finding.score, finding.threshold, finding.engine) == (score, THRESHOLD, engine.label)
    assert finding.peak == 231


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_never_good(engine: Bundle, score: float) -> None:
    """Lanes refuse such a score; should one come through all the same, the part is rejected."""
    assert Judge(engine)(score, COLD).verdict is Verdict.NG


def test_the_region_is_in_pixels_of_the_engines_input(engine: Bundle) -> None:
    """Cells of the heatmap are enlarged to the input: 4 pixels a cell, x before y."""
    finding = Judge(engine)(1.0, hot())
    assert finding.bbox == (16, 4, 12, 8)
    assert finding.area == 6 * 16


def test_the_region_spans_all_that_is_hot(engine: Bundle) -> None:
    """Two spots give one box around both, and the area of both alone."""
    heatmap = COLD.copy()
    heatmap[0, 0] = heatmap[7, 7] = 255
    finding = Judge(engine)(1.0, heatmap)
    assert (finding.bbox, finding.area) == ((0, 0, 32, 32), 32)


def test_hot_is_what_reaches_the_thresholds_level(engine: Bundle) -> None:
    """The level of the threshold itself counts; one below does not."""
    level = round(engine.manifest.output.level(THRESHOLD))
    assert 1 < level < 255
    assert Judge(engine)(1.0, hot(level)).area == 96
    cool = Judge(engine)(1.0, hot(level - 1))
    assert (cool.area, cool.bbox, cool.peak) == (0, None, level - 1)


def test_a_threshold_below_the_scale_does_not_make_everything_hot(engine: Bundle) -> None:
    """Where the threshold lies at or under the heatmap's lowest value, level 0 is still cold."""
    finding = Judge(scaled(engine, 0.6, 1.0))(1.0, hot(1))
    assert finding.area == 96


def test_a_threshold_above_the_scale_leaves_the_hottest_level(engine: Bundle) -> None:
    """Where the threshold lies above the heatmap's highest value, only 255 is hot."""
    judge = Judge(scaled(engine, 0.0, 0.4))
    assert (judge(1.0, hot(254)).area, judge(1.0, hot(255)).area) == (0, 96)


@pytest.mark.parametrize(("score", "keep_all"), [(1.0, False), (1.0, True), (0.0, True)])
def test_a_kept_heatmap_is_a_copy(engine: Bundle, score: float, keep_all: bool) -> None:
    """The lane's memory is written by the next batch; the evidence is not."""
    heatmap = hot()
    finding = Judge(engine, keep_all=keep_all)(score, heatmap)
    heatmap[:] = 9
    assert finding.heatmap is not None
    assert np.array_equal(finding.heatmap, hot())
