"""The spool: what Redis could not take survives anything, in order, and never grows beyond its bound."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import spool as module
from pipeline.spool import HEAD, Spool, SpoolFullError

MANY = 1 << 20
BATCHES = [b"first", b"", b"third" * 20]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Spool]]:
    """Opens spools in this test's folder and closes them at its end."""
    spools: list[Spool] = []

    def open_spool(max_bytes: int = MANY, **options: bool) -> Spool:
        spools.append(Spool(tmp_path, max_bytes=max_bytes, **options))
        return spools[-1]

    yield open_spool
    for spool in spools:
        spool.close()


@pytest.mark.parametrize("fsync", [False, True])
def test_batches_come_back_in_order(opened: Callable[..., Spool], fsync: bool) -> None:
    """What was appended is read oldest first, as often as asked, empty batches included."""
    spool = opened(fsync=fsync)
    for batch in BATCHES:
        spool.append(batch)
    assert list(spool.batches()) == BATCHES
    assert list(spool.batches()) == BATCHES
    assert spool.size == spool.path.stat().st_size == sum(HEAD.size + len(batch) for batch in BATCHES)


def test_a_spool_is_true_while_it_holds_anything(opened: Callable[..., Spool]) -> None:
    """An empty spool lets records go straight to Redis; one with so much as an empty batch does not."""
    spool = opened()
    assert not spool
    spool.append(b"")
    assert spool
    spool.clear()
    assert not spool


def test_what_is_stored_survives_a_restart(opened: Callable[..., Spool]) -> None:
    """Closed and opened again, a spool holds the same and goes on behind it."""
    first = opened()
    first.append(b"one")
    first.close()
    second = opened()
    second.append(b"two")
    assert list(second.batches()) == [b"one", b"two"]


def test_closing_twice_is_harmless(opened: Callable[..., Spool], tmp_path: Path) -> None:
    """A stop after a failed start closes what may be closed already, and no other file by mistake."""
    spool = opened()
    handle = spool._file
    spool.close()
    with (tmp_path / "other").open("wb") as other:
        assert other.fileno() == handle, "the system gives a closed number to the next file"
        spool.close()
        assert other.write(b"still open")


def test_a_cleared_spool_is_empty_for_good(opened: Callable[..., Spool]) -> None:
    """What was delivered does not come back, and the next batch is the first one."""
    spool = opened()
    for batch in BATCHES:
        spool.append(batch)
    spool.clear()
    assert list(spool.batches()) == []
    assert spool.path.stat().st_size == 0
    spool.append(b"next")
    spool.close()
    assert list(opened().batches()) == [b"next"]


def test_a_torn_tail_is_cut_wherever_the_write_stopped(opened: Callable[..., Spool]) -> None:
    """Cut at any byte, the whole batches before the cut are there, and new ones can be read behind them."""
    spool = opened()
    ends = [0]
    for batch in BATCHES:
        spool.append(batch)
        ends.append(spool.size)
    spool.close()
    whole = spool.path.read_bytes()
    for cut in range(len(whole) + 1):
        spool.path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends) - 1
        after = opened()
        assert list(after.batches()) == BATCHES[:kept]
        assert after.size == after.path.stat().st_size == ends[kept]
        after.append(b"new")
        assert list(after.batches()) == [*BATCHES[:kept], b"new"]
        after.close()


def test_a_damaged_batch_is_never_delivered(opened: Callable[..., Spool]) -> None:
    """Any wrong byte in a batch or its head ends the reading there: what is delivered is what was stored."""
    spool = opened()
    for batch in BATCHES:
        spool.append(batch)
    spool.close()
    whole, start = spool.path.read_bytes(), HEAD.size + len(BATCHES[0])
    for at in range(start, len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x41
        spool.path.write_bytes(damaged)
        after = opened()
        kept = 1 if at < start + HEAD.size else 2
        assert list(after.batches()) == BATCHES[:kept]
        after.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(max_size=64), batches=st.lists(st.binary(max_size=30), max_size=4))
def test_garbage_behind_the_batches_is_cut_off(
    opened: Callable[..., Spool], garbage: bytes, batches: list[bytes]
) -> None:
    """Whatever a crash leaves at the end, the batches before it are all there and nothing else is."""
    spool = opened()
    spool.clear()
    for batch in batches:
        spool.append(batch)
    spool.close()
    with spool.path.open("ab") as stream:
        stream.write(b"\xff" + garbage)
    after = opened()
    assert list(after.batches()) == batches
    assert after.size == after.path.stat().st_size
    after.close()


def test_a_full_spool_says_so_and_keeps_what_it_has(opened: Callable[..., Spool]) -> None:
    """The bound counts heads too, is reached exactly, and a batch that does not fit changes nothing."""
    spool = opened(max_bytes=2 * (HEAD.size + 10))
    spool.append(b"0123456789")
    with pytest.raises(SpoolFullError, match="holds 18 of at most 36 bytes"):
        spool.append(b"0123456789+")
    spool.append(b"9876543210")
    with pytest.raises(SpoolFullError):
        spool.append(b"")
    assert list(spool.batches()) == [b"0123456789", b"9876543210"]
    assert spool.size == 36


def test_a_batch_that_could_not_be_read_back_is_not_stored(
    opened: Callable[..., Spool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch beyond the largest that is read would end the reading for all behind it: it is refused."""
    monkeypatch.setattr(module, "MAX_BATCH_BYTES", 100)
    spool = opened()
    with pytest.raises(SpoolFullError):
        spool.append(bytes(101))
    spool.append(bytes(100))
    spool.append(b"behind")
    assert list(spool.batches()) == [bytes(100), b"behind"]


def test_a_disk_that_takes_no_more_leaves_no_half_batch(opened: Callable[..., Spool]) -> None:
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
    assert spool.size == spool.path.stat().st_size == HEAD.size + 5
    spool.append(b"more")
    assert list(spool.batches()) == [b"whole", b"more"]


def test_the_folder_is_made_and_the_file_is_not_for_everyone(tmp_path: Path) -> None:
    """A first start needs no preparation, and records are not readable by others."""
    spool = Spool(tmp_path / "a" / "b", max_bytes=MANY)
    spool.close()
    assert spool.path.stat().st_mode & 0o007 == 0
