"""The sender: entries into Redis, each once, whatever became of the attempts before.

A chunk of entries is one transaction: all of it or nothing. Where the answer is lost, nobody knows which, so a chunk
that is in doubt is compared with what Redis holds before it is sent again. A new connection may lead to a server that
has less than was acknowledged (a failover to a replica that was behind, a restart without its last writes): the newest
ids are compared with a window of what was sent lately, and what is missing is sent again before anything new is.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Final

import msgspec
import redis
import structlog

from pipeline.entries import EOS, LATE, REJECT, Entry, Maker, StreamIds
from pipeline.outlet import MAX_ENTRIES
from pipeline.redis_client import Gate
from pipeline.refusals import BEHIND, is_final

log = structlog.get_logger(__name__)

Id = tuple[int, int]
NOTHING: Final[Id] = (0, 0)
IDENTITY: Final = ("camera", "session", "seq", "late")


class Sender:
    """Writes entries. Used by one thread.

    Args:
        client: A Redis client of its own, with short timeouts and no retries.
        maker: Makes commands of entries.
        counts: Where ``published``, ``already_there``, ``resent`` and ``refused_by_redis`` are counted.
        window: How many entries are remembered for a failover.
        gate: Told of each new connection of the client; None where failovers are not looked for.
    """

    def __init__(
        self, client: redis.Redis, maker: Maker, counts: Counter[str], window: int, gate: Gate | None = None
    ) -> None:
        self._client, self._make, self._counts, self._gate = client, maker, counts, gate
        self._window = Window(window if gate is not None else 0)
        self._verified = 0
        self._most = MAX_ENTRIES

    def send(self, entries: list[Entry], *, doubt: bool = False) -> None:
        """Write entries in their order.

        Args:
            entries: What to write.
            doubt: Whether some may be there already.

        Raises:
            redis.RedisError: if Redis does not take them now. Some may be there then.
        """
        self.verify()
        at = 0
        while at < len(entries):
            chunk = entries[at : at + self._most]
            try:
                wrong = self._send_chunk(self._absent(chunk) if doubt else chunk, doubt=doubt)
            except redis.TimeoutError:  # a slow server gets less at a time, else it would never get anything
                self._most = max(self._most // 2, 1)
                raise
            self._counts["published"] += len(chunk) - len(wrong)
            self._window.add([entry for entry in chunk if entry not in wrong] if wrong else chunk)
            at += len(chunk)
            self._most = min(self._most * 2, MAX_ENTRIES)

    def store(self, commands: list[tuple[Any, ...]]) -> None:
        """Carry out commands that may be repeated, one by one.

        Raises:
            redis.RedisError: if Redis does not take one.
        """
        self.verify()
        execute: Callable[..., Any] = self._client.execute_command
        for command in commands:
            execute(*command)

    def verify(self) -> None:
        """Where the connection is a new one, see what this Redis has, and send again what it lacks.

        Raises:
            redis.RedisError: if Redis does not answer.
        """
        if self._gate is None or (self._verified and self._verified == self._gate.connections):
            return
        self._client.ping()
        self._verified = self._gate.connections
        try:
            self._restore()
        except BaseException:
            self._verified = 0
            raise

    def distrust(self) -> None:
        """Compare before anything more is sent: the next connection is a new one."""
        self._verified = 0

    def _send_chunk(self, chunk: list[Entry], *, doubt: bool, again: bool = False) -> list[Entry]:
        """Write a chunk; return those of it that Redis refuses for good, and does not have."""
        if not chunk:
            return []
        try:
            refused = self._transaction(chunk, tell=not again)
        except redis.RedisError as error:
            if not is_final(error):
                raise
            if len(chunk) > 1:  # one of them spoils the whole transaction: find it
                return [wrong for entry in chunk for wrong in self._send_chunk([entry], doubt=doubt, again=again)]
            refused = [(chunk[0], error)]
        for _, why in refused:
            if not is_final(why):
                raise why
        return [entry for entry, why in refused if self._is_wrong(entry, why, doubt=doubt)]

    def _transaction(self, chunk: list[Entry], *, tell: bool) -> list[tuple[Entry, Exception]]:
        """Write a chunk; return what single commands were refused."""
        ends = []
        with self._client.pipeline(transaction=True) as pipe:
            for entry in chunk:
                self._make.commands(pipe, entry, tell=tell)
                ends.append(len(pipe))
            with self._gate.shut(self._verified) if self._gate is not None else nullcontext():
                results: list[Any] = pipe.execute(raise_on_error=False)
        refused = []
        for entry, start, end in zip(chunk, [0, *ends], ends, strict=False):
            error = next((result for result in results[start:end] if isinstance(result, Exception)), None)
            if error is not None:
                refused.append((entry, error))
        return refused

    def _is_wrong(self, entry: Entry, error: Exception, *, doubt: bool) -> bool:
        """Whether an entry that was refused for good is missing; say so and count it if it is."""
        why, remedy = str(error), "a key of that name with another type? delete or rename it"
        if BEHIND in why:
            newest = self._newest(entry.key)
            if self._is_there(entry, doubt=doubt):
                self._counts["already_there"] += 1
                return False
            # Ids must grow from here on, whoever has written the others.
            if entry.kind in {REJECT, LATE}:
                (self._make.reject_ids if entry.kind == REJECT else self._make.late_ids).raise_to(newest)
            remedy = "two lines with one name? was Redis put back to another state? a line's keys are its own"
        self._counts["refused_by_redis"] += 1
        log.error("redis_refused", key=entry.key, id=entry.id, error=why, remedy=remedy)
        return True

    def _is_there(self, entry: Entry, *, doubt: bool) -> bool:
        """Whether a stream has this very record; or may have had it, if in doubt, and trimmed it away since."""
        found: Any = self._client.xrange(entry.key, min=entry.id, max=entry.id, count=1)
        if found or not doubt:
            return bool(found) and _same(found[0][1], entry)
        oldest: Any = self._client.xrange(entry.key, count=1)
        return bool(oldest) and _id(oldest[0][0]) > StreamIds.parse(entry.id)

    def _absent(self, chunk: list[Entry]) -> list[Entry]:
        """Those of a chunk in doubt that Redis does not have."""
        there: set[tuple[str, str]] = set()
        by_key: dict[str, list[Entry]] = {}
        for entry in chunk:
            if entry.kind != EOS:
                by_key.setdefault(entry.key, []).append(entry)
        for key, entries in by_key.items():
            if self._newest(key) >= StreamIds.parse(entries[0].id):
                found = self._between(key, entries[0].id, entries[-1].id)
                there |= {(key, entry.id) for entry in entries if entry.id in found and _same(found[entry.id], entry)}
        self._counts["already_there"] += len(there)
        return [entry for entry in chunk if (entry.key, entry.id) not in there]

    def _between(self, key: str, first: str, last: str) -> dict[str, Any]:
        found: Any = self._client.xrange(key, min=first, max=last, count=4 * MAX_ENTRIES)
        return {_text(raw): fields for raw, fields in found}

    def _newest(self, key: str) -> Id:
        try:
            return StreamIds.newest(self._client, key)
        except redis.ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            return NOTHING

    def _restore(self) -> None:
        """Send again what was acknowledged and is missing."""
        newest = {key: self._newest(key) for key in self._window.newest}
        behind = {key for key, at in newest.items() if at < self._window.newest[key]}
        if not behind:
            return
        self._window.warn_of_gaps(newest)
        missing = [
            entry
            for entry in self._window.entries()
            if entry.kind == EOS or (entry.key in behind and StreamIds.parse(entry.id) > newest[entry.key])
        ]
        remedy = "Redis had lost them: see its log"
        log.warning("records_resent", count=len(missing), keys=sorted(behind), remedy=remedy)
        # Rejects first, as always. Subscribers were told of them when they were new.
        for wanted in (True, False):
            for chunk in _chunks(entry for entry in missing if (entry.kind == REJECT) is wanted):
                self._send_chunk(self._absent(chunk), doubt=True, again=True)
        self._counts["resent"] += len(missing)


class Window:
    """What was acknowledged lately, encoded.

    Args:
        most: How many entries are kept, about.

    Attributes:
        newest: The newest id of each stream.
    """

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._chunks: deque[tuple[int, bytes]] = deque()
        self.newest: dict[str, Id] = {}
        self._gone: dict[str, Id] = {}
        self._encode = msgspec.msgpack.Encoder()
        self._decode = msgspec.msgpack.Decoder(list[Entry])

    def add(self, chunk: list[Entry]) -> None:
        """Remember a chunk that Redis has taken."""
        if not self._most or not chunk:
            return
        for entry in chunk:
            if entry.kind != EOS:
                self.newest[entry.key] = max(self.newest.get(entry.key, NOTHING), StreamIds.parse(entry.id))
        self._chunks.append((len(chunk), self._encode.encode(chunk)))
        self._held += len(chunk)
        while self._held - self._chunks[0][0] >= self._most:
            count, raw = self._chunks.popleft()
            self._held -= count
            for entry in self._decode.decode(raw):
                if entry.kind != EOS:
                    self._gone[entry.key] = StreamIds.parse(entry.id)

    def entries(self) -> Iterator[Entry]:
        """All that is remembered, oldest first."""
        for _, raw in tuple(self._chunks):
            yield from self._decode.decode(raw)

    def warn_of_gaps(self, newest: dict[str, Id]) -> None:
        """Say of which streams more is missing than is remembered."""
        short = sorted(key for key, gone in self._gone.items() if newest.get(key, NOTHING) < gone)
        if short:
            remedy = "min-replicas-to-write, appendonly yes; a larger redis.resend_records"
            log.error("records_missing", keys=short, remedy=remedy)


def _chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    chunk: list[Entry] = []
    for entry in entries:
        chunk.append(entry)
        if len(chunk) == MAX_ENTRIES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _same(fields: Any, entry: Entry) -> bool:
    found = {_text(name): _text(value) for name, value in fields.items()}
    return all(found.get(name, "") == entry.fields.get(name, "") for name in IDENTITY)


def _text(raw: Any) -> str:
    return raw.decode(errors="replace") if isinstance(raw, bytes) else str(raw)


def _id(raw: Any) -> Id:
    return StreamIds.parse(_text(raw))
