"""The publisher against a Redis that fails at any command, fails over, and a line that dies at any command."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pipeline.config import Redis, Spool
from pipeline.entries import Maker
from pipeline.outlet import Spools
from pipeline.publisher import Publisher
from pipeline.records import Keys
from pipeline.recovery import recover
from pipeline.redis_client import Gate
from tests.support.fake_redis import (
    KILL_AFTER,
    KILL_BEFORE,
    LOST_AFTER,
    LOST_BEFORE,
    NG,
    OK,
    UNJUDGED,
    FakeRedis,
    Killed,
    answered,
)

KEYS = Keys("l")
CAMERAS = ("a", "b")
REFUSALS = ("OOM command not allowed", "READONLY You can't write", "MISCONF disk", "NOPERM no", "LOADING wait")
FAULTS = st.sampled_from([None, None, LOST_BEFORE, LOST_AFTER, KILL_BEFORE, KILL_AFTER, *REFUSALS])


class PublisherMachine(RuleBasedStateMachine):
    """Every part of a line that lives is in Redis once and in order, whatever Redis does."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.redis = FakeRedis()
        self.given: dict[str, list[int]] = {camera: [] for camera in CAMERAS}
        self.unsure: set[tuple[str, int]] = set()
        self.at_risk: set[tuple[str, int]] = set()
        self.rejected: set[tuple[str, int]] = set()
        self.next = 0
        self.states = [self.redis.state()]

    @initialize()
    def start(self) -> None:
        """A line comes up, behind whatever an earlier one has left."""
        gate = self.redis.gate = Gate()
        self.redis.disconnect()
        self.redis.faults.clear()
        self.spools = Spools(Spool(path=Path(self.folder.name), max_bytes=1 << 20, fsync="never"))
        maker = Maker(KEYS, Redis(), {})
        self.publisher = Publisher(self.redis, KEYS, Redis(), maker, self.spools, dict, gate)  # type: ignore[arg-type]
        recover(self.redis, KEYS, self.spools, maker, [])  # type: ignore[arg-type]
        self.states = [self.redis.state()]

    @rule(
        parts=st.lists(st.tuples(st.sampled_from(CAMERAS), st.sampled_from([OK, NG, UNJUDGED])), max_size=5),
        faults=st.lists(FAULTS, max_size=6),
    )
    def publish(self, parts: list[tuple[str, object]], faults: list[str | None]) -> None:
        """New parts come, and a number of commands fail."""
        fresh = []
        for camera, finding in parts:
            part = answered(camera, self.next, finding)  # type: ignore[arg-type]
            self.next += 1
            fresh.append((camera, part.seq))
            self.given[camera].append(part.seq)
            if finding is not OK:
                self.rejected.add((camera, part.seq))
                self.publisher.reject(part)
            self.publisher.record(part)
        self.redis.faults.extend(faults)
        self._cycle(fresh)

    @rule(back=st.integers(0, 3))
    def fail_over(self, back: int) -> None:
        """A replica takes over that lacks the last of what was acknowledged."""
        before = self._recorded()
        self.redis.fail_over(self.states[max(len(self.states) - 1 - back, 0)])
        self.at_risk |= {(name[-1], seq) for name, seq in before - self._recorded()}

    def _recorded(self) -> set[tuple[str, int]]:
        streams = (KEYS.rejects, *map(KEYS.verdicts, CAMERAS))
        return {(key + r["camera"], int(r["seq"])) for key in streams for r in self.redis.records(key)}

    def _cycle(self, fresh: list[tuple[str, int]]) -> None:
        self.publisher._retry_at = self.publisher._picture_retry_at = self.publisher._next_beat = 0.0
        try:
            self.publisher._cycle()
        except Killed:
            # What was not yet stored, the next run's ledger answers. What a failover has lost is in no memory any more.
            self.unsure |= {*fresh, *self.at_risk}
            self.at_risk.clear()
            self.spools.close()
            self.start()
        else:
            if self.redis.is_connected and self.publisher._sender._verified == self.redis.gate.connections:
                self.at_risk.clear()
        self.states = [*self.states[-3:], self.redis.state()]

    @invariant()
    def nothing_is_doubled_or_out_of_order(self) -> None:
        """At any time."""
        for camera in CAMERAS:
            seqs = [int(r["seq"]) for r in self.redis.records(KEYS.verdicts(camera))]
            assert seqs == sorted(set(seqs))
        told = [(r["camera"], int(r["seq"])) for r in self.redis.records(KEYS.rejects)]
        assert len(told) == len(set(told))

    def teardown(self) -> None:
        """When Redis is well again, everything is there, and each reject came before its record."""
        try:
            self._settle()
        finally:
            self.spools.close()
            self.folder.cleanup()

    def _settle(self) -> None:
        self.redis.faults.clear()
        for _ in range(3):
            self._cycle([])
        assert not self.spools
        rejects = [(r["camera"], int(r["seq"])) for r in self.redis.records(KEYS.rejects)]
        for camera in CAMERAS:
            seqs = [int(r["seq"]) for r in self.redis.records(KEYS.verdicts(camera))]
            sure = [seq for seq in self.given[camera] if (camera, seq) not in self.unsure]
            assert [seq for seq in seqs if (camera, seq) not in self.unsure] == sure
            assert {(camera, s) for s in sure if (camera, s) in self.rejected} <= set(rejects)
            assert {(camera, s) for s in seqs if (camera, s) in self.rejected - self.unsure} <= set(rejects)


PublisherMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=12)
TestPublisherMachine = PublisherMachine.TestCase
