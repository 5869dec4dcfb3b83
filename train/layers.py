"""Small building blocks that the methods share: convolutions, attentions, smoothing, masks at a map's scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

CELL: Final = 4
"""Pixels along a side of a cell of the anomaly map that an engine gives."""


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
        out: Tensor = self.refine(enlarge(x) if self.scale > 1 else x)
        return out


class ChannelAttention(nn.Module):
    """Squeeze-and-excitation over mean and maximum (CBAM, ECCV 2018)."""

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
    """A 7x7 convolution over the channels' mean and maximum (CBAM, ECCV 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the positions of ``x``."""
        return x * torch.sigmoid(self.gate(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)))


def enlarge(x: Tensor) -> Tensor:
    """Double height and width, bilinearly."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bring ``(n, c, h, w)`` to ``size``, bilinearly."""
    size = int(size[0]), int(size[1])
    return x if tuple(x.shape[2:]) == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def at_scale(mask: Tensor, size: Sequence[int], share: float = 0.25) -> Tensor:
    """Reduce a mask ``(n, 1, H, W)`` to ``size``: a cell is anomalous where ``share`` of it is."""
    return (F.adaptive_avg_pool2d(mask, (size[0], size[1])) >= share).to(mask.dtype)


def gaussian(sigma: float) -> Tensor:
    """A row of a normalised Gaussian kernel, ``(1, 1, 1, 2 * ceil(3 sigma) + 1)``."""
    radius = math.ceil(3 * sigma)
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    row = torch.exp(-(x**2) / (2 * sigma**2))
    return (row / row.sum()).view(1, 1, 1, -1)


def smooth(maps: Tensor, kernel: Tensor) -> Tensor:
    """Smooth each of ``(n, c, h, w)`` by a row kernel in both directions, edges repeated."""
    channels, height, width = maps.shape[1:]
    radius = kernel.shape[-1] // 2
    # As images of one channel: OpenVINO 2026.4 never returns from a grouped 1x7 convolution in bfloat16.
    planes = maps.reshape(-1, 1, height, width)
    padded = F.pad(planes, (radius, radius, radius, radius), mode="replicate")
    smoothed = F.conv2d(F.conv2d(padded, kernel), kernel.transpose(2, 3))
    return smoothed.reshape(-1, channels, height, width)
