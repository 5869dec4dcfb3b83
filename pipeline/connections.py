"""Who is connected to a socket: refused handshakes counted, too many connections and endless messages cut.

ZeroMQ bounds the size of a message part and the number of whole messages that wait, but neither the number of
connections nor that of a message's parts: one that never ends is held in memory, unseen by the program. So the kernel
is asked what each connection has brought, and one that brought far more than a message without completing one is cut.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket as system
import struct
import termios
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import parse_monitor_message

from pipeline.config import Limits, Socket
from pipeline.wire import WireError

FAILED: Final = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
REFUSED: Final = FAILED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
EVENTS: Final = REFUSED | zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_ACCEPT_FAILED | zmq.EVENT_DISCONNECTED
EVENT_BURST: Final = 256
SLACK: Final = 1 << 20
"""Bytes that a connection may be ahead by: headers, ZeroMQ's buffers, what comes while it is being looked at."""
BYTES_RECEIVED: Final = 128
"""Offset of tcpi_bytes_received in the kernel's struct tcp_info, tcp(7), linux/tcp.h."""
RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER without a time: the far end gets a reset and does not wait for more."""


def is_open(settings: Socket) -> bool:
    """Whether anybody on the network may send to a socket: bound to more than this box, without CURVE."""
    if settings.curve or settings.mode != "bind" or not settings.address.startswith("tcp://"):
        return False
    host = urlsplit(settings.address.replace("*", "0.0.0.0")).hostname or ""  # noqa: S104 - what the star stands for
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host not in {"lo", "localhost"}


class Connections:
    """The connections of one socket. Used by the intake thread alone.

    Args:
        context: ZeroMQ context of the socket.
        socket: A socket that is neither bound nor connected yet.
        settings: Its table in ``[[sockets]]``.
        limits: ``[limits]``.
        refuse: Counts a refusal and says so in the log.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        settings: Socket,
        limits: Limits,
        refuse: Callable[[WireError], None],
    ) -> None:
        self._socket, self._settings, self._limits, self._refuse = socket, settings, limits, refuse
        self._listener: Any = None
        self._baseline: dict[int, int] = {}
        self._heard: set[str | int] = set()
        endpoint = f"inproc://monitor-{id(socket)}"
        socket.monitor(endpoint, EVENTS)
        self.monitor: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self.monitor.rcvhwm = 0  # else ZeroMQ's own thread would wait for this one when many events come
        self.monitor.connect(endpoint)

    def close(self) -> None:
        """Release the monitor; before the socket is closed."""
        self._socket.disable_monitor()
        self.monitor.close(linger=0)

    def heard(self, part: zmq.Frame) -> None:
        """Note that a connection has brought a whole message, of which this is a part."""
        try:
            self._heard.add(part.get(zmq.SRCFD))
        except zmq.ZMQError:  # a transport without descriptors
            return

    def read(self) -> None:
        """Take note of what has happened; of a bounded number of events at once."""
        for _ in range(EVENT_BURST):
            try:
                raw = self.monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = parse_monitor_message(raw)
            self._take(int(event["event"]), int(event["value"]))

    def _take(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._accepted(value)
        elif event == zmq.EVENT_DISCONNECTED:
            self._baseline.pop(value, None)
        elif event == zmq.EVENT_LISTENING:
            self._listener = self._look(value, _place)
        elif event == zmq.EVENT_ACCEPT_FAILED:
            self._refuse(WireError("connections", f"{self._settings.address}: cannot accept: {os.strerror(value)}"))
        elif event & REFUSED and self._settings.curve:
            why = "not let in: no CURVE, not this line's key, or a key that is not in curve.keys"
            self._refuse(WireError("unauthenticated", f"{self._settings.address}: {why}"))
        elif event & REFUSED:
            self._refuse(WireError("handshake", f"{self._settings.address}: a connection that does not speak ZeroMQ"))

    def _accepted(self, descriptor: int) -> None:
        self._baseline[descriptor] = 0
        most = self._limits.connections
        if len(self._baseline) > most:
            self._refuse(WireError("connections", f"{self._settings.address}: more than {most} connections"))
            self._cut(descriptor)

    def check(self, *, drained: bool) -> None:
        """Cut who has sent more than a message can hold since its last whole one.

        Args:
            drained: Whether no whole message was left to receive; else what is held may be messages that wait.
        """
        waiting = 2 if drained else self._limits.receive_queue + 2
        most = waiting * self._limits.max_frame_bytes + SLACK
        for descriptor, base in list(self._baseline.items()):
            received = self._look(descriptor, self._received)
            if received is None:  # it is no longer one of ours
                del self._baseline[descriptor]
            elif descriptor in self._heard:
                self._baseline[descriptor] = received
            elif received - base > most:
                why = f"{received - base} bytes without a whole message, at most {most}: connection cut"
                self._refuse(WireError("endless", f"{self._settings.address}: {why}"))
                self._cut(descriptor)
        self._heard.clear()

    def _look(self, descriptor: int, at: Callable[[system.socket], Any]) -> Any:
        """What ``at`` finds of a descriptor of ZeroMQ's; None where it is closed.

        The number may stand for something else by now: the duplicate holds on to what it names.
        """
        try:
            with system.socket(fileno=os.dup(descriptor)) as duplicate:
                return at(duplicate)
        except OSError:
            return None

    def _received(self, connection: system.socket) -> int | None:
        """Bytes that ZeroMQ has read from a connection, 0 where the kernel does not say; None if it is not ours."""
        if _place(connection) != self._listener:
            return None
        if connection.family == system.AF_UNIX:
            return 0
        info = connection.getsockopt(system.IPPROTO_TCP, system.TCP_INFO, BYTES_RECEIVED + 8)
        if len(info) < BYTES_RECEIVED + 8:
            return 0
        unread = struct.unpack("i", fcntl.ioctl(connection, termios.FIONREAD, bytes(4)))[0]
        return int(struct.unpack_from("Q", info, BYTES_RECEIVED)[0]) - int(unread)

    def _cut(self, descriptor: int) -> None:
        """Shut a connection of this listener down. ZeroMQ sees its end and releases what it holds of it."""
        self._baseline.pop(descriptor, None)
        self._look(descriptor, self._reset)

    def _reset(self, connection: system.socket) -> None:
        if self._listener is not None and _place(connection) == self._listener:
            connection.setsockopt(system.SOL_SOCKET, system.SO_LINGER, RESET)
            connection.shutdown(system.SHUT_RDWR)


def _place(connection: system.socket) -> Any:
    """What the connections of one listener have in common: the port, or the path of a Unix socket."""
    name = connection.getsockname()
    return name[1] if isinstance(name, tuple) else name
