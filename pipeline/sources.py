"""Where a camera's frames come from: the simulator, a folder, a video file, a device or a stream."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import cv2
import numpy as np
import structlog

from pipeline.simulator import Simulator

log = structlog.get_logger(__name__)

IMAGES: Final = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png"}
OTHER_IMAGES: Final = {".bmp", ".tif", ".tiff", ".webp"}
REOPEN_S: Final = (0.5, 10.0)


class SourceError(ValueError):
    """A source that cannot be opened; the message names the remedy."""


@dataclass(frozen=True)
class Frame:
    """One frame on its way to the line.

    Attributes:
        pixels: Any buffer of bytes.
        w, h: Size in pixels; 0 where only the file knows it.
        fmt: Format as in ``dmdd.frame.v1``.
        truth: Known label, empty where none is known.
        part: Name of the part, empty where it has none.
        simulated: Whether it is not a photograph of a part on the line.
    """

    pixels: Any
    w: int
    h: int
    fmt: str
    truth: str = ""
    part: str = ""
    simulated: bool = False


class Source(Protocol):
    """A stream of frames; endless unless it says otherwise."""

    def frames(self) -> Iterator[Frame]:
        """Yield frames as fast as they can be had; the caller keeps the rate."""
        ...


class SimulatorSource:
    """Simulated parts, as raw BGR."""

    def __init__(self, simulator: Simulator, name: str) -> None:
        self._simulator, self._name = simulator, name

    def frames(self) -> Iterator[Frame]:
        """Yield parts for ever."""
        for index in itertools.count():
            shot = self._simulator.shot(index)
            height, width = shot.image.shape[:2]
            yield Frame(shot.image.data, width, height, "bgr8", shot.label, f"{self._name}-{index}", simulated=True)


class FolderSource:
    """Images of a folder: flat, or one folder a class as in MVTec AD's ``test``, whose name is the truth.

    JPEG and PNG files are sent as they are; others are decoded and sent as raw pixels.

    Raises:
        SourceError: if there is no image in it.
    """

    def __init__(self, folder: Path, *, loop: bool = False) -> None:
        self._loop = loop
        wanted = {*IMAGES, *OTHER_IMAGES}
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in wanted and path.is_file())
        self.files = [path for path in found if "ground_truth" not in path.relative_to(folder).parts]
        self._folder = folder
        if not self.files:
            msg = f"{folder}: no images in it ({', '.join(sorted(wanted))})"
            raise SourceError(msg)

    def frames(self) -> Iterator[Frame]:
        """Yield every file once, or for ever."""
        for path in itertools.cycle(self.files) if self._loop else self.files:
            yield self._frame(path)

    def _frame(self, path: Path) -> Frame:
        inner = path.relative_to(self._folder)
        truth, name = _text(inner.parts[-2] if len(inner.parts) > 1 else ""), _text(inner.as_posix())
        fmt = IMAGES.get(path.suffix.lower())
        if fmt is not None:
            return Frame(path.read_bytes(), 0, 0, fmt, truth, name)
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:  # sent as it is, so that the line answers the part
            return Frame(b"", 0, 0, "jpeg", truth, name)
        return Frame(np.ascontiguousarray(image).data, image.shape[1], image.shape[0], "bgr8", truth, name)


def _text(name: str) -> str:
    """A file's name as a header can carry it: UTF-8, and the last 128 characters of it."""
    return name.encode("utf-8", "replace").decode()[-128:]


class VideoSource:
    """A video file, an OpenCV device (``0``, ``/dev/video0``) or a stream (``rtsp://...``).

    A file ends, or starts again with ``loop``. A device or stream that stops is opened again, with growing pauses.

    Raises:
        SourceError: if it cannot be opened at first.
    """

    def __init__(self, address: str, *, loop: bool = False) -> None:
        self._address: str | int = int(address) if address.isdigit() else address
        self._file = isinstance(self._address, str) and Path(self._address).is_file()
        self._loop = loop
        self._given = False
        self._capture = self._open()
        if self._capture is None:
            msg = f"{address}: OpenCV cannot open it; is the file, device or url right, may this user read it?"
            raise SourceError(msg)

    def frames(self) -> Iterator[Frame]:
        """Yield frames until a file ends; for ever from a device or stream."""
        try:
            while True:
                got, image = self._capture.read() if self._capture is not None else (False, None)
                if got and image is not None:
                    self._given = True
                    pixels = np.ascontiguousarray(image)
                    fmt = "mono8" if pixels.ndim == 2 else "bgr8"
                    yield Frame(pixels.data, pixels.shape[1], pixels.shape[0], fmt)
                elif self._file and not self._loop:
                    return
                else:
                    self._reopen()
        finally:
            if self._capture is not None:
                self._capture.release()

    def _open(self) -> cv2.VideoCapture | None:
        capture = cv2.VideoCapture(self._address)
        if capture.isOpened():
            return capture
        capture.release()
        return None

    def _reopen(self) -> None:
        if self._capture is not None:
            self._capture.release()
        # A file starts again at once, unless it has given nothing: then it is as good as lost.
        pause = 0.0 if self._file and self._given else REOPEN_S[0]
        self._given = False
        while True:
            time.sleep(pause)
            self._capture = self._open()
            if self._capture is not None:
                return
            pause = min(max(pause, REOPEN_S[0]) * 2, REOPEN_S[1])
            log.warning("camera_lost", address=self._address, retry_s=pause)


def open_source(
    address: str, *, name: str, size: tuple[int, int], seed: int, defects: float, loop: bool
) -> SimulatorSource | FolderSource | VideoSource:
    """Open ``sim[:product]``, a folder, a video file, a device number or path, or a url.

    Raises:
        SourceError: if it is none of these.
    """
    if address == "sim" or address.startswith("sim:"):
        product = address.partition(":")[2] or "washer"
        try:
            return SimulatorSource(Simulator(product, width=size[0], height=size[1], seed=seed, defects=defects), name)
        except ValueError as error:
            raise SourceError(str(error)) from error
    if Path(address).is_dir():
        return FolderSource(Path(address), loop=loop)
    return VideoSource(address, loop=loop)
