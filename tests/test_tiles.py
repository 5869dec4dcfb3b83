"""Tiles: they cover the frame, overlap as asked, and their maps become the frame's again, in torch and compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from train.errors import TrainingError
from train.layers import CELL
from train.onnx_export import to_onnx
from train.tiles import Tiling

SIDES = st.integers(2, 40).map(lambda k: 32 * k)


def frames(count: int, height: int, width: int, channels: int = 1) -> Tensor:
    """Noise in which no place is like another."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, height, width, channels), np.uint8))


def at_cells(images: Tensor) -> Tensor:
    """A map of uint8 frames ``(n, h, w, 1)``: each cell's first pixel, which a tile sees as the frame does."""
    return images[:, ::CELL, ::CELL, 0].unsqueeze(1).float()


@given(SIDES, SIDES, SIDES, st.floats(0, 0.5))
def test_tiles_cover_the_frame_and_overlap_as_asked(height: int, width: int, tile: int, overlap: float) -> None:
    """Any frame, tile and overlap: from edge to edge without a gap, on the grid of cells, to which overlaps round."""
    tiling = Tiling.of((height, width), tile, overlap)
    for side, edge, starts in zip((height, width), tiling.tile, (tiling.rows, tiling.columns), strict=True):
        assert edge == min(tile, side)
        assert starts[0] == 0
        assert starts[-1] + edge == side
        assert not any(start % CELL for start in starts)
        steps = np.diff(starts)
        assert (steps > 0).all()
        assert (steps <= edge).all()
        assert (edge - steps > edge * overlap - CELL).all()
    assert tiling.count == len(tiling.rows) * len(tiling.columns)


@given(SIDES, SIDES, st.sampled_from([0.0, 0.125, 0.25, 0.5]))
def test_shares_of_whole_cells_are_kept_exactly(side: int, tile: int, overlap: float) -> None:
    """Overlaps that are whole cells, as the default is, are never less than asked."""
    tiling = Tiling.of((side, side), tile, overlap)
    assert all(tiling.tile[0] - step >= overlap * tiling.tile[0] for step in np.diff(tiling.rows))


def test_no_more_tiles_than_needed() -> None:
    """Each more tile is more time a part: the count is the least that has the overlap."""
    assert Tiling.of((256, 256), 128, 0.0).count == 4
    assert Tiling.of((256, 256), 128, 0.25).count == 9
    assert Tiling.of((256, 128), 128, 0.5).rows == (0, 64, 128)


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [((96, 160), 64, 0.25), ((64, 256), 64, 0.0), ((128, 128), 96, 0.5), ((192, 64), 128, 0.1), ((96, 96), 0, 0.25)],
)
def test_tiles_of_a_known_map_are_stitched_to_that_map(size: tuple[int, int], tile: int, overlap: float) -> None:
    """Where tiles agree, blending changes nothing: not at edges, not at corners, not between frames of a batch."""
    tiling, seen = Tiling.of(size, tile, overlap), frames(3, *size)
    cut = tiling.cut(seen)
    assert cut.shape == (3 * tiling.count, *tiling.tile, 1)
    stitched = tiling.stitch(at_cells(cut))
    assert stitched.shape == (3, 1, size[0] // CELL, size[1] // CELL)
    assert torch.allclose(stitched, at_cells(seen), atol=1e-3)


def test_every_cell_is_covered() -> None:
    """The weights are nowhere zero, so that no cell is divided by nothing."""
    tiling = Tiling.of((96, 160), 64, 0.0)
    ones = torch.ones(2 * tiling.count, 1, 16, 16)
    assert torch.allclose(tiling.stitch(ones), torch.ones(2, 1, 24, 40))


def test_a_tiles_edge_has_less_say_than_anothers_middle() -> None:
    """Across an overlap the map goes over from one tile's to the next, step by step."""
    tiling = Tiling.of((64, 96), 64, 0.5)
    assert tiling.columns == (0, 32)
    maps = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    row = tiling.stitch(maps)[0, 0, 5]
    assert row[:8].unique().tolist() == [0]
    assert row[16:].unique().tolist() == [1]
    assert (row[8:16].diff() >= 0).all()
    assert row[8] < 0.25
    assert row[15] > 0.75


def test_one_tile_is_the_frame() -> None:
    """Without tiles, or with a tile as large as the frame, nothing is copied, in torch and in numpy."""
    seen = frames(2, 64, 96)
    array = seen.numpy()
    for tiling in (Tiling.of((64, 96)), Tiling.of((64, 96), 96), Tiling.of((64, 96), 256)):
        assert (tiling.count, tiling.tile) == (1, (64, 96))
        assert tiling.cut(seen) is seen
        assert tiling.stitch(seen) is seen
        assert tiling.cut_pixels(array) is array


def test_pixels_are_cut_as_tensors_are() -> None:
    """Training cuts arrays, the engine cuts tensors: the tiles are the same, in the same order."""
    tiling, seen = Tiling.of((96, 128), 64), frames(2, 96, 128, 3)
    cut = tiling.cut_pixels(seen.numpy())
    assert np.array_equal(cut, tiling.cut(seen).numpy())
    assert cut.flags.c_contiguous
    assert np.array_equal(cut[0], seen[0, :64, :64].numpy())
    assert np.array_equal(cut[1], seen[1, :64, :64].numpy())


@pytest.mark.parametrize("size", [(100, 64), (64, 40), (32, 64), (0, 64)], ids=str)
def test_sizes_off_the_grid_are_refused(size: tuple[int, int]) -> None:
    """The message says which sizes there are, and what was asked for."""
    with pytest.raises(TrainingError, match=f"size {size[1]}x{size[0]}, tile none: multiples of 32, at least 64"):
        Tiling.of(size)


@pytest.mark.parametrize("tile", [-64, 32, 65, 100])
def test_tiles_off_the_grid_are_refused(tile: int) -> None:
    """The same for a tile, which is named."""
    with pytest.raises(TrainingError, match=f"tile {tile}: multiples of 32, at least 64"):
        Tiling.of((128, 128), tile)


@pytest.mark.parametrize("overlap", [-0.1, 0.6, 25.0, float("nan")])
def test_overlaps_that_are_no_share_are_refused(overlap: float) -> None:
    """Percent in place of a share is a likely mistake: the range is told."""
    with pytest.raises(TrainingError, match=r"a share from 0 to 0\.5"):
        Tiling.of((128, 128), 64, overlap)


class Tiled(nn.Module):
    """A small net over tiles: a convolution of four by four pixels, stitched."""

    kernel: Tensor

    def __init__(self, tiling: Tiling) -> None:
        super().__init__()
        self.tiling = tiling
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("kernel", torch.randn(1, 3, CELL, CELL, generator=generator) / 255)

    def forward(self, seen: Tensor) -> Tensor:
        """Map uint8 frames ``(n, H, W, 3)`` to ``(n, 1, H/4, W/4)``."""
        tiles = self.tiling.cut(seen).float().permute(0, 3, 1, 2)
        # Tiles of one frame must differ where they overlap, else a wrong order would not show.
        maps = nn.functional.conv2d(tiles, self.kernel, stride=CELL)
        return self.tiling.stitch(maps - maps.amax((2, 3), keepdim=True))


def test_the_exported_graph_cuts_and_stitches_as_torch_does(tmp_path: Path) -> None:
    """Compiled by OpenVINO, at batches of one and of three, the map of a frame that is not square is the same."""
    module = Tiled(Tiling.of((96, 160), 64))
    path = tmp_path / "tiled.onnx"
    path.write_bytes(to_onnx(module, (96, 160, 3), ["map"]))
    compiled = ov.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in (1, 3):
        seen = frames(count, 96, 160, 3)
        expected = module(seen)
        assert expected.shape == (count, 1, 24, 40)
        assert np.allclose(compiled(seen.numpy())[0], expected.numpy(), atol=1e-4)
