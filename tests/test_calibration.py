"""The threshold: what was declared is kept, what cannot be kept is refused with the number that it takes."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import calibration
from engines.bundle import Evidence, Threshold
from engines.calibration import (
    CalibrationError,
    binomial_interval,
    calibrate,
    drift,
    rank_of,
    rate_bound,
    recall_at,
    recall_in_words,
    samples_needed,
    smallest_rate,
    supported_rate,
    verify,
)

COUNTS = st.integers(1, 5000)
RATES = st.floats(1e-4, 0.5)


def at_most(hits: int, total: int, share: Fraction) -> Fraction:
    """The exact probability of ``hits`` or fewer of ``total``."""
    return sum(
        (math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(hits + 1)), start=Fraction(0)
    )


def good_scores(count: int, seed: int = 0) -> np.ndarray:
    """Scores as good parts have them: skewed, with a tail."""
    return np.random.default_rng(seed).gumbel(1.0, 0.2, count)


@pytest.mark.parametrize(("count", "rate", "rank"), [(99, 0.01, 99), (199, 0.05, 190), (19, 0.2, 16), (1, 0.5, 1)])
def test_the_threshold_is_the_conformal_quantile(count: int, rate: float, rank: int) -> None:
    """The k-th smallest of n held-out scores, k = ceil((n + 1)(1 - rate)), whatever order they come in."""
    scores = np.random.default_rng(0).permutation(count).astype(np.float32)
    threshold, evidence = calibrate(scores, rate, "parts")
    assert threshold.value == rank - 1
    assert (threshold.samples, threshold.false_reject_rate, threshold.source) == (count, rate, "parts")
    assert evidence.scores == tuple(range(count))


@given(COUNTS, RATES)
def test_the_guarantee_holds_and_none_is_wasted(count: int, rate: float) -> None:
    """The rank gives a rate of at most what is declared, and the next lower rank would not."""
    if count < samples_needed(rate):
        return
    rank = rank_of(count, rate)
    slack = Fraction(1, 10**11)  # a rate is taken as the simple fraction that it stands for
    assert Fraction(count + 1 - rank, count + 1) <= Fraction(rate) + slack
    assert Fraction(count + 2 - rank, count + 1) > Fraction(rate) - slack


@given(RATES)
def test_the_number_that_is_needed_is_the_least_that_works(rate: float) -> None:
    """So many parts are accepted, one fewer is refused, and the refusal names the number."""
    needed = samples_needed(rate)
    assert rank_of(needed, rate) <= needed
    if needed > 1:
        with pytest.raises(CalibrationError, match=f"needs {needed} good parts; {needed - 1} are given"):
            rank_of(needed - 1, rate)


@given(COUNTS)
def test_the_smallest_supported_rate_is_supported(count: int) -> None:
    """1 / (n + 1) is not lost to rounding: the largest score is the threshold, and one part fewer is too few."""
    assert rank_of(count, smallest_rate(count)) == count
    assert samples_needed(smallest_rate(count)) == count


@given(COUNTS)
def test_a_refused_rate_comes_with_one_that_works(count: int) -> None:
    """The rate that the message offers can be typed as it is printed."""
    with pytest.raises(CalibrationError) as caught:
        supported_rate(count, 1e-4)
    offered = float(str(caught.value).split("which support ")[1].split(" or more")[0])
    assert rank_of(count, offered) <= count
    assert offered <= 1.02 * smallest_rate(count)


def test_the_declared_rate_is_kept_on_average() -> None:
    """Over many draws of 99 good parts, a new one is rejected with 1 %: the marginal guarantee, met and not wasted."""
    rng = np.random.default_rng(1)
    values = [calibrate(rng.gumbel(size=99), 0.01, "")[0].value for _ in range(1500)]
    rejected = np.mean([rng.gumbel(size=200) > value for value in values])
    assert rejected == pytest.approx(0.01, abs=0.0012)


def test_the_bound_holds_for_nine_engines_of_ten() -> None:
    """Over many draws, the engine's own rate lies below the bound in 90 % of them: no fewer, and hardly more."""
    rng = np.random.default_rng(2)
    for count, rate in ((99, 0.01), (60, 0.1)):
        bound = rate_bound(count, rank_of(count, rate))
        values = [calibrate(rng.uniform(size=count), rate, "")[0].value for _ in range(1500)]
        own = 1 - np.array(values)  # the share of a uniform distribution above the threshold
        assert np.mean(own <= bound) == pytest.approx(0.9, abs=0.025)
        assert own.mean() == pytest.approx(rate, rel=0.1)


def test_ties_only_make_it_safer() -> None:
    """Scores in coarse steps: a part that equals the threshold is OK, fewer are rejected, and it is said."""
    rng = np.random.default_rng(3)

    def draw(count: int) -> np.ndarray:
        return np.round(rng.gumbel(size=count), 1)

    rejected = np.mean([(draw(50) > calibrate(draw(99), 0.05, "")[0].value) for _ in range(1000)])
    assert rejected <= 0.05
    threshold, _ = calibrate([1.0, 2.0, 3.0, 4.0, 4.0, 5.0, 6.0, 7.0, 8.0, 8.0], 0.2, "")
    assert threshold.value == 8.0
    assert threshold.warnings == ("2 of 10 scores equal the threshold; such parts are OK, so fewer are rejected.",)


def test_the_same_parts_again_and_again_are_no_evidence() -> None:
    """Thirty parts that went round a hundred times are thirty: 1 % is refused, and the default is what 30 support."""
    loop = np.tile(good_scores(30), 100)
    with pytest.raises(CalibrationError, match="needs 99 good parts; 30 are given"):
        calibrate(loop, 0.01, "")
    threshold, evidence = calibrate(loop, None, "")
    assert (threshold.samples, len(evidence.scores)) == (30, 30)
    assert threshold.false_reject_rate == pytest.approx(1 / 31)
    assert "3000 good parts have only 30 different scores" in threshold.warnings[0]


def test_an_engine_that_scores_everything_alike_supports_nothing() -> None:
    """A thousand equal scores count as one."""
    threshold, _ = calibrate([0.5] * 1000, None, "")
    assert (threshold.samples, threshold.false_reject_rate) == (1, 0.5)
    with pytest.raises(CalibrationError, match="1 are given"):
        calibrate([0.5] * 1000, 0.01, "")


def test_rounded_scores_of_many_parts_are_not_taken_for_a_loop() -> None:
    """Records have six digits, so 60,000 parts on 20,000 steps have equal scores by chance: each part counts."""
    scores = np.random.default_rng(0).integers(100_000, 120_000, 60_000) / 1e5
    assert calibrate(scores, 0.001, "")[0].samples == 60_000


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_refused(wrong: float) -> None:
    """Of good parts and of defective ones alike: an engine that gives such scores is broken."""
    with pytest.raises(CalibrationError, match="1 of 3 scores of good parts are not finite"):
        calibrate([1.0, wrong, 2.0], None, "")
    with pytest.raises(CalibrationError, match="1 of 1 scores of crack are not finite"):
        calibrate([1.0, 2.0], None, "", defects={"crack": [wrong]})


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0, 2.0, math.nan, math.inf, 1e-9])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    """The message says what a rate is."""
    with pytest.raises(CalibrationError, match="declare one between"):
        calibrate(good_scores(10), rate, "")


def test_no_parts_are_refused() -> None:
    """There is nothing to choose a threshold from."""
    with pytest.raises(CalibrationError, match="no good parts"):
        calibrate([], None, "")


@pytest.mark.parametrize(("count", "rate"), [(9, 0.1), (98, 1 / 99), (99, 0.01), (5000, 0.01)])
def test_without_a_declared_rate_it_is_one_per_cent_or_what_the_sample_supports(count: int, rate: float) -> None:
    """Never less than the sample can bear out; where that is more than 1 %, the statement says what 1 % needs."""
    threshold, _ = calibrate(good_scores(count), None, "")
    assert threshold.false_reject_rate == pytest.approx(rate)
    assert ("supports no smaller rate; 1 % needs 99" in threshold.statement) == (count < 99)


def test_held_out_parts_are_refused_with_the_images_that_it_takes() -> None:
    """Before a training: how many are held out, how many would have to be, and how many images that means."""
    with pytest.raises(CalibrationError, match=r"needs 99 held-out good parts, about 682 good images .* 9 of 62 are"):
        supported_rate(9, 0.01, 62)
    assert supported_rate(9, 0.1, 62) == 0.1
    assert supported_rate(9, None, 62) == 0.1


def test_the_statement_says_both_what_holds_on_average_and_for_this_engine() -> None:
    """In words, never rounded down: 99 parts at 1 % may mean 2.3 % for the engine at hand."""
    threshold, _ = calibrate(good_scores(99), 0.01, "")
    assert threshold.bound == pytest.approx(1 - 0.1 ** (1 / 99))
    assert threshold.statement == (
        "A new good part is rejected with probability at most 1 %, on average over samples of 99 good parts."
        " With 90 % confidence this engine itself rejects at most 2.3 % of such parts."
    )
    assert rate_bound(60_000, rank_of(60_000, 0.01)) == pytest.approx(0.010524, abs=1e-6)
    assert "at most 1.06 %" in calibrate(good_scores(60_000), 0.01, "")[0].statement


def test_the_documented_numbers_are_those_of_the_code() -> None:
    """The table of how many parts a rate needs, and what it then means for one engine."""
    text = (Path(calibration.__file__).parents[1] / "docs/methods.md").read_text()
    _, _, rest = text.partition("| declared | good parts needed |")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rest.split("\n\n")[0].splitlines()[2:]]
    assert len(rows) == 4
    for declared, needed, bound, more, bound_then in rows:
        rate = float(declared.removesuffix(" %")) / 100
        assert int(needed) == samples_needed(rate)
        for count, stated in ((int(needed), bound), (int(more), bound_then)):
            assert f"itself rejects at most {stated} of" in calibrate(good_scores(count), rate, "")[0].statement


@given(st.integers(1, 40), st.data())
def test_the_interval_is_that_of_clopper_and_pearson(total: int, data: st.DataObject) -> None:
    """At its ends, what was seen has exactly the probability of the tail, in exact arithmetic."""
    hits = data.draw(st.integers(0, total))
    low, high = binomial_interval(hits, total)
    if hits:
        assert float(1 - at_most(hits - 1, total, Fraction(low))) == pytest.approx(0.025, rel=1e-6)
    if hits < total:
        assert float(at_most(hits, total, Fraction(high))) == pytest.approx(0.025, rel=1e-6)
    assert (low == 0) == (hits == 0)
    assert (high == 1) == (hits == total)


def test_an_interval_of_many_parts_is_near_the_share() -> None:
    """Large counts neither overflow nor lose the digits: the interval is the Gaussian one within a thousandth."""
    low, high = binomial_interval(30_000, 100_000)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 100_000)
    assert (low, high) == (pytest.approx(0.3 - half, rel=1e-3), pytest.approx(0.3 + half, rel=1e-3))


def test_what_is_caught_of_known_defects_is_stated_with_its_interval() -> None:
    """By kind and in all; a defect that equals the threshold passes."""
    recall = recall_at(1.0, {"scratch": [0.5, 1.0, 1.5], "crack": np.array([2.0, 3.0])})
    assert recall.classes == {"crack": (2, 2), "scratch": (1, 3)}
    assert (recall.caught, recall.defects) == (3, 5)
    assert (recall.low, recall.high) == pytest.approx(binomial_interval(3, 5))
    assert recall_in_words(recall) == (
        "3 of 5 known defects are above the threshold (95 % interval: 14.7 % to 94.7 %)."
    )


def test_anyone_can_choose_the_threshold_again_from_its_evidence() -> None:
    """The stored scores give the very threshold; other scores, or another threshold, are noticed."""
    for rate in (0.05, None):
        threshold, evidence = calibrate(good_scores(60), rate, "parts", defects={"dent": [9.0]}, counts={"taken": 60})
        verify(threshold, evidence)
        assert (evidence.defects, evidence.counts) == ({"dent": (9.0,)}, {"taken": 60})
        with pytest.raises(CalibrationError, match="calibrate again"):
            verify(threshold, Evidence(evidence.scores[:-1]))
        with pytest.raises(CalibrationError, match="calibrate again"):
            verify(msgspec.structs.replace(threshold, value=threshold.value + 0.1), evidence)


class TestDrift:
    """Good parts now against those behind the old threshold."""

    OLD, BEFORE = calibrate(good_scores(200, seed=5), 0.02, "old")

    def test_parts_like_those_before_are_no_news(self) -> None:
        """No false alarm, over many samples of many sizes."""
        alarms = [bool(drift(self.OLD, self.BEFORE, good_scores(20 + seed, seed=seed))) for seed in range(200)]
        assert np.mean(alarms) < 0.02

    def test_a_moved_median_is_told_in_spreads(self) -> None:
        """The remedy is to see to the cause."""
        first, *_ = drift(self.OLD, self.BEFORE, good_scores(100) + 0.5)
        assert "The median score of good parts moved from" in first
        assert "Camera, light" in first

    def test_another_spread_is_told(self) -> None:
        """Also where the median stays."""
        centre = float(np.median(self.BEFORE.scores))
        (said,) = drift(self.OLD, self.BEFORE, centre + 0.2 * (good_scores(100) - centre))
        assert "The spread of good parts' scores went from" in said

    def test_more_rejects_than_the_old_threshold_promised_are_told(self) -> None:
        """Five defective parts among a hundred show, with or without the old scores."""
        scores = np.concatenate([good_scores(95, seed=8), np.full(12, self.OLD.value + 3)])
        for before in (self.BEFORE, None):
            said = drift(self.OLD, before, scores)[-1]
            assert "The old threshold rejects 1" in said
            assert "leave defective ones out" in said

    def test_an_old_bundle_without_evidence_is_compared_by_its_rate(self) -> None:
        """A bundle of an earlier version states a rate and nothing else."""
        old = Threshold(1.0, 0.02, 90, "at most 0.02")
        assert drift(old, None, np.linspace(0, 0.9, 50)) == ()
        assert drift(old, None, np.linspace(0, 2, 50))
