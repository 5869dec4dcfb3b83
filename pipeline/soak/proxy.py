"""A TCP proxy that does to a connection what networks do: delay, throttle, cut, reset, fall silent."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

CHUNK: Final = 64 * 1024
RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER with no time to linger: closing sends a reset instead of an end."""


@dataclass
class Weather:
    """What the network is like.

    Attributes:
        delay_s: Added to every chunk, each way.
        bytes_s: Most bytes a second each way; 0 for no limit.
        silent: Connections are accepted and their bytes swallowed: half-open.
        closed: New connections are closed at once; those that stand are cut.
    """

    delay_s: float = 0.0
    bytes_s: float = 0.0
    silent: bool = False
    closed: bool = False


class Proxy:
    """Listens on a port of its own and passes on to ``target``; runs in a thread of its own.

    Args:
        target: Port on this box.

    Attributes:
        target: May be changed; new connections go there.
        weather: May be changed at any time.
        counts: ``accepted``, ``bytes``, ``swallowed``, ``delayed``, ``cut``.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.weather = Weather()
        self.counts: Counter[str] = Counter()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()
        if not self._started.wait(10):
            msg = "the proxy did not start: no free port?"
            raise RuntimeError(msg)

    def cut(self, *, reset: bool = False) -> None:
        """End all connections now, with a reset where that is wanted."""
        self._call(self._cut(reset=reset)).result(10)

    def close(self) -> None:
        """End everything."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    def _call(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(server.sockets[0].getsockname()[1])
        self._started.set()
        await self._stop.wait()
        server.close()
        await self._cut(reset=False)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _cut(self, *, reset: bool) -> None:
        for writer in list(self._writers):
            self.counts["cut"] += 1
            raw = writer.get_extra_info("socket")
            if reset and raw is not None:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - asyncio runs this as a task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.counts["accepted"] += 1
        self._writers.add(writer)
        try:
            if not self.weather.closed:
                await self._join(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        self._writers.add(far_writer)
        try:
            ways = [
                asyncio.ensure_future(self._pump(reader, far_writer)),
                asyncio.ensure_future(self._pump(far_reader, writer)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        finally:
            self._writers.discard(far_writer)
            far_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Each chunk goes out `delay_s` after it came in; the next one is read meanwhile, as on a long cable.
        due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)
        mute = False  # for good: bytes after a hole would be another message than the one that was sent
        out = asyncio.ensure_future(self._deliver(due, writer))
        try:
            while data := await reader.read(CHUNK):
                mute = mute or self.weather.silent
                if mute:
                    self.counts["swallowed"] += len(data)
                    continue
                if self.weather.delay_s or self.weather.bytes_s:
                    self.counts["delayed"] += 1
                await due.put((time.monotonic() + self.weather.delay_s, data))
            await due.put((0.0, b""))
            await out
        finally:
            out.cancel()

    async def _deliver(self, due: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            at, data = await due.get()
            if not data:
                return
            await asyncio.sleep(max(at - time.monotonic(), 0))
            if self.weather.bytes_s:
                await asyncio.sleep(len(data) / self.weather.bytes_s)
            writer.write(data)
            self.counts["bytes"] += len(data)
            with contextlib.suppress(ConnectionError):
                await writer.drain()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
