"""The folder of a run: settings that can be read, curves that a spreadsheet opens, pictures of the syntheses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from train.run_folder import CURVES, SETTINGS, SHOWN, SIDE, SYNTHESES, write_curves, write_settings, write_syntheses
from train.synthesis import Synthesizer


def test_settings_are_json_that_names_paths_as_text(tmp_path: Path) -> None:
    """In a folder that is made for them; anything that JSON does not know is written as it prints."""
    write_settings(tmp_path / "runs" / "a", {"data": Path("parts"), "steps": 12, "size": (64, 96), "seed": None})
    told = json.loads((tmp_path / "runs" / "a" / SETTINGS).read_text())
    assert told == {"data": "parts", "steps": 12, "size": [64, 96], "seed": None}


def test_settings_of_a_later_run_replace_the_earlier(tmp_path: Path) -> None:
    """A folder speaks of the last run in it."""
    write_settings(tmp_path, {"steps": 1, "old": True})
    write_settings(tmp_path, {"steps": 2})
    assert json.loads((tmp_path / SETTINGS).read_text()) == {"steps": 2}


def test_curves_have_one_row_a_validation(tmp_path: Path) -> None:
    """Named columns, values to six digits, in order."""
    rows = [{"step": 30, "seg": 1.23456789, "val_seg": 1e-7}, {"step": 60, "seg": 0.5, "val_seg": 0.25}]
    write_curves(tmp_path, rows)
    with (tmp_path / CURVES).open(newline="") as stream:
        read = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]
    assert [list(row) for row in read] == [["step", "seg", "val_seg"]] * 2
    for one, two in zip(read, rows, strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_no_validation_leaves_no_curves(tmp_path: Path) -> None:
    """A run that was too short to validate has no empty table."""
    write_curves(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_the_picture_shows_originals_twins_and_masks(tmp_path: Path, channels: int) -> None:
    """Twelve columns of three rows: a good image, its twin, its mask; a twin differs from its original in its mask."""
    images = np.full((2, 64, 64, channels), 100, np.uint8)
    white = np.full((1, 64, 64, channels), 255, np.uint8)
    write_syntheses(tmp_path / "run", Synthesizer(images, textures=white, probability=1.0), seed=0)
    picture = cv2.imread(str(tmp_path / "run" / SYNTHESES))
    assert picture.shape == (3 * SIDE, SHOWN * SIDE, 3)
    original, twin, mask = np.split(picture.astype(int), 3)
    assert np.unique(original).tolist() == [100]
    assert np.abs(twin - original)[mask == 255].mean() > 5
    assert 0 < (mask == 255).mean() < 0.5
    assert len({column.tobytes() for column in np.split(mask, SHOWN, axis=1)}) > SHOWN / 2


def test_the_picture_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    """It can be compared between runs; another seed shows other defects."""
    make = Synthesizer(np.full((2, 64, 64, 3), 100, np.uint8))
    pictures = []
    for number, seed in enumerate((1, 1, 2)):
        write_syntheses(tmp_path / str(number), make, seed)
        pictures.append((tmp_path / str(number) / SYNTHESES).read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_frames_that_are_not_square_are_shown_too(tmp_path: Path) -> None:
    """Any size fits the picture's squares."""
    write_syntheses(tmp_path, Synthesizer(np.full((1, 64, 160, 3), 100, np.uint8)), seed=0)
    assert cv2.imread(str(tmp_path / SYNTHESES)).shape == (3 * SIDE, SHOWN * SIDE, 3)
