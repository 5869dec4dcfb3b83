"""A labelled test set for the brightness engine: whether a part is rejected is seen from its gray level."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from tests.support.engine import SIDE


def write_part(root: Path, label: str, name: str, level: int, *, masked: bool = False) -> None:
    """One even gray image of a class; its mask, if it has one, is the upper left quarter."""
    folder = root / "test" / label
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{name}.png", np.full((SIDE, SIDE), level, np.uint8))
    if masked:
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[: SIDE // 2, : SIDE // 2] = 255
        (root / "ground_truth" / label).mkdir(parents=True, exist_ok=True)
        _write(root / "ground_truth" / label / f"{name}_mask.png", mask)


def write_parts(root: Path) -> Path:
    """Four good parts, one of them too bright; three stains that are caught, two dents of which one is missed."""
    for name, level in (("a", 20), ("b", 40), ("c", 60), ("d", 150)):
        write_part(root, "good", name, level)
    for name, level in (("e", 180), ("f", 200), ("g", 250)):
        write_part(root, "stain", name, level, masked=True)
    for name, level in (("h", 100), ("i", 230)):
        write_part(root, "dent", name, level)
    return root


def _write(path: Path, image: np.ndarray) -> None:
    _, encoded = cv2.imencode(".png", image)
    path.write_bytes(encoded.tobytes())
