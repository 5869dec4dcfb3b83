"""The supervisor: as systemd does it, start, watchdog, restart, stop; and all of it is written down."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.soak.history import Event, Lost, Recorder, read
from pipeline.soak.supervisor import Supervisor
from tests.support.line import until

SERVICE = """\
import json, signal, sys, time
from pipeline.notify import Notifier
notifier = Notifier()
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
print(json.dumps({"event": "hello"}), file=sys.stderr, flush=True)
notifier.ready()
end = time.monotonic() + float(sys.argv[1])
while not stopped:
    if time.monotonic() < end:
        notifier.watchdog()
    time.sleep(0.02)
notifier.stopping()
print(json.dumps({"event": "records_lost", "count": 4}), file=sys.stderr, flush=True)
"""


@contextmanager
def supervised(folder: Path, alive_s: float, watchdog_s: float = 1.0) -> Iterator[Supervisor]:
    """A service that feeds the watchdog for so long."""
    (folder / "service.py").write_text(SERVICE)
    command = [sys.executable, str(folder / "service.py"), str(alive_s)]
    with Recorder(folder / "supervisor.jsonl") as recorder:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        supervisor = Supervisor(command, environment, folder, recorder, watchdog_s=watchdog_s, restart_s=0.05)
        supervisor.start()
        try:
            until(lambda: supervisor.ready)
            yield supervisor
        finally:
            supervisor.stop()


def events(folder: Path) -> list[tuple[str, str]]:
    """What was written down."""
    return [(item.what, item.detail) for item in read(folder / "supervisor.jsonl") if isinstance(item, Event)]


def test_a_healthy_service_is_left_alone_and_stops_with_its_status(tmp_path: Path) -> None:
    """It is ready once, is not restarted, and ends by SIGTERM with 0."""
    with supervised(tmp_path, 3600) as supervisor:
        until(lambda: supervisor.samples)
        sample = supervisor.samples[0]
        assert sample.rss_kib > 1000
        assert sample.fds >= 3
        assert sample.threads >= 1
        assert supervisor.stop() == 0
    assert events(tmp_path) == [("started", ""), ("ready", ""), ("exited", "0")]
    assert next(item for item in read(tmp_path / "supervisor.jsonl") if isinstance(item, Lost)).count == 4


def test_a_killed_service_is_started_again(tmp_path: Path) -> None:
    """SIGKILL: another process is ready soon, and the death is on record."""
    with supervised(tmp_path, 3600) as supervisor:
        first = supervisor.pid
        supervisor.signal(signal.SIGKILL)
        until(lambda: supervisor.counts["ready"] == 2)
        assert supervisor.pid != first
        assert supervisor.seen("hello", 0)
    assert events(tmp_path)[:4] == [("started", ""), ("ready", ""), ("exited", "-9"), ("started", "")]


@pytest.mark.parametrize("halted", [False, True], ids=["silent", "halted"])
def test_the_watchdog_ends_what_no_longer_speaks(tmp_path: Path, halted: bool) -> None:
    """A service that is silent, or does not run at all, is ended and started again."""
    with supervised(tmp_path, 3600 if halted else 0.1, watchdog_s=0.5) as supervisor:
        if halted:
            supervisor.signal(signal.SIGSTOP)
        until(lambda: supervisor.counts["ready"] >= 2)
    found = [what for what, _ in events(tmp_path)]
    assert found[:5] == ["started", "ready", "watchdog", "exited", "started"]
