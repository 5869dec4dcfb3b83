"""The inspection of a batch: what it leaves in the parts for those who count, time and watch them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.lane import LaneFault
from pipeline import inspection
from pipeline.config import Camera
from pipeline.inspection import Inspection
from pipeline.ledger import CameraBook, Ledger
from pipeline.optics import Optics, measure
from pipeline.parts import Part, Reason
from pipeline.wire import Header
from tests.support.books import Recorder
from tests.support.engine import CELL, SIDE, write_bundle

LEVEL = 60


@pytest.fixture
def engine(tmp_path: Path) -> Bundle:
    """The brightness engine."""
    return write_bundle(tmp_path / "bright")


class OrderedLane:
    """A lane that writes down what is done to it, and scores a part by its brightness."""

    def __init__(self, fault: str = "") -> None:
        self.frames = np.zeros((8, SIDE, SIDE, 1), np.uint8)
        self.scores = np.zeros(8, np.float32)
        self.heatmaps = np.zeros((8, SIDE // CELL, SIDE // CELL), np.uint8)
        self.calls: list[str] = []
        self._fault = fault

    def submit(self, count: int) -> None:
        self.calls.append("submit")
        self.scores[:count] = self.frames[:count].mean((1, 2, 3)) / 255

    def ready(self) -> bool:
        return True

    def wait(self, timeout: float) -> None:
        self.calls.append("wait")
        if self._fault:
            raise LaneFault(self._fault)

    def close(self) -> None:
        """Nothing is held."""


def opened(ledger: Ledger, count: int, level: int = LEVEL) -> list[Part]:
    """Parts of a camera, with pixels."""
    parts = []
    for seq in range(count):
        part = ledger.admit("cam1", Header(seq=seq, session=1, w=SIDE, h=SIDE))
        assert part is not None
        part.pixels = np.full((SIDE, SIDE), level, np.uint8).tobytes()
        parts.append(part)
    return parts


def a_ledger() -> Ledger:
    """It knows one camera."""
    ledger = Ledger(Recorder())
    ledger.register(CameraBook("cam1", deadline_ns=10**10, max_gap=0, first_seq=0))
    return ledger


def test_stamps_are_in_the_order_of_the_stages(engine: Bundle) -> None:
    """Every inspected part has each stage's time, none of which is before the one of the stage before."""
    ledger = a_ledger()
    parts = opened(ledger, 3)
    assert Inspection(engine, {"cam1": Camera()}, ledger, timeout_s=1)(OrderedLane(), parts) == 3
    for part in parts:
        stamps = [part.arrival, part.taken, part.submitted, part.done, part.judged]
        assert stamps == sorted(stamps)
        assert all(stamps)
        assert part.judged <= part.arrival + (part.latency_us + 1) * 1000, "it has its stamps before its verdict"


def test_every_so_manieth_part_is_looked_at(engine: Bundle) -> None:
    """Statistics are those of the part's own slot; a camera that is not watched costs nothing."""
    ledger = a_ledger()
    parts = opened(ledger, 8)
    Inspection(engine, {"cam1": Camera(drift_every=3)}, ledger, timeout_s=1)(OrderedLane(), parts)
    assert [part.seq for part in parts if part.optics] == [0, 3, 6]
    assert parts[3].optics == measure(np.full((SIDE, SIDE, 1), LEVEL, np.uint8))
    more = a_ledger()
    parts = opened(more, 8)
    Inspection(engine, {"cam1": Camera(drift_every=0)}, more, timeout_s=1)(OrderedLane(), parts)
    assert not any(part.optics for part in parts)


def test_images_are_looked_at_while_the_lane_works(engine: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between submit and wait: a part's verdict does not wait for its statistics."""
    lane = OrderedLane()

    def noted(slot: np.ndarray) -> Optics:
        lane.calls.append("look")
        return measure(slot)

    monkeypatch.setattr(inspection, "measure", noted)
    ledger = a_ledger()
    Inspection(engine, {"cam1": Camera(drift_every=1)}, ledger, timeout_s=1)(lane, opened(ledger, 2))
    assert lane.calls == ["submit", "look", "look", "wait"]


def test_a_part_that_cannot_be_decoded_does_not_shift_the_slots(engine: Bundle) -> None:
    """It is UNKNOWN, and the scores and statistics of the others are theirs."""
    ledger = a_ledger()
    parts = opened(ledger, 3)
    parts[1].header = Header(seq=1, session=1, fmt="png")
    parts[2].pixels = np.full((SIDE, SIDE), 200, np.uint8).tobytes()
    inspect = Inspection(engine, {"cam1": Camera(drift_every=1)}, ledger, timeout_s=1)
    assert inspect(OrderedLane(), parts) == 2
    reasons = [part.finding.reason for part in parts if part.finding]
    assert reasons == [Reason.BELOW_THRESHOLD, Reason.UNDECODABLE, Reason.ABOVE_THRESHOLD]
    assert [part.optics and part.optics.brightness for part in parts] == [LEVEL, None, 200]
    assert parts[1].submitted == 0


def test_a_fault_leaves_the_parts_to_be_failed(engine: Bundle) -> None:
    """None of the batch is answered by the fault itself; then each is UNKNOWN, without a stage that it has not had."""
    ledger = a_ledger()
    parts = opened(ledger, 2)
    inspect = Inspection(engine, {"cam1": Camera()}, ledger, timeout_s=1)
    with pytest.raises(LaneFault):
        inspect(OrderedLane("device error"), parts)
    assert ledger.open == 2
    inspect.fail(parts)
    assert [part.finding and part.finding.reason for part in parts] == [Reason.ENGINE_FAULT] * 2
    assert not any(part.done for part in parts)


def test_a_good_part_is_shown_now_and_then(engine: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sampling one part a second of a camera keeps its heatmap and image; without, no good part does."""
    now = [10_000_000_000]
    monkeypatch.setattr(inspection, "time", SimpleNamespace(monotonic_ns=lambda: now[0]))
    ledger = a_ledger()
    inspect = Inspection(engine, {"cam1": Camera()}, ledger, timeout_s=1, sample=True)
    parts = opened(ledger, 3)
    for part in parts:
        inspect(OrderedLane(), [part])
        now[0] += 600_000_000
    kept = [part.finding is not None and part.finding.sampled and part.pixels is not None for part in parts]
    assert kept == [True, False, True]
