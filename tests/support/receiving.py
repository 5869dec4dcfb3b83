"""A real intake with a real ledger behind real sockets, and an inspector that decodes and says OK."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import zmq

from engines.frames import FrameError
from pipeline.books import CameraBook
from pipeline.config import Camera, Limits, Socket
from pipeline.curve import ServerKeys
from pipeline.decode import into_slot
from pipeline.intake import Intake
from pipeline.ledger import Ledger
from pipeline.parts import UNKNOWN, Part, Reason
from tests.support.books import OK, Recorder

ANY_PORT = "tcp://127.0.0.1:*"
SIDE = 8


@dataclass
class Inspector:
    """A camera's queue: decodes a frame at once, as a lane does, and lets it pass."""

    ledger: Ledger
    camera: Camera
    held: list[Part] = field(default_factory=list)

    def put(self, part: Part) -> None:
        """Answer a part; hold none."""
        slot = np.zeros((SIDE, SIDE, 1), np.uint8)
        try:
            into_slot(part.header, part.pixels, self.camera, slot)
        except (FrameError, cv2.error):
            self.ledger.answer(part, UNKNOWN[Reason.UNDECODABLE])
        else:
            self.ledger.answer(part, OK)


@dataclass
class Receiving:
    """What a test sees of it."""

    intake: Intake
    ledger: Ledger
    outbox: Recorder
    context: zmq.Context[zmq.Socket[bytes]]
    addresses: list[str]

    @property
    def port(self) -> int:
        """Of the first socket."""
        return int(self.addresses[0].rpartition(":")[2])

    def counts(self) -> dict[str, int]:
        """Every counter that is not 0."""
        return {name: count for name, count in {**self.ledger.counts, **self.intake.counts}.items() if count}

    def until(self, condition: Callable[[], Any], seconds: float = 20.0) -> Any:
        """Wait until a condition holds, and return what it gave."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"waited in vain: {self.counts()}"
            time.sleep(0.005)
        return found


@contextmanager
def receiving(
    *sockets: Socket,
    cameras: dict[str, Camera] | None = None,
    limits: Limits | None = None,
    keys: ServerKeys | None = None,
    queue_of: Callable[[Ledger, str, Camera], Any] = lambda ledger, _, camera: Inspector(ledger, camera),
) -> Iterator[Receiving]:
    """Run an intake; at the end its threads are gone, and every socket of the context is closed."""
    before = set(threading.enumerate())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    outbox = Recorder()
    ledger = Ledger(outbox)
    queues: dict[str, Any] = {}
    for name, camera in (cameras or {"cam1": Camera(deadline_ms=20_000)}).items():
        ledger.register(CameraBook.of(name, camera))
        queues[name] = queue_of(ledger, name, camera)
    chosen = sockets or (Socket(address=ANY_PORT),)
    intake = Intake(chosen, limits or Limits(), ledger, queues.get, context, keys)
    addresses = [socket.last_endpoint.rstrip(b"\0").decode() for socket in intake._sockets]
    thread = threading.Thread(target=intake.run, name="intake")
    thread.start()
    try:
        yield Receiving(intake, ledger, outbox, context, addresses)
    finally:
        intake.stop()
        thread.join(20)
        ledger.close()
        context.term()  # would wait for ever for a socket that was left open
    left = set(threading.enumerate()) - before
    assert not left, f"threads left behind: {left}"
