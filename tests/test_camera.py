"""A camera process over a real socket: numbered, never silently lost, everything released at the end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from pipeline import camera as module
from pipeline import wire
from pipeline.camera import CameraSender, Sending
from pipeline.sources import Frame
from pipeline.wire import Header

ANY_PORT = "tcp://127.0.0.1:*"


@dataclass
class Source:
    """So many frames, each with its number as pixels; a test may hold it back and see how far it is."""

    count: int
    failure: Exception | None = None
    taken: int = 0
    hold_at: int = -1
    go: threading.Event = field(default_factory=threading.Event)

    def frames(self) -> Iterator[Frame]:
        """Yield the frames; stop and wait where told to."""
        for number in range(self.count):
            if number == self.hold_at:
                assert self.go.wait(20)
            self.taken = number + 1
            yield Frame(b"%d" % number, 4, 3, "mono8", truth="good", part=f"part-{number}", simulated=True)
        if self.failure is not None:
            raise self.failure


class Line:
    """The far end: a PULL or SUB socket that may be late, and may hold little."""

    def __init__(self, address: str, kind: int = zmq.PULL, *, connect: bool = False, holds: int = 1000) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.rcvhwm = holds
        self.socket.rcvtimeo = 20_000
        if kind == zmq.SUB:
            self.socket.subscribe(b"")
        (self.socket.connect if connect else self.socket.bind)(address)
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close(linger=0)
        self.context.term()

    def receive(self) -> tuple[str, Header, bytes]:
        """The next message."""
        camera, header, pixels = self.socket.recv_multipart()
        return wire.decode_camera(camera), wire.decode_header(header), pixels

    def session(self) -> tuple[list[Header], Header, list[bytes]]:
        """Everything up to the end of the stream: headers of frames, the end, pixels."""
        headers: list[Header] = []
        bodies: list[bytes] = []
        while True:
            _, header, pixels = self.receive()
            if header.eos:
                assert pixels == b""
                return headers, header, bodies
            headers.append(header)
            bodies.append(pixels)


@pytest.fixture
def address(tmp_path: Path) -> str:
    """A socket in this test's own folder."""
    return f"ipc://{tmp_path}/frames"


@pytest.fixture
def started() -> Iterator[Callable[[CameraSender], threading.Thread]]:
    """Runs senders in threads of their own; they have all ended when the test is over."""
    running: list[tuple[CameraSender, threading.Thread]] = []

    def start(sender: CameraSender) -> threading.Thread:
        thread = threading.Thread(target=sender.run)
        thread.start()
        running.append((sender, thread))
        return thread

    yield start
    for sender, thread in running:
        sender.stop()
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds; fail if it does not."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_every_frame_is_numbered_and_described(
    tmp_path: Path, started: Callable[[CameraSender], threading.Thread], transport: str
) -> None:
    """From 0, one session, with what the source says of the frame; at the end the number of frames."""
    with Line({"ipc": f"ipc://{tmp_path}/frames", "tcp": ANY_PORT}[transport]) as line:
        sender = CameraSender(Source(20), Sending(line.address, "cam-7", wait=True))
        thread = started(sender)
        camera, first, _ = line.receive()
        headers, end, bodies = line.session()
        thread.join(20)
    assert camera == "cam-7"
    assert (first.w, first.h, first.fmt, first.part, first.truth, first.simulated) == (
        *(4, 3, "mono8", "part-0", "good", True),
    )
    assert [h.seq for h in headers] == list(range(1, 20))
    assert bodies == [b"%d" % number for number in range(1, 20)]
    assert {h.session for h in (first, end, *headers)} == {sender.session}
    assert all(one.t_ns <= two.t_ns for one, two in itertools.pairwise([first, *headers]))
    assert end.seq == 20
    assert (sender.captured, sender.sent, sender.dropped) == (20, 20, 0)


def test_sessions_of_a_camera_grow() -> None:
    """A camera that is started again has a later session, which the line tells apart."""
    settings = Sending("inproc://unused", "cam1")
    first = CameraSender(Source(0), settings).session
    assert CameraSender(Source(0), settings).session > first


def test_frames_that_nobody_takes_leave_a_gap(
    address: str, started: Callable[[CameraSender], threading.Thread]
) -> None:
    """With no line yet, the oldest frames give way and their numbers are used up: the line will see the gap."""
    source = Source(200)
    sender = CameraSender(source, Sending(address, "cam1", buffer=8, linger_s=20))
    started(sender)
    until(lambda: source.taken == 200)
    with Line(address) as line:
        headers, end, bodies = line.session()
    numbers = [h.seq for h in headers]
    assert numbers == sorted(set(numbers))
    assert numbers[-8:] == list(range(192, 200))
    assert end.seq == sender.captured == 200
    assert sender.dropped == 200 - len(numbers) > 0
    assert bodies == [b"%d" % number for number in numbers]


def test_a_camera_that_waits_loses_nothing(address: str, started: Callable[[CameraSender], threading.Thread]) -> None:
    """With no line yet, the source is held back instead; then every frame comes, in order."""
    source = Source(200)
    sender = CameraSender(source, Sending(address, "cam1", buffer=8, wait=True, linger_s=20))
    started(sender)
    until(lambda: source.taken > 8)
    assert source.taken < 30
    with Line(address) as line:
        headers, end, _ = line.session()
    assert [h.seq for h in headers] == list(range(200))
    assert (end.seq, sender.dropped) == (200, 0)


def test_a_slow_line_makes_a_camera_drop_and_say_how_many(
    started: Callable[[CameraSender], threading.Thread],
) -> None:
    """What the line does not take in time is missing from the sequence and counted, and nothing else is."""
    source = Source(100, hold_at=50)
    with Line(ANY_PORT, holds=2) as line:
        sender = CameraSender(source, Sending(line.address, "cam1", buffer=4, linger_s=20))
        started(sender)
        first = [line.receive()[1].seq for _ in range(3)]
        source.go.set()
        until(lambda: source.taken == 100)
        headers, end, _ = line.session()
    numbers = first + [h.seq for h in headers]
    assert numbers == sorted(set(numbers))
    assert numbers[-4:] == [96, 97, 98, 99]
    assert (end.seq, len(numbers) + sender.dropped) == (100, 100)


@pytest.mark.parametrize("wait", [False, True])
def test_a_camera_stops_after_so_many_frames(
    address: str, started: Callable[[CameraSender], threading.Thread], wait: bool
) -> None:
    """With count an endless source ends, and so does the stream."""
    with Line(address) as line:
        sender = CameraSender(Source(1_000_000), Sending(address, "cam1", count=5, wait=wait))
        thread = started(sender)
        headers, end, _ = line.session()
        thread.join(20)
        assert not thread.is_alive()
    assert [h.seq for h in headers] == list(range(5))
    assert end.seq == 5


def test_a_camera_that_is_stopped_says_how_far_it_came(
    address: str, started: Callable[[CameraSender], threading.Thread]
) -> None:
    """stop(), as on a signal, ends the source; the frames that were taken are sent, then the end."""
    source = Source(1_000_000, hold_at=10)
    sender = CameraSender(source, Sending(address, "cam1", wait=True))
    with Line(address) as line:
        thread = started(sender)
        until(lambda: sender.captured == 10)
        sender.stop()
        source.go.set()
        headers, end, _ = line.session()
        thread.join(20)
        assert not thread.is_alive()
    assert [h.seq for h in headers] == list(range(10))
    assert end.seq == 10


def test_a_camera_can_be_stopped_while_nobody_listens(
    address: str, started: Callable[[CameraSender], threading.Thread]
) -> None:
    """A camera without a line ends when told to, held back or not."""
    for wait in (False, True):
        sender = CameraSender(Source(1_000_000), Sending(address, "cam1", buffer=2, wait=wait, linger_s=0.05))
        thread = started(sender)
        until(lambda sender=sender: sender.captured >= 2)  # type: ignore[misc]
        sender.stop()
        thread.join(20)
        assert not thread.is_alive()


def test_an_error_of_the_source_is_raised_after_the_frames_before_it(address: str) -> None:
    """The frames that came are sent and the stream is ended before the caller learns of the error."""
    sender = CameraSender(Source(3, failure=OSError("unplugged")), Sending(address, "cam1", wait=True))
    with Line(address) as line:
        with pytest.raises(OSError, match="unplugged"):
            sender.run()
        headers, end, _ = line.session()
    assert [h.seq for h in headers] == [0, 1, 2]
    assert end.seq == 3


def test_a_camera_that_publishes_numbers_in_the_same_way(
    address: str, started: Callable[[CameraSender], threading.Thread]
) -> None:
    """PUB, bound by the camera: from the first frame that a line hears it misses none, nor the end."""
    settings = Sending(address, "cam1", pattern="pub", mode="bind", rate=500, buffer=1000)
    with Line(address, zmq.SUB, connect=True) as line:
        sender = CameraSender(Source(1_000_000), settings)
        started(sender)
        first = line.receive()[1]
        until(lambda: sender.sent > first.seq + 20)
        sender.stop()
        headers, end, _ = line.session()
    assert [h.seq for h in headers] == list(range(first.seq + 1, end.seq))
    assert end.seq == sender.captured


class StillTime:
    """The time module as far as the camera uses it: time passes only while the camera waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """Seconds that have been waited."""
        return self.now

    def time_ns(self) -> int:
        """The same as a wall clock."""
        return round(self.now * 1e9)

    def wait(self, seconds: float) -> bool:
        """Let time pass."""
        self.now += seconds
        return False


def test_the_rate_is_kept_by_the_camera(
    started: Callable[[CameraSender], threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that is faster is held back: exposures are one period apart, however long the sending takes."""
    still = StillTime()
    monkeypatch.setattr(module, "time", still)
    with Line(ANY_PORT) as line:
        sender = CameraSender(Source(1_000_000), Sending(line.address, "cam1", rate=100, count=11))
        monkeypatch.setattr(sender._stopping, "wait", still.wait)
        started(sender)
        headers, _, _ = line.session()
    assert [round(h.t_ns / 1e6) for h in headers] == [100_000 + 10 * (number + 1) for number in range(11)]


def test_the_end_over_ipc_reaches_a_line_that_is_busy(
    address: str, started: Callable[[CameraSender], threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that is behind when the camera ends still gets the last frames and the end."""
    monkeypatch.setattr(module, "IPC_HOLD_S", 2.0)
    with Line(address, holds=2) as line:
        sender = CameraSender(Source(9), Sending(address, "cam1", wait=True, linger_s=20))
        started(sender)
        until(lambda: sender.sent == 9)
        time.sleep(0.2)
        headers, end, _ = line.session()
    assert [h.seq for h in headers] == list(range(9))
    assert end.seq == 9


def test_an_address_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    """No camera runs without an address, and no thread is left behind."""
    before = threading.active_count()
    for where, mode in (("nonsense", "connect"), (f"ipc://{tmp_path}/none/frames", "bind")):
        with pytest.raises(zmq.ZMQError):
            CameraSender(Source(1), Sending(where, "cam1", mode=mode)).run()
    assert threading.active_count() == before


def test_everything_is_released_at_the_end(tmp_path: Path) -> None:
    """No socket, no file and no thread of a camera outlives it."""
    process = psutil.Process()

    def once(number: int) -> None:
        address = f"ipc://{tmp_path}/{number}"
        with Line(address) as line:
            sender = CameraSender(Source(3), Sending(address, "cam1", wait=True))
            sender.run()
            line.session()

    once(0)
    before = process.num_fds(), threading.active_count()
    for number in range(1, 4):
        once(number)
    assert (process.num_fds(), threading.active_count()) == before
