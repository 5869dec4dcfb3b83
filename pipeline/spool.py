"""The spool: batches that Redis could not take, on disk, in order, until it can.

A row of append-only files, oldest first: ``NAME-NUMBER-SALT.spool``. A batch is stored as the file's salt (four
random bytes), length (u32), CRC-32 of salt, length and bytes (u32), all little endian, and the bytes. Whatever a
crash or a bad disk does to a file, the batches around it are found: reading goes on at the next place where the salt
stands before a batch with the right checksum. As the salt is random, nobody can plant such a place in a frame.

A file that has been read to its end is deleted. So a spool that is drained and filled at once does not grow.
"""

from __future__ import annotations

import os
import re
import secrets
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import structlog

log = structlog.get_logger(__name__)

HEAD: Final = struct.Struct("<4sII")
MAX_BATCH_BYTES: Final = 1 << 26
SEGMENT_BYTES: Final = 16 << 20
WINDOW_BYTES: Final = 1 << 20
"""So much of a damaged file is searched at a time."""
Fsync = Literal["never", "interval", "always"]


class SpoolFullError(RuntimeError):
    """The spool has reached its size limit; the batch was not stored."""


class _Segment:
    """One file of the spool."""

    def __init__(self, path: Path, salt: bytes, size: int, flags: int = os.O_RDONLY) -> None:
        self.path, self.salt, self.size = path, salt, size
        self._flags, self._file = flags, -1

    @property
    def file(self) -> int:
        """Its descriptor, opened when it is first needed."""
        if self._file < 0:
            self._file = os.open(self.path, self._flags | os.O_CLOEXEC, 0o640)
        return self._file

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def read(self, offset: int) -> bytes | None:
        """The batch that begins at ``offset``, None if none does."""
        head = self._bytes(offset, HEAD.size)
        if len(head) < HEAD.size:
            return None
        salt, length, checksum = HEAD.unpack(head)
        if salt != self.salt or length > MAX_BATCH_BYTES:
            return None
        batch = self._bytes(offset + HEAD.size, length)
        return batch if len(batch) == length and _checksum(salt, batch) == checksum else None

    def next_whole(self, offset: int) -> int:
        """Where the first whole batch behind ``offset`` begins; the file's end if there is none."""
        while offset < self.size:
            window = self._bytes(offset, WINDOW_BYTES)
            at = window.find(self.salt)
            if at < 0:
                offset += WINDOW_BYTES - len(self.salt) + 1
            elif self.read(offset + at) is not None:
                return offset + at
            else:
                offset += at + 1
        return self.size

    def _bytes(self, offset: int, length: int) -> bytes:
        """Bytes of the file; what the disk does not give is none."""
        try:
            return os.pread(self.file, length, offset)
        except OSError:
            return b""


class Spool:
    """Batches on disk. One thread owns it.

    Args:
        folder: Where its files lie; made if missing.
        name: First part of the files' names.
        max_bytes: Largest size of all files together.
        fsync: When the disk is made to keep what is written: ``always`` before :meth:`append` returns, ``interval``
            about every ``interval_s``, ``never`` when the system likes. A killed process loses nothing either way.
        interval_s: Seconds.
        drop_oldest: At the limit, give up the oldest file instead of the new batch.
        clock: Monotonic seconds.

    Attributes:
        size: Bytes on disk.
        damaged: Places at which batches could not be read and were skipped.
        dropped: Files that were given up at the limit.
    """

    def __init__(
        self,
        folder: Path,
        name: str = "records",
        *,
        max_bytes: int,
        fsync: Fsync = "interval",
        interval_s: float = 1.0,
        drop_oldest: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._name, self._max_bytes = folder, name, max_bytes
        self._fsync, self._interval, self._drop_oldest, self._clock = fsync, interval_s, drop_oldest, clock
        self._segment_bytes = min(SEGMENT_BYTES, max_bytes // 8)
        self._number = 0
        self._segments = deque(self._found())
        self._writing: _Segment | None = None
        self._offset = self._end = 0
        self._unsynced, self._sync_at = False, 0.0
        self.size = sum(segment.size for segment in self._segments)
        self.damaged = self.dropped = 0

    def __bool__(self) -> bool:
        """Whether anything is stored."""
        return bool(self._segments)

    def append(self, batch: bytes) -> None:
        """Store a batch behind the others.

        Raises:
            SpoolFullError: if it does not fit.
            OSError: if the disk does not take it; nothing of it is then left.
        """
        if len(batch) > MAX_BATCH_BYTES:  # it would not be read back
            msg = f"a batch of {len(batch)} bytes, the spool takes at most {MAX_BATCH_BYTES}"
            raise SpoolFullError(msg)
        self._make_room(HEAD.size + len(batch))
        segment = self._writable()
        record = HEAD.pack(segment.salt, len(batch), _checksum(segment.salt, batch)) + batch
        try:
            view = memoryview(record)
            while view:
                view = view[os.write(segment.file, view) :]
            if self._fsync == "always":
                os.fdatasync(segment.file)
        except OSError:
            self._undo(segment)
            raise
        segment.size += len(record)
        self.size += len(record)
        self._unsynced = self._fsync == "interval"

    def peek(self) -> bytes | None:
        """The oldest batch, None if there is none. What is damaged before it is skipped, logged and counted."""
        while self._segments:
            segment = self._segments[0]
            batch = segment.read(self._offset)
            if batch is not None:
                self._end = self._offset + HEAD.size + len(batch)
                return batch
            if self._offset < segment.size:
                found = segment.next_whole(self._offset + 1)
                self._report(segment, found)
                self._offset = found
            if self._offset >= segment.size:
                self._forget_first()
        return None

    def advance(self) -> None:
        """Forget the batch that :meth:`peek` gave: it has been delivered."""
        self._offset = self._end
        if self._segments and self._offset >= self._segments[0].size:
            self._forget_first()

    def batches(self) -> Iterator[bytes]:
        """Read all batches, oldest first, and keep them."""
        offset = self._offset
        for segment in tuple(self._segments):
            while offset < segment.size:
                batch = segment.read(offset)
                if batch is None:
                    offset = segment.next_whole(offset + 1)
                else:
                    yield batch
                    offset += HEAD.size + len(batch)
            offset = 0

    def sync(self) -> None:
        """Make the disk keep what is written, where that is due.

        Raises:
            OSError: if the disk fails.
        """
        if self._unsynced and self._writing is not None and self._clock() >= self._sync_at:
            self._unsynced = False
            self._sync_at = self._clock() + self._interval
            os.fdatasync(self._writing.file)

    def clear(self) -> None:
        """Forget everything."""
        while self._segments:
            self._forget_first()

    def close(self) -> None:
        """Close the files; what is stored stays."""
        if self._unsynced and self._writing is not None:
            with suppress(OSError):
                os.fdatasync(self._writing.file)
        self._unsynced, self._writing = False, None
        for segment in self._segments:
            segment.close()

    def _found(self) -> list[_Segment]:
        """What an earlier run has left. Nothing is appended to it: its last batch may be torn."""
        pattern = re.compile(rf"{re.escape(self._name)}-(\d+)-([0-9a-f]{{8}})\.spool")
        segments = []
        for path in self._folder.iterdir():
            match = pattern.fullmatch(path.name)
            if match is None:
                continue
            number, size = int(match[1]), path.stat().st_size
            self._number = max(self._number, number)
            if size:
                segments.append((number, _Segment(path, bytes.fromhex(match[2]), size)))
            else:
                path.unlink()
        return [segment for _, segment in sorted(segments, key=lambda each: each[0])]

    def _make_room(self, needed: int) -> None:
        fits = needed <= self._max_bytes
        while fits and self._drop_oldest and self._segments and self.size + needed > self._max_bytes:
            self.dropped += 1
            self._forget_first()
        if self.size + needed > self._max_bytes:
            msg = f"{self._folder}: {self._name} takes {self.size} of at most {self._max_bytes} bytes"
            raise SpoolFullError(msg)

    def _writable(self) -> _Segment:
        segment = self._writing
        if segment is not None and segment.size < self._segment_bytes:
            return segment
        if segment is not None and self._fsync != "never":
            os.fdatasync(segment.file)
        self._number += 1
        salt = secrets.token_bytes(4)
        path = self._folder / f"{self._name}-{self._number:08d}-{salt.hex()}.spool"
        made = _Segment(path, salt, 0, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        made.file  # noqa: B018 - opened now, so that a full disk is noticed before anything relies on it
        if self._fsync != "never":
            _sync_folder(self._folder)
        self._segments.append(made)
        self._writing = made
        return made

    def _undo(self, segment: _Segment) -> None:
        """Take half a batch away; where even that fails, write no more behind it."""
        try:
            os.ftruncate(segment.file, segment.size)
        except OSError:
            self.size -= segment.size
            segment.size = os.fstat(segment.file).st_size
            self.size += segment.size
            self._writing = None
        if segment.size == 0:
            self._discard(segment)

    def _discard(self, segment: _Segment) -> None:
        """Delete a file. Where the disk does not let it go, its records come back at the next start, and are known."""
        if segment is self._writing:
            self._writing, self._unsynced = None, False
        if segment in self._segments:
            self._segments.remove(segment)
        segment.close()
        with suppress(OSError):
            segment.path.unlink()

    def _forget_first(self) -> None:
        segment = self._segments[0]
        self._discard(segment)
        self.size -= segment.size
        self._offset = self._end = 0

    def _report(self, segment: _Segment, found: int) -> None:
        self.damaged += 1
        log.error(
            "spool_damaged",
            file=segment.path.name,
            offset=self._offset,
            bytes=found - self._offset,
            torn=found == segment.size,
            remedy="torn at the end of a file by a kill: nothing; else look at the disk and the memory",
        )


def _checksum(salt: bytes, batch: bytes) -> int:
    return zlib.crc32(batch, zlib.crc32(salt + len(batch).to_bytes(4, "little")))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
