"""AUROC, average precision and AUPRO from histograms: memory does not grow with the number of pixels."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


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
    return float((positives * (below + negatives / 2)).sum() / total) if total else float("nan")


def average_precision(negatives: Floats, positives: Floats) -> float:
    """Area under precision over recall as a step function, bins taken from the highest score down."""
    if not positives.sum():
        return float("nan")
    hits, misses = np.cumsum(positives[::-1]), np.cumsum(negatives[::-1])
    precision = hits / np.maximum(hits + misses, 1e-300)
    return float((precision * positives[::-1]).sum() / hits[-1])


def pro_curve_area(negatives: Floats, regions: Floats, limit: float = 0.3) -> float:
    """Area under per-region overlap against pooled false positive rate up to ``limit``, normalised to 1.

    Args:
        negatives: Good pixels in each bin.
        regions: Each region's pixels in each bin, weighted by one over (region size x number of regions).
        limit: The false positive rate at which to stop (Bergmann et al. 2021: 0.3).
    """
    if not regions.sum() or not negatives.sum():
        return float("nan")
    fpr = np.concatenate([[0.0], np.cumsum(negatives[::-1]) / negatives.sum()])
    pro = np.concatenate([[0.0], np.cumsum(regions[::-1])])
    # The first point at or beyond the limit; where several lie exactly on it, the curve's rise there is beyond it.
    last = int(np.argmax(fpr >= limit))
    share = (limit - fpr[last - 1]) / (fpr[last] - fpr[last - 1])
    end = pro[last - 1] + share * (pro[last] - pro[last - 1])
    return float(np.trapezoid(np.append(pro[:last], end), np.append(fpr[:last], limit)) / limit)


def image_metrics(scores: Floats, defective: NDArray[np.bool_]) -> dict[str, float]:
    """Image AUROC and average precision, exact: every distinct score is a bin of its own."""
    _, bins = np.unique(scores, return_inverse=True)
    count = int(bins.max()) + 1 if len(bins) else 0
    negatives = np.bincount(bins[~defective], minlength=count).astype(float)
    positives = np.bincount(bins[defective], minlength=count).astype(float)
    return {
        "image_auroc": auroc(negatives, positives),
        "image_ap": average_precision(negatives, positives),
    }


class PixelMetrics:
    """Pixel AUROC, average precision and pooled AUPRO over any number of maps in constant memory.

    Args:
        bins: Histogram bins over ``[0, top]``; the error of each figure is of the order of one over ``bins``.
        top: Largest value that a map can have.
    """

    def __init__(self, bins: int = 1 << 14, top: float = 255.0) -> None:
        self.bins, self.top = bins, top
        self.good = np.zeros(bins)
        self.bad = np.zeros(bins)
        self.regions = np.zeros(bins)
        self.region_count = 0

    def add(self, heatmap: NDArray[np.float32], mask: NDArray[np.bool_]) -> None:
        """Count one map ``(h, w)`` against its ground truth of the same shape."""
        index = np.minimum((heatmap * (self.bins / self.top)).astype(np.intp), self.bins - 1)
        self.good += np.bincount(index[~mask], minlength=self.bins)
        if not mask.any():
            return
        self.bad += np.bincount(index[mask], minlength=self.bins)
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        sizes = np.bincount(labels.ravel(), minlength=count)
        weights = 1.0 / sizes[labels[mask]]
        self.regions += np.bincount(index[mask], weights=weights, minlength=self.bins)
        self.region_count += count - 1

    def result(self) -> dict[str, float]:
        """The figures by name; empty where no anomalous pixel was seen."""
        if not self.region_count:
            return {}
        regions = self.regions / self.region_count
        return {
            "pixel_auroc": auroc(self.good, self.bad),
            "pixel_ap": average_precision(self.good, self.bad),
            "aupro": pro_curve_area(self.good, regions, 0.3),
            "aupro_0.05": pro_curve_area(self.good, regions, 0.05),
        }
