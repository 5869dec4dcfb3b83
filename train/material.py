"""What a method may look at once more when its training has ended: training images, fresh pairs, held-out images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor

from engines.frames import Pixels
from train.features import CleanMaps, FrozenTeacher
from train.method import FOLDS, Maps, Pairs
from train.synthesis import Synthesizer

BATCH: Final = 8
FRESH_PAIRS: Final = 900
FRESH_SEED: Final = 1 << 20
"""Apart from the seeds of training steps."""


class TrainingMaterial:
    """The images of a run, in folds, with the teacher's maps of them: a :class:`train.method.Material`.

    Args:
        teacher: The frozen teacher, exact.
        clean: Its maps of the synthesizer's images.
        synthesizer: Of the training images.
        held: Held-out good images, uint8 ``(n, H, W, C)``.
        device: Where the method is.
        seed: Of the fresh pairs.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        clean: CleanMaps,
        synthesizer: Synthesizer,
        held: Pixels,
        device: torch.device,
        seed: int,
    ) -> None:
        self._teacher, self._clean, self._synthesizer = teacher, clean, synthesizer
        self._held, self._device, self._seed = held, device, seed
        self.count = len(synthesizer.images)
        self.folds = min(FOLDS, self.count)

    def good(self, fold: int | None = None) -> Iterator[tuple[int, Tensor, Maps]]:
        """Good training images of a fold or of all, in batches of one fold."""
        for chosen in range(self.folds) if fold is None else (fold,):
            indices = np.arange(chosen, self.count, self.folds)
            for at in range(0, len(indices), BATCH):
                batch = indices[at : at + BATCH]
                yield chosen, self._teacher.images(self._synthesizer.images[batch]), self._clean[batch]

    def pairs(self, fold: int) -> Iterator[Pairs]:
        """Fresh pairs of a fold's images, the same in every run."""
        indices = np.arange(fold, self.count, self.folds)
        for number in range(FRESH_PAIRS // self.folds // BATCH):
            rng = np.random.default_rng([self._seed, FRESH_SEED + fold, number])
            batch = rng.choice(indices, BATCH)
            drawn = [self._synthesizer(int(index), rng) for index in batch]
            twins = np.stack([twin for twin, _ in drawn])
            mask = torch.from_numpy(np.stack([mask for _, mask in drawn])).to(self._device).unsqueeze(1).float()
            yield Pairs(self._clean[batch], self._teacher(twins), self._teacher.images(twins), mask)

    def held(self) -> Iterator[tuple[Tensor, Maps]]:
        """Held-out good images."""
        for at in range(0, len(self._held), BATCH):
            batch = self._held[at : at + BATCH]
            yield self._teacher.images(batch), self._teacher(batch)
