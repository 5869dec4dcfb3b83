"""Taps: where a recorder listens to frames on their way to a line.

Where the line binds its socket, the tap stands between: cameras send to the tap, and it hands every message on as it
is, before anything else is done with it. Where the line subscribes to cameras that publish, the tap is one more
subscriber, and the line is not touched at all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import zmq

from pipeline.camera import IPC_HOLD_S
from pipeline.config import Limits, Socket
from pipeline.recording import RecordingError

POLL_MS: Final = 50
LINGER_MS: Final = 5000
DRAIN_S: Final = 1.0
SEND_QUEUE: Final = 4
"""Messages held for the line: few, so that a camera feels a slow line as it would without the tap."""
Sink = Callable[[list[zmq.Frame]], None]


@dataclass(frozen=True)
class Tap:
    """One tap.

    Attributes:
        socket: The line's socket.
        listen: Address that the tap binds for cameras; empty where it subscribes beside the line.
    """

    socket: Socket
    listen: str = ""

    @property
    def hands_on(self) -> bool:
        """Whether the line gets its frames through the tap."""
        return bool(self.listen)


def plan(sockets: Sequence[Socket], listen: Sequence[str], only: Sequence[str] = ()) -> list[Tap]:
    """Which taps record these sockets.

    Args:
        sockets: ``[[sockets]]`` of the line.
        listen: Addresses to bind, one for each socket that the line binds, in their order.
        only: Addresses of the sockets to take; empty for all.

    Raises:
        RecordingError: if one of them cannot be recorded, or has no address.
    """
    strange = set(only) - {one.address for one in sockets}
    if strange:
        msg = f"--socket {min(strange)}: not in [[sockets]], which has {', '.join(one.address for one in sockets)}"
        raise RecordingError(msg)
    taken = [one for one in sockets if not only or one.address in only]
    for one in taken:
        _check(one)
    bound = [one.address for one in taken if one.mode == "bind"]
    if len(bound) != len(listen):
        msg = (
            f"the line binds {', '.join(bound) or 'no socket'}, and {len(listen)} --listen are given: one for each,"
            " the address that the cameras send to meanwhile"
        )
        raise RecordingError(msg)
    addresses = iter(listen)
    return [Tap(one, next(addresses) if one.mode == "bind" else "") for one in taken]


def _check(socket: Socket) -> None:
    """Refuse what cannot be tapped without disturbing the line."""
    if socket.protocol == "imagezmq":
        why = "imagezmq numbers nothing, so a verdict cannot be told to belong to a frame"
    elif socket.curve:
        why = "a frame counts only over its camera's own connection: curve = true. Record before keys are set up"
    elif socket.kind == "pull" and socket.mode == "connect":
        why = "a second reader would take frames away from the line; let the line bind and the cameras connect"
    else:
        return
    msg = f"{socket.address} cannot be recorded: {why}; or choose others by --socket"
    raise RecordingError(msg)


class TapThread:
    """Listens at one tap.

    Args:
        context: ZeroMQ context; the caller terminates it after :meth:`stop`.
        tap: Where.
        limits: ``[limits]`` of the line: what a peer can make the tap hold.
        sink: Given each message after it was handed on; must not block.

    Raises:
        zmq.ZMQError: if an address cannot be used.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], tap: Tap, limits: Limits, sink: Sink) -> None:
        self._tap, self._sink = tap, sink
        self._inlet: zmq.Socket[bytes] | None = None
        self._outlet: zmq.Socket[bytes] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tap", daemon=True)
        self._opened: list[zmq.Socket[bytes]] = []
        try:
            self._open(context, limits)
        except zmq.ZMQError:
            self._close(0)
            raise

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Hand on what has come, and end."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        else:
            self._close(0)

    def _open(self, context: zmq.Context[zmq.Socket[bytes]], limits: Limits) -> None:
        settings = self._tap.socket
        self._outlet = self._socket(context, _sender_of(settings.kind)) if self._tap.listen else None
        if self._outlet is not None:
            self._outlet.sndhwm = SEND_QUEUE if settings.kind == "pull" else limits.receive_queue
            self._outlet.connect(reachable(settings.address))
        self._inlet = inlet = self._socket(context, zmq.PULL if settings.kind == "pull" else zmq.SUB)
        inlet.rcvhwm, inlet.maxmsgsize = limits.receive_queue, limits.max_frame_bytes
        inlet.handshake_ivl = limits.handshake_ms
        if settings.kind == "sub":
            inlet.subscribe(b"")
        if self._tap.listen:
            inlet.bind(self._tap.listen)
        else:
            inlet.connect(settings.address)

    def _socket(self, context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
        made = context.socket(kind)
        self._opened.append(made)
        return made

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._hand_on()
            end = time.monotonic() + DRAIN_S
            while time.monotonic() < end and (self._hand_on() or self._waits()):
                pass
        finally:
            self._close(LINGER_MS)

    def _hand_on(self) -> bool:
        """Hand one message on; say whether there was one. A line that takes none is waited for, as a camera would."""
        inlet, outlet = self._inlet, self._outlet
        if inlet is None or not inlet.poll(POLL_MS):
            return False
        if outlet is not None and not outlet.poll(POLL_MS, zmq.POLLOUT):
            return False
        message = inlet.recv_multipart(copy=False)
        if outlet is not None:
            outlet.send_multipart(message, copy=False)
        self._sink(message)
        return True

    def _waits(self) -> bool:
        return self._inlet is not None and bool(self._inlet.poll(0))

    def _close(self, linger_ms: int) -> None:
        if linger_ms and self._outlet is not None and self._tap.socket.address.startswith("ipc:"):
            time.sleep(IPC_HOLD_S)
        for socket in self._opened:
            socket.close(linger=linger_ms)


def _sender_of(kind: str) -> int:
    return zmq.PUSH if kind == "pull" else zmq.PUB


def reachable(address: str) -> str:
    """An address to connect to, from one that a line on this box binds."""
    if not address.startswith("tcp://"):
        return address
    parts = urlsplit(address.replace("*", "0.0.0.0"))  # noqa: S104 - what the star stands for
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(parts.hostname or "")  # noqa: S104
    return f"tcp://{host}:{parts.port}" if host else address
