"""From an engine's score and heatmap to a verdict with its evidence."""

from __future__ import annotations

import cv2
import numpy as np

from engines.bundle import Bundle
from engines.frames import Pixels
from pipeline.parts import Finding, Reason, Verdict


class Judge:
    """Applies one engine's threshold.

    Args:
        bundle: The engine.
        keep_all: Whether good parts keep their heatmap too.
    """

    def __init__(self, bundle: Bundle, *, keep_all: bool = False) -> None:
        manifest = bundle.manifest
        self._engine, self._threshold = bundle.label, manifest.threshold.value
        self._level = max(1, round(manifest.output.level(self._threshold)))
        self._size = manifest.input.width, manifest.input.height
        self._keep_all = keep_all

    def __call__(self, score: float, heatmap: Pixels, *, sampled: bool = False) -> Finding:
        """Judge one part.

        Args:
            score: The engine's finite score.
            heatmap: uint8 ``(h, w)``, still the lane's own memory: it is copied where it is kept.
            sampled: Whether the part is shown even if it is good.
        """
        if score <= self._threshold:
            return Finding(
                Verdict.OK,
                Reason.BELOW_THRESHOLD,
                score,
                self._threshold,
                self._engine,
                heatmap=heatmap.copy() if self._keep_all or sampled else None,
                sampled=sampled,
            )
        area, box = self._region(heatmap)
        return Finding(
            Verdict.NG,
            Reason.ABOVE_THRESHOLD,
            score,
            self._threshold,
            self._engine,
            area,
            box,
            int(heatmap.max()),
            heatmap.copy(),
        )

    def _region(self, heatmap: Pixels) -> tuple[int, tuple[int, int, int, int] | None]:
        """Area and bounding box above the threshold, in pixels of the engine's input."""
        hot = (heatmap >= self._level).astype(np.uint8)
        area = int(cv2.countNonZero(hot))
        if not area:
            return 0, None
        x, y, width, height = cv2.boundingRect(hot)
        across, down = self._size[0] / heatmap.shape[1], self._size[1] / heatmap.shape[0]
        box = round(x * across), round(y * down), round(width * across), round(height * down)
        return round(area * across * down), box
