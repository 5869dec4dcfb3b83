"""Control charts: they find what lasts, and leave alone what does not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.charts import Ewma, ScoreChart


def test_the_average_is_that_of_the_formula() -> None:
    """Each value counts a tenth, the average so far the rest; both in standard deviations."""
    chart = Ewma(10.0, 2.0, 6.0)
    expected = 0.0
    for value in (12.0, 9.0, 10.0, 14.0):
        chart.observe(value)
        expected = 0.1 * (value - 10) / 2 + 0.9 * expected
    assert chart.value == pytest.approx(expected)
    assert chart.now == pytest.approx(10 + 2 * expected)


def test_limits_are_those_of_the_average() -> None:
    """The standard deviation of the average of independent values is what the limit is counted in."""
    rng = np.random.default_rng(0)
    chart, averages = Ewma(0.0, 1.0, 6.0), []
    for value in rng.normal(size=50_000):
        chart.observe(value)
        averages.append(chart.value)
    assert chart.limit / 6 == pytest.approx(np.std(averages), rel=0.05)


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_shift_that_lasts_is_found_and_its_end_too(sign: int) -> None:
    """Two standard deviations are found within 15 values, on their side; the chart is back within 20."""
    chart = Ewma(0.0, 1.0, 6.0)
    out = [chart.side for _ in range(15) if chart.observe(2.0 * sign) is None]
    assert out[-1] == sign
    back = [chart.side for _ in range(20) if chart.observe(0.0) is None]
    assert back[-1] == 0
    assert back == sorted(back, key=abs, reverse=True), "it comes back once"


@given(st.floats(allow_nan=False, allow_infinity=True))
def test_a_single_value_moves_no_chart_out(value: float) -> None:
    """However wild one value is."""
    chart = Ewma(0.0, 1.0, 6.0)
    chart.observe(value)
    assert chart.side == 0


def test_the_distance_is_that_of_the_two_samples() -> None:
    """At the edges of the bins the distance is exactly that of the two distributions; so it is never too large."""
    rng = np.random.default_rng(1)
    reference, live = np.sort(rng.gamma(3, size=400)), rng.gamma(3.5, size=256)
    chart = ScoreChart(reference.tolist(), 256)
    ended = [chart.observe(score) for score in live]
    assert ended == [False] * 255 + [True]
    points = np.concatenate([reference, live])
    exact = np.abs(
        np.searchsorted(reference, points, "right") / 400 - np.searchsorted(np.sort(live), points, "right") / 256
    ).max()
    assert 0 < chart.distance <= exact
    assert chart.distance > exact - 2 / 16


def test_the_critical_distance_is_smirnovs() -> None:
    """With 256 against 500 scores, one comparison in a million of equal ones warns."""
    chart = ScoreChart(np.linspace(0, 1, 500).tolist(), 256)
    assert chart.critical == pytest.approx(np.sqrt(-np.log(5e-7) / 2) * np.sqrt((500 + 256) / (500 * 256)))


def test_a_small_reference_needs_more_to_warn() -> None:
    """Fifty good parts say little of a distribution."""
    few, many = (ScoreChart(np.linspace(0, 1, n).tolist(), 256).critical for n in (50, 5000))
    assert few > 1.5 * many


def test_a_shift_has_hysteresis() -> None:
    """A window just below the critical distance neither begins nor ends a shift."""
    reference = np.linspace(0, 1, 1000, endpoint=False)
    chart = ScoreChart(reference.tolist(), 1000)

    def window(distance: float) -> bool:
        for score in reference:
            chart.observe(min(score + distance, 1.0))
        return chart.shifted

    near = chart.critical * 0.9
    assert [window(near), window(chart.critical + 0.07), window(near), window(0.0), window(near)] == [
        False, True, True, False, False,
    ]  # fmt: skip


def test_equal_scores_are_no_trouble() -> None:
    """An engine that gives every good part the same score has a chart all the same."""
    chart = ScoreChart([0.5] * 100, 32)
    for _ in range(32):
        chart.observe(0.5)
    assert not chart.shifted
    for _ in range(32):
        chart.observe(0.6)
    assert chart.shifted
