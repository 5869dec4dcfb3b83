"""Folders of images: which are found, how they are split and read, and what is said where there are none."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.frames import InputSpec, fit
from train import data
from train.data import DataError, Sample

GRAY = InputSpec(height=8, width=10, channels=1, colour="mono")
COLOUR = InputSpec(height=8, width=10, channels=3, colour="bgr")


def picture(path: Path, image: np.ndarray | None = None) -> Path:
    """An image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((8, 10, 3), 50, np.uint8) if image is None else image)
    return path


def noise(*shape: int) -> np.ndarray:
    """An image in which no pixel is like another."""
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def names(paths: list[Path], folder: Path) -> list[str]:
    """Paths within a folder."""
    return [path.relative_to(folder).as_posix() for path in paths]


@pytest.mark.parametrize("where", ["train/good", "good", "."])
def test_good_images_are_found_in_every_layout(tmp_path: Path, where: str) -> None:
    """``train/good``, ``good`` or the folder itself; sorted, images only, whatever the case of their suffix."""
    for name in ("b.PNG", "a.jpg", "c.tiff"):
        picture(tmp_path / where / name)
    (tmp_path / where / "notes.txt").write_text("no image")
    found = data.good_images(tmp_path)
    assert [path.name for path in found] == ["a.jpg", "b.PNG", "c.tiff"]


def test_the_training_images_of_mvtec_are_taken_and_no_others(tmp_path: Path) -> None:
    """Test images beside them are never trained on."""
    for name in ("train/good/0.png", "test/good/1.png", "test/crack/2.png", "good/3.png", "4.png"):
        picture(tmp_path / name)
    assert names(data.good_images(tmp_path), tmp_path) == ["train/good/0.png"]


@pytest.mark.parametrize("where", ["none", "test/good/0.png"])
def test_a_folder_without_good_images_says_where_they_were_expected(tmp_path: Path, where: str) -> None:
    """A missing folder and one without training images are told the same way."""
    if where != "none":
        picture(tmp_path / where)
    with pytest.raises(DataError, match=r"no images of good parts; expected them in train/good/, in good/"):
        data.good_images(tmp_path if where != "none" else tmp_path / "none")


def test_test_samples_have_their_class_and_mask(tmp_path: Path) -> None:
    """As in MVTec AD: the folder is the class, masks lie in ground_truth beside test, named either way."""
    for name in ("good/0.png", "crack/0.png", "crack/1.png", "stain/0.png", "stain/1.jpg"):
        picture(tmp_path / "test" / name)
    for name in ("crack/0_mask.png", "crack/1.png", "stain/1_mask.png"):
        picture(tmp_path / "ground_truth" / name)
    picture(tmp_path / "train" / "good" / "0.png")
    truth = tmp_path / "ground_truth"
    test = tmp_path / "test"
    assert data.labelled_samples(tmp_path) == [
        Sample(test / "crack" / "0.png", "crack", truth / "crack" / "0_mask.png"),
        Sample(test / "crack" / "1.png", "crack", truth / "crack" / "1.png"),
        Sample(test / "good" / "0.png", "good", None),
        Sample(test / "stain" / "0.png", "stain", None),
        Sample(test / "stain" / "1.jpg", "stain", truth / "stain" / "1_mask.png"),
    ]
    assert [sample.defective for sample in data.labelled_samples(test)] == [True, True, False, True, True]
    assert data.labelled_samples(test) == data.labelled_samples(tmp_path)


@pytest.mark.parametrize("layout", [[], ["test/crack/0.png"], ["crack/0.png"], ["0.png"], ["test/0.png"]], ids=str)
def test_test_samples_need_good_ones(tmp_path: Path, layout: list[str]) -> None:
    """Without good parts nothing can be measured: the layout that is expected is told."""
    for name in layout:
        picture(tmp_path / name)
    with pytest.raises(DataError, match=r"expected test/good/ and one folder per kind of defect"):
        data.labelled_samples(tmp_path)


def test_a_folder_that_does_not_exist_is_told_like_an_empty_one(tmp_path: Path) -> None:
    """A typing error is an explanation, not a traceback."""
    with pytest.raises(DataError):
        data.labelled_samples(tmp_path / "none")


def test_images_are_read_as_the_line_would(tmp_path: Path) -> None:
    """Gray or BGR as the engine takes them, fitted to its input, one after the other."""
    images = [noise(8, 10, 3), noise(16, 20, 3), noise(5, 7, 3)]
    paths = [picture(tmp_path / f"{number}.png", image) for number, image in enumerate(images)]
    frames = data.load(paths, COLOUR)
    assert (frames.shape, frames.dtype) == ((3, 8, 10, 3), np.uint8)
    for frame, image in zip(frames, images, strict=True):
        slot = np.empty((8, 10, 3), np.uint8)
        fit(image, slot)
        assert np.array_equal(frame, slot)
    assert np.array_equal(data.load(paths[:1], GRAY)[0, ..., 0], data.read_image(paths[0], 1))
    assert data.load([], GRAY).shape == (0, 8, 10, 1)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    """One bad file among thousands can be found."""
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png: not an image"):
        data.read_image(path, 3)
    with pytest.raises(DataError, match=r"broken\.png: not a mask"):
        data.load_mask(path, 8, 10)


def test_gray_images_are_known_as_gray(tmp_path: Path) -> None:
    """Files with one channel, or three equal ones, need a gray engine; one coloured pixel needs colour."""
    flat = noise(8, 10)
    gray = [picture(tmp_path / "a.png", flat), picture(tmp_path / "b.png", np.repeat(flat[..., None], 3, axis=2))]
    coloured = np.repeat(flat[..., None], 3, axis=2)
    coloured[7, 9, 2] ^= 1
    assert data.infer_channels(gray) == 1
    assert data.infer_channels([*gray, picture(tmp_path / "c.png", coloured)]) == 3
    assert data.infer_channels([*gray, tmp_path / "c.png"], probe=2) == 1


def test_a_mask_is_true_on_every_level_but_zero(tmp_path: Path) -> None:
    """Some data sets have masks of 0 and 1; a mask is enlarged without soft edges."""
    image = np.zeros((4, 5), np.uint8)
    image[1, 2], image[3, 4] = 1, 255
    path = picture(tmp_path / "mask.png", image)
    assert np.array_equal(data.load_mask(path, 4, 5), image > 0)
    large = data.load_mask(path, 8, 10)
    assert (large.dtype, large.shape, int(large.sum())) == (bool, (8, 10), 8)
    assert large[2:4, 4:6].all()


def test_a_mask_has_the_engines_height_and_width(tmp_path: Path) -> None:
    """Height before width, also where the mask is of another shape."""
    path = picture(tmp_path / "mask.png", np.full((30, 20), 255, np.uint8))
    assert data.load_mask(path, 8, 10).shape == (8, 10)


@given(st.integers(4, 300), st.floats(0, 1), st.integers(0, 1000))
def test_a_split_is_complete_and_reproducible(count: int, holdout: float, seed: int) -> None:
    """Every image is on exactly one side; at least two and at most half are held out, about as many as asked."""
    kept, held = data.split(count, holdout, seed)
    assert sorted([*kept, *held]) == list(range(count))
    assert 2 <= len(held) <= count // 2
    assert len(held) == min(max(2, round(count * holdout)), count // 2)
    again = data.split(count, holdout, seed)
    assert np.array_equal(kept, again[0])
    assert np.array_equal(held, again[1])


def test_a_split_is_random() -> None:
    """Images are not held out by their place in the folder; another seed is another split."""
    splits = {tuple(data.split(40, 0.25, seed)[1]) for seed in range(10)}
    assert len(splits) == 10
    assert tuple(range(10)) not in splits


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_images_are_refused(count: int) -> None:
    """Three images are no training set: the number that is needed is told."""
    with pytest.raises(DataError, match=f"{count} good images are too few: at least 4"):
        data.split(count, 0.2, 0)


def test_the_digest_names_the_data(tmp_path: Path) -> None:
    """It depends on every byte and on the order, and not on where the files lie."""
    for folder in ("one", "two"):
        for number in range(3):
            picture(tmp_path / folder / f"{number}.png", noise(4, 4, 3) + np.uint8(number))
    one, two = ([tmp_path / folder / f"{number}.png" for number in range(3)] for folder in ("one", "two"))
    assert data.digest(one) == data.digest(two)
    assert data.digest(one) != data.digest(one[::-1])
    assert data.digest(one) != data.digest(one[:2])
    two[1].write_bytes(two[1].read_bytes() + b"\0")
    assert data.digest(one) != data.digest(two)


def masked(folder: Path, name: str, mask: str, left: int = 0) -> None:
    """A defective image, dark where it is defective: in two columns, from ``left`` on; and its mask."""
    truth = np.zeros((8, 10), np.uint8)
    truth[:, left : left + 2] = 255
    picture(folder / name, np.where(truth[..., None] > 0, 0, 200).astype(np.uint8).repeat(3, axis=2))
    picture(folder / mask, truth)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("test/crack/0.png", "ground_truth/crack/0_mask.png"),
        ("test/crack/0.png", "ground_truth/crack/0.png"),
        ("test/crack/0.png", "test/crack/0_mask.png"),
        ("crack/0.png", "crack/0_mask.png"),
        ("0.png", "0_mask.png"),
        ("0.jpg", "0_mask.png"),
    ],
)
def test_real_defects_are_found_in_every_layout(tmp_path: Path, name: str, mask: str) -> None:
    """As in MVTec AD, by class, or flat with masks beside the images; as the engine would see them."""
    masked(tmp_path, name, mask, left=4)
    ((image, truth),) = data.load_defects(tmp_path, COLOUR)
    assert (image.shape, image.dtype) == ((8, 10, 3), np.uint8)
    assert (truth.shape, truth.dtype) == ((8, 10), bool)
    assert truth[:, 4:6].all()
    assert truth.sum() == 16
    assert image[truth].mean() < 30
    assert image[~truth].mean() > 170


def test_every_class_of_real_defects_counts(tmp_path: Path) -> None:
    """All classes but the good parts, in order, each image with its own mask."""
    for left, name in ((0, "crack/0"), (3, "crack/1"), (6, "stain/0")):
        masked(tmp_path, f"{name}.png", f"{name}_mask.png", left)
    masked(tmp_path, "good/0.png", "good/0_mask.png", 8)
    found = data.load_defects(tmp_path, GRAY)
    assert [image.shape for image, _ in found] == [(8, 10, 1)] * 3
    assert [int(mask.argmax()) for _, mask in found] == [0, 3, 6]


def test_defects_without_a_mask_are_left_out(tmp_path: Path) -> None:
    """Where a defect is must be known to use it; a mask is never taken for an image."""
    masked(tmp_path, "0.png", "0_mask.png")
    picture(tmp_path / "1.png")
    picture(tmp_path / "2.jpg")
    assert len(data.load_defects(tmp_path, COLOUR)) == 1


@pytest.mark.parametrize("layout", [[], ["0.png"], ["crack/0.png"], ["good/0.png", "good/0_mask.png"]], ids=str)
def test_a_folder_without_masked_defects_says_where_masks_were_expected(tmp_path: Path, layout: list[str]) -> None:
    """Good parts are no defects, images without masks are of no use: the layout is told."""
    for name in layout:
        picture(tmp_path / name)
    with pytest.raises(DataError, match=r"expected NAME_mask\.png beside NAME\.png, or in ground_truth/"):
        data.load_defects(tmp_path, COLOUR)
