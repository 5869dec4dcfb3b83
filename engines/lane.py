"""The one seam between the scheduler and any accelerator: what an engine and a lane are."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Manifest
from engines.frames import Pixels


class LaneFault(RuntimeError):
    """A lane failed: its results are void, its parts are UNKNOWN, and it has to be rebuilt."""


@runtime_checkable
class Lane(Protocol):
    """One independent execution slot, owned by one thread at a time.

    Attributes:
        frames: uint8 ``(max_batch, H, W, C)``; write the pixels of a batch here, then :meth:`submit`.
        scores: float32 ``(max_batch,)``, valid after :meth:`wait` has returned.
        heatmaps: uint8 ``(max_batch, h, w)``, valid after :meth:`wait` has returned.
    """

    frames: Pixels
    scores: NDArray[np.float32]
    heatmaps: Pixels

    def submit(self, count: int) -> None:
        """Queue copy, inference and copy-back of the first ``count`` frames; return at once."""
        ...

    def ready(self) -> bool:
        """Whether the submitted batch is done."""
        ...

    def wait(self, timeout: float) -> None:
        """Wait for the submitted batch, at most ``timeout`` seconds.

        Raises:
            LaneFault: on a device error, a timeout or a score that is not finite. Results are then void.
        """
        ...

    def close(self) -> None:
        """Release everything; safe to call twice."""
        ...


class Engine(Protocol):
    """A compiled bundle that makes lanes."""

    manifest: Manifest
    max_batch: int

    def make_lane(self) -> Lane:
        """Make one more lane. All lanes are made at start, or off the hot path after a fault."""
        ...

    def close(self) -> None:
        """Release the compiled model, after all its lanes are closed."""
        ...


def check_scores(scores: NDArray[np.float32]) -> None:
    """Refuse a batch with a score that is not a finite number.

    Raises:
        LaneFault: naming the first slot concerned.
    """
    finite = np.isfinite(scores)
    if not finite.all():
        slot = int(np.argmin(finite))
        msg = f"score {scores[slot]} in slot {slot}: not a finite number"
        raise LaneFault(msg)
