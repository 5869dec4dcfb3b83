"""Follows a line in Redis from a thread of its own, and remembers the last of it for any number of browsers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final

import redis
import structlog

from pipeline.page.history import KEPT, History, Number
from pipeline.records import Fields, Keys

log = structlog.get_logger(__name__)

BLOCK_MS: Final = 100
BEAT_EVERY_S: Final = 0.5
RETRY_S: Final = 0.2
MOST: Final = 500
LABELS: Final = frozenset({"good", "defective"})
MOST_LABELS: Final = 10_000


class Follower:
    """Keeps the newest records, the heartbeat and the drift of a line.

    Args:
        connect: Makes a client that fails fast.
        keys: Names of the line's keys.
        cameras: Of the config.
    """

    def __init__(self, connect: Callable[[], redis.Redis], keys: Keys, cameras: tuple[str, ...]) -> None:
        self._connect, self._keys, self._cameras = connect, keys, cameras
        self._streams = {keys.verdicts(camera): camera for camera in cameras}
        self._at: dict[str, str] = {}
        self._lock = threading.Lock()
        self._history = History(cameras)
        self._heartbeat: Fields = {}
        self._drift: dict[str, Fields] = {}
        self._counter, self._moved = "", 0.0
        self._redis_error = "not asked yet"
        self._next_beat = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="page-follower", daemon=True)
        self._reader = connect()

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the connections."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(10)
        self._reader.close()

    # For the page; any thread.

    def state(self) -> dict[str, Any]:
        """Everything that the page shows at a glance."""
        now = time.time()
        with self._lock:
            beat_age = time.monotonic() - self._moved
            alive = bool(self._heartbeat) and not self._redis_error and beat_age < 4 * self._period_s()
            return {
                "t": now,
                "redis": self._redis_error,
                "alive": alive,
                "heartbeat": self._heartbeat,
                "serial": self._history.serial,
                "cameras": {
                    name: {**one.summary(int(now)), "drift": self._drift.get(name, {})}
                    for name, one in self._history.cameras.items()
                },
            }

    def since(self, serial: int, most: int = 200) -> tuple[int, list[Fields]]:
        """A reader's next place, and the parts that are new to it."""
        with self._lock:
            return self._history.serial, self._history.since(serial, most)

    def select(self, camera: str, verdicts: frozenset[str], reason: str, most: int) -> list[Fields]:
        """The newest parts that a filter lets through; see :meth:`History.select`."""
        with self._lock:
            return self._history.select(camera, verdicts, reason, most)

    def find(self, number: Number) -> Fields | None:
        """A part's record, if it is still kept."""
        with self._lock:
            return self._history.find(number)

    def scores(self, camera: str) -> dict[str, Any] | None:
        """Scores of a camera's last parts; None for a camera that is not in the config."""
        with self._lock:
            known = self._history.cameras.get(camera)
            return known.scores() if known is not None else None

    def blob(self, key: str) -> bytes | None:
        """A heatmap or an image; None if it has lapsed.

        Raises:
            redis.RedisError: if Redis does not answer.
        """
        found: Any = self._reader.get(key)
        return found if found is None else bytes(found)

    def label(self, record: Fields, label: str) -> bool:
        """Remember what a person says of a part, and keep its image for good; whether there was an image.

        Raises:
            redis.RedisError: if Redis does not take it.
            ValueError: if it is no label, or there are too many.
        """
        if label not in LABELS:
            msg = f"label {label!r}: good or defective"
            raise ValueError(msg)
        labels: Any = self._reader.hlen(self._keys.labels)
        if labels >= MOST_LABELS:
            msg = f"{MOST_LABELS} parts are labelled; take them out first: dmdd export-rejects --labels --take-labels"
            raise ValueError(msg)
        name = ":".join((record["camera"], record["session"], record["seq"]))
        kept = self._keys.labelled(name)
        copied: Any = self._reader.copy(record["frame"], kept, replace=True) if record["frame"] else 0
        if copied:
            self._reader.persist(kept)
        text = f"{label}|{time.time_ns()}|{record['verdict']}|{record['score']}|{kept if copied else ''}"
        self._reader.hset(self._keys.labels, name, text)
        return bool(copied)

    # The thread.

    def _run(self) -> None:
        client = self._connect()
        try:
            while not self._stopping.is_set():
                try:
                    self._read(client)
                except redis.RedisError as error:
                    if not self._redis_error:
                        log.warning("page_redis_lost", error=str(error))
                    with self._lock:
                        self._redis_error = str(error) or type(error).__name__
                    self._stopping.wait(RETRY_S)
        finally:
            client.close()

    def _read(self, client: redis.Redis) -> None:
        if not self._at:
            self._at = {key: self._recall(client, key) for key in self._streams}
        found: Any = client.xread(self._at, count=MOST, block=BLOCK_MS)  # type: ignore[arg-type]
        for raw, entries in found.items() if isinstance(found, dict) else found or ():
            key = raw.decode()
            with self._lock:
                for entry, fields in entries:
                    self._at[key] = entry.decode()
                    self._history.add(_text(fields))
        if time.monotonic() >= self._next_beat:
            self._next_beat = time.monotonic() + BEAT_EVERY_S
            self._read_health(client)
        with self._lock:
            self._redis_error = ""

    def _recall(self, client: redis.Redis, key: str) -> str:
        """Take in the newest records that are there, and say where to go on."""
        found: Any = client.xrevrange(key, count=KEPT // 2)
        with self._lock:
            for _, fields in reversed(found):
                self._history.add(_text(fields))
        return str(found[0][0].decode()) if found else "0-0"

    def _read_health(self, client: redis.Redis) -> None:
        with client.pipeline(transaction=False) as pipe:
            pipe.hgetall(self._keys.heartbeat)
            for camera in self._cameras:
                pipe.hgetall(self._keys.drift(camera))
            heartbeat, *drift = map(_text, pipe.execute())
        with self._lock:
            if heartbeat.get("counter", "") != self._counter:
                self._counter, self._moved = heartbeat.get("counter", ""), time.monotonic()
            self._heartbeat, self._drift = heartbeat, dict(zip(self._cameras, drift, strict=True))

    def _period_s(self) -> float:
        return int(self._heartbeat.get("period_ms", "500")) / 1000


def _text(fields: dict[bytes, bytes]) -> Fields:
    return {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
