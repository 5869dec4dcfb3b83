"""The memory budget: what an engine costs, and when engines are too many."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.build import Target
from pipeline.budget import MIB, check, cost
from pipeline.config import ConfigError
from tests.support.engine import SIDE, write_bundle


def test_cost_grows_with_lanes_batches_and_model(tmp_path: Path) -> None:
    """A lane takes the model's bytes and, for each frame of a batch, pixels, heatmap and score."""
    bundle = write_bundle(tmp_path / "b")
    model = bundle.model.stat().st_size
    assert cost(bundle, Target(lanes=1, max_batch=1)) == model + SIDE * SIDE + (SIDE // 4) ** 2 + 4
    assert cost(bundle, Target(lanes=3, max_batch=2)) == 3 * (model + 2 * (SIDE * SIDE + (SIDE // 4) ** 2 + 4))


def test_the_limit_is_for_all_together(tmp_path: Path) -> None:
    """One engine fits, two do not; with no limit any number does. The message says what each takes."""
    bundle = write_bundle(tmp_path / "b")
    target = Target(lanes=32, max_batch=(MIB * 3 // 4) // (32 * 1100))
    check([bundle], target, 1)
    check([bundle] * 100, target, 0)
    with pytest.raises(
        ConfigError, match=rf"would take about 1\.\d MiB \({bundle.label} 0\.\d, {bundle.label} 0\.\d\)"
    ):
        check([bundle, bundle], target, 1)
