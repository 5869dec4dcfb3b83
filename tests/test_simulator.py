"""The part simulator: every frame a function of seed and index, every defect where its mask says."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.simulator import DEFECTS, GOOD, MISSING, PRODUCTS, Shot, Simulator, _Canvas

LABELS = [*DEFECTS, MISSING]
SIMULATORS = {product: Simulator(product, width=128, height=96, seed=3) for product in PRODUCTS}


def pair(product: str, label: str, seed: int) -> tuple[Shot, Shot]:
    """A defective part and its good twin in the same pose, under the same light, with the same noise."""
    simulator = SIMULATORS[product]
    plain = simulator._plain
    good = _Canvas(plain.colour.copy(), plain.alpha, plain.size)
    simulator._feature(good)
    bad = _Canvas(plain.colour.copy() if label == MISSING else good.colour.copy(), plain.alpha, plain.size)
    hit = np.zeros(plain.alpha.shape, np.uint8)
    if label == MISSING:
        hit[np.any(good.colour != bad.colour, axis=2)] = 255
    else:
        DEFECTS[label](bad, hit, np.random.default_rng(seed))
    shots = [
        simulator._photograph(canvas, mask & plain.alpha, name, np.random.default_rng(seed))
        for canvas, mask, name in ((bad, hit, label), (good, np.zeros_like(hit), GOOD))
    ]
    return shots[0], shots[1]


@settings(max_examples=20)
@given(st.sampled_from(sorted(PRODUCTS)), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_a_frame_is_a_function_of_seed_and_index(product: str, seed: int, index: int) -> None:
    """Two runs show the same parts, in whatever order they are asked for."""
    one, two = (Simulator(product, width=64, height=48, seed=seed, defects=0.5) for _ in range(2))
    two.shot(index + 1)
    first, second = one.shot(index), two.shot(index)
    assert first.label == second.label
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.mask, second.mask)


def test_other_seeds_and_indices_are_other_parts() -> None:
    """No two frames of a run are the same, nor those of two runs."""
    shots = [Simulator(width=64, height=48, seed=seed).shot(index) for seed in range(3) for index in range(5)]
    assert len({shot.image.tobytes() for shot in shots}) == 15


@pytest.mark.parametrize("product", sorted(PRODUCTS))
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (128, 96), (96, 128)], ids=str)
def test_a_frame_has_the_size_that_was_asked_for(product: str, size: tuple[int, int]) -> None:
    """Image and mask, whichever side is the longer."""
    simulator = Simulator(product, width=size[0], height=size[1], defects=1.0)
    for index in range(12):
        shot = simulator.shot(index)
        assert (shot.image.shape, shot.image.dtype) == ((size[1], size[0], 3), np.uint8)
        assert (shot.mask.shape, shot.mask.dtype) == ((size[1], size[0]), bool)


@pytest.mark.parametrize("product", sorted(PRODUCTS))
def test_a_good_part_has_an_empty_mask(product: str) -> None:
    """Without defects every part is good."""
    simulator = Simulator(product, width=64, height=64, defects=0.0)
    shots = [simulator.shot(index) for index in range(20)]
    assert {shot.label for shot in shots} == {GOOD}
    assert not any(shot.mask.any() for shot in shots)


@pytest.mark.parametrize("product", sorted(PRODUCTS))
@pytest.mark.parametrize("label", LABELS)
def test_every_defect_changes_the_part_where_its_mask_is(product: str, label: str) -> None:
    """Beside its good twin a defective part differs within the mask, clearly, and not far away from it."""
    for seed in range(12):
        bad, good = pair(product, label, seed)
        assert bad.label == label
        assert bad.mask.any()
        assert not good.mask.any()
        assert bad.mask.mean() < 0.25
        difference = np.abs(bad.image.astype(int) - good.image).max(axis=2)
        assert difference[bad.mask].max() > 25
        near = cv2.dilate(bad.mask.astype(np.uint8), np.ones((41, 41), np.uint8)) > 0
        assert difference[~near].max(initial=0) <= 3


@pytest.mark.parametrize("product", sorted(PRODUCTS))
@pytest.mark.parametrize("label", LABELS)
def test_a_rendered_defect_has_its_label_and_a_mask(product: str, label: str) -> None:
    """What render draws by name is what shot would have drawn."""
    for seed in range(10):
        shot = SIMULATORS[product].render(label, np.random.default_rng(seed))
        assert shot.label == label
        assert shot.mask.any()


@pytest.mark.parametrize("product", sorted(PRODUCTS))
def test_a_mask_is_on_the_part(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What of a defect lies beside the part, or in a hole of it, is neither seen nor called defective."""
    simulator = Simulator(product, width=128, height=96, seed=3)
    pose = simulator._pose(96, np.random.default_rng(0))
    monkeypatch.setattr(simulator, "_pose", lambda *_: pose)
    part = cv2.warpAffine(simulator._plain.alpha, pose, (128, 96), flags=cv2.INTER_NEAREST) > 0
    for label in LABELS:
        for seed in range(10):
            mask = simulator.render(label, np.random.default_rng(seed)).mask
            assert mask.any()
            assert not (mask & ~part).any()


def test_one_part_does_not_change_the_next() -> None:
    """A defect is on its own part only."""
    simulator = Simulator(width=64, height=64)
    before = simulator.render(GOOD, np.random.default_rng(1)).image
    for label in LABELS:
        simulator.render(label, np.random.default_rng(2))
    assert np.array_equal(simulator.render(GOOD, np.random.default_rng(1)).image, before)


def test_the_share_of_defects_is_as_asked() -> None:
    """All kinds occur, in about the share that was asked for; with 1.0 every part is defective."""
    simulator = Simulator(width=32, height=32, defects=0.3)
    labels = [simulator.shot(index).label for index in range(400)]
    assert 0.22 < np.mean([label != GOOD for label in labels]) < 0.38
    assert set(labels) == {GOOD, *LABELS}
    every = Simulator(width=32, height=32, defects=1.0)
    assert GOOD not in {every.shot(index).label for index in range(50)}


def test_the_surface_belongs_to_the_product_and_not_to_the_run() -> None:
    """An engine that was trained on one seed knows the parts of another."""
    one, two = (Simulator("plate", width=64, height=64, seed=seed) for seed in (1, 2))
    rng = np.random.default_rng
    assert np.array_equal(one.render(GOOD, rng(5)).image, two.render(GOOD, rng(5)).image)


def test_the_products_differ() -> None:
    """A mix-up of cameras can be seen."""
    images = [simulator.render(GOOD, np.random.default_rng(1)).image for simulator in SIMULATORS.values()]
    for one, two in zip(images, images[1:] + images[:1], strict=True):
        assert np.abs(one.astype(int) - two).mean() > 10


def test_what_cannot_be_simulated_is_said() -> None:
    """The message has what is allowed."""
    with pytest.raises(ValueError, match="product 'bolt': one of washer, cap, plate"):
        Simulator("bolt")
    with pytest.raises(ValueError, match="31x64: at least 32 pixels a side"):
        Simulator(width=31, height=64)
