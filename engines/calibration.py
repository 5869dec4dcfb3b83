"""From the scores of good parts to a threshold, by the false-reject rate that somebody declares.

Split conformal calibration (Vovk et al., Algorithmic Learning in a Random World, 2005; Angelopoulos and Bates,
arXiv 2107.07511, section 1 and 3.2) with what is known about the one engine at hand, and exact binomial
intervals (Clopper and Pearson, Biometrika 26, 1934). Needs neither torch nor scipy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from fractions import Fraction
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engines.bundle import Evidence, Recall, Threshold

Scores = NDArray[np.float64]

DEFAULT_RATE: Final = 0.01
"""False-reject rate where none is declared and the sample supports it."""
CONFIDENCE: Final = 0.9
RECALL_CONFIDENCE: Final = 0.95
MOST_COPIES: Final = 10_000
"""So many different scores are no loop over a few parts, even where equal ones are frequent: records round them."""
SHIFT: Final = 1.0
"""A median that moved by more, in spreads, is worth a warning."""
SPREAD_RATIO: Final = 2.0


class CalibrationError(ValueError):
    """No threshold with the promise that was asked for; the message says what is needed for one."""


def samples_needed(rate: float) -> int:
    """The least number of good parts that supports a false-reject rate: ``ceil(1 / rate) - 1``.

    Raises:
        CalibrationError: if ``rate`` is not between 0 and 1.
    """
    return max(1, math.ceil(1 / _exact(rate)) - 1)


def smallest_rate(count: int) -> float:
    """The smallest false-reject rate that ``count`` good parts support: ``1 / (count + 1)``."""
    return 1 / (count + 1)


def supported_rate(count: int, declared: float | None, images: int = 0) -> float:
    """The rate to calibrate for: as declared, else 1 % or the smallest that the sample supports.

    Args:
        count: Number of good parts with a score.
        declared: The declared rate; None for the default.
        images: Good images in all, where only ``count`` of them are held out: for the message.

    Raises:
        CalibrationError: if the sample does not support the declared rate; it says how many parts would.
    """
    if count < 1:
        msg = "no good parts to calibrate with: give at least one, better 99 or more"
        raise CalibrationError(msg)
    if declared is None:
        return max(DEFAULT_RATE, smallest_rate(count))
    needed = samples_needed(declared)
    if count >= needed:
        return declared
    least = _at_least(smallest_rate(count))
    if images:
        have = f"{needed} held-out good parts, about {math.ceil(needed * images / count)} good images in all"
        have += f"; {count} of {images} are held out"
        remedy = "add images, or leave the rate out"
    else:
        have = f"{needed} good parts; {count} are given"
        remedy = f"add {needed - count} more, or leave the rate out"
    msg = f"a false-reject rate of {declared:.3g} needs {have}, which support {least:g} or more: declare that, {remedy}"
    raise CalibrationError(msg)


def rank_of(count: int, rate: float) -> int:
    """Which of ``count`` ascending scores is the threshold: ``ceil((count + 1) * (1 - rate))``, counted from 1.

    Raises:
        CalibrationError: if ``rate`` is not between 0 and 1, or the rank is above ``count``.
    """
    rank = count + 1 - math.floor((count + 1) * _exact(rate))
    if rank > count:
        supported_rate(count, rate)
    return rank


def rate_bound(count: int, rank: int, confidence: float = CONFIDENCE) -> float:
    """What an engine's own false-reject rate does not exceed, with this confidence.

    Given exchangeable good parts and continuous scores, the true rate above the ``rank``-th smallest of ``count``
    scores follows Beta(count + 1 - rank, rank); with ties it is smaller. The quantile of that distribution is the
    Clopper-Pearson bound for ``count - rank`` rejects.
    """
    return _upper(count - rank, count, 1 - confidence)


def binomial_interval(hits: int, total: int, confidence: float = RECALL_CONFIDENCE) -> tuple[float, float]:
    """The exact two-sided interval of a share, given ``hits`` of ``total`` (Clopper and Pearson, 1934)."""
    tail = (1 - confidence) / 2
    return 1 - _upper(total - hits, total, tail), _upper(hits, total, tail)


def _upper(hits: int, total: int, tail: float) -> float:
    """The share at which ``hits`` or fewer of ``total`` have the probability ``tail``, to 1e-12."""
    if hits >= total:
        return 1.0
    steps = np.arange(1, hits + 1)
    choose = np.concatenate([[0.0], np.cumsum(np.log(total + 1 - steps) - np.log(steps))])
    counts = np.arange(hits + 1)
    low, high = 0.0, 1.0
    while high - low > 1e-12:
        share = (low + high) / 2
        terms = choose + counts * math.log(share) + (total - counts) * math.log1p(-share)
        if float(np.exp(terms).sum()) > tail:
            low = share
        else:
            high = share
    return high


def calibrate(
    scores: ArrayLike,
    declared: float | None,
    source: str,
    *,
    defects: Mapping[str, ArrayLike] | None = None,
    counts: Mapping[str, int] | None = None,
    warnings: Sequence[str] = (),
) -> tuple[Threshold, Evidence]:
    """Choose the threshold that a new good part exceeds with at most the declared probability.

    Args:
        scores: Scores of good parts that the engine was not trained on, ``(n,)``, in any order.
        declared: Share of good parts that may be rejected; None for 1 %, or the smallest that ``n`` supports.
        source: What the good parts are, for people.
        defects: Scores of known defective parts by kind, to state what the threshold catches.
        counts: What became of every candidate, for the evidence.
        warnings: What is known to speak against the sample, for people.

    Returns:
        The threshold with its statement, and the scores to store beside it.

    Raises:
        CalibrationError: if a score is not a finite number, or the sample does not support the declared rate.
    """
    ordered, noted = _sample(_finite(scores, "good parts"))
    count = len(ordered)
    rate = supported_rate(count, declared)
    rank = rank_of(count, rate)
    value = float(ordered[rank - 1])
    bound = rate_bound(count, rank)
    bad = {name: np.sort(_finite(found, name)) for name, found in (defects or {}).items()}
    threshold = Threshold(
        value=value,
        false_reject_rate=rate,
        samples=count,
        statement=_statement(count, rate, declared, bound),
        bound=bound,
        confidence=CONFIDENCE,
        source=source,
        calibrated=datetime.now(UTC).isoformat(timespec="seconds"),
        recall=recall_at(value, bad) if bad else None,
        warnings=(*warnings, *noted, *_ties(ordered, value)),
    )
    stored = {name: tuple(found.tolist()) for name, found in bad.items()}
    return threshold, Evidence(tuple(ordered.tolist()), stored, dict(counts or {}))


def verify(threshold: Threshold, evidence: Evidence) -> None:
    """Choose the threshold again from its evidence.

    Raises:
        CalibrationError: if that gives another value, or the evidence is not the sample that is stated.
    """
    count, ordered = len(evidence.scores), np.sort(_finite(evidence.scores, "the evidence"))
    value = float(ordered[rank_of(count, threshold.false_reject_rate) - 1]) if count == threshold.samples else math.nan
    if value != threshold.value:
        msg = (
            f"the {count} stored scores do not give the threshold {threshold.value:.6g} at a false-reject rate of"
            f" {threshold.false_reject_rate:.3g} from {threshold.samples} parts: calibrate again"
        )
        raise CalibrationError(msg)


def recall_at(value: float, defects: Mapping[str, ArrayLike]) -> Recall:
    """How many known defects lie above a threshold, with the exact interval of that share."""
    classes = {}
    for name, scores in sorted(defects.items()):
        found = np.asarray(scores, np.float64)
        classes[name] = (int((found > value).sum()), len(found))
    caught, total = (sum(pair[at] for pair in classes.values()) for at in (0, 1))
    low, high = binomial_interval(caught, total)
    return Recall(caught, total, low, high, RECALL_CONFIDENCE, classes)


def recall_in_words(recall: Recall) -> str:
    """A recall as a sentence."""
    return (
        f"{recall.caught} of {recall.defects} known defects are above the threshold"
        f" ({percent(recall.confidence)} interval: {percent(recall.low)} to {percent(recall.high)})."
    )


def drift(old: Threshold, before: Evidence | None, scores: ArrayLike) -> tuple[str, ...]:
    """What is strikingly different between good parts now and those behind the old threshold, in words.

    Args:
        old: The threshold so far.
        before: Its evidence; without it only the share above the old threshold is compared.
        scores: Scores of the good parts now, ``(n,)``.
    """
    now = _finite(scores, "good parts")
    found = [] if before is None else _moved(np.asarray(before.scores, np.float64), now)
    above = int((now > old.value).sum())
    least, _ = binomial_interval(above, len(now))
    if least > (old.false_reject_rate if old.bound is None else old.bound):
        found.append(
            f"The old threshold rejects {above} of these {len(now)} parts ({percent(above / len(now))}); it was made"
            f" to reject {percent(old.false_reject_rate)}. Look at those parts: leave defective ones out; if all are"
            " good, find out what changed."
        )
    return tuple(found)


def _moved(before: Scores, now: Scores) -> list[str]:
    """Median and spread of ``now`` against ``before``, where both are large enough to tell."""
    if min(len(before), len(now)) < 8 or not _spread(before):
        return []
    spread, spread_now = _spread(before), _spread(now)
    old, new = float(np.median(before)), float(np.median(now))
    shift = (new - old) / spread
    error = 1.2533 * math.sqrt(1 / len(before) + 1 / len(now))  # standard error of a median, in spreads
    found = []
    if abs(shift) > max(SHIFT, 3 * error):
        found.append(
            f"The median score of good parts moved from {old:.3g} to {new:.3g}, by {shift:+.1f} of the old spread"
            f" ({spread:.2g}). Camera, light, focus or supplier may have changed: see to that first, or train anew."
        )
    if min(len(before), len(now)) >= 30 and not 1 / SPREAD_RATIO <= spread_now / spread <= SPREAD_RATIO:
        found.append(
            f"The spread of good parts' scores went from {spread:.2g} to {spread_now:.2g}: these parts are not like"
            " those before."
        )
    return found


def _spread(scores: Scores) -> float:
    """Interquartile range, in units that make it the standard deviation of a Gaussian."""
    low, high = np.percentile(scores, [25, 75])
    return float((high - low) / 1.349)


def _sample(scores: Scores) -> tuple[Scores, tuple[str, ...]]:
    """The scores ascending, equal ones once where they show that the same parts were measured again and again."""
    ordered, different = np.sort(scores), np.unique(scores)
    if len(ordered) < 2 or 2 * len(different) > len(ordered) or len(different) >= MOST_COPIES:
        return ordered, ()
    text = (
        f"{len(ordered)} good parts have only {len(different)} different scores: the same images again and again,"
        " or an engine that does not tell parts apart. Equal scores count once."
    )
    return different, (text,)


def _ties(ordered: Scores, value: float) -> tuple[str, ...]:
    equal = int((ordered == value).sum())
    if equal < 2:
        return ()
    return (f"{equal} of {len(ordered)} scores equal the threshold; such parts are OK, so fewer are rejected.",)


def _statement(count: int, rate: float, declared: float | None, bound: float) -> str:
    text = (
        f"A new good part is rejected with probability at most {percent(_at_least(rate))}, on average over samples of"
        f" {count} good parts. With {percent(CONFIDENCE)} confidence this engine itself rejects at most"
        f" {percent(_at_least(bound))} of such parts."
    )
    if declared is None and rate > DEFAULT_RATE:
        text += f" The sample supports no smaller rate; {percent(DEFAULT_RATE)} needs {samples_needed(DEFAULT_RATE)}."
    return text


def percent(share: float) -> str:
    """A share as per cent, three digits."""
    return f"{100 * share:.3g} %"


def _finite(scores: ArrayLike, what: str) -> Scores:
    found = np.asarray(scores, np.float64).reshape(-1)
    wrong = int((~np.isfinite(found)).sum())
    if wrong:
        msg = f"{wrong} of {len(found)} scores of {what} are not finite numbers: the engine is broken, build it again"
        raise CalibrationError(msg)
    return found


def _exact(rate: float) -> Fraction:
    """The fraction that a rate stands for: 0.01 is 1/100, and ``1 / (n + 1)`` is exactly that."""
    exact = Fraction(rate).limit_denominator(1_000_000) if math.isfinite(rate) else Fraction(0)
    if not 0 < exact < 1:
        msg = f"a false-reject rate of {rate:g}: declare one between 0.000001 and 1, for instance 0.01"
        raise CalibrationError(msg)
    return exact


def _at_least(rate: float) -> float:
    """``rate`` rounded up to three digits, so that it can be declared as it is printed."""
    unit = 10.0 ** (math.floor(math.log10(rate)) - 2)
    return math.ceil(rate / unit - 1e-9) * unit
