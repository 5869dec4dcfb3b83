"""Peers of another library, for `dmdd compare`: anomalib's torch models, on the teacher's own backbone and weights.

The models, their coreset, Gaussian, losses and synthesis are anomalib's; what is here hands them the images, as its
Lightning modules would. Not its: the backbone's weights, its normalisation and the preparation of images, which are
those of :class:`train.teacher.Teacher` and :func:`train.data.load`, so that methods alone are compared. Every good
image is given to them; none is held out.

Needs the `peers` extra. Nothing is fetched from a network.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch
from anomalib.models.components import TimmFeatureExtractor
from anomalib.models.image.padim.torch_model import PadimModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from anomalib.models.image.supersimplenet import torch_model as supersimplenet
from anomalib.models.image.supersimplenet.loss import SSNLoss
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engines.frames import InputSpec, Pixels
from train.cell import Facts
from train.teacher import LITE, Teacher

BATCH: Final = 8
M_MMAP_THRESHOLD: Final = -3
"""A parameter of glibc's mallopt."""
Build = Callable[[str, list[int]], Any]


class Peer:
    """A model of anomalib with the teacher's backbone.

    Args:
        spec: The images.
        seed: Of everything random, in torch and in numpy's global state.
        backbone: Name as :class:`train.teacher.Teacher` takes it.
        weights: Local weights file; empty for the published ones.
        strides: Feature maps to use, written ``8+16``.
        build: Makes the model from a timm name and the indices of these maps, without pretrained weights.
    """

    def __init__(self, spec: InputSpec, seed: int, backbone: str, weights: str, strides: str, build: Build) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)  # the coreset's projection draws from numpy's global state
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen = tuple(int(stride) for stride in strides.split("+"))
        self._teacher = Teacher(backbone, Path(weights) if weights else None, spec.channels, chosen).to(self._device)
        info: Any = self._teacher.net.feature_info
        lite = LITE.fullmatch(backbone.removeprefix("tf_"))
        self._model = build(f"tf_{lite.group(0)}" if lite else backbone, list(info.out_indices))
        extractor = next(module for module in self._model.modules() if isinstance(module, TimmFeatureExtractor))
        extractor.feature_extractor.load_state_dict(self._teacher.net.state_dict(), strict=True)
        self._model.to(self._device)
        self._about: dict[str, Any] = {"strides": strides, "backbone": backbone}
        self._shape = spec.shape

    @torch.no_grad()
    def predict(self, frames: Pixels) -> tuple[NDArray[Any], NDArray[Any]]:
        """Scores ``(n,)`` and maps ``(n, H, W)`` of frames."""
        self._model.eval()
        found = self._model(self._images(frames))
        return found.pred_score.flatten().cpu().numpy(), found.anomaly_map.squeeze(1).cpu().numpy()

    def facts(self) -> Facts:
        """Cost of one image, size of the fitted model."""
        with FlopCounterMode(display=False) as counter:
            self.predict(np.zeros((1, *self._shape), np.uint8))
        size = sum(value.numel() * value.element_size() for value in self._model.state_dict().values())
        return Facts(counter.get_total_flops() / 2e9, size / 1e6, self._about)

    @torch.no_grad()
    def _collect(self, good: Pixels) -> None:
        """Show all images to a model that keeps their features while it is in training mode."""
        self._model.train()
        for at in range(0, len(good), BATCH):
            self._model(self._images(good[at : at + BATCH]))

    def _images(self, frames: Pixels) -> Tensor:
        """Frames as the backbone takes them, float ``(n, 3, H, W)``: what the teacher does with them."""
        return self._teacher.normalised(torch.from_numpy(frames).to(self._device))


def _return_large_blocks() -> None:
    """Let glibc give every block above a megabyte back to the system when it is freed.

    Each step of the greedy coreset frees a block as large as all patches and keeps a tiny one. Where glibc serves both
    from its heap, which it does below 32 MiB, the tiny ones break up the heap: gigabytes for 31 images.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


class PatchCore(Peer):
    """PatchCore (Roth et al., CVPR 2022): distance to the nearest of a coreset of good patches.

    Args:
        spec: The images.
        seed: Of the coreset's random projection and its first patch.
        backbone: As :class:`Peer`.
        weights: As :class:`Peer`.
        strides: Feature maps to use.
        coreset: Share of the patches that is kept. The greedy choice looks at all patches once for each that it
            keeps, so its time grows with the square of the number of images.
    """

    def __init__(
        self,
        spec: InputSpec,
        seed: int,
        *,
        backbone: str = "efficientnet_lite0",
        weights: str = "",
        strides: str = "8+16",
        coreset: float | str = 0.1,
    ) -> None:
        super().__init__(spec, seed, backbone, weights, strides, self._build)
        self._coreset = float(coreset)

    @staticmethod
    def _build(name: str, layers: list[int]) -> PatchcoreModel:
        return PatchcoreModel(backbone=name, layers=layers, pre_trained=False)

    def fit(self, good: Pixels) -> None:
        """Keep a coreset of the patches of good images."""
        self._collect(good)
        found = sum(len(patches) for patches in self._model.embedding_store)
        _return_large_blocks()
        self._model.subsample_embedding(self._coreset)
        self._about |= {"coreset": self._coreset, "patches": found, "patches_kept": len(self._model.memory_bank)}


class Padim(Peer):
    """PaDiM (Defard et al., ICPR 2020 workshops): Mahalanobis distance to a Gaussian at every position.

    Args:
        spec: The images.
        seed: Of the choice of dimensions, where not all are kept.
        backbone: As :class:`Peer`.
        weights: As :class:`Peer`.
        strides: Feature maps to use; with stride 4 too, as in the paper, EfficientNet-Lite0 does worse.
        features: Dimensions to keep; 0 for as many as there are, but 550 at most, the paper's number for its largest
            backbone. Where all are kept, the seed changes rounding alone.
    """

    def __init__(
        self,
        spec: InputSpec,
        seed: int,
        *,
        backbone: str = "efficientnet_lite0",
        weights: str = "",
        strides: str = "8+16",
        features: int | str = 0,
    ) -> None:
        super().__init__(spec, seed, backbone, weights, strides, partial(self._build, int(features)))
        self._about["features"] = self._model.n_features

    @staticmethod
    def _build(features: int, name: str, layers: list[int]) -> PadimModel:
        if not features:
            widths = TimmFeatureExtractor(name, layers, pre_trained=False).out_dims
            features = min(sum(widths), 550)
        return PadimModel(backbone=name, layers=layers, pre_trained=False, n_features=features)

    def fit(self, good: Pixels) -> None:
        """Fit the Gaussians to good images."""
        self._collect(good)
        self._model.fit()


class SuperSimpleNet(Peer):
    """SuperSimpleNet (Rolih et al., ICPR 2024; JIMS 2025): a discriminator trained on noise in feature space.

    Optimiser, rates and schedule are those of anomalib's Lightning module, by steps instead of epochs. Its noise masks
    need maps of 64 x 64, so images of 256 x 256 at least with these strides.

    Args:
        spec: The images.
        seed: Of weights, order and noise.
        backbone: As :class:`Peer`.
        weights: As :class:`Peer`.
        strides: Feature maps to use.
        steps: Optimiser steps.
        batch: Images a step.
        noise: Standard deviation of the noise in feature space. anomalib's was chosen for WideResNet50-2; features of
            a backbone whose last layers have no activation are several times as large.
    """

    def __init__(
        self,
        spec: InputSpec,
        seed: int,
        *,
        backbone: str = "efficientnet_lite0",
        weights: str = "",
        strides: str = "8+16",
        steps: int | str = 600,
        batch: int | str = BATCH,
        noise: float | str = 0.015,
    ) -> None:
        super().__init__(spec, seed, backbone, weights, strides, self._build)
        self._steps, self._batch = int(steps), int(batch)
        self._order = np.random.default_rng(seed)
        self._model.anomaly_generator.noise_std = float(noise)
        self._about |= {"steps": self._steps, "batch": self._batch, "noise": float(noise)}

    @staticmethod
    def _build(name: str, layers: list[int]) -> Any:
        # Its constructor has no way to say that the weights come later.
        local = partial(TimmFeatureExtractor, pre_trained=False)
        with patch.object(supersimplenet, "TimmFeatureExtractor", local):
            return supersimplenet.SupersimplenetModel(backbone=name, layers=layers, stop_grad=True)

    def fit(self, good: Pixels) -> None:
        """Train adaptor and heads."""
        model, loss = self._model, SSNLoss()
        optimizer = torch.optim.AdamW(
            [
                {"params": model.adaptor.parameters(), "lr": 1e-4},
                {"params": model.segdec.parameters(), "lr": 2e-4, "weight_decay": 1e-5},
            ]
        )
        milestones = [int(self._steps * 0.8), int(self._steps * 0.9)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.4)
        model.train()
        for batch, _ in zip(self._batches(good), range(self._steps), strict=False):
            labels = torch.zeros(len(batch), device=self._device)
            anomaly_map, score, mask, label = model(images=batch, masks=None, labels=labels)
            total = loss(pred_map=anomaly_map, pred_score=score, target_mask=mask, target_label=label)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
            schedule.step()

    def _batches(self, good: Pixels) -> Any:
        """Batches without end, each image once in every round."""
        for _ in count():
            order = self._order.permutation(len(good))
            for at in range(0, len(order), self._batch):
                yield self._images(good[order[at : at + self._batch]])
