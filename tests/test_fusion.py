"""Fusing distance maps: one unusual map among several is enough, levels are measured, too little data is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train import fusion
from train.errors import TrainingError
from train.fusion import DistanceFusion

SIDE = 16
DEFECT = torch.zeros(8, 1, 4 * SIDE, 4 * SIDE)
DEFECT[..., 16:32, 16:32] = 1


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of a second: the promises are the same."""
    monkeypatch.setattr(fusion, "SAMPLES", 2000)
    monkeypatch.setattr(fusion, "STEPS", 80)


def distances(seed: int, defective: int | None = None, count: int = 3) -> list[Tensor]:
    """Distances of eight good parts about 1, each map at a level of its own; one of them high where defective."""
    generator = torch.Generator().manual_seed(seed)
    maps = [(k + 1) * torch.exp(0.2 * torch.randn(8, 1, SIDE, SIDE, generator=generator)) for k in range(count)]
    if defective is not None:
        maps[defective][..., 4:8, 4:8] *= 4
    return maps


def observed(seed: int = 0) -> DistanceFusion:
    """A fusion that has seen good parts, and defects that show in one map each."""
    torch.manual_seed(seed)
    fused = DistanceFusion(3, seed)
    fused.observe(distances(1))
    for which in range(3):
        fused.observe(distances(2 + which, which), DEFECT)
    return fused


@pytest.fixture(scope="module")
def fitted() -> DistanceFusion:
    """A fusion after its training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "SAMPLES", 2000)
        patch.setattr(fusion, "STEPS", 80)
        fused = observed()
        fused.fit()
    return fused


@pytest.mark.parametrize("which", [0, 1, 2])
@torch.no_grad()
def test_a_defect_that_one_map_sees_is_seen(fitted: DistanceFusion, which: int) -> None:
    """Whichever map it is, in parts that were never shown: nearly all of its cells are above nearly all good ones."""
    logits = fitted(distances(50 + which, which))
    assert logits.shape == (8, 1, SIDE, SIDE)
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[4:8, 4:8] = True
    good = fitted(distances(60))
    assert logits[..., inside].quantile(0.05) > good.quantile(0.99)
    assert logits[..., inside].mean() > 0 > good.mean()


def test_training_brings_the_loss_down(fitted: DistanceFusion) -> None:
    """From the loss of a guess to a small one; a mean over the last steps is returned."""
    assert observed(seed=1).fit() < 0.25
    assert not any(torch.isnan(p).any() for p in fitted.parameters())


def test_the_same_seed_learns_the_same() -> None:
    """Sampling follows the seed given, initial weights torch's own: both together repeat a training exactly."""
    seen = distances(7, 1)
    with torch.no_grad():
        one, two, other = (fused(seen) for fused in map(_fit, (3, 3, 4)))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def _fit(seed: int) -> DistanceFusion:
    fused = observed(seed)
    fused.fit()
    return fused


@torch.no_grad()
def test_the_unit_of_a_distance_does_not_matter(fitted: DistanceFusion) -> None:
    """Distances in other units, measured anew on good parts in these units, give the same logits."""
    fused = DistanceFusion(3)
    fused.load_state_dict(fitted.state_dict())
    factors = (10.0, 0.5, 3.0)
    good, seen = distances(11), distances(12, 0)

    def standardised(*scale: float) -> Tensor:
        scaled, judged = ([f * d for f, d in zip(scale, maps, strict=True)] for maps in (good, seen))
        fused.standardise(fused.context(scaled).permute(0, 2, 3, 1).flatten(0, 2))
        return fused(judged)

    assert torch.allclose(standardised(1, 1, 1), standardised(*factors), atol=1e-3)


@torch.no_grad()
def test_measuring_anew_leaves_what_was_learned(fitted: DistanceFusion) -> None:
    """Only mean and deviation follow other good parts; the weights are those of training."""
    fused = DistanceFusion(3)
    fused.load_state_dict(fitted.state_dict())
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    good = fused.context(distances(21)).permute(0, 2, 3, 1).flatten(0, 2)
    fused.standardise(good + 1)
    assert torch.allclose(fused.mean.flatten(), good.mean(0) + 1, atol=1e-4)
    changed = {name for name, value in fused.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"mean", "deviation"}


@torch.no_grad()
def test_what_is_far_from_good_everywhere_is_never_taken_for_good(fitted: DistanceFusion) -> None:
    """A covered lens is like no synthetic defect: every position far out in all maps has more than any good one."""
    good = fitted(distances(31))
    for deviations in (4, 8, 12, 30):
        far = [(d.log() + deviations * fitted.deviation[0, k, 0, 0]).exp() for k, d in enumerate(distances(32))]
        assert fitted(far).min() > good.quantile(0.99)


def test_a_position_sees_its_surroundings() -> None:
    """For each map its logarithm, and two smoothed ones; a lone peak shows in its neighbours' surroundings."""
    distance = torch.ones(1, 1, SIDE, SIDE)
    distance[..., 8, 8] = 10
    context = DistanceFusion(1).context([distance])
    assert context.shape == (1, 3, SIDE, SIDE)
    assert torch.equal(context[:, :1], distance.log())
    near, far = context[0, 1:, 8, 10], context[0, 1:, 0, 0]
    assert (near > 0.005).all()
    assert (far.abs() < 0.005).all()


def test_a_distance_of_nothing_is_finite() -> None:
    """A cell exactly on a prototype has no logarithm: the floor keeps it finite."""
    fused = DistanceFusion(2)
    nothing = [torch.zeros(1, 1, 4, 4)] * 2
    assert torch.isfinite(fused(nothing)).all()


def test_cells_at_a_defects_edge_are_neither_good_nor_bad() -> None:
    """Defective are cells of which a quarter is; good beside it are those at least three cells away."""
    fused = DistanceFusion(3)
    fused.observe(distances(0), DEFECT)
    assert len(fused._drawn["defective"][0]) == 8 * 4 * 4
    assert len(fused._drawn["beside"][0]) == 8 * (SIDE * SIDE - 8 * 8)
    assert fused._drawn["good"] == []


def test_a_share_of_good_positions_is_drawn_and_every_defective_one() -> None:
    """Defective positions are few, so that they are all kept."""
    fused = DistanceFusion(3)
    fused.observe(distances(0), share=0.1)
    fused.observe(distances(0), DEFECT, share=0.1)
    assert 0.05 < len(fused._drawn["good"][0]) / (8 * SIDE * SIDE) < 0.15
    assert len(fused._drawn["defective"][0]) == 8 * 4 * 4


def test_defects_that_fill_the_image_leave_good_parts_to_compare_with() -> None:
    """Nothing beside a defect is no reason to fail: the good parts stand for it."""
    fused = DistanceFusion(3)
    fused.observe(distances(0))
    fused.observe([4 * d for d in distances(1)], torch.ones_like(DEFECT))
    assert fused.fit() < 0.3


def test_no_defect_at_all_is_refused() -> None:
    """Where no synthetic defect came about, the message says where to look."""
    for mask in (None, torch.zeros_like(DEFECT)):
        fused = DistanceFusion(3)
        fused.observe(distances(0))
        if mask is not None:
            fused.observe(distances(1), mask)
        with pytest.raises(TrainingError, match=r"no synthetic defect .* check the foreground"):
            fused.fit()


def test_no_good_part_at_all_is_refused() -> None:
    """Without good positions there is no level: told, instead of a map of not-a-numbers."""
    fused = DistanceFusion(3)
    fused.observe(distances(1, 0), DEFECT)
    with pytest.raises(TrainingError, match="0 positions of good parts are too few"):
        fused.fit()
    with pytest.raises(TrainingError, match="give more good images"):
        fused.standardise(torch.zeros(1, 9))
    assert torch.isfinite(fused.deviation).all()


@torch.no_grad()
def test_what_is_learned_stays_when_what_was_observed_is_forgotten() -> None:
    """Release frees the positions; the logits are the same."""
    fused, seen = _fit(0), distances(3, 2)
    before = fused(seen)
    fused.release()
    assert fused._drawn == {"defective": [], "beside": [], "good": []}
    assert torch.equal(fused(seen), before)


def test_learning_works_where_gradients_are_off() -> None:
    """A method ends its training under no_grad; the fusion learns there all the same."""
    fused = observed()
    before = [p.clone() for p in fused.layers.parameters()]
    with torch.no_grad():
        fused.fit()
    assert all(not torch.equal(p, b) for p, b in zip(fused.layers.parameters(), before, strict=True))
