"""The folder of a training run: its settings, its curves, and a picture of the defects that it was shown."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np

from engines.frames import Pixels
from train.synthesis import Synthesizer

SETTINGS, CURVES, SYNTHESES = "settings.json", "curves.csv", "syntheses.png"
SHOWN: Final = 12
SIDE: Final = 160


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write what the run was told and what it decided, as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, default=str) + "\n")


def write_curves(folder: Path, curves: list[dict[str, float]]) -> None:
    """Write losses in training and in validation, one row a validation."""
    if not curves:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / CURVES).open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(curves[0]))
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in curves)


def write_syntheses(folder: Path, synthesizer: Synthesizer, seed: int) -> None:
    """Write good images, their defective twins and the masks, one column each: look whether they look like defects."""
    rng = np.random.default_rng([seed, SHOWN])
    columns = []
    for index in rng.integers(0, len(synthesizer.images), SHOWN):
        twin, mask = synthesizer(int(index), rng)
        rows = (synthesizer.images[index], twin, mask.astype(np.uint8)[..., None] * np.uint8(255))
        columns.append(np.concatenate([_thumbnail(row) for row in rows]))
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / SYNTHESES), np.concatenate(columns, 1))


def _thumbnail(image: Pixels) -> Pixels:
    colour = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
    return np.asarray(cv2.resize(colour, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)
