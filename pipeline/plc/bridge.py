"""The bridge: verdicts in, outputs for the PLC out, several hundred times a second.

Everything starts as a reject. It goes back to that whenever the line's heartbeat is stale, Redis does not answer, or
the clock was stepped. An OK opens a gate once, for its own part, within its own time.

One thread reads Redis (:mod:`pipeline.plc.source`); everything else happens in the event loop of the protocol.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

import msgspec
import structlog

from pipeline.plc.gate import Encoder, Gate, WallClock
from pipeline.plc.handshake import Handshake
from pipeline.plc.results import LATE, NO_LINE, SIMULATED, FirstVerdicts, Result
from pipeline.plc.settings import Plc
from pipeline.plc.source import Source

log = structlog.get_logger(__name__)

MS: Final = 1_000_000
HEARTBEAT_NS: Final = 500 * MS
INSPECTS: Final = frozenset({"Ready", "ContinuousExecution"})
LATE_IN_A_ROW: Final = 3
"""Results too late one after the other, upon which the station's fault bit is set."""


class Output(msgspec.Struct, frozen=True, gc=False):
    """What a PLC sees of one camera.

    Attributes:
        heartbeat: Flips twice a second while the bridge lives.
        ready: Whether the line lives and inspects.
        fault: Whether something is wrong: no line, no Redis, results that come too late.
        gate: Whether the gate may be open now.
        toggle: Flips with every new result.
        shown: The result that stands; None means reject.
    """

    heartbeat: bool
    ready: bool
    fault: bool
    gate: bool
    toggle: bool
    waiting: int
    lost: int
    shown: Result | None


class Input(msgspec.Struct, frozen=True, gc=False):
    """What a PLC says of one camera: its copy of the toggle, and where the conveyor is, if it says so."""

    ack: bool = False
    encoder: int | None = None


class Driver(Protocol):
    """A protocol's side: takes outputs, gives inputs. One coroutine calls it."""

    async def start(self) -> None:
        """Begin to serve, or to connect; OSError with the remedy where that cannot be."""
        ...

    async def exchange(self, outputs: dict[str, Output]) -> dict[str, Input]:
        """Write outputs, return inputs; OSError while the PLC is away."""
        ...

    async def stop(self) -> None:
        """Write rejects if possible, and release everything."""
        ...


class Station:
    """One camera's way to the PLC."""

    def __init__(self, camera: str, settings: Plc) -> None:
        timing = settings.gates.get(camera)
        self._encoder = Encoder()
        self._gate = Gate(timing, self._encoder) if timing is not None else None
        self._handshake = Handshake(
            hold_ms=settings.hold_ms,
            ack_timeout_ms=settings.ack_timeout_ms,
            most=settings.queue,
            acknowledged=settings.handshake == "ack",
        )
        self._late_in_a_row = 0

    def take(self, result: Result, arrival: int) -> None:
        """Take a part's first verdict."""
        late = result.reason == LATE
        self._late_in_a_row = self._late_in_a_row + 1 if late else 0
        self._handshake.offer(result)
        if self._gate is not None:
            self._gate.decide(result, arrival)

    def hear(self, now: int, said: Input) -> None:
        """Take what the PLC says."""
        if said.encoder is not None and not self._encoder.read(now, said.encoder) and self._gate is not None:
            self._gate.void()
        self._handshake.step(now, said.ack)

    def void(self) -> None:
        """Trust nothing that was said so far."""
        self._handshake.blank()
        if self._gate is not None:
            self._gate.void()

    def output(self, now: int, *, trusted: bool, clear: bool) -> Output:
        """What the PLC sees now."""
        shake = self._handshake
        return Output(
            heartbeat=bool(now // HEARTBEAT_NS % 2),
            ready=trusted,
            fault=not trusted or not clear or self._late_in_a_row >= LATE_IN_A_ROW,
            gate=trusted and self._gate is not None and self._gate.is_open(now),
            toggle=shake.toggle,
            waiting=shake.waiting,
            lost=shake.lost,
            shown=shake.shown if trusted else None,
        )


class Core:
    """All decisions of the bridge, without I/O.

    Args:
        settings: ``[plc]``, with its cameras.
    """

    def __init__(self, settings: Plc) -> None:
        self._settings = settings
        self.stations = {camera: Station(camera, settings) for camera in settings.cameras}
        self._first = FirstVerdicts()
        self._clock = WallClock()
        self._beat = ""
        self._beat_at = 0
        self._trusted = False

    def look(self, now: int, wall: int) -> None:
        """Compare the clocks; after a step no arrival time means anything."""
        if not self._clock.look(now, wall):
            log.warning(
                "plc_clock_stepped", remedy="parts on their way are rejected; let the time service slew, not step"
            )
            self._void()

    def beat(self, now: int, heartbeat: dict[str, str]) -> None:
        """Take the line's heartbeat as it stands in Redis; empty if it has lapsed."""
        counter = heartbeat.get("counter", "")
        if heartbeat.get("state") not in INSPECTS:
            self._beat, self._beat_at = "", 0
        elif counter != self._beat:
            # The first one proves nothing: it may have stood there since the line died.
            self._beat_at = now if self._beat else 0
            self._beat = counter

    def take(self, now: int, result: Result) -> None:
        """Take a verdict by whichever stream; only the first one of a part counts."""
        station = self.stations.get(result.camera)
        if station is None or not self._first(result):
            return
        arrival = self._clock.monotonic(result.arrival_ns)
        station.take(self._judged(result, now, arrival), arrival)

    def outputs(self, now: int, *, clear: bool) -> dict[str, Output]:
        """What the PLC sees of each camera; ``clear`` while Redis answers."""
        trusted = clear and bool(self._beat_at) and now - self._beat_at <= self._settings.stale_ms * MS
        if trusted != self._trusted:
            (log.info if trusted else log.error)("plc_trust", trusted=trusted, redis=clear)
            self._trusted = trusted
        if not trusted:
            self._void()
        return {camera: station.output(now, trusted=trusted, clear=clear) for camera, station in self.stations.items()}

    def hear(self, now: int, inputs: dict[str, Input]) -> None:
        """Take what the PLC says."""
        for camera, station in self.stations.items():
            station.hear(now, inputs.get(camera, Input()))

    def _judged(self, result: Result, now: int, arrival: int) -> Result:
        """The result, unless an OK has to count as a reject."""
        if not result.passes:
            return result
        if not self._trusted:
            return result.refused(NO_LINE)
        if result.simulated and not self._settings.accept_simulated:
            return result.refused(SIMULATED)
        in_time = max(self._clock.valid_from, now - self._settings.window_ms * MS) <= arrival <= now
        return result if in_time else result.refused(LATE)

    def _void(self) -> None:
        for station in self.stations.values():
            station.void()


class Bridge:
    """Runs a core between Redis and a PLC until it is told to stop.

    Args:
        settings: ``[plc]``, with its cameras.
        source: Reads Redis.
        driver: The PLC's protocol.
        clock, wall: Monotonic and wall-clock nanoseconds.
    """

    def __init__(
        self,
        settings: Plc,
        source: Source,
        driver: Driver,
        clock: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        self._settings, self._source, self._driver, self._clock, self._wall = settings, source, driver, clock, wall
        self.core = Core(settings)
        self._stopping = asyncio.Event()
        self._plc_away = False

    async def run(self) -> None:
        """Serve until :meth:`stop`.

        Raises:
            OSError: if the driver cannot start.
        """
        await self._driver.start()
        self._source.start()
        log.info("plc_ready", cameras=list(self.core.stations))
        try:
            while not self._stopping.is_set():
                await self._turn()
                await self._pause()
        finally:
            self._source.stop()
            await self._driver.stop()

    def stop(self) -> None:
        """Make :meth:`run` return; may be used as a signal handler of the loop."""
        self._stopping.set()

    async def _turn(self) -> None:
        now = self._clock()
        self.core.look(now, self._wall())
        for heartbeat in self._source.heartbeats():
            self.core.beat(now, heartbeat)
        for result in self._source.results():
            self.core.take(now, result)
        outputs = self.core.outputs(now, clear=self._source.is_alive(now))
        try:
            inputs = await self._driver.exchange(outputs)
        except OSError as error:
            if not self._plc_away:
                log.error("plc_away", error=str(error), remedy="check the PLC, its address and the cable")
            self._plc_away = True
            return
        if self._plc_away:
            log.info("plc_back")
            self._plc_away = False
        self.core.hear(self._clock(), inputs)

    async def _pause(self) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), self._settings.tick_ms / 1000)
        except TimeoutError:
            return
