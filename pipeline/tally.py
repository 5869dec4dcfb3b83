"""Counting verdicts as they stand in Redis: who was answered, how often, how well, how fast."""

from __future__ import annotations

from collections import Counter

import numpy as np

from pipeline.records import Fields, is_reject
from pipeline.simulator import GOOD


class Tally:
    """Counts records against what the cameras sent.

    Attributes:
        expected: Parts of each finished session, by ``(camera, session)``.
    """

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.expected: dict[tuple[str, str], int] = {}
        self.camera_failures = 0
        self._seen: Counter[tuple[str, str, int]] = Counter()
        self._outcomes: Counter[tuple[bool, bool]] = Counter()
        self._latencies: list[int] = []

    @property
    def parts(self) -> int:
        """Different parts with a verdict."""
        return len(self._seen)

    def add(self, fields: Fields) -> None:
        """Count one record."""
        self._seen[fields["camera"], fields["session"], int(fields["seq"])] += 1
        self.verdicts[fields["verdict"]] += 1
        self._latencies.append(int(fields["latency_us"]))
        if fields["truth"]:
            self._outcomes[fields["truth"] != GOOD, is_reject(fields["verdict"])] += 1

    def expect(self, camera: str, session: str, parts: int) -> None:
        """Say how many parts a session had."""
        self.expected[camera, session] = parts

    def unanswered(self) -> int:
        """Parts that were sent and have no verdict."""
        return sum(
            (camera, session, seq) not in self._seen
            for (camera, session), parts in self.expected.items()
            for seq in range(parts)
        )

    def doubled(self) -> int:
        """Parts with more than one verdict."""
        return sum(count > 1 for count in self._seen.values())

    def failures(self) -> list[str]:
        """What went wrong, in words; empty if every part was answered exactly once."""
        checks = {
            f"{self.unanswered()} parts without a verdict": self.unanswered(),
            f"{self.doubled()} parts with more than one verdict": self.doubled(),
            f"{self.camera_failures} cameras failed": self.camera_failures,
            "no part was seen": not self.parts,
        }
        return [text for text, failed in checks.items() if failed]

    def figures(self) -> dict[str, float | int]:
        """Everything that was counted, by name; latencies in milliseconds from arrival to verdict."""
        latencies = np.array(self._latencies or [0]) / 1000
        bad, good = (sum(self._outcomes[truth, out] for out in (True, False)) for truth in (True, False))
        return {
            "parts": self.parts,
            "ok": self.verdicts["OK"],
            "ng": self.verdicts["NG"],
            "unknown": self.verdicts["UNKNOWN"],
            "unanswered": self.unanswered(),
            "answered_more_than_once": self.doubled(),
            "latency_p50_ms": round(float(np.percentile(latencies, 50)), 2),
            "latency_p99_ms": round(float(np.percentile(latencies, 99)), 2),
            "defective_parts": bad,
            "defective_parts_caught": self._outcomes[True, True],
            "good_parts": good,
            "good_parts_rejected": self._outcomes[False, True],
        }
