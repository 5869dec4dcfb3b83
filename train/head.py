"""DMDD's multi-perception segmentation head: several receptive fields and attentions over anomaly maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from train.layers import ChannelAttention, SpatialAttention, conv_bn, resized

Maps = list[Tensor]
Evidence = Literal["products", "maps"]


class MultiPerceptionHead(nn.Module):
    """Fuses anomaly maps of all scales and both branches through several receptive fields and attentions.

    Takes, per scale, both cosine distances and, with ``products``, reduced to a few channels, the L2-normalised
    teacher features and their products with those of both branches; returns logits at stride 4.

    Args:
        teacher: Channels of the teacher's maps.
        evidence: ``products`` or ``maps`` alone, which cannot over-fit to the look of synthetic defects.
        width: Channels inside.
        reduced: Channels to which the products of a scale are reduced.
    """

    def __init__(
        self, teacher: Sequence[int], evidence: Evidence = "products", width: int = 32, reduced: int = 16
    ) -> None:
        super().__init__()
        products = evidence == "products"
        self.reduce = nn.ModuleList(conv_bn(3 * t, reduced) for t in teacher) if products else None
        self.enter = conv_bn(len(teacher) * (2 + reduced * products), width)
        self.fields = nn.ModuleList(_field(width, rate) for rate in (1, 2, 4, 8))
        self.fuse = conv_bn(width + 2 * width, width)
        self.attend = nn.Sequential(ChannelAttention(width), SpatialAttention())
        self.exit = nn.Sequential(
            conv_bn(width, width, 3, groups=width), conv_bn(width, width // 2), nn.Conv2d(width // 2, 1, 1)
        )

    def forward(self, teacher: Maps, normal: Maps, abnormal: Maps) -> Tensor:
        """Return anomaly logits ``(n, 1, H/4, W/4)``."""
        size = teacher[0].shape[2:]
        scales = zip(teacher, normal, abnormal, strict=True)
        x = self.enter(torch.cat([resized(self._evidence(k, *scale), size) for k, scale in enumerate(scales)], 1))
        x = self.fuse(torch.cat([x, *(field(x) for field in self.fields)], 1))
        logits: Tensor = self.exit(self.attend(x))
        return logits

    def _evidence(self, scale: int, teacher: Tensor, normal: Tensor, abnormal: Tensor) -> Tensor:
        """What is seen of one scale: two cosine distances, and the reduced products."""
        unit = F.normalize(teacher, dim=1)
        with_normal, with_abnormal = unit * F.normalize(normal, dim=1), unit * F.normalize(abnormal, dim=1)
        distances = torch.cat([1 - with_normal.sum(1, keepdim=True), 1 - with_abnormal.sum(1, keepdim=True)], 1)
        if self.reduce is None:
            return distances
        # Unit vectors have elements of the order of 1 / sqrt(channels): bring them back to about 1.
        products = torch.cat([unit, with_normal, with_abnormal], 1) * teacher.shape[1] ** 0.5
        return torch.cat([self.reduce[scale](products), distances], 1)


def _field(width: int, rate: int) -> nn.Sequential:
    """A separable convolution of one dilation: one receptive field."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=rate, dilation=rate, groups=width, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        conv_bn(width, width // 2),
    )
