"""What the line counts and times about its parts, and the list of every metric.

A lane or the intake only leaves time stamps in a part. When the part is answered it is put into a deque, and counted
from there by another thread: no lock, label or bucket is looked up on the way of a frame.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Collection, Hashable
from typing import Final, NamedTuple, TypeVar

from pipeline.open_parts import Outbox
from pipeline.parts import Finding, Part

OTHER: Final = "(other)"
"""Stands for all cameras that are not in the config: a sender cannot make new series."""
MAX_ENGINES: Final = 64
"""Versions of engines whose times are kept; the one that has judged nothing for longest gives way to a new one."""
KEPT: Final = 1 << 17
"""Answered parts that wait to be counted, at most: minutes, should the thread that counts be held up."""

BOUNDS_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
BOUNDS_NS: Final = tuple(int(bound * 1e9) for bound in BOUNDS_S)

Key = TypeVar("Key", bound=Hashable)


class Family(NamedTuple):
    """A metric: its name, what Prometheus calls its type, its labels, and what it says."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


FAMILIES: Final = {
    family.name: family
    for family in (
        Family("dmdd_parts_total", "counter", ("camera", "verdict", "reason"), "parts answered"),
        Family("dmdd_refused_total", "counter", ("cause",), "messages that no part can be named in, or repeated"),
        Family("dmdd_late_total", "counter", (), "results that came after their part's verdict"),
        Family("dmdd_published_total", "counter", (), "records that Redis took"),
        Family("dmdd_spooled_total", "counter", (), "records that went to the spool"),
        Family("dmdd_lost_total", "counter", (), "records that neither Redis nor the spool took"),
        Family("dmdd_redis_failures_total", "counter", (), "attempts that Redis failed"),
        Family("dmdd_heartbeats_total", "counter", (), "heartbeats written"),
        Family("dmdd_batches_total", "counter", ("engine",), "batches run"),
        Family("dmdd_inspected_total", "counter", ("engine",), "parts run, in time or not"),
        Family("dmdd_lane_faults_total", "counter", ("engine",), "failures of lanes"),
        Family("dmdd_open_parts", "gauge", (), "parts without a verdict"),
        Family("dmdd_queue_parts", "gauge", ("engine",), "parts that wait for a lane"),
        Family("dmdd_lanes", "gauge", ("engine",), "lanes that work"),
        Family("dmdd_spool_bytes", "gauge", (), "size of the spool"),
        Family("dmdd_state", "gauge", ("state",), "1 for the state that the line is in"),
        Family("dmdd_degraded", "gauge", ("condition",), "1 for a condition that holds"),
        Family("dmdd_drift", "gauge", ("camera", "cause"), "1 for a likely cause of a camera's drift"),
        Family("dmdd_stage_seconds", "histogram", ("stage", "camera", "engine"), "time in each stage"),
        Family("dmdd_verdict_seconds", "histogram", ("camera",), "from arrival to verdict"),
    )
}
"""Every metric that the line serves; the table in ``docs/operations.md`` is checked against it."""


class Histogram:
    """Counts by upper bound, and the sum, of nanoseconds."""

    __slots__ = ("counts", "total_ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_NS) + 1)
        self.total_ns = 0

    def observe(self, elapsed: int) -> None:
        """Count a span of nanoseconds."""
        self.counts[bisect_left(BOUNDS_NS, elapsed)] += 1
        self.total_ns += elapsed


class Recorder:
    """The ledger's outbox, which passes everything on and keeps the answered parts for :class:`Meter`.

    Args:
        outbox: The publisher.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self.answered: deque[Part] = deque(maxlen=KEPT)

    def reject(self, part: Part) -> None:
        """Pass a reject on."""
        self._outbox.reject(part)

    def record(self, part: Part) -> None:
        """Pass a part on in its camera's order, and keep it to be counted."""
        self.answered.append(part)
        self._outbox.record(part)

    def late(self, part: Part, finding: Finding) -> None:
        """Pass a late result on."""
        self._outbox.late(part, finding)


class Meter:
    """Counts parts and times their stages. One thread at a time.

    Args:
        cameras: The configured cameras.

    Attributes:
        parts: Answered parts by camera, verdict and reason.
        verdicts: From arrival to verdict, by camera.
        stages: By engine, then by stage and camera.
        arrivals: Monotonic nanoseconds of each configured camera's last answered part.
    """

    def __init__(self, cameras: Collection[str]) -> None:
        self._cameras = frozenset(cameras)
        self.parts: Counter[tuple[str, str, str]] = Counter()
        self.verdicts: dict[str, Histogram] = {}
        self.stages: OrderedDict[str, dict[tuple[str, str], Histogram]] = OrderedDict()
        self.arrivals: dict[str, int] = {}

    def count(self, part: Part) -> None:
        """Count an answered part and every stage that it has passed but the last."""
        finding = part.finding
        if finding is None:  # the end of a stream, which is no part
            return
        camera = self._label(part)
        self.parts[camera, finding.verdict.value, finding.reason.value] += 1
        _observe(self.verdicts, camera, part.latency_us * 1000)
        if camera is not OTHER:
            self.arrivals[camera] = part.arrival
        stages = self._of(finding.engine)
        for stage, begun, ended in (
            ("intake", part.arrival, part.queued),
            ("queue", part.queued, part.taken),
            ("decode", part.taken, part.submitted),
            ("execute", part.submitted, part.done),
            ("judge", part.done, part.judged),
        ):
            if begun and ended:
                _observe(stages, (stage, camera), ended - begun)

    def count_published(self, part: Part) -> None:
        """Time the last stage of a part that is in Redis or in the spool, if it came so far."""
        if part.finding is not None and part.published and part.judged:
            span = part.published - part.judged
            _observe(self._of(part.finding.engine), ("publish", self._label(part)), span)

    def _label(self, part: Part) -> str:
        return part.camera if part.camera in self._cameras else OTHER

    def _of(self, engine: str) -> dict[tuple[str, str], Histogram]:
        known = self.stages.get(engine)
        if known is None:
            while len(self.stages) >= MAX_ENGINES:
                self.stages.popitem(last=False)
            known = self.stages[engine] = {}
        self.stages.move_to_end(engine)
        return known


def _observe(histograms: dict[Key, Histogram], key: Key, elapsed: int) -> None:
    found = histograms.get(key)
    if found is None:
        found = histograms[key] = Histogram()
    found.observe(elapsed)
