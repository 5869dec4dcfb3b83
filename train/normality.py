"""What good parts look like to the teacher, without a gradient step: statistics at every place, and prototypes.

Both are ours, not DMDD's: Gaussians at every place after PaDiM (Defard et al. 2021), prototypes after PatchCore
(Roth et al. 2022), but some thousand in place of a tenth of all patches, so that an engine stays small and fast. The
first knows *where* something is unusual and needs parts that lie alike; the second does not care where, and takes
parts in any orientation that it has seen. A Gaussian of the whole image's features (Rippel et al. 2020) is the first
with a single place.

Both can be fitted without a fold of the images, so that what they say of that fold's images is what they will say
of parts that they have not seen.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom
from torch import Tensor, nn

from train.errors import TrainingError
from train.layers import resized

SHRINK: Final = 10.0
"""Weight of the covariance over all places, in images, beside that of one place: few images, or parts that are not
aligned, lean on it."""
RIDGE: Final = 0.02
FLOOR: Final = 0.05
"""Least distance of a whole image, before its logarithm is taken."""
LEAST_DEVIATION: Final = 0.02
"""Least standard deviation of those logarithms: images that are all the same tell nothing of what is usual."""
SCARCE: Final = 300
"""Images of which the Gaussian of whole images is trusted by half."""


def patches(maps: list[Tensor]) -> Tensor:
    """Join maps at the first one's size, each averaged over 3 x 3 cells (PatchCore's local patches)."""
    size = maps[0].shape[2:]
    return torch.cat([resized(F.avg_pool2d(m, 3, 1, 1), size) for m in maps], 1)


def units(maps: list[Tensor]) -> Tensor:
    """Join maps at the first one's size, each of unit length at every position."""
    size = maps[0].shape[2:]
    return torch.cat([resized(F.normalize(m, dim=1), size) for m in maps], 1)


def whole(maps: list[Tensor]) -> Tensor:
    """Means and standard deviations of maps over all their positions, ``(n, 2 channels, 1, 1)``."""
    means = [m.mean((2, 3), keepdim=True) for m in maps]
    deviations = [(m - mean).square().mean((2, 3), keepdim=True).sqrt() for m, mean in zip(maps, means, strict=True)]
    return torch.cat(means + deviations, 1)


def block_of(height: int, width: int, most: int = 16) -> int:
    """The least block by which a map is at most ``most`` blocks a side, as far as its sides have a common divisor."""
    common = math.gcd(height, width)
    return next((b for b in range(1, common) if common % b == 0 and max(height, width) <= most * b), common)


class PlaceStatistics(nn.Module):
    """Mahalanobis distance of features from their Gaussian at the same place.

    Args:
        channels: Channels of the features.
        height, width: Size of their map.
        dims: Principal components that are kept, where there are more channels.
        block: Covariances are shared by ``block x block`` places; each has a mean of its own.
        folds: Number of folds that :meth:`fit` can leave out.
    """

    projection: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, channels: int, height: int, width: int, dims: int = 112, block: int = 1, folds: int = 1) -> None:
        super().__init__()
        kept, self.block = min(dims, channels), block
        self._reduces = kept < channels
        self.grid = height // block, width // block
        blocks = self.grid[0] * self.grid[1]
        self.register_buffer("projection", torch.eye(channels)[:, :kept].contiguous())
        self.register_buffer("mean", torch.zeros(kept, height, width))
        # Half floats halve the engine; the error is far below that of a covariance from a few hundred images.
        self.register_buffer("whitening", torch.eye(kept).repeat(blocks, 1, 1).half())
        self._moments = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
        self._count = torch.zeros(folds)
        self._sum = torch.zeros(folds, kept, height, width)
        self._squares = torch.zeros(folds, blocks, kept, kept)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(n, channels, h, w)`` to distances ``(n, 1, h, w)``, about 1 on good parts."""
        centred = self._blocks(self._project(features) - self.mean)
        squared = torch.matmul(centred, self.whitening.float()).square().mean(2)
        (rows, columns), side = self.grid, self.block
        places = squared.reshape(rows, columns, -1, side, side).permute(2, 0, 3, 1, 4)
        return places.reshape(-1, 1, rows * side, columns * side).sqrt()

    def survey(self, features: Tensor) -> None:
        """Look at features of good parts for their principal components, before :meth:`observe`."""
        if not self._reduces:  # all directions are kept: which ones they are makes no difference
            return
        rows = F.pad(features.permute(0, 2, 3, 1).flatten(0, 2), (0, 1), value=1.0)
        self._moments += (rows.T @ rows).cpu().double()

    def orient(self) -> None:
        """Settle the principal components of what was surveyed."""
        if not self._reduces:
            return
        count = self._moments[-1, -1]
        mean = self._moments[-1, :-1] / count
        covariance = self._moments[:-1, :-1] / count - torch.outer(mean, mean)
        _, vectors = torch.linalg.eigh(covariance)
        self.projection.copy_(vectors[:, -self.projection.shape[1] :])

    def observe(self, features: Tensor, fold: int = 0) -> None:
        """Take features of good parts into account, as part of a fold."""
        projected = self._project(features)
        rows = self._blocks(projected)
        self._sum[fold] += projected.sum(0).cpu()
        self._squares[fold] += torch.matmul(rows.transpose(1, 2), rows).cpu()
        self._count[fold] += len(features)

    def fit(self, without: int | None = None) -> None:
        """Settle means and whitening from what was observed, ``without`` a fold if one is named.

        Raises:
            TrainingError: if that leaves nothing.
        """
        chosen = [fold for fold in range(len(self._count)) if fold != without]
        count = float(self._count[chosen].sum())
        if not count:
            raise TrainingError(_nothing_left(without))
        mean = self._sum[chosen].sum(0) / count
        means, places = self._blocks(mean.unsqueeze(0)), self.block**2
        squares = self._squares[chosen].sum(0) / count
        covariance = (squares - torch.matmul(means.transpose(1, 2), means)) / places
        everywhere = covariance.mean(0)
        covariance = (count * covariance + SHRINK * everywhere) / (count + SHRINK)
        ridge = RIDGE * covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
        covariance += ridge.view(-1, 1, 1) * torch.eye(covariance.shape[-1])
        rounding = torch.finfo(squares.dtype).eps * squares.diagonal(dim1=1, dim2=2).amax(1) / places
        whitening = _whitening(covariance.double(), rounding.double().clamp(min=1e-12))
        self.mean.copy_(mean)
        self.whitening.copy_(whitening.clamp(-6e4, 6e4))

    def release(self) -> None:
        """Forget what was observed; what was fitted stays."""
        self._squares = self._sum = self._moments = torch.zeros(0)

    def _project(self, features: Tensor) -> Tensor:
        if not self._reduces:
            return features
        return F.conv2d(features, self.projection.T[:, :, None, None])

    def _blocks(self, features: Tensor) -> Tensor:
        """Bring ``(n, d, h, w)`` into ``(blocks, n block^2, d)``."""
        (rows, columns), side = self.grid, self.block
        split = features.reshape(-1, features.shape[1], rows, side, columns, side)
        places = split.permute(2, 4, 0, 3, 5, 1)
        return places.reshape(rows * columns, -1, features.shape[1])


class WholeStatistics(PlaceStatistics):
    """How unusual an image is as a whole, in standard deviations of good parts that it was not fitted to.

    Args:
        channels: Of the features that :func:`whole` gives.
        folds: Number of folds that :meth:`fit` can leave out.
    """

    center: Tensor
    deviation: Tensor

    def __init__(self, channels: int, folds: int = 1) -> None:
        super().__init__(channels, 1, 1, channels, folds=folds)
        self.register_buffer("center", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))
        self._logs: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(n, channels, 1, 1)`` to ``(n, 1, 1, 1)``, about 0 on good parts."""
        return (self._log(features) - self.center) / self.deviation

    def measure(self, features: Tensor) -> None:
        """Look at good parts of a fold that :meth:`fit` was told to leave out, before :meth:`standardise`."""
        self._logs.append(self._log(features).flatten())

    def standardise(self) -> None:
        """Settle center and deviation from what was measured; of few images, say less."""
        logs = torch.cat(self._logs)
        self.center.copy_(logs.mean())
        trust = len(logs) / (len(logs) + SCARCE)
        self.deviation.copy_(logs.std(correction=0).clamp(min=LEAST_DEVIATION) / trust)

    def release(self) -> None:
        """Forget what was observed; what was fitted stays."""
        super().release()
        self._logs = []

    def _log(self, features: Tensor) -> Tensor:
        return super().forward(features).clamp(min=FLOOR).log()


class Prototypes(nn.Module):
    """Distance of features from the nearest of a number of good ones, wherever those were seen.

    The good ones cover what was seen: each is the farthest from those before (Gonzalez 1985, PatchCore's greedy
    coreset), so that what good parts show rarely is known too. Cluster centres stand where good parts are alike, and
    what is rare is then as far away as a defect.

    Args:
        channels: Channels of the features.
        count: Number of prototypes.
        dims: Principal components that distances are taken over, where there are more channels.
        folds: Number of folds that :meth:`fit` can leave out.
        seed: Of what is drawn.
    """

    projection: Tensor
    centres: Tensor

    def __init__(self, channels: int, count: int = 4096, dims: int = 64, folds: int = 1, seed: int = 0) -> None:
        super().__init__()
        dims = min(dims, channels)
        self.register_buffer("projection", torch.eye(channels)[:dims].contiguous())
        self.register_buffer("centres", torch.zeros(count, dims))
        self._seen: list[list[Tensor]] = [[] for _ in range(folds)]
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, features: Tensor) -> Tensor:
        """Map ``(n, channels, h, w)`` to distances ``(n, 1, h, w)``."""
        projected = F.conv2d(features, self.projection[:, :, None, None])
        # |x - c|^2 as one convolution by the centres.
        cross = F.conv2d(projected, -2 * self.centres[:, :, None, None], self.centres.square().sum(1))
        squared = projected.square().sum(1, keepdim=True) + cross.amin(1, keepdim=True)
        return squared.clamp(min=0).sqrt()

    def observe(self, features: Tensor, fold: int = 0, share: float = 1.0) -> None:
        """Keep a random ``share`` of the patches of good parts, as part of a fold."""
        rows = features.permute(0, 2, 3, 1).flatten(0, 2).cpu()
        keep = torch.rand(len(rows), generator=self._generator) < share
        self._seen[fold].append(rows[keep].half())

    def fit(self, without: int | None = None) -> None:
        """Settle the prototypes from what was observed, ``without`` a fold if one is named.

        Raises:
            TrainingError: if that leaves nothing.
        """
        kept = [row for fold, rows in enumerate(self._seen) if fold != without for row in rows]
        if not sum(map(len, kept)):
            raise TrainingError(_nothing_left(without))
        points = torch.cat(kept).float()
        _, vectors = torch.linalg.eigh(_covariance(points))
        self.projection.copy_(vectors[:, -len(self.projection) :].T)
        points = points @ self.projection.T.cpu()
        first = int(torch.randint(len(points), (), generator=self._generator))
        self.centres.copy_(_cover(points, len(self.centres), first))

    def release(self) -> None:
        """Forget what was observed; what was fitted stays."""
        self._seen = [[] for _ in self._seen]


def _nothing_left(without: int | None) -> str:
    left = "" if without is None else f" without fold {without}"
    return f"there is no good part to learn from{left}: give at least two training images"


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    return (centred.T @ centred / len(rows)).double()


def _whitening(covariance: Tensor, least: Tensor) -> Tensor:
    """L of ``L L^T`` = inverse covariance, so that ``|r L|^2`` is the Mahalanobis distance squared.

    Where features hardly vary, as of images that are all the same, rounding can make a covariance indefinite: its
    eigenvalues are then raised to ``least``, ``(blocks,)``.
    """
    whitening: Tensor
    inverse, singular = torch.linalg.inv_ex(covariance)
    whitening, failed = torch.linalg.cholesky_ex(inverse)
    bad = (singular != 0) | (failed != 0)
    if bad.any():
        values, vectors = torch.linalg.eigh(covariance[bad])
        whitening[bad] = vectors * values.maximum(least[bad].unsqueeze(1)).rsqrt().unsqueeze(1)
    return whitening


def _cover(points: Tensor, count: int, first: int) -> Tensor:
    """Choose ``count`` of the points ``(n, d)``, each the farthest from those before; all of them if they are fewer."""
    norms, least, chosen = points.square().sum(1), torch.full((len(points),), math.inf), [first]
    while len(chosen) < count:
        last = points[chosen[-1]]
        least = torch.minimum(least, norms - 2 * points @ last + last @ last)
        chosen.append(int(least.argmax()))
    return points[chosen]
