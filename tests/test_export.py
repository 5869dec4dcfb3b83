"""From a method's maps to an engine's outputs: units from good parts, one map to show and one to judge by."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from train.export import Detector, Scales, fit_scales, parity_frames, run
from train.teacher import Teacher
from train.tiles import Tiling

SIDE = 64
WHOLE = Tiling.of((SIDE, SIDE))


class Eyes(nn.Module):
    """A teacher that shows pixels as they are, at a quarter of their size."""

    def normalised(self, frames: Tensor) -> Tensor:
        """Gray levels as floats, ``(n, 1, H, W)``."""
        return frames.float().permute(0, 3, 1, 2)

    def features(self, images: Tensor) -> list[Tensor]:
        """Means of 4 x 4 pixels."""
        return [nn.functional.avg_pool2d(images, 4)]


class Two(nn.Module):
    """A method of two maps, brightness and darkness: it shows both and judges by brightness alone."""

    weights = (1.0, 3.0)
    score_weights = (1.0, 0.0)
    scales: tuple[float | None, ...] = (None, 10.0)
    headroom = 60.0

    def maps(self, images: Tensor, teacher: list[Tensor]) -> Tensor:
        """Brightness, and how far below 200 it is."""
        return torch.cat([teacher[0], (200 - teacher[0]).clamp(min=0)], 1)


def detector(scales: Scales, tiling: Tiling = WHOLE) -> Detector:
    """An engine whose every number can be foreseen."""
    return Detector(cast("Teacher", Eyes()), Two(), scales, tiling).eval()


def frame(level: int, spot: int | None = None) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A flat frame, with a spot of another level in the middle."""
    image = np.full((1, SIDE, SIDE, 1), level, np.uint8)
    if spot is not None:
        image[:, 16:48, 16:48] = spot
    return image


def test_a_part_is_judged_by_the_map_for_judging_and_shown_by_the_other() -> None:
    """A dark spot is in the heatmap but not in the score; a bright one is in both."""
    engine = detector(Scales((100.0, 100.0), (10.0, 10.0), -1.0))
    (plain,), (dark,), (bright,) = (run(engine, frame(100, spot))[0].tolist() for spot in (None, 50, 150))
    assert plain == pytest.approx(0, abs=1e-4)
    assert dark == pytest.approx(0, abs=0.02)
    assert bright == pytest.approx(5, abs=0.02)
    heats = [run(engine, frame(100, spot))[1][0].float() for spot in (None, 20)]
    assert not torch.equal(*heats)


def test_units_are_the_typical_peak_of_good_parts_unless_the_method_knows_better() -> None:
    """The first map's unit is measured: median peak above the mean. The second's is the method's own."""
    good = np.concatenate([frame(100, 100 + peak) for peak in (10, 20, 30)])
    scales = fit_scales(cast("Teacher", Eyes()), Two(), good, WHOLE)
    mean = float(np.mean(good))
    assert scales.offset[0] == pytest.approx(mean, abs=0.5)
    assert scales.unit[0] == pytest.approx(120 - mean, abs=0.5)
    assert scales.unit[1] == 10.0
    (scores, _) = run(detector(scales), good)
    assert float(scores.median()) == pytest.approx(1.0, abs=0.02)


def test_tiles_judge_as_the_whole_does_where_the_method_is_local() -> None:
    """A method that looks at single cells gives the same score in tiles."""
    scales = Scales((100.0, 100.0), (10.0, 10.0), -1.0)
    wide = np.repeat(frame(100, 150), 2, axis=2)
    whole = run(detector(scales, Tiling.of((SIDE, 2 * SIDE))), wide)
    tiled = run(detector(scales, Tiling.of((SIDE, 2 * SIDE), SIDE, 0.5)), wide)
    assert torch.allclose(whole[0], tiled[0], atol=0.05)
    assert whole[1].shape == tiled[1].shape == (1, SIDE // 4, SIDE // 2)


def test_parity_frames_are_half_good_half_defective() -> None:
    """What is stored for the gate has both, with the reference's own results."""
    good, twins = np.repeat(frame(100), 6, axis=0), np.repeat(frame(100, 180), 6, axis=0)
    parity = parity_frames(good, twins, detector(Scales((100.0, 100.0), (10.0, 10.0), -1.0)))
    assert len(parity.frames) == len(parity.scores) == 8
    assert parity.scores[:4].max() < 1 < parity.scores[4:].min()
