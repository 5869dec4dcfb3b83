"""From a trained method to one graph: uint8 pixels in, score and heatmap out, whole images or tiles of them.

What is measured here is measured on held-out images of good parts; no test image is ever seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from engines.bundle import OutputSpec, Parity
from engines.frames import Pixels
from train.layers import CELL, gaussian, smooth
from train.teacher import Teacher
from train.tiles import Tiling

PARITY_FRAMES: Final = 8
SIGMA: Final = 1.0
"""Width of the Gaussian that smooths the map, in cells of four pixels."""


@dataclass(frozen=True)
class Scales:
    """How a method's maps are brought to one unit: by what held-out good parts show.

    Attributes:
        offset: Mean of each map over good parts.
        unit: Typical peak of each map (median over good parts) above that mean, unless the method gives it.
        low: Least value of the heatmap's range, in these units.
    """

    offset: tuple[float, ...]
    unit: tuple[float, ...]
    low: float = 0.0


class Detector(nn.Module):
    """The whole engine as one module: uint8 frames in, score and uint8 heatmap out.

    Args:
        teacher: The frozen teacher.
        method: The trained method.
        scales: Units of its maps.
        tiling: How frames are cut; one tile for whole frames.
    """

    offset: Tensor
    map_factor: Tensor
    score_factor: Tensor
    kernel: Tensor

    def __init__(self, teacher: Teacher, method: nn.Module, scales: Scales, tiling: Tiling) -> None:
        super().__init__()
        self.teacher, self.method, self.tiling = teacher, method, tiling
        unit = torch.tensor(scales.unit)
        for name, weights in (("map_factor", method.weights), ("score_factor", method.score_weights)):
            share = torch.tensor(weights) / torch.tensor(weights).sum()
            self.register_buffer(name, (share / unit).view(1, -1, 1, 1))
        self.register_buffer("offset", torch.tensor(scales.offset).view(1, -1, 1, 1))
        self.register_buffer("kernel", gaussian(SIGMA))
        headroom: Any = method.headroom
        self.output = OutputSpec(tiling.height // CELL, tiling.width // CELL, scales.low, scales.low + headroom)

    def values(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """The map that is shown and the map whose maximum is the score, both smoothed, ``(n, 1, H/4, W/4)``."""
        images = self.teacher.normalised(self.tiling.cut(frames))
        maps: Tensor = self.method.maps(images, self.teacher.features(images))  # type: ignore[operator]
        maps = smooth(maps, self.kernel) - self.offset
        shown, judged = ((maps * f).sum(1, keepdim=True) for f in (self.map_factor, self.score_factor))
        return self.tiling.stitch(shown), self.tiling.stitch(judged)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores ``(n,)`` and heatmaps uint8 ``(n, h, w)``."""
        shown, judged = self.values(frames)
        span = self.output.high - self.output.low
        unit = (torch.log1p((shown - self.output.low).clamp(min=0)) / math.log1p(span)).clamp(max=1)
        return judged.amax((1, 2, 3)), (unit.squeeze(1) * 255 + 0.5).to(torch.uint8)


@torch.no_grad()
def run(module: Any, frames: Pixels, batch: int = 8) -> list[Tensor]:
    """Run ``module`` over frames in batches and join what it returns, on the CPU."""
    outputs = []
    device = next(iter(module.buffers())).device if isinstance(module, nn.Module) else torch.device("cpu")
    for at in range(0, len(frames), batch):
        result = module(torch.from_numpy(frames[at : at + batch]).to(device))
        outputs.append([r.cpu() for r in (result if isinstance(result, tuple) else (result,))])
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]


def fit_scales(teacher: Teacher, method: nn.Module, good: Pixels, tiling: Tiling) -> Scales:
    """Measure the units of a method's maps on held-out good frames, uint8 ``(n, H, W, C)``.

    Each map is brought to where a typical good part's peak is 1, or to the unit that the method gives; the weights
    are the method's own: without defects to look at there is no reason to choose them by the data.
    """
    method.eval()
    kernel = gaussian(SIGMA)

    def raw(frames: Tensor) -> Tensor:
        images = teacher.normalised(frames)
        maps: Tensor = method.maps(images, teacher.features(images))  # type: ignore[operator]
        return smooth(maps, kernel)

    maps = torch.cat(run(lambda frames: raw(tiling.cut(frames)), good))
    offset = maps.mean((0, 2, 3))
    measured = (maps.amax((2, 3)).median(0).values - offset).clamp(min=1e-3)
    given: tuple[float | None, ...] = method.scales  # type: ignore[assignment]
    unit = torch.tensor([m if g is None else g for m, g in zip(measured.tolist(), given, strict=True)])
    share = torch.tensor(method.weights) / torch.tensor(method.weights).sum()
    shown = ((maps - offset.view(1, -1, 1, 1)) * (share / unit).view(1, -1, 1, 1)).sum(1)
    low = float(shown.flatten()[:: max(1, shown.numel() // 100_000)].quantile(0.01))
    return Scales(tuple(offset.tolist()), tuple(unit.tolist()), low)


def parity_frames(good: Pixels, twins: Pixels, detector: Detector) -> Parity:
    """Frames, good and synthetic defective ones, with the reference's results on them."""
    half = PARITY_FRAMES // 2
    frames = np.concatenate([good[:half], twins[:half]])
    scores, heatmaps = run(detector, frames)
    return Parity(frames, scores.numpy(), heatmaps.numpy())
