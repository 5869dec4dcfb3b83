"""Faults inside the line's process: a lane that fails, a clock that is set. Used by :mod:`pipeline.soak.line` alone.

A control file says what goes wrong at the moment; it outlives the process, so a line that starts anew finds it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from engines.frames import Pixels
from engines.lane import Engine, Lane, LaneFault, check_scores

POLL_S: Final = 0.02
PAUSES_S: Final = {"slow": 0.2, "late": 0.9}


class Control(msgspec.Struct, frozen=True):
    """What goes wrong.

    Attributes:
        engine: ``""``, ``hang``, ``stuck``, ``slow``, ``late``, ``nan``, ``shape``, ``error`` or ``crash``. Also
            ``stale``, which no schedule uses: results of the batch before. Only the checker can notice that.
        clock_s: How far the wall clock is off.
    """

    engine: str = ""
    clock_s: float = 0.0

    def write(self, path: Path) -> None:
        """Put it in force, in one step."""
        draft = path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(self))
        draft.replace(path)


class Injector:
    """Follows the control file.

    Args:
        path: The control file; where there is none, nothing goes wrong.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.control = Control()
        self._look()
        threading.Thread(target=self._follow, name="injector", daemon=True).start()

    def wrap(self, compile_engine: Callable[..., Engine]) -> Callable[..., Engine]:
        """A ``compile_engine`` whose lanes fail when they are told to."""
        return lambda *given, **named: FaultyEngine(compile_engine(*given, **named), self)

    def turn_clock(self) -> None:
        """Let ``time.time`` and ``time.time_ns`` be off; the monotonic clock stays, as no one can set it."""
        seconds, nanoseconds = time.time, time.time_ns
        time.time = lambda: seconds() + self.control.clock_s
        time.time_ns = lambda: nanoseconds() + int(self.control.clock_s * 1e9)

    def _look(self) -> None:
        try:
            self.control = msgspec.json.decode(self._path.read_bytes(), type=Control)
        except OSError:
            self.control = Control()

    def _follow(self) -> None:
        seen = 0
        while True:
            try:
                changed = self._path.stat().st_mtime_ns
            except OSError:
                changed = 0
            if changed != seen:
                seen = changed
                self._look()
            time.sleep(POLL_S)


class FaultyEngine:
    """An engine whose lanes are wrapped."""

    def __init__(self, engine: Engine, injector: Injector) -> None:
        self._engine, self._injector = engine, injector
        self.manifest, self.max_batch = engine.manifest, engine.max_batch

    def make_lane(self) -> FaultyLane:
        """Make a lane."""
        return FaultyLane(self._engine.make_lane(), self._injector)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


class FaultyLane:
    """A lane that works, or fails in the way that the control file says."""

    def __init__(self, lane: Lane, injector: Injector) -> None:
        self._lane, self._injector = lane, injector
        self._count, self._stale = 0, False
        self.frames: Pixels = lane.frames
        self.scores: NDArray[np.float32] = lane.scores
        self.heatmaps: Pixels = lane.heatmaps

    def submit(self, count: int) -> None:
        """Queue a batch."""
        fault = self._injector.control.engine
        if fault == "crash":
            os.abort()
        if fault == "stuck":  # as a driver call that never comes back, whatever becomes of the device
            threading.Event().wait()
        self._count = count
        self._stale = fault == "stale"
        if not self._stale:
            self._lane.submit(count)

    def ready(self) -> bool:
        """Whether the batch is done."""
        return self._lane.ready()

    def wait(self, timeout: float) -> None:
        """Wait for the batch."""
        fault = self._injector.control.engine
        if fault == "hang":
            self._hang(timeout)
        if fault == "error":
            msg = "an unforeseen error of the accelerator's library"
            raise ValueError(msg)
        time.sleep(min(PAUSES_S.get(fault, 0.0), timeout))
        if not self._stale:
            self._lane.wait(timeout)
        self._spoil(fault)

    def _hang(self, timeout: float) -> None:
        """Give no result, until the time is up or the device comes back."""
        end = time.monotonic() + timeout
        while self._injector.control.engine == "hang":
            if time.monotonic() >= end:
                msg = f"no result after {timeout:.1f} s"
                raise LaneFault(msg)
            time.sleep(POLL_S)

    def _spoil(self, fault: str) -> None:
        if fault == "nan":
            self._lane.scores[: self._count] = np.nan
            check_scores(self._lane.scores[: self._count])
        if fault == "shape":
            self.scores, self.heatmaps = self._lane.scores[:0], self._lane.heatmaps[:0]

    def close(self) -> None:
        """Release it."""
        self._lane.close()
