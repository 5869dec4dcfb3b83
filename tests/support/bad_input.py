"""Bad input: one table of what comes, what is answered, and which counters move.

``tests/test_bad_input.py`` sends every case to a real intake with a real ledger and holds it to its row;
``python -m tests.bad_input_table --write`` writes the rows into ``docs/contracts.md``.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import cv2
import msgspec
import numpy as np
import zmq

from pipeline import curve, wire
from pipeline.config import Camera, Limits, Socket
from pipeline.ledger import MAX_UNKNOWN_CAMERAS
from pipeline.wire import MAX_HEADER_BYTES, Header
from tests.support import keys as known
from tests.support import zmtp
from tests.support.receiving import ANY_PORT, Receiving

SESSION: Final = 10
NOTHING: Final = ""
LIMITS: Final = Limits(max_frame_bytes=65536, connections=8, handshake_ms=300)
GOOD: Final = ["below_threshold"]

PLAIN: Final = Socket(address=ANY_PORT)
LOCKED: Final = Socket(address=ANY_PORT, curve=True)
IMAGEZMQ: Final = Socket(address=ANY_PORT, kind="rep", protocol="imagezmq")
SOCKETS: Final = (PLAIN, LOCKED, IMAGEZMQ)
CAMERAS: Final = {
    "cam1": Camera(deadline_ms=20_000, max_gap=5),
    "cam2": Camera(deadline_ms=20_000, roi=(0, 0, 100, 100)),
}


class Peer:
    """Whoever sends: one connection, closed at the end of its case."""

    def __init__(self, line: Receiving, socket: int = 0, key: str = "") -> None:
        self.line, self.address = line, line.addresses[socket]
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.REQ if socket == 2 else zmq.PUSH)
        self.socket.rcvtimeo, self.socket.sndtimeo = 10_000, 10_000
        if key:
            curve.join(self.socket, known.CAMERAS.get(key, known.pair()), known.LINE.public)
        self.socket.connect(self.address)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)

    def raw(self, *parts: bytes) -> None:
        """Send a message, and take the answer where one is due."""
        self.socket.send_multipart(list(parts))
        if self.socket.type == zmq.REQ:
            assert self.socket.recv() == b"OK"

    def frame(self, seq: int = 0, pixels: bytes = bytes(8), camera: str = "cam1", **header: Any) -> None:
        """Send a frame of 4 x 2 pixels without a fault, but for what is said."""
        fields = {"session": SESSION, "w": 4, "h": 2, **header}
        self.raw(*wire.encode(camera, Header(seq=seq, **fields), pixels))

    def text(self, pixels: bytes = bytes(8), **meta: Any) -> None:
        """Send what an imagezmq sender sends."""
        self.raw(json.dumps(meta).encode(), pixels)


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        what: What comes, for the table.
        send: Sends it.
        reasons: Reason of every record that follows, in order; ``eos`` for the end of a stream.
        counters: By how much each counter moves, those of verdicts and good parts aside; None for at least once.
        socket: Which of :data:`SOCKETS` it is sent to.
        key: Whose CURVE key the sender shows; empty for none.
        answer: What is answered, for the table, where the reasons do not say it.
    """

    what: str
    send: Callable[[Peer], None]
    reasons: tuple[str, ...] = ()
    counters: tuple[tuple[str, int | None], ...] = ()
    socket: int = 0
    key: str = ""
    answer: str = ""


def refused(what: str, send: Callable[[Peer], None], counter: str, times: int | None = 1, **more: Any) -> Case:
    """A case that gets no record."""
    return Case(what, send, more.pop("reasons", ()), ((f"refused_{counter}", times),), **more)


def unknown(what: str, send: Callable[[Peer], None], reason: str, **more: Any) -> Case:
    """A case whose part is answered at once."""
    return Case(what, send, (reason,), ((reason, 1),), **more)


def header(**fields: Any) -> bytes:
    """A header as anybody may write it."""
    return msgspec.msgpack.encode({"seq": 0, "session": SESSION, "w": 4, "h": 2, **fields})


def many(*sends: Callable[[Peer], None]) -> Callable[[Peer], None]:
    """Several messages, one after the other."""

    def send(peer: Peer) -> None:
        for each in sends:
            each(peer)

    return send


def png(width: int = 4, height: int = 2) -> bytes:
    """A PNG."""
    return cv2.imencode(".png", np.zeros((height, width), np.uint8))[1].tobytes()


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it is 16384 x 16384 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 16384, 16384, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + png()[33:]


def hoarding() -> bytes:
    """A PNG of a hundred bytes with a chunk that says it has two thousand million."""
    whole = png()
    return whole[:33] + struct.pack(">I", 0x7FFFFF40) + whole[37:]


def endless(peer: Peer) -> None:
    """Parts without end, as no ZeroMQ library would send them."""
    with zmtp.connect(int(peer.address.rpartition(":")[2])) as raw:
        with suppress(OSError):
            raw.sendall(zmtp.part(bytes(200), more=True) * 100_000)
        # Whoever leaves by himself before anybody has looked is not cut, and holds nothing.
        peer.line.until(lambda: peer.line.intake.counts["refused_endless"])


def crowd(peer: Peer) -> None:
    """More connections than there may be."""
    port = int(peer.address.rpartition(":")[2])
    raw = [zmtp.connect(port, handshake=False) for _ in range(LIMITS.connections + 4)]
    peer.line.until(lambda: peer.line.intake.counts["refused_connections"])
    for each in raw:
        each.close()


def silent(peer: Peer) -> None:
    """A connection that never says who it is."""
    with zmtp.connect(int(peer.address.rpartition(":")[2]), handshake=False):
        peer.line.until(lambda: peer.line.intake.counts["refused_handshake"])


def fail(peer: Peer) -> None:
    """A fault of ours, planted: admission raises."""

    def broken(*_: object) -> None:
        raise RuntimeError("not foreseen")

    ledger: Any = peer.line.ledger
    admit, ledger.admit = ledger.admit, broken
    peer.frame()
    peer.line.until(lambda: peer.line.intake.counts["refused_internal"])
    ledger.admit = admit


def strangers(count: int) -> Callable[[Peer], None]:
    """Frames of so many cameras that are not in the config."""
    return many(*(lambda peer, n=n: peer.frame(camera=f"stranger{n}") for n in range(count)))


def named(count: int) -> Callable[[Peer], None]:
    """Imagezmq messages with so many names; those that the config has not are strangers to the ledger too."""
    return many(*(lambda peer, n=n: peer.text(msg=f"name{n}", dtype="uint8", shape=[2, 4]) for n in range(count)))


def settle(peer: Peer) -> None:
    """Wait until ZeroMQ has connected again."""
    peer.line.until(lambda: len(peer.line.outbox.records) == 1)
    with peer.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED) as monitor:
        assert monitor.poll(10_000)
        peer.socket.disable_monitor()


CASES: Final = [
    refused("a message of one part", lambda p: p.raw(b"cam1"), "bad_message"),
    refused("a message of more than three parts", lambda p: p.raw(b"cam1", header(), bytes(8), b""), "bad_message"),
    refused("a message of 100,000 parts", lambda p: p.raw(*[b"x"] * 100_000), "bad_message"),
    refused("imagezmq: a message that is not of two parts", lambda p: p.raw(b"{}"), "bad_message", socket=2),
    refused(
        "a message that never ends; its connection is cut",
        endless,
        "endless",
        answer="nothing; the sender may come again",
    ),
    refused("a camera id with other characters", lambda p: p.raw(b"cam 1", header(), bytes(8)), "bad_camera_id"),
    refused("a camera id of more than 64 characters", lambda p: p.raw(b"c" * 65, header(), bytes(8)), "bad_camera_id"),
    refused("a header that is no MessagePack map", lambda p: p.raw(b"cam1", b"junk", bytes(8)), "bad_header"),
    refused(
        "a header without `seq` or `session`",
        lambda p: p.raw(b"cam1", msgspec.msgpack.encode({"seq": 1}), bytes(8)),
        "bad_header",
    ),
    refused(
        "a header with a value of a wrong type or out of range",
        many(
            lambda p: p.raw(b"cam1", header(w="4"), bytes(8)),
            lambda p: p.raw(b"cam1", header(h=16385), bytes(8)),
            lambda p: p.raw(b"cam1", header(part="x" * 129), bytes(8)),
        ),
        "bad_header",
        3,
    ),
    refused(
        f"a header of more than {MAX_HEADER_BYTES} bytes",
        lambda p: p.raw(b"cam1", header(x=bytes(MAX_HEADER_BYTES)), bytes(8)),
        "bad_header",
    ),
    refused("imagezmq: no JSON object with `msg`", lambda p: p.text(name="cam1"), "bad_header", socket=2),
    refused(
        "a number that was answered before",
        many(lambda p: p.frame(0), lambda p: p.frame(0)),
        "repeated",
        reasons=("below_threshold",),
        answer="nothing: the first verdict stands",
    ),
    refused(
        "an `eos` that is behind",
        many(lambda p: p.frame(0), lambda p: p.frame(0, b"", eos=True)),
        "repeated",
        reasons=("below_threshold",),
        answer="nothing",
    ),
    refused(
        "one of the camera's last four sessions again",
        many(lambda p: p.frame(0), lambda p: p.frame(0, session=11), lambda p: p.frame(1)),
        "old_session",
        reasons=("below_threshold", "below_threshold"),
        answer="nothing",
    ),
    unknown("a camera that is not in the config", lambda p: p.frame(camera="cam9"), "unknown_camera"),
    Case(
        f"a {MAX_UNKNOWN_CAMERAS + 1}th such camera",
        strangers(MAX_UNKNOWN_CAMERAS + 1),
        ("unknown_camera",) * MAX_UNKNOWN_CAMERAS,
        (("refused_unknown_camera", 1), ("unknown_camera", MAX_UNKNOWN_CAMERAS)),
        answer="nothing",
    ),
    Case(
        "imagezmq: more than 1024 different camera ids",
        named(1025),
        ("unknown_camera",) * MAX_UNKNOWN_CAMERAS,
        (
            ("refused_too_many_cameras", 1),
            ("refused_unknown_camera", 1024 - MAX_UNKNOWN_CAMERAS),
            ("unknown_camera", MAX_UNKNOWN_CAMERAS),
        ),
        socket=2,
        answer="nothing",
    ),
    Case("an `eos` of a camera that is not in the config", lambda p: p.frame(0, b"", camera="cam9", eos=True)),
    unknown("no pixel part, and no `eos`", lambda p: p.raw(b"cam1", header()), "truncated"),
    unknown("`v` other than 1", lambda p: p.frame(v=2), "bad_version"),
    unknown("`complete` false", lambda p: p.frame(complete=False), "incomplete"),
    unknown("an unknown `fmt`", lambda p: p.frame(fmt="rgb48"), "bad_format"),
    unknown(
        "imagezmq: a `dtype` other than `uint8`, or a shape that is no image",
        lambda p: p.text(msg="cam1", dtype="float32", shape=[2, 4]),
        "bad_format",
        socket=2,
    ),
    unknown("bytes that do not match `w`, `h`, `fmt`, `stride`", lambda p: p.frame(pixels=bytes(7)), "bad_size"),
    unknown("an empty `jpeg` or `png`", lambda p: p.frame(pixels=b"", fmt="jpeg"), "bad_size"),
    unknown("a `jpeg` or `png` that cannot be decoded", lambda p: p.frame(pixels=bytes(50), fmt="jpeg"), "undecodable"),
    unknown("a `png` cut short", lambda p: p.frame(pixels=png()[:-9], fmt="png"), "undecodable"),
    unknown(
        "a small file that would unpack to a very large image",
        lambda p: p.frame(pixels=bomb(), fmt="png", w=0),
        "undecodable",
    ),
    unknown(
        "a `png` with a chunk longer than the file", lambda p: p.frame(pixels=hoarding(), fmt="png"), "undecodable"
    ),
    unknown(
        "a `jpeg` or `png` not of the size in its header", lambda p: p.frame(pixels=png(5), fmt="png"), "undecodable"
    ),
    unknown("a frame that the camera's `roi` reaches outside of", lambda p: p.frame(camera="cam2"), "undecodable"),
    unknown("a recipe that the camera does not have", lambda p: p.frame(recipe="lid"), "unknown_recipe"),
    Case(
        "a message part larger than `max_frame_bytes`; its connection is cut",
        many(
            lambda p: p.frame(0),
            lambda p: p.frame(1, bytes(LIMITS.max_frame_bytes + 1)),
            settle,
            lambda p: p.frame(2),
        ),
        ("below_threshold", "missing_frame", "below_threshold"),
        (("missing_frame", 1),),
        answer="with the next frame: `UNKNOWN (missing_frame)`",
    ),
    Case(
        "a gap of at most `max_gap` numbers",
        many(lambda p: p.frame(0), lambda p: p.frame(4)),
        ("below_threshold", "missing_frame", "missing_frame", "missing_frame", "below_threshold"),
        (("missing_frame", 3),),
        answer="each missing part: `UNKNOWN (missing_frame)`",
    ),
    Case(
        "a larger gap",
        many(lambda p: p.frame(0), lambda p: p.frame(400)),
        ("below_threshold", "sequence_jump", "below_threshold"),
        (("sequence_jump", 1), ("sequence_jumps", 1)),
        answer="once: `UNKNOWN (sequence_jump)`",
    ),
    refused(
        "anything that makes the intake fail in a way not foreseen",
        fail,
        "internal",
        answer="nothing; a part that was opened is answered at its deadline",
    ),
    refused("a connection that does not speak ZeroMQ, or says nothing for `handshake_ms`", silent, "handshake"),
    Case(
        "more than `connections` connections to a socket",
        crowd,
        (),
        (("refused_connections", None), ("refused_handshake", None)),
        answer="nothing; the later ones are cut",
    ),
    refused("`curve`: a connection without CURVE", lambda p: p.frame(), "unauthenticated", None, socket=1),
    refused(
        "`curve`: a connection with a key that the line does not know, or for another line",
        lambda p: p.frame(),
        "unauthenticated",
        None,
        socket=1,
        key="stranger",
    ),
    refused(
        "`curve`: a frame in the name of another camera",
        lambda p: p.frame(camera="cam2"),
        "wrong_key",
        socket=1,
        key="cam1",
    ),
]


def rows() -> list[str]:
    """The table, as lines of Markdown."""
    lines = ["| what comes | what is answered | counters |", "|---|---|---|"]
    for case in CASES:
        answer = case.answer or ", ".join(f"`UNKNOWN ({reason})`" for reason in case.reasons) or "nothing"
        lines.append(f"| {case.what} | {answer} | {', '.join(f'`{name}`' for name, _ in case.counters)} |")
    return lines
