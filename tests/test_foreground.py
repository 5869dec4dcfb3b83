"""Where the part is: synthetic defects belong on it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from engines.frames import Pixels
from train import foreground
from train.foreground import METHODS, choose, foregrounds, plausible

SIDE = 96


def disc(part: int, ground: int, *, channels: int = 1, radius: int = 26, x: int = 48, noise: int = 6) -> Pixels:
    """A round part on a plain ground."""
    image = np.full((SIDE, SIDE), ground, np.uint8)
    cv2.circle(image, (x, 48), radius, part, -1)
    image = np.repeat(image[..., None], channels, axis=2)
    grain = np.random.default_rng(part + x).integers(0, noise + 1, image.shape)
    return (image + grain).astype(np.uint8)


def truth(radius: int = 26, x: int = 48) -> np.ndarray:
    """Where that part is."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.circle(mask, (x, 48), radius, 1, -1)
    return mask > 0


def agreement(one: np.ndarray, two: np.ndarray) -> float:
    """Intersection over union."""
    return float((one & two).sum() / (one | two).sum())


@pytest.mark.parametrize(
    ("method", "part", "ground"),
    [("otsu", 200, 40), ("otsu-inverse", 40, 200), ("grabcut", 200, 40), ("grabcut", 40, 200)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_method_finds_the_part(method: str, part: int, ground: int, channels: int) -> None:
    """Bright or dark, gray or colour: the mask is the part."""
    mask = METHODS[method](disc(part, ground, channels=channels))
    assert (mask.shape, mask.dtype) == ((SIDE, SIDE), bool)
    assert agreement(mask, truth()) > 0.95


def test_grabcut_tells_colours_apart_that_are_equally_bright() -> None:
    """A red part on a green ground of the same gray."""
    image = np.empty((SIDE, SIDE, 3), np.uint8)
    image[:] = (0, 128, 0)
    image[truth()] = (0, 0, 251)
    image = image + np.random.default_rng(0).integers(0, 4, image.shape).astype(np.uint8)
    assert agreement(foreground.grabcut(image), truth()) > 0.95


@pytest.mark.parametrize(("part", "ground", "name"), [(200, 40, "otsu"), (40, 200, "otsu-inverse")])
def test_auto_takes_the_method_that_fits_the_images(part: int, ground: int, name: str) -> None:
    """A bright part on a dark ground and the other way round are told apart by what lies at the border."""
    images = np.stack([disc(part, ground, x=x) for x in (44, 48, 52)])
    masks, method, share = foregrounds(images)
    assert method == choose(images) == name
    assert masks is not None
    assert masks.shape == (3, SIDE, SIDE)
    for mask, x in zip(masks, (44, 48, 52), strict=True):
        assert not (truth(x=x) & ~mask).any()
        assert agreement(mask, truth(x=x)) > 0.75
    assert share == pytest.approx(masks.mean())


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_flat_image_has_no_part(level: int, channels: int) -> None:
    """Nothing to be found is said as such: defects may then lie anywhere."""
    images = np.full((3, SIDE, SIDE, channels), level, np.uint8)
    assert foregrounds(images) == (None, "none", 1.0)


def test_a_texture_that_fills_the_image_has_no_part() -> None:
    """Noise is no part on a ground, whatever a threshold makes of it."""
    images = np.random.default_rng(2).integers(0, 256, (4, SIDE, SIDE, 1), np.uint8)
    assert choose(images) == "none"


def test_none_is_the_whole_image() -> None:
    """Said by hand, no method is tried."""
    assert foregrounds(np.stack([disc(200, 40)]), "none") == (None, "none", 1.0)


def test_the_parts_edge_belongs_to_the_part() -> None:
    """Masks are closed and grown: no hole within, and a rim of a pixel or two without."""
    image = disc(200, 40, noise=0)
    image[46:48, 46:48] = 40
    masks, _, _ = foregrounds(image[None], "otsu")
    assert masks is not None
    assert masks[0, 40:56, 40:56].all()
    rim = cv2.dilate(truth().astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))) > 0
    assert not (rim & ~masks[0]).any()
    assert masks[0].mean() < truth(30).mean()


def test_an_image_in_which_the_method_fails_is_all_part() -> None:
    """Among good masks a failed one does not keep defects away from its image."""
    images = np.stack([disc(200, 40), np.full((SIDE, SIDE, 1), 90, np.uint8)])
    masks, _, _ = foregrounds(images, "otsu-inverse")
    assert masks is not None
    assert masks[1].all()
    masks, _, _ = foregrounds(np.stack([disc(200, 40), disc(200, 40, radius=2)]), "otsu")
    assert masks is not None
    assert not masks[0].all()
    assert masks[1].all()


def test_masks_are_plausible_if_they_look_like_one_part_on_a_ground() -> None:
    """Not all, not nothing, not at the border, not of very different sizes."""
    good = np.stack([truth(), truth(25), truth(27)])
    assert plausible(good)
    assert not plausible(~good)
    assert not plausible(np.ones_like(good))
    assert not plausible(np.zeros_like(good))
    assert not plausible(np.stack([truth(3), truth(3)]))
    assert not plausible(np.stack([truth(14), truth(45), truth(14), truth(45)]))


def test_the_same_images_have_the_same_masks() -> None:
    """GrabCut draws at random; here it draws the same."""
    images = np.stack([disc(200, 40, channels=3, noise=60, x=x) for x in (46, 50)])
    one, two = (foregrounds(images, "grabcut")[0] for _ in range(2))
    assert one is not None
    assert two is not None
    assert np.array_equal(one, two)


def test_a_sample_of_many_images_is_enough() -> None:
    """The choice looks at a few images, the first and the last among them."""
    images = np.repeat(disc(200, 40)[None], 50, axis=0)
    images[1:-1:2] = 0
    assert choose(images, probe=2) == "otsu"
