"""Drift: whether a camera's images, its pace and the scores are still what they were, and if not, why not likely.

Only parts that were judged are looked at. The reference of the scores is the engine's calibration; that of the images
is learned from the first good parts after the start, since a bundle says nothing of light and focus.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, StrEnum
from typing import Final

import numpy as np

from pipeline.charts import Ewma, ScoreChart
from pipeline.config import Drift
from pipeline.optics import Optics
from pipeline.parts import Part, Verdict

LEAST_SAMPLES: Final = 50
"""Images that a baseline needs, and scores that a calibration needs to be a reference."""
SETTLED: Final = 5
"""Samples for which a chart has to be out before it means something, so that those of one cause come together."""
FLOORS: Final = {"brightness": (0.02, 1.0), "sharpness": (0.0, 0.1), "clipping": (0.0, 0.01), "interval": (0.0, 0.1)}
"""Least standard deviation, as a share of the mean and in the figure's own unit: smaller ones matter to nobody."""

Evidence = Callable[[str], Sequence[float] | None]


class Cause(StrEnum):
    """What most likely changed. Documented in ``docs/operations.md``."""

    LIGHT = "light"
    LENS = "lens"
    FOCUS = "focus"
    MATERIAL = "new_material"
    TRIGGER = "trigger"


def likely_causes(sides: Mapping[str, int], *, shifted: bool) -> frozenset[Cause]:
    """From charts to causes.

    A weaker lamp scales the image, so its relative sharpness stays; defocus takes sharpness alone; dirt and haze
    take sharpness and change the brightness too; another material is what changes scores or texture in good images.

    Args:
        sides: For each figure -1, 0 or 1: below, within or above its limits.
        shifted: Whether the scores have another distribution than the reference.
    """
    blurred, brighter, clipped = sides["sharpness"] < 0, sides["brightness"] != 0, sides["clipping"] > 0
    causes = set()
    if blurred and brighter and not clipped:
        causes.add(Cause.LENS)
    elif brighter or clipped:
        causes.add(Cause.LIGHT)
    if blurred and not brighter:
        causes.add(Cause.FOCUS)
    if not causes and (shifted or sides["sharpness"] > 0):
        causes.add(Cause.MATERIAL)
    if sides["interval"]:
        causes.add(Cause.TRIGGER)
    return frozenset(causes)


class Figures:
    """The charts of a camera's images and pace; learns their baseline first."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._learned: dict[str, list[float]] = {name: [] for name in FLOORS}
        self._out: dict[str, int] = dict.fromkeys(FLOORS, 0)
        self.charts: dict[str, Ewma] = {}
        self.sides: dict[str, int] = dict.fromkeys(FLOORS, 0)

    @property
    def samples(self) -> int:
        """Images learned from."""
        return len(self._learned["brightness"])

    def learn(self, values: Mapping[str, float]) -> None:
        """Take the figures of a good part's image into the baseline."""
        for name, value in values.items():
            self._learned[name].append(value)

    def watch(self) -> None:
        """Make the charts from what was learned, and forget it."""
        for name, (share, least) in FLOORS.items():
            values = self._learned[name] or [0.0]
            mean = float(np.mean(values))
            self.charts[name] = Ewma(mean, max(float(np.std(values)), share * mean, least), self._limit)
            values.clear()

    def observe(self, values: Mapping[str, float]) -> None:
        """Take the figures of an image; ``sides`` then says which are out, and have been for a while."""
        for name, value in values.items():
            chart = self.charts[name]
            chart.observe(value)
            self._out[name] = self._out[name] + 1 if chart.side else 0
            self.sides[name] = chart.side if self._out[name] >= SETTLED else 0


class Change(Enum):
    """What has become of a camera with its newest part."""

    BASELINE = "the baseline of its images is complete"
    DRIFT = "it drifts, or for another cause than before"
    OVER = "it no longer drifts"


class CameraDrift:
    """Watches one camera with one engine. Not thread-safe.

    Args:
        settings: ``[drift]``.
        evidence: Gives the scores of an engine's calibration, or None.
    """

    def __init__(self, settings: Drift, evidence: Evidence) -> None:
        self._settings, self._evidence = settings, evidence
        self._figures = Figures(settings.limit)
        self._good = 0
        self._size: tuple[int, int] | None = None
        self._before: tuple[int, int, int] | None = None
        self._engine = ""
        self._scores: ScoreChart | None = None
        self._good_scores: list[float] = []
        self._reference = ""
        self.causes: frozenset[Cause] = frozenset()

    @property
    def learning(self) -> bool:
        """Whether the baseline of the images is still being learned."""
        return not self._figures.charts

    def feed(self, part: Part) -> Change | None:
        """Take a part that was judged; say what changed, if anything did."""
        finding, optics = part.finding, part.optics
        if finding is None or finding.verdict is Verdict.UNKNOWN:
            return None
        if finding.engine != self._engine:
            self._new_engine(finding.engine)
        good = finding.verdict is Verdict.OK
        learned = self._feed_figures(part, optics, good=good) if optics is not None else False
        self._good += good
        ended = self._feed_score(finding.score, good=good)
        if learned:
            return Change.BASELINE
        return self._assess() if ended or optics is not None else None

    def report(self) -> dict[str, str]:
        """The figures as fields of the camera's hash in Redis, see ``docs/contracts.md``."""
        chart = self._scores
        fields = {
            "v": "1",
            "state": "learning" if self.learning else "watching",
            "causes": ",".join(sorted(self.causes)),
            "engine": self._engine,
            "reference": self._reference,
            "score_distance": f"{chart.distance:.4g}" if chart else "",
            "score_limit": f"{chart.critical:.4g}" if chart else "",
        }
        for name in FLOORS:
            known = self._figures.charts.get(name)
            fields[name] = _shown(name, known.now) if known else ""
            fields[f"{name}_baseline"] = _shown(name, known.mean) if known else ""
        return fields

    def _feed_figures(self, part: Part, optics: Optics, *, good: bool) -> bool:
        """Learn from an image, or watch it; say whether the baseline is complete now."""
        if optics.size != self._size:  # another input size: other pixels are compared
            self._size, self._figures, self._good = optics.size, Figures(self._settings.limit), 0
        values = {
            "brightness": optics.brightness,
            "sharpness": math.log(optics.sharpness + 1e-6),
            "clipping": optics.clipping,
        }
        if (pace := self._pace(part)) is not None:
            values["interval"] = pace
        if not self.learning:
            self._figures.observe(values)
        elif good:
            self._figures.learn(values)
            if self._good >= self._settings.baseline_parts and self._figures.samples >= LEAST_SAMPLES:
                self._figures.watch()
                return True
        return False

    def _pace(self, part: Part) -> float | None:
        """Logarithm of the seconds a part since the last sample of the session, None if there was none."""
        before, session = self._before, part.header.session
        self._before = session, part.seq, part.arrival
        if before is None or before[0] != session or part.seq <= before[1]:
            return None
        return math.log(max(part.arrival - before[2], 1) / 1e9 / (part.seq - before[1]))

    def _new_engine(self, engine: str) -> None:
        """Begin anew with the scores: another engine has others. The images are the same."""
        self._engine, self._scores, self._good_scores = engine, None, []
        known = self._evidence(engine)
        if known is not None and len(known) >= LEAST_SAMPLES:
            self._scores = ScoreChart(known, self._settings.window_parts)
            self._reference = f"calibration of {engine}: {len(known)} good parts"
        else:
            self._reference = f"the first {self._settings.baseline_parts} good parts of {engine} after the start"

    def _feed_score(self, score: float, *, good: bool) -> bool:
        if self._scores is not None:
            return self._scores.observe(score)
        if good:
            self._good_scores.append(score)
            if len(self._good_scores) >= self._settings.baseline_parts:
                self._scores, self._good_scores = ScoreChart(self._good_scores, self._settings.window_parts), []
        return False

    def _assess(self) -> Change | None:
        shifted = self._scores is not None and self._scores.shifted
        causes = likely_causes(self._figures.sides, shifted=shifted)
        if causes == self.causes:
            return None
        self.causes = causes
        return Change.DRIFT if causes else Change.OVER


def _shown(name: str, value: float) -> str:
    """A figure in the unit that people read: sharpness and interval are watched as logarithms."""
    return f"{math.exp(value) if name in {'sharpness', 'interval'} else value:.4g}"
