"""``python -m pipeline.soak.camera``: a camera that misbehaves when it is told to, and writes down all that it sends.

It reads orders from standard input, one JSON object a line: ``{"do": "gap", "n": 3}``. Between orders it sends sound
frames at its rate. When the input ends, so does it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import queue
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import zmq

from pipeline import wire
from pipeline.soak.frames import SIDE, Picture, part_of, picture
from pipeline.soak.history import End, Failed, Recorder, Sent, now
from pipeline.wire import Header

END_EVERY_S: Final = 0.3
HUGE_BYTES: Final = 1 << 20

Message = list[bytes | memoryview]


class SoakCamera:
    """One camera.

    Args:
        name: Camera id.
        address: Where to connect to.
        rate: Frames a second.
        rng: Source of everything that is random.
        recorder: Where each frame is written down before it is sent.
    """

    def __init__(self, name: str, address: str, rate: float, rng: np.random.Generator, recorder: Recorder) -> None:
        self._name, self._address, self._rate, self._rng, self._recorder = name, address, rate, rng, recorder
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._open()
        self._session, self._seq = time.time_ns(), 0
        self._last: tuple[Sent, Message] | None = None
        self._old: tuple[Sent, Message] | None = None
        self._factor, self._until = 1.0, 0.0
        self._finished = False
        self._orders: dict[str, Callable[[int], None]] = {
            name.removeprefix("do_"): getattr(self, name) for name in dir(self) if name.startswith("do_")
        }

    def run(self, orders: queue.Queue[dict[str, Any] | None]) -> None:
        """Send until the orders end."""
        due = time.monotonic()
        while True:
            try:
                order = orders.get(timeout=max(due - time.monotonic(), 0.0))
            except queue.Empty:
                due = max(due + self._step(), time.monotonic() - 0.2)
                self._tick()
                continue
            if order is None:
                break
            self._orders[order["do"]](int(order.get("n", 1)))
        self._socket.close(linger=200)
        self._context.term()

    # Orders. Each takes a number, whose meaning is its own.

    def do_gap(self, n: int) -> None:
        """Use up ``n`` numbers without a frame."""
        self._seq += n

    def do_duplicate(self, n: int) -> None:
        """Send the last frame ``n`` times more."""
        for _ in range(n):
            if self._last is not None:
                self._send(*self._last)

    def do_reorder(self, n: int) -> None:
        """Send ``n`` pairs of frames the wrong way round."""
        for _ in range(n):
            first, second = self._frame(), self._frame()
            self._send(*second)
            self._send(*first)

    def do_corrupt_header(self, n: int) -> None:
        """Use up ``n`` numbers by messages whose header cannot be read."""
        for _ in range(n):
            self._raw([self._name.encode(), b"\xc1" + self._rng.bytes(40), bytes(SIDE * SIDE)])
            self._seq += 1

    def do_garbage(self, n: int) -> None:
        """Send ``n`` messages of random parts."""
        for _ in range(n):
            count = int(self._rng.integers(1, 6))
            self._raw([self._rng.bytes(int(self._rng.integers(0, 300))) for _ in range(count)])

    def do_truncated(self, n: int) -> None:
        """Send ``n`` headers without pixels."""
        for _ in range(n):
            sent, message = self._frame(expect="UNKNOWN")
            self._send(sent, message[:2])

    def do_wrong_size(self, n: int) -> None:
        """Send ``n`` frames that lack their last byte."""
        for _ in range(n):
            sent, message = self._frame(expect="UNKNOWN")
            self._send(sent, [*message[:2], message[2][:-1]])

    def do_bad_format(self, n: int) -> None:
        """Send ``n`` frames of a format that there is not."""
        self._bad(n, fmt="yuv422")

    def do_bad_version(self, n: int) -> None:
        """Send ``n`` frames of another version of the contract."""
        self._bad(n, v=2)

    def do_incomplete(self, n: int) -> None:
        """Send ``n`` frames whose camera says that they are not whole."""
        self._bad(n, complete=False)

    def do_undecodable(self, n: int) -> None:
        """Send ``n`` JPEG files that are none."""
        self._bad(n, fmt="jpeg", w=0, h=0)

    def do_unknown_recipe(self, n: int) -> None:
        """Send ``n`` frames of a product that the camera does not have."""
        self._bad(n, recipe="never heard of")

    def do_huge(self, n: int) -> None:
        """Send ``n`` frames that are far above the limit of a message."""
        for _ in range(n):
            sent, message = self._frame(expect="UNKNOWN", w=1024, h=1024)
            self._send(sent, [*message[:2], bytes(HUGE_BYTES)])

    def do_unknown_camera(self, n: int) -> None:
        """Send ``n`` frames under a name that is not in the config."""
        name, session = f"stranger-{self._name}", time.time_ns()
        for seq in range(n):
            self._send(*self._make(picture(self._rng), name, session, seq, "UNKNOWN"))

    def do_stale(self, n: int) -> None:
        """Send a frame of an earlier session ``n`` times again."""
        for _ in range(n):
            if self._old is not None:
                self._send(*self._old)

    def do_flood(self, n: int) -> None:
        """Send at ten times the rate for ``n`` milliseconds."""
        self._factor, self._until = 10.0, time.monotonic() + n / 1000

    def do_slow(self, n: int) -> None:
        """Send at a tenth of the rate for ``n`` milliseconds."""
        self._factor, self._until = 0.1, time.monotonic() + n / 1000

    def do_reconnect(self, n: int) -> None:
        """End the session and the connection, and begin anew, ``n`` times."""
        for _ in range(n):
            self._recorder.add(End(self._name, self._session, self._seq, now()))
            self._end()
            self._socket.close(linger=500)
            self._socket = self._open()
            self._old, self._last = self._last or self._old, None
            self._session, self._seq = time.time_ns(), 0

    def do_finish(self, _: int) -> None:
        """Send no more frames; say again and again how many there were."""
        if not self._finished:
            self._recorder.add(End(self._name, self._session, self._seq, now()))
        self._finished = True

    # Sending.

    def _open(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        socket.sndhwm = 16
        socket.linger = 200
        socket.reconnect_ivl, socket.reconnect_ivl_max = 50, 400
        socket.connect(self._address)
        return socket

    def _step(self) -> float:
        if self._finished:
            return END_EVERY_S
        return 1 / (self._rate * (self._factor if time.monotonic() < self._until else 1.0))

    def _tick(self) -> None:
        if self._finished:
            self._end()
        else:
            self._last = self._frame()
            self._send(*self._last)

    def _end(self) -> None:
        self._raw(wire.encode(self._name, Header(seq=self._seq, session=self._session, eos=True), b""))

    def _bad(self, n: int, **header: Any) -> None:
        for _ in range(n):
            self._send(*self._frame(expect="UNKNOWN", **header))

    def _frame(self, expect: str = "", **header: Any) -> tuple[Sent, Message]:
        """The next frame of the session."""
        made = self._make(picture(self._rng), self._name, self._session, self._seq, expect, **header)
        self._seq += 1
        return made

    @staticmethod
    def _make(shown: Picture, name: str, session: int, seq: int, expect: str, **header: Any) -> tuple[Sent, Message]:
        digest = hashlib.sha256(shown.pixels).hexdigest()
        fields: dict[str, Any] = {"w": SIDE, "h": SIDE, "part": part_of(digest), "t_ns": time.time_ns(), **header}
        message = wire.encode(name, Header(seq=seq, session=session, **fields), shown.pixels)
        sent = Sent(name, session, seq, 0, part_of(digest), digest, shown.score, expect or shown.expect)
        return sent, message

    def _send(self, sent: Sent, message: Message) -> None:
        """Write a frame down, then send it; write down too where that failed for certain."""
        self._recorder.add(msgspec.structs.replace(sent, t=now()))
        if not self._raw(message):
            self._recorder.add(Failed(sent.camera, sent.session, sent.seq, now()))

    def _raw(self, message: Message) -> bool:
        """Send a message if the socket takes it now; say whether it did."""
        try:
            self._socket.send_multipart(message, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True


def _listen(orders: queue.Queue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        orders.put(json.loads(line))
    orders.put(None)


def main() -> None:
    """Run one camera until its standard input ends."""
    parser = argparse.ArgumentParser()
    for option in ("--camera", "--address", "--out"):
        parser.add_argument(option, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    given = parser.parse_args()
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    with Recorder(Path(given.out)) as recorder:
        rng = np.random.default_rng(given.seed)
        SoakCamera(given.camera, given.address, given.rate, rng, recorder).run(orders)


if __name__ == "__main__":
    main()
