"""What a recording keeps, and what damage does to it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.recording import (
    MANIFEST,
    MAX_ENTRY_BYTES,
    MESSAGES,
    VERDICT_BYTES,
    EntryReader,
    EntryWriter,
    Message,
    Recording,
    RecordingError,
    RecordingFullError,
    RecordingWriter,
)
from pipeline.spool import HEAD
from tests.support.recordings import manifest, message, verdict, write


def entries(path: Path, *contents: bytes) -> list[int]:
    """Write a file of entries; return where each begins."""
    writer, places = EntryWriter(path), []
    for one in contents:
        places.append(writer.size)
        writer.append(one)
    writer.close()
    return places


class TestEntries:
    @given(contents=st.lists(st.binary(max_size=200), max_size=8), cut=st.integers(0, 2000), hit=st.integers(0, 2000))
    def test_whatever_is_whole_is_read(
        self, tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], cut: int, hit: int
    ) -> None:
        """A file that is torn anywhere, and has a byte damaged, gives the entries that neither has touched."""
        path = tmp_path_factory.mktemp("entries") / "file"
        places = entries(path, *contents)
        raw = bytearray(path.read_bytes())
        cut = max(12, min(cut, len(raw)))
        del raw[cut:]
        if 12 <= hit < cut:
            raw[hit] ^= 0xFF
        path.write_bytes(raw)
        whole = [
            one
            for one, at in zip(contents, places, strict=True)
            if at + HEAD.size + len(one) <= cut and not (hit >= 12 and at <= hit < at + HEAD.size + len(one))
        ]
        reader = EntryReader(path)
        assert list(reader) == whole
        assert reader.lost_bytes == len(raw) - 12 - sum(HEAD.size + len(one) for one in whole)

    def test_damage_longer_than_a_window(self, tmp_path: Path) -> None:
        """Behind megabytes of damage the next entry is found."""
        _, second, _ = entries(tmp_path / "file", b"a", bytes(3 << 20), b"c")
        with (tmp_path / "file").open("r+b") as file:
            file.seek(second)
            file.write(b"\0" * 4)
        assert list(EntryReader(tmp_path / "file")) == [b"a", b"c"]

    def test_another_file_is_refused(self, tmp_path: Path) -> None:
        """What is no such file is said to be none, rather than read as empty."""
        (tmp_path / "file").write_bytes(b"something else")
        with pytest.raises(RecordingError, match="not a file of a recording"):
            EntryReader(tmp_path / "file")

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An entry that the disk took half of is taken away again, and the next one is whole."""
        writer, real, calls = EntryWriter(tmp_path / "file"), os.write, []

        def full(file: int, data: memoryview) -> int:
            calls.append(data)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return real(file, data[: max(1, len(data) // 2)]) if len(calls) == 1 else real(file, data)

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            writer.append(b"lost")
        writer.append(b"kept")
        writer.close()
        assert list(EntryReader(tmp_path / "file")) == [b"kept"]


class TestRecording:
    def test_back_bit_for_bit(self, tmp_path: Path) -> None:
        """Messages of any parts, and verdicts, come back as they were, with both clocks."""
        odd = Message(5, 6, [b"", b"\xff" * 300, b"x", b"y"])
        write(tmp_path / "r", [message(0), odd], [verdict(0)])
        with Recording(tmp_path / "r") as recording:
            assert list(recording.messages()) == [message(0), odd]
            assert list(recording.verdicts()) == [verdict(0)]
            assert (recording.manifest.messages, recording.manifest.ending, recording.lost_bytes) == (2, "enough", 0)

    def test_never_larger_than_allowed(self, tmp_path: Path) -> None:
        """It ends at its limit, with room left for the verdicts of what it holds."""
        writer, count = RecordingWriter(tmp_path / "r", manifest(), 1 << 16), 0
        with suppress(RecordingFullError):
            while count < 1000:
                writer.message(message(count, pixels=bytes(2000)))
                count += 1
        for seq in range(count):
            writer.verdict(verdict(seq, padding="x" * 500))
        writer.close(2, "full")
        assert 15 < count <= (1 << 16) // (2000 + VERDICT_BYTES)
        assert sum(file.stat().st_size for file in (tmp_path / "r").glob("*.rec")) <= 1 << 16

    def test_a_folder_holds_one(self, tmp_path: Path) -> None:
        """An earlier recording is never written over."""
        write(tmp_path / "r", [message(0)])
        with pytest.raises(RecordingError, match="holds a recording"):
            RecordingWriter(tmp_path / "r", manifest(), 1 << 20)

    def test_not_read_while_it_is_written(self, tmp_path: Path) -> None:
        """A recording that goes on is not taken for a whole one; several readers are fine."""
        writer = RecordingWriter(tmp_path / "r", manifest(), 1 << 20)
        with pytest.raises(RecordingError, match="in use"):
            Recording(tmp_path / "r")
        writer.close(2, "enough")
        with Recording(tmp_path / "r"), Recording(tmp_path / "r"):
            pass

    def test_what_is_none_is_said_to_be_none(self, tmp_path: Path) -> None:
        """The errors say what to do."""
        with pytest.raises(RecordingError, match="dmdd record"):
            Recording(tmp_path)
        write(tmp_path / "r", [message(0)])
        newer = msgspec.structs.replace(manifest(), version=2)
        (tmp_path / "r" / MANIFEST).write_bytes(msgspec.json.encode(newer))
        with pytest.raises(RecordingError, match="upgrade"):
            Recording(tmp_path / "r")

    def test_whole_entries_of_another_program(self, tmp_path: Path) -> None:
        """An entry that is whole and not ours is an error, not a traceback."""
        write(tmp_path / "r", [])
        (tmp_path / "r" / MESSAGES).unlink()
        entries(tmp_path / "r" / MESSAGES, b"\x01")
        with Recording(tmp_path / "r") as recording, pytest.raises(RecordingError, match="not readable"):
            list(recording.messages())

    def test_a_length_that_cannot_be(self, tmp_path: Path) -> None:
        """A damaged length makes no reader ask for gigabytes."""
        (place,) = entries(tmp_path / "file", b"abc")
        with (tmp_path / "file").open("r+b") as file:
            file.seek(place + 4)
            file.write((MAX_ENTRY_BYTES + 1).to_bytes(4, "little"))
        assert list(EntryReader(tmp_path / "file")) == []
