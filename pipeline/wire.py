"""The frame message, ``dmdd.frame.v1``: three parts, camera id, MessagePack header, pixels.

See ``docs/contracts.md``. Everything a peer can send is checked here before anything else sees it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec

VERSION: Final = 1
CAMERA_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
MAX_SIDE: Final = 16384
MAX_HEADER_BYTES: Final = 4096

RAW_CHANNELS: Final = {
    "mono8": 1,
    "bgr8": 3,
    "rgb8": 3,
    "bayer_rg8": 1,
    "bayer_bg8": 1,
    "bayer_gr8": 1,
    "bayer_gb8": 1,
}
ENCODED: Final = frozenset({"jpeg", "png"})

U64 = Annotated[int, msgspec.Meta(ge=0)]
Text = Annotated[str, msgspec.Meta(max_length=128)]


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a camera says of a frame. Unknown keys are ignored, so that senders may add their own.

    Attributes:
        seq: Number of this frame since the session's start, one more for every trigger, sent or lost.
        session: Start of this camera's run, nanoseconds of the wall clock; grows with every restart.
        w, h: Size in pixels; 0 for ``jpeg`` and ``png`` where the sender does not know it.
        fmt: ``mono8|bgr8|rgb8|bayer_*8|jpeg|png``.
        stride: Bytes a row, where rows are padded; 0 means none are.
        t_ns: Exposure, nanoseconds of the wall clock; 0 if unknown.
        part: Trigger or serial id, if the sender has one.
        recipe: Product, if it changes.
        complete: False for a buffer that the camera did not fill: such a frame is never inspected.
        deadline_ms: Wish for an earlier deadline than the camera's configured one; 0 for none.
        eos: End of stream: no frame; ``seq`` is one more than the last frame's.
        truth: Known label of a test image (``good`` or the defect's name); copied to the record.
        simulated: The frame is not of a real part.
    """

    seq: U64
    session: U64
    w: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIDE)] = 0
    h: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIDE)] = 0
    fmt: Text = "mono8"
    v: int = VERSION
    stride: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    t_ns: U64 = 0
    part: Text = ""
    recipe: Text = ""
    complete: bool = True
    deadline_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    eos: bool = False
    truth: Text = ""
    simulated: bool = False


class WireError(ValueError):
    """A message in which no part can be named; it is refused and counted.

    Attributes:
        counter: Name of the counter that it moves.
    """

    def __init__(self, counter: str, message: str) -> None:
        super().__init__(message)
        self.counter = counter


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Header)


def encode(camera: str, header: Header, pixels: bytes | memoryview) -> list[bytes | memoryview]:
    """Return the three parts of a message; the pixels are not copied."""
    return [camera.encode(), _encoder.encode(header), pixels]


def decode_camera(raw: bytes) -> str:
    """Return the camera id.

    Raises:
        WireError: if it is not 1..64 letters, digits, ``_ . -``.
    """
    try:
        camera = raw.decode("ascii") if len(raw) <= 64 else ""
    except UnicodeDecodeError:
        camera = ""
    if not CAMERA_ID.fullmatch(camera):
        raise WireError("bad_camera_id", f"camera id {raw[:64]!r}: 1 to 64 letters, digits, '_', '.', '-'")
    return camera


def decode_header(raw: bytes) -> Header:
    """Return the header.

    Raises:
        WireError: if it is not a MessagePack map with ``seq`` and ``session``, or a value is out of range.
    """
    if len(raw) > MAX_HEADER_BYTES:
        raise WireError("bad_header", f"header of {len(raw)} bytes, at most {MAX_HEADER_BYTES}")
    try:
        header = _decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError("bad_header", f"header: {error}") from error
    if header.seq >= 1 << 64 or header.session >= 1 << 64:
        raise WireError("bad_header", "header: seq and session are unsigned 64-bit numbers")
    return header


def pixel_fault(header: Header, size: int, limit: int) -> str | None:
    """Return the reason why the pixels cannot be inspected, or None. Nothing is ever guessed.

    Args:
        header: A decoded header that is not ``eos``.
        size: Bytes of pixels that came.
        limit: Most bytes that are accepted.
    """
    if header.v != VERSION:
        return "bad_version"
    if not header.complete:
        return "incomplete"
    if size > limit:
        return "too_large"
    if header.fmt in ENCODED:
        return None if size else "bad_size"
    if header.fmt not in RAW_CHANNELS:
        return "bad_format"
    return None if _raw_size(header) == size else "bad_size"


def _raw_size(header: Header) -> int:
    """Bytes of a raw frame with this header; -1 if there is no such frame."""
    row = header.w * RAW_CHANNELS[header.fmt]
    stride = header.stride or row
    return stride * header.h if row and header.h and stride >= row else -1


def decode_imagezmq(raw: bytes, session: int, number: Callable[[str], int]) -> tuple[str, Header]:
    """Read the JSON part of an ``imagezmq`` message: ``{"msg", "dtype", "shape"}`` or ``{"msg"}`` for a JPEG.

    The text up to the first ``|`` is the camera id, what follows is the part id. ``imagezmq`` numbers nothing,
    so the line numbers these frames itself: ``number`` gives a camera's next sequence number.

    Raises:
        WireError: if it is no such JSON object or the text is no camera id.
    """
    try:
        meta: Any = json.loads(raw) if len(raw) <= MAX_HEADER_BYTES else None
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or not isinstance(meta.get("msg"), str):
        raise WireError("bad_header", "imagezmq: expected a JSON object with msg")
    text = meta["msg"].encode("utf-8", "replace").decode()  # JSON may carry half a surrogate pair, UTF-8 may not
    camera, _, part = text.partition("|")
    name = decode_camera(camera.strip().encode())
    common: dict[str, Any] = {"seq": number(name), "session": session, "part": part.strip()[:128]}
    shape = meta.get("shape")
    if shape is None:
        return name, Header(fmt="jpeg", **common)
    known = isinstance(shape, list) and len(shape) in (2, 3) and all(type(n) is int for n in shape)
    if not known or meta.get("dtype") != "uint8" or not all(0 < n <= MAX_SIDE for n in shape):
        return name, Header(fmt="unknown", **common)
    fmt = {1: "mono8", 3: "bgr8"}.get(shape[2] if len(shape) == 3 else 1, "unknown")
    return name, Header(w=shape[1], h=shape[0], fmt=fmt, **common)
