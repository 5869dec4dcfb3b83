"""A bundle and an engine for the simulated GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from engines.bundle import MODEL, Bundle, Manifest, OutputSpec, Threshold, Training
from engines.frames import InputSpec
from engines.lane import Lane
from engines.tensorrt_lane import TensorRtEngine

MAX_BATCH = 4
FRAME = (4, 6, 3)
FRAME_BYTES = 4 * 6 * 3
MAP_BYTES = 2 * 3


def simulated_bundle(folder: Path) -> Bundle:
    """A bundle for frames and heatmaps of the simulated network's sizes."""
    (folder / MODEL).write_bytes(b"graph")
    manifest = Manifest(
        name="caps",
        created="2026-01-01T00:00:00Z",
        input=InputSpec(height=4, width=6, channels=3, colour="bgr"),
        output=OutputSpec(height=2, width=3, low=0.0, high=1.0),
        threshold=Threshold(value=0.5, false_reject_rate=0.01, samples=100, statement=""),
        training=Training("dmdd", "none", "none", 1, "", 0),
        files={MODEL: sha256(b"graph").hexdigest()},
    )
    return Bundle(folder, manifest, "0" * 64, "7")


@contextmanager
def engine_of(bundle: Bundle, **settings: Any) -> Iterator[TensorRtEngine]:
    """An engine for a block's length."""
    engine = TensorRtEngine(bundle, max_batch=MAX_BATCH, precision="fp32", **settings)
    try:
        yield engine
    finally:
        engine.close()


def elsewhere(function: Callable[[], Any]) -> BaseException | None:
    """Call ``function`` in another thread and return what it raised."""
    raised: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(10)
    return raised[0] if raised else None


def fill(lane: Lane, *levels: int) -> None:
    """Give each slot a frame of one level."""
    for slot, level in enumerate(levels):
        lane.frames[slot] = level
