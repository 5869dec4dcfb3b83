"""A peer that speaks ZeroMQ's protocol by hand, ZMTP 3.0 (https://rfc.zeromq.org/spec/23), and may break its rules."""

from __future__ import annotations

import socket
import struct

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
MORE = 1


def ready(kind: bytes = b"PUSH") -> bytes:
    """The handshake of the NULL mechanism."""
    body = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    return bytes([4, len(body)]) + body


def part(body: bytes, *, more: bool) -> bytes:
    """A message part on the wire."""
    flags = MORE if more else 0
    if len(body) < 256:
        return bytes([flags, len(body)]) + body
    return bytes([flags | 2]) + struct.pack(">Q", len(body)) + body


def connect(port: int, *, handshake: bool = True) -> socket.socket:
    """A connection to a port of this box, with the handshake behind it."""
    opened = socket.create_connection(("127.0.0.1", port), 10)
    if handshake:
        opened.sendall(GREETING + ready())
        _read(opened, len(GREETING))
        _read(opened, _read(opened, 2)[1])  # what came before the far end's READY would be no message to it
    return opened


def _read(opened: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size and (more := opened.recv(size - len(got))):
        got += more
    return got
