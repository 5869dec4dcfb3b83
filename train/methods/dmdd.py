"""DMDD, Dual-Modeling Decouple Distillation (ACM MM 2024, arXiv 2408.03888): losses, and how its maps become one.

Stated by the paper: a frozen teacher; a student whose initial features are decoupled into normality and
abnormality features (by 1x1 convolutions, a third party's summary says); Normality Guidance Modeling (NGM) and
Abnormality Inverse Mimicking (AIM) on normal-anomaly image pairs; a multi-perception segmentation head
over the anomaly maps, trained on synthetic masks. Layer sizes, the trunk, the head's inside, the statistics of good
parts and their fusion are ours; each such choice is an option (``docs/methods.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from train.errors import TrainingError
from train.fusion import DistanceFusion
from train.head import Evidence, MultiPerceptionHead
from train.layers import at_scale, resized
from train.method import FOLDS, Maps, Material, Pairs, Recipe
from train.normality import PlaceStatistics, Prototypes, WholeStatistics, block_of, patches, units, whole
from train.student import DecoupleKind, Student, TrunkKind, cosine_distances
from train.teacher import Teacher

AimLoss = Literal["l1", "inverse", "hinge"]
Statistics = Literal["both", "prototypes", "places", "none"]
MapKind = Literal["fused", "distances", "head"]
Branches = Literal["none", "normality", "both"]

MAP_SHARES: Final = (1.0, 0.8, 0.0)
SCORE_SHARES: Final = (1.0, 0.4, 0.4)
PATCH_BUDGET: Final = 72_000
"""Patches of good parts kept for clustering, of all images together."""
ROW_BUDGET: Final = 300_000
"""Positions of good parts, and of twins beside their defects, that the fusion draws from."""


@dataclass(frozen=True)
class DmddOptions:
    """What the paper leaves open; ``docs/results.md`` says which defaults were measured.

    Attributes:
        trunk: The shared trunk. ``reverse``: from the teacher's maps through one bottleneck (RD4AD); ``encoder``: an
            encoder of its own from the pixels (DeSTSeg).
        decouple: ``split``: a 1x1 convolution doubles the channels, then they are divided (a third party's summary
            of the paper); ``branches``: two 3x3 convolutions.
        aim_loss: How abnormality features are kept off the teacher's where defective. ``l1``: absolute difference
            between cosine distance and mask (URD); ``inverse``: ADPS's equation 7; ``hinge``: at least a distance of 1.
        evidence: What the head sees: distances and reduced ``products``, or the distance ``maps`` alone.
        detach: Whether the head's loss stays out of the student.
        statistics: What is known of good parts beside the student: ``prototypes`` (any orientation), Gaussians at
            ``places`` (aligned parts), ``both`` or ``none``. Not in the paper.
        whole: Whether the score also looks at the whole image: a Gaussian of its features' means and deviations. Not
            in the paper.
        prototypes: Number of prototypes.
        dims: Most dimensions of a Gaussian.
        branches: Whose cosine distances the fusion sees beside the statistics.
        map: What the engine's map is made of. ``fused``: the learned fusion of the distances, and the head;
            ``distances``: without the head; ``head``: the head alone, which is the paper's own reading.
    """

    trunk: TrunkKind = "reverse"
    decouple: DecoupleKind = "split"
    aim_loss: AimLoss = "l1"
    evidence: Evidence = "products"
    detach: bool = True
    statistics: Statistics = "both"
    whole: bool = True
    prototypes: int = 4096
    dims: int = 160
    branches: Branches = "none"
    map: MapKind = "fused"


def ngm_loss(normal: Maps, teacher_clean: Maps) -> Tensor:
    """Normality Guidance Modeling: normality features of the twin fit the teacher's of the good original."""
    return torch.stack([d.mean() for d in cosine_distances(normal, teacher_clean)]).sum()


def aim_loss(abnormal: Maps, teacher_twin: Maps, mask: Tensor, kind: AimLoss = "l1") -> Tensor:
    """Abnormality Inverse Mimicking: mimic the teacher where the part is good, turn away where it is not.

    Plus a fifth of the mean over anomalous cells alone, which are few. ``kind`` is ``DmddOptions.aim_loss``.
    """
    losses = []
    for distance in cosine_distances(abnormal, teacher_twin):
        target = at_scale(mask, distance.shape[2:])
        error = _aim_error(distance, target, kind)
        losses.append(error.mean() + (error * target).sum() / target.sum().clamp(min=1) * 0.2)
    return torch.stack(losses).sum()


def _aim_error(distance: Tensor, target: Tensor, kind: AimLoss) -> Tensor:
    if kind == "l1":
        return (distance - target).abs()
    if kind == "inverse":
        return (1 - target) * distance + target * (1 - distance).clamp(min=0)
    return (1 - target) * distance + target * (1 - distance).clamp(min=0).square()


def segmentation_loss(logits: Tensor, mask: Tensor, gamma: float = 2.0) -> Tensor:
    """Focal loss (balanced by alpha 0.75 for anomalous cells) plus dice."""
    target = at_scale(mask, logits.shape[2:])
    plain = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    hit = torch.exp(-plain)
    alpha = 0.25 + 0.5 * target
    focal = (alpha * (1 - hit) ** gamma * plain).mean() * 10
    chance = torch.sigmoid(logits)
    overlap, total = (chance * target).sum((1, 2, 3)), (chance + target).sum((1, 2, 3))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return focal + dice.mean()


class Dmdd(nn.Module):
    """The method as the trainer and the exporter see it.

    Args:
        teacher: The frozen teacher, with maps at strides 4, 8, 16 and, if there is a fourth, 32.
        size: Height and width of the frames.
        options: See :class:`DmddOptions`.

    Attributes:
        weights: Shares in the engine's map of the distances' fusion, the head's probability, and the whole image.
        score_weights: The same for the map whose maximum is the score. The head draws sharper maps of defects like the
            synthetic ones; distances tell better whether there is a defect at all, and the whole image not where.
        scales: The head's unit is its own decision boundary: on good parts it is next to nothing, which measures
            nothing. The fusion's is measured.
    """

    recipe: ClassVar = Recipe(rate=4e-3, schedule="cycle", steps=1200, steps_few=700)
    headroom: ClassVar = 60.0

    def __init__(self, teacher: Teacher, size: tuple[int, int], options: DmddOptions | None = None) -> None:
        super().__init__()
        self.options = options = options or DmddOptions()
        widths = teacher.widths
        self.student = Student(widths, options.trunk, options.decouple)
        self.head = MultiPerceptionHead(widths, options.evidence)
        if options.map != "head" and options.statistics == "none" and options.branches == "none":
            msg = "dmdd: without statistics and branches there are no distances: choose map=head"
            raise TrainingError(msg)
        self.prototypes, self.places = _statistics(widths, size, options)
        branches = {"none": 0, "normality": 1, "both": 2}[options.branches]
        self.fusion = DistanceFusion(len(self.prototypes) + len(self.places) + branches * len(widths), _seed())
        self.whole = WholeStatistics(2 * sum(widths[1:]), FOLDS) if options.whole and options.map != "head" else None
        chosen = {"fused": (0, 1), "distances": (0,), "head": (1,)}[options.map] + (2,) * (self.whole is not None)
        self.weights: tuple[float, ...] = tuple(MAP_SHARES[k] for k in chosen)
        self.score_weights: tuple[float, ...] = tuple(SCORE_SHARES[k] for k in chosen)
        self.scales: tuple[float | None, ...] = tuple((None, 0.5, 1.0)[k] for k in chosen)

    def losses(self, pairs: Pairs) -> dict[str, Tensor]:
        """The losses of a batch of normal-anomaly pairs; their sum is minimised."""
        normal, abnormal = self.student(pairs.images, pairs.twin)
        seen = (
            ([f.detach() for f in maps] for maps in (normal, abnormal)) if self.options.detach else (normal, abnormal)
        )
        logits = self.head(pairs.twin, *seen)
        return {
            "ngm": ngm_loss(normal, pairs.clean),
            "aim": aim_loss(abnormal, pairs.twin, pairs.mask, self.options.aim_loss),
            "seg": segmentation_loss(logits, pairs.mask),
        }

    @torch.no_grad()
    def finish(self, material: Material) -> None:
        """Fit statistics fold by fold, the fusion to what they say of the fold left out, then both to everything."""
        if self.options.map == "head":
            return
        self._observe(material)
        for fold in range(material.folds):
            self._fit(without=fold)
            self._draw(material, fold)
        self.fusion.fit()
        self._fit()
        held = [self.fusion.context(self._distances(images, maps)) for images, maps in material.held()]
        self.fusion.standardise(torch.cat(held).permute(0, 2, 3, 1).flatten(0, 2))
        if self.whole is not None:
            self.whole.standardise()
        for part in (*self._parts(), self.fusion):
            part.release()

    def maps(self, images: Tensor, teacher: Maps) -> Tensor:
        """One anomaly map for each of ``weights``, ``(n, k, H/4, W/4)``, greater where less normal."""
        maps = []
        if self.options.map != "head":
            maps.append(self.fusion(self._distances(images, teacher)))
        if self.options.map != "distances":
            maps.append(torch.sigmoid(self.head(teacher, *self.student(images, teacher))))
        if self.whole is not None:
            unusual: Tensor = self.whole(whole(teacher[1:]))
            maps.append(unusual.expand_as(maps[0]))
        return torch.cat(maps, 1)

    def _distances(self, images: Tensor, teacher: Maps) -> Maps:
        """Every distance that the fusion sees, at stride 4."""
        features = self._features(teacher)
        distances = [part(features[0]) for part in self.prototypes]
        distances += [part(seen) for part, seen in zip(self.places, features, strict=False)]
        if self.options.branches != "none":
            student = self.student(images, teacher)
            seen_branches = student if self.options.branches == "both" else student[:1]
            distances += [d for branch in seen_branches for d in cosine_distances(branch, teacher)]
        return [resized(d, teacher[0].shape[2:]) for d in distances]

    @staticmethod
    def _features(teacher: Maps) -> Maps:
        """What the statistics look at: strides 8 and 16 as patches, stride 16, strides 16 and 32 of unit length."""
        return [patches(teacher[1:3]), teacher[2], units(teacher[2:])]

    def _gaussians(self, teacher: Maps) -> list[tuple[Any, Tensor]]:
        """Every Gaussian, and what it looks at."""
        seen: list[tuple[Any, Tensor]] = list(zip(self.places, self._features(teacher), strict=False))
        return seen if self.whole is None else [*seen, (self.whole, whole(teacher[1:]))]

    def _observe(self, material: Material) -> None:
        for _, _, maps in material.good():
            for part, seen in self._gaussians(maps):
                part.survey(seen)
        for part, _ in self._gaussians(maps):
            part.orient()
        for fold, _, maps in material.good():
            share = min(1.0, PATCH_BUDGET / (material.count * maps[1][0, 0].numel()))
            for part in self.prototypes:
                part.observe(self._features(maps)[0], fold, share)  # type: ignore[operator]
            for part, seen in self._gaussians(maps):
                part.observe(seen, fold)

    def _fit(self, without: int | None = None) -> None:
        for part in self._parts():
            part.fit(without)

    def _parts(self) -> list[Any]:
        return [*self.prototypes, *self.places, *([] if self.whole is None else [self.whole])]

    def _draw(self, material: Material, fold: int) -> None:
        """Let the fusion draw from a fold that the statistics were fitted without."""
        for _, images, maps in material.good(fold):
            share = min(1.0, ROW_BUDGET / (material.count * maps[0][0, 0].numel()))
            self.fusion.observe(self._distances(images, maps), share=share)
            if self.whole is not None:
                self.whole.measure(whole(maps[1:]))
        for pairs in material.pairs(fold):
            self.fusion.observe(self._distances(pairs.images, pairs.twin), pairs.mask, share)


def _statistics(
    widths: Sequence[int], size: tuple[int, int], options: DmddOptions
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Prototypes of the maps at strides 8 and 16; Gaussians of the same, of stride 16, and of strides 16 and 32."""
    prototypes, places = nn.ModuleList(), nn.ModuleList()
    fine = widths[1] + widths[2]
    if options.statistics in {"both", "prototypes"}:
        prototypes.append(Prototypes(fine, options.prototypes, folds=FOLDS, seed=_seed()))
    if options.statistics in {"both", "places"}:
        for channels, stride in ((fine, 8), (widths[2], 16), (sum(widths[2:]), 16)):
            grid = size[0] // stride, size[1] // stride
            places.append(PlaceStatistics(channels, *grid, options.dims, block_of(*grid), FOLDS))
    return prototypes, places


def _seed() -> int:
    """A seed from the run's own, which torch was given."""
    return int(torch.randint(1 << 31, ()))


METHOD = Dmdd
OPTIONS = DmddOptions
