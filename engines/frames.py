"""The one way in which pixels become an engine's input.

Training, evaluation, parity and the running line all call :func:`fit`, so that a frame is never
prepared in two different ways. Everything after it (scaling, normalisation) is inside the graph.
"""

from __future__ import annotations

from typing import Any, Final

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

RESIZE_RULE: Final = "area-linear"
"""Area interpolation where both sides shrink (or stay), linear otherwise."""


class InputSpec(msgspec.Struct, frozen=True):
    """What an engine takes: uint8 frames of one size, ``(height, width, channels)``, BGR or mono."""

    height: int
    width: int
    channels: int
    colour: str
    resize: str = RESIZE_RULE
    dtype: str = "uint8"

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(height, width, channels)`` of one frame."""
        return self.height, self.width, self.channels


class FrameError(ValueError):
    """Pixels that cannot become an engine's input; the message says why."""


def decode_image(encoded: Any, channels: int) -> Pixels:
    """Decode a JPEG, PNG or other image file's bytes.

    Args:
        encoded: Any buffer of bytes.
        channels: 1 to decode as gray ``(h, w)``, 3 as BGR ``(h, w, 3)``.

    Raises:
        FrameError: if OpenCV cannot decode it.
    """
    flags = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as error:
        raise FrameError("undecodable image") from error
    if image is None:
        raise FrameError("undecodable image")
    return np.asarray(image, np.uint8)


def fit(image: Pixels, out: Pixels) -> None:
    """Convert ``image`` to the colour and size of the slot ``out`` and write it there.

    Where colour and size already match, this is a single copy.

    Args:
        image: uint8 ``(h, w)``, ``(h, w, 1)`` or ``(h, w, 3)`` in BGR order.
        out: uint8 ``(H, W, C)``, C-contiguous, C being 1 or 3.

    Raises:
        FrameError: if the image is empty, is not uint8, or has another number of channels.
    """
    image = _recolour(image, out.shape[2])
    height, width = out.shape[:2]
    if image.shape[:2] == (height, width):
        np.copyto(out, image.reshape(out.shape))
        return
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    target = out[..., 0] if out.shape[2] == 1 else out
    cv2.resize(image, (width, height), dst=target, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _recolour(image: Pixels, channels: int) -> Pixels:
    """Return ``image`` as ``(h, w)`` for one channel or ``(h, w, 3)`` for three."""
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
        msg = f"expected uint8 (h, w[, c]) pixels, got {image.dtype} {image.shape}"
        raise FrameError(msg)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim == 3 and image.shape[2] != 3:
        msg = f"expected 1 or 3 channels, got {image.shape[2]}"
        raise FrameError(msg)
    if channels == 1:
        return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)  # type: ignore[return-value]
    return image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)  # type: ignore[return-value]
