"""Fusing distance maps into one: a small network over each position's distances and their surroundings.

Trained on distances of fresh synthetic defects and of good parts that the distances were not fitted to. It sees
distances, never features, so that it cannot learn what a synthetic defect looks like, only how unusual is too
unusual, in which map, against which surroundings. Ours; the paper fuses its maps in the head.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from train.errors import TrainingError
from train.layers import at_scale, gaussian, resized, smooth

SURROUNDINGS: Final = (1.5, 4.0)
"""Widths, in cells, of the Gaussians through which a position sees its surroundings."""
HIDDEN: Final = 32
SAMPLES: Final = 60_000
"""Positions drawn of each kind: defective, good beside a defect, good on a good part."""
FAR: Final = (5.0, 15.0)
"""Deviations by which whole images are off that have nothing to do with good ones: dark, noisy, of another product."""
STEPS: Final = 600
RATE: Final = 5e-3
DECAY: Final = 0.1
JITTER: Final = 0.3
"""Standard deviation of the noise on standardised distances: synthetic defects are no model of real ones."""
FLOOR: Final = 0.05


class DistanceFusion(nn.Module):
    """Distance maps in, one logit a position out.

    Args:
        count: Number of distance maps.
        seed: Of sampling; the initial weights come from torch's own generator.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, count: int, seed: int = 0) -> None:
        super().__init__()
        channels = count * (1 + len(SURROUNDINGS))
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("deviation", torch.ones(1, channels, 1, 1))
        for index, sigma in enumerate(SURROUNDINGS):
            self.register_buffer(f"kernel{index}", gaussian(sigma), persistent=False)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, HIDDEN, 1), nn.ReLU(), nn.Conv2d(HIDDEN, HIDDEN, 1), nn.ReLU(), nn.Conv2d(HIDDEN, 1, 1)
        )
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: dict[str, list[Tensor]] = {"defective": [], "beside": [], "good": []}

    def forward(self, distances: list[Tensor]) -> Tensor:
        """Map distances, each ``(n, 1, h, w)``, to logits ``(n, 1, H, W)`` at the size of the first."""
        logits: Tensor = self.layers((self.context(distances) - self.mean) / self.deviation)
        return logits

    def context(self, distances: list[Tensor]) -> Tensor:
        """Logarithms of the distances and of their surroundings, ``(n, channels, H, W)``."""
        size = distances[0].shape[2:]
        logs = torch.cat([resized(d, size) for d in distances], 1).clamp(min=FLOOR).log()
        kernels = [getattr(self, f"kernel{index}") for index in range(len(SURROUNDINGS))]
        return torch.cat([logs, *(smooth(logs, kernel) for kernel in kernels)], 1)

    def observe(self, distances: list[Tensor], mask: Tensor | None = None, share: float = 1.0) -> None:
        """Draw a random ``share`` of positions from good parts, or from twins with a ``mask`` ``(n, 1, H, W)``."""
        context = self.context(distances).permute(0, 2, 3, 1)
        if mask is None:
            self._draw("good", context.flatten(0, 2), share)
            return
        defective = at_scale(mask, context.shape[1:3])
        near = F.max_pool2d((F.adaptive_max_pool2d(mask, context.shape[1:3])), 5, 1, 2)
        self._draw("defective", context[defective[:, 0] > 0], 1.0)
        self._draw("beside", context[near[:, 0] == 0], share)

    def _draw(self, kind: str, rows: Tensor, share: float) -> None:
        keep = torch.rand(len(rows), generator=self._generator) < share
        self._drawn[kind].append(rows.cpu()[keep])

    def fit(self) -> float:
        """Learn from what was observed; return the mean loss of the last steps.

        Raises:
            TrainingError: if no position of a good part was observed, or none of a defect.
        """
        none = torch.zeros(0, self.mean.shape[1])
        kinds = {kind: torch.cat([none, *rows]) for kind, rows in self._drawn.items()}
        if not len(kinds["defective"]):
            msg = "no synthetic defect fills a quarter of a cell of the map: check the foreground, or use a larger size"
            raise TrainingError(msg)
        self.standardise(kinds["good"])
        # Defects that fill the image leave nothing beside them.
        beside = kinds["beside"] if len(kinds["beside"]) else kinds["good"]
        rows = torch.cat([self._sample(rows) for rows in (kinds["defective"], kinds["good"], beside)])
        truth = (torch.arange(len(rows)) < SAMPLES).float()
        rows = (rows - self.mean.flatten().cpu()) / self.deviation.flatten().cpu()
        far = self._far_out(rows[truth == 0])
        rows, truth = torch.cat([rows, far]), torch.cat([truth, torch.ones(len(far))])
        return self._descend(rows[:, :, None, None], truth)

    def _far_out(self, good: Tensor) -> Tensor:
        """Good positions ``(rows, channels)``, moved away from what is good in every map and all around at once.

        No synthetic defect looks like a covered lens. Without these the network may take it for good.
        """
        chosen = good[torch.randint(len(good), (SAMPLES // 10,), generator=self._generator)]
        low, high = FAR
        off = low + (high - low) * torch.rand(len(chosen), 1, generator=self._generator)
        deviation = self.deviation.flatten().cpu()
        own = deviation[: len(deviation) // (1 + len(SURROUNDINGS))]
        return chosen + off * own.repeat(1 + len(SURROUNDINGS)) / deviation  # surroundings move as far as the position

    def standardise(self, good: Tensor) -> None:
        """Measure mean and deviation of contexts ``(rows, channels)`` of good parts.

        Raises:
            TrainingError: if there are fewer than two.
        """
        if len(good) < 2:
            msg = f"{len(good)} positions of good parts are too few to measure distances: give more good images"
            raise TrainingError(msg)
        self.mean.copy_(good.mean(0).view_as(self.mean))
        self.deviation.copy_(good.std(0).clamp(min=1e-3).view_as(self.deviation))

    def release(self) -> None:
        """Forget what was observed."""
        self._drawn = {kind: [] for kind in self._drawn}

    def _sample(self, rows: Tensor) -> Tensor:
        return rows[torch.randint(len(rows), (SAMPLES,), generator=self._generator)]

    @torch.enable_grad()
    def _descend(self, rows: Tensor, truth: Tensor) -> float:
        layers, generator = self.layers, self._generator
        device = self.mean.device
        optimizer = torch.optim.AdamW(layers.parameters(), RATE, weight_decay=DECAY)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
        smoothed = 0.0
        for step in range(STEPS):
            chosen = torch.randint(len(rows), (4096,), generator=generator)
            noise = JITTER * torch.randn(4096, rows.shape[1], 1, 1, generator=generator)
            logits = layers((rows[chosen] + noise).to(device)).flatten()
            loss = F.binary_cross_entropy_with_logits(logits, truth[chosen].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            cycle.step()
            smoothed = loss.item() if step == 0 else 0.95 * smoothed + 0.05 * loss.item()
        return smoothed
