"""A Redis in memory, as a client sees it, that fails at any command in any way; and parts to publish on it."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import redis

from pipeline.parts import UNKNOWN, Finding, Part, Reason, Verdict
from pipeline.redis_client import Gate
from pipeline.wire import Header

SESSION = 1_700_000_000_000_000_000
OK = Finding(Verdict.OK, Reason.BELOW_THRESHOLD, 0.1, 0.5, "e@1")
NG = Finding(Verdict.NG, Reason.ABOVE_THRESHOLD, 0.9, 0.5, "e@1")
LOST_BEFORE, LOST_AFTER, KILL_BEFORE, KILL_AFTER = "lost before", "lost after", "kill before", "kill after"
"""The command does not arrive, or its answer does not; or the line dies at that moment."""


class Killed(BaseException):
    """The line is gone."""


def answered(camera: str, seq: int, finding: Finding = OK, pixels: bytes | None = None) -> Part:
    """A part with its verdict, as the ledger hands it on."""
    part = Part(camera, Header(seq=seq, session=SESSION, w=2, h=2), SESSION // 1_000_000, seq, 0, SESSION, 1000)
    part.finding, part.pixels = finding, pixels
    return part


UNJUDGED = UNKNOWN[Reason.DEADLINE]


def _pair(text: str) -> tuple[int, int]:
    left, _, right = text.partition("-")
    return int(left), int(right or 0)


def _refusal(text: str) -> redis.ResponseError:
    """The error that the client makes of Redis's answer."""
    found: redis.ResponseError = redis.connection.DefaultParser.parse_error(text)
    return found


class FakeRedis:
    """Streams, hashes and strings; what the line's publisher uses and no more.

    Attributes:
        faults: One for each round trip to come: None for none, a constant of this module, or Redis's answer.
        always: One for all that have none of their own.
        log: Every stream entry in the order in which it was added, as ``(key, id)``.
        told: What was published.
        is_connected: Whether the client has a connection.
    """

    def __init__(self, gate: Gate | None = None) -> None:
        self.gate = gate
        self.faults: deque[str | None] = deque()
        self.always: str | None = None
        self.streams: dict[str, list[tuple[str, dict[bytes, bytes]]]] = {}
        self.hashes: dict[str, dict[str, str]] = {}
        self.strings: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.told: list[tuple[str, bytes]] = []
        self.wrong: dict[str, str] = {}
        self.is_connected = False
        self.connection_pool = self
        self.trips = 0

    # The client.

    def disconnect(self) -> None:
        """Close the connection."""
        self.is_connected = False

    def on_connect(self) -> None:
        """Nothing to negotiate."""

    def close(self) -> None:
        """As the client has it."""

    def ping(self) -> Any:
        """One round trip."""
        return self._trip(lambda: True)

    def delete(self, key: str) -> Any:
        """DEL."""
        return self._trip(lambda: self.hashes.pop(key, None))

    def execute_command(self, *words: Any) -> Any:
        """SET, SETRANGE and EXPIRE."""
        return self._trip(lambda: self._apply(words))

    def xrevrange(self, key: str, max: str = "+", count: int = 1) -> Any:  # noqa: A002
        """The newest entries up to an id; ``ms`` alone takes in all of that millisecond."""
        high = (1 << 65, 0) if max == "+" else _pair(max if "-" in max else f"{max}-{1 << 64}")
        return self._trip(lambda: [e for e in self._read(key)[::-1] if _pair(e[0].decode()) <= high][:count])

    def xrange(self, key: str, min: str = "-", max: str = "+", count: int = 10**9) -> Any:  # noqa: A002
        """Entries between two ids, both included."""
        low = (0, 0) if min == "-" else _pair(min)
        high = (1 << 65, 0) if max == "+" else _pair(max)
        return self._trip(lambda: [e for e in self._read(key) if low <= _pair(e[0].decode()) <= high][:count])

    def pipeline(self, *, transaction: bool) -> FakePipeline:
        """A transaction."""
        assert transaction
        return FakePipeline(self)

    # The server.

    def fail_over(self, to: dict[str, Any]) -> None:
        """Another server takes over, with what it has."""
        self.streams, self.hashes = copy.deepcopy(to["streams"]), copy.deepcopy(to["hashes"])
        self.log = [(key, at) for key, at in self.log if any(at == have for have, _ in self.streams.get(key, []))]
        self.disconnect()

    def state(self) -> dict[str, Any]:
        """What a replica has that is in step now."""
        return copy.deepcopy({"streams": self.streams, "hashes": self.hashes})

    def records(self, key: str) -> list[dict[str, str]]:
        """A stream's records, oldest first."""
        return [{n.decode(): v.decode() for n, v in fields.items()} for _, fields in self.streams.get(key, [])]

    def _trip(self, action: Any) -> Any:
        self.trips += 1
        if not self.is_connected:
            if self.gate is not None:
                self.gate(self)
            self.is_connected = True
        fault = self.faults.popleft() if self.faults else self.always
        if fault is None:
            return action()
        if fault in {LOST_AFTER, KILL_AFTER}:
            action()
        if fault in {KILL_BEFORE, KILL_AFTER}:
            raise Killed
        if fault in {LOST_BEFORE, LOST_AFTER}:
            self.is_connected = False
            raise redis.TimeoutError("Timeout reading from socket") if len(self.log) % 2 else redis.ConnectionError
        raise _refusal(fault)

    def _read(self, key: str) -> Any:
        if key in self.wrong:
            raise _refusal(self.wrong[key])
        return [(at.encode(), fields) for at, fields in self.streams.get(key, [])]

    def _execute(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        results = []
        for command in commands:
            try:
                results.append(self._apply(command))
            except redis.ResponseError as error:
                results.append(error)
        return results

    def _apply(self, command: tuple[Any, ...]) -> Any:
        name, key, *rest = command
        if key in self.wrong:
            raise _refusal(self.wrong[key])
        if name == "XADD":
            at, fields = rest
            stream = self.streams.setdefault(key, [])
            if stream and _pair(at) <= _pair(stream[-1][0]):
                text = "ERR The ID specified in XADD is equal or smaller than the target stream top item"
                raise _refusal(text)
            stream.append((at, {n.encode(): v.encode() for n, v in fields.items()}))
            self.log.append((key, at))
        elif name == "HSET":
            self.hashes.setdefault(key, {}).update(rest[0])
        elif name == "PUBLISH":
            self.told.append((key, rest[0]))
        elif name == "SET":
            self.strings[key] = bytes(rest[0])
        elif name == "SETRANGE":
            old = self.strings.get(key, b"")
            self.strings[key] = old[: rest[0]] + bytes(rest[1]) + old[rest[0] + len(rest[1]) :]
        return True


class FakePipeline:
    """Commands that are carried out together."""

    def __init__(self, server: FakeRedis) -> None:
        self._server = server
        self._commands: list[tuple[Any, ...]] = []

    def __enter__(self) -> FakePipeline:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to release."""

    def __len__(self) -> int:
        return len(self._commands)

    def xadd(self, key: str, fields: dict[str, str], id: str, maxlen: int, approximate: bool) -> None:  # noqa: A002
        """Append XADD."""
        if not fields:
            raise redis.DataError("XADD fields must be a non-empty dict")
        self._commands.append(("XADD", key, id, fields))

    def hset(self, key: str, mapping: dict[str, str]) -> None:
        """Append HSET."""
        self._commands.append(("HSET", key, mapping))

    def pexpire(self, key: str, milliseconds: int) -> None:
        """Append PEXPIRE."""
        self._commands.append(("PEXPIRE", key, milliseconds))

    def publish(self, key: str, payload: bytes) -> None:
        """Append PUBLISH."""
        self._commands.append(("PUBLISH", key, payload))

    def execute(self, *, raise_on_error: bool = True) -> Any:
        """Carry them out, all or none."""
        return self._server._trip(lambda: self._server._execute(self._commands))
