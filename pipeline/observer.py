"""The observer: a thread beside the line that counts, times, traces and watches answered parts for drift.

Nothing waits for it. Where it fails, the line goes on unobserved.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import redis
import structlog

from engines.bundle import BundleError
from pipeline.config import Camera, Drift
from pipeline.drift import CameraDrift, Change, Evidence
from pipeline.metrics import KEPT, Meter, Recorder
from pipeline.parts import Part
from pipeline.station import Station
from pipeline.trace import Tracer

log = structlog.get_logger(__name__)

PERIOD_S: Final = 0.25
PATIENCE_NS: Final = 5_000_000_000
"""A part that is not published so long after its answer is no longer waited for."""
REPORT_S: Final = 5.0
LAPSE_MS: Final = 20_000
"""The hash of a camera's drift lapses so long after the line has last written it."""

Clock = Callable[[], int]


class Hashes(Protocol):
    """Where a camera's drift is written."""

    def __call__(self, camera: str, fields: Mapping[str, str]) -> None:
        """Write the fields of one camera; raises :class:`redis.RedisError`."""
        ...


def hashes_in(client: redis.Redis, prefix: str) -> Hashes:
    """Writes ``PREFIX:drift:CAMERA``, which lapses where it is not renewed."""

    def write(camera: str, fields: Mapping[str, str]) -> None:
        key = f"{prefix}:drift:{camera}"
        with client.pipeline(transaction=True) as pipe:
            mapping: Any = dict(fields)
            pipe.hset(key, mapping=mapping)
            pipe.pexpire(key, LAPSE_MS)
            pipe.execute()

    return write


def calibrations(stations: Mapping[str, Station]) -> Evidence:
    """Gives the scores of the good parts that the threshold of an engine in memory was chosen from."""

    def scores_of(engine: str) -> Sequence[float] | None:
        resident = (bundle for station in stations.values() for bundle in station.resident())
        found = next((bundle for bundle in resident if bundle.label == engine), None)
        try:
            evidence = found.evidence() if found else None
        except (BundleError, OSError) as error:  # it was whole when the engine was loaded: no reason to stop
            log.warning("calibration_unreadable", engine=engine, error=str(error))
            return None
        return evidence.scores if evidence else None

    return scores_of


class Observer:
    """Takes answered parts from a recorder, and looks at each once.

    Args:
        recorder: Where answered parts are.
        cameras: ``[cameras]``.
        settings: ``[drift]``.
        evidence: Scores of an engine's calibration, or None, by ``name@version``.
        tracer: Logs single parts.
        write: Writes a camera's drift; None writes nothing.
        clock: Monotonic nanoseconds.

    Attributes:
        meter: What was counted.
        causes: Likely causes of drift by camera, of those that drift.
    """

    def __init__(
        self,
        recorder: Recorder,
        cameras: Mapping[str, Camera],
        settings: Drift,
        evidence: Evidence,
        tracer: Tracer,
        write: Hashes | None = None,
        clock: Clock = time.monotonic_ns,
    ) -> None:
        self.meter = Meter(cameras)
        self.causes: dict[str, list[str]] = {}
        self._recorder, self._settings, self._evidence, self._tracer = recorder, settings, evidence, tracer
        self._watched = frozenset(name for name, camera in cameras.items() if camera.drift_every)
        # By camera and engine, whatever its version: a swap changes the scores, not the images.
        self._drifts: dict[tuple[str, str], CameraDrift] = {}
        self._newest: dict[str, CameraDrift] = {}
        self._unpublished: deque[Part] = deque(maxlen=KEPT)
        self._write, self._clock = write, clock
        self._next_report = 0.0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)

    def start(self) -> None:
        """Begin to observe."""
        self._thread.start()

    def stop(self) -> None:
        """Look at what is left, and end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(5)

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            self._guarded(self.turn)
            self._guarded(self._report)
        self._guarded(self.turn)

    @staticmethod
    def _guarded(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            log.exception("observer_failed")

    def turn(self) -> None:
        """Look at what was answered since the last turn. Any thread may call it."""
        with self._lock:
            answered = self._recorder.answered
            for _ in range(len(answered)):
                part = answered.popleft()
                self.meter.count(part)
                self._watch(part)
                self._unpublished.append(part)
            self._see_off()

    def _see_off(self) -> None:
        """Be done with the parts that are published, or that nobody will publish any more."""
        waiting, now = self._unpublished, self._clock()
        while waiting:
            part = waiting[0]
            answered = part.arrival + part.latency_us * 1000
            if not part.published and now - answered < PATIENCE_NS:
                return
            waiting.popleft()
            self.meter.count_published(part)
            self._tracer.see(part)

    def _watch(self, part: Part) -> None:
        finding = part.finding
        if finding is None or not finding.engine or part.camera not in self._watched:
            return
        key = part.camera, finding.engine.partition("@")[0]
        drift = self._drifts.get(key)
        if drift is None:
            drift = self._drifts[key] = CameraDrift(self._settings, self._evidence)
        self._newest[part.camera] = drift
        if change := drift.feed(part):
            self._tell(part.camera, change, drift.report())
            self._next_report = 0.0

    def _tell(self, camera: str, change: Change, report: dict[str, str]) -> None:
        if change is Change.BASELINE:
            log.info("drift_baseline", camera=camera, parts=self._settings.baseline_parts, **report)
            return
        found = {cause.value for (name, _), drift in self._drifts.items() if name == camera for cause in drift.causes}
        others = {name: causes for name, causes in self.causes.items() if name != camera}
        self.causes = {**others, camera: sorted(found)} if found else others
        if change is Change.DRIFT:
            log.warning("drift", camera=camera, **report)
        else:
            log.info("drift_over", camera=camera, **report)

    def _report(self) -> None:
        """Write every camera's drift, now and then, and at once after a change."""
        now = time.monotonic()
        if self._write is None or now < self._next_report:
            return
        self._next_report = now + REPORT_S
        with self._lock:
            reports = {camera: drift.report() for camera, drift in self._newest.items()}
        for camera, fields in reports.items():
            fields["causes"] = ",".join(self.causes.get(camera, []))
            try:
                self._write(camera, {**fields, "t_ns": str(time.time_ns())})
            except redis.RedisError:  # the publisher says so in the log; these hashes come again
                return
