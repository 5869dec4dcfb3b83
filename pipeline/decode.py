"""From a frame as it came to pixels in a lane's slot: decoded once, copied once."""

from __future__ import annotations

import struct
from typing import Any, Final

import cv2
import numpy as np

from engines.frames import FrameError, Pixels, decode_image, fit
from pipeline.config import Camera
from pipeline.wire import MAX_SIDE, RAW_CHANNELS, Header

BAYER: Final = {  # OpenCV names the pattern by the second row's second pixel, the wire by the first row's first
    "bayer_rg8": cv2.COLOR_BayerBG2BGR,
    "bayer_bg8": cv2.COLOR_BayerRG2BGR,
    "bayer_gr8": cv2.COLOR_BayerGB2BGR,
    "bayer_gb8": cv2.COLOR_BayerGR2BGR,
}
TURNS: Final = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}
PNG: Final = b"\x89PNG\r\n\x1a\n"
PNG_CHUNK: Final = 12
"""Bytes of a chunk's length, type and checksum."""
JPEG_STANDALONE: Final = {0x01, *range(0xD0, 0xD9)}
JPEG_FRAMES: Final = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def image_of(header: Header, pixels: Any, camera: Camera, channels: int) -> Pixels:
    """Return the image to inspect: decoded, cut to the region of interest, rotated.

    Args:
        header: The frame's header; its sizes have been checked against the pixels.
        pixels: The frame's bytes.
        camera: The camera's settings.
        channels: Channels of the engine's input; a gray engine decodes JPEG and PNG as gray.

    Returns:
        uint8 ``(h, w)`` or ``(h, w, 3)`` in BGR order; a view of ``pixels`` where nothing had to be done.

    Raises:
        FrameError: if the frame cannot be decoded, is larger than allowed, or the region lies outside it.
    """
    if header.fmt in RAW_CHANNELS:
        image = _raw(header, pixels)
    else:
        _check_encoded_size(header, pixels)
        image = decode_image(pixels, channels)
    if camera.roi is not None:
        x, y, width, height = camera.roi
        if x + width > image.shape[1] or y + height > image.shape[0]:
            msg = f"roi {camera.roi} reaches outside a frame of {image.shape[1]}x{image.shape[0]}"
            raise FrameError(msg)
        image = image[y : y + height, x : x + width]
    if camera.rotate:
        image = np.asarray(cv2.rotate(image, TURNS[camera.rotate]), np.uint8)
    return image


def into_slot(header: Header, pixels: Any, camera: Camera, slot: Pixels) -> None:
    """Decode a frame into a lane's slot, uint8 ``(H, W, C)``; raises :class:`FrameError` as :func:`image_of`."""
    fit(image_of(header, pixels, camera, slot.shape[2]), slot)


def _raw(header: Header, pixels: Any) -> Pixels:
    channels = RAW_CHANNELS[header.fmt]
    row = header.w * channels
    flat = np.frombuffer(pixels, np.uint8).reshape(header.h, header.stride or row)[:, :row]
    if header.fmt == "mono8":
        return flat
    if header.fmt in BAYER:
        return np.asarray(cv2.cvtColor(flat, BAYER[header.fmt]), np.uint8)
    image = flat.reshape(header.h, header.w, 3)
    return image if header.fmt == "bgr8" else np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), np.uint8)


def _check_encoded_size(header: Header, pixels: Any) -> None:
    """Read the size from the file's head, so that a small file cannot unpack into gigabytes."""
    view = memoryview(pixels).cast("B")
    size = _png_size(view) if header.fmt == "png" else _jpeg_size(view)
    if size is None:
        msg = f"not a {header.fmt} image"
        raise FrameError(msg)
    if max(size) > MAX_SIDE or size[0] * size[1] > MAX_SIDE * MAX_SIDE // 4:
        msg = f"{header.fmt} of {size[0]}x{size[1]} pixels is larger than allowed"
        raise FrameError(msg)
    if header.fmt == "png":
        _check_chunks(view)
    if header.w and header.h and (header.w, header.h) != size:
        msg = f"{header.fmt} of {size[0]}x{size[1]} pixels, its header says {header.w}x{header.h}"
        raise FrameError(msg)


def _png_size(view: memoryview) -> tuple[int, int] | None:
    if len(view) < 24 or bytes(view[:8]) != PNG:
        return None
    width, height = struct.unpack(">II", view[16:24])
    return width, height


def _check_chunks(view: memoryview) -> None:
    """Refuse a PNG with a chunk that is longer than the file: OpenCV takes memory for it before it reads it."""
    at = len(PNG)
    while at + PNG_CHUNK <= len(view):
        length, kind = struct.unpack_from(">I4s", view, at)
        at += PNG_CHUNK + int(length)
        if kind == b"IEND" and at <= len(view):
            return
    msg = "a png without its end, or with a chunk that is longer than the file"
    raise FrameError(msg)


def _jpeg_size(view: memoryview) -> tuple[int, int] | None:
    """Width and height from a JPEG's start-of-frame segment, or None."""
    if bytes(view[:2]) != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(view) and view[at] == 0xFF:
        marker = view[at + 1]
        if marker == 0xFF or marker in JPEG_STANDALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in JPEG_FRAMES:
            height, width = struct.unpack(">HH", view[at + 5 : at + 9])
            return width, height
        at += 2 + int(struct.unpack(">H", view[at + 2 : at + 4])[0])
    return None
