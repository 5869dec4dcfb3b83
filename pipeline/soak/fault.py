"""What a fault is: how it begins and ends, and by what anybody can see that it had its effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.soak.rig import Mark, Rig

Act = Callable[[Rig, str], None]
"""What is done, to a rig and to one of its cameras."""
Evidence = Callable[[Rig, str, Mark], bool]
"""Whether the effect is there, since a mark was made."""


def nothing(_: Rig, __: str) -> None:
    """A fault that is over by itself."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: Its name.
        group: ``redis``, ``network``, ``camera``, ``line``, ``engine`` or ``box``.
        what: What goes wrong.
        effect: By what it is seen, in words.
        seen: The same, as a test.
        start, stop: How it begins and ends.
        seconds: Shortest and longest duration.
        restarts: Whether the line's process ends by it.
        alone: Whether no other fault may be beside it.
    """

    name: str
    group: str
    what: str
    effect: str
    seen: Evidence
    start: Act
    stop: Act = nothing
    seconds: tuple[float, float] = (0.5, 1.5)
    restarts: bool = False
    alone: bool = False


def logged(*events: str) -> Evidence:
    """The line has logged each of these events."""
    return lambda rig, _, mark: all(rig.supervisor.seen(event, mark.t) for event in events)


def answered(*reasons: str) -> Evidence:
    """A reader has read a record with one of these reasons."""
    return lambda rig, _, mark: bool(rig.tail.reasons(mark.t) & set(reasons))


def refused(rig: Rig, _: str, mark: Mark) -> bool:
    """The line has counted messages that it refused."""
    return rig.refused() > mark.refused


def counted(name: str, *, at_least: int = 1) -> Evidence:
    """The supervisor has counted this: ``started``, ``watchdog``, ``exited``."""
    return lambda rig, _, mark: rig.supervisor.counts[name] - mark.counts[name] >= at_least


def restarted(rig: Rig, _: str, mark: Mark) -> bool:
    """The line has ended, and another process of it is ready."""
    return rig.supervisor.counts["ready"] > mark.counts["ready"] and rig.supervisor.ready


def carried(name: str) -> Evidence:
    """A proxy has counted this: ``cut``, ``delayed``, ``swallowed``."""
    return lambda rig, _, mark: rig.grown(mark, name) > 0


def both(first: Evidence, second: Evidence) -> Evidence:
    """Two effects."""
    return lambda rig, camera, mark: first(rig, camera, mark) and second(rig, camera, mark)
