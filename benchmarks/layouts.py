"""Public data sets in the layout that `dmdd` reads: links to their files, one folder for each category."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import cv2

from train.data import GOOD, DataError, images_in

DEFECT: Final = "defect"
VISA_SPLIT: Final = Path("split_csv") / "1cls.csv"
TRUTH: Final = "_GT"
Layout = Callable[[Path, Path], list[Path]]


@dataclass(frozen=True)
class Link:
    """One image in its place: of ``split`` (``train`` or ``test``) and class, with the mask of a defect."""

    split: str
    label: str
    image: Path
    mask: Path | None = None


def mvtec(root: Path, _: Path) -> list[Path]:
    """Categories of MVTec AD (Bergmann et al., CVPR 2019) and MPDD (Jezek et al., ICUMT 2021): as they are.

    Raises:
        DataError: if ``root`` has no category.
    """
    found = [folder for folder in sorted(root.iterdir()) if _is_category(folder)] if root.is_dir() else []
    if _is_category(root):
        found = [root]
    if not found:
        msg = f"{root}: no category; expected CATEGORY/train/good, CATEGORY/test/good and CATEGORY/ground_truth"
        raise DataError(msg)
    return found


def _is_category(folder: Path) -> bool:
    return (folder / "train" / GOOD).is_dir() and (folder / "test" / GOOD).is_dir()


def visa(root: Path, work: Path) -> list[Path]:
    """Categories of VisA (Zou et al., ECCV 2022) by its one-class split, linked below ``work``.

    Takes the folder as it is published, with ``split_csv/1cls.csv``, or one that its authors' script has split.

    Raises:
        DataError: if there is neither, or the split names files that are not there.
    """
    table = root / VISA_SPLIT
    if not table.is_file():
        return mvtec(root / "1cls" if (root / "1cls").is_dir() else root, work)
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or not {"object", "split", "label", "image", "mask"} <= set(rows[0]):
        msg = f"{table}: expected the columns object, split, label, image, mask of VisA's own file"
        raise DataError(msg)
    categories: dict[str, list[Link]] = {}
    for row in rows:
        good = row["label"] == "normal"
        link = Link(row["split"], GOOD if good else DEFECT, root / row["image"], None if good else root / row["mask"])
        categories.setdefault(row["object"], []).append(link)
    return [linked(links, work / name) for name, links in sorted(categories.items())]


def kolektor(root: Path, work: Path) -> list[Path]:
    """KolektorSDD2 (Bozic et al., Computers in Industry 2021), one category, linked below ``work``.

    ``train`` and ``test`` hold images ``NUMBER.png`` with truth ``NUMBER_GT.png``. Images whose truth is empty are
    good. Defective images of ``train`` are left out: only good ones are learned from.

    Raises:
        DataError: if an image has no truth, or there is no image.
    """
    links = [link for split in ("train", "test") for link in _kolektor_links(root / split, split)]
    return [linked(links, work / "KolektorSDD2")]


def _kolektor_links(folder: Path, split: str) -> Iterable[Link]:
    for image in images_in(folder):
        if image.stem.endswith(TRUTH):
            continue
        mask = image.with_name(f"{image.stem}{TRUTH}.png")
        pixels = cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE) if mask.is_file() else None
        if pixels is None:
            msg = f"{image}: its truth {mask.name} is missing or cannot be decoded; unpack the data set again"
            raise DataError(msg)
        if not pixels.any():
            yield Link(split, GOOD, image)
        elif split == "test":
            yield Link(split, DEFECT, image, mask)


def linked(links: Iterable[Link], folder: Path) -> Path:
    """Make ``folder`` a data set of links and return it; what it linked before is replaced.

    Raises:
        DataError: if a file is not there, or there are no good images to train on.
    """
    places = {place: target for link in links for place, target in _places(link, folder)}
    if missing := [target for target in places.values() if not target.is_file()]:
        msg = f"{missing[0]}: named by the data set, but not there ({len(missing)} files in all); unpack it again"
        raise DataError(msg)
    if not any(place.parent == folder / "train" / GOOD for place in places):
        msg = f"{folder.name}: no good images to train on; is this the folder of the data set?"
        raise DataError(msg)
    for old in folder.rglob("*"):
        if old.is_symlink():
            old.unlink()
    for place, target in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target.resolve())
    return folder


def _places(link: Link, folder: Path) -> Iterable[tuple[Path, Path]]:
    yield folder / link.split / link.label / link.image.name, link.image
    if link.mask is not None:
        yield folder / "ground_truth" / link.label / f"{link.image.stem}_mask.png", link.mask
