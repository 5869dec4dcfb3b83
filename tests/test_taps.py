"""Where a recorder listens, and where it refuses to."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from pipeline.config import Limits, Socket
from pipeline.recording import RecordingError
from pipeline.taps import Tap, TapThread, plan, reachable
from tests.support.line import until


class TestPlan:
    def test_between_and_beside(self) -> None:
        """A socket that is bound needs an address of the tap's; one that subscribes needs none."""
        bound, beside = (
            Socket(address="tcp://127.0.0.1:5555"),
            Socket(address="tcp://cam:1", kind="sub", mode="connect"),
        )
        assert plan((bound, beside), ["tcp://*:6"]) == [Tap(bound, "tcp://*:6"), Tap(beside)]
        assert plan((bound, beside), [], ["tcp://cam:1"]) == [Tap(beside)]

    @pytest.mark.parametrize(
        ("socket", "why"),
        [
            (Socket(curve=True), "curve"),
            (Socket(protocol="imagezmq", kind="rep"), "numbers nothing"),
            (Socket(mode="connect"), "take frames away"),
        ],
    )
    def test_refused(self, socket: Socket, why: str) -> None:
        """What cannot be recorded without disturbing the line is refused, with the reason."""
        with pytest.raises(RecordingError, match=why):
            plan((socket,), ["tcp://*:6"])

    def test_addresses_are_counted(self) -> None:
        """A tap without an address, an address without a tap, and a socket that is not there are said."""
        for listen in ([], ["tcp://*:6", "tcp://*:7"]):
            with pytest.raises(RecordingError, match="one for each"):
                plan((Socket(),), listen)
        with pytest.raises(RecordingError, match="not in"):
            plan((Socket(),), [], ["tcp://elsewhere:1"])

    @pytest.mark.parametrize(
        ("bound", "connected"),
        [
            ("tcp://*:5555", "tcp://127.0.0.1:5555"),
            ("tcp://0.0.0.0:5555", "tcp://127.0.0.1:5555"),
            ("tcp://[::]:5555", "tcp://[::1]:5555"),
            ("tcp://10.0.0.5:5555", "tcp://10.0.0.5:5555"),
            ("ipc:///run/frames", "ipc:///run/frames"),
        ],
    )
    def test_reachable(self, bound: str, connected: str) -> None:
        """What a line binds for all is reached over this box."""
        assert reachable(bound) == connected


class TestTapThread:
    def test_hands_on_bit_for_bit(self, tmp_path: Path) -> None:
        """Messages of any shape reach the line in order and unchanged, and the sink after it."""
        inner, outer = f"ipc://{tmp_path}/line", f"ipc://{tmp_path}/tap"
        sent = [[b"a"], [b"cam1", b"\xff" * 5000, bytes(1 << 20)], [b"", b"", b"", b"", b""]] * 40
        seen: list[list[bytes]] = []
        with zmq.Context() as context, context.socket(zmq.PULL) as line, context.socket(zmq.PUSH) as camera:
            line.bind(inner)
            line.rcvtimeo = 20_000
            tap = TapThread(
                context, Tap(Socket(address=inner), outer), Limits(), lambda m: seen.append([f.bytes for f in m])
            )
            tap.start()
            try:
                camera.linger = 2000
                camera.connect(outer)
                for one in sent:
                    camera.send_multipart(one)
                assert [line.recv_multipart() for _ in sent] == sent
                until(lambda: len(seen) == len(sent))
            finally:
                tap.stop()
        assert seen == sent

    def test_a_slow_line_holds_the_camera_back(self, tmp_path: Path) -> None:
        """The tap is no bottomless pit: a camera feels a line that takes nothing, and nothing is lost when it does."""
        inner, outer = f"ipc://{tmp_path}/line", f"ipc://{tmp_path}/tap"
        with zmq.Context() as context, context.socket(zmq.PUSH) as camera, context.socket(zmq.PULL) as line:
            tap = TapThread(context, Tap(Socket(address=inner), outer), Limits(receive_queue=2), lambda _: None)
            tap.start()
            try:
                camera.sndhwm, camera.linger = 2, 2000
                camera.connect(outer)
                taken = 0
                while camera.poll(500, zmq.POLLOUT):
                    camera.send_multipart([taken.to_bytes(2), bytes(1 << 20)])
                    taken += 1
                    assert taken < 100
                line.rcvtimeo = 20_000
                line.bind(inner)
                assert [int.from_bytes(line.recv_multipart()[0]) for _ in range(taken)] == list(range(taken))
            finally:
                tap.stop()

    def test_an_address_in_use(self, tmp_path: Path) -> None:
        """An address that cannot be bound is an error at once, and nothing is left open."""
        with zmq.Context() as context, context.socket(zmq.PULL) as other:
            other.bind("tcp://127.0.0.1:0")
            taken = other.last_endpoint.decode()
            with pytest.raises(zmq.ZMQError, match="in use"):
                TapThread(context, Tap(Socket(address=f"ipc://{tmp_path}/line"), taken), Limits(), lambda _: None)
