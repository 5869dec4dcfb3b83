"""Overload, in fake time: a camera that floods the line loses its own parts, and nobody else's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import DropPolicy
from pipeline.part_queue import Rules
from pipeline.scheduler import Scheduler
from tests.support.factory import BATCH, EACH_MS, FIXED_MS, Factory, Fifo, PlainEdf, Source

CAPACITY = 2 * 1000 * BATCH / (FIXED_MS + BATCH * EACH_MS)
"""Parts a second of two lanes in full batches."""


def flooded(calm_ms: float = 100, flood_ms: float = 100, *, flood: float = 600, **timing: Any) -> list[Source]:
    """Two cameras that keep to their pace, and one that sends ten times as much as the faster of them."""
    return [
        Source("calm", 60, calm_ms),
        Source("slow", 30, calm_ms),
        Source("flood", flood, flood_ms, **timing),
    ]


@pytest.mark.parametrize("kind", [Fifo, PlainEdf])
@pytest.mark.parametrize("seed", range(2))
def test_first_come_and_earliest_deadline_let_a_flood_starve_the_others(kind: type[Any], seed: int) -> None:
    """What this is about: with either order alone, cameras that keep to their pace lose most of their parts."""
    factory = Factory(flooded(), kind, seed=seed).run(10)
    for camera in ("calm", "slow"):
        assert factory.lost(camera) > 0.5 * factory.sent[camera]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("calm_ms", "flood_ms"), [(100, 100), (100, 50), (50, 100), (60, 1000), (1000, 60)], ids=lambda ms: f"{ms}ms"
)
def test_a_flood_costs_the_others_nothing(calm_ms: float, flood_ms: float, seed: int) -> None:
    """Whoever has the earlier deadlines: cameras that keep to their pace lose no part, the flood loses its own."""
    factory = Factory(flooded(calm_ms, flood_ms), seed=seed).run(10)
    assert (factory.lost("calm"), factory.lost("slow")) == (0, 0)
    assert factory.lost("flood") > 0.3 * factory.sent["flood"]


def test_a_flood_does_not_cost_throughput() -> None:
    """Nine parts in ten that the lanes can do at best are judged in time; by deadline alone it is far less."""
    ours, edf = Factory(flooded()).run(10).judged(), Factory(flooded(), PlainEdf).run(10).judged()
    assert ours > 0.9 * CAPACITY * 10
    assert edf < 0.7 * ours


def test_one_lane_is_shared_as_well() -> None:
    """With a single lane a part waits for the whole batch before it, and is judged in time all the same."""
    sources = [Source("calm", 30), Source("slow", 15), Source("flood", 300)]
    factory = Factory(sources, lanes=1).run(20)
    assert (factory.lost("calm"), factory.lost("slow")) == (0, 0)


def test_two_floods_do_not_help_each_other() -> None:
    """Several cameras that send too much share what is left, evenly, and the quiet one loses nothing."""
    factory = Factory([Source("calm", 60), Source("left", 600), Source("right", 400)]).run(10)
    assert factory.lost("calm") == 0
    assert factory.fates["left"]["judged"] == pytest.approx(factory.fates["right"]["judged"], rel=0.05)


def test_a_flood_that_ends_leaves_nothing_behind() -> None:
    """Parts are lost while it lasts, and for one deadline at most after it; before and later none is."""
    factory = Factory(flooded(begin=3, end=6)).run(10)
    assert (factory.lost("calm"), factory.lost("slow")) == (0, 0)
    assert factory.lost("flood") > 0
    assert 3 < min(factory.lost_at) < max(factory.lost_at) < 6.2


def test_light_load_is_plainly_by_deadline() -> None:
    """Without overload every batch is the one that the earliest deadline alone would make: nothing is shared out."""
    sources = [
        Source("a", 60, 80, Rules(weight=5)),
        Source("b", 40, 150, Rules(priority=3)),
        Source("c", 80, 100),
    ]
    ours, edf = Factory(sources).run(20), Factory(sources, PlainEdf).run(20)
    assert ours.batches == edf.batches
    assert ours.judged() == sum(ours.sent.values())


@pytest.mark.parametrize(("left", "right"), [(1, 1), (3, 1), (1, 7), (0.5, 1.5)])
def test_cameras_that_all_send_too_much_share_by_weight(left: float, right: float) -> None:
    """The lanes' time goes by weight, whatever the rates, the deadlines and the priorities."""
    sources = [
        Source("left", 800, 200, Rules(weight=left, priority=5)),
        Source("right", 600, 150, Rules(weight=right)),
    ]
    factory = Factory(sources).run(10)
    judged = {name: fates["judged"] for name, fates in factory.fates.items()}
    assert judged["left"] / factory.judged() == pytest.approx(left / (left + right), abs=0.04)


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=2, max_size=4),
    priorities=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
)
def test_a_camera_within_its_share_loses_nothing(weights: list[float], priorities: list[int], seed: int) -> None:
    """Whatever the weights, the priorities and the others' excess: who sends half of its share is not touched."""
    share = CAPACITY * weights[0] / sum(weights)
    sources = [Source("calm", share / 2, 100, Rules(weights[0], priorities[0]))]
    for at, weight in enumerate(weights[1:]):
        sources.append(Source(f"flood{at}", CAPACITY, 100, Rules(weight, priorities[at + 1])))
    assert Factory(sources, seed=seed).run(4).lost("calm") == 0


@pytest.mark.parametrize("policy", ["wait", "drop_oldest", "drop_newest", "sample"])
def test_every_policy_answers_every_part(policy: DropPolicy) -> None:
    """Under overload too, and it costs the others nothing; what is given up is counted by its policy."""
    sources = flooded(flood_ms=1000, rules=Rules(policy=policy, max_parts=16 if policy != "wait" else 100_000))
    factory = Factory(sources).run(10)
    assert factory.fates["flood"].total() == factory.sent["flood"]
    assert factory.fates["flood"]["judged"] > 0
    assert (factory.lost("calm"), factory.lost("slow")) == (0, 0)
    assert isinstance(factory.desk, Scheduler)
    counts = factory.desk.counts
    assert factory.lost("flood") == sum(counts.values()) + factory.fates["flood"]["deadline"]
    assert counts[f"queue_{policy}"] > 0 or policy == "wait"


def test_a_sample_is_spread_evenly() -> None:
    """Under overload one part of every few is inspected, not whichever came first, and it is fresh."""
    factory = Factory(flooded(flood=2000, rules=Rules(policy="sample", sample_every=10))).run(10)
    judged = [seq for batch in factory.batches for camera, seq in batch if camera == "flood"]
    gaps = [after - before for before, after in pairwise(judged)]
    assert factory.fates["flood"]["sampled"] > 0.8 * factory.sent["flood"]
    # It looks about once a second whether it is still needed.
    assert sum(gap > 10 for gap in gaps) <= 12
    assert factory.fates["flood"]["infeasible"] < 0.02 * factory.sent["flood"]


def test_a_part_that_waits_too_long_is_given_up() -> None:
    """An age limit keeps what is inspected fresh: no part that was judged has waited longer."""
    age = Rules(age_ns=30_000_000, max_parts=1000)
    factory = Factory(flooded(flood_ms=2000, rules=age)).run(5)
    assert isinstance(factory.desk, Scheduler)
    assert factory.desk.counts["queue_age"] == factory.fates["flood"]["infeasible"] > 0
    assert (factory.lost("calm"), factory.lost("slow")) == (0, 0)


def test_a_slow_spell_is_forgotten() -> None:
    """When the lanes are as fast as before, after seconds at a fifth of their speed, no more parts are lost."""
    sources = [Source("a", 100, 60), Source("b", 60, 60)]
    factory = Factory(sources, slow=(2, 6)).run(12)
    assert min(factory.lost_at) > 2
    assert max(factory.lost_at) < 7
