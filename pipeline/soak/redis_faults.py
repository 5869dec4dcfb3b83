"""What happens to Redis, to the way there, and to the ways that frames take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pipeline.soak.fault import Act, Fault, both, carried, logged
from pipeline.soak.proxy import Proxy, Weather
from pipeline.soak.rig import Rig

DELAY_S: Final = 0.25
"""Longer than ``redis.timeout_ms`` of the set-up."""
TRICKLE: Final = 2000
NARROW: Final = 20_000
"""Bytes a second: a quarter of what a camera of the set-up sends."""

Way = Callable[[Rig, str], Proxy]


def _line(rig: Rig, _: str) -> Proxy:
    return rig.servers.line


def _camera(rig: Rig, camera: str) -> Proxy:
    return rig.net[camera]


def _weather(way: Way, weather: Weather) -> Act:
    def act(rig: Rig, camera: str) -> None:
        way(rig, camera).weather = weather

    return act


def _closed(way: Way, *, reset: bool) -> Act:
    def act(rig: Rig, camera: str) -> None:
        way(rig, camera).weather = Weather(closed=True)
        way(rig, camera).cut(reset=reset)

    return act


def _reset(way: Way) -> Act:
    return lambda rig, camera: way(rig, camera).cut(reset=True)


def _opened(way: Way) -> Act:
    def act(rig: Rig, camera: str) -> None:
        way(rig, camera).weather = Weather()
        way(rig, camera).cut()  # what has swallowed bytes stays mute: only a new connection may speak

    return act


def _memory(limit: int) -> Act:
    def act(rig: Rig, _: str) -> None:
        with rig.servers.primary.client() as client:
            client.config_set("maxmemory", limit)

    return act


def _failover(rig: Rig, _: str) -> None:
    rig.servers.exchange()
    rig.servers.lead_line()


LOST: Final = logged("redis_lost")

REDIS: Final = (
    Fault(
        "redis_kill", "redis", "Redis is killed (SIGKILL) and comes back with what it had acknowledged",
        "`redis_lost` in the log", LOST, lambda rig, _: rig.servers.kill(), lambda rig, _: rig.servers.primary.start(),
    ),
    Fault(
        "redis_hang", "redis", "Redis hangs (SIGSTOP), its connections stand", "`redis_lost` in the log", LOST,
        lambda rig, _: rig.servers.primary.halt(), lambda rig, _: rig.servers.primary.go_on(),
    ),
    Fault(
        "redis_slow", "redis", "every answer of Redis takes longer than `redis.timeout_ms`", "`redis_lost` in the log",
        LOST, _weather(_line, Weather(delay_s=DELAY_S)), _opened(_line),
    ),
    Fault(
        "redis_throttled", "redis", f"{TRICKLE} bytes a second to Redis", "`redis_lost` in the log",
        LOST, _weather(_line, Weather(bytes_s=TRICKLE)), _opened(_line),
    ),
    Fault(
        "redis_half_open", "redis", "the connections stand, and nothing comes through", "`redis_lost` in the log",
        both(LOST, carried("swallowed")), _weather(_line, Weather(silent=True)), _opened(_line),
    ),
    Fault(
        "redis_reset", "redis", "a reset ends the connections, once", "the proxy has cut connections",
        carried("cut"), _reset(_line),
    ),
    Fault(
        "redis_unreachable", "redis", "connections to Redis are refused", "`redis_lost` in the log",
        both(LOST, carried("cut")), _closed(_line, reset=True), _opened(_line),
    ),
    Fault(
        "redis_full", "redis", "Redis is out of memory and refuses writes", "`redis_lost` in the log", LOST,
        _memory(1), _memory(0),
    ),
    Fault(
        "redis_read_only", "redis", "the server becomes a replica and refuses writes; then it is the primary again",
        "`redis_lost` in the log", LOST, lambda rig, _: rig.servers.exchange(), lambda rig, _: rig.servers.exchange(),
        alone=True,
    ),
    Fault(
        "redis_failover", "redis", "the replica becomes the primary, and the address leads there",
        "`redis_lost` in the log", LOST, _failover, alone=True,
    ),
    Fault(
        "redis_failover_behind", "redis",
        "the primary dies, and a replica that lacks its last writes takes its place: acknowledged records are gone",
        "`records_resent` in the log", logged("records_resent"), lambda rig, _: rig.servers.leave_behind(),
        lambda rig, _: rig.servers.lose_primary(), alone=True,
    ),
)  # fmt: skip

NETWORK: Final = (
    Fault(
        "net_cut", "network", "a camera's connection ends, and new ones are closed", "the proxy has cut connections",
        carried("cut"), _closed(_camera, reset=False), _opened(_camera),
    ),
    Fault(
        "net_reset", "network", "a reset ends a camera's connection, in the middle of a message perhaps",
        "the proxy has cut connections", carried("cut"), _reset(_camera),
    ),
    Fault(
        "net_slow", "network", f"{DELAY_S:g} s more from a camera to the line", "the proxy has delayed bytes",
        carried("delayed"), _weather(_camera, Weather(delay_s=DELAY_S)), _weather(_camera, Weather()),
    ),
    Fault(
        "net_narrow", "network", "a quarter of the bandwidth that a camera needs", "the proxy has delayed bytes",
        carried("delayed"), _weather(_camera, Weather(bytes_s=NARROW)), _weather(_camera, Weather()),
    ),
    Fault(
        "net_half_open", "network", "a camera's connection stands, and its frames vanish",
        "the proxy has swallowed bytes", carried("swallowed"), _weather(_camera, Weather(silent=True)),
        _opened(_camera),
    ),
)  # fmt: skip
