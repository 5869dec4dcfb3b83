"""Trials: the engines on probation, on disk, so that a process that dies of one does not start with it again.

One small JSON file beside the spool, replaced whole, readable after a power cut. A version is in it from before its
first batch until it is proven. A start that finds a version at work in it knows that the process before died with
it, and goes back to the last proven one; a clean stop says so in the file, and the trial goes on with the next start.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec
import structlog

from engines.store import BundleError, Store, StoreError, Superseded, write_whole

log = structlog.get_logger(__name__)

FILE: Final = "trials.json"
LOCK: Final = "trials.lock"

State = Literal["preparing", "working", "stopped"]
"""Being made ready while another version works; at work; not proven when the line stopped cleanly."""


class Trial(msgspec.Struct, frozen=True):
    """An engine on probation.

    Attributes:
        name: The engine, as the store calls it.
        version: The version that has to prove itself.
        before: The last proven version: the way back.
        state: How far it is.
        starts: Starts of the line since the trial began.
    """

    name: str
    version: str
    before: str
    state: State
    starts: int = 0

    @property
    def label(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def back(self) -> str:
        """``name@version`` of the way back."""
        return f"{self.name}@{self.before}"


class _Content(msgspec.Struct):
    """The file."""

    v: Literal[1]
    trials: list[Trial]


class Trials:
    """The record of a line's trials: at most one an engine. Used by one thread at a time.

    Args:
        folder: Where the file lies: the spool's folder, which is the line's own. It has to exist.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._lock = _lock(folder / LOCK)
        self._trials = self._read()

    def all(self) -> list[Trial]:
        """Every trial."""
        return list(self._trials.values())

    def of(self, name: str) -> Trial | None:
        """The trial of an engine, if it is on one."""
        return self._trials.get(name)

    def put(self, name: str, version: str, before: str, state: State) -> None:
        """Record that ``version`` is on trial in place of ``before``.

        If ``before`` is on trial itself, its own way back stays the way back: that version is proven. A version
        that is this way back needs no trial.

        Raises:
            OSError: if the disk does not take it; nothing has changed then.
        """
        earlier = self._trials.get(name)
        proven = earlier.before if earlier else before
        if version != proven:
            self.set(name, Trial(name, version, proven, state))
        elif state == "working":
            self.set(name, None)

    def set(self, name: str, trial: Trial | None) -> None:
        """Replace the trial of an engine, or remove it.

        Raises:
            OSError: if the disk does not take it; nothing has changed then.
        """
        if trial != self._trials.get(name):
            rest = {other: kept for other, kept in self._trials.items() if other != name}
            self._write(rest if trial is None else {**rest, name: trial})

    def resume(self, name: str, version: str) -> bool:
        """Say whether ``version`` is on trial, and record that a new process begins to work with it."""
        trial = self._trials.get(name)
        if trial is None or trial.version != version:
            return False
        self._try({**self._trials, name: msgspec.structs.replace(trial, state="working", starts=trial.starts + 1)})
        return True

    def pause(self, working: Mapping[str, str]) -> None:
        """Record a clean stop.

        Args:
            working: The version that worked, by engine. A trial of another one is left as it is: that one has
                failed, and the store could not be told.
        """
        stopped = {
            name: msgspec.structs.replace(trial, state="stopped") if working.get(name) == trial.version else trial
            for name, trial in self._trials.items()
        }
        if stopped != self._trials:
            self._try(stopped)

    def roll_back_failed(self, store: Store) -> dict[str, Trial]:
        """Undo in the store what the process before has died of; forget trials that somebody has ended by hand.

        Call it before engines are loaded. Nothing here prevents a start.

        Returns:
            The failed trials by engine: their ``before`` is to work, whether or not the store could be written.
        """
        if self._lock is None:  # the process that works with these engines is alive
            return {}
        failed = {}
        for trial in self.all():
            try:
                chosen = store.active(trial.name)
            except (StoreError, OSError):  # whoever needs that engine will say it
                continue
            if chosen != trial.version:
                self._forget(trial)
            elif trial.state == "working" and _can_go_back(store, trial):
                failed[trial.name] = trial
                if _roll_back(store, trial):
                    self._forget(trial)
        return failed

    def close(self) -> None:
        """Let another process have the file."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _forget(self, trial: Trial) -> None:
        self._try({name: kept for name, kept in self._trials.items() if name != trial.name})

    def _try(self, trials: dict[str, Trial]) -> None:
        """Write what must not fail its caller."""
        try:
            self._write(trials)
        except OSError as error:
            log.error("trial_not_recorded", error=str(error), remedy=f"free or mend the disk of {self.path}")

    def _write(self, trials: dict[str, Trial]) -> None:
        if self._lock is None:
            raise OSError(errno.EBUSY, "another line works with this folder: spool.path has to be its own", self.path)
        if trials:
            content = msgspec.json.encode(_Content(1, list(trials.values())))
            write_whole(self.path, msgspec.json.format(content) + b"\n", prefix=".trials-")
        else:  # needs no room: a full disk does not keep a proven engine on trial
            self.path.unlink(missing_ok=True)
        self._trials = trials

    def _read(self) -> dict[str, Trial]:
        try:
            content = msgspec.json.decode(self.path.read_bytes(), type=_Content)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError) as error:
            remedy = f"look at the disk; remove {self.path}. If the line dies again: dmdd engines rollback NAME"
            log.error("trials_unreadable", file=str(self.path), error=str(error), remedy=remedy)
            return {}
        return {trial.name: trial for trial in content.trials}


def _lock(path: Path) -> int | None:
    """Take the lock that the system lets go of when this process dies; None while another one has it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        log.error("trial_not_recorded", error=str(error), remedy=f"let the line's user write {path.parent}")
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _can_go_back(store: Store, trial: Trial) -> bool:
    """Whether the version before is there and sound; where it is not, the start goes on with the failed one."""
    try:
        store.get(trial.name, trial.before)
    except (StoreError, BundleError, OSError) as error:
        remedy = f"activate a version of {trial.name} that works: dmdd engines list"
        log.error("trial_failed", engine=trial.label, back="", error=str(error), starts=trial.starts, remedy=remedy)
        return False
    remedy = f"find out what the process died of before {trial.label} is activated again; {trial.back} works"
    log.error("trial_failed", engine=trial.label, back=trial.back, starts=trial.starts, remedy=remedy)
    return True


def _roll_back(store: Store, trial: Trial) -> bool:
    """Make the version before the active one again; say whether the store names the failed one no longer."""
    try:
        store.rollback(trial.name, expected=trial.version, to=trial.before)
    except Superseded:
        return True
    except (StoreError, BundleError, OSError) as error:
        remedy = f"dmdd engines rollback {trial.name}; let the line's user write the store"
        log.error("store_not_rolled_back", engine=trial.label, error=str(error), remedy=remedy)
        return False
    log.warning("store_rolled_back", engine=trial.label, back=trial.back)
    return True
