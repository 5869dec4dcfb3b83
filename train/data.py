"""Folders of images, in MVTec AD's layout or flat, as arrays of an engine's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from engines.frames import FrameError, InputSpec, Pixels, decode_image, fit

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
GOOD = "good"


class DataError(ValueError):
    """A folder that cannot be trained on or evaluated; the message says what is expected."""


@dataclass(frozen=True)
class Sample:
    """One test image: its path, its class (``good`` or a defect's name) and its mask, if it has one."""

    path: Path
    label: str
    mask: Path | None = None

    @property
    def defective(self) -> bool:
        """Whether the part is known to be defective."""
        return self.label != GOOD


def images_in(folder: Path) -> list[Path]:
    """Every image file directly in ``folder``, sorted by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def good_images(folder: Path) -> list[Path]:
    """The good images to train on: ``train/good``, else ``good``, else the folder itself.

    Raises:
        DataError: if none of these holds an image.
    """
    for candidate in (folder / "train" / GOOD, folder / GOOD, folder):
        if found := images_in(candidate):
            return found
    msg = f"{folder}: no images of good parts; expected them in train/good/, in good/ or directly in the folder"
    raise DataError(msg)


def labelled_samples(folder: Path) -> list[Sample]:
    """The labelled test images of ``folder``: ``test/<class>/*`` or ``<class>/*``, ``good`` being one class.

    A mask is ``ground_truth/<class>/<name>_mask.png`` (or ``<name>.png``) beside ``test``.

    Raises:
        DataError: if there is no class folder, or none named ``good``.
    """
    root = folder / "test" if (folder / "test").is_dir() else folder
    truth = root.parent / "ground_truth"
    classes = sorted(child for child in root.iterdir() if child.is_dir() and images_in(child)) if root.is_dir() else []
    if GOOD not in {child.name for child in classes}:
        msg = f"{folder}: expected test/good/ and one folder per kind of defect beside it"
        raise DataError(msg)
    return [
        Sample(path, child.name, _mask_of(path, truth / child.name)) for child in classes for path in images_in(child)
    ]


def load_defects(folder: Path, spec: InputSpec) -> list[tuple[Pixels, NDArray[np.bool_]]]:
    """Read images of real defects with their masks, as the engine would see them: ``(H, W, C)`` and ``(H, W)``.

    ``<class>/*`` or ``test/<class>/*`` with masks as in :func:`labelled_samples`, or masks ``<name>_mask.png`` beside
    the images. Images without a mask are of no use here and are left out.

    Raises:
        DataError: if no image has a mask.
    """
    if not folder.is_dir():
        msg = f"{folder}: no such folder of defects"
        raise DataError(msg)
    root = folder / "test" if (folder / "test").is_dir() else folder
    classes = [child for child in sorted(root.iterdir()) if child.is_dir() and child.name != GOOD]
    found = []
    for child in (root, *classes):
        for path in images_in(child):
            beside = child / f"{path.stem}_mask.png"
            mask = _mask_of(path, root.parent / "ground_truth" / child.name) or (beside if beside.is_file() else None)
            if mask is not None and not path.stem.endswith("_mask"):
                found.append((load([path], spec)[0], load_mask(mask, spec.height, spec.width)))
    found = [(image, mask) for image, mask in found if mask.any()]
    if not found:
        msg = f"{folder}: no defective image with a mask; expected NAME_mask.png beside NAME.png, or in ground_truth/"
        raise DataError(msg)
    return found


def _mask_of(image: Path, folder: Path) -> Path | None:
    candidates = (folder / f"{image.stem}_mask.png", folder / f"{image.stem}.png")
    return next((path for path in candidates if path.is_file()), None)


def read_image(path: Path, channels: int) -> Pixels:
    """Decode one image file as the running line would: gray ``(h, w)`` or BGR ``(h, w, 3)``.

    Raises:
        DataError: if the file cannot be decoded.
    """
    try:
        return decode_image(path.read_bytes(), channels)
    except FrameError as error:
        msg = f"{path}: not an image that OpenCV can decode"
        raise DataError(msg) from error


def infer_channels(paths: Sequence[Path], probe: int = 8) -> int:
    """Return 1 if the first ``probe`` images are all gray (or BGR with equal channels), else 3."""
    for path in paths[:probe]:
        image = read_image(path, 3)
        if not (np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 1], image[..., 2])):
            return 3
    return 1


def load(paths: Sequence[Path], spec: InputSpec) -> Pixels:
    """Read every image into one uint8 array ``(n, H, W, C)`` as the engine would see it."""
    frames = np.empty((len(paths), *spec.shape), np.uint8)
    for slot, path in zip(frames, paths, strict=True):
        fit(read_image(path, spec.channels), slot)
    return frames


def load_mask(path: Path, height: int, width: int) -> NDArray[np.bool_]:
    """Read a mask, ``(height, width)``, nearest neighbour, true where the part is defective."""
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        msg = f"{path}: not a mask that OpenCV can decode"
        raise DataError(msg)
    return np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST) > 0)


def split(count: int, holdout: float, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Split ``range(count)`` at random into a training part and a held-out part of good images.

    Args:
        count: Number of good images, at least 4.
        holdout: Fraction to hold out; at least 2 images and at most half of them are.
        seed: Makes the split reproducible.

    Raises:
        DataError: if there are fewer than 4 images.
    """
    if count < 4:
        msg = f"{count} good images are too few: at least 4 are needed, 30 or more are advised"
        raise DataError(msg)
    order = np.random.default_rng(seed).permutation(count)
    held = min(max(2, round(count * holdout)), count // 2)
    return np.sort(order[held:]), np.sort(order[:held])


def digest(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of the images in order: which data an engine was trained on."""
    total = sha256()
    for path in paths:
        total.update(sha256(path.read_bytes()).digest())
    return total.hexdigest()
