"""The last parts of each camera, and figures of them. Pure logic; the caller has the clock and the lock."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from pipeline.records import Fields

KEPT: Final = 2000
"""Parts of a camera that are kept."""
SECONDS: Final = 120
"""Seconds of the charts."""
VERDICTS: Final = ("OK", "NG", "UNKNOWN")
Number = tuple[str, str, str]
"""Camera, session and sequence number, as they stand in a record."""


def number_of(record: Fields) -> Number:
    """What makes a part the same part."""
    return record["camera"], record["session"], record["seq"]


class CameraHistory:
    """What one camera has seen of late."""

    def __init__(self) -> None:
        self.parts: deque[Fields] = deque(maxlen=KEPT)
        self._pictured: Fields | None = None
        self._seconds: deque[tuple[int, Counter[str], list[float]]] = deque(maxlen=SECONDS)

    def add(self, record: Fields) -> None:
        """Take the record of the camera's next part."""
        self.parts.append(record)
        self._pictured = record if record.get("frame") else self._pictured
        second = int(record["t_verdict_ns"]) // 1_000_000_000
        if not self._seconds or self._seconds[-1][0] < second:
            self._seconds.append((second, Counter(), []))
        _, verdicts, latencies = self._seconds[-1]
        verdicts[record["verdict"]] += 1
        latencies.append(int(record["latency_us"]) / 1000)

    def chart(self, now_s: int) -> list[dict[str, float]]:
        """One point for each second that had parts: parts by verdict, and the slowest, in milliseconds."""
        return [
            {"s": second - now_s, **{name: verdicts[name] for name in VERDICTS}, "ms": round(max(latencies), 1)}
            for second, verdicts, latencies in self._seconds
            if second > now_s - SECONDS
        ]

    def figures(self, now_s: int) -> dict[str, Any]:
        """Rates of the last minute, and of all that is kept."""
        minute = [entry for entry in self._seconds if now_s - 60 < entry[0] <= now_s]
        verdicts = sum((one for _, one, _ in minute), Counter())
        latencies = np.array([value for _, _, values in minute for value in values])
        quantiles = np.quantile(latencies, (0.5, 0.99)).round(1).tolist() if len(latencies) else [None, None]
        total = verdicts.total()
        return {
            "rate": round(total / max(1, min(60, now_s - minute[0][0] + 1)), 2) if minute else 0.0,
            "yield": round(verdicts["OK"] / total, 4) if total else None,
            "p50": quantiles[0],
            "p99": quantiles[1],
            **{name: verdicts[name] for name in VERDICTS},
        }

    def summary(self, now_s: int) -> dict[str, Any]:
        """Figures, chart, the last part, and the last one with an image."""
        last = self.parts[-1] if self.parts else None
        return {**self.figures(now_s), "chart": self.chart(now_s), "last": last, "pictured": self._pictured}

    def scores(self) -> dict[str, Any]:
        """Scores of the parts that an engine has judged, oldest first, with the newest threshold."""
        judged = [part for part in self.parts if part["score"]]
        return {
            "scores": [float(part["score"]) for part in judged],
            "threshold": float(judged[-1]["threshold"]) if judged else None,
            "engine": judged[-1]["engine"] if judged else "",
        }


class History:
    """What all cameras have seen.

    Attributes:
        serial: How many parts were taken so far; a reader's place in :meth:`since`.
    """

    def __init__(self, cameras: Iterable[str]) -> None:
        self.cameras = {camera: CameraHistory() for camera in cameras}
        self.serial = 0
        self._parts: deque[Fields] = deque(maxlen=KEPT)
        self._known: dict[Number, Fields] = {}
        self._order: deque[Number] = deque()

    def add(self, record: Fields) -> None:
        """Take a record; one of a camera that is not in the config is passed over."""
        camera = self.cameras.get(record.get("camera", ""))
        if camera is None:
            return
        camera.add(record)
        self._parts.append(record)
        self.serial += 1
        self._known[number_of(record)] = record
        self._order.append(number_of(record))
        while len(self._order) > KEPT * len(self.cameras):
            self._known.pop(self._order.popleft(), None)

    def find(self, number: Number) -> Fields | None:
        """The record of a part that is still kept."""
        return self._known.get(number)

    def since(self, serial: int, most: int) -> list[Fields]:
        """The newest parts after a reader's place, oldest first, at most ``most``."""
        new = min(self.serial - serial, len(self._parts), most)
        return [self._parts[index] for index in range(len(self._parts) - new, len(self._parts))] if new > 0 else []

    def select(self, camera: str, verdicts: frozenset[str], reason: str, most: int) -> list[Fields]:
        """The newest parts that a filter lets through, newest first; empty values let everything through."""
        found: list[Fields] = []
        for part in reversed(self._parts if not camera else self._of(camera)):
            if verdicts and part["verdict"] not in verdicts:
                continue
            if reason and part["reason"] != reason:
                continue
            found.append(part)
            if len(found) == most:
                break
        return found

    def _of(self, camera: str) -> deque[Fields]:
        known = self.cameras.get(camera)
        return known.parts if known is not None else deque()
