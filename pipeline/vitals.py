"""The vital signs of a running line: what is read off its rooms, and what follows for state, watchdog and heartbeat."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

from pipeline.config import Config
from pipeline.health import Condition, Conditions, Lifecycle, Signs, State, Watch
from pipeline.intake import Intake
from pipeline.ledger import Ledger
from pipeline.observer import Observer
from pipeline.outlet import Spools
from pipeline.parts import Reason, Verdict
from pipeline.publisher import Publisher
from pipeline.station import Station
from pipeline.swap import latest

log = structlog.get_logger(__name__)

STUCK_S: Final = 3.0
"""A thread that has not shown itself for so long, beyond its longest wait, is stuck."""
STEADY_NS: Final = 5_000_000
"""Two clocks that were not read within this time of each other say nothing about a step."""
REFUSALS: Final = ("refused_repeated", "refused_old_session", "refused_unknown_camera", "refused_bad_number")
"""The ledger's counters of messages that got no verdict; the intake counts the others."""
GIVEN_UP: Final = (Reason.OVERLOAD, Reason.INFEASIBLE, Reason.DEADLINE)
"""Reasons of parts that there was no time for."""


class Beating(Protocol):
    """What leaves a beat: monotonic nanoseconds of its last turn, 0 before the first."""

    beat: int


@dataclass(frozen=True)
class Organs:
    """What a running line is made of.

    Attributes:
        threads: By name, everything that runs in a thread of its own but lanes.
    """

    ledger: Ledger
    publisher: Publisher
    intake: Intake
    spool: Spools
    observer: Observer
    stations: Mapping[str, Station]
    threads: Mapping[str, Beating]

    def refused(self) -> dict[str, int]:
        """Messages that were refused, by counter."""
        counts = self.ledger.counts
        return {**self.intake.counts, **{name: counts[name] for name in REFUSALS}}

    def answered(self) -> int:
        """Parts that have their verdict."""
        return sum(self.ledger.counts[verdict] for verdict in Verdict)

    def beats(self) -> dict[str, int]:
        """The last beat of every thread that may not be stuck."""
        beats = {name: thread.beat for name, thread in self.threads.items()}
        beats.update({f"lanes of {name}": station.oldest_beat() for name, station in self.stations.items()})
        # Where no lane recovers, only a new process may help: a failed kernel poisons a CUDA context for good.
        beats.update({f"all lanes of {name}": station.last_healthy() for name, station in self.stations.items()})
        return beats

    def fullest(self) -> int:
        """Bytes in the fuller one of the two spools that share ``spool.max_bytes``."""
        spools = (self.spool.rejects.spool, self.spool.records.spool)
        return max((spool.size for spool in spools if spool is not None), default=0)

    def healthy_lanes(self) -> int:
        """Lanes that work, over all engines."""
        return sum(station.healthy_lanes() for station in self.stations.values())


class Vitals:
    """Checks a line, and tells systemd and the PLC about it.

    Args:
        config: The line's settings.
        life: Its state.
        organs: What it is made of.
        announce: Tells systemd the state.
    """

    def __init__(self, config: Config, life: Lifecycle, organs: Organs, announce: Callable[[str], None]) -> None:
        self._config, self._life, self._announce = config, life, announce
        self.organs = organs
        self._slack_ns = int((STUCK_S + config.engine.timeout_ms / 1000) * 1e9)
        longest = max(camera.deadline_ms for camera in config.cameras.values())
        self._watch = Watch(self._slack_ns, int(longest * 1e6 + STUCK_S * 1e9))
        self._conditions = Conditions(config.health, config.cameras, time.monotonic_ns())
        self.degraded: frozenset[Condition] = frozenset()
        self.beat = 0

    @property
    def state(self) -> State:
        """The state of the line."""
        return self._life.state

    def check(self) -> bool:
        """Take a look, ten times a second; say whether the line makes progress.

        Only then may systemd's watchdog be fed. Main thread only.
        """
        self.beat = now = time.monotonic_ns()
        organs = self.organs
        stuck = self._watch.stuck(now, organs.beats(), organs.ledger.open, organs.answered())
        if stuck:
            self.enter(State.ERROR, stuck=stuck)
            return False
        worked = self.state is State.CONTINUOUS or organs.ledger.counts["parts"]
        self.enter(State.CONTINUOUS if worked else State.READY)
        self._assess()
        return True

    def rest(self) -> None:
        """Look no more: the line is being stopped, and the thread that looked drains it."""
        self.beat = 0

    def enter(self, state: State, **why: str) -> None:
        """Change the line's state, and say so where it was another."""
        if self._life.enter(state):
            (log.error if state is State.ERROR else log.info)("state", state=state, **why)
            self._announce(state)

    def heartbeat(self) -> dict[str, str] | None:
        """The heartbeat's fields; None while the line, or the thread that watches it, is stuck."""
        if self.state not in {State.READY, State.CONTINUOUS}:
            return None
        if self.beat and time.monotonic_ns() - self.beat > self._slack_ns:
            return None
        organs = self.organs
        counts = organs.ledger.counts
        change = latest(organs.stations.values())
        causes = organs.observer.causes
        return {
            "v": "1",
            "state": self.state,
            "degraded": ",".join(sorted(self.degraded)),
            "drift": ",".join(f"{camera}:{cause}" for camera in sorted(causes) for cause in causes[camera]),
            "engines": ",".join(station.bundle.label for station in organs.stations.values()),
            "lanes": str(organs.healthy_lanes()),
            "open": str(organs.ledger.open),
            "parts": str(counts["parts"]),
            **{verdict.lower(): str(counts[verdict]) for verdict in Verdict},
            "refused": str(sum(organs.refused().values())),
            "lost": str(organs.publisher.counts["lost"]),
            "spool_bytes": str(organs.spool.size),
            "swap": change.state,
            "swap_engine": change.engine,
            "swap_detail": change.detail,
        }

    def _assess(self) -> None:
        """Find out what degrades the line, and say so where that changed."""
        if (signs := self._signs()) is None:
            return
        before, self.degraded = self.degraded, self._conditions.assess(signs)
        if self.degraded == before:
            return
        if self.degraded:
            silent = self._conditions.silent if Condition.CAMERA_SILENT in self.degraded else []
            log.warning("degraded", conditions=sorted(self.degraded), before=sorted(before), silent=silent)
        else:
            log.info("degraded_over", before=sorted(before))

    def _signs(self) -> Signs | None:
        """What the conditions are judged by; None where the clocks could not be read together."""
        organs = self.organs
        now, wall = time.monotonic_ns(), time.time_ns()
        if time.monotonic_ns() - now > STEADY_NS:
            return None
        return Signs(
            now,
            wall,
            redis_failures=organs.publisher.counts["redis_failures"],
            given_up=sum(organs.ledger.counts[reason] for reason in GIVEN_UP),
            spool=organs.fullest() / (self._config.spool.max_bytes / 2),
            lanes_lost=len(organs.stations) * self._config.engine.lanes - organs.healthy_lanes(),
            arrivals=organs.observer.meter.arrivals,
            drifting=organs.observer.causes,
        )
