"""A reference subscriber: rejects as a PLC gateway reads them, with sequence and heartbeat checks.

It trusts nothing: a missing heartbeat, a gap in a camera's sequence or a lost Redis all mean that parts
without a verdict of their own have to be rejected.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import redis

from pipeline.records import Fields, Keys

BLOCK_MS: Final = 250
RETRY_S: Final = 0.2
SEARCH_S: Final = 1.0
FROZEN_S: Final = 2.0


@dataclass(frozen=True)
class Event:
    """Something a gateway has to act on.

    Attributes:
        kind: ``reject``, ``gap``, ``heartbeat_lost``, ``heartbeat_back``, ``redis_lost`` or ``redis_back``.
        text: For people.
        fields: The record, for a reject.
    """

    kind: str
    text: str
    fields: Fields | None = None


class RejectFollower:
    """Follows a line's rejects.

    Args:
        client: A Redis client whose socket timeout is longer than a quarter of a second.
        line: Name of the line.
        from_start: Begin with the oldest reject that Redis has, instead of with the next one.
    """

    def __init__(self, client: redis.Redis, line: str, *, from_start: bool = False) -> None:
        self._client, self._keys = client, Keys(line)
        self._positions: dict[Any, Any] = {}
        self._start = "0" if from_start else "$"
        self._last: dict[str, tuple[str, int]] = {}
        self._alive: bool | None = None
        self._counter, self._moved = "", 0.0
        self._next_check = self._next_search = 0.0
        self._connected = True

    def events(self, *, follow: bool = True) -> Iterator[Event]:
        """Yield events as they come; without ``follow``, only those that are there."""
        while True:
            try:
                yield from self._heartbeat()
                found = self._read(BLOCK_MS if follow else None)
            except redis.RedisError as error:
                if self._connected:
                    self._connected = False
                    yield Event("redis_lost", f"Redis lost ({error}): reject every part")
                if not follow:
                    return
                time.sleep(RETRY_S)
                continue
            if not self._connected:
                self._connected = True
                yield Event("redis_back", "Redis is back")
            yield from found
            if not follow and not found:
                return

    def _read(self, block: int | None) -> list[Event]:
        self._find_streams()
        replies: Any = self._client.xread(self._positions, count=500, block=block)
        events = []
        for raw_key, records in replies or ():
            key = raw_key.decode()
            for identifier, raw in records:
                self._positions[key] = identifier.decode()
                fields = {name.decode(): value.decode() for name, value in raw.items()}
                events += self._reject(fields) if key == self._keys.rejects else self._follow_sequence(fields)
        return events

    def _find_streams(self) -> None:
        """Follow the rejects, and every camera's verdicts for the sequence check."""
        if time.monotonic() < self._next_search:
            return
        self._next_search = time.monotonic() + SEARCH_S
        wanted = {self._keys.rejects}
        wanted |= {key.decode() for key in self._client.scan_iter(_literal(self._keys.verdicts("")) + "*", count=1000)}
        for key in wanted - set(self._positions):
            self._positions[key] = self._start if self._start == "0" else self._newest(key)

    def _newest(self, key: str) -> str:
        found: Any = self._client.xrevrange(key, count=1)
        return str(found[0][0].decode()) if found else "0"

    def _reject(self, fields: Fields) -> list[Event]:
        what = f"{fields['camera']} part {fields['part'] or fields['seq']}"
        score = f" score {fields['score']} > {fields['threshold']}" if fields["score"] else ""
        return [Event("reject", f"REJECT {what}: {fields['verdict']} ({fields['reason']}){score}", fields)]

    def _follow_sequence(self, fields: Fields) -> list[Event]:
        camera, session, seq = fields["camera"], fields["session"], int(fields["seq"])
        last = self._last.get(camera)
        self._last[camera] = session, seq
        if last is None or last[0] != session or seq == last[1] + 1 or fields["reason"] == "sequence_jump":
            return []
        return [Event("gap", f"GAP {camera}: {last[1]} is followed by {seq}: reject the parts between")]

    def _heartbeat(self) -> list[Event]:
        """A heartbeat counts only while its counter moves."""
        now = time.monotonic()
        if now < self._next_check:
            return []
        self._next_check = now + 1.0
        fields: Any = self._client.hgetall(self._keys.heartbeat)
        counter = fields.get(b"counter", b"").decode()
        if counter != self._counter:
            self._counter, self._moved = counter, now
        period = int(fields.get(b"period_ms", b"500")) / 1000
        alive = bool(counter) and now - self._moved < max(FROZEN_S, 4 * period)
        if alive == self._alive:
            return []
        first, self._alive = self._alive is None, alive
        if alive:
            return [Event("heartbeat_back", f"line {self._keys.line} is alive: {fields.get(b'state', b'').decode()}")]
        state = "no heartbeat" if first else "heartbeat lost"
        return [Event("heartbeat_lost", f"line {self._keys.line}: {state}: reject every part")]


def _literal(text: str) -> str:
    """Escape what SCAN would take for a pattern."""
    return "".join(f"\\{c}" if c in "[]*?{}\\" else c for c in text)
