"""The intake: what comes off the sockets is bounded before it is looked at, and nothing that comes stops it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import structlog
import zmq

from pipeline import intake as module
from pipeline import wire
from pipeline.config import Camera, Limits, Socket
from pipeline.curve import ServerKeys
from pipeline.intake import Intake
from pipeline.ledger import Ledger
from pipeline.parts import Part
from pipeline.wire import Header
from tests.support.books import Recorder
from tests.support.line import Sender
from tests.support.receiving import ANY_PORT, receiving

FRAME = {"w": 4, "h": 2, "fmt": "mono8"}


def frame(seq: int, camera: str = "cam1", **header: Any) -> list[bytes]:
    """A frame without a fault, but for what ``header`` says."""
    parts = wire.encode(camera, Header(seq=seq, session=1, **{**FRAME, **header}), bytes(8))
    return [bytes(part) for part in parts]


def test_a_frame_gets_through_with_its_pixels() -> None:
    """What was sent is what the queue gets: camera, header and pixels, in order."""
    seen: list[tuple[str, int, bytes]] = []

    class Queue:
        def __init__(self, ledger: Ledger) -> None:
            self.ledger = ledger

        def put(self, part: Part) -> None:
            seen.append((part.camera, part.seq, bytes(part.pixels)))

    with receiving(queue_of=lambda ledger, *_: Queue(ledger)) as line, Sender(line.addresses[0]) as sender:
        for seq in range(3):
            sender.raw(*frame(seq))
        line.until(lambda: len(seen) == 3)
        assert line.intake.beat
    assert seen == [("cam1", seq, bytes(8)) for seq in range(3)]


@pytest.mark.parametrize("parts", [1, 4, 5, module.SKIP_BURST + 1, 3 * module.SKIP_BURST, 100_000])
def test_a_message_of_too_many_parts_is_refused_and_the_next_one_is_read(parts: int) -> None:
    """However many parts there are, at most four are kept; what follows is a message of its own again."""
    with receiving() as line, Sender(line.addresses[0]) as sender:
        sender.raw(*[b"x"] * parts)
        sender.raw(*frame(0))
        line.until(lambda: line.outbox.said() == [(0, "below_threshold")])
        assert line.counts()["refused_bad_message"] == 1


def test_a_long_message_does_not_keep_the_others_waiting() -> None:
    """A message of many parts is read in many turns, between which another socket has its own; four parts are kept."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = (Socket(address=ANY_PORT), Socket(address=ANY_PORT))
    ledger = Ledger(Recorder())
    intake = Intake(sockets, Limits(), ledger, {}.get, context)
    long, short = intake._sockets
    parts = 5 * module.SKIP_BURST + 7
    with (
        Sender(long.last_endpoint.rstrip(b"\0").decode()) as bad,
        Sender(short.last_endpoint.rstrip(b"\0").decode()) as good,
    ):
        bad.raw(*[b"x"] * parts)
        good.raw(*frame(0))
        assert long.poll(20_000)
        assert short.poll(20_000)
        for turn in range(5):
            assert not intake._drain(long, sockets[0])
            assert len(intake._unfinished[long]) == module.MAX_PARTS + 1
            assert (ledger.counts["parts"], intake.counts.total()) == (int(turn > 0), 0)
            intake._drain(short, sockets[1])
        assert intake._drain(long, sockets[0])
        assert intake.counts == {"refused_bad_message": 1}
    intake.close()
    context.term()


def test_a_rep_socket_answers_once_for_a_message_of_many_parts() -> None:
    """A REQ sender gets its OK when the whole of its message has been read, and can go on."""
    settings = Socket(address=ANY_PORT, kind="rep", protocol="imagezmq")
    with receiving(settings) as line, zmq.Context() as context, context.socket(zmq.REQ) as asker:
        asker.rcvtimeo = 10_000
        asker.connect(line.addresses[0])
        for parts in (2 * module.SKIP_BURST, 1):
            asker.send_multipart([b"x"] * parts)
            assert asker.recv() == b"OK"
        assert line.counts()["refused_bad_message"] == 2


def test_what_fails_unforeseen_is_counted_and_the_intake_goes_on() -> None:
    """An error in a queue costs its own frame only; the part stays open for the timer."""

    class Broken:
        def put(self, part: Part) -> None:
            if part.seq == 0:
                raise RuntimeError("not foreseen")

    with receiving(queue_of=lambda *_: Broken()) as line, Sender(line.addresses[0]) as sender:
        sender.raw(*frame(0))
        sender.raw(*frame(1))
        line.until(lambda: line.ledger.open == 2)
        assert line.counts()["refused_internal"] == 1


def test_a_camera_that_ends_its_stream_is_confirmed() -> None:
    """An end of stream reaches the ledger, parts that never came are answered first."""
    with receiving() as line, Sender(line.addresses[0]) as sender:
        sender.raw(*frame(0))
        sender.raw(*frame(2, eos=True))
        line.until(lambda: len(line.outbox.records) == 3)
        assert line.outbox.said() == [(0, "below_threshold"), (1, "missing_frame"), (2, "eos")]


def test_an_address_that_cannot_be_used_is_named() -> None:
    """The error names the address; what had been opened before it is released."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.PULL) as taken:
        port = taken.bind_to_random_port("tcp://127.0.0.1")
        sockets = (Socket(address=ANY_PORT), Socket(address=f"tcp://127.0.0.1:{port}"))
        with pytest.raises(OSError, match=f"cannot bind tcp://127.0.0.1:{port}"):
            Intake(sockets, Limits(), Ledger(Recorder()), {}.get, context)
    context.term()


@pytest.mark.parametrize(
    ("address", "options", "said"),
    [
        ("tcp://*:0", {}, True),
        ("tcp://0.0.0.0:0", {}, True),
        ("tcp://127.0.0.1:0", {}, False),
        ("tcp://lo:0", {}, False),
        ("ipc://{folder}/frames", {}, False),
        ("tcp://127.0.0.1:9", {"mode": "connect", "kind": "sub"}, False),
    ],
)
def test_a_socket_that_is_open_to_the_network_is_named(
    address: str, options: dict[str, Any], said: bool, tmp_path: Any
) -> None:
    """Bound to more than this box and without CURVE: the log says so at start."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    settings = Socket(address=address.format(folder=tmp_path), **options)
    with structlog.testing.capture_logs() as logs:
        Intake((settings,), Limits(), Ledger(Recorder()), {}.get, context).close()
    context.term()
    assert [entry["event"] for entry in logs] == ["socket_unprotected"] * said


def test_a_curve_socket_without_keys_does_not_open() -> None:
    """Never open by mistake: curve = true without keys is an error, not a plain socket."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with pytest.raises(ValueError, match="there are no keys"):
        Intake((Socket(address=ANY_PORT, curve=True),), Limits(), Ledger(Recorder()), {}.get, context)
    context.term()


def test_without_its_gate_a_line_counts_as_stuck(server_keys: ServerKeys) -> None:
    """If the handler that lets cameras in has ended, the intake shows no beat any more, so the watchdog acts."""
    settings = Socket(address=ANY_PORT, curve=True)
    with receiving(settings, cameras={"cam1": Camera()}, keys=server_keys) as line:
        line.until(lambda: line.intake.beat)
        gate = line.intake._gate
        assert gate is not None
        gate.stop()
        time.sleep(0.3)
        last = line.intake.beat
        time.sleep(0.3)
        assert line.intake.beat == last


def test_a_limit_bounds_what_is_held() -> None:
    """A part above max_frame_bytes is cut off unread: its part is a gap, and its sender may come again."""
    limits = Limits(max_frame_bytes=4096)
    with receiving(limits=limits) as line, Sender(line.addresses[0]) as sender:
        sender.raw(*frame(0))
        line.until(lambda: len(line.outbox.records) == 1)
        sender.raw(b"cam1", frame(1)[1], bytes(5000))
        time.sleep(0.3)
        sender.raw(*frame(2))
        line.until(lambda: len(line.outbox.records) == 3)
        assert line.outbox.said() == [(0, "below_threshold"), (1, "missing_frame"), (2, "below_threshold")]
