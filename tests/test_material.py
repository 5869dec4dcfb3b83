"""What a method may look at when its training has ended: folds that are apart, fresh pairs, held-out images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.frames import Pixels
from train import material
from train.features import CleanMaps
from train.material import BATCH, TrainingMaterial
from train.method import FOLDS
from train.synthesis import Synthesizer

SIDE = 32
SEED = 5


class MeanTeacher:
    """A teacher whose one map is the mean gray level of cells of four pixels."""

    def __call__(self, frames: Pixels) -> list[Tensor]:
        """Map uint8 ``(n, H, W, 1)`` to ``(n, 1, H/4, W/4)``."""
        return [torch.nn.functional.avg_pool2d(self.images(frames), 4)]

    def images(self, frames: Pixels) -> Tensor:
        """The pixels as they are, ``(n, 1, H, W)``."""
        return torch.from_numpy(frames).float().permute(0, 3, 1, 2)


def images(count: int, first: int = 0) -> Pixels:
    """Images whose gray level is their number."""
    levels = np.arange(first, first + count, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, SIDE, SIDE, 1)).copy()


def made(count: int, held: int = 3, seed: int = SEED) -> TrainingMaterial:
    """Material of so many images, numbered from 0, and held-out ones, numbered from 100."""
    teacher: Any = MeanTeacher()
    good = images(count)
    synthesizer = Synthesizer(good, textures=np.full((1, SIDE, SIDE, 1), 255, np.uint8), probability=1.0)
    clean = CleanMaps(teacher, good)
    return TrainingMaterial(teacher, clean, synthesizer, images(held, 100), torch.device("cpu"), seed)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few pairs of each fold; how many there are is not what these tests are about."""
    monkeypatch.setattr(material, "FRESH_PAIRS", 6 * BATCH)


def numbers(seen: Tensor) -> list[int]:
    """Which images these are."""
    return [int(image.mean()) for image in seen]


@pytest.mark.parametrize("count", [2, 3, 10, 31])
def test_every_image_is_in_exactly_one_fold(count: int) -> None:
    """Three folds, or as many as there are images, about equally large; each image comes once, in batches."""
    whole = made(count)
    folds: dict[int, list[int]] = {}
    for fold, seen, _ in whole.good():
        assert len(seen) <= BATCH
        folds.setdefault(fold, []).extend(numbers(seen))
    assert len(folds) == whole.folds == min(FOLDS, count)
    assert whole.count == count
    assert sorted(number for fold in folds.values() for number in fold) == list(range(count))
    sizes = [len(fold) for fold in folds.values()]
    assert max(sizes) - min(sizes) <= 1


def test_one_fold_can_be_asked_for() -> None:
    """It has the images that it has among all, and no others."""
    whole = made(11)
    for fold in range(3):
        alone = [n for which, seen, _ in whole.good(fold) for n in numbers(seen) if which == fold]
        assert alone == [n for which, seen, _ in whole.good() for n in numbers(seen) if which == fold]
        assert alone


def test_maps_belong_to_their_images() -> None:
    """The teacher's maps that come with images are the maps of these very images."""
    for _, seen, maps in made(10).good():
        assert numbers(maps[0]) == numbers(seen)


def test_pairs_are_of_their_fold_alone() -> None:
    """What a fold's statistics were fitted without is what the pairs show: clean maps of that fold's images."""
    whole = made(10)
    for fold in range(3):
        own = {n for _, seen, _ in whole.good(fold) for n in numbers(seen)}
        assert {n for pairs in whole.pairs(fold) for n in numbers(pairs.clean[0])} == own


def test_pairs_fit_together() -> None:
    """Images and twin's maps are of one twin, which differs from the clean original where its mask is, mostly."""
    drawn = list(made(6).pairs(0))
    assert len(drawn) == 2
    for pairs in drawn:
        assert pairs.images.shape == pairs.mask.shape == (BATCH, 1, SIDE, SIDE)
        assert set(pairs.mask.unique().tolist()) <= {0.0, 1.0}
        assert torch.equal(pairs.twin[0], torch.nn.functional.avg_pool2d(pairs.images, 4))
        original = torch.nn.functional.interpolate(pairs.clean[0], scale_factor=4)
        changed = (pairs.images - original).abs()
        assert changed[pairs.mask > 0].mean() > 5 * changed[pairs.mask == 0].mean()
    assert any(pairs.mask.any() for pairs in drawn)


def test_pairs_are_the_same_each_time_and_others_for_others() -> None:
    """Ending a training can be repeated; folds and seeds differ, and so do batches."""

    def masks(fold: int, seed: int = SEED) -> Tensor:
        return torch.stack([pairs.mask for pairs in made(6, seed=seed).pairs(fold)])

    assert torch.equal(masks(0), masks(0))
    assert not torch.equal(masks(0), masks(1))
    assert not torch.equal(masks(0), masks(0, SEED + 1))
    first, second = masks(0)
    assert not torch.equal(first, second)


def test_held_out_images_come_whole_and_in_order() -> None:
    """Each once, with its maps, none of the training images among them."""
    batches = list(made(4, held=11).held())
    assert [len(seen) for seen, _ in batches] == [BATCH, 3]
    assert [n for seen, _ in batches for n in numbers(seen)] == list(range(100, 111))
    assert [n for _, maps in batches for n in numbers(maps[0])] == list(range(100, 111))
