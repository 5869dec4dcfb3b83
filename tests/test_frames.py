"""The one way in which pixels become an engine's input."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.frames import RESIZE_RULE, FrameError, InputSpec, Pixels, decode_image, fit


def noise(*shape: int) -> Pixels:
    """An image in which no pixel is like another."""
    return np.random.default_rng(3).integers(0, 256, shape, np.uint8)


def fitted(image: Pixels, *shape: int) -> Pixels:
    """The image in a slot of this shape, which held something else before."""
    slot = np.full(shape, 77, np.uint8)
    fit(image, slot)
    return slot


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1), (6, 8, 3)])
def test_a_matching_image_is_copied_exactly(shape: tuple[int, ...]) -> None:
    """Where colour and size match, the slot has the image's pixels and the image is its own still."""
    image = noise(*shape)
    before = image.copy()
    slot = fitted(image, 6, 8, 3 if shape[-1] == 3 else 1)
    assert np.array_equal(slot, image.reshape(slot.shape))
    slot[:] = 0
    assert np.array_equal(image, before)


def test_a_view_with_gaps_is_copied_exactly() -> None:
    """A region of a larger frame is not contiguous, and comes out the same."""
    image = noise(20, 30, 3)[3:9, 5:13]
    assert np.array_equal(fitted(image, 6, 8, 3), image)
    assert np.array_equal(fitted(image[..., 1], 6, 8, 1)[..., 0], image[..., 1])


def test_a_read_only_image_is_taken() -> None:
    """Pixels of a received message cannot be written to, and need not be."""
    image = np.frombuffer(bytes(range(48)), np.uint8).reshape(6, 8)
    assert np.array_equal(fitted(image, 6, 8, 1)[..., 0], image)
    assert fitted(image, 3, 4, 3).shape == (3, 4, 3)


def test_gray_becomes_colour_with_equal_channels() -> None:
    """A colour engine sees a gray frame as gray."""
    image = noise(6, 8)
    slot = fitted(image, 6, 8, 3)
    assert all(np.array_equal(slot[..., channel], image) for channel in range(3))


def test_colour_becomes_gray_by_the_eyes_weights() -> None:
    """A gray engine sees blue, green and red with the weights of BT.601."""
    pure = np.array([[(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]], np.uint8)
    assert fitted(pure, 1, 4, 1)[0, :, 0].tolist() == [29, 150, 76, 255]


@pytest.mark.parametrize(
    ("size", "rule"),
    [
        ((24, 32), cv2.INTER_AREA),
        ((13, 17), cv2.INTER_AREA),
        ((12, 32), cv2.INTER_AREA),
        ((24, 16), cv2.INTER_AREA),
        ((6, 8), cv2.INTER_LINEAR),
        ((6, 32), cv2.INTER_LINEAR),
        ((24, 8), cv2.INTER_LINEAR),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_resize_rule(size: tuple[int, int], rule: int, channels: int) -> None:
    """Area where both sides shrink or stay, linear otherwise; what the manifest calls area-linear."""
    assert RESIZE_RULE == "area-linear"
    image = noise(*size, 3) if channels == 3 else noise(*size)
    wanted = cv2.resize(image, (16, 12), interpolation=rule)
    other = cv2.resize(image, (16, 12), interpolation=cv2.INTER_LINEAR if rule == cv2.INTER_AREA else cv2.INTER_AREA)
    slot = fitted(image, 12, 16, channels)
    assert np.array_equal(slot.reshape(wanted.shape), wanted)
    if size not in {(6, 8), (6, 32), (24, 8), (24, 32)}:  # where both rules give the same, nothing is proven
        assert not np.array_equal(slot.reshape(other.shape), other)


def test_halving_averages_four_pixels() -> None:
    """Area interpolation means the mean: no pixel of a small defect is skipped."""
    image = np.zeros((4, 4), np.uint8)
    image[1, 1] = 200
    assert fitted(image, 2, 2, 1)[..., 0].tolist() == [[50, 0], [0, 0]]


def test_a_slot_of_a_batch_gets_its_own_frame_only() -> None:
    """Writing one slot of a lane's buffer leaves its neighbours alone."""
    for channels in (1, 3):
        frames = np.full((3, 6, 8, channels), 77, np.uint8)
        fit(np.full((30, 40, 3), 9, np.uint8), frames[1])
        assert np.all(frames[1] == 9)
        assert np.all(frames[[0, 2]] == 77)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((0, 8), np.uint8),
        np.zeros((6, 0, 3), np.uint8),
        np.zeros((6, 8, 2), np.uint8),
        np.zeros((6, 8, 4), np.uint8),
        np.zeros((1, 6, 8, 3), np.uint8),
        np.zeros(48, np.uint8),
        np.zeros((6, 8), np.uint16),
        np.zeros((6, 8), np.float32),
    ],
    ids=lambda image: f"{image.dtype}{image.shape}",
)
def test_pixels_of_another_kind_are_refused(image: Pixels) -> None:
    """Empty, not 8 bit, or with two or four channels: the slot stays as it was."""
    slot = np.full((6, 8, 3), 77, np.uint8)
    with pytest.raises(FrameError, match="expected"):
        fit(image, slot)
    assert np.all(slot == 77)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]))
def test_a_flat_image_stays_flat_at_any_size(width: int, height: int, to_w: int, to_h: int, channels: int) -> None:
    """No size brings in levels that the frame does not have."""
    for image in (np.full((height, width), 123, np.uint8), np.full((height, width, 3), 123, np.uint8)):
        assert np.all(fitted(image, to_h, to_w, channels) == 123)


def test_a_file_is_decoded_as_gray_or_colour() -> None:
    """One decoder for training and for the line."""
    image = noise(6, 8, 3)
    data = cv2.imencode(".png", image)[1].tobytes()
    assert np.array_equal(decode_image(data, 3), image)
    gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    assert np.abs(decode_image(data, 1).astype(int) - gray).max() <= 1  # the decoder has its own rounding


@pytest.mark.parametrize("data", [b"", b"\0", b"no image", bytes(1000)])
def test_what_opencv_cannot_decode_is_refused(data: bytes) -> None:
    """One kind of error, whatever OpenCV does."""
    with pytest.raises(FrameError, match="undecodable image"):
        decode_image(data, 3)


def test_the_shape_of_an_input_is_height_width_channels() -> None:
    """The order in which NumPy and OpenCV want it."""
    assert InputSpec(height=2, width=3, channels=1, colour="mono").shape == (2, 3, 1)
