"""DMDD, Dual-Modeling Decouple Distillation (ACM MM 2024, arXiv 2408.03888): student, head and losses.

Stated by the paper: a frozen teacher; a student whose initial features are decoupled into normality and
abnormality features (by 1x1 convolutions, a third party's summary says); Normality Guidance Modeling (NGM) and
Abnormality Inverse Mimicking (AIM) on normal-anomaly image pairs; a multi-perception segmentation head
over the anomaly maps, trained on synthetic masks, from which map and score are read. The layer sizes, the
reverse trunk and the head's inside are our reconstruction (``docs/methods.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from train.statistics import ResidualStatistics

Maps = list[Tensor]

WIDTHS: Final = (32, 64, 112, 160)
"""Channels of the initial student features at strides 4, 8, 16 and 32."""
BOTTLENECK: Final = 192


def conv_bn(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU; same padding."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 expansion, depthwise convolution, linear 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, kernel: int = 3, expansion: int = 2) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *([conv_bn(inputs, hidden)] if expansion > 1 else []),
            conv_bn(hidden, hidden, kernel, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, inputs, h, w)`` to ``(n, outputs, h / stride, w / stride)``."""
        out: Tensor = self.body(x)
        return x + out if self.residual else out


class Ascend(nn.Module):
    """One step up the pyramid: narrow while the map is small, enlarge it, then two separable convolutions."""

    def __init__(self, inputs: int, outputs: int, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.narrow = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.refine = nn.Sequential(
            InvertedResidual(outputs, outputs, kernel=5, expansion=1), InvertedResidual(outputs, outputs, expansion=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, inputs, h, w)`` to ``(n, outputs, scale h, scale w)``."""
        x = self.narrow(x)
        out: Tensor = self.refine(_enlarge(x) if self.scale > 1 else x)
        return out


def _enlarge(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class ReverseTrunk(nn.Module):
    """Teacher maps -> one bottleneck at stride 16 -> a pyramid of initial student features.

    There is no skip connection past the bottleneck: what it has not learned from pairs of good and defective
    images cannot pass it.

    Args:
        teacher: Channels of the teacher's maps at strides 4, 8, 16 and, if there is a fourth, 32.
    """

    def __init__(self, teacher: Sequence[int]) -> None:
        super().__init__()
        low, mid, high, *deep = teacher
        self.down1 = conv_bn(low, 48, 3, 2)
        self.down2 = conv_bn(48 + mid, 96, 3, 2)
        self.deep = nn.Sequential(*(conv_bn(width, 96) for width in deep))
        self.merge = conv_bn(96 + high + 96 * len(deep), BOTTLENECK)
        self.bottleneck = nn.Sequential(*(InvertedResidual(BOTTLENECK, BOTTLENECK, kernel=5) for _ in range(3)))
        self.down4 = nn.Sequential(*(InvertedResidual(BOTTLENECK, WIDTHS[3], stride=2, kernel=5) for _ in deep))
        self.up3 = Ascend(BOTTLENECK, WIDTHS[2], scale=1)
        self.up2 = Ascend(WIDTHS[2], WIDTHS[1])
        self.up1 = Ascend(WIDTHS[1], WIDTHS[0])

    def forward(self, teacher: Maps) -> Maps:
        """Return initial student features with ``WIDTHS`` channels, one map for each of the teacher's."""
        low, mid, high, *deep = teacher
        seen = [self.down2(torch.cat([self.down1(low), mid], 1)), high, *(_enlarge(self.deep(d)) for d in deep)]
        x = self.bottleneck(self.merge(torch.cat(seen, 1)))
        s3 = self.up3(x)
        s2 = self.up2(s3)
        return [self.up1(s2), s2, s3, *(self.down4(x) for _ in deep)]


class Decouple(nn.Module):
    """Expand initial features by a 1x1 convolution, separate them, refine both branches to teacher width."""

    def __init__(self, width: int, teacher: int) -> None:
        super().__init__()
        self.expand = conv_bn(width, 2 * width)
        self.normality = self._branch(width, teacher)
        self.abnormality = self._branch(width, teacher)

    @staticmethod
    def _branch(width: int, teacher: int) -> nn.Sequential:
        return nn.Sequential(conv_bn(width, width, 3, groups=width), nn.Conv2d(width, teacher, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return normality and abnormality features, each shaped as the teacher's map at this scale."""
        normal, abnormal = self.expand(x).chunk(2, dim=1)
        return self.normality(normal), self.abnormality(abnormal)


class Student(nn.Module):
    """The decoupled student: a shared trunk, then a dual branch at every scale."""

    def __init__(self, teacher: Sequence[int]) -> None:
        super().__init__()
        self.trunk = ReverseTrunk(teacher)
        self.decouple = nn.ModuleList(Decouple(w, t) for w, t in zip(WIDTHS, teacher, strict=False))

    def forward(self, teacher: Maps) -> tuple[Maps, Maps]:
        """Return normality maps and abnormality maps for teacher maps at strides 4, 8, 16 (and 32)."""
        pairs = [split(s) for split, s in zip(self.decouple, self.trunk(teacher), strict=True)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def distances(features: Maps, teacher: Maps) -> Maps:
    """Cosine distance per position and scale, ``(n, 1, h_k, w_k)``."""
    return [1 - F.cosine_similarity(f, t, dim=1, eps=1e-6).unsqueeze(1) for f, t in zip(features, teacher, strict=True)]


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation over mean and maximum (CBAM)."""

    def __init__(self, width: int, reduction: int = 4) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Conv2d(width, width // reduction, 1), nn.ReLU(inplace=True), nn.Conv2d(width // reduction, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the channels of ``x``."""
        mean, peak = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return x * torch.sigmoid(self.gate(mean) + self.gate(peak))


class SpatialAttention(nn.Module):
    """A 7x7 convolution over the channels' mean and maximum (CBAM)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the positions of ``x``."""
        return x * torch.sigmoid(self.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


class MultiPerceptionHead(nn.Module):
    """Fuses anomaly maps of all scales and both branches through several receptive fields and attentions.

    Takes, per scale, both cosine distances and, reduced to a few channels, the L2-normalised teacher features
    and their products with those of both branches; returns logits at stride 4.
    """

    def __init__(self, teacher: Sequence[int], width: int = 32, reduced: int = 16) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(conv_bn(3 * t, reduced) for t in teacher)
        self.enter = conv_bn(len(teacher) * (reduced + 2), width)
        self.fields = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=rate, dilation=rate, groups=width, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                conv_bn(width, width // 2),
            )
            for rate in (1, 2, 4, 8)
        )
        self.fuse = conv_bn(width + 2 * width, width)
        self.attend = nn.Sequential(ChannelAttention(width), SpatialAttention())
        self.exit = nn.Sequential(
            conv_bn(width, width, 3, groups=width), conv_bn(width, width // 2), nn.Conv2d(width // 2, 1, 1)
        )

    def forward(self, teacher: Maps, normal: Maps, abnormal: Maps) -> Tensor:
        """Return anomaly logits ``(n, 1, H/4, W/4)``."""
        size = teacher[0].shape[2:]
        parts = []
        for reduce, t, n, a in zip(self.reduce, teacher, normal, abnormal, strict=True):
            unit = F.normalize(t, dim=1)
            with_normal, with_abnormal = unit * F.normalize(n, dim=1), unit * F.normalize(a, dim=1)
            cosines = torch.cat([1 - with_normal.sum(1, keepdim=True), 1 - with_abnormal.sum(1, keepdim=True)], 1)
            # Unit vectors have elements of the order of 1 / sqrt(channels): bring them back to about 1.
            evidence = torch.cat([unit, with_normal, with_abnormal], 1) * t.shape[1] ** 0.5
            both = torch.cat([reduce(evidence), cosines], 1)
            parts.append(F.interpolate(both, size=size, mode="bilinear", align_corners=False))
        x = self.enter(torch.cat(parts, 1))
        x = self.fuse(torch.cat([x, *(field(x) for field in self.fields)], 1))
        logits: Tensor = self.exit(self.attend(x))
        return logits


def at_scale(mask: Tensor, size: Sequence[int], share: float = 0.25) -> Tensor:
    """Reduce a mask ``(n, 1, H, W)`` to ``size``: a cell is anomalous where ``share`` of it is."""
    return (F.adaptive_avg_pool2d(mask, (size[0], size[1])) >= share).to(mask.dtype)


def ngm_loss(normal: Maps, teacher_clean: Maps) -> Tensor:
    """Normality Guidance Modeling: normality features of the twin fit the teacher's of the good original."""
    return torch.stack([d.mean() for d in distances(normal, teacher_clean)]).sum()


def aim_loss(abnormal: Maps, teacher_twin: Maps, mask: Tensor) -> Tensor:
    """Abnormality Inverse Mimicking: mimic the teacher where the part is good, turn away where it is not.

    The absolute difference between distance and mask (distance 0 where good, 1 where anomalous), as in URD's
    anomaly-aware loss, plus a fifth of its mean over anomalous cells alone, which are few.
    """
    losses = []
    for distance in distances(abnormal, teacher_twin):
        target = at_scale(mask, distance.shape[2:])
        error = (distance - target).abs()
        losses.append(error.mean() + (error * target).sum() / target.sum().clamp(min=1) * 0.2)
    return torch.stack(losses).sum()


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
    """The method as the trainer, the exporter and the calibration see it.

    Args:
        teacher: Channels of the teacher's maps at strides 4, 8, 16 and, if there is a fourth, 32.
        size: Height and width of the frames.
        detach: Whether the head's loss stays out of the student (the student models, the head decides).
        dims: Dimensions of the residual statistics.

    Attributes:
        weights: Share of each anomaly map in the fused one: the head's, then the residuals' at stride 16 (and 32).
            The head finds what synthesis foresaw, the residuals also what it did not.
        scales: Unit of each map, None where it is to be measured. The head's is its own decision boundary: on good
            parts it is next to nothing, which measures nothing.
    """

    def __init__(self, teacher: Sequence[int], size: tuple[int, int], *, detach: bool = True, dims: int = 112) -> None:
        super().__init__()
        self.student = Student(teacher)
        self.head = MultiPerceptionHead(teacher)
        self.detach = detach
        self.statistics = nn.ModuleList(
            ResidualStatistics(width, size[0] // stride, size[1] // stride, dims)
            for width, stride in zip(teacher[2:], (16, 32), strict=False)
        )
        self.weights = (0.5, *(1.0 for _ in self.statistics))
        self.scales = (0.5, *(None for _ in self.statistics))

    def losses(self, clean: Maps, twin: Maps, mask: Tensor) -> dict[str, Tensor]:
        """The losses of a batch of normal-anomaly pairs; their sum is minimised.

        Args:
            clean: Teacher maps of the good originals.
            twin: Teacher maps of their defective twins.
            mask: Where the twins are defective, ``(n, 1, H, W)``, 0 or 1.
        """
        normal, abnormal = self.student(twin)
        seen = ([f.detach() for f in maps] for maps in (normal, abnormal)) if self.detach else (normal, abnormal)
        logits = self.head(twin, *seen)
        return {
            "ngm": ngm_loss(normal, clean),
            "aim": aim_loss(abnormal, twin, mask),
            "seg": segmentation_loss(logits, mask),
        }

    def observe(self, teacher: Maps) -> None:
        """Show the trained method teacher maps of good parts; :meth:`settle` follows the last ones."""
        normal, _ = self.student(teacher)
        for statistics, residual in zip(self.statistics, residuals(normal, teacher), strict=True):
            statistics.observe(residual)  # type: ignore[operator]

    def settle(self) -> None:
        """Fit the residual statistics."""
        for statistics in self.statistics:
            statistics.fit()  # type: ignore[operator]

    def maps(self, teacher: Maps) -> Tensor:
        """One anomaly map for each of ``weights``, ``(n, k, H/4, W/4)``, greater where less normal."""
        normal, abnormal = self.student(teacher)
        maps = [torch.sigmoid(self.head(teacher, normal, abnormal))]
        for statistics, residual in zip(self.statistics, residuals(normal, teacher), strict=True):
            distance = statistics(residual)
            maps.append(F.interpolate(distance, size=teacher[0].shape[2:], mode="bilinear", align_corners=False))
        return torch.cat(maps, 1)


def residuals(normal: Maps, teacher: Maps) -> Maps:
    """Teacher minus normality features, both of unit length, at strides 16 (and 32)."""
    return [F.normalize(t, dim=1) - F.normalize(n, dim=1) for n, t in zip(normal[2:], teacher[2:], strict=True)]
