"""A whole soak: faults by the schedule, then the checker's verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import redis

from pipeline.soak.checker import Result, check
from pipeline.soak.fault import Fault
from pipeline.soak.history import History, now
from pipeline.soak.rig import Mark, Rig, Setup
from pipeline.soak.schedule import Slot, schedule
from pipeline.soak.servers import until
from pipeline.soak.supervisor import Sample

RESTARTS_SHARE: Final = 0.4
"""Faults that end the line's process come in this first part only: memory is then watched over one long life."""
SEEN_S: Final = 20.0
WARM_UP_S: Final = 3.0

Tell = Callable[[str], None]


@dataclass
class Injection:
    """A fault that was at work.

    Attributes:
        name: Of the fault.
        camera: The camera of its slot.
        t: When it began, monotonic nanoseconds.
        seconds: How long it lasted.
        seen: Whether its effect was seen.
        recovered_s: Time from its end until the line was at rest again; None where it was not in time.
        error: What kept it from being injected, if anything.
    """

    name: str
    camera: str
    t: int
    seconds: float = 0.0
    seen: bool = False
    recovered_s: float | None = None
    error: str = ""


@dataclass
class Outcome:
    """What a soak found.

    Attributes:
        setup: What was run.
        seconds: How long, the end included.
        injections: The faults, in order.
        history: All that was recorded.
        result: What the checker says.
        samples: What the line held, once a second.
        counts: Of the supervisor.
        failures: What went wrong beside the checker's verdict.
    """

    setup: Setup
    seconds: float
    injections: list[Injection]
    history: History
    result: Result
    samples: list[Sample]
    counts: dict[str, int]
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.result.violations and not self.failures


def run_soak(setup: Setup, minutes: float, faults: Sequence[Fault], tell: Tell = lambda _: None) -> Outcome:
    """Run a soak.

    Args:
        setup: What to run.
        minutes: How long faults are injected; the end takes up to two minutes more.
        faults: The kinds.
        tell: Is told what happens, a line each.

    Raises:
        MissingExtraError: where packages of the extra ``soak`` are missing.
        FileExistsError: if the folder is not empty.
        TimeoutError: if the line does not start.
    """
    started = time.monotonic()
    rig = Rig(setup)
    try:
        time.sleep(WARM_UP_S)
        soak = _Soak(rig, tell)
        soak.inject(faults, minutes * 60)
        tell("no more faults; every camera ends its session")
        at_rest = rig.finish()
        rig.shut()
    finally:
        rig.close()
    history = rig.history()
    failures = [*soak.failures, *([] if at_rest else ["the line did not come to rest at the end"])]
    if rig.exit_status:
        failures.append(f"the line ended with exit status {rig.exit_status}")
    if unread := _unread(history):
        failures.append(f"{unread} entries in Redis were read by no reader: the history is not complete")
    supervisor, elapsed = rig.supervisor, time.monotonic() - started
    return Outcome(
        setup, elapsed, soak.done, history, check(history), supervisor.samples, dict(supervisor.counts), failures
    )


def _unread(history: History) -> int:
    seen = {(entry.stream, entry.id) for entry in history.live}
    return sum((entry.stream, entry.id) not in seen for entry in history.final)


class _Soak:
    """The faults of one soak."""

    def __init__(self, rig: Rig, tell: Tell) -> None:
        self._rig, self._tell = rig, tell
        self.done: list[Injection] = []
        self.failures: list[str] = []

    def inject(self, faults: Sequence[Fault], seconds: float) -> None:
        """Inject faults until the time is up."""
        start, rng = time.monotonic(), np.random.default_rng(self._rig.setup.seed)
        gentle = [fault for fault in faults if not fault.restarts] or faults
        for kinds, end in ((faults, start + RESTARTS_SHARE * seconds), (gentle, start + seconds)):
            for slot in schedule(kinds, self._rig.setup.names, rng):
                if time.monotonic() >= end:
                    break
                self._do(slot)
        time.sleep(max(start + seconds - time.monotonic(), 0))

    def _do(self, slot: Slot) -> None:
        mark = self._rig.mark()
        begun = [(fault, self._begin(fault, slot)) for fault in slot.faults]
        time.sleep(slot.seconds)
        for fault, injection in begun:
            self._end(fault, injection, slot)
        stopped = time.monotonic()
        for fault, injection in begun:
            injection.seen = self._seen(fault, slot.camera, mark)
        self._recover([injection for _, injection in begun], stopped)
        time.sleep(slot.rest_s)

    def _begin(self, fault: Fault, slot: Slot) -> Injection:
        injection = Injection(fault.name, slot.camera, now())
        self.done.append(injection)
        try:
            fault.start(self._rig, slot.camera)
        except (OSError, redis.RedisError) as error:  # TimeoutError is an OSError
            injection.error = f"{type(error).__name__}: {error}"
        return injection

    def _end(self, fault: Fault, injection: Injection, slot: Slot) -> None:
        try:
            fault.stop(self._rig, slot.camera)
        except (OSError, redis.RedisError) as error:
            injection.error = injection.error or f"{type(error).__name__}: {error}"
        injection.seconds = (now() - injection.t) / 1e9

    def _seen(self, fault: Fault, camera: str, mark: Mark) -> bool:
        with suppress(TimeoutError):
            until(lambda: fault.seen(self._rig, camera, mark), fault.name, SEEN_S)
            return True
        return False

    def _recover(self, injections: list[Injection], stopped: float) -> None:
        names = " + ".join(injection.name for injection in injections)
        try:
            self._rig.settle()
        except TimeoutError as error:
            self.failures.append(f"after {names}: {error}")
        else:
            for injection in injections:
                injection.recovered_s = time.monotonic() - stopped
        unseen = [injection.name for injection in injections if not injection.seen]
        self._tell(f"{names}: {'seen' if not unseen else 'NOT SEEN: ' + ', '.join(unseen)}")
