"""Drift on synthetic streams: each cause is found by its name in a stated number of parts, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import Drift
from pipeline.drift import FLOORS, CameraDrift, Cause, Change, likely_causes
from pipeline.optics import Optics
from pipeline.parts import Reason
from tests.support.drifting import Camera, Scene

CONTRACTS = Path(__file__).parent.parent / "docs" / "contracts.md"
OPERATIONS = Path(__file__).parent.parent / "docs" / "operations.md"

IN_FOCUS = dict.fromkeys(FLOORS, 0)


def learned(camera: Camera, evidence: list[float] | None = None) -> CameraDrift:
    """A watch whose baseline is complete."""
    drift = CameraDrift(Drift(), lambda _: evidence)
    assert [change for _, change in camera.feed(drift, 1000)] == [Change.BASELINE]
    return drift


@pytest.mark.parametrize(
    ("scene", "cause", "parts"),
    [
        (Scene(light=0.9), Cause.LIGHT, 120),
        (Scene(light=1.3), Cause.LIGHT, 120),
        (Scene(light=0.5), Cause.LIGHT, 70),
        (Scene(glare=0.08), Cause.LIGHT, 120),
        (Scene(blur=0.7), Cause.FOCUS, 120),
        (Scene(blur=3.0), Cause.FOCUS, 70),
        (Scene(haze=0.3), Cause.LENS, 120),
        (Scene(pace=0.2), Cause.TRIGGER, 120),
        (Scene(pace=0.05), Cause.TRIGGER, 120),
        (Scene(shift=0.06), Cause.MATERIAL, 512),
        (Scene(shift=-0.06), Cause.MATERIAL, 512),
    ],
    ids=lambda value: str(value).removeprefix("Scene"),
)
def test_a_cause_is_found_by_its_name(scene: Scene, cause: Cause, parts: int) -> None:
    """A change that begins after the baseline is warned of once, in so many parts, with its cause alone."""
    camera = Camera()
    drift = learned(camera)
    camera.scene = scene
    ((after, change),) = camera.feed(drift, 2000)
    assert (change, drift.causes) == (Change.DRIFT, {cause})
    assert after <= parts


def test_a_slow_shift_of_the_scores_is_found() -> None:
    """Scores that creep up by a standard deviation over 5000 parts are found before they have."""
    camera = Camera()
    drift = learned(camera)
    changes = []
    for _ in range(50):
        changes += camera.feed(drift, 100)
        camera.scene.shift += 0.064 / 50
    assert [change for _, change in changes] == [Change.DRIFT]
    assert drift.causes == {Cause.MATERIAL}


def test_a_warning_ends_when_its_cause_does_and_does_not_flicker() -> None:
    """A light that is restored is one change, and one that comes back once more is another."""
    camera = Camera()
    drift = learned(camera)
    changes = []
    for light in (0.85, 1.0, 0.85, 1.0):
        camera.scene = Scene(light=light)
        changes += [change for _, change in camera.feed(drift, 1000)]
    assert changes == [Change.DRIFT, Change.OVER] * 2
    assert not drift.causes


@pytest.mark.parametrize("seed", [1, 2])
def test_no_false_alarm_in_a_hundred_thousand_parts(seed: int) -> None:
    """A line on which nothing changes is never warned of, with its image looked at every time."""
    rng = np.random.default_rng(seed)
    drift, camera = CameraDrift(Drift(), lambda _: None), Camera(seed)
    count = 100_000
    levels, sharp = rng.normal(110, 4, count), rng.lognormal(-4, 0.15, count)
    clipped = np.abs(rng.normal(0.004, 0.002, count))
    changes = []
    for number in range(count):
        camera.seq = number * 7 + 1  # no image of the camera's own
        part = camera.part()
        part.optics = Optics(levels[number], sharp[number], clipped[number], (256, 256))
        changes.append(drift.feed(part))
    assert [change for change in changes if change is not None] == [Change.BASELINE]


def test_scores_are_compared_with_the_calibration_where_there_is_one() -> None:
    """A camera that is unlike the calibration from its first part on is warned of, though it never changes."""
    rng = np.random.default_rng(5)
    drift = CameraDrift(Drift(), lambda engine: rng.gumbel(0.1, 0.05, 300).tolist() if engine == "lid@1" else None)
    changes = Camera().feed(drift, 300)
    assert [change for _, change in changes] == [Change.DRIFT]
    assert drift.causes == {Cause.MATERIAL}
    assert drift.report()["reference"] == "calibration of lid@1: 300 good parts"


def test_a_learned_reference_is_called_one() -> None:
    """Where a bundle has no scores, or too few, the report says what the live ones are compared with."""
    drift = CameraDrift(Drift(), lambda _: [0.2] * 10)
    Camera().feed(drift, 1)
    assert drift.report()["reference"] == "the first 500 good parts of lid@1 after the start"


def test_another_version_of_the_engine_is_no_drift() -> None:
    """After a swap the scores have another reference; the images keep theirs, so that a swap hides nothing."""
    camera = Camera()
    drift = learned(camera)
    camera.engine, camera.scene = "lid@2", Scene(shift=0.3)
    assert camera.feed(drift, 2000) == []
    camera.scene.light = 0.8
    assert [change for _, change in camera.feed(drift, 300)] == [Change.DRIFT]


def test_another_input_size_is_learned_anew() -> None:
    """Sharpness on another grid is another figure."""
    camera = Camera()
    drift = learned(camera)
    part = camera.part()
    part.optics = Optics(50.0, 1.0, 0.0, (512, 512))
    drift.feed(part)
    assert drift.learning


def test_only_judged_parts_are_looked_at() -> None:
    """However odd the images of parts are that were not judged, nothing follows from them."""
    camera = Camera()
    drift = learned(camera)
    before = drift.report()
    assert [drift.feed(camera.lost(reason)) for reason in [Reason.DEADLINE, Reason.ENGINE_FAULT] * 500] == [None] * 1000
    assert drift.report() == before


def test_defective_parts_do_not_enter_the_baseline() -> None:
    """What is learned is what good parts look like."""
    camera = Camera(scene=Scene(shift=1.0))  # every part is NG
    drift = CameraDrift(Drift(), lambda _: None)
    assert camera.feed(drift, 2000) == []
    assert drift.learning


def test_some_defects_are_no_drift() -> None:
    """A tenth of defective parts, as on a bad day, does not make the others another material."""
    camera = Camera()
    drift = learned(camera)
    changes = []
    for number in range(3000):
        camera.scene.shift = 0.6 if number % 10 == 0 else 0.0
        changes.append(drift.feed(camera.part()))
    assert set(changes) == {None}


def test_a_break_and_a_new_session_are_no_change_of_pace() -> None:
    """Half an hour without parts, and a camera that restarts, say nothing of the trigger."""
    camera = Camera()
    drift = learned(camera)
    for _ in range(5):
        camera.now += 1800 * 10**9
        camera.feed(drift, 100)
        camera.session, camera.seq = camera.session + 1, 0
        assert camera.feed(drift, 100) == []


@pytest.mark.parametrize(
    ("sides", "shifted", "causes"),
    [
        ({}, False, set()),
        ({}, True, {Cause.MATERIAL}),
        ({"brightness": -1}, True, {Cause.LIGHT}),
        ({"clipping": 1}, False, {Cause.LIGHT}),
        ({"sharpness": -1}, True, {Cause.FOCUS}),
        ({"sharpness": -1, "brightness": 1}, False, {Cause.LENS}),
        ({"sharpness": -1, "brightness": 1, "clipping": 1}, False, {Cause.LIGHT}),
        ({"sharpness": -1, "clipping": 1}, False, {Cause.LIGHT, Cause.FOCUS}),
        ({"sharpness": 1}, False, {Cause.MATERIAL}),
        ({"interval": 1, "brightness": -1}, False, {Cause.LIGHT, Cause.TRIGGER}),
    ],
)
def test_causes_follow_from_the_charts(sides: dict[str, int], shifted: bool, causes: set[Cause]) -> None:
    """What each combination of charts most likely means."""
    assert likely_causes({**IN_FOCUS, **sides}, shifted=shifted) == causes


def test_the_report_is_documented() -> None:
    """Every field of a camera's hash has its row in the contracts, in its order."""
    text = CONTRACTS.read_text().partition("\n### Drift\n")[2].partition("\n#")[0]
    assert re.findall(r"(?m)^\| `(\w+)` \|", text) == [*CameraDrift(Drift(), lambda _: None).report(), "t_ns"]


def test_every_cause_is_documented() -> None:
    """With what to do about it."""
    text = OPERATIONS.read_text().partition("\n## Drift\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"(?m)^\| `(\w+)` \|", text)) == set(Cause)
