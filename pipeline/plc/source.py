"""What the bridge reads of Redis: new verdicts, new rejects, and the line's heartbeat. One thread of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import redis
import structlog

from pipeline.plc.results import Result, parse
from pipeline.records import Keys

log = structlog.get_logger(__name__)

BLOCK_MS: Final = 20
MOST: Final = 512
"""Records of one read."""
BEAT_EVERY_S: Final = 0.1
RETRY_S: Final = 0.1
ALIVE_S: Final = 0.5
"""Without an answer for so long, Redis counts as lost."""


class Source:
    """Reads a line's records from now on: what was published before the start never opens a gate.

    Args:
        connect: Makes a client that fails fast.
        keys: Names of the line's keys.
        cameras: Whose verdicts are read.
    """

    def __init__(self, connect: Callable[[], redis.Redis], keys: Keys, cameras: tuple[str, ...]) -> None:
        self._connect, self._keys = connect, keys
        self._streams = {keys.verdicts(camera): camera for camera in cameras}
        self._cameras = frozenset(cameras)
        self._at: dict[str, str] = {}
        self._results: deque[Result] = deque()
        self._heartbeats: deque[dict[str, str]] = deque(maxlen=16)
        self._answered = 0
        self._next_beat = 0.0
        self._lost = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plc-source", daemon=True)
        self.unreadable = 0

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close its connection."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(10)

    def results(self) -> Iterator[Result]:
        """Take what was read since the last call."""
        for _ in range(len(self._results)):
            yield self._results.popleft()

    def heartbeats(self) -> Iterator[dict[str, str]]:
        """Take the heartbeats that were read since the last call; an empty one has lapsed."""
        for _ in range(len(self._heartbeats)):
            yield self._heartbeats.popleft()

    def is_alive(self, now: int) -> bool:
        """Whether Redis has answered of late; ``now`` in monotonic nanoseconds."""
        return bool(self._answered) and now - self._answered < ALIVE_S * 1e9

    def _run(self) -> None:
        client = self._connect()
        try:
            while not self._stopping.is_set():
                try:
                    self._read(client)
                except redis.RedisError as error:
                    self._note_loss(error)
                    self._stopping.wait(RETRY_S)
        finally:
            client.close()

    def _read(self, client: redis.Redis) -> None:
        if not self._at:
            self._at = {key: self._newest(client, key) for key in (*self._streams, self._keys.rejects)}
        found: Any = client.xread(self._at, count=MOST, block=BLOCK_MS)  # type: ignore[arg-type]
        for raw, entries in _pairs(found):
            key = raw.decode()
            for entry, fields in entries:
                self._at[key] = entry.decode()
                self._take(key, {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()})
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT_EVERY_S
            beat: Any = client.hgetall(self._keys.heartbeat)
            self._heartbeats.append({name.decode(): value.decode() for name, value in beat.items()})
        self._answered = time.monotonic_ns()
        if self._lost:
            log.info("plc_redis_back")
            self._lost = False

    def _take(self, key: str, fields: dict[str, str]) -> None:
        camera = self._streams.get(key, fields.get("camera", ""))
        if camera not in self._cameras:
            return
        result = parse(camera, fields)
        if result is None:
            self.unreadable += 1
            log.warning("plc_record_unreadable", camera=camera, stream=key)
            return
        self._results.append(result)

    def _note_loss(self, error: redis.RedisError) -> None:
        if not self._lost:
            log.error("plc_redis_lost", error=str(error), remedy="all parts are rejected until Redis answers again")
        self._lost = True

    @staticmethod
    def _newest(client: redis.Redis, key: str) -> str:
        found: Any = client.xrevrange(key, count=1)
        return str(found[0][0].decode()) if found else "0-0"


def _pairs(found: Any) -> Any:
    """The reply of XREAD by stream, in RESP2's form or RESP3's."""
    return found.items() if isinstance(found, dict) else found or ()
