"""The gate: shut unless an OK of the very part that is before it opens it. Pure logic; the caller has the clock.

Times are monotonic nanoseconds. A gate works in one measure throughout, either time or encoder counts.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from pipeline.plc import settings
from pipeline.plc.results import Result

MS: Final = 1_000_000
ENCODER_STALE_NS: Final = 200 * MS
"""Age beyond which an encoder reading says nothing of where parts are."""
MOST_WINDOWS: Final = 4096


class Encoder:
    """Where the conveyor was, by the readings of the last seconds.

    A 32-bit counter may wrap around; a conveyor that runs backwards, or jumps, makes all that was known void.
    """

    def __init__(self, most: int = 4096) -> None:
        self._readings: deque[tuple[int, int]] = deque(maxlen=most)
        self._raw: int | None = None

    def read(self, at: int, raw: int) -> bool:
        """Take a reading of the counter; False if the conveyor has jumped, so that no earlier position counts."""
        step = 0 if self._raw is None else (raw - self._raw) & 0xFFFFFFFF
        self._raw = raw
        if step >= 1 << 31:
            self._readings.clear()
            step = 0
        last = self._readings[-1][1] if self._readings else raw
        jumped = not self._readings
        self._readings.append((at, last + step))
        return not jumped

    def position(self, at: int) -> float | None:
        """The count at a moment, interpolated; None where no reading is near it."""
        later: tuple[int, int] | None = None
        for reading in reversed(self._readings):
            if reading[0] <= at:
                return self._between(reading, later, at)
            later = reading
        return None

    @staticmethod
    def _between(before: tuple[int, int], after: tuple[int, int] | None, at: int) -> float | None:
        if after is None:
            return before[1] if at - before[0] <= ENCODER_STALE_NS else None
        if after[0] - before[0] > ENCODER_STALE_NS:
            return None
        return before[1] + (after[1] - before[1]) * (at - before[0]) / (after[0] - before[0])


class Gate:
    """Decides, moment by moment, whether a camera's gate stands open.

    Each verdict makes a window around the moment (or count) at which its part is before the gate. The gate is open
    where a window of an OK is and no window of a reject. So a part without a verdict meets a shut gate, as long as
    windows are narrower than the distance of two parts.

    Args:
        timing: When parts are there, and how wide a window is.
        encoder: Where the conveyor is, for a gate that counts.
    """

    def __init__(self, timing: settings.Gate, encoder: Encoder | None = None) -> None:
        self._encoder = encoder if timing.width_counts else None
        self._delay = timing.counts if timing.width_counts else timing.delay_ms * MS
        self._half = (timing.width_counts if timing.width_counts else timing.width_ms * MS) / 2
        self._windows: list[tuple[float, float, bool]] = []
        self._counts = bool(timing.width_counts)

    def decide(self, result: Result, arrival: int) -> None:
        """Take a part's verdict; ``arrival`` is when its frame came, monotonic."""
        at = self._place(arrival)
        if at is None:
            return
        if len(self._windows) == MOST_WINDOWS:  # which of them could be a reject's: so none counts
            self._windows.clear()
        middle = at + self._delay
        if self._counts and any(abs(middle - (start + self._half)) < self._half for start, _, _ in self._windows):
            # Two parts in one place: the encoder stands while the conveyor runs, and an open gate would stay open.
            self._windows.clear()
            return
        self._windows.append((middle - self._half, middle + self._half, result.passes))

    def is_open(self, now: int) -> bool:
        """Whether the part that is before the gate now may pass."""
        at = self._place(now)
        if at is None:
            return False
        self._windows = [window for window in self._windows if window[1] > at]
        here = [passes for start, end, passes in self._windows if start <= at < end]
        return bool(here) and all(here)

    def void(self) -> None:
        """Forget every OK: what is on its way to the gate is rejected."""
        self._windows.clear()

    def _place(self, at: int) -> float | None:
        if not self._counts:
            return float(at)
        return self._encoder.position(at) if self._encoder is not None else None


class WallClock:
    """Turns wall-clock instants of the last seconds into monotonic ones, and notices when the clock was stepped.

    Args:
        tolerance_ms: By how much wall and monotonic clock may drift apart between two looks.

    Attributes:
        valid_from: Monotonic. What seems to lie before it may have been stamped before a step, and mean another time.
    """

    def __init__(self, tolerance_ms: float = 5.0) -> None:
        self._offset: float = math.nan
        self._tolerance = tolerance_ms * MS
        self.valid_from = 0.0

    def look(self, monotonic: int, wall: int) -> bool:
        """Compare the clocks; False if the wall clock was set since the last look."""
        offset = wall - monotonic
        step = abs(offset - self._offset)
        self._offset = offset
        if not step > self._tolerance:  # so that the first look, whose step is NaN, is none
            return True
        self.valid_from = monotonic + step
        return False

    def monotonic(self, wall: int) -> int:
        """The monotonic instant of a wall-clock one."""
        return int(wall - self._offset)
