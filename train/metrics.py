"""AUROC, average precision, F1 and per-region overlap from histograms: memory does not grow with the pixels.

Nothing here knows of engines or files. Every method that gives a map and a mask is measured by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
NOTHING: Final = float("nan")
PRO_LIMIT: Final = 0.3
"""The false positive rate up to which per-region overlap is integrated (Bergmann et al., IJCV 2021)."""


def auroc(negatives: Floats, positives: Floats) -> float:
    """Area under the ROC curve of two histograms over ascending score bins; ties count one half.

    Args:
        negatives: Weight of the negatives in each bin, shape ``(bins,)``.
        positives: Weight of the positives in each bin, shape ``(bins,)``.

    Returns:
        A number in 0..1, NaN where either side is empty.
    """
    below = np.cumsum(negatives) - negatives
    total = negatives.sum() * positives.sum()
    return float((positives * (below + negatives / 2)).sum() / total) if total else NOTHING


def average_precision(negatives: Floats, positives: Floats) -> float:
    """Area under precision over recall as a step function, bins taken from the highest score down."""
    if not positives.sum():
        return NOTHING
    hits, misses = np.cumsum(positives[::-1]), np.cumsum(negatives[::-1])
    precision = hits / np.maximum(hits + misses, 1e-300)
    return float((precision * positives[::-1]).sum() / hits[-1])


def f1_max(negatives: Floats, positives: Floats) -> float:
    """Largest F1, ``2 TP / (2 TP + FP + FN)``, that any one threshold reaches; NaN without a positive."""
    if not positives.sum():
        return NOTHING
    hits, misses = np.cumsum(positives[::-1]), np.cumsum(negatives[::-1])
    return float((2 * hits / (hits + misses + hits[-1])).max())


def rate_curve(negatives: Floats, positives: Floats) -> tuple[Floats, Floats]:
    """Share of the negatives and of the positives above each threshold, from above all bins to below all.

    Of image scores it is the ROC curve; with the weights of regions for ``positives`` it is the PRO curve.

    Returns:
        Two ascending arrays ``(bins + 1,)`` from 0 to 1, NaN on a side that is empty.
    """
    with np.errstate(invalid="ignore"):
        fpr, tpr = (np.cumsum(side[::-1]) / side.sum() for side in (negatives, positives))
    return np.concatenate([[0.0], fpr]), np.concatenate([[0.0], tpr])


def pro_curve_area(negatives: Floats, regions: Floats, limit: float = PRO_LIMIT) -> float:
    """Area under per-region overlap against false positive rate up to ``limit``, normalised to 1.

    Args:
        negatives: Good pixels in each bin.
        regions: Each region's pixels in each bin, weighted by one over (region size x number of regions).
        limit: The false positive rate at which to stop; between two thresholds the curve is a straight line.
    """
    if not regions.sum() or not negatives.sum():
        return NOTHING
    fpr, pro = rate_curve(negatives, regions)
    # The first point at or beyond the limit; where several lie exactly on it, the curve's rise there is beyond it.
    last = int(np.argmax(fpr >= limit))
    share = (limit - fpr[last - 1]) / (fpr[last] - fpr[last - 1])
    end = pro[last - 1] + share * (pro[last] - pro[last - 1])
    return float(np.trapezoid(np.append(pro[:last], end), np.append(fpr[:last], limit)) / limit)


def image_pro_area(negatives: Floats, regions: Floats, limit: float = PRO_LIMIT) -> float:
    """The same area of one image as RD4AD's line of work takes it: up to the largest rate below ``limit``.

    Only thresholds with a false positive rate strictly below ``limit`` count. The area is divided by the largest
    of these rates. Where that is 0, as between clean levels, the overlap at 0 is the value: the limit of the mean.
    Source: the evaluation code that RD4AD (CVPR 2022) published and its descendants took over.
    """
    if not regions.sum() or not negatives.sum():
        return NOTHING
    fpr, pro = rate_curve(negatives, regions)
    below = fpr < limit
    fpr, pro = fpr[below], pro[below]
    return float(np.trapezoid(pro, fpr) / fpr[-1]) if fpr[-1] else float(pro[-1])


def score_histograms(scores: Floats, defective: Mask) -> tuple[Floats, Floats]:
    """Good and defective image scores as histograms in which every distinct score is a bin of its own."""
    _, bins = np.unique(scores, return_inverse=True)
    count = int(bins.max()) + 1 if len(bins) else 0
    negatives = np.bincount(bins[~defective], minlength=count).astype(float)
    return negatives, np.bincount(bins[defective], minlength=count).astype(float)


def image_metrics(scores: Floats, defective: Mask) -> dict[str, float]:
    """Image AUROC, average precision and F1-max, exact."""
    negatives, positives = score_histograms(scores, defective)
    return {
        "image_auroc": auroc(negatives, positives),
        "image_ap": average_precision(negatives, positives),
        "image_f1_max": f1_max(negatives, positives),
    }


class Scale(Protocol):
    """A monotone assignment of map values to bins: it may lose differences, never their order."""

    @property
    def bins(self) -> int:
        """Number of bins."""
        ...

    def index(self, values: NDArray[Any]) -> NDArray[np.intp]:
        """The bin of each value.

        Raises:
            ValueError: if a value has no bin; clipping it would measure another map than the one given.
        """
        ...


@dataclass(frozen=True)
class LinearScale:
    """Equal bins over ``[low, top]``, for maps whose range is known. The default is that of an engine's heatmaps."""

    low: float = 0.0
    top: float = 255.0
    bins: int = 1 << 14

    def index(self, values: NDArray[Any]) -> NDArray[np.intp]:
        """The bin of each value; see :class:`Scale`."""
        index = np.asarray(values, np.float64) - self.low
        if not ((index >= 0) & (index <= self.top - self.low)).all():
            msg = f"map values outside {self.low:g}..{self.top:g}, or not numbers: give the true range, or a RankScale"
            raise ValueError(msg)
        return np.minimum((index * (self.bins / (self.top - self.low))).astype(np.intp), self.bins - 1)


@dataclass(frozen=True, eq=False)
class RankScale:
    """Bins between given edges, for maps of any range and distribution.

    Attributes:
        edges: Ascending and distinct; bin ``k`` holds the values from ``edges[k - 1]`` up to below ``edges[k]``.
    """

    edges: Floats

    @classmethod
    def fitted(cls, maps: Iterable[tuple[NDArray[Any], Mask | None]], bins: int = 1 << 16, seed: int = 0) -> RankScale:
        """Bins that hold about equally many pixels: a first pass over the maps, in constant memory.

        Half of the edges are quantiles of all pixels, half of the defective ones, because a figure is decided
        where the defective ones lie. Where there are no more distinct values than bins, the figures are exact.

        Args:
            maps: Maps with their masks, as they will be measured; masks may be missing.
            bins: Largest number of bins.
            seed: Of the sample from which the quantiles are taken.
        """
        rng = np.random.default_rng(seed)
        every, bad = _Sample(4 * bins, rng), _Sample(4 * bins, rng)
        for values, mask in maps:
            every.add(np.ravel(values))
            if mask is not None:
                bad.add(values[mask])
        return cls(np.unique(np.concatenate([s.quantiles((bins - 1) // 2) for s in (every, bad)])))

    @property
    def bins(self) -> int:
        """Number of bins."""
        return len(self.edges) + 1

    def index(self, values: NDArray[Any]) -> NDArray[np.intp]:
        """The bin of each value; see :class:`Scale`."""
        if np.isnan(values).any():
            raise ValueError("map values that are not numbers have no order: mend the method that gave them")
        return np.searchsorted(self.edges, values, side="right")


class _Sample:
    """A uniform random sample of at most ``size`` of all values added: those with the least random keys."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        self.values, self.keys = np.empty(0), np.empty(0)

    def add(self, values: NDArray[Any]) -> None:
        self.values = np.concatenate([self.values, values])
        self.keys = np.concatenate([self.keys, self.rng.random(len(values))])
        if len(self.keys) > self.size:
            kept = np.argpartition(self.keys, self.size)[: self.size]
            self.values, self.keys = self.values[kept], self.keys[kept]

    def quantiles(self, count: int) -> Floats:
        ordered = np.unique(self.values)
        if len(ordered) <= count:
            return ordered
        ordered = np.sort(self.values)
        return ordered[np.linspace(0, len(ordered) - 1, count).astype(np.intp)]


class PixelMetrics:
    """Pixel and region figures over any number of maps in constant memory.

    Args:
        scale: How map values become bins. The error of each figure is of the order of the share of a bin.
    """

    def __init__(self, scale: Scale | None = None) -> None:
        self.scale = LinearScale() if scale is None else scale
        self.good = np.zeros(self.scale.bins)
        self.bad = np.zeros(self.scale.bins)
        self.regions = np.zeros(self.scale.bins)
        self.region_count = 0
        self.image_pros: list[float] = []

    def add(self, heatmap: NDArray[Any], mask: Mask) -> None:
        """Count one map ``(h, w)`` against its ground truth of the same shape.

        Raises:
            ValueError: if a value of the map has no place on the scale.
        """
        index, bins = self.scale.index(heatmap), self.scale.bins
        good = np.bincount(index[~mask], minlength=bins).astype(float)
        self.good += good
        if not mask.any():
            return
        bad = index[mask]
        self.bad += np.bincount(bad, minlength=bins)
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        sizes = np.bincount(labels.ravel(), minlength=count)
        regions = np.bincount(bad, weights=1.0 / sizes[labels[mask]], minlength=bins).astype(float)
        self.regions += regions
        self.region_count += count - 1
        self.image_pros.append(image_pro_area(good, regions))

    def joined(self, *others: PixelMetrics) -> PixelMetrics:
        """What one object would hold that had been given the maps of all; they share a scale."""
        total = PixelMetrics(self.scale)
        for part in (self, *others):
            total.good += part.good
            total.bad += part.bad
            total.regions += part.regions
            total.region_count += part.region_count
            total.image_pros += part.image_pros
        return total

    def pro_curve(self) -> tuple[Floats, Floats]:
        """Pooled false positive rate and mean per-region overlap, both ascending, ``(bins + 1,)``."""
        return rate_curve(self.good, self.regions)

    def result(self) -> dict[str, float]:
        """The figures by name; empty where no anomalous pixel was seen."""
        if not self.region_count:
            return {}
        regions = self.regions / self.region_count
        image_pros = [pro for pro in self.image_pros if not math.isnan(pro)]
        return {
            "pixel_auroc": auroc(self.good, self.bad),
            "pixel_ap": average_precision(self.good, self.bad),
            "pixel_f1_max": f1_max(self.good, self.bad),
            "aupro": pro_curve_area(self.good, regions, PRO_LIMIT),
            "aupro_0.05": pro_curve_area(self.good, regions, 0.05),
            "pro_per_image": float(np.mean(image_pros)) if image_pros else NOTHING,
        }
