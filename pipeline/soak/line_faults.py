"""What happens to the line's process, its engines, and the box that it runs on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from pipeline.soak.engine import Versions
from pipeline.soak.fault import Act, Evidence, Fault, both, counted, logged, restarted
from pipeline.soak.proxy import Weather
from pipeline.soak.rig import Mark, Rig
from pipeline.soak.servers import until

HOUR: Final = 3600.0
DUTY: Final = (0.08, 0.02)
"""Seconds halted, seconds running."""
CYCLES: Final = 12
RUN: Final = "while True: pass"


def _signal(number: signal.Signals) -> Act:
    return lambda rig, _: rig.supervisor.signal(number)


def _engine(fault: str) -> Act:
    return lambda rig, _: rig.set_engine(fault)


def _clock(seconds: float) -> Act:
    return lambda rig, _: rig.set_clock(seconds)


WELL: Final = _engine("")


def _kill_in_batch(rig: Rig, _: str) -> None:
    rig.set_engine("slow")
    time.sleep(0.3)
    rig.supervisor.signal(signal.SIGKILL)
    rig.set_engine()


def _kill_both(rig: Rig, _: str) -> None:
    rig.supervisor.signal(signal.SIGKILL)
    rig.servers.kill()


def _kill_while_spooled(rig: Rig, _: str) -> None:
    rig.servers.line.weather = Weather(closed=True)
    rig.servers.line.cut()
    time.sleep(0.5)
    rig.supervisor.signal(signal.SIGKILL)


def _reach_redis(rig: Rig, _: str) -> None:
    rig.servers.line.weather = Weather()


def _activate(version: str) -> Act:
    return lambda rig, _: rig.versions.activate(version)


def _back(rig: Rig, _: str) -> None:
    rig.versions.activate(Versions.GOOD[0])


def _swap(rig: Rig, _: str) -> None:
    rig.versions.activate(rig.versions.other())


def _swap_to_faulty(rig: Rig, camera: str) -> None:
    with suppress(TimeoutError):  # a version that still stands by would take over without a new probation
        until(lambda: rig.heartbeat().get("swap", "probation") != "probation", "the last swap is proven", 15)
    before = rig.mark()
    _swap(rig, camera)
    with suppress(TimeoutError):  # then the effect will be missed, and said so
        until(lambda: rig.supervisor.seen("engine_switched", before.t), "the swap", 10)
    rig.set_engine("nan")


def _limit_files(pid: int, limit: int | None) -> None:
    """Set how large a file a process may make; None for as large as it could before."""
    if pid:  # 0 would mean this very process
        with suppress(ProcessLookupError):
            _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if limit is None else limit, hard))


def _fill_disk(rig: Rig, _: str) -> None:
    """No file of the line's may grow: the kernel says EFBIG, as it says ENOSPC on a full disk."""
    _limit_files(rig.supervisor.pid, 0)
    rig.servers.line.weather = Weather(closed=True)
    rig.servers.line.cut()


def _free_disk(rig: Rig, _: str) -> None:
    _limit_files(rig.supervisor.pid, None)
    rig.servers.line.weather = Weather()


def _halt_by_turns(rig: Rig, __: str) -> None:
    for _ in range(CYCLES):
        rig.supervisor.signal(signal.SIGSTOP)
        time.sleep(DUTY[0])
        rig.supervisor.signal(signal.SIGCONT)
        time.sleep(DUTY[1])
        rig.counts["halts"] += 1


def _burn(rig: Rig, _: str) -> None:
    """Two busy processes for each core, for a second; what they took from the others is counted."""
    busy = [subprocess.Popen([sys.executable, "-c", RUN]) for _ in range(2 * len(os.sched_getaffinity(0)))]
    time.sleep(1.0)
    for process in busy:
        rig.counts["burnt_ms"] += _cpu_ms(process.pid)
        process.kill()
        process.wait()


def _cpu_ms(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 // os.sysconf("SC_CLK_TCK")


def _boxed(name: str, least: int) -> Evidence:
    return lambda rig, _, mark: rig.counts[name] - mark.box[name] >= least


def _silent(rig: Rig, _: str, mark: Mark) -> bool:
    """No record of any camera for 0.4 s."""
    return rig.tail.silence_s(mark.t) > 0.4


def _swapped(rig: Rig, _: str, mark: Mark) -> bool:
    """Another engine works than when the mark was made."""
    engines = rig.heartbeat().get("engines", "")
    return bool(engines) and engines != mark.engines


def _late(rig: Rig, _: str, mark: Mark) -> bool:
    """A result came after its part's verdict."""
    rig.tail.refresh()
    return any(t >= mark.t for t in rig.tail.late)


def _slower(rig: Rig, _: str, mark: Mark) -> bool:
    """A verdict took longer than the engine's pause."""
    return any(seen.latency_ms > 150 for seen in rig.tail.since(mark.t))


def _off(rig: Rig, _: str, mark: Mark) -> bool:
    """A record has a time that is half an hour off."""
    return any(abs(seen.off_s) > HOUR / 2 for seen in rig.tail.since(mark.t))


FAULT: Final = logged("lane_fault")
RESTARTED: Final = "another process of the line is ready"

LINE: Final = (
    Fault(
        "line_kill", "line", "the line is killed (SIGKILL) under load", RESTARTED, restarted,
        _signal(signal.SIGKILL), restarts=True,
    ),
    Fault(
        "line_kill_in_batch", "line", "the line is killed while a batch is in a lane", RESTARTED, restarted,
        _kill_in_batch, restarts=True, alone=True,
    ),
    Fault(
        "line_kill_while_spooled", "line", "the line is killed while Redis is away and its records are in the spool",
        RESTARTED, restarted, _kill_while_spooled, _reach_redis, restarts=True, alone=True,
    ),
    Fault(
        "line_and_redis_kill", "line", "line and Redis are killed at once", RESTARTED, restarted,
        _kill_both, lambda rig, _: rig.servers.primary.start(), restarts=True, alone=True,
    ),
    Fault(
        "line_restart", "line", "SIGTERM: the line is restarted under load", RESTARTED, restarted,
        lambda rig, _: rig.supervisor.restart(), restarts=True,
    ),
    Fault(
        "line_halted", "line", "the line's process stands still (SIGSTOP) until the watchdog ends it",
        "the watchdog expires; " + RESTARTED, both(counted("watchdog"), restarted), _signal(signal.SIGSTOP),
        seconds=(3.5, 4.0), restarts=True, alone=True,
    ),
    Fault(
        "line_paused", "line", "the line's process stands still for less than the watchdog's time",
        "no record for 0.4 s", _silent, _signal(signal.SIGSTOP), _signal(signal.SIGCONT), (0.6, 1.2), alone=True,
    ),
)  # fmt: skip

ENGINE: Final = (
    Fault("engine_slow", "engine", "every batch takes 0.2 s more", "latencies above 0.15 s", _slower,
          _engine("slow"), WELL),
    Fault("engine_late", "engine", "every batch takes longer than the deadline", "entries in the `late` stream", _late,
          _engine("late"), WELL, (1.2, 1.8)),
    Fault("engine_hang", "engine", "batches do not end; the lane gives up at `engine.timeout_ms`",
          "`lane_fault` in the log", FAULT, _engine("hang"), WELL, (2.2, 2.6)),
    Fault("engine_nan", "engine", "scores that are no numbers", "`lane_fault` in the log", FAULT,
          _engine("nan"), WELL),
    Fault("engine_shape", "engine", "fewer results than frames", "`inspection_failed` in the log",
          both(FAULT, logged("inspection_failed")), _engine("shape"), WELL),
    Fault("engine_error", "engine", "an exception that nobody has foreseen", "`inspection_failed` in the log",
          both(FAULT, logged("inspection_failed")), _engine("error"), WELL),
    Fault("engine_crash", "engine", "the accelerator's library aborts the process", RESTARTED, restarted,
          _engine("crash"), WELL, restarts=True, alone=True),
    Fault("engine_stuck", "engine", "a call into the library never comes back", "the watchdog expires; " + RESTARTED,
          both(counted("watchdog"), restarted), _engine("stuck"), WELL, (0.5, 1.0), restarts=True, alone=True),
    Fault("hot_swap", "engine", "another version is activated under load", "`engines` in the heartbeat names it",
          _swapped, _swap),
    Fault("engine_damaged", "engine", "a version with a flipped bit is activated", "`swap_refused` in the log",
          logged("swap_refused"), _activate(Versions.DAMAGED), _back, (1.0, 1.5), alone=True),
    Fault("engine_unequal", "engine", "a version that does not reproduce its reference is activated",
          "`swap_refused` in the log", logged("swap_refused"), _activate(Versions.UNEQUAL), _back, (1.0, 1.5),
          alone=True),
    Fault("swap_to_faulty", "engine", "a new version's lanes fail as soon as it works",
          "`engine_rolled_back` in the log", logged("engine_rolled_back"), _swap_to_faulty, WELL, alone=True),
)  # fmt: skip

BOX: Final = (
    Fault("disk_full", "box", "Redis is away and no file can grow", "`spool_refused` in the log",
          logged("spool_refused"), _fill_disk, _free_disk, alone=True),
    Fault("clock_ahead", "box", "the wall clock is set an hour ahead, then back", "records with that time", _off,
          _clock(HOUR), _clock(0)),
    Fault("clock_back", "box", "the wall clock is set back an hour, then ahead", "records with that time", _off,
          _clock(-HOUR), _clock(0)),
    Fault("cpu_halted", "box", "the line gets a fifth of its time: halted and continued in turn",
          f"it was halted {CYCLES} times", _boxed("halts", CYCLES), _halt_by_turns, seconds=(0.1, 0.2), alone=True),
    Fault("cpu_busy", "box", "two busy processes for each core, for a second", "they had a share of the processor",
          _boxed("burnt_ms", 100), _burn, seconds=(0.1, 0.2)),
)  # fmt: skip
