"""Outlets: in order, on disk first, in memory where the disk fails, and counted where neither has room."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from pipeline.config import Spool as Settings
from pipeline.entries import RECORD, Entry
from pipeline.outlet import MAX_ENTRIES, Outlet, Spools
from pipeline.spool import Spool


def entries(first: int, count: int) -> list[Entry]:
    """Records with these numbers."""
    return [Entry(RECORD, "k", f"1-{number}", {"seq": str(number)}) for number in range(first, first + count)]


def drained(outlet: Outlet) -> list[int]:
    """The numbers of all that waits, taken out."""
    found = []
    while (batch := outlet.head()) is not None:
        assert len(batch) <= MAX_ENTRIES
        found += [int(entry.fields["seq"]) for entry in batch]
        outlet.done()
    assert not outlet
    return found


class Disk:
    """A clock, and an outlet whose disk can be full."""

    def __init__(self, folder: Path, memory: int = 1 << 20, most: int = 1 << 20) -> None:
        self.now = 100.0
        self.outlet = Outlet(Spool(folder, max_bytes=most, fsync="never"), memory, clock=lambda: self.now)

    def full(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on, no byte more."""

        def write(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", write)


def test_large_batches_are_stored_in_bounded_ones(tmp_path: Path) -> None:
    """Whatever is put in comes out in order, in chunks that Redis takes in time."""
    disk = Disk(tmp_path)
    assert disk.outlet.put(entries(0, 1000)) == 0
    assert len(list(disk.outlet.entries())) == 1000
    assert drained(disk.outlet) == list(range(1000))


def test_memory_takes_over_from_a_full_disk_and_gives_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order is kept across disk, memory and disk again; the disk is not tried more than once a second."""
    disk = Disk(tmp_path)
    disk.outlet.put(entries(0, 5))
    with monkeypatch.context() as patch:
        disk.full(patch)
        for first in range(5, 50, 5):
            assert disk.outlet.put(entries(first, 5)) == 0
        assert disk.outlet.counts["disk_failures"] == 1
        assert disk.outlet.in_memory() == 45
        disk.now += 1.1
        disk.outlet.settle()
        assert disk.outlet.counts["disk_failures"] == 2
    assert disk.outlet.put(entries(50, 5)) == 0
    assert disk.outlet.in_memory() == 50, "behind what waits in memory, as long as the disk is not tried again"
    disk.now += 1.1
    disk.outlet.settle()
    assert disk.outlet.in_memory() == 0
    assert drained(disk.outlet) == list(range(55))


def test_what_waits_in_memory_can_be_sent_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis may be back before the disk is."""
    disk = Disk(tmp_path)
    disk.full(monkeypatch)
    disk.outlet.put(entries(0, 5))
    disk.outlet.put(entries(5, 5))
    assert drained(disk.outlet) == list(range(10))


def test_what_fits_nowhere_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are kept; and the room comes back when they are gone."""
    disk = Disk(tmp_path, memory=200)
    disk.full(monkeypatch)
    lost = sum(disk.outlet.put(entries(number, 1)) for number in range(100))
    kept = drained(disk.outlet)
    assert kept == list(range(100 - lost))
    assert 0 < lost < 100
    assert disk.outlet.put(entries(0, 1)) == 0


def test_a_batch_of_another_program_is_passed(tmp_path: Path) -> None:
    """It is whole, and yet nobody can read it: said, counted and passed."""
    disk = Disk(tmp_path)
    disk.outlet.put(entries(0, 2))
    assert disk.outlet.spool is not None
    disk.outlet.spool.append(msgspec.msgpack.encode({"not": "entries"}))
    disk.outlet.put(entries(2, 2))
    assert [int(entry.fields["seq"]) for entry in disk.outlet.entries()] == [0, 1, 2, 3]
    assert drained(disk.outlet) == [0, 1, 2, 3]
    assert disk.outlet.counts["unreadable"] == 1


def test_without_a_spool_nothing_waits() -> None:
    """Pictures that may not wait are lost, and counted, at once."""
    outlet = Outlet(None, 0)
    assert outlet.put(entries(0, 3)) == 3
    assert not outlet
    outlet.settle()


def test_one_folder_one_line(tmp_path: Path) -> None:
    """A second line with the same folder does not start; after the first has ended it may."""
    first = Spools(Settings(path=tmp_path))
    with pytest.raises(OSError, match="another line uses this spool"):
        Spools(Settings(path=tmp_path))
    first.close()
    first.close()
    second = Spools(Settings(path=tmp_path))
    second.records.put(entries(0, 1))
    assert second.size > 0
    assert second
    second.close()
