"""The proxy: it passes on what comes, and does to connections what it is told to."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.soak.proxy import Proxy, Weather, free_port


class Echo:
    """A server that sends back what it gets."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.got = bytearray()
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            try:
                while data := peer.recv(65536):
                    self.got += data
                    peer.sendall(data)
            except OSError:
                return


@pytest.fixture
def echo() -> Iterator[Echo]:
    """A server behind the proxy."""
    server = Echo()
    yield server
    server.listener.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    """A proxy to it."""
    made = Proxy(echo.port)
    yield made
    made.close()


def connect(proxy: Proxy) -> socket.socket:
    """A connection through the proxy."""
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


def exchange(peer: socket.socket, data: bytes) -> bytes:
    """Send, and read as much back."""
    peer.sendall(data)
    got = bytearray()
    while len(got) < len(data) and (more := peer.recv(65536)):
        got += more
    return bytes(got)


def test_bytes_pass_unchanged(proxy: Proxy) -> None:
    """Both ways, in order, a megabyte of them."""
    data = bytes(range(256)) * 4096
    with connect(proxy) as peer:
        assert exchange(peer, data) == data
    assert proxy.counts["accepted"] == 1


def test_delay(proxy: Proxy) -> None:
    """Each way takes the set time more."""
    proxy.weather = Weather(delay_s=0.15)
    with connect(proxy) as peer:
        started = time.monotonic()
        assert exchange(peer, b"ping") == b"ping"
        assert 0.3 <= time.monotonic() - started < 5
    assert proxy.counts["delayed"] > 0


def test_throttle(proxy: Proxy) -> None:
    """No more bytes a second than were set."""
    proxy.weather = Weather(bytes_s=20_000)
    with connect(proxy) as peer:
        started = time.monotonic()
        assert exchange(peer, bytes(4000)) == bytes(4000)
        assert time.monotonic() - started >= 0.2


def test_reset(proxy: Proxy) -> None:
    """A reset is seen as one, not as an orderly end."""
    with connect(proxy) as peer:
        exchange(peer, b"x")
        proxy.cut(reset=True)
        with pytest.raises(ConnectionResetError):
            peer.recv(1)


def test_closed(proxy: Proxy) -> None:
    """Connections end at once while the way is closed, and work again afterwards."""
    proxy.weather = Weather(closed=True)
    with connect(proxy) as peer, contextlib.suppress(ConnectionResetError):
        assert peer.recv(1) == b""
    proxy.weather = Weather()
    with connect(proxy) as peer:
        assert exchange(peer, b"x") == b"x"


def test_a_connection_that_has_lost_bytes_stays_mute(proxy: Proxy, echo: Echo) -> None:
    """Half-open: what comes is swallowed, and nothing follows the hole on the same connection."""
    with connect(proxy) as peer:
        exchange(peer, b"before")
        proxy.weather = Weather(silent=True)
        peer.sendall(b"hole")
        until = time.monotonic() + 10
        while not proxy.counts["swallowed"] and time.monotonic() < until:
            time.sleep(0.01)
        proxy.weather = Weather()
        peer.sendall(b"after")
        peer.settimeout(0.3)
        with pytest.raises(TimeoutError):
            peer.recv(1)
    assert bytes(echo.got) == b"before"
    with connect(proxy) as peer:
        assert exchange(peer, b"anew") == b"anew"


def test_a_dead_target_ends_the_connection() -> None:
    """Where nobody listens behind the proxy, the peer is told so by an end."""
    proxy = Proxy(free_port())
    with connect(proxy) as peer, contextlib.suppress(ConnectionResetError):
        assert peer.recv(1) == b""
    proxy.close()
    assert not any(thread.name == "proxy" and thread.is_alive() for thread in threading.enumerate())
