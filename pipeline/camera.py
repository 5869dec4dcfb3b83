"""A camera process: frames from a source to the line, numbered, timed and never silently lost."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

import structlog
import zmq

from pipeline import curve, wire
from pipeline.curve import KeyPair
from pipeline.sources import Frame, Source
from pipeline.wire import Header

log = structlog.get_logger(__name__)

IDLE_S: Final = 0.05
LOG_EVERY_S: Final = 10.0
REFUSED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
IPC_HOLD_S: Final = 0.25
"""How long an ipc socket stays open after the last message: what a busy line has not yet read when such a
socket closes is lost to it, whatever the linger time; tcp has no such flaw."""


@dataclass(frozen=True)
class Sending:
    """How a camera sends.

    Attributes:
        address: ZeroMQ address of the line.
        camera: Camera id.
        pattern: ``push`` or ``pub``.
        mode: ``connect`` or ``bind``.
        rate: Frames a second; 0 for as fast as the source gives them.
        count: Frames to send; 0 for all.
        buffer: Frames held while the line does not take them; the oldest gives way.
        wait: Hold the source back instead of dropping: for files, never for a live camera.
        linger_s: How long the end waits for unsent frames.
        key: This camera's key, for a line that asks for one.
        server_key: The line's public key, Z85; needed with ``key``.
    """

    address: str
    camera: str
    pattern: str = "push"
    mode: str = "connect"
    rate: float = 0.0
    count: int = 0
    buffer: int = 32
    wait: bool = False
    linger_s: float = 5.0
    key: KeyPair | None = None
    server_key: bytes = b""


class CameraSender:
    """Numbers every frame of the source and sends what the line takes.

    A frame that finds the buffer full pushes out the oldest one; its number is used up, so that the line
    sees the gap and answers the part.

    Args:
        source: The frames.
        settings: How to send.
    """

    def __init__(self, source: Source, settings: Sending) -> None:
        self._source, self._settings = source, settings
        self.session = time.time_ns()
        self.captured = self.sent = self.dropped = 0
        self._buffer: deque[tuple[Header, Frame]] = deque()
        self._changed = threading.Condition()
        self._done = False
        self._stopping = threading.Event()
        self._failure: Exception | None = None
        self.refused = 0
        self._next_log = 0.0

    def run(self) -> None:
        """Send until the source ends, ``count`` is reached or :meth:`stop`; then say so to the line.

        Raises:
            zmq.ZMQError: if the address cannot be used.
            Exception: whatever the source raised.
        """
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        capture = threading.Thread(target=self._capture, name="capture", daemon=True)
        try:
            with self._open(context) as socket, socket.get_monitor_socket(REFUSED) as monitor:
                self._attach(socket)
                capture.start()
                self._send_all(socket, monitor)
                self._finish(socket)
                socket.disable_monitor()
        finally:
            self.stop()
            if capture.is_alive():
                capture.join(5)
            context.destroy(linger=int(self._settings.linger_s * 1000))
        if self._failure is not None:
            raise self._failure

    def stop(self, *_: object) -> None:
        """Take no more frames; may be used as a signal handler."""
        self._stopping.set()

    def _open(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        publishes = self._settings.pattern == "pub"
        socket = context.socket(zmq.PUB if publishes else zmq.PUSH)
        # PUB never waits: what finds its own queue full is dropped there, so that queue has to be the buffer.
        socket.sndhwm = self._settings.buffer if publishes else 4
        socket.linger = int(self._settings.linger_s * 1000)
        if self._settings.key is not None:
            curve.join(socket, self._settings.key, self._settings.server_key)
        return socket

    def _attach(self, socket: zmq.Socket[bytes]) -> None:
        (socket.bind if self._settings.mode == "bind" else socket.connect)(self._settings.address)

    def _capture(self) -> None:
        """Take frames at the set rate; the body of the capture thread."""
        settings, due = self._settings, time.monotonic()
        try:
            for frame in self._source.frames():
                if settings.rate:
                    due = max(due + 1 / settings.rate, time.monotonic() - 1)
                    self._stopping.wait(max(due - time.monotonic(), 0))
                if self._stopping.is_set() or not self._put(frame):
                    break
                if settings.count and self.captured >= settings.count:
                    break
        except Exception as error:  # noqa: BLE001 - raised again by run() in the caller's thread
            self._failure = error
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _put(self, frame: Frame) -> bool:
        header = Header(
            seq=self.captured,
            session=self.session,
            w=frame.w,
            h=frame.h,
            fmt=frame.fmt,
            t_ns=time.time_ns(),
            part=frame.part,
            truth=frame.truth,
            simulated=frame.simulated,
        )
        with self._changed:
            while len(self._buffer) >= self._settings.buffer:
                if not self._settings.wait:
                    self._buffer.popleft()
                    self.dropped += 1
                elif self._stopping.is_set():
                    return False
                else:
                    self._changed.wait(IDLE_S)
            self._buffer.append((header, frame))
            self.captured += 1
            self._changed.notify_all()
        return True

    def _hear(self, monitor: zmq.Socket[bytes]) -> None:
        """Say it, now and then, where the far end does not let this camera in: its frames wait, then give way."""
        while monitor.poll(0):
            monitor.recv_multipart()
            self.refused += 1
            if time.monotonic() >= self._next_log:
                self._next_log = time.monotonic() + LOG_EVERY_S
                log.warning("camera_refused", camera=self._settings.camera, address=self._settings.address)

    def _send_all(self, socket: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        while True:
            self._hear(monitor)
            with self._changed:
                while not self._buffer and not self._done:
                    self._changed.wait(IDLE_S)
                if not self._buffer:
                    return
            # Waits outside the lock: meanwhile the buffer fills and, when full, gives up its oldest.
            if not socket.poll(int(IDLE_S * 1000), zmq.POLLOUT):
                if self._stopping.is_set():
                    return
                continue
            with self._changed:
                header, frame = self._buffer.popleft()
                self._changed.notify_all()
            socket.send_multipart(wire.encode(self._settings.camera, header, frame.pixels), copy=False)
            self.sent += 1

    def _finish(self, socket: zmq.Socket[bytes]) -> None:
        """Tell the line how many parts there were, so that it answers a lost last one too."""
        header = Header(seq=self.captured, session=self.session, eos=True)
        if socket.poll(int(self._settings.linger_s * 1000), zmq.POLLOUT):
            socket.send_multipart(wire.encode(self._settings.camera, header, b""))
        if self._settings.address.startswith("ipc:"):
            time.sleep(IPC_HOLD_S)
        log.info("camera_done", camera=self._settings.camera, captured=self.captured, dropped=self.dropped)
