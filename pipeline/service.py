"""The service: start everything in order, watch that parts are answered, drain and stop."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from typing import Final

import redis
import structlog
import zmq

from engines import signing
from engines.build import Target
from engines.bundle import Bundle
from engines.store import Store
from pipeline import budget
from pipeline.build_progress import STEP_S
from pipeline.commands import Commands
from pipeline.config import Config
from pipeline.curve import load_server
from pipeline.entries import Maker
from pipeline.expected import BLOCK_MS, ExpectedParts
from pipeline.health import Lifecycle, State
from pipeline.intake import Intake
from pipeline.ledger import CameraBook, Ledger
from pipeline.metrics import Recorder
from pipeline.monitor import Monitor
from pipeline.notify import Notifier
from pipeline.outlet import Spools
from pipeline.publisher import Publisher
from pipeline.recipes import RecipeQueue
from pipeline.records import Keys
from pipeline.recovery import recover, wait_for
from pipeline.redis_client import Gate, connect, describe
from pipeline.station import Station
from pipeline.swap import Swapper
from pipeline.trace import StampingQueue
from pipeline.trial import Trials

log = structlog.get_logger(__name__)

TICK_S: Final = 0.1


def _target(config: Config) -> Target:
    """How every engine of the line is run."""
    engine = config.engine
    return Target(
        kind=engine.target,
        precision=engine.precision,
        lanes=engine.lanes,
        max_batch=engine.max_batch,
        threads=engine.threads,
        cache=engine.cache,
        exact_batches=engine.exact_batches,
    )


class Line:
    """The running line.

    Args:
        config: Validated settings.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._keys = Keys(config.line.name)
        self._gate = Gate()
        self._client = connect(config.redis, config.line.name, gate=self._gate)
        self._spool: Spools | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._notify = Notifier()
        self._store: Store
        self._target = _target(config)
        self._stations: dict[str, Station] = {}
        self._alarm = threading.Event()
        self._command_client: redis.Redis | None = None
        self._trigger_client: redis.Redis | None = None
        self._expected: ExpectedParts | None = None
        self._swapper: Swapper | None = None
        self._trials: Trials
        self._life = Lifecycle()
        self._monitor: Monitor | None = None
        self.ledger: Ledger
        self.publisher: Publisher
        self.intake: Intake

    @property
    def state(self) -> State:
        """What the line does, as OPC 40100 names it."""
        return self._life.state

    def start(self) -> None:
        """Make engines, reach Redis, resume after an earlier run, open the sockets.

        Raises:
            StoreError, BundleError, BuildError, ParityError, LaneFault: if an engine cannot be run.
            ConfigError: if the engines do not fit in memory together.
            CurveError: if a key is missing or others may read it.
            RedisUnreachableError: if Redis does not answer.
            MissingExtraError: if metrics are to be served, and the package for it is not installed.
            OSError: if a socket or the spool cannot be opened.
        """
        config = self._config
        self._notify.status("loading engines")
        keys = load_server(config.curve.keys) if any(socket.curve for socket in config.sockets) else None
        maker = Maker(self._keys, config.redis, config.cameras)
        self._spool = Spools(config.spool)
        self.publisher = Publisher(self._client, self._keys, config.redis, maker, self._spool, self._health, self._gate)
        recorder = Recorder(self.publisher)
        self.ledger = Ledger(recorder)
        self._start_stations()
        self._notify.status("waiting for Redis")
        self._notify.extend(config.redis.startup_timeout_s + STEP_S)
        wait_for(self._client, describe(config.redis), config.redis.startup_timeout_s, self._stop)
        if self._stop.is_set():  # told to stop while it waited: run() returns at once
            return
        books = [CameraBook.of(name, camera) for name, camera in config.cameras.items()]
        recover(self._client, self._keys, self._spool, maker, books)
        for book in books:
            self.ledger.register(book)
        queues = {camera: self._queue_of(camera) for camera in config.cameras}
        self.intake = Intake(config.sockets, config.limits, self.ledger, queues.get, self._context, keys)
        self._spawn("timer", self.ledger.run_timer)
        self._spawn("publisher", self.publisher.run)
        self._start_expected()
        self._spawn("intake", self.intake.run)
        self._start_swapper()
        self._start_monitor(recorder, self._spool)
        self._notify.ready()
        log.info("ready", line=config.line.name, cameras=len(config.cameras), engines=list(self._stations))

    def run(self) -> None:
        """Watch the line until a signal or :meth:`request_stop`, then stop."""
        try:
            while not self._stop.wait(TICK_S):
                if self._monitor is not None and self._monitor.check():
                    self._notify.watchdog()
        finally:
            self.stop()

    def request_stop(self, *_: object) -> None:
        """Make :meth:`run` return; may be used as a signal handler."""
        self._stop.set()

    def handle_signals(self) -> None:
        """Stop on SIGTERM and SIGINT; main thread only."""
        signal.signal(signal.SIGTERM, self.request_stop)
        signal.signal(signal.SIGINT, self.request_stop)

    def stop(self) -> None:
        """Take no more frames, let open parts finish, answer the rest, publish, release everything."""
        if self.state is State.HALTED:
            return
        self._notify.stopping()
        if self._monitor is not None:
            self._monitor.rest()
        if self._swapper is not None:
            self._swapper.stop()
        if self._threads:
            self._drain()
        if self._monitor is not None:
            self._monitor.stop()
        for station in self._stations.values():
            station.stop()
        self._end_trials()
        self._client.close()
        for client in (self._command_client, self._trigger_client):
            if client is not None:
                client.close()
        if self._spool is not None:
            self._spool.close()
        self._context.term()
        self._life.enter(State.HALTED)
        log.info("stopped", **self.counts())

    def counts(self) -> dict[str, int]:
        """Every counter of the line by name."""
        total: Counter[str] = Counter()
        if hasattr(self, "ledger"):
            total.update(self.ledger.counts)
            total.update(self.publisher.counts)
            total.update(self._spool.counts() if self._spool is not None else {})
            total["open"] = self.ledger.open
        if hasattr(self, "intake"):
            total.update(self.intake.counts)
        if self._expected is not None:
            total.update(self._expected.counts)
        for station in self._stations.values():
            total.update(station.counts)
        return dict(total)

    def _start_stations(self) -> None:
        config = self._config
        trust = signing.load_trust(config.engine.trusted_keys, required=config.engine.require_signature)
        self._store = Store(config.engine.store, trust)
        self._trials = Trials(config.spool.path)
        failed = self._trials.roll_back_failed(self._store)
        # Of a failed one the version before, even where the store could not be written and still names the other.
        wanted = {name: failed[name].back if name in failed else name for name in config.engines()}
        bundles = {reference: self._store.resolve(label) for reference, label in wanted.items()}
        self._check_memory(list(bundles.values()))
        for reference, bundle in bundles.items():
            station = Station(
                bundle,
                self._target,
                config.limits,
                config.cameras,
                self.ledger,
                timeout_s=config.engine.timeout_ms / 1000,
                keep_all=config.redis.heatmaps == "all",
                sample="sampled" in (config.redis.heatmaps, config.redis.frames),
                swap=config.swap,
                alarm=self._alarm,
                batch_wait_ms=config.engine.batch_wait_ms,
            )
            if self._trials.resume(reference, bundle.version):
                station.continue_probation("not proven when the last run ended; no engine stands by")
            station.start(self._notify)
            self._stations[reference] = station
            if (trial := failed.get(reference)) is not None:
                why = f"the process died while it was on probation; {trial.back} works again"
                station.note("rolled_back", trial.label, why)

    def _end_trials(self) -> None:
        """Say that the engines on probation have not brought the line down, unless they may have."""
        if not hasattr(self, "_trials"):  # it never came so far
            return
        if self.state is not State.ERROR:
            self._trials.pause({name: station.bundle.version for name, station in self._stations.items()})
        self._trials.close()

    def _check_memory(self, bundles: list[Bundle]) -> None:
        budget.check(bundles, self._target, self._config.engine.memory_mib)

    def _start_swapper(self) -> None:
        config = self._config
        commands = None
        if config.swap.commands:
            self._command_client = connect(config.redis, config.line.name)
            commands = Commands(self._command_client, self._keys)
            with suppress(redis.RedisError):  # where Redis is away again, the swapper opens it
                commands.open()
        self._swapper = Swapper(
            self._store, self._stations, config.swap.watch_s, self._check_memory, self._trials, commands, self._alarm
        )
        self._spawn("swapper", self._swapper.run)

    def _start_expected(self) -> None:
        """Read the triggers of cameras whose parts the PLC lists."""
        config = self._config
        matching = {name: camera.expected for name, camera in config.cameras.items() if camera.expected != "none"}
        if matching:
            patience = config.redis.timeout_ms + BLOCK_MS
            self._trigger_client = connect(config.redis, config.line.name, timeout_ms=patience)
            self._expected = ExpectedParts(self._trigger_client, self._keys, matching, self.ledger.expect)
            with suppress(redis.RedisError):  # where Redis is away again, the thread opens it
                self._expected.open()
            self._spawn("expected", self._expected.run)

    def _queue_of(self, camera: str) -> StampingQueue:
        """The queue of a camera: it leads to the engine of each of its recipes."""
        recipes = self._config.cameras[camera].recipes or {}
        queues = {recipe: self._stations[engine].scheduler for recipe, engine in recipes.items()}
        default = self._stations[self._config.engine_of(camera)].scheduler
        return StampingQueue(RecipeQueue(default, queues, self.ledger))

    def _spawn(self, name: str, body: object) -> None:
        thread = threading.Thread(target=body, name=name, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _drain(self) -> None:
        self.intake.stop()
        if self._expected is not None:
            self._expected.stop()
        end = time.monotonic() + self._config.line.drain_timeout_s
        while self.ledger.open and time.monotonic() < end:
            time.sleep(0.01)
        self.ledger.close()
        self.publisher.stop()
        for thread in self._threads:
            thread.join(self._config.line.drain_timeout_s + 5)

    def _start_monitor(self, recorder: Recorder, spool: Spools) -> None:
        config = self._config
        self._monitor = Monitor(
            config,
            self._life,
            connect(config.redis, config.line.name),
            recorder,
            self._stations,
            ledger=self.ledger,
            publisher=self.publisher,
            intake=self.intake,
            spool=spool,
            more={} if self._expected is None else {"expected": self._expected},
            announce=self._notify.status,
        )

    def _health(self) -> dict[str, str] | None:
        """The heartbeat's fields; None while the line starts, or is stuck."""
        return None if self._monitor is None else self._monitor.heartbeat()
