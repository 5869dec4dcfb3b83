"""Expected parts: the PLC's triggers from Redis, so that a part whose frame never comes is answered too.

See ``docs/contracts.md``. One thread with a Redis client of its own; a lost Redis costs nothing but time, for the
streams keep the triggers and reading goes on behind the last one.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

import redis
import structlog

from pipeline.books import MAX_NUMBERS, Matching, Trigger
from pipeline.entries import StreamIds
from pipeline.records import Keys

log = structlog.get_logger(__name__)

BLOCK_MS: Final = 50
"""Longest wait of one read; the client's own timeout must be longer."""
BATCH: Final = 256
PAUSE_S: Final = 0.2
LOG_EVERY_S: Final = 1.0
MAX_TEXT: Final = 128


class TriggerError(ValueError):
    """A trigger that names no part."""


class ExpectedParts:
    """Reads the trigger streams of the cameras that have one.

    Args:
        client: A Redis client of its own that fails fast, though not sooner than a read waits.
        keys: Names of this line's keys.
        cameras: How the triggers of each camera are matched: ``seq`` or ``part``.
        expect: Takes each trigger with its camera's id.

    Attributes:
        counts: ``triggers`` read, and ``refused_trigger``.
        beat: Monotonic nanoseconds of the last sign of life.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: Keys,
        cameras: Mapping[str, Matching],
        expect: Callable[[str, Trigger], None],
    ) -> None:
        self._client, self._expect = client, expect
        self._cameras = {key_of(keys, camera).encode(): (camera, matching) for camera, matching in cameras.items()}
        self._positions: dict[bytes, bytes] = {}
        self._stop = threading.Event()
        self._connected = False
        self._next_log = 0.0
        self.counts: Counter[str] = Counter()
        self.beat = 0

    def open(self) -> None:
        """Begin behind the newest trigger of each stream; go on behind the last one read.

        A stream whose newest id is before that has been emptied: then all that it holds is new.

        Raises:
            redis.RedisError: if Redis does not answer; :meth:`run` does it then.
        """
        for key in self._cameras:
            found: Any = self._client.xrevrange(key, count=1)
            newest = found[0][0] if found else b"0-0"
            read = self._positions.get(key)
            if read is None:
                self._positions[key] = newest
            elif StreamIds.parse(newest.decode()) < StreamIds.parse(read.decode()):
                self._positions[key] = b"0-0"
        self._connected = True

    def run(self) -> None:
        """Read until :meth:`stop`; the body of the thread."""
        while not self._stop.is_set():
            self.beat = time.monotonic_ns()
            try:
                if not self._connected:
                    self.open()
                self._read()
            except redis.RedisError as error:
                if self._connected:
                    log.warning("triggers_lost", error=str(error), remedy="they are read when Redis is back")
                self._connected = False
                self._stop.wait(PAUSE_S)

    def stop(self) -> None:
        """Ask the thread to end."""
        self._stop.set()

    def _read(self) -> None:
        replies: Any = self._client.xread(self._positions, count=BATCH, block=BLOCK_MS)  # type: ignore[arg-type]
        for key, entries in replies or ():
            camera, matching = self._cameras[key]
            for identifier, fields in entries:
                self._positions[key] = identifier
                self._take(camera, matching, fields)

    def _take(self, camera: str, matching: Matching, fields: dict[bytes, bytes]) -> None:
        try:
            trigger = parse(fields, matching)
        except TriggerError as error:
            self.counts["refused_trigger"] += 1
            if time.monotonic() >= self._next_log:
                self._next_log = time.monotonic() + LOG_EVERY_S
                log.warning("trigger_refused", camera=camera, error=str(error), total=self.counts["refused_trigger"])
            return
        self.counts["triggers"] += 1
        self._expect(camera, trigger)


def key_of(keys: Keys, camera: str) -> str:
    """The stream of a camera's triggers."""
    return f"{keys.prefix}:expected:{camera}"


def parse(fields: dict[bytes, bytes], matching: Matching) -> Trigger:
    """Read a trigger; unknown fields are ignored.

    Raises:
        TriggerError: naming the field that is missing or wrong.
    """
    known = {name: fields.get(name.encode(), b"").decode(errors="replace") for name in ("seq", "part", "session")}
    if len(known["part"]) > MAX_TEXT:
        raise TriggerError(f"part: {len(known['part'])} characters, at most {MAX_TEXT}")
    if matching == "part":
        if not known["part"]:
            raise TriggerError("part: missing; this camera's triggers are matched by part id")
        return Trigger(part=known["part"])
    seq = _number("seq", known["seq"])
    if seq is None:
        raise TriggerError("seq: missing; this camera's triggers are matched by number")
    return Trigger(seq, known["part"], _number("session", known["session"]))


def _number(name: str, text: str) -> int | None:
    """An unsigned 64-bit number in decimal digits; None where there is none."""
    if not text:
        return None
    if len(text) > 20 or not (text.isascii() and text.isdigit()) or int(text) >= MAX_NUMBERS:
        raise TriggerError(f"{name}: {text[:MAX_TEXT]!r} is no unsigned 64-bit number")
    return int(text)
