"""Intake: frames off the ZeroMQ sockets, into the ledger and the engines' queues. Never blocks, never decodes.

One thread owns all sockets. What a connection may bring is bounded before it is looked at; on a CURVE socket, a frame
counts only if its connection was let in with the key of the camera that it names.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Protocol

import structlog
import zmq

from pipeline import curve, wire
from pipeline.config import Limits, Socket
from pipeline.connections import Connections, is_open
from pipeline.curve import Gate, ServerKeys
from pipeline.ledger import Ledger
from pipeline.parts import UNKNOWN, Part, Reason
from pipeline.wire import Header, WireError

log = structlog.get_logger(__name__)

KINDS: Final = {"pull": zmq.PULL, "sub": zmq.SUB, "rep": zmq.REP}
MAX_NUMBERED: Final = 1024
BURST: Final = 32
"""Messages taken from one socket before the next one has its turn."""
LOG_EVERY_S: Final = 1.0
MAX_PARTS: Final = 3
SKIP_BURST: Final = 4096
"""Parts too many of one message that are thrown away before the next socket has its turn."""
CHECK_S: Final = 0.1
"""Time between two looks at what the connections hold back."""
KEEPALIVE: Final = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 10,
    zmq.TCP_KEEPALIVE_INTVL: 5,
    zmq.TCP_KEEPALIVE_CNT: 3,
}
"""A camera that has lost its power gives its connection free after 25 s."""


class Queue(Protocol):
    """Where an admitted part goes: on to an engine's scheduler."""

    def put(self, part: Part) -> None:
        """Queue a part, and answer those that are given up for it."""
        ...


class Intake:
    """Receives frames.

    Args:
        sockets: ``[[sockets]]``.
        limits: ``[limits]``.
        ledger: Opens and answers parts.
        queue_of: The queue of a camera's engine.
        context: ZeroMQ context; the caller terminates it.
        keys: Keys of the line and its cameras, where a socket has ``curve``.

    Raises:
        OSError: if a socket cannot be opened.
    """

    def __init__(
        self,
        sockets: tuple[Socket, ...],
        limits: Limits,
        ledger: Ledger,
        queue_of: Callable[[str], Queue | None],
        context: zmq.Context[zmq.Socket[bytes]],
        keys: ServerKeys | None = None,
    ) -> None:
        self._limits, self._ledger, self._queue_of = limits, ledger, queue_of
        self._poller = zmq.Poller()
        self._sockets: dict[zmq.Socket[bytes], Socket] = {}
        self._connections: dict[zmq.Socket[bytes], Connections] = {}
        self._monitors: dict[zmq.Socket[bytes], Connections] = {}
        self._unfinished: dict[zmq.Socket[bytes], list[zmq.Frame]] = {}
        self._cameras = keys.cameras if keys else {}
        self._gate: Gate | None = None
        self._next_check = 0.0
        self._stopping = False
        self._numbers: Counter[str] = Counter()
        self._session = time.time_ns()
        self._next_log = 0.0
        self.counts: Counter[str] = Counter()
        self.beat = 0
        try:
            if keys is not None:
                self._gate = Gate(context, keys)
            for settings in sockets:
                self._open(context, settings, keys)
        except BaseException as error:
            self.close()
            if not isinstance(error, zmq.ZMQError):
                raise
            msg = f"sockets: cannot {settings.mode} {settings.address}: {error}; is it in use, is the address right?"
            raise OSError(msg) from error

    def _open(self, context: zmq.Context[zmq.Socket[bytes]], settings: Socket, keys: ServerKeys | None = None) -> None:
        socket = context.socket(KINDS[settings.kind])
        self._sockets[socket] = settings
        socket.linger = 0
        socket.rcvhwm = self._limits.receive_queue
        socket.maxmsgsize = self._limits.max_frame_bytes
        socket.handshake_ivl = self._limits.handshake_ms
        for option, value in KEEPALIVE.items():
            socket.setsockopt(option, value)
        if settings.curve:
            if keys is None:
                msg = f"sockets: {settings.address} has curve = true, and there are no keys: see [curve] in the config"
                raise curve.CurveError(msg)
            curve.serve(socket, keys)
        if is_open(settings):
            log.warning("socket_unprotected", address=settings.address)
        if settings.kind == "sub":
            socket.subscribe(b"")
        connections = Connections(context, socket, settings, self._limits, self._refuse)
        self._connections[socket] = self._monitors[connections.monitor] = connections
        self._poller.register(connections.monitor, zmq.POLLIN)
        (socket.bind if settings.mode == "bind" else socket.connect)(settings.address)
        self._poller.register(socket, zmq.POLLIN)

    def run(self) -> None:
        """Receive until :meth:`stop`; the body of the intake thread. Closes the sockets at the end."""
        try:
            while not self._stopping:
                drained = True
                for socket, _ in self._poller.poll(100):
                    if socket in self._monitors:
                        self._monitors[socket].read()
                    else:
                        drained &= self._drain(socket, self._sockets[socket])
                self._check(drained=drained)
                if self._gate is None or self._gate.alive:  # without it no camera can connect: the line is stuck
                    self.beat = time.monotonic_ns()
        finally:
            self.close()

    def stop(self) -> None:
        """Ask the thread to end."""
        self._stopping = True

    def close(self) -> None:
        """Close the sockets."""
        for connections in self._connections.values():
            connections.close()
        self._connections.clear()
        for socket in self._sockets:
            socket.close(linger=0)
        self._sockets.clear()
        if self._gate is not None:
            self._gate.stop()

    def _check(self, *, drained: bool) -> None:
        """Look now and then at what the connections hold back."""
        now = time.monotonic()
        if now >= self._next_check:
            self._next_check = now + CHECK_S
            for connections in self._connections.values():
                connections.check(drained=drained)

    def _drain(self, socket: zmq.Socket[bytes], settings: Socket) -> bool:
        """Take what a socket has, up to a burst; say whether that was all."""
        handle = self._imagezmq if settings.protocol == "imagezmq" else self._dmdd
        for _ in range(BURST):
            try:
                message = self._receive(socket)
            except zmq.Again:
                return True
            if message is None:
                return False
            self._connections[socket].heard(message[0])
            try:
                handle(message, settings)
            except WireError as error:
                self._refuse(error)
            except Exception:
                # Not foreseen. The line goes on; a part that was opened is answered at its deadline.
                self.counts["refused_internal"] += 1
                log.exception("intake_failed")
            if settings.kind == "rep":
                socket.send(b"OK")
        return False

    def _receive(self, socket: zmq.Socket[bytes]) -> list[zmq.Frame] | None:
        """The next message, with one part more than a message may have where it has more, the rest thrown away.

        Returns:
            None if it has so many parts that the other sockets have to have their turn; go on with the next call.

        Raises:
            zmq.Again: if there is none.
        """
        message = self._unfinished.pop(socket, [])
        for _ in range(SKIP_BURST):
            part = socket.recv(zmq.NOBLOCK, copy=False)
            if len(message) <= MAX_PARTS:
                message.append(part)
            if not part.more:
                return message
        self._unfinished[socket] = message
        return None

    def _dmdd(self, message: list[zmq.Frame], settings: Socket) -> None:
        user = curve.user_of(message[0]) if settings.curve else None
        if settings.curve and user is None:
            raise WireError("unauthenticated", "a message over a connection that no key was checked of")
        if len(message) not in (2, 3):
            raise WireError("bad_message", f"message of {len(message)} parts, expected camera, header, pixels")
        camera = wire.decode_camera(message[0].bytes)
        if settings.curve and self._cameras.get(camera) != user:
            raise WireError("wrong_key", f"camera {camera}: not the key that may send as it")
        header = wire.decode_header(message[1].bytes)
        if header.eos:
            self._ledger.end_of_stream(camera, header)
            return
        pixels = message[2].buffer if len(message) == 3 else None
        self._take(camera, header, pixels)

    def _imagezmq(self, message: list[zmq.Frame], _: Socket) -> None:
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
        queue.put(part)

    def _refuse(self, error: WireError) -> None:
        """Count a message in which no part can be named; say so at most once a second."""
        self.counts[f"refused_{error.counter}"] += 1
        now = time.monotonic()
        if now >= self._next_log:
            self._next_log = now + LOG_EVERY_S
            log.warning("message_refused", counter=error.counter, error=str(error), total=self.counts.total())
