"""Hot swap: the running line follows the engine store, and commands, without losing a part.

All of it happens in one thread beside the lanes: load, verify, compile, pass the parity gate, switch, watch the
newcomer's probation, release the old engine. Whatever fails before the switch leaves everything as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import redis
import structlog

from engines.bundle import MANIFEST, Bundle, BundleError
from engines.store import HISTORY, Store, StoreError, Superseded
from pipeline.commands import Command, Commands
from pipeline.crew import Crew
from pipeline.station import Change, Reverted, Station
from pipeline.trial import State, Trials

log = structlog.get_logger(__name__)

Mark = tuple[int, int, int]
"""What tells one state of a history file from another: inode, time of change in nanoseconds, size."""


class SwapRefused(RuntimeError):
    """An engine that does not get to work; the one before it goes on. The message says why."""


def latest(stations: Iterable[Station]) -> Change:
    """The last change of any engine of the line."""
    return max((station.change for station in stations), key=lambda change: change.at, default=Change())


class Swapper:
    """Changes the engines of the line's stations.

    Args:
        store: The engine store.
        stations: The stations by the engine that the config names: ``name`` follows the store's active version,
            ``name@version`` and the path of a folder stay as they are.
        watch_s: Seconds between two looks at the store and the commands.
        check: Refuses engines that do not fit in memory together, by an error that says so.
        trials: The record of engines on probation.
        commands: The command channel, if it is open.
        alarm: Set by a station that has gone back to its old engine.
    """

    def __init__(
        self,
        store: Store,
        stations: Mapping[str, Station],
        watch_s: float,
        check: Callable[[list[Bundle]], None],
        trials: Trials,
        commands: Commands | None,
        alarm: threading.Event,
    ) -> None:
        self._store, self._watch_s, self._check, self._commands, self._alarm = store, watch_s, check, commands, alarm
        self._stations, self._trials = stations, trials
        self._followers = {name: station for name, station in stations.items() if self._follows(name)}
        self._marks = {name: self._mark(name) for name, station in self._followers.items() if self._is_shunned(station)}
        self._stopping = False
        self._commands_lost = self._trials_lost = False

    def run(self) -> None:
        """Follow the store and the commands until :meth:`stop`; the body of the thread."""
        while not self._stopping:
            try:
                self._turn()
            except Exception:
                # Not foreseen. The line inspects on with the engines that it has.
                log.exception("swap_failed")
            self._alarm.wait(self._watch_s)
            self._alarm.clear()
        for name, station in self._followers.items():
            self._undo(name, station)
            self._conclude(name, station)

    def stop(self) -> None:
        """Ask the thread to end; an engine that it is making ready is dropped as soon as it is made."""
        self._stopping = True
        self._alarm.set()

    def _turn(self) -> None:
        for name, station in self._followers.items():
            self._undo(name, station)
            self._fall_back(name, station)
            self._watch(name, station)
        if self._commands is not None:
            self._obey(self._commands)
        for name, station in self._followers.items():
            station.settle()
            self._conclude(name, station)

    # The store.

    def _follows(self, reference: str) -> bool:
        """Whether a reference means whatever version is active."""
        if (Path(reference) / MANIFEST).is_file():
            return False
        try:
            return self._store.active(reference) is not None
        except StoreError:  # name@version: no name that a store takes
            return False

    def _mark(self, name: str) -> Mark | None:
        try:
            found = (self._store.root / name / HISTORY).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _watch(self, name: str, station: Station) -> None:
        """Take the active version where the store's history has changed since the last look."""
        mark = self._mark(name)
        if mark is None or mark == self._marks.get(name):
            return
        self._marks[name] = mark
        version = self._store.active(name)
        if version is None or version == station.bundle.version:
            return
        with suppress(SwapRefused):  # it has been said; it is tried again when the history changes again
            self._swap(name, station, version, lambda: None)

    def _undo(self, name: str, station: Station) -> None:
        """Take a version out of use in the store that a fault has thrown out here."""
        while station.reverted:
            undone = station.reverted.pop(0)
            try:
                self._roll_back_store(name, undone)
            except (StoreError, BundleError, OSError) as error:
                remedy = f"dmdd engines rollback {name}, or the next start takes the faulty version again"
                log.error("store_not_rolled_back", engine=undone.failed.label, error=str(error), remedy=remedy)
                self._marks[name] = self._mark(name)  # nor may the next look take it again

    def _roll_back_store(self, name: str, undone: Reverted) -> None:
        with suppress(Superseded):  # somebody has chosen another version meanwhile
            self._store.rollback(name, expected=undone.failed.version, to=undone.back.version)
            log.warning("store_rolled_back", engine=undone.failed.label, back=undone.back.label)
        self._return(name, undone.back.version)

    # Trials.

    def _fall_back(self, name: str, station: Station) -> None:
        """Make the version before ready again where a fault has ended a probation beside which none stands by."""
        trial, why = self._trials.of(name), station.fault
        if not why or trial is None or trial.version != station.bundle.version:
            return
        station.fault = ""  # where it is refused, the next fault tries again

        def confirm() -> None:
            self._store.rollback(name, expected=trial.version, to=trial.before)

        with suppress(SwapRefused):
            self._swap(name, station, trial.before, confirm, lambda back: station.fall_back(back, why))

    def _is_shunned(self, station: Station) -> bool:
        """Whether this start has gone back from what the store still names: the next look must not take it again."""
        trial = self._trials.of(station.bundle.name)
        return trial is not None and trial.state == "working" and trial.before == station.bundle.version

    @contextmanager
    def _on_trial(self, name: str, version: str, running: str) -> Iterator[Callable[[], None]]:
        """Keep the record of a swap's trial: give what records the take-over; put all back where the swap fails."""

        def record(state: State) -> None:
            try:
                self._trials.put(name, version, running, state)
            except OSError as error:
                msg = f"its probation cannot be recorded: {error}; free or mend the disk of {self._trials.path}"
                raise SwapRefused(msg) from error

        earlier = self._trials.of(name)
        try:
            if self._store.active(name) == version:  # so the next start takes it, even if the process dies of it now
                record("preparing")
            yield lambda: record("working")
        except BaseException:
            self._record(lambda: self._trials.set(name, earlier))
            raise

    def _conclude(self, name: str, station: Station) -> None:
        """End the trial of an engine that has passed its probation."""
        trial = self._trials.of(name)
        if trial is not None and trial.version == station.bundle.version and station.is_proven():
            self._record(lambda: self._trials.set(name, None))

    def _return(self, name: str, version: str) -> None:
        """Record that ``version`` works again: proven, or on trial as it was before."""
        self._record(lambda: self._trials.put(name, version, version, "working"))

    def _record(self, change: Callable[[], None]) -> None:
        """Change the record where a disk that does not take it changes nothing for the engines."""
        try:
            change()
        except OSError as error:
            if not self._trials_lost:
                remedy = f"free or mend the disk of {self._trials.path}: a start that finds it may roll back"
                log.error("trial_not_recorded", error=str(error), remedy=remedy)
            self._trials_lost = True
        else:
            self._trials_lost = False

    # Commands.

    def _obey(self, commands: Commands) -> None:
        try:
            while not self._stopping and (command := commands.next()) is not None:
                self._carry_out(commands, command)
        except redis.RedisError as error:
            if not self._commands_lost:
                log.warning("commands_unavailable", error=str(error), remedy="bring Redis back, or correct its ACL")
            self._commands_lost = True
        else:
            self._commands_lost = False

    def _carry_out(self, commands: Commands, command: Command) -> None:
        name, _, version = command.engine.partition("@")
        station = self._followers.get(name)
        running = station.bundle.label if station else ""
        try:
            if station is None:
                known = ", ".join(self._followers) or "none"
                raise SwapRefused(f"no camera or recipe of this line follows engine {name!r} (followed: {known})")
            done = self._activate(name, station, command, version)
        except (SwapRefused, StoreError, OSError) as error:
            log.warning("command_refused", command=command.id, action=command.action, error=str(error))
            commands.answer(command, "refused", str(error), station.bundle.label if station else "")
        else:
            log.info("command_done", command=command.id, action=command.action, engine=station.bundle.label)
            commands.answer(command, "done", f"{done}; before: {running}", station.bundle.label)
        commands.flush()

    def _activate(self, name: str, station: Station, command: Command, version: str) -> str:
        """Do what a command says; return what was done."""
        if command.action == "rollback":
            history = self._store.history(name)
            if version:
                raise SwapRefused(f"rollback takes a name alone; to get a certain version: activate {command.engine}")
            if len(history) < 2:
                raise SwapRefused(f"nothing to roll back to: activated so far: {', '.join(history)}")
            version, active = history[-2:]
            self._swap(name, station, version, lambda: self._store.rollback(name, expected=active, to=version))
            return "rolled back"
        version, now = version or (self._store.versions(name) or [""])[-1], self._store.active(name)
        self._swap(name, station, version, lambda: self._store.activate(name, version, expected=now))
        return "activated"

    # One swap.

    def _swap(
        self,
        name: str,
        station: Station,
        version: str,
        confirm: Callable[[], object],
        switch: Callable[[Crew], None] | None = None,
    ) -> None:
        """Make ``version`` ready and let it take over.

        Args:
            name: Engine in the store.
            station: Where it is to work.
            version: Which version of it.
            confirm: Makes it the store's active one where it is not yet; called between the gate and the switch.
            switch: Lets it take over; None puts it on probation.

        Raises:
            SwapRefused: if it is not to work; nothing has changed then.
        """
        running = station.bundle.label
        try:
            if version == station.bundle.version:
                confirm()
            elif station.stands_by(version):
                confirm()
                station.revert_to(version, "taken back before it was proven")
                self._return(name, version)
            else:
                (switch or station.switch)(self._make_ready(name, station, version, confirm))
        except Exception as error:
            known = isinstance(error, SwapRefused | ValueError | RuntimeError)
            why = str(error) if known else f"{type(error).__name__}: {error}"
            station.note("refused", f"{name}@{version}", why)
            remedy = f"{running} works on; dmdd engines rollback {name} where the store names the other active"
            log.error("swap_refused", engine=f"{name}@{version}", error=why, remedy=remedy)
            raise SwapRefused(why) from error

    def _make_ready(self, name: str, station: Station, version: str, confirm: Callable[[], object]) -> Crew:
        """Load, verify, compile, gate; then confirm, if nobody has changed the store meanwhile."""
        self._conclude(name, station)
        before, running = self._mark(name), station.bundle
        bundle = self._store.get(name, version)
        self._check([*(resident for one in self._stations.values() for resident in one.resident()), bundle])
        log.info("swap_begins", engine=bundle.label, running=running.label)
        station.note("preparing", bundle.label, f"{running.label} works meanwhile")
        with self._on_trial(name, version, running.version) as takes_over:
            successor = station.prepare(bundle)
            try:
                if self._stopping:
                    raise SwapRefused("the line is stopping")
                if self._mark(name) != before:
                    raise SwapRefused("the store's active version was changed meanwhile; that change comes next")
                takes_over()
                confirm()
            except BaseException:
                successor.stop()
                raise
        return successor
