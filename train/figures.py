"""From scores and maps of a labelled test set to its figures, for an engine and for any other method alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.calibration import binomial_interval
from train.data import GOOD
from train.metrics import NOTHING, Floats, LinearScale, Mask, PixelMetrics, Scale, image_metrics

Map = NDArray[Any]


@dataclass(frozen=True)
class Share:
    """``hits`` of ``count`` parts."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        """The share, NaN of nothing."""
        return self.hits / self.count if self.count else NOTHING

    @property
    def interval(self) -> tuple[float, float]:
        """Its exact 95 % interval (Clopper and Pearson): what the share of all such parts may well be."""
        return binomial_interval(self.hits, self.count, 0.95)


@dataclass(frozen=True)
class ClassFigures:
    """One kind of defect: its images against all good ones.

    Attributes:
        images: Number of images of this kind.
        masked: How many of them have a mask that can be measured.
        image_auroc: AUROC of its scores against those of the good images.
        caught: Share above the threshold; None where there is no threshold.
        pixels: Pixel figures of its images and the good ones together; empty without a mask.
    """

    images: int
    masked: int
    image_auroc: float
    caught: Share | None
    pixels: dict[str, float]

    def row(self) -> dict[str, float]:
        """As numbers by name, for JSON."""
        caught = {} if self.caught is None else {"caught": self.caught.value}
        return {"images": self.images, "masked": self.masked, "image_auroc": self.image_auroc, **caught, **self.pixels}


@dataclass(frozen=True)
class Figures:
    """What was measured on one test set.

    Attributes:
        values: Image figures, and pixel figures where there are masks, by name.
        classes: The same for each kind of defect.
        good_rejected: Good parts above the threshold; None where there is no threshold.
        defects_caught: Defective parts above it; None where there is no threshold.
        pixels: The histograms, for curves.
    """

    values: dict[str, float]
    classes: dict[str, ClassFigures]
    good_rejected: Share | None
    defects_caught: Share | None
    pixels: PixelMetrics


def figures_of(
    scores: Floats,
    labels: Sequence[str],
    maps: Iterable[tuple[Map, Mask | None]],
    *,
    threshold: float | None = None,
    scale: Scale | None = None,
) -> Figures:
    """Measure any method.

    Args:
        scores: Score of each image, ``(n,)``; higher is more anomalous.
        labels: Class of each image, ``good`` or a kind of defect.
        maps: For each image its map ``(h, w)`` and the mask of the same shape, true where defective, taken one
            after the other. A defective image without a mask, or with an empty one, counts for the image figures
            alone: which of its pixels are good is not known. A good image needs none.
        threshold: Above it a part is rejected.
        scale: Of the maps. The default is that of heatmaps; others are measured on a ``RankScale`` fitted to them.

    Raises:
        ValueError: if the three are not of one length, a score is not finite, or a map leaves the scale.
    """
    if not np.isfinite(scores).all():
        raise ValueError("scores that are not finite numbers cannot be ranked: mend the method that gave them")
    kinds = np.array(labels)
    parts = _pixels_by_class(labels, maps, LinearScale() if scale is None else scale)
    pixels = parts[GOOD].joined(*(part for label, part in parts.items() if label != GOOD))
    defective = kinds != GOOD
    return Figures(
        values={**image_metrics(scores, defective), **pixels.result()},
        classes={
            label: _class_figures(scores, kinds, label, parts, threshold) for label in sorted(set(labels) - {GOOD})
        },
        good_rejected=_above(scores[~defective], threshold),
        defects_caught=_above(scores[defective], threshold),
        pixels=pixels,
    )


def _pixels_by_class(
    labels: Sequence[str], maps: Iterable[tuple[Map, Mask | None]], scale: Scale
) -> dict[str, PixelMetrics]:
    """Histograms of each class by itself, so that each can be joined with the good images."""
    parts = {label: PixelMetrics(scale) for label in (GOOD, *labels)}
    for label, (values, mask) in zip(labels, maps, strict=True):
        if label == GOOD:
            parts[label].add(values, np.zeros(values.shape, bool) if mask is None else mask)
        elif mask is not None and mask.any():
            parts[label].add(values, mask)
    return parts


def _class_figures(
    scores: Floats, kinds: NDArray[np.str_], label: str, parts: dict[str, PixelMetrics], threshold: float | None
) -> ClassFigures:
    chosen = (kinds == label) | (kinds == GOOD)
    return ClassFigures(
        images=int((kinds == label).sum()),
        masked=len(parts[label].image_pros),
        image_auroc=image_metrics(scores[chosen], kinds[chosen] == label)["image_auroc"],
        caught=_above(scores[kinds == label], threshold),
        pixels=parts[GOOD].joined(parts[label]).result(),
    )


def _above(scores: Floats, threshold: float | None) -> Share | None:
    return None if threshold is None else Share(int((scores > threshold).sum()), len(scores))
