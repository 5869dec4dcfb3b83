"""Control charts: whether a figure, or a distribution, is still what it was. Pure logic."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

import numpy as np

WEIGHT: Final = 0.1
"""Weight of the newest value of an EWMA: small shifts that last are found, single values are not."""
OUTLIER: Final = 5.0
"""A value counts as at most so many standard deviations from the mean: one alone moves no chart out."""
BACK: Final = 0.5
"""A chart that is out comes back at this share of its limit."""
BINS: Final = 16
ALPHA: Final = 1e-6
"""Probability that one comparison of equal score distributions warns."""
BACK_DISTANCE: Final = 0.7


class Ewma:
    """An exponentially weighted moving average with control limits.

    Roberts, Technometrics 1 (3), 1959; asymptotic limits and the choice of weight as Lucas and Saccucci,
    Technometrics 32 (1), 1990. The limit is wider than their 3 because production is neither independent nor normal,
    and because a chart that cries wolf is switched off.

    Args:
        mean: Mean of the figure while all was well.
        spread: Its standard deviation then.
        limit: Control limit in standard deviations of the average.
    """

    def __init__(self, mean: float, spread: float, limit: float) -> None:
        self.mean, self.spread = mean, spread
        self.limit = limit * math.sqrt(WEIGHT / (2 - WEIGHT))
        self.value = 0.0
        self.side = 0

    def observe(self, figure: float) -> None:
        """Take the next figure; ``side`` is then -1 below the limits, 1 above them, else 0."""
        deviation = min(max((figure - self.mean) / self.spread, -OUTLIER), OUTLIER)
        self.value += WEIGHT * (deviation - self.value)
        edge = self.limit * BACK if self.side and self.side * self.value > 0 else self.limit
        self.side = 0 if abs(self.value) <= edge else (1 if self.value > 0 else -1)

    @property
    def now(self) -> float:
        """The average, in the figure's own unit."""
        return self.mean + self.value * self.spread


class ScoreChart:
    """Compares the scores of one window after the other with those of the reference.

    The two-sample test of Kolmogorov and Smirnov on scores in bins, which makes it the more careful; its critical
    distance is Smirnov's, Annals of Mathematical Statistics 19 (2), 1948. With few references it is larger, so that
    a small calibration does not warn by chance.

    Args:
        reference: Scores of good parts, finite.
        window: Scores to a window.
    """

    def __init__(self, reference: Sequence[float], window: int) -> None:
        known = np.sort(np.asarray(reference, np.float64))
        quantiles = np.quantile(known, np.arange(1, BINS) / BINS, method="lower")
        self._edges: list[float] = np.unique(quantiles).tolist()
        self._expected = np.searchsorted(known, self._edges, "right") / len(known)
        self._window = window
        self._counts = [0] * (len(self._edges) + 1)
        self._seen = 0
        ratio = (len(known) + window) / (len(known) * window)
        self.critical = math.sqrt(-math.log(ALPHA / 2) / 2 * ratio)
        self.distance = 0.0
        self.shifted = False

    def observe(self, score: float) -> bool:
        """Take the next score; say whether it ended a window, after which ``distance`` and ``shifted`` are new."""
        self._counts[bisect_left(self._edges, score)] += 1
        self._seen += 1
        if self._seen < self._window:
            return False
        found = np.cumsum(self._counts[:-1]) / self._seen
        gaps = self._expected - found  # above 0: live scores are higher
        self.distance = float(gaps[np.abs(gaps).argmax()])
        self.shifted = abs(self.distance) > self.critical * (BACK_DISTANCE if self.shifted else 1.0)
        self._counts, self._seen = [0] * len(self._counts), 0
        return True
