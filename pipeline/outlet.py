"""Outlets: what waits for Redis, oldest first, on disk, and in memory where the disk takes no more."""

from __future__ import annotations

import fcntl
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

import msgspec
import structlog

from pipeline.config import Spool as SpoolSettings
from pipeline.entries import Entry
from pipeline.spool import Spool, SpoolFullError

log = structlog.get_logger(__name__)

MAX_ENTRIES: Final = 256
"""Entries of a stored batch, and of a transaction."""
DISK_RETRY_S: Final = 1.0


class Outlet:
    """A queue of batches that Redis has not taken. Its order is that of its entries. One thread owns it.

    Args:
        spool: Where batches wait; None where they may not wait at all.
        memory_bytes: So much may wait in memory while the disk fails. What comes when it is full is lost: the oldest
            are kept, as they are the ones that order and ids build on.
        clock: Monotonic seconds.
    """

    def __init__(self, spool: Spool | None, memory_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.spool = spool
        self._room, self._clock = memory_bytes, clock
        self._memory: deque[bytes] = deque()
        self._disk_retry_at = 0.0
        self._failed = False
        self.counts: Counter[str] = Counter()
        self._encode = msgspec.msgpack.Encoder()
        self._decode = msgspec.msgpack.Decoder(list[Entry])

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return bool(self._memory) or bool(self.spool)

    def in_memory(self) -> int:
        """How many entries would be lost with the process."""
        return sum(len(self._decode.decode(raw)) for raw in self._memory)

    def put(self, entries: list[Entry]) -> int:
        """Store entries behind the others; return how many of them are lost."""
        lost = 0
        for start in range(0, len(entries), MAX_ENTRIES):
            chunk = entries[start : start + MAX_ENTRIES]
            lost += 0 if self._store(self._encode.encode(chunk)) else len(chunk)
        return lost

    def head(self) -> list[Entry] | None:
        """The oldest batch, None if nothing waits."""
        while (raw := self._oldest()) is not None:
            try:
                return self._decode.decode(raw)
            except msgspec.DecodeError as error:  # whole, but of a program that wrote something else
                self.counts["unreadable"] += 1
                log.error("spool_unreadable", error=str(error), remedy="written by another version of the line")
                self.done()
        return None

    def entries(self) -> Iterator[Entry]:
        """Whatever waits on the disk, oldest first, kept there."""
        for raw in self.spool.batches() if self.spool is not None else ():
            with suppress(msgspec.DecodeError):  # said when it is to be sent
                yield from self._decode.decode(raw)

    def done(self) -> None:
        """Forget the batch that :meth:`head` gave."""
        if self.spool:
            self.spool.advance()
        elif self._memory:
            self._room += len(self._memory.popleft())

    def settle(self, *, at_once: bool = False) -> None:
        """Bring what waits in memory to the disk, and make the disk keep it, where that is due or wanted at once."""
        if self.spool is None:
            return
        try:
            if self._memory and (at_once or self._clock() >= self._disk_retry_at):
                self._empty_memory()
            self.spool.sync()
        except (SpoolFullError, OSError) as error:
            self._disk_failed(error)

    def _oldest(self) -> bytes | None:
        raw = self.spool.peek() if self.spool is not None else None
        if raw is None and self._memory:
            return self._memory[0]
        return raw

    def _store(self, raw: bytes) -> bool:
        if self.spool is None:
            return False
        # Only an empty memory lets a batch go straight to the disk: what is in memory came before it.
        if not self._memory or self._clock() >= self._disk_retry_at:
            try:
                self._empty_memory()
                self.spool.append(raw)
            except (SpoolFullError, OSError) as error:
                self._disk_failed(error)
            else:
                self._failed = False
                return True
        if len(raw) > self._room:
            return False
        self._room -= len(raw)
        self._memory.append(raw)
        return True

    def _empty_memory(self) -> None:
        assert self.spool is not None  # noqa: S101 - asked before
        while self._memory:
            self.spool.append(self._memory[0])
            self._room += len(self._memory.popleft())

    def _disk_failed(self, error: Exception) -> None:
        self._disk_retry_at = self._clock() + DISK_RETRY_S
        self.counts["disk_failures"] += 1
        if not self._failed:
            self._failed = True
            log.error(
                "spool_refused",
                error=str(error),
                remedy="free the disk or raise spool.max_bytes; records wait in memory, then are lost",
            )


class Spools:
    """The outlets of a line, in the order in which Redis gets them: rejects, records, pictures.

    Args:
        settings: ``[spool]``.

    Raises:
        OSError: if the folder cannot be used, or another line uses it.
    """

    def __init__(self, settings: SpoolSettings) -> None:
        folder = settings.path
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            msg = f"{folder}: another line uses this spool; one line, one folder: change spool.path"
            raise OSError(msg) from error

        def made(name: str, most: int, *, drop_oldest: bool = False) -> Spool:
            return Spool(
                folder,
                name,
                max_bytes=most,
                fsync=settings.fsync,
                interval_s=settings.fsync_interval_s,
                drop_oldest=drop_oldest,
            )

        half = settings.max_bytes // 2
        self.rejects = Outlet(made("rejects", half), settings.memory_bytes // 2)
        self.records = Outlet(made("records", half), settings.memory_bytes // 2)
        pictures = made("pictures", settings.picture_bytes, drop_oldest=True) if settings.picture_bytes else None
        self.pictures = Outlet(pictures, 0)

    @property
    def size(self) -> int:
        """Bytes on disk of records and rejects."""
        return sum(outlet.spool.size for outlet in (self.rejects, self.records) if outlet.spool is not None)

    @property
    def all(self) -> tuple[Outlet, Outlet, Outlet]:
        """The outlets, the most urgent first."""
        return self.rejects, self.records, self.pictures

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return any(self.all)

    def counts(self) -> Counter[str]:
        """What went wrong on the disk, by name."""
        total: Counter[str] = Counter()
        for outlet in self.all:
            total["spool_unreadable"] += outlet.counts["unreadable"]
            total["spool_disk_failures"] += outlet.counts["disk_failures"]
            total["spool_damaged"] += outlet.spool.damaged if outlet.spool is not None else 0
        return total

    def close(self) -> None:
        """Close the files; what is stored stays."""
        for outlet in self.all:
            if outlet.spool is not None:
                outlet.spool.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
