"""The rules of health: the line's states, the conditions that degrade it, and when it is stuck. Pure logic.

States and their names follow the vision system state machine of OPC 40100-1 (VDMA 40100-1, 2019), less the states
of jobs that this line does not have. What is looked at is read by ``pipeline/vitals.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Final, NamedTuple

from pipeline.config import Health

CLOCK_STEP_NS: Final = 100_000_000
"""A wall clock that moved by more against the monotonic one was set; slewing stays far below it."""
SPOOL_LOW: Final = 0.5
"""A spool counts as high until it is below this share of the mark at which it began to."""


class State(StrEnum):
    """What the line does, as OPC 40100 names it."""

    PREOPERATIONAL = "Preoperational"
    READY = "Ready"
    CONTINUOUS = "ContinuousExecution"
    ERROR = "Error"
    HALTED = "Halted"


ALLOWED: Final = {
    State.PREOPERATIONAL: frozenset({State.READY, State.ERROR, State.HALTED}),
    State.READY: frozenset({State.CONTINUOUS, State.ERROR, State.HALTED}),
    State.CONTINUOUS: frozenset({State.ERROR, State.HALTED}),
    State.ERROR: frozenset({State.READY, State.CONTINUOUS, State.HALTED}),
    State.HALTED: frozenset[State](),
}
"""Where each state may lead. A halted line is not started again: a new process is."""


class ForbiddenTransitionError(RuntimeError):
    """A change of state that OPC 40100 does not know: a fault of the program."""


class Lifecycle:
    """The state machine. One thread changes the state, any may read it."""

    def __init__(self) -> None:
        self.state = State.PREOPERATIONAL

    def enter(self, state: State) -> bool:
        """Change to ``state``; say whether that was a change.

        Raises:
            ForbiddenTransitionError: if the present state does not lead there; it stays as it is.
        """
        if state is self.state:
            return False
        if state not in ALLOWED[self.state]:
            msg = f"the line cannot go from {self.state} to {state}"
            raise ForbiddenTransitionError(msg)
        self.state = state
        return True


class Watch:
    """Whether the line makes progress: every thread shows itself, and open parts get answered.

    Args:
        slack_ns: A thread whose beat is older is stuck.
        answer_ns: Parts that have been open for longer, without a single answer, are stuck: longer than any deadline.
    """

    def __init__(self, slack_ns: int, answer_ns: int) -> None:
        self._slack_ns, self._answer_ns = slack_ns, answer_ns
        self._answered, self._moved_at = -1, 0

    def stuck(self, now: int, beats: Mapping[str, int], open_parts: int, answered: int) -> str:
        """Name what no longer makes progress, or say nothing.

        Args:
            now: Monotonic nanoseconds.
            beats: Monotonic nanoseconds of each thread's last beat; 0 for one that has not begun.
            open_parts: Parts without a verdict.
            answered: Parts that have been answered so far.
        """
        if not open_parts or answered != self._answered:
            self._answered, self._moved_at = answered, now
        if late := next((name for name, beat in beats.items() if beat and now - beat > self._slack_ns), ""):
            return late
        return "open parts" if now - self._moved_at > self._answer_ns else ""


class Condition(StrEnum):
    """Why the line does less than it could while it goes on. Documented in ``docs/operations.md``."""

    REDIS_LOST = "redis_lost"
    SPOOL_HIGH = "spool_high"
    LANE_LOST = "lane_lost"
    CAMERA_SILENT = "camera_silent"
    DRIFT = "drift"
    OVERLOAD = "overload"
    CLOCK_STEP = "clock_step"


class Signs(NamedTuple):
    """What the conditions are judged by.

    Attributes:
        now: Monotonic nanoseconds.
        wall: Wall-clock nanoseconds at the same instant.
        redis_failures: Attempts that Redis has failed so far.
        given_up: Parts so far that were not judged because of too much work.
        spool: Share of the largest spool that is in use, 0..1.
        lanes_lost: Lanes that are faulted or being made again.
        arrivals: Monotonic nanoseconds of the last part of each camera that has sent any.
        drifting: Cameras with a drift warning.
    """

    now: int
    wall: int
    redis_failures: int = 0
    given_up: int = 0
    spool: float = 0.0
    lanes_lost: int = 0
    arrivals: Mapping[str, int] = {}
    drifting: Collection[str] = ()


class Conditions:
    """Which conditions hold. Those that are seen as events last for a while after the last one, so that none flickers.

    Args:
        settings: ``[health]``.
        cameras: The configured cameras: each has to send.
        now: Monotonic nanoseconds from which on a camera that has sent nothing counts as silent.
    """

    def __init__(self, settings: Health, cameras: Collection[str], now: int) -> None:
        self._settings, self._cameras, self._began = settings, cameras, now
        self._hold_ns = int(settings.hold_s * 1e9)
        self._until: dict[Condition, int] = {}
        self._before: Signs | None = None
        self._spool_high = False
        self.silent: list[str] = []

    def assess(self, signs: Signs) -> frozenset[Condition]:
        """The conditions that hold now."""
        self._note_events(signs)
        self._before = signs
        self.silent = self._silent(signs)
        mark = self._settings.spool_high * (SPOOL_LOW if self._spool_high else 1.0)
        self._spool_high = signs.spool >= mark
        held = {
            Condition.SPOOL_HIGH: self._spool_high,
            Condition.LANE_LOST: signs.lanes_lost > 0,
            Condition.CAMERA_SILENT: bool(self.silent),
            Condition.DRIFT: bool(signs.drifting),
        }
        lasting = {condition for condition, until in self._until.items() if signs.now < until}
        return frozenset({condition for condition, holds in held.items() if holds} | lasting)

    def _note_events(self, signs: Signs) -> None:
        before = self._before
        if before is None:
            return
        drift_of_clock = (signs.wall - before.wall) - (signs.now - before.now)
        happened = {
            Condition.REDIS_LOST: signs.redis_failures > before.redis_failures,
            Condition.OVERLOAD: signs.given_up > before.given_up,
            Condition.CLOCK_STEP: abs(drift_of_clock) > CLOCK_STEP_NS,
        }
        for condition, seen in happened.items():
            if seen:
                self._until[condition] = signs.now + self._hold_ns

    def _silent(self, signs: Signs) -> list[str]:
        limit = int(self._settings.camera_silent_s * 1e9)
        if not limit:
            return []
        last = {camera: max(signs.arrivals.get(camera, 0), self._began) for camera in self._cameras}
        return sorted(camera for camera, arrival in last.items() if signs.now - arrival > limit)
