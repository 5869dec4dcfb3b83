"""One way to Redis for all of the line: standalone, Sentinel, Cluster; TLS, ACL user, unix socket.

A client fails fast: short timeouts, no retries. With Sentinel or Cluster every new connection first asks where the
master is, and goes to that server only. A line's keys lie on one slot, so it needs but one server of a cluster, and
transactions work there as everywhere. An answer that says "not here" ends the connection, so that the next one asks
again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection, parse_url
from redis.crc import key_slot
from redis.retry import Retry
from redis.sentinel import Sentinel

from pipeline.config import ConfigError
from pipeline.config import Redis as RedisSettings
from pipeline.records import Keys
from pipeline.refusals import code_of

CREDENTIALS: Final = "CREDENTIALS_DIRECTORY"
"""Where systemd puts what ``LoadCredential=`` names, systemd.exec(5)."""
KEEPALIVE: Final = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""Idle seconds, seconds between probes, and how many: a peer that vanished is noticed in about eleven seconds."""
NOT_HERE: Final = (redis.exceptions.ReadOnlyError, redis.exceptions.AskError, redis.exceptions.ClusterDownError)
"""Answers of a server that is not, or no longer, the right one. ``MovedError`` is an ``AskError``."""
ANEW: Final = "the connection was lost; what Redis holds is compared before more is sent"
Address = tuple[str, int]


class Gate:
    """Notices when a client connects anew, and forbids it where that would go unnoticed.

    The other end of a new connection may be another server, or the same with less than it had.

    Attributes:
        connections: How many were made.
        closed: While true, a new connection is refused with a ``ConnectionError``.
    """

    def __init__(self) -> None:
        self.connections = 0
        self.closed = False

    def __call__(self, connection: Any) -> None:
        """What the client calls on a fresh connection."""
        if self.closed:
            raise redis.ConnectionError(ANEW)
        connection.on_connect()
        self.connections += 1

    @contextmanager
    def shut(self, known: int) -> Iterator[None]:
        """Refuse new connections for a while.

        Raises:
            redis.ConnectionError: if ``known`` is not the newest one.
        """
        if known != self.connections:
            raise redis.ConnectionError(ANEW)
        self.closed = True
        try:
            yield
        finally:
            self.closed = False


def connect(
    settings: RedisSettings,
    line: str = "",
    *,
    timeout_ms: int | None = None,
    gate: Gate | None = None,
    decode_responses: bool = False,
) -> redis.Redis:
    """A client for the master that ``[redis]`` names. Nothing is connected yet.

    Args:
        settings: ``[redis]``.
        line: Name of the line; in a cluster its keys say which server is meant.
        timeout_ms: Longest wait, instead of that in ``settings``.
        gate: Told of each new connection.
        decode_responses: Whether answers are text instead of bytes.

    Raises:
        ConfigError: if the address is none, or a password or certificate cannot be read.
    """
    try:
        place: dict[str, Any] = dict(parse_url(settings.url))  # type: ignore[no-untyped-call]
    except ValueError as error:
        msg = f"redis.url: {error}"
        raise ConfigError(msg) from error
    kind = place.pop("connection_class", Connection)
    common = _common(timeout_ms or settings.timeout_ms)
    if kind is not UnixDomainSocketConnection:
        common |= _keepalive()
    if kind is SSLConnection:
        common |= _tls(settings)
    who = _who(settings, place)
    options: dict[str, Any] = {**place, **common, **who, "connection_class": kind}
    options["decode_responses"] = decode_responses
    if settings.mode != "standalone":
        secure = kind is SSLConnection
        route = _route(settings, line, place, {**common, "ssl": secure}, who)
        options |= {"route": route, "connection_class": _RoutedSSLConnection if secure else _RoutedConnection}
    if gate is not None:
        options["redis_connect_func"] = gate
    return redis.Redis.from_pool(ConnectionPool(**options))


def connect_url(url: str, timeout_ms: int) -> redis.Redis:
    """A client for an address alone, as a command line gives it.

    Raises:
        ConfigError: if it is none.
    """
    return connect(RedisSettings.model_construct(**{**_DEFAULTS, "url": url, "timeout_ms": timeout_ms}))


def describe(settings: RedisSettings) -> str:
    """Where that is, as it may be shown: without user and password."""
    if settings.mode == "sentinel":
        return f"master {settings.master} of the Sentinels {', '.join(settings.sentinels or ())}"
    scheme, _, rest = settings.url.partition("://")
    place = f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"
    return f"cluster at {place}" if settings.mode == "cluster" else place


def master_of(settings: RedisSettings, *, timeout_ms: int) -> Address:
    """Who the master is, as the Sentinels say.

    Raises:
        ConfigError: if a password or certificate cannot be read.
        redis.RedisError: if none of them knows.
    """
    common = _common(timeout_ms)
    if settings.url.startswith("rediss:"):
        common |= {**_tls(settings), "ssl": True}
    return _route(settings, "", {}, common, {})()


def password_of(settings: RedisSettings) -> str | None:
    """The password in the file or systemd credential that ``[redis]`` names; None if it names none.

    Raises:
        ConfigError: if it cannot be read, or is empty.
    """
    if settings.credential:
        folder = os.environ.get(CREDENTIALS, "")
        if not folder:
            msg = (
                f"redis.credential = {settings.credential!r}: ${CREDENTIALS} is not set. Add"
                f" LoadCredential={settings.credential}:FILE to the unit, or use redis.password_file"
            )
            raise ConfigError(msg)
        return _secret(Path(folder) / settings.credential, "redis.credential")
    return _secret(Path(settings.password_file), "redis.password_file") if settings.password_file else None


def _secret(path: Path, key: str) -> str:
    try:
        text = path.read_text().strip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        msg = f"{key}: {path}: {why}; it must be a text file with the password that the line's user can read"
        raise ConfigError(msg) from error
    if not text:
        msg = f"{key}: {path} is empty; write the password into it"
        raise ConfigError(msg)
    return text


def _common(timeout_ms: int) -> dict[str, Any]:
    timeout = timeout_ms / 1000
    return {"socket_timeout": timeout, "socket_connect_timeout": timeout, "retry": Retry(NoBackoff(), 0), "protocol": 2}


def _keepalive() -> dict[str, Any]:
    options = {getattr(socket, name): value for name, value in KEEPALIVE.items() if hasattr(socket, name)}
    return {"socket_keepalive": True, "socket_keepalive_options": options}


def _tls(settings: RedisSettings) -> dict[str, Any]:
    for key in ("tls_ca", "tls_cert", "tls_key"):
        path = getattr(settings, key)
        if path and not os.access(path, os.R_OK):
            msg = f"redis.{key}: {path} is not there, or not readable for the line's user"
            raise ConfigError(msg)
    named = {"ssl_ca_certs": settings.tls_ca, "ssl_certfile": settings.tls_cert, "ssl_keyfile": settings.tls_key}
    return {key: path for key, path in named.items() if path}


def _who(settings: RedisSettings, place: dict[str, Any]) -> dict[str, Any]:
    """User and password; those of keys of their own come before those in the address."""
    user, password = settings.username or place.get("username"), password_of(settings) or place.get("password")
    return {key: value for key, value in (("username", user), ("password", password)) if value}


def _route(
    settings: RedisSettings, line: str, place: dict[str, Any], common: dict[str, Any], who: dict[str, Any]
) -> Callable[[], Address]:
    if settings.mode == "cluster":
        first = (str(place.get("host", "localhost")), int(place.get("port", 6379)))
        seeds = [first, *map(_address, settings.nodes or ())]
        return _SlotOwner(seeds, Keys(line).rejects, {**common, **who})
    own = settings.sentinel_password_file
    guard = {"password": _secret(Path(own), "redis.sentinel_password_file")} if own else {}
    return _Master(settings, {**common, **guard})


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


class _Master:
    """Asks the Sentinels who the master is."""

    def __init__(self, settings: RedisSettings, options: dict[str, Any]) -> None:
        asked = [_address(text) for text in settings.sentinels or ()]
        self._name = settings.master
        self._sentinel: Any = Sentinel(asked, sentinel_kwargs=options)  # type: ignore[no-untyped-call]

    def __call__(self) -> Address:
        host, port = self._sentinel.discover_master(self._name)
        return str(host), int(port)


class _SlotOwner:
    """Finds the cluster's server that has a key's slot, by asking any server that is known."""

    def __init__(self, seeds: list[Address], key: str, options: dict[str, Any]) -> None:
        self._seeds, self._slot, self._options = seeds, key_slot(key.encode()), options
        self._known: list[Address] = []

    def __call__(self) -> Address:
        why = "no server is known"
        for address in dict.fromkeys((*self._known, *self._seeds)):
            try:
                owner = self._ask(address)
            except redis.RedisError as error:
                why = f"{address[0]}:{address[1]}: {error}"
                continue
            if owner is not None:
                return owner
            why = f"{address[0]}:{address[1]}: nobody has slot {self._slot}"
        msg = f"no server of the cluster for this line's keys; {why}"
        raise redis.ConnectionError(msg)

    def _ask(self, address: Address) -> Address | None:
        with redis.Redis(*address, **self._options) as client:
            rows: Any = client.execute_command("CLUSTER SLOTS")
        found, masters = None, []
        for first, last, (host, port, *_), *_replicas in rows:
            master = (host.decode() if host else address[0], int(port))
            masters.append(master)
            if first <= self._slot <= last:
                found = master
        self._known = masters or self._known
        return found


class _Routed:
    """A connection that asks where to go whenever it is made."""

    def __init__(self, *, route: Callable[[], Address], **options: Any) -> None:
        self._find = route
        super().__init__(**options)

    def _connect(self) -> Any:
        self.host, self.port = self._find()
        return super()._connect()  # type: ignore[misc]

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)  # type: ignore[misc]
        except NOT_HERE as error:
            self.disconnect()  # type: ignore[attr-defined]
            msg = f"{self.host}:{self.port} is not, or no longer, the right server: {code_of(error)} {error}"
            raise redis.ConnectionError(msg) from error


class _RoutedConnection(_Routed, Connection):
    pass


class _RoutedSSLConnection(_Routed, SSLConnection):
    pass


_DEFAULTS: Final = RedisSettings().model_dump()
