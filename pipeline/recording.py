"""A recording on disk: messages and verdicts of a line as they came, in files that only grow.

One folder: ``manifest.json``, and two files of entries, ``messages.rec`` and ``verdicts.rec``. A file begins with
:data:`MAGIC` and its salt, four random bytes; then entries as in the spool: salt, length (u32), CRC-32 of salt, length
and bytes (u32), all little endian, and the bytes, which are MessagePack. Whatever a kill or a bad disk does to a file,
the whole entries around it are read. As the salt is random, no frame can hold what looks like an entry.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from pipeline import wire
from pipeline.records import Fields
from pipeline.spool import HEAD
from pipeline.wire import Header

MAGIC: Final = b"dmddrec1"
START: Final = len(MAGIC) + 4
MANIFEST, MESSAGES, VERDICTS = "manifest.json", "messages.rec", "verdicts.rec"
MAX_ENTRY_BYTES: Final = 1 << 30
WINDOW_BYTES: Final = 1 << 20
"""So much of a damaged file is searched at a time."""
VERDICT_BYTES: Final = 1024
"""Room that every message leaves for its part's verdict."""
T = TypeVar("T")


class RecordingError(ValueError):
    """A recording that cannot be made or read; the message says what to do."""


class RecordingFullError(RuntimeError):
    """The recording has reached its size limit; the entry was not stored."""


class Message(msgspec.Struct, array_like=True, frozen=True):
    """One ZeroMQ message.

    Attributes:
        mono_ns, wall_ns: When it came, on the recorder's monotonic and wall clock, nanoseconds.
        parts: Its parts, bit for bit.
    """

    mono_ns: int
    wall_ns: int
    parts: list[bytes]

    def named(self) -> tuple[str, Header | None]:
        """The camera and the header; an empty name and None where the line would refuse the message."""
        try:
            return wire.decode_camera(self.parts[0]), wire.decode_header(self.parts[1])
        except (wire.WireError, IndexError):
            return "", None


class Seen(msgspec.Struct, array_like=True, frozen=True):
    """One record of a camera's verdict stream.

    Attributes:
        mono_ns, wall_ns: When it was read, nanoseconds.
        id: Its id in the stream.
        fields: The record.
    """

    mono_ns: int
    wall_ns: int
    id: str
    fields: Fields


class Manifest(msgspec.Struct):
    """What a recording is.

    Attributes:
        line: Name of the line.
        cameras: Cameras whose verdicts were followed.
        renumbered: Of these, cameras whose records are numbered otherwise than their frames: a counter that wraps, or
            parts that are matched by part id. Their verdicts cannot be compared by number.
        sockets: Addresses of the line's sockets that were listened to.
        started_ns, ended_ns: Wall clock, nanoseconds; 0: it was killed, or goes on.
        ending: Why it ended, in words; empty as above.
        messages, verdicts: How many were stored.
        skipped: Messages that were not stored, because the disk was too slow or they are too large.
        version: Of this format.
    """

    line: str
    cameras: list[str]
    renumbered: list[str]
    sockets: list[str]
    started_ns: int
    ended_ns: int = 0
    ending: str = ""
    messages: int = 0
    verdicts: int = 0
    skipped: int = 0
    version: int = 1


class EntryWriter:
    """Appends entries to a new file.

    Args:
        path: The file; it must not exist.

    Attributes:
        size: Its bytes.

    Raises:
        OSError: if it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self._salt = secrets.token_bytes(4)
        self.size = 0
        self._write(MAGIC + self._salt)

    def append(self, entry: bytes) -> None:
        """Store an entry.

        Raises:
            OSError: if the disk does not take it; nothing of it is then left.
        """
        self._write(HEAD.pack(self._salt, len(entry), _checksum(self._salt, entry)), entry)

    def close(self) -> None:
        """Make the disk keep what is written, and close the file."""
        try:
            os.fdatasync(self._file)
        finally:
            os.close(self._file)

    def _write(self, *pieces: bytes) -> None:
        try:
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    view = view[os.write(self._file, view) :]
        except OSError:
            os.ftruncate(self._file, self.size)
            raise
        self.size += sum(map(len, pieces))


class EntryReader:
    """Reads the whole entries of a file.

    Args:
        path: The file.

    Attributes:
        lost_bytes: Bytes that were passed because they are no whole entry: damage, or a last entry torn by a kill.

    Raises:
        RecordingError: if it is no such file.
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lost_bytes = 0
        with path.open("rb") as file:
            start = file.read(START)
        if len(start) < START or not start.startswith(MAGIC):
            msg = f"{path}: not a file of a recording of this version; was it cut short while it was copied?"
            raise RecordingError(msg)
        self._salt = start[len(MAGIC) :]

    def __iter__(self) -> Iterator[bytes]:
        self.lost_bytes = 0
        file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            offset, size = START, os.fstat(file).st_size
            while offset < size:
                entry = self._entry(file, offset)
                if entry is None:
                    after = self._next_whole(file, offset + 1, size)
                    self.lost_bytes += after - offset
                    offset = after
                else:
                    yield entry
                    offset += HEAD.size + len(entry)
        finally:
            os.close(file)

    def _entry(self, file: int, offset: int) -> bytes | None:
        head = _bytes(file, offset, HEAD.size)
        if len(head) < HEAD.size:
            return None
        salt, length, checksum = HEAD.unpack(head)
        if salt != self._salt or length > MAX_ENTRY_BYTES:
            return None
        entry = _bytes(file, offset + HEAD.size, length)
        return entry if len(entry) == length and _checksum(salt, entry) == checksum else None

    def _next_whole(self, file: int, offset: int, size: int) -> int:
        """Where the first whole entry from ``offset`` on begins; the file's end if there is none."""
        while offset < size:
            at = _bytes(file, offset, WINDOW_BYTES).find(self._salt)
            if at < 0:
                offset += WINDOW_BYTES - len(self._salt) + 1
            elif self._entry(file, offset + at) is not None:
                return offset + at
            else:
                offset += at + 1
        return size


class RecordingWriter:
    """Writes a recording. Its methods may be called from several threads.

    Args:
        folder: Where to; made if missing, and empty of recordings.
        manifest: What is known at the start.
        max_bytes: Largest size of its files of entries together.

    Raises:
        RecordingError: if the folder holds a recording.
        OSError: if it cannot be made.
    """

    def __init__(self, folder: Path, manifest: Manifest, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if any((folder / name).exists() for name in (MANIFEST, MESSAGES, VERDICTS)):
            msg = f"{folder}: holds a recording; give another folder, or delete that one"
            raise RecordingError(msg)
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._hold = _locked(folder, fcntl.LOCK_EX)
        self._messages, self._verdicts = EntryWriter(folder / MESSAGES), EntryWriter(folder / VERDICTS)
        self._encode = msgspec.msgpack.Encoder()
        self.manifest = manifest
        self._describe()

    def message(self, message: Message) -> None:
        """Store a message.

        Raises:
            RecordingFullError: if it does not fit.
            OSError: if the disk does not take it.
        """
        with self._lock:
            reserved = VERDICT_BYTES * (self.manifest.messages + 1)
            self._append(self._messages, self._encode.encode(message), reserved)
            self.manifest.messages += 1

    def verdict(self, seen: Seen) -> None:
        """Store a verdict.

        Raises:
            RecordingFullError: if it does not fit.
            OSError: if the disk does not take it.
        """
        with self._lock:
            self._append(self._verdicts, self._encode.encode(seen), 0)
            self.manifest.verdicts += 1

    def close(self, ended_ns: int, ending: str) -> None:
        """Close the files, and write down how it ended.

        Raises:
            OSError: if the disk does not keep it.
        """
        with self._lock:
            try:
                self._messages.close()
                self._verdicts.close()
                self.manifest.ended_ns, self.manifest.ending = ended_ns, ending
                self._describe()
            finally:
                os.close(self._hold)

    def _append(self, writer: EntryWriter, entry: bytes, reserved: int) -> None:
        # A message leaves room for the verdicts of all parts so far; these then take it.
        used = self._messages.size + max(self._verdicts.size, reserved)
        if used + HEAD.size + len(entry) > self._max_bytes or len(entry) > MAX_ENTRY_BYTES:
            msg = f"{self._folder}: {used} of at most {self._max_bytes} bytes"
            raise RecordingFullError(msg)
        writer.append(entry)

    def _describe(self) -> None:
        temporary = self._folder / f".{MANIFEST}"
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(self.manifest)) + b"\n")
        temporary.replace(self._folder / MANIFEST)


class Recording:
    """A recording to read. Nothing in its folder is changed.

    Args:
        folder: Where it lies.

    Attributes:
        manifest: What it is.

    Raises:
        RecordingError: if there is none, it is another version's, or it is still being made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
            self._messages, self._verdicts = EntryReader(folder / MESSAGES), EntryReader(folder / VERDICTS)
        except OSError as error:
            msg = f"{folder}: no recording: {error.strerror} ({error.filename}); `dmdd record` makes one"
            raise RecordingError(msg) from error
        except msgspec.DecodeError as error:
            msg = f"{folder / MANIFEST}: not readable: {error}"
            raise RecordingError(msg) from error
        if self.manifest.version != 1:
            msg = f"{folder}: a recording of version {self.manifest.version}; upgrade dmdd to read it"
            raise RecordingError(msg)
        self._hold = _locked(folder, fcntl.LOCK_SH)

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._hold)

    @property
    def lost_bytes(self) -> int:
        """Bytes that the last reading has passed, as they are no whole entry."""
        return self._messages.lost_bytes + self._verdicts.lost_bytes

    def messages(self) -> Iterator[Message]:
        """Its messages, in the order in which they came."""
        return _decoded(self._messages, Message)

    def verdicts(self) -> Iterator[Seen]:
        """Its verdicts, in the order in which they were read."""
        return _decoded(self._verdicts, Seen)


def _decoded(entries: EntryReader, kind: type[T]) -> Iterator[T]:
    decoder: Any = msgspec.msgpack.Decoder(kind)
    for entry in entries:
        try:
            yield decoder.decode(entry)
        except msgspec.DecodeError as error:  # whole, but not of this program
            msg = f"a {kind.__name__.lower()} of the recording is not readable: {error}; which version has made it?"
            raise RecordingError(msg) from error


def _locked(folder: Path, how: int) -> int:
    """Hold a folder: the writer for itself, any number of readers together."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        msg = f"{folder}: in use by another `dmdd record` or `dmdd replay`; wait until it ends"
        raise RecordingError(msg) from None
    return handle


def _checksum(salt: bytes, entry: bytes) -> int:
    return zlib.crc32(entry, zlib.crc32(salt + len(entry).to_bytes(4, "little")))


def _bytes(file: int, offset: int, length: int) -> bytes:
    """Bytes of a file; what the disk does not give is none."""
    try:
        return os.pread(file, length, offset)
    except OSError:
        return b""
