"""systemd's notifications, over a real datagram socket as systemd opens it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.notify import Notifier


def listening(address: str) -> socket.socket:
    """What systemd listens on."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    channel.bind(address)
    channel.settimeout(10)
    return channel


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A manager that has told the service where to report."""
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with listening(address) as channel:
        yield channel


def test_each_message_is_one_datagram(systemd: socket.socket) -> None:
    """The words are those of sd_notify(3)."""
    notifier = Notifier()
    notifier.ready()
    notifier.watchdog()
    notifier.status("waiting for Redis")
    notifier.stopping()
    got = [systemd.recv(256) for _ in range(4)]
    assert got == [b"READY=1", b"WATCHDOG=1", b"STATUS=waiting for Redis", b"STOPPING=1"]


def test_a_status_is_told_when_it_changes(systemd: socket.socket) -> None:
    """The same line again is not sent again; an old one that comes back is."""
    notifier = Notifier()
    for text in ("Ready", "Ready", "Error", "Ready"):
        notifier.status(text)
    notifier.stopping()
    assert [systemd.recv(256) for _ in range(4)] == [b"STATUS=Ready", b"STATUS=Error", b"STATUS=Ready", b"STOPPING=1"]


def test_a_start_is_extended_by_as_much_as_is_new(systemd: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand steps of a build are a message a second; what reaches further than the last is sent at once."""
    clock = [100.0]
    monkeypatch.setattr("pipeline.notify.time.monotonic", lambda: clock[0])
    notifier = Notifier()
    sent = 0
    for step in range(1000):
        clock[0] = 100 + step / 250
        sent += notifier.extend(120)
    assert sent == 4
    assert notifier.extend(600)
    assert not notifier.extend(120)
    notifier.stopping()
    got = [systemd.recv(256) for _ in range(6)]
    assert got == [b"EXTEND_TIMEOUT_USEC=120000000"] * 4 + [b"EXTEND_TIMEOUT_USEC=600000000", b"STOPPING=1"]


def test_an_abstract_socket_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that begins with @ is in the abstract name space, as containers have it."""
    name = f"dmdd-test-{tmp_path.name}-{id(tmp_path)}"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
    with listening(f"\0{name}") as channel:
        Notifier().ready()
        assert channel.recv(256) == b"READY=1"


def test_nothing_is_sent_where_there_is_no_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by hand, the service reports to nobody and opens no socket for it."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("a socket was opened"))
    notifier = Notifier()
    notifier.ready()
    notifier.status("Ready")
    notifier.stopping()


def test_a_vanished_service_manager_does_not_stop_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notification socket that nobody listens on is passed over: inspecting parts matters more."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    notifier = Notifier()
    notifier.ready()
    notifier.watchdog()
    assert not (tmp_path / "gone").exists()
