"""What the student's error looks like on good parts, place by place: a Gaussian at every position.

The residual between teacher and normality features is not equally large, nor equally shaped, everywhere: at an
edge or in a brushed surface it is large on good parts too. Its Mahalanobis distance says how unusual it is
*there* (the idea of PaDiM, Defard et al. 2021, applied to the residual of a distillation; ours, not DMDD's).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

SHRINK: Final = 30.0
"""Weight of the covariance over all positions, in images, beside that of one position: few images, or parts
that are not aligned, lean on it."""
RIDGE: Final = 0.02


class ResidualStatistics(nn.Module):
    """Mahalanobis distance of a residual map from its distribution over good parts.

    Args:
        channels: Channels of the residual.
        height, width: Its size.
        dims: Dimensions that are kept, by a fixed random rotation, where there are more channels.
    """

    projection: Tensor
    mean: Tensor
    whitening: Tensor
    count: Tensor

    def __init__(self, channels: int, height: int, width: int, dims: int = 112) -> None:
        super().__init__()
        kept = min(dims, channels)
        generator = torch.Generator().manual_seed(channels)
        rotation = torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q
        self.register_buffer("projection", torch.eye(channels) if kept == channels else rotation[:, :kept].contiguous())
        self.register_buffer("mean", torch.zeros(height * width, 1, kept))
        self.register_buffer("whitening", torch.eye(kept).repeat(height * width, 1, 1))
        self.register_buffer("count", torch.zeros(()))
        self.size = height, width
        self._sum = torch.zeros(height * width, kept)
        self._squares = torch.zeros(height * width, kept, kept)

    def forward(self, residual: Tensor) -> Tensor:
        """Map residuals ``(n, channels, h, w)`` to distances ``(n, 1, h, w)``, about 1 on good parts."""
        centred = self._places(residual) - self.mean
        squared = torch.matmul(centred, self.whitening).square().mean(2)
        return squared.transpose(0, 1).reshape(-1, 1, *self.size).sqrt()

    def observe(self, residual: Tensor) -> None:
        """Take residuals of good parts into account."""
        places = self._places(residual).cpu()
        self._sum += places.sum(1)
        self._squares += torch.matmul(places.transpose(1, 2), places)
        self.count += residual.shape[0]

    def fit(self) -> None:
        """Settle mean and whitening from what was observed."""
        count = float(self.count)
        mean = self._sum / count
        covariance = self._squares / count - mean.unsqueeze(2) * mean.unsqueeze(1)
        everywhere = covariance.mean(0)
        covariance = (count * covariance + SHRINK * everywhere) / (count + SHRINK)
        ridge = RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
        covariance += ridge.view(-1, 1, 1) * torch.eye(covariance.shape[-1])
        # L L^T = inverse covariance, so that |r L|^2 is the Mahalanobis distance squared.
        whitening = torch.linalg.cholesky(torch.linalg.inv(covariance.double())).float()
        self.mean.copy_(mean.unsqueeze(1))
        self.whitening.copy_(whitening)

    def _places(self, residual: Tensor) -> Tensor:
        """Bring ``(n, c, h, w)`` into ``(h w, n, dims)``."""
        return torch.matmul(residual.flatten(2).permute(2, 0, 1), self.projection)
