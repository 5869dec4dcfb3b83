"""Synthetic defects: on the part, where the mask says, different from the original, the same for the same seed."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.frames import Pixels
from pipeline.simulator import Simulator
from train.synthesis import KINDS, REAL_SHARE, VISIBLE, Synthesizer, perlin, procedural_texture

SIDE = 64


def good_images(count: int = 3, height: int = SIDE, width: int = SIDE, channels: int = 3) -> Pixels:
    """Photographs of good parts."""
    simulator = Simulator(width=width, height=height, defects=0.0)
    images = np.stack([simulator.shot(index).image for index in range(count)])
    return images if channels == 3 else images[..., 1:2].copy()


IMAGES = good_images()
CENTRE = np.zeros((3, SIDE, SIDE), bool)
CENTRE[:, 16:48, 16:48] = True
# On tiny images many thin strokes are too faint to see; shares are those of images twice as large.
LARGE = good_images(1, 2 * SIDE, 2 * SIDE)
LARGE_CENTRE = CENTRE[:1].repeat(2, axis=1).repeat(2, axis=2)


@settings(max_examples=60)
@given(st.integers(0, 1 << 30), st.sampled_from([(64, 64), (33, 47), (96, 40)]))
def test_perlin_noise_is_smooth_and_bounded(seed: int, size: tuple[int, int]) -> None:
    """Within about -1 and 1, of the size asked for, finite, and neighbours are alike where cells are large."""
    noise = perlin(*size, np.random.default_rng(seed), max_octave=2)
    assert (noise.shape, noise.dtype) == (size, np.float32)
    assert np.isfinite(noise).all()
    assert np.abs(noise).max() <= 1.1
    assert np.abs(np.diff(noise, axis=0)).max() < 0.5


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.shape.__name__)
def test_every_shape_is_a_mask_that_leaves_most_of_the_image(kind) -> None:
    """Bool, of the size asked for, mostly not empty, hardly ever most of the image, not twice the same."""
    shapes = [kind.shape(48, 80, np.random.default_rng(seed)) for seed in range(60)]
    assert {(mask.shape, mask.dtype) for mask in shapes} == {((48, 80), np.dtype(bool))}
    shares = np.array([mask.mean() for mask in shapes])
    assert (shares > 0).mean() > 0.5
    assert (shares > 0.6).mean() < 0.05
    assert len({mask.tobytes() for mask in shapes}) > 30


def test_the_kinds_of_defects_are_shares_of_a_whole() -> None:
    """All kinds together are all defects, and the sources of each leave room for textures."""
    assert sum(kind.share for kind in KINDS) == pytest.approx(1)
    for kind in KINDS:
        assert kind.texture + kind.structural + kind.photometric == pytest.approx(1)


def test_the_same_seed_makes_the_same_twin() -> None:
    """Training can be repeated."""
    make = Synthesizer(IMAGES, CENTRE)
    for seed in range(10):
        one, two = (make(1, np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(one[0], two[0])
        assert np.array_equal(one[1], two[1])


def test_other_seeds_make_other_twins() -> None:
    """No two of many defects are the same."""
    make = Synthesizer(IMAGES, probability=1.0)
    twins = [make(0, np.random.default_rng(seed))[1] for seed in range(40)]
    assert len({mask.tobytes() for mask in twins if mask.any()}) > 30


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (40, 72), (45, 67)], ids=str)
def test_a_twin_has_the_form_of_its_original(channels: int, size: tuple[int, int]) -> None:
    """Gray or colour, any size: uint8 pixels and a bool mask, and the original is left as it was."""
    images = good_images(2, *size, channels)
    before = images.copy()
    make = Synthesizer(images, probability=1.0)
    for seed in range(30):
        twin, mask = make(seed % 2, np.random.default_rng(seed))
        assert (twin.shape, twin.dtype) == (images.shape[1:], np.uint8)
        assert (mask.shape, mask.dtype) == (size, bool)
    assert np.array_equal(images, before)


def test_without_probability_the_twin_is_the_original() -> None:
    """A good sample is the image itself, with an empty mask."""
    make = Synthesizer(IMAGES, CENTRE, probability=0.0)
    for seed in range(10):
        twin, mask = make(2, np.random.default_rng(seed))
        assert np.array_equal(twin, IMAGES[2])
        assert not mask.any()


def test_the_share_of_defects_is_as_asked() -> None:
    """About the asked share of samples has a defect; hardly any is in vain."""
    make = Synthesizer(LARGE, LARGE_CENTRE, probability=0.5)
    masks = [make(0, np.random.default_rng(seed))[1] for seed in range(300)]
    assert 0.35 < np.mean([mask.any() for mask in masks]) < 0.55


def test_a_defect_lies_on_the_part() -> None:
    """With a foreground, no mask reaches beyond it."""
    make = Synthesizer(LARGE, LARGE_CENTRE, probability=1.0)
    masks = np.stack([make(0, np.random.default_rng(seed))[1] for seed in range(100)])
    assert not (masks & ~LARGE_CENTRE[0]).any()
    assert masks.any(axis=(1, 2)).mean() > 0.8


def test_the_foreground_is_that_of_the_image() -> None:
    """Each image has its own."""
    halves = np.zeros((3, SIDE, SIDE), bool)
    halves[0, :, :32] = halves[1, :, 32:] = halves[2, :32] = True
    make = Synthesizer(IMAGES, halves, probability=1.0)
    for index in range(3):
        for seed in range(20):
            assert not (make(index, np.random.default_rng(seed))[1] & ~halves[index]).any()


def test_where_the_mask_is_the_image_has_changed() -> None:
    """Nothing unchanged is called defective: every masked pixel, or one beside it, differs visibly."""
    make = Synthesizer(IMAGES, CENTRE, probability=1.0)
    for seed in range(100):
        twin, mask = make(0, np.random.default_rng(seed))
        changed = np.abs(twin.astype(int) - IMAGES[0]).max(axis=2) > 3
        near = np.zeros_like(changed)
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                near |= np.roll(changed, (dy, dx), (0, 1))
        assert not (mask & ~near).any()


def test_away_from_the_mask_the_image_is_the_original() -> None:
    """A defect has an edge, soft at most; beyond it nothing changes."""
    make = Synthesizer(IMAGES, CENTRE, probability=1.0)
    far = np.ones((SIDE, SIDE), bool)
    far[12:52, 12:52] = False
    for seed in range(100):
        twin, _ = make(0, np.random.default_rng(seed))
        assert np.array_equal(twin[far], IMAGES[0][far])


def test_a_part_that_no_shape_hits_stays_good() -> None:
    """Where there is no room for a defect, the sample is a good one, and not one without end."""
    make = Synthesizer(IMAGES, np.zeros((3, SIDE, SIDE), bool), probability=1.0)
    twin, mask = make(0, np.random.default_rng(0))
    assert np.array_equal(twin, IMAGES[0])
    assert not mask.any()


def test_textures_of_the_user_are_used() -> None:
    """Where textures are given, defects are made of them: an unmistakable green gets into the image."""
    plain = np.full((2, SIDE, SIDE, 3), (90, 90, 90), np.uint8)
    green = np.full((1, SIDE, SIDE, 3), (0, 255, 0), np.uint8)
    with_textures, without = (Synthesizer(plain, None, t, probability=1.0) for t in (green, None))

    def greens(make: Synthesizer) -> int:
        twins = (make(0, np.random.default_rng(seed))[0].astype(int) for seed in range(80))
        return sum(bool(((t[..., 1] - t[..., 0] > 60) & (t[..., 0] == t[..., 2])).any()) for t in twins)

    assert greens(with_textures) > 5
    assert greens(without) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_procedural_textures_are_images(channels: int) -> None:
    """Between 0 and 255, finite, of the shape asked for, not flat, not twice the same."""
    textures = [procedural_texture((40, 56, channels), np.random.default_rng(seed)) for seed in range(20)]
    for texture in textures:
        assert (texture.shape, texture.dtype) == ((40, 56, channels), np.float32)
        assert texture.min() >= 0
        assert texture.max() <= 255
        assert texture.std() > 0
    assert len({texture.tobytes() for texture in textures}) == 20


def test_a_change_that_nobody_sees_is_no_defect() -> None:
    """Of what was drawn only that counts whose change, over five by five pixels, is above the visible."""
    flat = np.full((1, SIDE, SIDE, 3), 128, np.uint8)
    faint = Synthesizer(flat, None, np.full((1, SIDE, SIDE, 3), 129, np.uint8), probability=1.0)
    strong = Synthesizer(flat, None, np.full((1, SIDE, SIDE, 3), 255, np.uint8), probability=1.0)
    seen = []
    for make in (faint, strong):
        drawn = [make(0, np.random.default_rng(seed)) for seed in range(150)]
        seen.append(np.mean([mask.any() for _, mask in drawn]))
        for twin, mask in drawn:
            change = np.abs(twin.astype(np.int16) - flat[0]).max(axis=2).astype(np.float32)
            assert (cv2.blur(change, (5, 5))[mask] > VISIBLE).all()
    assert seen[0] < seen[1] - 0.15


BLUE = (255, 0, 0)


def real_defect(channels: int = 3) -> tuple[Pixels, np.ndarray]:
    """A defect in the middle of an image, of a colour that no good part has, on a ground that none has either."""
    image = np.full((SIDE, SIDE, channels), 77, np.uint8)
    mask = np.zeros((SIDE, SIDE), bool)
    mask[26:38, 26:38] = True
    image[mask] = BLUE if channels == 3 else 255
    return image, mask


def transplants(channels: int = 3, count: int = 60) -> tuple[Pixels, list[tuple[Pixels, np.ndarray]]]:
    """Plain good images, and twins of them with real defects."""
    plain = np.full((2, SIDE, SIDE, channels), 90, np.uint8)
    make = Synthesizer(plain, defects=[real_defect(channels)], probability=1.0)
    return plain, [make._transplanted(seed % 2, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_real_defect_is_put_on_a_good_image(channels: int) -> None:
    """Its pixels lie where the mask says, the rest is the good image but for a soft edge; gray or colour."""
    plain, twins = transplants(channels)
    for twin, mask in twins:
        assert (twin.shape, twin.dtype) == (plain.shape[1:], np.uint8)
        assert (mask.shape, mask.dtype) == ((SIDE, SIDE), bool)
        inside = cv2.erode(mask.astype(np.uint8), np.ones((7, 7))) > 0
        outside = cv2.dilate(mask.astype(np.uint8), np.ones((11, 11))) == 0
        assert np.abs(twin[inside].astype(int) - np.array(BLUE if channels == 3 else (255,))).max(initial=0) <= 6
        assert np.array_equal(twin[outside], plain[0][outside])


def test_a_real_defect_is_moved_and_turned_a_little() -> None:
    """No two are alike, all are about as large as the original and near its place, and the good images stay."""
    plain, twins = transplants()
    sizes = np.array([mask.sum() for _, mask in twins]) / 144
    centres = np.array([np.argwhere(mask).mean(0) for _, mask in twins])
    assert len({mask.tobytes() for _, mask in twins}) > 50
    assert 0.55 < sizes.min() < sizes.max() < 1.6
    assert np.abs(centres - 31.5).max() < 0.1 * SIDE + 2
    assert centres.std(axis=0).min() > 1
    assert np.unique(plain).tolist() == [90]


def test_half_of_the_defects_are_real_where_there_are_any() -> None:
    """The others are synthetic as before; without real ones there is no trace of them."""
    defect = real_defect()
    plain = np.full((1, SIDE, SIDE, 3), 90, np.uint8)

    def real(make: Synthesizer) -> float:
        twins = (make(0, np.random.default_rng(seed))[0] for seed in range(200))
        return float(np.mean([(np.abs(t.astype(int) - BLUE).max(axis=2) <= 6).sum() > 20 for t in twins]))

    textures = np.full((1, SIDE, SIDE, 3), 160, np.uint8)
    assert real(Synthesizer(plain, None, textures, [defect], probability=1.0)) == pytest.approx(REAL_SHARE, abs=0.1)
    assert real(Synthesizer(plain, None, textures, probability=1.0)) < 0.05


def test_the_same_seed_moves_a_real_defect_alike() -> None:
    """Training with real defects can be repeated; without probability there is none."""
    make = Synthesizer(IMAGES, defects=[real_defect()], probability=1.0)
    for seed in range(10):
        (one, first), (two, second) = (make(1, np.random.default_rng(seed)) for _ in range(2))
        assert np.array_equal(one, two)
        assert np.array_equal(first, second)
    never = Synthesizer(IMAGES, defects=[real_defect()], probability=0.0)
    assert not any(never(0, np.random.default_rng(seed))[1].any() for seed in range(20))
