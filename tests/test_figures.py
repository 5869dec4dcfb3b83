"""Figures of any method: scores, labels, maps and masks in, nothing about engines or files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from train.figures import Map, Share, figures_of
from train.metrics import Mask, PixelMetrics, RankScale, image_metrics

LABELS = ["good", "good", "scratch", "scratch", "pit", "pit"]
SCORES = np.array([0.1, 0.6, 0.4, 0.9, 0.7, 0.8])


def shots() -> list[tuple[Map, Mask | None]]:
    """Six maps: two good, two scratches with masks, a pit with an empty mask and a pit without one."""
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 200, (10, 10)).astype(np.float32) for _ in LABELS]
    masks: list[Mask | None] = [None] * 6
    for k in (2, 3):
        mask = np.zeros((10, 10), bool)
        mask[k : k + 3, 2:6] = True
        maps[k][mask] += 50
        masks[k] = mask
    masks[4] = np.zeros((10, 10), bool)
    return list(zip(maps, masks, strict=True))


def test_image_figures_and_shares_at_the_threshold() -> None:
    """The image figures are those of the scores; a score on the threshold is not above it."""
    found = figures_of(SCORES, LABELS, shots(), threshold=0.6)
    assert found.values.items() >= image_metrics(SCORES, np.array(LABELS) != "good").items()
    assert found.good_rejected == Share(0, 2)
    assert found.defects_caught == Share(3, 4)
    assert figures_of(SCORES, LABELS, shots(), threshold=0.5).good_rejected == Share(1, 2)


def test_without_a_threshold_there_are_no_shares() -> None:
    """A method that has no threshold is measured all the same."""
    found = figures_of(SCORES, LABELS, shots())
    assert found.good_rejected is found.defects_caught is found.classes["pit"].caught is None
    assert "caught" not in found.classes["pit"].row()


def test_defective_images_without_a_usable_mask_are_left_out_of_the_pixel_figures() -> None:
    """Which of their pixels are good is not known: neither a missing mask nor an empty one makes them good."""
    found = figures_of(SCORES, LABELS, shots())
    counted = PixelMetrics()
    for heat, mask in shots()[:4]:
        counted.add(heat, np.zeros((10, 10), bool) if mask is None else mask)
    assert {name: found.values[name] for name in counted.result()} == counted.result()
    assert (found.classes["scratch"].masked, found.classes["pit"].masked) == (2, 0)
    assert found.classes["pit"].pixels == {}


def test_each_kind_of_defect_is_measured_against_the_good_parts() -> None:
    """The figures of a kind are those of a test set in which it is the only one."""
    whole = figures_of(SCORES, LABELS, shots(), threshold=0.5)
    kept = [0, 1, 2, 3]
    alone = figures_of(SCORES[kept], [LABELS[k] for k in kept], [shots()[k] for k in kept], threshold=0.5)
    scratch = whole.classes["scratch"]
    assert scratch.image_auroc == alone.values["image_auroc"]
    assert scratch.caught == alone.defects_caught == Share(1, 2)
    assert scratch.pixels == {name: alone.values[name] for name in scratch.pixels}
    assert scratch.row() == {"images": 2, "masked": 2, "image_auroc": 0.75, "caught": 0.5, **scratch.pixels}


def test_maps_are_taken_one_after_the_other() -> None:
    """No more than one map has to exist at a time: all may come in one buffer."""
    buffer = np.zeros((10, 10), np.float32)

    def stream() -> Iterator[tuple[Map, Mask | None]]:
        for heat, mask in shots():
            buffer[:] = heat
            yield buffer, mask
            buffer[:] = 255

    assert figures_of(SCORES, LABELS, stream()).values == figures_of(SCORES, LABELS, shots()).values


def test_any_method_is_measured_on_a_scale_of_its_own() -> None:
    """Distances, logits or probabilities: with bins fitted to them, figures depend on their order alone."""
    stretched = [(np.exp(heat / 20) - 3, mask) for heat, mask in shots()]
    found = figures_of(SCORES, LABELS, stretched, scale=RankScale.fitted(stretched))
    assert found.values == pytest.approx(figures_of(SCORES, LABELS, shots()).values, abs=1e-9)


def test_what_cannot_be_measured_is_refused() -> None:
    """Scores that are no numbers, maps off the scale and lists of unequal length are errors, not figures."""
    with pytest.raises(ValueError, match="cannot be ranked"):
        figures_of(np.array([*SCORES[:5], np.nan]), LABELS, shots())
    with pytest.raises(ValueError, match="RankScale"):
        figures_of(SCORES, LABELS, [(heat * 2, mask) for heat, mask in shots()])
    with pytest.raises(ValueError, match="zip"):
        figures_of(SCORES, LABELS, shots()[:5])


def test_a_share_states_what_it_is_worth() -> None:
    """Nothing seen in few parts says little, in many parts more; a share of nothing is none."""
    few, many = Share(0, 14), Share(0, 1400)
    assert few.value == many.value == 0
    assert few.interval[1] > 0.2
    assert many.interval[1] < 0.01
    assert np.isnan(Share(0, 0).value)
