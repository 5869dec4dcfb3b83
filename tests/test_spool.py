"""The spool: what Redis could not take survives anything, in order, and never grows beyond its bound."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipeline import spool as module
from pipeline.spool import HEAD, Spool, SpoolFullError

MANY = 1 << 20
BATCHES = [b"first", b"", b"third" * 20]
Opener = Callable[..., Spool]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """Opens spools in this test's folder and closes them at its end."""
    spools: list[Spool] = []

    def open_spool(max_bytes: int = MANY, **options: Any) -> Spool:
        spools.append(Spool(tmp_path, max_bytes=max_bytes, **options))
        return spools[-1]

    yield open_spool
    for spool in spools:
        spool.close()


def files(spool: Spool) -> list[Path]:
    """Its files, oldest first."""
    return sorted(spool._folder.glob(f"{spool._name}-*.spool"))


def filled(opened: Opener, batches: list[bytes] = BATCHES) -> Path:
    """The one file of a closed spool with these batches."""
    spool = opened()
    for batch in batches:
        spool.append(batch)
    spool.close()
    (path,) = files(spool)
    return path


def drained(spool: Spool) -> list[bytes]:
    """Everything in it, taken out."""
    found = []
    while (batch := spool.peek()) is not None:
        found.append(batch)
        spool.advance()
    return found


@pytest.mark.parametrize("fsync", ["never", "interval", "always"])
def test_batches_come_back_in_order(opened: Opener, fsync: str) -> None:
    """What was appended is read oldest first, as often as asked, empty batches included; then it is gone for good."""
    spool = opened(fsync=fsync)
    for batch in BATCHES:
        spool.append(batch)
    assert list(spool.batches()) == list(spool.batches()) == BATCHES
    assert spool.size == sum(HEAD.size + len(batch) for batch in BATCHES) == files(spool)[0].stat().st_size
    assert drained(spool) == BATCHES
    assert not spool
    assert spool.size == 0
    assert files(spool) == []


def test_a_spool_is_true_while_it_holds_anything(opened: Opener) -> None:
    """An empty spool lets records go straight to Redis; one with so much as an empty batch does not."""
    spool = opened()
    assert not spool
    spool.append(b"")
    assert spool
    spool.clear()
    assert not spool
    assert spool.size == 0


def test_what_is_stored_survives_a_restart(opened: Opener) -> None:
    """Closed and opened again, a spool holds the same and goes on behind it, in a new file."""
    first = opened()
    first.append(b"one")
    first.close()
    second = opened()
    second.append(b"two")
    assert list(second.batches()) == [b"one", b"two"]
    assert len(files(second)) == 2


def test_what_was_delivered_is_deleted_file_by_file(opened: Opener) -> None:
    """A spool that is drained and filled at once does not grow: its size is that of what waits, and a file's rest."""
    spool = opened(max_bytes=8 * 200)
    for number in range(200):
        spool.append(bytes([number]) * 100)
        spool.append(bytes([number]) * 100)
        assert spool.peek() == bytes([number]) * 100
        spool.advance()
        assert spool.peek() == bytes([number]) * 100
        spool.advance()
        assert spool.size <= 500
        assert spool.size == sum(path.stat().st_size for path in files(spool))


def test_closing_twice_is_harmless(opened: Opener, tmp_path: Path) -> None:
    """A stop after a failed start closes what may be closed already, and no other file by mistake."""
    spool = opened()
    spool.append(b"x")
    handle = spool._segments[0].file
    spool.close()
    with (tmp_path / "other").open("wb") as other:
        assert other.fileno() == handle, "the system gives a closed number to the next file"
        spool.close()
        assert other.write(b"still open")


def test_a_torn_tail_is_skipped_wherever_the_write_stopped(opened: Opener) -> None:
    """Cut at any byte, the whole batches before the cut are there, and new ones behind them."""
    path = filled(opened)
    ends, whole = [0], path.read_bytes()
    for batch in BATCHES:
        ends.append(ends[-1] + HEAD.size + len(batch))
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends) - 1
        after = opened()
        after.append(b"new")
        assert list(after.batches()) == [*BATCHES[:kept], b"new"]
        assert drained(after) == [*BATCHES[:kept], b"new"]
        assert after.damaged == (0 if cut in ends else 1)
        after.close()


def test_a_damaged_batch_costs_no_other(opened: Opener) -> None:
    """Any wrong byte costs the batch it is in: those before and behind it are delivered, and it is counted."""
    batches = [b"first", b"second", b"third" * 20]
    path = filled(opened, batches)
    whole = path.read_bytes()
    begins = [0, HEAD.size + 5, 2 * HEAD.size + 11, len(whole)]
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x41
        path.write_bytes(damaged)
        hit = max(number for number in range(3) if begins[number] <= at)
        expected = [batch for number, batch in enumerate(batches) if number != hit]
        after = opened()
        assert list(after.batches()) == expected
        assert drained(after) == expected
        assert after.damaged == 1
        after.close()


def test_a_hole_of_any_size_is_passed(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is searched to its end in windows, and a batch that begins across two of them is found."""
    monkeypatch.setattr(module, "WINDOW_BYTES", 16)
    for hole in range(1, 60):
        path = filled(opened, [b"x" * hole, b"behind", b"last"])
        whole = bytearray(path.read_bytes())
        whole[: HEAD.size] = bytes(HEAD.size)
        path.write_bytes(whole)
        after = opened()
        assert drained(after) == [b"behind", b"last"]


def test_no_batch_can_be_planted_in_another(opened: Opener) -> None:
    """A batch that contains what looks like a batch, as a camera's image may, is one batch, even behind damage."""
    salt = b"salt"
    forged = HEAD.pack(salt, 6, module._checksum(salt, b"forged")) + b"forged"
    path = filled(opened, [forged, b"behind"])
    whole = bytearray(path.read_bytes())
    whole[4] ^= 1
    path.write_bytes(whole)
    assert drained(opened()) == [b"behind"]


def test_a_file_that_cannot_be_read_is_passed(opened: Opener) -> None:
    """A file that is gone, or that the disk does not give, costs itself alone."""
    path = filled(opened)
    after = opened()
    after.append(b"behind")
    path.unlink()
    assert drained(after) == [b"behind"]
    assert after.damaged == 1


def test_a_full_spool_says_so_and_keeps_what_it_has(opened: Opener) -> None:
    """The bound counts heads too, is reached exactly, and a batch that does not fit changes nothing."""
    spool = opened(max_bytes=2 * (HEAD.size + 10))
    spool.append(b"0123456789")
    with pytest.raises(SpoolFullError, match="takes 22 of at most 44 bytes"):
        spool.append(b"0123456789+")
    spool.append(b"9876543210")
    with pytest.raises(SpoolFullError):
        spool.append(b"")
    assert drained(spool) == [b"0123456789", b"9876543210"]


def test_where_the_oldest_may_go_the_newest_stay(opened: Opener) -> None:
    """A spool of pictures gives up its oldest files, never more than it must, and never what could not fit at all."""
    spool = opened(max_bytes=4 * (HEAD.size + 10), drop_oldest=True)
    for number in range(20):
        spool.append(b"%010d" % number)
        assert spool.size <= 4 * (HEAD.size + 10)
    assert list(spool.batches()) == [b"%010d" % number for number in range(16, 20)]
    assert spool.dropped == 16
    with pytest.raises(SpoolFullError):
        spool.append(bytes(1000))
    assert len(list(spool.batches())) == 4


def test_a_batch_that_could_not_be_read_back_is_not_stored(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch beyond the largest that is read is refused."""
    monkeypatch.setattr(module, "MAX_BATCH_BYTES", 100)
    spool = opened()
    with pytest.raises(SpoolFullError):
        spool.append(bytes(101))
    spool.append(bytes(100))
    spool.append(b"behind")
    assert list(spool.batches()) == [bytes(100), b"behind"]


def test_a_disk_that_takes_no_more_leaves_no_half_batch(opened: Opener) -> None:
    """A write that fails half way is undone: the batches before it are whole, and later ones can be added."""
    spool = opened()
    spool.append(b"whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (spool.size + 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            spool.append(bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert spool.size == files(spool)[0].stat().st_size == HEAD.size + 5
    spool.append(b"more")
    assert list(spool.batches()) == [b"whole", b"more"]


def test_half_a_batch_that_cannot_be_undone_is_not_built_on(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even the half batch can be taken away, the next one goes into a new file."""
    spool = opened()
    spool.append(b"whole")
    write = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) > 500:
            return write(file, data[:500])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        patch.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="No space"):
            spool.append(bytes(600))
    spool.append(b"more")
    assert spool.size == sum(path.stat().st_size for path in files(spool))
    assert drained(spool) == [b"whole", b"more"]
    assert spool.damaged == 1


@pytest.mark.parametrize(("fsync", "expected"), [("never", 0), ("interval", 2), ("always", 20)])
def test_the_disk_is_asked_to_keep_it_as_configured(
    opened: Opener, monkeypatch: pytest.MonkeyPatch, fsync: str, expected: int
) -> None:
    """Never; about once an interval, and not where nothing was written; or with every batch."""
    calls, now = [], [100.0]
    monkeypatch.setattr(os, "fdatasync", calls.append)
    spool = opened(fsync=fsync, interval_s=1.0, clock=lambda: now[0])
    for _ in range(20):
        now[0] += 0.09
        spool.append(b"batch")
        spool.sync()
    assert len(calls) == expected
    for _ in range(20):
        now[0] += 0.9
        spool.sync()
    assert len(calls) == expected + (1 if fsync == "interval" else 0)


def test_a_disk_that_fails_to_keep_a_batch_does_not_have_it(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync nobody knows what the disk has, so the batch counts as not stored."""
    spool = opened(fsync="always")
    spool.append(b"one")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):
            spool.append(b"two")
    assert list(spool.batches()) == [b"one"]


def test_the_folder_is_made_and_the_files_are_not_for_everyone(tmp_path: Path) -> None:
    """A first start needs no preparation, and records are not readable by others."""
    spool = Spool(tmp_path / "a" / "b", max_bytes=MANY)
    spool.append(b"x")
    spool.close()
    assert files(spool)[0].stat().st_mode & 0o007 == 0


class SpoolMachine(RuleBasedStateMachine):
    """A spool against a list, through crashes at any byte and damage anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.model: list[bytes] = []
        self.number = 0
        self.open()

    def open(self) -> None:
        """Open it as the next run does."""
        self.spool = Spool(Path(self.folder.name), max_bytes=4000, fsync="never")

    @rule(size=st.integers(0, 300))
    def append(self, size: int) -> None:
        """A batch goes in, or the spool is full and as it was."""
        self.number += 1
        batch = b"%d " % self.number + bytes(size)
        room = self.spool.size + HEAD.size + len(batch) <= 4000
        try:
            self.spool.append(batch)
        except SpoolFullError:
            assert not room
        else:
            assert room
            self.model.append(batch)

    @precondition(lambda self: self.model)
    @rule()
    def deliver(self) -> None:
        """The oldest comes out."""
        assert self.spool.peek() == self.model[0]
        self.spool.advance()
        del self.model[0]

    @rule()
    def reopen(self) -> None:
        """A new run finds what waits; of the first file it may find what was delivered already, as nobody noted it."""
        self.spool.close()
        self.open()
        found = list(self.spool.batches())
        at = len(found) - len(self.model)
        assert at >= 0
        assert found[at:] == self.model
        for _ in range(at):
            self.spool.peek()
            self.spool.advance()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def crash_while_writing(self, data: st.DataObject) -> None:
        """The line dies within the last batch's write, at any byte."""
        last, begin = self._places()[-1]
        cut = data.draw(st.integers(begin, begin + HEAD.size + len(self.model[-1]) - 1), label="cut")
        path = last.path
        self.spool.close()
        os.truncate(path, cut)
        del self.model[-1]
        self.open()
        for _ in range(len(list(self.spool.batches())) - len(self.model)):
            self.spool.peek()
            self.spool.advance()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """A byte of a batch that waits is wrong: that batch is lost, and no other."""
        hit = data.draw(st.integers(0, len(self.model) - 1), label="batch")
        places = self._places()
        segment, begin = places[hit]
        at = begin + data.draw(st.integers(0, HEAD.size + len(self.model[hit]) - 1), label="byte")
        with segment.path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 0x5A]))
        del self.model[hit]

    @rule()
    def clear(self) -> None:
        """Everything is given up."""
        self.spool.clear()
        self.model.clear()

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        """In order; and its size is that of its files."""
        assert list(self.spool.batches()) == self.model
        assert self.spool.size == sum(segment.path.stat().st_size for segment in self.spool._segments) <= 4000

    def _places(self) -> list[tuple[Any, int]]:
        """Where each batch of the model lies."""
        places, offset = [], self.spool._offset
        for segment in self.spool._segments:
            while offset < segment.size:
                batch = segment.read(offset)
                if batch is None:
                    offset = segment.next_whole(offset + 1)
                    continue
                places.append((segment, offset))
                offset += HEAD.size + len(batch)
            offset = 0
        return places

    def teardown(self) -> None:
        """What is left comes out in order."""
        try:
            assert drained(self.spool) == self.model
            assert not self.spool
        finally:
            self.spool.close()
            self.folder.cleanup()


SpoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=15)
TestSpoolMachine = SpoolMachine.TestCase
