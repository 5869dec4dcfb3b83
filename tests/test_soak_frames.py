"""Frames of the soak: each has a score of its own, which the real engine gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.build import ParityError, Target, compile_engine, parity_gate
from engines.bundle import BundleError
from engines.store import Store
from pipeline.soak import engine
from pipeline.soak.frames import BAD, GOOD, SCORE_TOLERANCE, SIDE, THRESHOLD, part_of, picture


def test_the_engine_gives_the_foreseen_score(tmp_path: Path) -> None:
    """The compiled engine's score of every frame is the one that was foreseen, to the digits that a record has."""
    compiled = compile_engine(engine.write(tmp_path / "bundle"), Target(lanes=1, max_batch=4, threads=1))
    lane = compiled.make_lane()
    rng = np.random.default_rng(3)
    for _ in range(50):
        shown = [picture(rng, bad_share=0.5) for _ in range(4)]
        for slot, one in enumerate(shown):
            lane.frames[slot] = np.frombuffer(one.pixels, np.uint8).reshape(SIDE, SIDE, 1)
        lane.submit(4)
        lane.wait(10)
        recorded = [float(f"{score:.6g}") for score in lane.scores[:4]]
        assert recorded == pytest.approx([one.score for one in shown], abs=SCORE_TOLERANCE)
        assert [score > THRESHOLD for score in recorded] == [one.expect == "NG" for one in shown]
    lane.close()
    compiled.close()


def test_frames_can_be_told_apart() -> None:
    """Two thousand frames have two thousand digests, and nearly as many scores that a record tells apart."""
    rng = np.random.default_rng(1)
    shown = [picture(rng) for _ in range(2000)]
    assert len({part_of(one.sha256) for one in shown}) == 2000
    assert len({round(one.score / (2 * SCORE_TOLERANCE)) for one in shown}) > 1950
    assert all(GOOD[0] <= one.score <= GOOD[1] or BAD[0] <= one.score <= BAD[1] for one in shown)


def test_versions_are_what_they_should_be(tmp_path: Path) -> None:
    """Two versions can be run; the damaged one is not loaded, the unequal one does not pass the gate."""
    versions = engine.Versions(tmp_path / "store")
    store = Store(tmp_path / "store")
    assert (versions.active, versions.other()) == ("1", "2")
    with pytest.raises(BundleError):
        store.get(engine.NAME, versions.DAMAGED)
    for version, passes in (("1", True), ("2", True), (versions.UNEQUAL, False)):
        bundle = store.get(engine.NAME, version)
        compiled = compile_engine(bundle, Target(lanes=1, max_batch=2, threads=1))
        lane = compiled.make_lane()
        if passes:
            parity_gate(bundle, lane)
        else:
            with pytest.raises(ParityError):
                parity_gate(bundle, lane)
        lane.close()
        compiled.close()
