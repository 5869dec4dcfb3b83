"""Intake: frames off the ZeroMQ sockets, into the ledger and the engines' queues. Never blocks, never decodes.

One thread owns all sockets.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Protocol

import structlog
import zmq

from pipeline import wire
from pipeline.config import Limits, Socket
from pipeline.ledger import Ledger
from pipeline.parts import UNKNOWN, Part, Reason
from pipeline.wire import Header, WireError

log = structlog.get_logger(__name__)

KINDS: Final = {"pull": zmq.PULL, "sub": zmq.SUB, "rep": zmq.REP}
MAX_NUMBERED: Final = 1024
BURST: Final = 32
"""Messages taken from one socket before the next one has its turn."""
LOG_EVERY_S: Final = 1.0


class Queue(Protocol):
    """Where an admitted part goes: an engine's scheduler."""

    def put(self, part: Part) -> list[Part]:
        """Queue a part; return those that gave way to it."""
        ...


class Intake:
    """Receives frames.

    Args:
        sockets: ``[[sockets]]``.
        limits: ``[limits]``.
        ledger: Opens and answers parts.
        queue_of: The queue of a camera's engine.
        context: ZeroMQ context; the caller terminates it.
    """

    def __init__(
        self,
        sockets: tuple[Socket, ...],
        limits: Limits,
        ledger: Ledger,
        queue_of: Callable[[str], Queue | None],
        context: zmq.Context[zmq.Socket[bytes]],
    ) -> None:
        self._limits, self._ledger, self._queue_of = limits, ledger, queue_of
        self._poller = zmq.Poller()
        self._sockets: dict[zmq.Socket[bytes], Socket] = {}
        self._stopping = False
        self._numbers: Counter[str] = Counter()
        self._session = time.time_ns()
        self._next_log = 0.0
        self.counts: Counter[str] = Counter()
        self.beat = 0
        try:
            for settings in sockets:
                self._open(context, settings)
        except zmq.ZMQError as error:
            self.close()
            msg = f"sockets: cannot {settings.mode} {settings.address}: {error}; is it in use, is the address right?"
            raise OSError(msg) from error

    def _open(self, context: zmq.Context[zmq.Socket[bytes]], settings: Socket) -> None:
        socket = context.socket(KINDS[settings.kind])
        self._sockets[socket] = settings
        socket.linger = 0
        socket.rcvhwm = self._limits.receive_queue
        socket.maxmsgsize = self._limits.max_frame_bytes
        if settings.kind == "sub":
            socket.subscribe(b"")
        (socket.bind if settings.mode == "bind" else socket.connect)(settings.address)
        self._poller.register(socket, zmq.POLLIN)

    def run(self) -> None:
        """Receive until :meth:`stop`; the body of the intake thread. Closes the sockets at the end."""
        try:
            while not self._stopping:
                for socket, _ in self._poller.poll(100):
                    self._drain(socket, self._sockets[socket])
                self.beat = time.monotonic_ns()
        finally:
            self.close()

    def stop(self) -> None:
        """Ask the thread to end."""
        self._stopping = True

    def close(self) -> None:
        """Close the sockets."""
        for socket in self._sockets:
            socket.close(linger=0)
        self._sockets.clear()

    def _drain(self, socket: zmq.Socket[bytes], settings: Socket) -> None:
        handle = self._imagezmq if settings.protocol == "imagezmq" else self._dmdd
        for _ in range(BURST):
            try:
                message: list[zmq.Frame] = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                handle(message)
            except WireError as error:
                self._refuse(error)
            except Exception:
                # Not foreseen. The line goes on; a part that was opened is answered at its deadline.
                self.counts["refused_internal"] += 1
                log.exception("intake_failed")
            if settings.kind == "rep":
                socket.send(b"OK")

    def _dmdd(self, message: list[zmq.Frame]) -> None:
        if len(message) not in (2, 3):
            raise WireError("bad_message", f"message of {len(message)} parts, expected camera, header, pixels")
        camera = wire.decode_camera(message[0].bytes)
        header = wire.decode_header(message[1].bytes)
        if header.eos:
            self._ledger.end_of_stream(camera, header)
            return
        pixels = message[2].buffer if len(message) == 3 else None
        self._take(camera, header, pixels)

    def _imagezmq(self, message: list[zmq.Frame]) -> None:
        if len(message) != 2:
            raise WireError("bad_message", f"imagezmq message of {len(message)} parts, expected 2")
        camera, header = wire.decode_imagezmq(message[0].bytes, self._session, self._number)
        self._take(camera, header, message[1].buffer)

    def _number(self, camera: str) -> int:
        """The next sequence number of a camera whose sender numbers nothing."""
        if camera not in self._numbers and len(self._numbers) >= MAX_NUMBERED:
            raise WireError("too_many_cameras", f"imagezmq: more than {MAX_NUMBERED} different camera names")
        number = self._numbers[camera]
        self._numbers[camera] += 1
        return number

    def _take(self, camera: str, header: Header, pixels: Any) -> None:
        """Admit a frame and queue it, or answer its part at once with the reason why it cannot be inspected."""
        part = self._ledger.admit(camera, header)
        if part is None:
            return
        fault = "truncated" if pixels is None else wire.pixel_fault(header, len(pixels), self._limits.max_frame_bytes)
        if fault is not None:
            self._ledger.answer(part, UNKNOWN[Reason(fault)])
            return
        queue = self._queue_of(camera)
        if queue is None:
            self._ledger.answer(part, UNKNOWN[Reason.ENGINE_FAULT])
            return
        part.pixels = pixels
        for displaced in queue.put(part):
            self._ledger.answer(displaced, UNKNOWN[Reason.OVERLOAD])

    def _refuse(self, error: WireError) -> None:
        """Count a message in which no part can be named; say so at most once a second."""
        self.counts[f"refused_{error.counter}"] += 1
        now = time.monotonic()
        if now >= self._next_log:
            self._next_log = now + LOG_EVERY_S
            log.warning("message_refused", counter=error.counter, error=str(error), total=self.counts.total())
