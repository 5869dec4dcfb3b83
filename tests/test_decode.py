"""From a frame's bytes to an image: every format right, and anything broken is a FrameError."""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engines.frames import FrameError, Pixels
from pipeline.config import Camera
from pipeline.decode import image_of, into_slot
from pipeline.simulator import Simulator
from pipeline.wire import ENCODED, MAX_SIDE, RAW_CHANNELS, Header, pixel_fault

PLAIN = Camera()
RED, GREEN, BLUE, GRAY = (20, 30, 220), (10, 200, 40), (230, 60, 25), (90, 90, 90)
QUARTERS = (RED, GREEN, BLUE, GRAY)
MOSAICS = {  # the colour of the first row's first two pixels and the second row's, in BGR's numbers
    "bayer_rg8": ((2, 1), (1, 0)),
    "bayer_bg8": ((0, 1), (1, 2)),
    "bayer_gr8": ((1, 2), (0, 1)),
    "bayer_gb8": ((1, 0), (2, 1)),
}


def coloured(width: int = 40, height: int = 32) -> Pixels:
    """Four quarters of four colours, BGR; no two rows or columns of quarters are alike."""
    image = np.empty((height, width, 3), np.uint8)
    for quarter, colour in enumerate(QUARTERS):
        row, column = divmod(quarter, 2)
        image[row * height // 2 :, column * width // 2 :] = colour
    return image


def mosaic(image: Pixels, fmt: str) -> Pixels:
    """What a sensor with this pattern sees of an image."""
    raw = np.empty(image.shape[:2], np.uint8)
    for row, colours in enumerate(MOSAICS[fmt]):
        for column, channel in enumerate(colours):
            raw[row::2, column::2] = image[row::2, column::2, channel]
    return raw


def header(fmt: str, w: int = 0, h: int = 0, **fields: int) -> Header:
    """The header of a frame."""
    return Header(seq=0, session=0, fmt=fmt, w=w, h=h, **fields)


def raw_of(image: Pixels, fmt: str) -> Pixels:
    """An image as a camera sends it in a raw format."""
    if fmt == "mono8":
        return image[..., 1].copy()
    if fmt in MOSAICS:
        return mosaic(image, fmt)
    return image if fmt == "bgr8" else image[..., ::-1].copy()


def encoded(image: Pixels, fmt: str, *options: int) -> bytes:
    """An image as a file."""
    done, data = cv2.imencode(f".{fmt}", image, options)
    assert done
    return data.tobytes()


def noise(height: int, width: int) -> Pixels:
    """An image in which no pixel is like another."""
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), np.uint8)


def test_a_gray_frame_is_taken_as_it_is() -> None:
    """mono8 is neither converted nor copied."""
    pixels = bytes(range(12))
    image = image_of(header("mono8", 4, 3), pixels, PLAIN, 1)
    assert image.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert np.shares_memory(image, np.frombuffer(pixels, np.uint8))


@pytest.mark.parametrize("fmt", ["bgr8", "rgb8"])
def test_a_colour_frame_keeps_its_channels_apart(fmt: str) -> None:
    """Both orders come out as BGR, pixel for pixel."""
    image = noise(5, 7)
    assert np.array_equal(image_of(header(fmt, 7, 5), raw_of(image, fmt).tobytes(), PLAIN, 3), image)


@pytest.mark.parametrize("fmt", sorted(MOSAICS))
def test_every_bayer_pattern_gives_the_colours_of_the_scene(fmt: str) -> None:
    """The pattern is named by its first pixel: red, green, blue and gray come out where they are, all channels."""
    scene = coloured()
    image = image_of(header(fmt, 40, 32), mosaic(scene, fmt).tobytes(), PLAIN, 3)
    assert image.shape == scene.shape
    for row in (4, 20):
        for column in (4, 24):
            inside = np.s_[row : row + 8, column : column + 8]
            assert np.array_equal(image[inside], scene[inside])


def test_the_bayer_patterns_differ() -> None:
    """A mosaic read in another pattern has other colours, so the test above can fail."""
    raw = mosaic(coloured(), "bayer_rg8").tobytes()
    images = {image_of(header(fmt, 40, 32), raw, PLAIN, 3).tobytes() for fmt in MOSAICS}
    assert len(images) == 4


@pytest.mark.parametrize("fmt", sorted(RAW_CHANNELS))
def test_padding_of_rows_is_left_out(fmt: str) -> None:
    """With a stride the image is the same as without, whatever stands in the padding."""
    raw = raw_of(noise(6, 8), fmt)
    rows = raw.reshape(6, -1)
    padded = np.full((6, rows.shape[1] + 5), 255, np.uint8)
    padded[:, : rows.shape[1]] = rows
    plain = image_of(header(fmt, 8, 6), raw.tobytes(), PLAIN, 3)
    assert np.array_equal(image_of(header(fmt, 8, 6, stride=padded.shape[1]), padded.tobytes(), PLAIN, 3), plain)


@pytest.mark.parametrize("fmt", sorted(RAW_CHANNELS))
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (1, 9), (9, 1), (2, 9)], ids=str)
def test_the_smallest_frames_are_decoded_or_refused(fmt: str, size: tuple[int, int]) -> None:
    """A frame of a pixel or two, as a wrong setting of a camera gives it, does not stop a lane."""
    width, height = size
    slot = np.empty((16, 16, 3), np.uint8)
    try:
        into_slot(header(fmt, width, height), raw_of(noise(height, width), fmt).tobytes(), PLAIN, slot)
    except FrameError:
        pass
    else:
        assert slot.shape == (16, 16, 3)


@pytest.mark.parametrize("fmt", ["mono8", "bgr8", "bayer_rg8", "png"])
def test_the_region_of_interest_is_cut_out(fmt: str) -> None:
    """x, y, width, height in pixels of the frame as it came."""
    scene = noise(12, 16)
    pixels = encoded(scene, "png") if fmt == "png" else raw_of(scene, fmt).tobytes()
    whole = image_of(header(fmt, 16, 12), pixels, PLAIN, 3)
    part = image_of(header(fmt, 16, 12), pixels, Camera(roi=(3, 2, 10, 7)), 3)
    assert np.array_equal(part, whole[2:9, 3:13])


@pytest.mark.parametrize("roi", [(0, 0, 17, 1), (0, 0, 1, 13), (16, 0, 1, 1), (10, 0, 7, 1)], ids=str)
def test_a_region_outside_the_frame_is_refused(roi: tuple[int, int, int, int]) -> None:
    """A part of the region is not the region: it is never guessed at."""
    with pytest.raises(FrameError, match="reaches outside a frame of 16x12"):
        image_of(header("mono8", 16, 12), bytes(16 * 12), Camera(roi=roi), 1)


def test_a_region_of_the_whole_frame_is_the_frame() -> None:
    """The region may reach exactly to the edges."""
    image = image_of(header("mono8", 16, 12), bytes(16 * 12), Camera(roi=(0, 0, 16, 12)), 1)
    assert image.shape == (12, 16)


@pytest.mark.parametrize(("rotate", "turns"), [(0, 0), (90, -1), (180, 2), (270, 1)])
@pytest.mark.parametrize("fmt", ["mono8", "bgr8"])
def test_the_frame_is_turned_clockwise_after_the_region(fmt: str, rotate: int, turns: int) -> None:
    """Degrees clockwise; the region is in pixels of the camera, not of the turned image."""
    scene = noise(6, 8)
    camera = Camera(roi=(1, 2, 5, 3), rotate=rotate)  # type: ignore[arg-type]
    got = image_of(header(fmt, 8, 6), raw_of(scene, fmt).tobytes(), camera, 3)
    cut = raw_of(scene, fmt)[2:5, 1:6]
    assert np.array_equal(got, np.rot90(cut, turns))


def test_a_png_comes_out_exactly() -> None:
    """Lossless is lossless, in colour and gray, with and without a size in the header."""
    scene = noise(9, 11)
    data = encoded(scene, "png")
    for said in (header("png"), header("png", 11, 9), header("png", 11, 0)):
        assert np.array_equal(image_of(said, data, PLAIN, 3), scene)
    gray = image_of(header("png"), encoded(scene[..., 0], "png"), PLAIN, 1)
    assert np.array_equal(gray, scene[..., 0])


JPEG_OPTIONS = {
    "plain": (),
    "progressive": (cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
    "restart markers": (cv2.IMWRITE_JPEG_RST_INTERVAL, 1),
    "optimised": (cv2.IMWRITE_JPEG_OPTIMIZE, 1),
}


@pytest.mark.parametrize("kind", sorted(JPEG_OPTIONS))
def test_every_kind_of_jpeg_is_measured_and_decoded(kind: str) -> None:
    """Baseline, progressive, with restart markers: the size is found and the colours are those of the scene."""
    scene = coloured(64, 48)
    data = encoded(scene, "jpeg", cv2.IMWRITE_JPEG_QUALITY, 95, *JPEG_OPTIONS[kind])
    image = image_of(header("jpeg", 64, 48), data, PLAIN, 3)
    assert np.abs(image.astype(int) - scene).mean() < 6
    with pytest.raises(FrameError, match="jpeg of 64x48 pixels, its header says 48x64"):
        image_of(header("jpeg", 48, 64), data, PLAIN, 3)


def test_a_jpeg_may_have_segments_and_fill_bytes_before_its_size() -> None:
    """What cameras put before the frame's own header, as comments, is passed over."""
    data = encoded(coloured(), "jpeg")
    comment = b"\xff\xff\xfe" + struct.pack(">H", 2 + 300) + b"\xff\xc0\xff\xd9" * 75
    image = image_of(header("jpeg", 40, 32), data[:2] + comment + data[2:], PLAIN, 3)
    assert np.array_equal(image, image_of(header("jpeg"), data, PLAIN, 3))


@pytest.mark.parametrize("fmt", sorted(ENCODED))
@pytest.mark.parametrize("channels", [1, 3])
def test_an_encoded_frame_has_the_engines_channels(fmt: str, channels: int) -> None:
    """A gray engine decodes as gray, a colour engine as BGR, whatever the file is."""
    for scene in (coloured(), coloured()[..., 0]):
        image = image_of(header(fmt), encoded(scene, fmt), PLAIN, channels)
        assert image.shape == ((32, 40) if channels == 1 else (32, 40, 3))


def test_a_png_of_another_size_than_its_header_says_is_refused() -> None:
    """The header's size is what the camera meant to send."""
    with pytest.raises(FrameError, match="png of 40x32 pixels, its header says 40x33"):
        image_of(header("png", 40, 33), encoded(coloured(), "png"), PLAIN, 3)


@pytest.mark.parametrize("fmt", sorted(ENCODED))
@pytest.mark.parametrize(
    "other", [b"", b"\0", b"GIF89a" + bytes(40), b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]
)
def test_what_is_no_image_is_refused(fmt: str, other: bytes) -> None:
    """Nothing, a signature alone, or another kind of file."""
    with pytest.raises(FrameError, match=f"not a {fmt} image"):
        image_of(header(fmt), other, PLAIN, 3)


def test_a_file_is_of_the_kind_that_its_header_says() -> None:
    """A PNG that is called a JPEG is not guessed at, nor the other way round."""
    for said, real in (("jpeg", "png"), ("png", "jpeg")):
        with pytest.raises(FrameError, match=f"not a {said} image"):
            image_of(header(said), encoded(coloured(), real), PLAIN, 3)


def png_head(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def jpeg_head(width: int, height: int) -> bytes:
    """A JPEG that claims a size: its quantisation tables are real, its frame header is not."""
    data = encoded(coloured(), "jpeg")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize(
    "data",
    [
        ("png", png_head(MAX_SIDE + 1, 1)),
        ("png", png_head(1, MAX_SIDE + 1)),
        ("png", png_head(MAX_SIDE, MAX_SIDE)),
        ("png", png_head(2**32 - 1, 2**32 - 1)),
        ("jpeg", jpeg_head(65535, 65535)),
        ("jpeg", jpeg_head(MAX_SIDE, MAX_SIDE)),
        ("jpeg", jpeg_head(MAX_SIDE + 1, 8)),
    ],
    ids=lambda data: data[0],
)
def test_a_small_file_that_unpacks_into_gigabytes_is_refused_unread(data: tuple[str, bytes]) -> None:
    """The size in the file's head is checked before anything is decoded."""
    fmt, pixels = data
    with pytest.raises(FrameError, match="larger than allowed"):
        image_of(header(fmt), pixels, PLAIN, 3)


@pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 9), (9, 0)])
def test_a_file_that_claims_no_pixels_is_refused(width: int, height: int) -> None:
    """An empty image is no image of a part."""
    for fmt, pixels in (("png", png_head(width, height)), ("jpeg", jpeg_head(width, height))):
        with pytest.raises(FrameError):
            image_of(header(fmt), pixels, PLAIN, 3)


@pytest.mark.parametrize("fmt", sorted(ENCODED))
@pytest.mark.parametrize("channels", [1, 3])
def test_a_truncated_file_is_refused_wherever_it_ends(fmt: str, channels: int) -> None:
    """Half an image is never inspected as a whole one."""
    data = encoded(Simulator(width=48, height=32).shot(0).image, fmt)
    assert image_of(header(fmt), data, PLAIN, channels).shape[:2] == (32, 48)
    for length in range(0, len(data), 7):
        with pytest.raises(FrameError):
            image_of(header(fmt), data[:length], PLAIN, channels)


@given(
    st.sampled_from(sorted(ENCODED)),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xc0\x00\x11\x08", b"\x89PNG\r\n\x1a\n", png_head(9, 9)[:24]]),
    st.binary(max_size=200),
)
@example("jpeg", b"\xff\xd8", b"\xff\xc4\x00\x00" * 50)
def test_random_bytes_raise_nothing_but_a_frame_error(fmt: str, start: bytes, rest: bytes) -> None:
    """What a peer sends as an image cannot bring a lane down."""
    try:
        image_of(header(fmt), start + rest, PLAIN, 3)
    except FrameError as error:
        assert str(error)  # noqa: PT017 - not raising is right too


@given(st.sampled_from(sorted(ENCODED)), st.data())
def test_a_damaged_file_is_an_image_or_a_frame_error(fmt: str, data: st.DataObject) -> None:
    """Wrong bytes within a file give FrameError, or an image of the size that the file claims."""
    raw = bytearray(encoded(coloured(), fmt))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    slot = np.empty((16, 16, 3), np.uint8)
    try:
        into_slot(header(fmt, 40, 32), bytes(raw), PLAIN, slot)
    except FrameError as error:
        assert str(error)  # noqa: PT017 - not raising is right too


@given(
    st.sampled_from(sorted(RAW_CHANNELS)),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(0, 9),
    st.sampled_from([0, 90, 180, 270]),
    st.sampled_from([1, 3]),
    st.data(),
)
def test_any_frame_without_a_fault_fills_the_slot(
    fmt: str, width: int, height: int, padding: int, rotate: int, channels: int, data: st.DataObject
) -> None:
    """Whatever size, stride, region and rotation: what intake lets through, a lane can take."""
    stride = width * RAW_CHANNELS[fmt] + padding
    said = header(fmt, width, height, stride=stride)
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    roi = (x, y, data.draw(st.integers(1, width - x)), data.draw(st.integers(1, height - y)))
    pixels = bytes([200]) * (stride * height)
    assert pixel_fault(said, len(pixels), 1 << 20) is None
    slot = np.zeros((12, 20, channels), np.uint8)
    into_slot(said, pixels, Camera(roi=roi, rotate=rotate), slot)  # type: ignore[arg-type]
    if fmt not in MOSAICS:
        assert np.all(slot == 200)


def test_a_frame_of_the_engines_size_is_copied_exactly_into_the_slot() -> None:
    """No resampling where nothing has to be resampled."""
    scene, slot = noise(16, 20), np.zeros((16, 20, 3), np.uint8)
    into_slot(header("bgr8", 20, 16), scene.tobytes(), PLAIN, slot)
    assert np.array_equal(slot, scene)
