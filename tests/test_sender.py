"""The sender: one record, one entry, whatever became of the attempts before."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import redis

from pipeline.config import Redis
from pipeline.entries import LATE, RECORD, REJECT, Entry, Maker
from pipeline.outlet import MAX_ENTRIES
from pipeline.records import Keys
from pipeline.redis_client import Gate
from pipeline.sender import Sender, Window
from tests.support.fake_redis import LOST_AFTER, LOST_BEFORE, FakeRedis

KEYS = Keys("l")
STREAM = KEYS.verdicts("a")


class Bench:
    """A sender on a Redis in memory."""

    def __init__(self, window: int = 1000, *, guarded: bool = True) -> None:
        self.gate = Gate()
        self.redis = FakeRedis(self.gate if guarded else None)
        self.counts: Counter[str] = Counter()
        maker = Maker(KEYS, Redis(), {})
        client: Any = self.redis
        self.sender = Sender(client, maker, self.counts, window, self.gate if guarded else None)

    def seqs(self, key: str = STREAM) -> list[int]:
        """The numbers in a stream."""
        return [int(record["seq"]) for record in self.redis.records(key)]


def record(seq: int, key: str = STREAM, kind: str = RECORD, **fields: str) -> Entry:
    """An entry with this number."""
    return Entry(kind, key, f"5-{seq}", {"camera": "a", "session": "1", "seq": str(seq), "late": "0", **fields})


def run(first: int, count: int) -> list[Entry]:
    """Entries with these numbers."""
    return [record(seq) for seq in range(first, first + count)]


@pytest.mark.parametrize("fault", [LOST_BEFORE, LOST_AFTER])
def test_a_chunk_in_doubt_is_written_once(fault: str) -> None:
    """Whether the lost answer was that of a transaction that happened or not."""
    bench = Bench()
    bench.sender.verify()
    bench.redis.faults.append(fault)
    with pytest.raises(redis.RedisError):
        bench.sender.send(run(0, 10))
    bench.sender.distrust()
    bench.sender.send(run(0, 10), doubt=True)
    assert bench.seqs() == list(range(10))
    assert bench.counts["published"] == 10
    assert bench.counts["already_there"] == (10 if fault == LOST_AFTER else 0)


def test_a_transaction_that_a_hung_server_carries_out_late() -> None:
    """It came between the question and the second attempt: ids that are taken by the very record are no loss."""
    bench = Bench()
    bench.sender.verify()
    absent = bench.sender._absent

    def late(chunk: list[Entry]) -> list[Entry]:
        found = absent(chunk)
        bench.redis._execute([("XADD", STREAM, entry.id, entry.fields) for entry in run(0, 5)])
        return found

    bench.sender._absent = late  # type: ignore[method-assign]
    bench.sender.send(run(0, 5), doubt=True)
    assert bench.seqs() == list(range(5))
    assert bench.counts["already_there"] == 5
    assert bench.counts["refused_by_redis"] == 0


def test_the_same_id_with_another_part_is_a_loss() -> None:
    """Somebody else's record does not pass for ours."""
    bench = Bench()
    bench.redis._apply(("XADD", STREAM, "5-1", {"camera": "a", "session": "9", "seq": "1"}))
    bench.sender.send([record(1), record(2)], doubt=True)
    assert bench.seqs() == [1, 2]
    assert bench.counts["refused_by_redis"] == 1
    assert bench.counts["published"] == 1


def test_what_was_trimmed_away_is_not_sent_again() -> None:
    """A record in doubt that is older than all that the stream still has was there, and would not be kept."""
    bench = Bench()
    bench.sender.send(run(0, 10))
    bench.redis.streams[STREAM] = bench.redis.streams[STREAM][5:]
    bench.sender.send(run(0, 10), doubt=True)
    assert bench.seqs() == list(range(5, 10))
    assert bench.counts["refused_by_redis"] == 0


def test_one_spoiled_record_does_not_hold_up_the_others() -> None:
    """A transaction that is refused as a whole, for good, is taken apart."""
    bench = Bench()
    spoiled = Entry(LATE, KEYS.late, "5-0", {})
    bench.sender.send([record(0), spoiled, record(1)])
    assert bench.seqs() == [0, 1]
    assert bench.counts["refused_by_redis"] == 1


def test_a_slow_server_gets_less_at_a_time() -> None:
    """Down to single records, so that something gets through; and more again when it does."""
    bench = Bench()
    bench.sender.verify()
    sizes: list[int] = []
    execute = bench.redis._execute

    def noted(commands: list[tuple[Any, ...]]) -> list[Any]:
        sizes.append(len(commands) // 2)
        return execute(commands)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.redis, "_trip", _times_out)
        for _ in range(9):
            with pytest.raises(redis.TimeoutError):
                bench.sender.send(run(0, 600))
    bench.redis._execute = noted  # type: ignore[method-assign]
    bench.sender.send(run(0, 600))
    assert sizes[:9] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert max(sizes) == MAX_ENTRIES
    assert bench.seqs() == list(range(600))


def _times_out(_: object) -> None:
    raise redis.TimeoutError


def test_a_new_connection_is_compared_before_it_is_used() -> None:
    """Redis came back with less: what is missing is sent again, in order, before anything new; nobody is told twice."""
    bench = Bench()
    bench.sender.send([record(0, KEYS.rejects, REJECT), record(0)])
    state = bench.redis.state()
    bench.sender.send([record(1, KEYS.rejects, REJECT), record(1)])
    bench.redis.fail_over(state)
    with pytest.raises(redis.ConnectionError, match="compared"):
        bench.sender.send([record(2)])
    bench.sender.distrust()
    bench.sender.send([record(2)], doubt=True)
    assert bench.seqs() == [0, 1, 2]
    assert bench.seqs(KEYS.rejects) == [0, 1]
    assert len(bench.redis.told) == 2
    assert bench.counts["resent"] == 2


def test_a_failover_while_what_is_missing_is_sent() -> None:
    """The next attempt begins anew, with what that server has."""
    bench = Bench()
    state = bench.redis.state()
    bench.sender.send(run(0, 600))
    bench.redis.fail_over(state)
    bench.sender.distrust()
    bench.redis.faults.extend([None, None, None, None, LOST_AFTER])
    with pytest.raises(redis.RedisError):
        bench.sender.verify()
    bench.redis.fail_over(state)
    bench.sender.verify()
    assert bench.seqs() == list(range(600))


def test_without_a_gate_nothing_is_compared() -> None:
    """A client that was not made for it works all the same."""
    bench = Bench(guarded=False)
    bench.sender.send(run(0, 3))
    assert bench.seqs() == [0, 1, 2]
    assert bench.redis.trips == 1


class TestWindow:
    """What is remembered."""

    def test_bounded(self) -> None:
        """The newest are kept, in order, in whole chunks."""
        window = Window(100)
        for first in range(0, 1000, 30):
            window.add(run(first, 30))
        kept = [int(entry.fields["seq"]) for entry in window.entries()]
        assert kept == list(range(kept[0], 1020))
        assert 100 <= len(kept) < 130
        assert window.newest == {STREAM: (5, 1019)}

    def test_none(self) -> None:
        """Switched off, it keeps nothing."""
        window = Window(0)
        window.add(run(0, 5))
        assert list(window.entries()) == []

    @pytest.mark.parametrize(("newest", "said"), [((5, 99), True), ((5, 999), False)])
    def test_says_what_it_has_forgotten(
        self, capsys: pytest.CaptureFixture[str], newest: tuple[int, int], said: bool
    ) -> None:
        """Where Redis lacks more than is remembered, the log names the stream."""
        window = Window(10)
        for first in range(0, 1000, 10):
            window.add(run(first, 10))
        window.warn_of_gaps({STREAM: newest})
        assert ("records_missing" in capsys.readouterr().out) == said
