"""Cutting a large frame into overlapping tiles, and stitching their maps together again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engines.frames import Pixels
from train.errors import TrainingError
from train.layers import CELL

UNIT = 32
"""Tiles are multiples of the deepest stride of a teacher."""


@dataclass(frozen=True)
class Tiling:
    """Tiles of one size over a frame: a grid with at least the overlap that was asked for.

    Where tiles overlap, their maps are blended by weights that fall off towards a tile's edge, where a network
    knows least.

    Attributes:
        height, width: Of the frame, multiples of four.
        rows, columns: Upper edges and left edges of the tiles, multiples of four.
        tile: Height and width of a tile.
    """

    height: int
    width: int
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    tile: tuple[int, int]

    @classmethod
    def of(cls, size: tuple[int, int], tile: int = 0, overlap: float = 0.25) -> Tiling:
        """Tile frames of ``size`` (height, width) by squares of ``tile`` pixels; 0 for one tile, the frame.

        Raises:
            TrainingError: if the sizes are no multiples of 32, or the overlap is not in 0 .. 0.5.
        """
        height, width = size
        edges = (tile or height, tile or width)
        if any(side % UNIT or side < 2 * UNIT for side in (height, width, *edges)):
            msg = f"size {width}x{height}, tile {tile or 'none'}: multiples of {UNIT}, at least {2 * UNIT}"
            raise TrainingError(msg)
        if not 0 <= overlap <= 0.5:
            msg = f"tile overlap {overlap}: a share from 0 to 0.5"
            raise TrainingError(msg)
        edges = min(edges[0], height), min(edges[1], width)
        rows, columns = (_starts(side, edge, overlap) for side, edge in zip(size, edges, strict=True))
        return cls(height, width, rows, columns, edges)

    @property
    def count(self) -> int:
        """Number of tiles of a frame."""
        return len(self.rows) * len(self.columns)

    def cut(self, frames: Tensor) -> Tensor:
        """Cut frames ``(n, H, W, C)`` into ``(count n, h, w, C)``: the first tile of all frames, then the next."""
        if self.count == 1:
            return frames
        height, width = self.tile
        return torch.cat([frames[:, y : y + height, x : x + width] for y in self.rows for x in self.columns])

    def cut_pixels(self, frames: Pixels) -> Pixels:
        """As :meth:`cut`, for numpy arrays."""
        return frames if self.count == 1 else np.ascontiguousarray(self.cut(torch.from_numpy(frames)).numpy())

    def stitch(self, maps: Tensor) -> Tensor:
        """Blend the tiles' maps ``(count n, 1, h/4, w/4)`` into the frames' ``(n, 1, H/4, W/4)``."""
        if self.count == 1:
            return maps
        height, width = self.tile[0] // CELL, self.tile[1] // CELL
        weight = torch.outer(_ramp(height), _ramp(width)).to(maps)
        total = torch.zeros(1, 1, self.height // CELL, self.width // CELL).to(maps)
        blended = total
        corners = [(y // CELL, x // CELL) for y in self.rows for x in self.columns]
        for tile, (y, x) in zip(maps.reshape(self.count, -1, *maps.shape[1:]), corners, strict=True):
            around = (x, self.width // CELL - x - width, y, self.height // CELL - y - height)
            total = total + torch.nn.functional.pad(weight.view(1, 1, height, width), around)
            blended = blended + torch.nn.functional.pad(tile * weight, around)
        return blended / total


def _starts(side: int, tile: int, overlap: float) -> tuple[int, ...]:
    """Evenly spread starts of tiles that cover ``side``, multiples of four."""
    if tile >= side:
        return (0,)
    step = math.floor(tile * (1 - overlap) / CELL) * CELL
    count = math.ceil((side - tile) / step) + 1
    return tuple(round((side - tile) * k / (count - 1) / CELL) * CELL for k in range(count))


def _ramp(cells: int) -> Tensor:
    """Weights along a tile's side: 1 in the middle, falling off over its outer quarters."""
    distance = torch.minimum(torch.arange(cells), torch.arange(cells).flip(0)) + 1.0
    return (distance / (cells / 4)).clamp(max=1.0)
