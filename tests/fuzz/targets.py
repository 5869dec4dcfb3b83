"""What is fuzzed, and what it promises: bytes of any kind lead to a value in range or to a documented error.

Shared by the coverage-guided harness (``tests/fuzz/wire.py``) and the suite (``tests/test_fuzz_wire.py``).
"""

from __future__ import annotations

import struct
from typing import Final

import cv2
import numpy as np

from engines.frames import FrameError
from pipeline import wire
from pipeline.config import Camera
from pipeline.decode import into_slot
from pipeline.parts import Reason
from pipeline.wire import ENCODED, MAX_SIDE, RAW_CHANNELS, Header, WireError

LIMIT: Final = 1 << 20
"""Stands for ``limits.max_frame_bytes``."""
CAMERAS: Final = (Camera(), Camera(roi=(1, 2, 3, 4)), Camera(rotate=90), Camera(roi=(0, 0, 16384, 1), rotate=270))
FORMATS: Final = (*RAW_CHANNELS, *sorted(ENCODED), "rgb48")
GRAY, COLOUR = np.zeros((8, 8, 1), np.uint8), np.zeros((8, 8, 3), np.uint8)
COUNTERS: Final = frozenset({"bad_camera_id", "bad_header"})


def camera_id(raw: bytes) -> None:
    """``decode_camera``: a safe name, or a WireError."""
    try:
        name = wire.decode_camera(raw)
    except WireError as error:
        check(error.counter == "bad_camera_id", error.counter)
        return
    check(0 < len(name) <= 64 and name.encode() == raw, name)


def header(raw: bytes) -> None:
    """``decode_header`` and ``pixel_fault``: values in range and a reason of the closed set, or a WireError."""
    try:
        got = wire.decode_header(raw)
    except WireError as error:
        check(error.counter == "bad_header", error.counter)
        return
    in_range(got)
    for size in (0, got.w * got.h, LIMIT + 1):
        fault = wire.pixel_fault(got, size, LIMIT)
        check(fault is None or Reason(fault) in Reason, fault)


def imagezmq(raw: bytes) -> None:
    """``decode_imagezmq``: as a header, and text that can be stored."""
    try:
        name, got = wire.decode_imagezmq(raw, 1, lambda _: 7)
    except WireError as error:
        check(error.counter in COUNTERS, error.counter)
        return
    in_range(got)
    check(wire.decode_camera(name.encode()) == name, name)
    check(len(got.part.encode()) <= 4 * 128, got.part)


def frame(raw: bytes) -> None:
    """``into_slot``, behind ``pixel_fault`` as in the line: pixels in the slot, or a FrameError.

    The first bytes choose camera, engine, format and size, the rest is the image.
    """
    if len(raw) < 8:
        return
    choice, fmt, w, h, stride = struct.unpack_from("<BBHHH", raw)
    pixels = memoryview(raw)[8:]
    got = Header(seq=0, session=0, w=w % 64, h=h % 64, fmt=FORMATS[fmt % len(FORMATS)], stride=stride % 256)
    if choice & 16 and got.fmt in RAW_CHANNELS:  # else hardly any raw frame is of the right size
        pixels = memoryview(raw[8:].ljust(1 << 14, b"\0")[: max(wire._raw_size(got), 0)])
    if wire.pixel_fault(got, len(pixels), LIMIT) is not None:
        return
    slot = COLOUR if choice & 8 else GRAY
    try:
        into_slot(got, pixels, CAMERAS[choice % len(CAMERAS)], slot)
    except (FrameError, cv2.error):
        return


def in_range(got: Header) -> None:
    """What the rest of the line relies on."""
    check(all(0 <= value < 1 << 64 for value in (got.seq, got.session, got.t_ns)), got)
    check(0 <= got.w <= MAX_SIDE and 0 <= got.h <= MAX_SIDE and 0 <= got.stride <= 1 << 20, got)
    check(got.deadline_ms >= 0, got)
    texts = (got.part, got.recipe, got.truth, got.fmt)
    check(all(len(text) <= 128 and text.encode() is not None for text in texts), got)


def check(holds: bool, what: object) -> None:
    """Raise where a promise is broken; also under ``python -O``."""
    if not holds:
        raise AssertionError(f"promise broken: {what!r}")


TARGETS: Final = (camera_id, header, imagezmq, frame)


def any_target(raw: bytes) -> None:
    """The first byte picks the decoder."""
    if raw:
        TARGETS[raw[0] % len(TARGETS)](raw[1:])
