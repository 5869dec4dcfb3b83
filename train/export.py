"""From a trained method to a bundle: fusion of its maps, one graph from uint8 to score and heatmap, a threshold.

Everything here is decided on held-out images of good parts; no test image is ever seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.bundle import OutputSpec, Parity, Threshold
from engines.frames import Pixels
from train.teacher import Teacher

PARITY_FRAMES: Final = 8
SIGMA: Final = 1.0
"""Width of the Gaussian that smooths the map, in cells of four pixels."""
HEADROOM: Final = 60.0
"""The heatmap's range above the least value, in units of a typical good part's peak above the mean."""


@dataclass(frozen=True)
class Fusion:
    """How a method's maps become one: each is shifted and scaled by what held-out good parts show.

    Attributes:
        offset: Mean of each map over good parts.
        scale: Unit of each map: typical peak (median over good parts) above that mean, unless the method gives it.
        weight: Share of each map.
    """

    offset: tuple[float, ...]
    scale: tuple[float, ...]
    weight: tuple[float, ...]


class Detector(nn.Module):
    """The whole engine as one module: uint8 frames in, score and uint8 heatmap out.

    Args:
        teacher: The frozen teacher.
        method: The trained method.
        fusion: How to add its maps; None returns them as they are.
        output: Range of the heatmap.
    """

    offset: Tensor
    factor: Tensor
    kernel: Tensor

    def __init__(self, teacher: Teacher, method: nn.Module, fusion: Fusion, output: OutputSpec) -> None:
        super().__init__()
        self.teacher, self.method, self.output = teacher, method, output
        factor = torch.tensor(fusion.weight) / torch.tensor(fusion.scale)
        self.register_buffer("factor", factor.view(1, -1, 1, 1))
        self.register_buffer("offset", torch.tensor(fusion.offset).view(1, -1, 1, 1))
        self.register_buffer("kernel", gaussian(SIGMA))

    def value(self, frames: Tensor) -> Tensor:
        """The fused, smoothed anomaly map ``(n, 1, h, w)``."""
        maps: Tensor = self.method.maps(self.teacher(frames))  # type: ignore[operator]
        fused = ((maps - self.offset) * self.factor).sum(1, keepdim=True)
        return smooth(fused, self.kernel)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores ``(n,)`` and heatmaps uint8 ``(n, h, w)``."""
        value, span = self.value(frames), self.output.high - self.output.low
        unit = (torch.log1p((value - self.output.low).clamp(min=0)) / math.log1p(span)).clamp(max=1)
        return value.amax((1, 2, 3)), (unit.squeeze(1) * 255 + 0.5).to(torch.uint8)


def gaussian(sigma: float) -> Tensor:
    """A row of a normalised Gaussian kernel, ``(1, 1, 1, 2 * ceil(3 sigma) + 1)``."""
    radius = math.ceil(3 * sigma)
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    row = torch.exp(-(x**2) / (2 * sigma**2))
    return (row / row.sum()).view(1, 1, 1, -1)


def smooth(maps: Tensor, kernel: Tensor) -> Tensor:
    """Smooth ``(n, 1, h, w)`` by a row kernel in both directions, edges repeated."""
    radius = kernel.shape[-1] // 2
    padded = F.pad(maps, (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel), kernel.transpose(2, 3))


@torch.no_grad()
def run(module: Any, frames: Pixels, batch: int = 8) -> list[Tensor]:
    """Run ``module`` over frames in batches and join what it returns, on the CPU."""
    outputs = []
    device = next(iter(module.buffers())).device if isinstance(module, nn.Module) else torch.device("cpu")
    for at in range(0, len(frames), batch):
        result = module(torch.from_numpy(frames[at : at + batch]).to(device))
        outputs.append([r.cpu() for r in (result if isinstance(result, tuple) else (result,))])
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]


def fit_fusion(teacher: Teacher, method: nn.Module, good: Pixels) -> tuple[Fusion, OutputSpec]:
    """Choose fusion and heatmap range on held-out good frames, uint8 ``(n, H, W, C)``.

    Each map is brought to where a typical good part's peak is 1 (or to the unit that the method gives), then
    weighed as the method says: without defects to look at there is no reason to choose weights by the data.
    """
    method.eval()
    weights = torch.tensor(method.weights)
    weights = weights / weights.sum()
    count = len(weights)
    neutral = Fusion((0.0,) * count, (1.0,) * count, (1.0,) * count)

    class _Raw(Detector):
        def forward(self, frames: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            return (self.method.maps(self.teacher(frames)),)  # type: ignore[operator]

    (maps,) = run(_Raw(teacher, method, neutral, OutputSpec(1, 1, 0.0, 1.0)), good)
    smoothed = smooth(maps.flatten(0, 1).unsqueeze(1), gaussian(SIGMA)).view_as(maps)
    offset = smoothed.mean((0, 2, 3))
    measured = (smoothed.amax((2, 3)).median(0).values - offset).clamp(min=1e-3)
    given: tuple[float | None, ...] = method.scales  # type: ignore[assignment]
    scale = torch.tensor([m if g is None else g for m, g in zip(measured.tolist(), given, strict=True)])
    fusion = Fusion(tuple(offset.tolist()), tuple(scale.tolist()), tuple(weights.tolist()))
    fused = ((smoothed - offset.view(1, -1, 1, 1)) * (weights / scale).view(1, -1, 1, 1)).sum(1)
    low = float(fused.flatten()[:: max(1, fused.numel() // 100_000)].quantile(0.01))
    return fusion, OutputSpec(maps.shape[2], maps.shape[3], low, low + HEADROOM)


def fit_threshold(scores: NDArray[np.float32], false_rejects: float) -> Threshold:
    """The threshold that at most a share ``false_rejects`` of good parts exceeds, from held-out good parts.

    The k-th smallest of n scores, k = ceil((n + 1)(1 - share)), is exceeded by a new good part with at most
    that probability (split conformal). Where n is too small for the share, the largest score is taken and the
    statement says what it is worth.
    """
    count = len(scores)
    rank = math.ceil((count + 1) * (1 - false_rejects))
    supported = rank <= count
    value = float(np.sort(scores)[min(rank, count) - 1])
    needed = math.ceil(1 / false_rejects) - 1 if false_rejects else 0
    if supported:
        text = (
            f"A new good part is rejected with probability at most {false_rejects:.3g} ({count} held-out good parts)."
        )
    else:
        margin = 0.25 * float(np.std(scores))
        value += margin
        text = (
            f"{count} held-out good parts cannot support a false-reject rate of {false_rejects:.3g}: {needed} are"
            f" needed. The threshold is their largest score plus {margin:.3g}; without that margin a new good part"
            f" is rejected with probability at most {1 / (count + 1):.3g}."
        )
    return Threshold(value=value, false_reject_rate=false_rejects, samples=count, statement=text)


def parity_frames(good: Pixels, twins: Pixels, detector: Detector) -> Parity:
    """Frames, good and synthetic defective ones, with the reference's results on them."""
    half = PARITY_FRAMES // 2
    frames = np.concatenate([good[:half], twins[:half]])
    scores, heatmaps = run(detector, frames)
    return Parity(frames, scores.numpy(), heatmaps.numpy())
