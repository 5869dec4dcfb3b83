"""Connections: who may not stay is cut and counted, and cutting never hits anything else."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import psutil
import pytest
import zmq

from pipeline import wire
from pipeline.config import Limits, Socket
from pipeline.connections import is_open
from pipeline.wire import Header
from tests.support import zmtp
from tests.support.line import Sender
from tests.support.receiving import ANY_PORT, receiving

LIMITS = Limits(max_frame_bytes=65536, handshake_ms=300)
MIB = 1 << 20


def closed(peer: socket.socket, seconds: float = 10.0) -> bool:
    """Whether the line has closed a connection."""
    peer.settimeout(seconds)
    try:
        while peer.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def flood(peer: socket.socket, block: bytes) -> None:
    """Send without end, until the far end has cut the connection."""
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        peer.sendall(block * (1 + (256 << 20) // len(block)))


def frame(seq: int) -> list[bytes]:
    """A small frame of cam1."""
    return [bytes(part) for part in wire.encode("cam1", Header(seq=seq, session=1, w=4, h=2), bytes(8))]


def test_a_message_that_never_ends_is_cut_before_it_fills_the_memory() -> None:
    """A peer that sends parts without end is cut and counted; what it cost is bounded; others go on."""
    with receiving(limits=LIMITS) as line, Sender(line.addresses[0]) as good:
        good.raw(*frame(0))
        line.until(lambda: len(line.outbox.records) == 1)
        process = psutil.Process()
        before = process.memory_info().rss
        peer = zmtp.connect(line.port)
        flood(peer, zmtp.part(b"", more=True) * 32768)
        assert process.memory_info().rss - before < 400 * MIB
        line.until(lambda: line.counts().get("refused_endless") == 1)
        good.raw(*frame(1))
        line.until(lambda: len(line.outbox.records) == 2)
        peer.close()


def test_large_parts_without_end_are_cut_too() -> None:
    """So is a message of parts that are each as large as allowed."""
    with receiving(limits=LIMITS) as line:
        peer = zmtp.connect(line.port)
        flood(peer, zmtp.part(bytes(65536), more=True))
        assert line.until(lambda: line.counts().get("refused_endless")) == 1
        peer.close()


def test_a_fast_camera_is_not_taken_for_an_endless_message() -> None:
    """Many megabytes of whole messages, as fast as they go, cut nobody."""
    with receiving(limits=LIMITS) as line, Sender(line.addresses[0]) as sender:
        pixels = bytes(60_000)
        for seq in range(1000):
            header = Header(seq=seq, session=1, w=300, h=200)
            sender.socket.send_multipart(wire.encode("cam1", header, pixels))
        line.until(lambda: len(line.outbox.records) == 1000)
        time.sleep(0.3)
        assert "refused_endless" not in line.counts()


def test_connections_beyond_the_limit_are_cut() -> None:
    """The cameras that are connected stay so, the rest of a flood is cut; later there is room again."""
    limits = Limits(connections=3, handshake_ms=60_000)
    with receiving(limits=limits) as line, Sender(line.addresses[0]) as good:
        good.raw(*frame(0))
        line.until(lambda: len(line.outbox.records) == 1)
        peers = [zmtp.connect(line.port), zmtp.connect(line.port)]
        peers += [zmtp.connect(line.port, handshake=False) for _ in range(10)]
        line.until(lambda: line.counts().get("refused_connections", 0) >= 10)
        assert sum(closed(peer, 0.2) for peer in peers) == 10
        good.raw(*frame(1))
        line.until(lambda: len(line.outbox.records) == 2)
        for peer in peers:
            peer.close()
        (connections,) = line.intake._connections.values()
        line.until(lambda: len(connections._baseline) == 1)
        late = zmtp.connect(line.port)
        late.sendall(b"".join(zmtp.part(body, more=at < 2) for at, body in enumerate(frame(2))))
        line.until(lambda: len(line.outbox.records) == 3)
        late.close()


def test_a_connection_that_says_nothing_is_cut() -> None:
    """After handshake_ms it is closed and counted."""
    with receiving(limits=LIMITS) as line:
        peer = zmtp.connect(line.port, handshake=False)
        assert closed(peer)
        line.until(lambda: line.counts() == {"refused_handshake": 1})
        peer.close()


@pytest.mark.parametrize("junk", [b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 200, bytes(200), zmtp.GREETING + b"\x04\xff"])
def test_what_does_not_speak_zeromq_brings_nothing_in(junk: bytes) -> None:
    """A port scan, a browser, random bytes: nothing is opened, nobody is disturbed."""
    with receiving(limits=LIMITS) as line, Sender(line.addresses[0]) as good:
        peer = zmtp.connect(line.port, handshake=False)
        peer.sendall(junk)
        good.raw(*frame(0))
        line.until(lambda: len(line.outbox.records) == 1)
        assert line.ledger.counts["parts"] == 1
        peer.close()


def test_a_cut_hits_no_other_socket() -> None:
    """A number that by now stands for another connection of the process is left alone."""
    with receiving(limits=LIMITS) as line, socket.create_server(("127.0.0.1", 0)) as other:
        (connections,) = line.intake._connections.values()
        line.until(lambda: connections._listener is not None)
        near = socket.create_connection(other.getsockname())
        far, _ = other.accept()
        connections._cut(far.fileno())
        far.sendall(b"still there")
        assert near.recv(100) == b"still there"
        near.close()
        far.close()
        connections._cut(9999)


def test_descriptors_are_given_back() -> None:
    """Opening and closing an intake again and again leaves no descriptor open."""

    def once() -> int:
        with receiving(Socket(address=ANY_PORT)) as line, Sender(line.addresses[0]) as sender:
            sender.raw(*frame(0))
            line.until(lambda: line.outbox.records)
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the folder is not to be kept open

    first = once()
    assert [once() for _ in range(5)] == [first] * 5


def test_ipc_connections_are_served_as_well(tmp_path: Path) -> None:
    """The kernel counts no bytes for them: they are bounded in number, and work."""
    with receiving(Socket(address=f"ipc://{tmp_path}/frames")) as line, Sender(line.addresses[0]) as sender:
        for seq in range(50):
            sender.raw(*frame(seq))
        line.until(lambda: len(line.outbox.records) == 50)
        time.sleep(0.25)
        assert line.counts() == {"parts": 50, "OK": 50, "below_threshold": 50}


@pytest.mark.parametrize(
    ("address", "curve", "open_"),
    [
        ("tcp://*:5555", False, True),
        ("tcp://*:5555", True, False),
        ("tcp://10.0.0.1:5555", False, True),
        ("tcp://eth0:5555", False, True),
        ("tcp://[::]:5555", False, True),
        ("tcp://[::1]:5555", False, False),
        ("tcp://localhost:5555", False, False),
        ("tcp://127.8.8.8:5555", False, False),
        ("ipc:///run/dmdd/frames", False, False),
    ],
)
def test_what_is_open_to_the_network(address: str, curve: bool, open_: bool) -> None:
    """Everything that is neither this box alone nor behind CURVE."""
    assert is_open(Socket(address=address, curve=curve)) is open_
    assert not is_open(Socket(address=address, curve=curve, mode="connect", kind="sub"))


def test_zeromq_still_says_which_connection_a_message_came_by() -> None:
    """The property that tells connections apart is an old one of ZeroMQ; if it goes, this has to be found out here."""
    with zmq.Context() as context, context.socket(zmq.PULL) as taker, context.socket(zmq.PUSH) as giver:
        giver.connect(f"tcp://127.0.0.1:{taker.bind_to_random_port('tcp://127.0.0.1')}")
        giver.send(b"x")
        assert int(taker.recv(copy=False).get(zmq.SRCFD)) > 2
