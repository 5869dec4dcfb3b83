"""Records a running line: frames off its taps, verdicts off Redis.

The line comes first: a message is handed on before it is looked at, and what the disk does not take in time is not
recorded, counted and said. Nothing here makes a camera or the line wait.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis
import structlog
import zmq

from pipeline.config import Camera, Config
from pipeline.recording import Manifest, Message, RecordingFullError, RecordingWriter, Seen
from pipeline.records import Keys
from pipeline.recovery import RedisUnreachableError
from pipeline.taps import Tap, TapThread

log = structlog.get_logger(__name__)

BUFFER_BYTES: Final = 256 << 20
"""So much may wait for the disk."""
SETTLE_S: Final = 10.0
"""How long the verdicts of the last frames are waited for, beside their deadline."""
BLOCK_MS: Final = 100
RETRY_S: Final = 0.2
IDLE_S: Final = 0.05
MOST: Final = 500


@dataclass(frozen=True)
class Limits:
    """How much is recorded.

    Attributes:
        seconds: Longest time; 0 for no limit.
        parts: Most frames; 0 for no limit.
        max_bytes: Largest recording.
        stay: Whether messages are handed on after the recording has ended, until :meth:`Recorder.stop`.
    """

    seconds: float = 0.0
    parts: int = 0
    max_bytes: int = 8 << 30
    stay: bool = True


class Journal:
    """What waits for the disk, and the thread that writes it.

    Args:
        writer: Where to.
        parts: Frames after which it ends; 0 for never.

    Attributes:
        ending: Why nothing more is written; empty while it goes on.
        failed: Whether that was the disk's fault.
        skipped: Messages that were not recorded.
        parts: Frames that were.
        last: Session and number of each camera's last recorded frame.
    """

    def __init__(self, writer: RecordingWriter, parts: int) -> None:
        self._writer, self._limit = writer, parts
        self._waiting: deque[tuple[int, int, list[zmq.Frame]]] = deque()
        self._bytes = 0
        self._lock = threading.Lock()
        self._come = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self.ending, self.failed = "", False
        self.skipped = self.parts = 0
        self.last: dict[str, tuple[int, int]] = {}

    def start(self) -> None:
        """Begin to write."""
        self._thread.start()

    def put(self, message: list[zmq.Frame]) -> None:
        """Take a message; never waits. For any thread."""
        if self.ending or self._done.is_set():
            return
        size = sum(map(len, message))
        with self._lock:
            fits = self._bytes + size <= BUFFER_BYTES
            if fits:
                self._bytes += size
                self._waiting.append((time.monotonic_ns(), time.time_ns(), message))
            else:
                self._skip("the disk is too slow")
        self._come.set()

    def verdict(self, seen: Seen) -> None:
        """Write a verdict; for the thread that reads them."""
        self._store(self._writer.verdict, seen)

    def finish(self) -> None:
        """Write what waits, and end the thread."""
        self._done.set()
        self._come.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._done.is_set() or self._waiting:
            if not self._waiting:
                self._come.wait(IDLE_S)
                self._come.clear()
                continue
            with self._lock:
                mono, wall, frames = self._waiting.popleft()
            self._take(Message(mono, wall, [frame.bytes for frame in frames]))
            with self._lock:
                self._bytes -= sum(map(len, frames))

    def _take(self, message: Message) -> None:
        if self.ending or not self._store(self._writer.message, message):
            return
        camera, header = message.named()
        if header is not None and not header.eos:
            self.parts += 1
            self.last[camera] = header.session, header.seq
            if self._limit and self.parts >= self._limit:
                self.ending = f"{self.parts} parts"

    def _store(self, store: Callable[[Any], None], entry: Message | Seen) -> bool:
        try:
            store(entry)
        except RecordingFullError as error:
            self.ending = self.ending or f"full: {error}"
        except OSError as error:
            self.failed, self.ending = True, f"the disk takes no more: {error}"
            log.error("record_failed", error=str(error), remedy="free or mend the disk; the line is not affected")
        else:
            return True
        return False

    def _skip(self, why: str) -> None:
        self.skipped += 1
        if self.skipped == 1:
            log.warning("record_behind", why=why, remedy="a faster disk, or fewer cameras; the line is not affected")


class VerdictReader:
    """Follows the verdicts of a line from now on, through outages of Redis.

    Args:
        connect: Makes a client that fails fast.
        keys: Names of the line's keys.
        cameras: Whose verdicts.
        sink: Given each record.

    Attributes:
        newest: Session and number of each camera's newest record.

    Raises:
        RedisUnreachableError: if Redis does not answer at the start.
    """

    def __init__(
        self, connect: Callable[[], redis.Redis], keys: Keys, cameras: tuple[str, ...], sink: Callable[[Seen], None]
    ) -> None:
        self._client, self._sink = connect(), sink
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="verdicts", daemon=True)
        self.newest: dict[str, tuple[int, int]] = {}
        try:
            self._at = {keys.verdicts(name): self._last(keys.verdicts(name)) for name in cameras}
        except redis.RedisError as error:
            self._client.close()
            msg = f"Redis does not answer: {error}; start it, or correct its address"
            raise RedisUnreachableError(msg) from error

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the connection."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._client.close()

    def _last(self, key: str) -> str:
        found: Any = self._client.xrevrange(key, count=1)
        return str(found[0][0].decode()) if found else "0-0"

    def _run(self) -> None:
        lost = False
        while not self._stopping.is_set():
            try:
                self._read()
            except redis.RedisError as error:
                if not lost:
                    log.warning("record_redis_lost", error=str(error))
                lost = True
                self._stopping.wait(RETRY_S)
            else:
                lost = False

    def _read(self) -> None:
        found: Any = self._client.xread(self._at, count=MOST, block=BLOCK_MS)  # type: ignore[arg-type]
        for raw, entries in found or ():
            for identifier, fields in entries:
                self._at[raw.decode()] = identifier.decode()
                record = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
                self._sink(Seen(time.monotonic_ns(), time.time_ns(), identifier.decode(), record))
                with suppress(KeyError, ValueError):  # somebody else's record
                    self.newest[record["camera"]] = int(record["session"]), int(record["seq"])


class Recorder:
    """Records a line.

    Args:
        config: Its settings.
        taps: Where its frames are.
        folder: Where the recording goes.
        limits: How much.
        connect: Makes a client of its Redis that fails fast.

    Attributes:
        manifest: What was recorded.
        failed: Whether the disk failed.

    Raises:
        RecordingError: if the folder cannot be used.
        RedisUnreachableError: if Redis does not answer.
        zmq.ZMQError: if an address cannot be used.
    """

    def __init__(
        self, config: Config, taps: list[Tap], folder: Path, limits: Limits, connect: Callable[[], redis.Redis]
    ) -> None:
        cameras = tuple(config.cameras)
        self._limits, self._longest = limits, max(one.deadline_ms for one in config.cameras.values()) / 1000
        self._renumbered = [name for name, one in config.cameras.items() if _renumbers(one)]
        self._hands_on = any(tap.hands_on for tap in taps)
        self._stopping = threading.Event()
        self._taps: list[TapThread] = []
        self._verdicts = VerdictReader(connect, Keys(config.line.name), cameras, self._seen)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            for tap in taps:
                self._taps.append(TapThread(self._context, tap, config.limits, self._message))
            sockets = [tap.socket.address for tap in taps]
            self.manifest = Manifest(config.line.name, list(cameras), self._renumbered, sockets, time.time_ns())
            self._writer = RecordingWriter(folder, self.manifest, limits.max_bytes)
        except BaseException:
            self._release()
            raise
        self._journal = Journal(self._writer, limits.parts)
        self.failed = False

    def stop(self, *_: object) -> None:
        """End; may be used as a signal handler."""
        self._stopping.set()

    def run(self, ended: Callable[[], None] = lambda: None) -> None:
        """Record until a limit or :meth:`stop`; where it stays, hand on until :meth:`stop`.

        Args:
            ended: Called when the recording has ended and lies whole on the disk.
        """
        self._verdicts.start()
        self._journal.start()
        for tap in self._taps:
            tap.start()
        try:
            ending = self._record()
            self._journal.finish()
            self._journal.ending = self._journal.ending or ending
            self._settle()
            self._close()
            ended()
            if self._limits.stay and self._hands_on:
                self._stopping.wait()
        finally:
            self._release()

    def _record(self) -> str:
        """Wait for the end; say why it came."""
        end = time.monotonic() + self._limits.seconds if self._limits.seconds else float("inf")
        while not self._journal.ending:
            if self._stopping.wait(IDLE_S):
                return "stopped"
            if time.monotonic() >= end:
                return f"{self._limits.seconds:g} seconds"
        return self._journal.ending

    def _settle(self) -> None:
        """Wait for the verdicts of the frames that were recorded last."""
        end = time.monotonic() + min(self._longest, SETTLE_S) + 2
        places = [(camera, at) for camera, at in self._journal.last.items() if camera not in self._renumbered]
        while time.monotonic() < end and not self._journal.failed:
            if all(self._verdicts.newest.get(camera, (-1, -1)) >= at for camera, at in places):
                return
            time.sleep(IDLE_S)

    def _close(self) -> None:
        self._verdicts.stop()
        self.manifest.skipped = self._journal.skipped
        self.failed = self._journal.failed
        self._writer.close(time.time_ns(), self._journal.ending)

    def _release(self) -> None:
        for tap in self._taps:
            tap.stop()
        self._verdicts.stop()
        self._context.destroy(linger=0)

    def _message(self, message: list[zmq.Frame]) -> None:
        self._journal.put(message)

    def _seen(self, seen: Seen) -> None:
        self._journal.verdict(seen)


def _renumbers(camera: Camera) -> bool:
    """Whether a camera's records are numbered otherwise than its frames."""
    return camera.seq_bits < 64 or camera.expected == "part"
