"""The engine store: numbered versions, one active, a way back, and no half of anything."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines import bundle, store
from engines.bundle import CALIBRATION, MODEL, BundleError, Evidence, Threshold
from engines.store import HISTORY, Store, StoreError, Superseded
from tests.support.engine import write_bundle

NAME = "bright"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of a bundle."""
    return write_bundle(tmp_path / "bundle").folder


@pytest.fixture
def kept(tmp_path: Path) -> Store:
    """An empty store, whose folder does not exist yet."""
    return Store(tmp_path / "store")


def added(kept: Store, source: Path, count: int) -> Store:
    """The store with so many versions."""
    for _ in range(count):
        kept.add(source, NAME)
    return kept


def test_an_empty_store_has_nothing(kept: Store) -> None:
    """A store that was never written to is no error."""
    assert (kept.names(), kept.versions(NAME), kept.history(NAME), kept.active(NAME)) == ([], [], [], None)
    assert not kept.root.exists()


def test_versions_are_numbered_from_one(kept: Store, source: Path) -> None:
    """Each bundle that is added is the next version, in the order of numbers and not of letters; none is active."""
    for number in range(1, 12):
        got = kept.add(source, NAME)
        assert (got.version, got.label, got.folder) == (str(number), f"{NAME}@{number}", kept.root / NAME / str(number))
    assert kept.versions(NAME) == [str(number) for number in range(1, 12)]
    assert kept.names() == [NAME]
    assert kept.active(NAME) is None


def test_an_added_bundle_is_a_verified_copy(kept: Store, source: Path) -> None:
    """The store does not need the source any more, loads the same engine, and other users' services may too."""
    digest = bundle.load(source).digest
    source.chmod(0o700)
    kept.add(source, NAME)
    shutil.rmtree(source)
    got = kept.get(NAME, "1")
    assert (got.digest, got.version) == (digest, "1")
    assert got.folder.stat().st_mode & 0o777 == 0o755


def test_a_version_keeps_its_evidence(kept: Store, source: Path, tmp_path: Path) -> None:
    """A version with another threshold holds the same model and the scores behind the threshold."""
    first = added(kept, source, 1).get(NAME, "1")
    evidence = Evidence((0.25, 0.75))
    bundle.with_threshold(first, tmp_path / "new", Threshold(0.75, 0.34, 2, "in words"), evidence)
    second = kept.add(tmp_path / "new", NAME)
    assert (second.label, second.manifest.threshold.value) == (f"{NAME}@2", 0.75)
    assert kept.get(NAME, "2").evidence() == evidence
    assert second.manifest.files[MODEL] == first.manifest.files[MODEL]
    (second.folder / CALIBRATION).unlink()
    with pytest.raises(BundleError, match=r"calibration\.json is missing"):
        kept.get(NAME, "2")


def test_a_version_is_active_once_it_is_activated(kept: Store, source: Path) -> None:
    """No version named means the active one; adding another changes nothing."""
    added(kept, source, 2).activate(NAME, "1")
    assert kept.active(NAME) == "1"
    kept.add(source, NAME)
    assert kept.get(NAME).version == "1"
    kept.activate(NAME, "3")
    assert kept.get(NAME).version == "3"
    assert kept.history(NAME) == ["1", "3"]


def test_a_rollback_goes_back_step_by_step(kept: Store, source: Path) -> None:
    """Each rollback takes the version that was active before, until there is none."""
    added(kept, source, 3)
    for version in ("1", "3", "2"):
        kept.activate(NAME, version)
    assert [kept.rollback(NAME), kept.active(NAME)] == ["3", "3"]
    assert [kept.rollback(NAME), kept.active(NAME)] == ["1", "1"]
    with pytest.raises(StoreError, match="nothing to roll back to"):
        kept.rollback(NAME)
    assert kept.active(NAME) == "1"


def test_a_rollback_may_name_where_it_leads(kept: Store, source: Path) -> None:
    """The active version leaves the history for good: no later rollback comes to it again."""
    added(kept, source, 3)
    for version in ("1", "2", "3"):
        kept.activate(NAME, version)
    assert kept.rollback(NAME, to="1") == "1"
    assert kept.history(NAME) == ["1", "2", "1"]
    assert kept.rollback(NAME, to="2") == "2"
    assert kept.history(NAME) == ["1", "2"]
    with pytest.raises(StoreError, match="no version 9"):
        kept.rollback(NAME, to="9")
    assert kept.history(NAME) == ["1", "2"]


def test_nothing_is_changed_for_whoever_goes_by_an_old_state(kept: Store, source: Path) -> None:
    """An activation or a rollback that expects another version to be active is refused, and says which one is."""
    added(kept, source, 3)
    for version in ("1", "2"):
        kept.activate(NAME, version)
    for use in (
        lambda: kept.activate(NAME, "3", expected="1"),
        lambda: kept.activate(NAME, "2", expected="1"),
        lambda: kept.rollback(NAME, expected="1"),
        lambda: kept.rollback(NAME, expected="3", to="1"),
    ):
        with pytest.raises(Superseded, match="version 2 is active"):
            use()
    assert kept.history(NAME) == ["1", "2"]
    kept.activate(NAME, "3", expected="2")
    assert kept.rollback(NAME, expected="3") == "2"


def test_of_several_that_expect_the_same_version_one_wins(kept: Store, source: Path) -> None:
    """Three processes that each read, then set what they have read on: no step of another one is undone unseen."""
    added(kept, source, 8).activate(NAME, "1")
    command = [sys.executable, "-c", RIVAL, str(kept.root)]
    rivals = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
    for process in rivals:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in rivals:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    won = [int(process.communicate(timeout=60)[0]) for process in rivals]
    history = kept.history(NAME)
    assert history == [str(step % 8 + 1) for step in range(len(history))], "each went by the one before it"
    assert sum(won) == len(history) - 1
    assert sum(won) < 3 * 60, "they never met"


RIVAL = """
import sys
from pathlib import Path
from engines.store import Store, Superseded
store, won = Store(Path(sys.argv[1])), 0
print("ready", flush=True)
sys.stdin.readline()
for _ in range(60):
    active = store.active("bright")
    try:
        store.activate("bright", str(int(active) % 8 + 1), expected=active)
        won += 1
    except Superseded:
        pass
print(won)
"""


def test_activating_the_active_version_does_not_spoil_the_way_back(kept: Store, source: Path) -> None:
    """Said twice, an activation is one: a rollback still gives another version."""
    added(kept, source, 2)
    for version in ("1", "2", "2"):
        kept.activate(NAME, version)
    assert kept.rollback(NAME) == "1"


def test_a_store_is_its_folder(kept: Store, source: Path) -> None:
    """Another process sees the same."""
    added(kept, source, 2).activate(NAME, "2")
    other = Store(kept.root)
    assert (other.active(NAME), other.get(NAME).digest) == ("2", bundle.load(source).digest)


@pytest.mark.parametrize("version", ["3", "0", "", "latest", "..", "1/..", ".incoming-x"])
def test_a_version_that_is_not_there_is_not_activated(kept: Store, source: Path, version: str) -> None:
    """The message says which there are; the active one stays."""
    added(kept, source, 2).activate(NAME, "1")
    with pytest.raises(StoreError, match=r"has no version .*versions: 1, 2"):
        kept.activate(NAME, version)
    assert kept.history(NAME) == ["1"]


def test_an_engine_that_is_not_there_is_named_with_what_there_is(kept: Store, source: Path) -> None:
    """A wrong name, a wrong version and no active version are told apart."""
    added(kept, source, 2)
    with pytest.raises(StoreError, match=r"'caps': no active version in .*versions: none; engines: bright"):
        kept.get("caps")
    with pytest.raises(StoreError, match=r"'bright': no version 9 in .*versions: 1, 2; engines: bright"):
        kept.get(NAME, "9")
    with pytest.raises(StoreError, match=r"'bright': no active version in .*versions: 1, 2"):
        kept.get(NAME)


def test_a_reference_is_a_name_a_version_or_a_folder(kept: Store, source: Path) -> None:
    """``name``, ``name@version`` and the path of a bundle are resolved."""
    added(kept, source, 2).activate(NAME, "1")
    assert kept.resolve(NAME).label == f"{NAME}@1"
    assert kept.resolve(f"{NAME}@2").label == f"{NAME}@2"
    assert kept.resolve(str(source)).folder == source
    for wrong in (f"{NAME}@3", "caps", "", "no/such/folder", "@1"):
        with pytest.raises(StoreError):
            kept.resolve(wrong)


@pytest.mark.parametrize(
    "name", ["", "..", ".", "../up", "a/b", "/abs", "-x", "a b", "x" * 65, "a\n", "caf\u00e9", "a\0"]
)
def test_a_name_that_is_no_folder_of_the_store_is_refused(kept: Store, source: Path, name: str) -> None:
    """No name leads outside the store, whatever is done with it."""
    for use in (
        lambda: kept.add(source, name),
        lambda: kept.activate(name, "1"),
        lambda: kept.rollback(name),
        lambda: kept.get(name),
        lambda: kept.versions(name),
        lambda: kept.history(name),
    ):
        with pytest.raises(StoreError, match="engine name"):
            use()
    assert not kept.root.exists()


def test_a_bundle_that_fails_verification_is_not_added(kept: Store, source: Path) -> None:
    """Nothing of it gets into the store."""
    (source / MODEL).write_bytes(b"other")
    with pytest.raises(BundleError, match="SHA-256 differs"):
        kept.add(source, NAME)
    assert kept.versions(NAME) == []


def test_a_version_that_was_changed_in_the_store_is_not_loaded(kept: Store, source: Path) -> None:
    """Verification is of what is loaded, each time it is loaded."""
    added(kept, source, 1).activate(NAME, "1")
    (kept.root / NAME / "1" / MODEL).write_bytes(b"other")
    with pytest.raises(BundleError, match="SHA-256 differs"):
        kept.get(NAME)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_an_interrupted_add_leaves_no_version(
    kept: Store, source: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A copy that stops half way leaves nothing behind, and the number is still free."""

    def half_copy(origin: Path, target: Path, **_: object) -> None:
        shutil.copy(origin / MODEL, target)
        raise error

    monkeypatch.setattr(store.shutil, "copytree", half_copy)
    with pytest.raises(type(error)):
        kept.add(source, NAME)
    assert kept.versions(NAME) == []
    assert list((kept.root / NAME).iterdir()) == []
    monkeypatch.undo()
    assert kept.add(source, NAME).version == "1"


def test_what_a_killed_add_leaves_is_no_version(kept: Store, source: Path) -> None:
    """A staging folder that nobody could remove is neither listed nor loaded, nor in the way."""
    added(kept, source, 1)
    shutil.copytree(source, kept.root / NAME / ".incoming-abc")
    assert kept.versions(NAME) == ["1"]
    assert kept.add(source, NAME).version == "2"


def test_a_copy_that_came_out_wrong_is_not_added(kept: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that stores something else is noticed before the version exists."""
    copy = shutil.copytree

    def bad_copy(origin: Path, target: Path, **options: bool) -> None:
        copy(origin, target, **options)
        (target / MODEL).write_bytes(b"other")

    monkeypatch.setattr(store.shutil, "copytree", bad_copy)
    with pytest.raises(BundleError, match="SHA-256 differs"):
        kept.add(source, NAME)
    assert list((kept.root / NAME).iterdir()) == []


def test_an_activation_that_fails_leaves_the_one_before(
    kept: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The history is replaced whole or not at all."""
    added(kept, source, 2).activate(NAME, "1")

    def fails(_: Path, __: Path) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="power cut"):
        kept.activate(NAME, "2")
    assert (kept.active(NAME), (kept.root / NAME / HISTORY).read_text()) == ("1", "1\n")
    assert not list((kept.root / NAME).glob(".history-*")), "what was begun is removed"


def test_pruning_keeps_the_newest_the_active_and_the_way_back(kept: Store, source: Path) -> None:
    """Of ten versions go those that nobody asked to keep; a rollback is as before; numbers are not given again."""
    added(kept, source, 10)
    for version in ("1", "5", "3", "7", "2"):
        kept.activate(NAME, version)
    assert kept.prune(NAME, 2, ["4"], dry_run=True) == ["1", "3", "5", "6", "8"]
    assert len(kept.versions(NAME)) == 10
    assert kept.prune(NAME, 2, ["4"]) == ["1", "3", "5", "6", "8"]
    assert kept.versions(NAME) == ["2", "4", "7", "9", "10"]
    assert kept.history(NAME) == ["7", "2"]
    assert kept.rollback(NAME) == "7"
    assert kept.add(source, NAME).version == "11"
    assert kept.prune(NAME, 100) == []


def test_pruning_leaves_a_history_in_which_every_rollback_changes_something(kept: Store, source: Path) -> None:
    """A version is never its own way back, where those between are gone."""
    added(kept, source, 3)
    for version in ("1", "2", "1", "3"):
        kept.activate(NAME, version)
    assert kept.prune(NAME, 1) == ["2"]
    assert kept.history(NAME) == ["1", "3"]


@pytest.mark.parametrize("keep", [0, -1])
def test_pruning_keeps_at_least_one(kept: Store, source: Path, keep: int) -> None:
    """Else the newest number could be given to another engine."""
    added(kept, source, 1)
    with pytest.raises(StoreError, match="at least the newest"):
        kept.prune(NAME, keep)


def test_a_prune_that_was_interrupted_is_finished_by_the_next(
    kept: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between history and removal every state is whole; what was half removed is no version."""
    added(kept, source, 4)
    for version in ("1", "2", "3"):
        kept.activate(NAME, version)

    def fails(*_: object, **__: object) -> None:
        raise OSError("killed")

    monkeypatch.setattr(store.shutil, "rmtree", fails)
    with pytest.raises(OSError, match="killed"):
        kept.prune(NAME, 1)
    monkeypatch.undo()
    assert kept.history(NAME) == ["2", "3"]
    assert [kept.get(NAME, version).version for version in kept.versions(NAME)] == kept.versions(NAME)
    kept.prune(NAME, 1)
    assert kept.versions(NAME) == ["2", "3", "4"]
    assert not list((kept.root / NAME).glob(".removing-*"))


def test_a_report_lies_beside_its_version_and_goes_with_it(kept: Store, source: Path) -> None:
    """It is in no bundle, so no digest changes; one of a kind is kept; pruning takes it along."""
    added(kept, source, 12).activate(NAME, "12")
    for version in ("1", "11"):
        path = kept.keep_report(kept.get(NAME, version), "openvino-fp32", b"old")
        assert path == kept.root / NAME / f"{version}.gate-openvino-fp32.json"
    kept.keep_report(kept.get(NAME, "1"), "openvino-fp32", b"new")
    assert [path.read_bytes() for path in kept.reports(NAME, "1")] == [b"new"]
    assert kept.get(NAME, "1").digest == bundle.load(source).digest
    assert kept.keep_report(bundle.load(source), "openvino-fp32", b"") is None
    kept.prune(NAME, 2)
    assert [path.name for path in (kept.root / NAME).glob("*.json")] == ["11.gate-openvino-fp32.json"]


def test_a_store_that_is_not_there_is_not_made_by_a_typing_error(kept: Store) -> None:
    """Only adding makes one."""
    for use in (lambda: kept.activate(NAME, "1"), lambda: kept.rollback(NAME), lambda: kept.prune(NAME, 1)):
        with pytest.raises(StoreError, match="no engine store"):
            use()
    assert not kept.root.exists()


def test_a_rollback_to_a_damaged_version_is_refused(kept: Store, source: Path) -> None:
    """The line could not load it; the active version stays."""
    added(kept, source, 2)
    for version in ("1", "2"):
        kept.activate(NAME, version)
    (kept.root / NAME / "1" / MODEL).write_bytes(b"other")
    with pytest.raises(BundleError, match="SHA-256 differs"):
        kept.rollback(NAME)
    assert kept.active(NAME) == "2"


def test_a_version_has_the_name_that_it_has_in_the_store(kept: Store, source: Path) -> None:
    """An engine that was added under another name is called by that name in every verdict."""
    assert kept.add(source, "caps").label == "caps@1"
    kept.activate("caps", "1")
    assert kept.get("caps").label == "caps@1"


def test_one_writer_waits_for_another_but_not_for_ever(kept: Store, source: Path) -> None:
    """While somebody writes, readers read; a second writer gives up with a message, and changes nothing."""
    added(kept, source, 2).activate(NAME, "1")
    second = Store(kept.root, wait_s=0.1)
    with kept._writing():
        assert second.get(NAME).version == "1"
        for use in (
            lambda: second.add(source, NAME),
            lambda: second.activate(NAME, "2"),
            lambda: second.prune(NAME, 1),
            lambda: second.rollback(NAME),
        ):
            with pytest.raises(StoreError, match="another process has been writing"):
                use()
    second.activate(NAME, "2")
    assert kept.history(NAME) == ["1", "2"]


WRITER = """
import sys
from pathlib import Path
from engines.store import Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    version = store.add(Path(sys.argv[2]), "bright").version
    store.activate("bright", version)
    if len(sys.argv) > 4:
        store.prune("bright", 3)
"""


def writer(kept: Store, source: Path, rounds: int, *more: str) -> subprocess.Popen[bytes]:
    """A process that adds and activates so many versions, once it is given a line."""
    command = [sys.executable, "-c", WRITER, str(kept.root), str(source), str(rounds), *more]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_two_writers_at_once_lose_nothing(kept: Store, source: Path) -> None:
    """Three processes that add and activate together: every number once, every activation in the history."""
    writers = [writer(kept, source, 15) for _ in range(3)]
    for process in writers:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in writers:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert kept.versions(NAME) == [str(number) for number in range(1, 46)]
    assert sorted(kept.history(NAME), key=int) == kept.versions(NAME)
    digest = bundle.load(source).digest
    assert {kept.get(NAME, version).digest for version in kept.versions(NAME)} == {digest}


def test_a_writer_that_is_killed_leaves_a_whole_store(kept: Store, source: Path) -> None:
    """SIGKILL at many moments: all versions load, the history names versions that exist, and the next writer works."""
    rng = random.Random(7)
    moments = 12
    for _ in range(moments):
        process = writer(kept, source, 10_000, "prune")
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        time.sleep(rng.uniform(0.0, 0.15))
        process.kill()
        process.communicate()
        versions = kept.versions(NAME)
        assert [kept.get(NAME, version).version for version in versions] == versions
        assert set(kept.history(NAME)) <= set(versions)
        number = kept.add(source, NAME).version
        assert int(number) == int(versions[-1] if versions else 0) + 1
        assert not [path for path in (kept.root / NAME).iterdir() if path.name.startswith(".incoming-")]
    assert int(number) > moments, "no writer was killed at work"
