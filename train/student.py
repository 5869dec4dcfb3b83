"""DMDD's decoupled student: a shared trunk, then normality and abnormality features at every scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from train.layers import Ascend, InvertedResidual, conv_bn, enlarge

Maps = list[Tensor]
TrunkKind = Literal["reverse", "encoder"]
DecoupleKind = Literal["split", "branches"]

WIDTHS: Final = (32, 64, 112, 160)
"""Channels of the initial student features at strides 4, 8, 16 and 32."""
BOTTLENECK: Final = 192


class Pyramid(nn.Module):
    """From a bottleneck at stride 16 to initial student features at every scale, top-down and without skips.

    The paper names a "Pyramid Modeling Network" in a figure's title; what it shows is not known to us.

    Args:
        scales: Number of the teacher's maps, 3 or 4.
    """

    def __init__(self, scales: int) -> None:
        super().__init__()
        self.down4 = nn.Sequential(
            *(InvertedResidual(BOTTLENECK, WIDTHS[3], stride=2, kernel=5) for _ in range(scales - 3))
        )
        self.deep = scales > 3
        self.up3 = Ascend(BOTTLENECK, WIDTHS[2], scale=1)
        self.up2 = Ascend(WIDTHS[2], WIDTHS[1])
        self.up1 = Ascend(WIDTHS[1], WIDTHS[0])

    def forward(self, x: Tensor) -> Maps:
        """Map ``(n, BOTTLENECK, H/16, W/16)`` to maps with ``WIDTHS`` channels at strides 4, 8, 16 (and 32)."""
        s3 = self.up3(x)
        s2 = self.up2(s3)
        return [self.up1(s2), s2, s3, *([self.down4(x)] if self.deep else [])]


class ReverseTrunk(nn.Module):
    """Teacher maps -> one bottleneck at stride 16 -> a pyramid of initial student features.

    There is no skip connection past the bottleneck: what it has not learned from pairs of good and defective
    images cannot pass it (the reverse distillation of RD4AD, in small).

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
        self.pyramid = Pyramid(len(teacher))

    def forward(self, images: Tensor, teacher: Maps) -> Maps:  # noqa: ARG002 - every trunk takes both
        """Return initial student features with ``WIDTHS`` channels, one map for each of the teacher's."""
        low, mid, high, *deep = teacher
        seen = [self.down2(torch.cat([self.down1(low), mid], 1)), high, *(enlarge(self.deep(d)) for d in deep)]
        maps: Maps = self.pyramid(self.bottleneck(self.merge(torch.cat(seen, 1))))
        return maps


class EncoderTrunk(nn.Module):
    """Pixels -> an encoder of its own, trained from scratch -> the same pyramid (after DeSTSeg).

    It reads the image a second time, and so costs more than the reverse trunk.

    Args:
        teacher: Channels of the teacher's maps; only their number matters here.
    """

    def __init__(self, teacher: Sequence[int]) -> None:
        super().__init__()
        steps: list[nn.Module] = [conv_bn(3, 16, 3, 2)]
        inputs = 16
        for outputs, count in ((32, 2), (64, 2), (BOTTLENECK, 3)):
            for index in range(count):
                steps.append(InvertedResidual(inputs, outputs, stride=1 + (index == 0), kernel=5, expansion=3))
                inputs = outputs
        self.encoder = nn.Sequential(*steps)
        self.pyramid = Pyramid(len(teacher))

    def forward(self, images: Tensor, teacher: Maps) -> Maps:  # noqa: ARG002 - every trunk takes both
        """Return initial student features with ``WIDTHS`` channels, one map for each of the teacher's."""
        maps: Maps = self.pyramid(self.encoder(images))
        return maps


class Decouple(nn.Module):
    """Initial features -> normality and abnormality features, each refined to the teacher's width.

    Args:
        width: Channels of the initial features.
        teacher: Channels of the teacher's map at this scale.
        kind: ``split``: a 1x1 convolution doubles the channels, which are then divided between the branches (a
            third party's summary of the paper). ``branches``: two convolutions, one for each branch.
    """

    def __init__(self, width: int, teacher: int, kind: DecoupleKind) -> None:
        super().__init__()
        self.expand = conv_bn(width, 2 * width) if kind == "split" else None
        self.enter = nn.ModuleList(conv_bn(width, width, 3) for _ in range(0 if kind == "split" else 2))
        self.normality = self._branch(width, teacher)
        self.abnormality = self._branch(width, teacher)

    @staticmethod
    def _branch(width: int, teacher: int) -> nn.Sequential:
        return nn.Sequential(conv_bn(width, width, 3, groups=width), nn.Conv2d(width, teacher, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return normality and abnormality features, each shaped as the teacher's map at this scale."""
        if self.expand is None:
            normal, abnormal = (enter(x) for enter in self.enter)
        else:
            normal, abnormal = self.expand(x).chunk(2, dim=1)
        return self.normality(normal), self.abnormality(abnormal)


class Student(nn.Module):
    """The decoupled student: a shared trunk, then a dual branch at every scale.

    Args:
        teacher: Channels of the teacher's maps at strides 4, 8, 16 and, if there is a fourth, 32.
        trunk: ``reverse`` or ``encoder``.
        decouple: ``split`` or ``branches``.
    """

    def __init__(self, teacher: Sequence[int], trunk: TrunkKind = "reverse", decouple: DecoupleKind = "split") -> None:
        super().__init__()
        self.trunk = ReverseTrunk(teacher) if trunk == "reverse" else EncoderTrunk(teacher)
        self.decouple = nn.ModuleList(Decouple(w, t, decouple) for w, t in zip(WIDTHS, teacher, strict=False))

    def forward(self, images: Tensor, teacher: Maps) -> tuple[Maps, Maps]:
        """Return normality maps and abnormality maps, shaped as the teacher's.

        Args:
            images: As the teacher saw them: normalised, ``(n, 3, H, W)``.
            teacher: Its maps of them at strides 4, 8, 16 (and 32).
        """
        initial = self.trunk(images, teacher)
        pairs = [split(s) for split, s in zip(self.decouple, initial, strict=True)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def cosine_distances(features: Maps, teacher: Maps) -> Maps:
    """Cosine distance per position and scale, ``(n, 1, h_k, w_k)``."""
    return [1 - F.cosine_similarity(f, t, dim=1, eps=1e-6).unsqueeze(1) for f, t in zip(features, teacher, strict=True)]
