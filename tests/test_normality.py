"""What good parts look like: Gaussians that know their place, prototypes that do not, and folds that are left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from train import normality
from train.errors import TrainingError
from train.normality import (
    RIDGE,
    SCARCE,
    SHRINK,
    PlaceStatistics,
    Prototypes,
    WholeStatistics,
    block_of,
    patches,
    units,
    whole,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal noise that is the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(*folds: Tensor, without: int | None = None, block: int = 1, dims: int = 112) -> PlaceStatistics:
    """Gaussians of features of good parts, one tensor ``(n, c, h, w)`` a fold."""
    places = PlaceStatistics(*folds[0].shape[1:], dims, block, len(folds))
    for features in folds:
        places.survey(features)
    places.orient()
    for fold, features in enumerate(folds):
        places.observe(features, fold)
    places.fit(without)
    return places


def mahalanobis(good: Tensor, seen: Tensor, block: int = 1) -> np.ndarray:
    """Distances of ``seen`` by the textbook, place by place in float64, ``(n, h, w)``."""
    x, y = good.double().numpy(), seen.double().numpy()
    n, c, h, w = x.shape
    mean = x.mean(0)
    own = np.einsum("nchw,ndhw->hwcd", x - mean, x - mean) / n
    shared = own.reshape(h // block, block, w // block, block, c, c).mean((1, 3))
    everywhere = shared.mean((0, 1))
    distances = np.empty((len(y), h, w))
    for row in range(h):
        for column in range(w):
            covariance = (n * shared[row // block, column // block] + SHRINK * everywhere) / (n + SHRINK)
            covariance += RIDGE * covariance.diagonal().mean() * np.eye(c)
            off = y[:, :, row, column] - mean[:, row, column]
            distances[:, row, column] = np.sqrt(np.einsum("nc,cd,nd->n", off, np.linalg.inv(covariance), off) / c)
    return distances


@pytest.mark.parametrize("block", [1, 2])
def test_the_distance_is_mahalanobis_with_shrinkage(block: int) -> None:
    """Principal components, blocks, moments and half floats together equal the formula in numpy to 0.2 percent."""
    mix = noise(5, 5, seed=1)
    good, seen = (torch.einsum("cd,ndhw->nchw", mix, noise(n, 5, 4, 6, seed=n)) + 3 for n in (20, 4))
    distance = fitted(good, block=block)(seen)
    assert distance.shape == (4, 1, 4, 6)
    assert np.allclose(distance.squeeze(1).numpy(), mahalanobis(good, seen, block), rtol=2e-3)


def test_a_good_part_is_at_a_distance_of_about_one() -> None:
    """Whatever the features' scale: the distance is in units of what is usual."""
    for scale in (0.01, 1.0, 100.0):
        distance = fitted(scale * noise(200, 6, 4, 4))(scale * noise(50, 6, 4, 4, seed=1))
        assert distance.mean().item() == pytest.approx(1, abs=0.1)


def test_each_place_has_its_own_idea_of_unusual() -> None:
    """The same deviation counts more where good parts are always alike than where they always differ."""
    spread = torch.ones(1, 1, 4, 4)
    spread[..., 2:] = 5.0
    places = fitted(noise(200, 3, 4, 4) * spread)
    distance = places(torch.full((1, 3, 4, 4), 4.0))
    assert distance[..., :2].min() > 3 * distance[..., 2:].max()


def test_each_place_of_a_block_has_its_own_mean() -> None:
    """Neighbours share how features vary, not what they are: each one's usual value is near, its neighbour's far."""
    usual = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    places = fitted(usual + 0.1 * noise(100, 3, 4, 4), block=4)
    assert places(usual).max() < 0.2
    assert places(usual.flip(3)).min() > 3


def test_a_fold_that_is_left_out_has_no_say() -> None:
    """Without a fold the Gaussians are those of the other folds alone; with all of them they are others."""
    folds = [noise(12, 4, 4, 4, seed=seed) + seed for seed in range(3)]
    seen = noise(2, 4, 4, 4, seed=9)
    part = fitted(*folds, without=1)(seen)
    alone = fitted(folds[0], folds[2])(seen)
    assert torch.allclose(part, alone, rtol=5e-3)
    assert not torch.allclose(part, fitted(*folds)(seen), rtol=0.05)


def test_the_components_that_vary_most_are_kept() -> None:
    """With fewer dimensions than channels, the loud ones count and the quiet ones are given up."""
    loudness = torch.tensor([1.0, 10.0, 0.1, 20.0]).view(1, 4, 1, 1)
    places = fitted(noise(100, 4, 2, 2) * loudness, dims=2)
    weight = places.projection.square().sum(1)
    assert weight[[1, 3]].min() > 0.95
    assert weight[[0, 2]].max() < 0.05


def test_half_floats_cost_next_to_nothing() -> None:
    """The whitening is kept in 16 bits; distances differ from those in 32 bits by less than 0.2 percent."""
    good, seen = noise(40, 8, 2, 2), noise(5, 8, 2, 2, seed=1)
    places = fitted(good)
    assert places.whitening.dtype == torch.float16
    assert np.allclose(places(seen).squeeze(1).numpy(), mahalanobis(good, seen), rtol=2e-3)


def test_images_that_are_all_the_same_can_be_learned() -> None:
    """Rounding leaves no negative variance: they are usual, everything else is not, and nothing is infinite."""
    same = (3 * noise(1, 6, 4, 4) + 20).repeat(50, 1, 1, 1)
    for good in (same, torch.full((8, 6, 4, 4), 37.3), torch.zeros(4, 6, 4, 4)):
        places = fitted(good)
        usual, unusual = places(good[:1]), places(good[:1] + 1)
        assert torch.isfinite(usual).all()
        assert torch.isfinite(unusual).all()
        assert usual.max() < 0.1
        assert unusual.min() > 10


def test_one_image_is_enough_for_gaussians() -> None:
    """Two training images leave one when a fold is left out: its distances are finite, its own are least."""
    image = noise(1, 4, 4, 4)
    places = fitted(image, noise(1, 4, 4, 4, seed=1), without=1)
    assert places(image).max() < 0.1
    assert torch.isfinite(places(image + 1)).all()
    assert places(image + 1).min() > 1


def test_what_is_fitted_stays_when_what_was_observed_is_forgotten() -> None:
    """Release frees the memory of training; distances are the same, and so is what would be saved."""
    places, prototypes = fitted(noise(20, 4, 4, 4)), Prototypes(4, 8)
    prototypes.observe(noise(2, 4, 4, 4))
    prototypes.fit()
    seen = noise(2, 4, 4, 4, seed=1)
    for part in (places, prototypes):
        before, state = part(seen), {name: value.clone() for name, value in part.state_dict().items()}
        part.release()
        assert torch.equal(part(seen), before)
        assert all(torch.equal(part.state_dict()[name], value) for name, value in state.items())
    assert places._squares.numel() == places._sum.numel() == places._moments.numel() == 0
    assert not any(prototypes._seen)


@pytest.mark.parametrize("part", [PlaceStatistics(4, 4, 4, folds=3), Prototypes(4, 8, folds=3)], ids=["places", "k"])
def test_nothing_to_learn_from_is_refused(part: PlaceStatistics | Prototypes) -> None:
    """Without images, or with all of them in the fold that is left out, the message says what is needed."""
    with pytest.raises(TrainingError, match="at least two training images"):
        part.fit()
    part.observe(noise(1, 4, 4, 4), 0)
    with pytest.raises(TrainingError, match="without fold 0: give at least two training images"):
        part.fit(without=0)
    part.fit(without=1)


@pytest.mark.parametrize(
    ("size", "block"), [((32, 32), 2), ((16, 16), 1), ((64, 64), 4), ((24, 32), 2), ((4, 4), 1), ((20, 30), 2)]
)
def test_a_block_divides_the_map_into_at_most_sixteen(size: tuple[int, int], block: int) -> None:
    """The least common divisor of both sides that leaves at most 16 blocks a side."""
    assert block_of(*size) == block


def test_a_map_whose_sides_share_too_little_has_more_blocks() -> None:
    """Where no common divisor suffices, the greatest one is taken: blocks fill the map in any case."""
    assert block_of(17, 34) == 17
    assert block_of(17, 32) == 1
    assert block_of(40, 48) == 4
    assert PlaceStatistics(2, 17, 32, block=block_of(17, 32)).grid == (17, 32)


def test_patches_are_averages_of_three_by_three_at_the_first_maps_size() -> None:
    """PatchCore's local patches: a lone one spreads over nine cells; coarser maps are enlarged beside the first."""
    first, second = torch.zeros(1, 1, 12, 12), torch.full((1, 2, 6, 6), 9.0)
    first[..., 3, 3] = 9
    joined = patches([first, second])
    assert joined.shape == (1, 3, 12, 12)
    assert joined[0, 0, 2:5, 2:5].tolist() == [[1.0] * 3] * 3
    assert joined[0, 0].sum() == 9
    assert joined[0, 1:, 3:9, 3:9].unique().item() == 9


def test_units_forget_how_strong_features_are() -> None:
    """A map at the first one's size has unit length everywhere, so that its scale does not matter."""
    first, second = noise(2, 5, 4, 4), noise(2, 3, 2, 2, seed=1)
    joined = units([first, second])
    assert joined.shape == (2, 8, 4, 4)
    assert torch.allclose(joined[:, :5].norm(dim=1), torch.ones(2, 4, 4))
    assert torch.allclose(joined, units([7 * first, 0.1 * second]), atol=1e-6)


def test_the_distance_is_that_to_the_nearest_centre() -> None:
    """One convolution by all centres equals the search through all of them, place by place."""
    prototypes = Prototypes(5, 11)
    prototypes.centres.copy_(noise(11, 5, seed=1))
    seen = noise(3, 5, 4, 2)
    everywhere = seen.permute(0, 2, 3, 1).reshape(-1, 5)
    expected = torch.cdist(everywhere, prototypes.centres).amin(1).view(3, 1, 4, 2)
    assert torch.allclose(prototypes(seen), expected, atol=1e-4)
    centre = prototypes.centres[7].view(1, 5, 1, 1)
    assert prototypes(centre).item() == pytest.approx(0, abs=2e-3)


def test_every_good_patch_is_near_a_prototype() -> None:
    """Prototypes are the farthest points from each other: what was seen only once is among the first of them."""
    points = torch.cat([noise(400, 4), torch.tensor([[40.0, 0, 0, 0], [0, 0, 60, 0]])])
    chosen = normality._cover(points, 3, 5)
    assert torch.equal(chosen, points[[5, 401, 400]])
    reach = [torch.cdist(points, normality._cover(points, count, 5)).amin(1).max().item() for count in (3, 50, 402)]
    assert reach == sorted(reach, reverse=True)
    assert reach[-1] < 0.01


def test_prototypes_look_along_principal_components() -> None:
    """With fewer dimensions than channels, directions in which good parts do not differ are left out."""
    prototypes, seen = Prototypes(3, 64, dims=2), noise(2, 3, 8, 8) * torch.tensor([5.0, 0.01, 1.0]).view(1, 3, 1, 1)
    prototypes.observe(seen)
    prototypes.fit()
    assert prototypes.projection.abs()[:, 1].max() < 0.01
    aside = seen + torch.tensor([0.0, 9.0, 0.0]).view(1, 3, 1, 1)
    assert torch.allclose(prototypes(aside), prototypes(seen), atol=0.2)


def test_means_and_deviations_tell_of_the_whole_image() -> None:
    """They are those over all positions of each map, first all means, then all deviations."""
    first, second = noise(2, 3, 8, 8), noise(2, 5, 4, 4, seed=1)
    joined = whole([first, second])
    assert joined.shape == (2, 16, 1, 1)
    assert torch.allclose(joined[:, :3, 0, 0], first.mean((2, 3)))
    assert torch.allclose(joined[:, 11:, 0, 0], second.std((2, 3), correction=0), atol=1e-6)


def whole_of(*folds: Tensor) -> WholeStatistics:
    """Statistics of whole images, measured on folds that they were not fitted to."""
    images = WholeStatistics(folds[0].shape[1], len(folds))
    for fold in folds:
        images.survey(fold)
    images.orient()
    for number, fold in enumerate(folds):
        images.observe(fold, number)
    for number, fold in enumerate(folds):
        images.fit(without=number)
        images.measure(fold)
    images.fit()
    images.standardise()
    images.release()
    return images


def test_good_images_are_usual_and_others_are_not() -> None:
    """A good image of many is about one deviation off, or less where few say it; one unlike all of them is many."""
    images = whole_of(noise(300, 4, 1, 1), noise(300, 4, 1, 1, seed=1))
    fresh = images(noise(300, 4, 1, 1, seed=2))
    assert abs(fresh.mean().item()) < 0.2
    trust = 600 / (600 + SCARCE)
    assert 0.7 < fresh.std().item() / trust < 1.2
    assert images(noise(1, 4, 1, 1) + 9).item() > 3
    assert not images._logs


def test_few_images_say_little_of_the_whole() -> None:
    """The same strange image is less of a surprise to statistics of ten images than to those of a thousand."""
    strange = torch.full((1, 4, 1, 1), 5.0)
    few, many = (whole_of(noise(n, 4, 1, 1), noise(n, 4, 1, 1, seed=1))(strange).item() for n in (5, 500))
    assert few < 0.3 * many


def test_images_that_are_all_the_same_have_a_finite_unit() -> None:
    """Nothing is divided by nothing."""
    images = whole_of(torch.ones(4, 4, 1, 1), torch.ones(4, 4, 1, 1))
    assert torch.isfinite(images(torch.ones(1, 4, 1, 1)))
    assert torch.isfinite(images(torch.zeros(1, 4, 1, 1)))


def test_a_fold_that_is_left_out_is_unknown_to_prototypes() -> None:
    """What only its images show is far from every centre; with all folds it is near."""
    prototypes = Prototypes(3, 16, folds=2)
    prototypes.observe(noise(2, 3, 4, 4), 0)
    strange = 50 + noise(2, 3, 4, 4, seed=1)
    prototypes.observe(strange, 1)
    prototypes.fit(without=1)
    assert prototypes(strange).min() > 50
    prototypes.fit()
    assert prototypes(strange).max() < 10


def test_the_same_seed_finds_the_same_centres() -> None:
    """Drawing and clustering can be repeated; another seed draws others."""

    def centres(seed: int) -> Tensor:
        prototypes = Prototypes(3, 8, seed=seed)
        prototypes.observe(noise(4, 3, 8, 8), share=0.5)
        prototypes.fit()
        return prototypes.centres

    assert torch.equal(centres(1), centres(1))
    assert not torch.equal(centres(1), centres(2))


def test_a_share_of_patches_is_kept() -> None:
    """About the share asked for, drawn at random; all of them where it is one."""
    prototypes = Prototypes(2, 4, folds=2)
    prototypes.observe(noise(4, 2, 32, 32), 0, share=0.25)
    prototypes.observe(noise(4, 2, 32, 32), 1)
    (some,), (whole,) = prototypes._seen
    assert 0.2 < len(some) / 4096 < 0.3
    assert len(whole) == 4096


def test_fewer_patches_than_centres_are_all_known() -> None:
    """A tiny data set gives every centre a patch: all that was seen is at no distance."""
    prototypes = Prototypes(3, 256)
    few = noise(1, 3, 2, 2)
    prototypes.observe(few)
    prototypes.fit()
    assert torch.isfinite(prototypes.centres).all()
    assert prototypes(few).max() < 0.01
