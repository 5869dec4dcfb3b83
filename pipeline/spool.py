"""The spool: batches that Redis could not take, on disk, in order, until it can.

One append-only file. A batch is stored as length (u32), CRC-32 (u32) and bytes, little endian. A torn
last write, as a kill or a power cut leaves it, is cut off when the spool is opened.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

HEAD: Final = struct.Struct("<II")
MAX_BATCH_BYTES: Final = 1 << 28


class SpoolFullError(RuntimeError):
    """The spool has reached its size limit; the batch was not stored."""


class Spool:
    """Batches on disk. One thread owns it.

    Args:
        folder: Where the file lies; made if missing.
        max_bytes: Largest size.
        fsync: Whether :meth:`append` waits until the disk has it.
    """

    def __init__(self, folder: Path, *, max_bytes: int, fsync: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "verdicts.spool"
        self._max_bytes, self._fsync = max_bytes, fsync
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self.size = self._cut_torn_tail()

    def __bool__(self) -> bool:
        """Whether anything is stored."""
        return self.size > 0

    def append(self, batch: bytes) -> None:
        """Store a batch behind the others.

        Raises:
            SpoolFullError: if it does not fit.
            OSError: if the disk does not take it; nothing of it is then left.
        """
        record = HEAD.pack(len(batch), zlib.crc32(batch)) + batch
        if self.size + len(record) > self._max_bytes:
            msg = f"{self.path} holds {self.size} of at most {self._max_bytes} bytes"
            raise SpoolFullError(msg)
        if len(batch) > MAX_BATCH_BYTES:  # it could not be read back, and would end the reading for all behind it
            msg = f"a batch of {len(batch)} bytes, the spool takes at most {MAX_BATCH_BYTES}"
            raise SpoolFullError(msg)
        try:
            view = memoryview(record)
            while view:
                view = view[os.write(self._file, view) :]
            if self._fsync:
                os.fdatasync(self._file)
        except OSError:
            os.ftruncate(self._file, self.size)
            raise
        self.size += len(record)

    def batches(self) -> Iterator[bytes]:
        """Read all batches, oldest first."""
        offset = 0
        while (found := self._read(offset)) is not None:
            yield found
            offset += HEAD.size + len(found)

    def clear(self) -> None:
        """Forget everything: it has all been delivered."""
        os.ftruncate(self._file, 0)
        self.size = 0

    def close(self) -> None:
        """Close the file; what is stored stays."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _read(self, offset: int) -> bytes | None:
        head = os.pread(self._file, HEAD.size, offset)
        if len(head) < HEAD.size:
            return None
        length, checksum = HEAD.unpack(head)
        if length > MAX_BATCH_BYTES:
            return None
        batch = os.pread(self._file, length, offset + HEAD.size)
        return batch if len(batch) == length and zlib.crc32(batch) == checksum else None

    def _cut_torn_tail(self) -> int:
        good = sum(HEAD.size + len(batch) for batch in self.batches())
        if os.fstat(self._file).st_size > good:
            os.ftruncate(self._file, good)
        return good
