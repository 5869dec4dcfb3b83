"""The doctor's look at Redis: reachable in time, of a known version, keeping what it is given."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any, Final

import redis

from pipeline.checks import Check, fail, ok, warn
from pipeline.config import ConfigError, Redis
from pipeline.records import Keys
from pipeline.redis_client import connect, describe, master_of
from pipeline.refusals import REMEDIES, code_of

PATIENCE_S: Final = 2.0
OLDEST: Final = 6
FULL: Final = 0.8
"""Share of maxmemory from which on there is a warning."""
Info = dict[str, Any]


def check_redis(settings: Redis, line: str = "") -> Iterator[Check]:
    """Everything that the line needs of its Redis. Nothing is written."""
    where = describe(settings)
    yield from _check_sentinels(settings)
    try:
        with _connect(settings, line) as client:
            yield _check_speed(client, where, settings.timeout_ms)
            info: Info = client.info()
            yield _check_server(info)
            yield _check_memory(info)
            yield _check_persistence(info, _snapshots(client))
    except ConfigError as error:
        yield fail("redis", str(error), "mend it, as the line's user will read it")
    except (redis.RedisError, OSError) as error:
        remedy = REMEDIES.get(code_of(error), "start it; check redis.url, its password, and the firewall between")
        yield fail("redis", f"{where} does not answer as it should: {error}", remedy)


def line_is_alive(settings: Redis, line: str) -> bool:
    """Whether a line of this name has a heartbeat in Redis."""
    try:
        with _connect(settings, line) as client:
            return bool(client.exists(Keys(line).heartbeat))
    except (redis.RedisError, OSError, ConfigError):
        return False


def _connect(settings: Redis, line: str) -> redis.Redis:
    return connect(settings, line, timeout_ms=int(PATIENCE_S * 1000), decode_responses=True)


def _check_sentinels(settings: Redis) -> Iterator[Check]:
    """Whether every Sentinel answers for itself: a failover needs most of them."""
    for address in settings.sentinels or () if settings.mode == "sentinel" else ():
        name, alone = f"sentinel {address}", settings.model_copy(update={"sentinels": (address,)})
        try:
            host, port = master_of(alone, timeout_ms=int(PATIENCE_S * 1000))
        except (redis.RedisError, ConfigError) as error:
            yield warn(name, f"does not know {settings.master}: {error}", "start it; check redis.sentinels and master")
        else:
            yield ok(name, f"{settings.master} is {host}:{port}")


def _check_speed(client: redis.Redis, where: str, timeout_ms: int) -> Check:
    taken = []
    client.ping()  # the first one connects
    for _ in range(9):
        started = time.perf_counter()
        client.ping()
        taken.append((time.perf_counter() - started) * 1000)
    usual, longest = statistics.median(taken), max(taken)
    found = f"{where} answers in {usual:.2f} ms, at most {longest:.2f} ms"
    if longest > timeout_ms / 2:
        return warn("redis", found, f"redis.timeout_ms is {timeout_ms}: bring Redis nearer, or raise it")
    return ok("redis", found)


def _check_server(info: Info) -> Check:
    version = str(info.get("valkey_version") or info["redis_version"])
    kind = f"{'Valkey' if 'valkey_version' in info else 'Redis'} {version}, {info['role']}"
    if int(version.split(".", maxsplit=1)[0]) < OLDEST:
        return fail("redis server", kind, f"use Redis {OLDEST} or later, or Valkey")
    if info["role"] != "master":
        return fail("redis server", kind, "a replica takes no writes: give the address of the master in redis.url")
    return ok("redis server", kind)


def _check_memory(info: Info) -> Check:
    policy, most = info.get("maxmemory_policy", "unknown"), int(info.get("maxmemory", 0))
    used = int(info["used_memory"])
    found = f"maxmemory {_mib(most) if most else 'unlimited'}, {_mib(used)} used, policy {policy}"
    if policy != "noeviction":
        remedy = "`maxmemory-policy noeviction`: under any other, records vanish without a trace when memory is full"
        return fail("redis memory", found, remedy)
    if most and used > FULL * most:
        return warn("redis memory", found, "raise maxmemory, or shorten blob_ttl_s and verdicts_maxlen")
    return ok("redis memory", found)


def _check_persistence(info: Info, snapshots: str | None) -> Check:
    append, name = bool(int(info.get("aof_enabled", 0))), "redis persistence"
    if "err" in {info.get("aof_last_write_status"), info.get("rdb_last_bgsave_status")}:
        return fail(name, "the last write to its disk failed", "free its disk, see its log: it may refuse writes")
    if append:
        return ok(name, "appendonly yes")
    if snapshots:
        return warn(name, f"only snapshots ({snapshots})", "`appendonly yes`: what came after the last one is lost")
    unknown = " that this user may see" if snapshots is None else ""
    return warn(name, f"none{unknown}", "`appendonly yes`, if records are to outlive a restart of Redis")


def _snapshots(client: redis.Redis) -> str | None:
    """The setting ``save``; None where an ACL hides it."""
    try:
        found: Any = client.config_get("save")
    except redis.ResponseError:
        return None
    return str(found.get("save", ""))


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
