"""The camera of the soak: it does what it is told, and writes down each frame before it sends it."""

from __future__ import annotations

import hashlib
import itertools
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from pipeline import wire
from pipeline.soak.camera import SoakCamera
from pipeline.soak.frames import part_of
from pipeline.soak.history import End, Failed, Recorder, Sent, read
from pipeline.wire import Header, WireError

RATE = 200.0


class Bench:
    """A camera in a thread, and the socket that it sends to."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "cam1.jsonl"
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.PULL)
        self.socket.rcvtimeo = 5000
        self.socket.bind(f"ipc://{folder}/frames")
        self.recorder = Recorder(self.file)
        self.orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
        rng = np.random.default_rng(1)
        self.camera = SoakCamera("cam1", f"ipc://{folder}/frames", RATE, rng, self.recorder)
        self.thread = threading.Thread(target=self.camera.run, args=(self.orders,))
        self.thread.start()

    def close(self) -> None:
        """End both."""
        self.orders.put(None)
        self.thread.join(10)
        self.recorder.close()
        self.context.destroy(linger=0)

    def order(self, do: str, n: int = 1) -> None:
        """Tell the camera to do something."""
        self.orders.put({"do": do, "n": n})

    def until(self, wanted: Any) -> list[bytes]:
        """The first message that is as it is wanted."""
        while True:
            message = self.socket.recv_multipart()
            if wanted(message):
                return message

    def sent(self, message: list[bytes]) -> Sent:
        """What was written down of a message."""
        header = wire.decode_header(message[1])
        wanted = message[0].decode(), header.session, header.seq
        return next(i for i in read(self.file) if isinstance(i, Sent) and (i.camera, i.session, i.seq) == wanted)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A camera that runs."""
    made = Bench(tmp_path)
    yield made
    made.close()


def head(message: list[bytes]) -> Header | None:
    """The header of a message; None where it is none."""
    try:
        return wire.decode_header(message[1]) if len(message) > 1 else None
    except WireError:
        return None


def test_sound_frames_are_numbered_and_written_down_before_they_come(bench: Bench) -> None:
    """Each message is on record when it arrives, with its digest and the verdict that it deserves."""
    for number in range(20):
        message = bench.socket.recv_multipart()
        header, sent = wire.decode_header(message[1]), bench.sent(message)
        digest = hashlib.sha256(message[2]).hexdigest()
        assert (header.seq, header.part, sent.part, sent.sha256) == (number, part_of(digest), part_of(digest), digest)
        assert wire.pixel_fault(header, len(message[2]), 1 << 20) is None
        assert sent.score == pytest.approx(np.frombuffer(message[2], np.uint8).mean() / 255)
        assert sent.expect == ("NG" if sent.score > 0.5 else "OK")


@pytest.mark.parametrize(
    ("order", "fault"),
    [
        ("wrong_size", "bad_size"), ("bad_format", "bad_format"), ("bad_version", "bad_version"),
        ("incomplete", "incomplete"), ("huge", "too_large"),
    ],
)  # fmt: skip
def test_broken_frames_are_broken_and_expected_to_be_unknown(bench: Bench, order: str, fault: str) -> None:
    """What is ordered is what the wire check finds; the record says that nobody may judge it."""
    bench.order(order)

    def broken(message: list[bytes]) -> bool:
        header = head(message)
        return header is not None and wire.pixel_fault(header, len(message[2]), 65536) == fault

    assert bench.sent(bench.until(broken)).expect == "UNKNOWN"


def test_messages_that_name_no_part(bench: Bench) -> None:
    """A corrupt header uses its number up; a message without pixels has two parts."""
    bench.order("corrupt_header")
    bench.until(lambda message: len(message) == 3 and head(message) is None)
    bench.order("truncated")
    assert bench.sent(bench.until(lambda message: len(message) == 2)).expect == "UNKNOWN"
    seqs = {item.seq for item in read(bench.file) if isinstance(item, Sent)}
    assert len(set(range(max(seqs))) - seqs) == 1


def test_gap_duplicate_and_order(bench: Bench) -> None:
    """Numbers are left out, come twice, and come the wrong way round, as ordered."""
    seqs = []
    for order in ("gap", "duplicate", "reorder"):
        bench.order(order, 2)
    while len(seqs) < 40:
        seqs.append(wire.decode_header(bench.socket.recv_multipart()[1]).seq)
    steps = [later - earlier for earlier, later in itertools.pairwise(seqs)]
    assert max(steps) >= 3
    assert steps.count(0) == 2
    assert steps.count(-1) == 2


def test_a_stranger_and_an_old_session(bench: Bench) -> None:
    """Frames under another name, and one of the session before, are on record as what they are."""
    first = wire.decode_header(bench.socket.recv_multipart()[1]).session
    bench.order("unknown_camera", 3)
    stranger = bench.until(lambda message: message[0] == b"stranger-cam1")
    assert bench.sent(stranger).expect == "UNKNOWN"
    bench.order("reconnect")
    end = bench.until(lambda message: (header := head(message)) is not None and header.eos)
    assert wire.decode_header(end[1]).session == first
    bench.until(lambda message: wire.decode_header(message[1]).session != first)
    bench.order("stale")
    again = bench.until(lambda message: wire.decode_header(message[1]).session == first)
    assert bench.sent(again).session == first


def test_the_end_is_said_again_and_again(bench: Bench) -> None:
    """After the order to finish no frame comes, but the end of the stream, until somebody has heard it."""
    bench.order("finish")
    ends = [bench.until(lambda message: (header := head(message)) is not None and header.eos) for _ in range(2)]
    parts = {wire.decode_header(end[1]).seq for end in ends}
    (said,) = [item for item in read(bench.file) if isinstance(item, End)]
    assert parts == {said.parts} == {1 + max(item.seq for item in read(bench.file) if isinstance(item, Sent))}


def test_what_does_not_go_out_is_on_record(tmp_path: Path) -> None:
    """Where nobody takes frames, the sender knows, and says so: these numbers must never be OK."""
    with Recorder(tmp_path / "cam1.jsonl") as recorder:
        camera = SoakCamera("cam1", f"ipc://{tmp_path}/nobody", 1000.0, np.random.default_rng(0), recorder)
        orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
        thread = threading.Thread(target=camera.run, args=(orders,))
        thread.start()
        while not any(isinstance(item, Failed) for item in read(tmp_path / "cam1.jsonl")):
            pass
        orders.put(None)
        thread.join(10)
    items = list(read(tmp_path / "cam1.jsonl"))
    failed = [at for at, item in enumerate(items) if isinstance(item, Failed)]
    assert all((items[at - 1].session, items[at - 1].seq) == (items[at].session, items[at].seq) for at in failed)  # type: ignore[union-attr]
