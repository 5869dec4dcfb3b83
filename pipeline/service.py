"""The service: start everything in order, watch that parts are answered, drain and stop.

States are named after OPC 40100: Preoperational, Ready, ContinuousExecution, Halted, Error.
"""

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
from redis.backoff import NoBackoff
from redis.retry import Retry

from engines import signing
from engines.build import Target
from engines.bundle import Bundle
from engines.store import Store
from pipeline import budget
from pipeline.commands import Commands
from pipeline.config import Config
from pipeline.entries import Maker
from pipeline.intake import Intake
from pipeline.ledger import CameraBook, Ledger
from pipeline.notify import Notifier
from pipeline.parts import Verdict
from pipeline.publisher import Publisher
from pipeline.recipes import RecipeQueue
from pipeline.records import Keys
from pipeline.recovery import recover, wait_for
from pipeline.spool import Spool
from pipeline.station import Station
from pipeline.swap import Swapper, latest

log = structlog.get_logger(__name__)

STUCK_S: Final = 3.0
"""A thread that has not shown itself for so long, beyond its longest wait, is stuck."""
TICK_S: Final = 0.1
REFUSALS: Final = ("refused_repeated", "refused_old_session", "refused_unknown_camera")
"""The ledger's counters of messages that got no verdict; the intake counts the others."""


def connect(url: str, timeout_ms: int) -> redis.Redis:
    """A Redis client that fails fast: short timeouts, no retries."""
    timeout = timeout_ms / 1000
    return redis.Redis.from_url(
        url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
    )


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
    )


class Line:
    """The running line.

    Args:
        config: Validated settings.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._keys = Keys(config.line.name)
        self._client = connect(config.redis.url, config.redis.timeout_ms)
        self._spool: Spool | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._notify = Notifier()
        self._store: Store
        self._target = _target(config)
        self._stations: dict[str, Station] = {}
        self._alarm = threading.Event()
        self._command_client: redis.Redis | None = None
        self._swapper: Swapper | None = None
        self.state = "Preoperational"
        self.ledger: Ledger
        self.publisher: Publisher
        self.intake: Intake

    def start(self) -> None:
        """Make engines, reach Redis, resume after an earlier run, open the sockets.

        Raises:
            StoreError, BundleError, BuildError, ParityError, LaneFault: if an engine cannot be run.
            ConfigError: if the engines do not fit in memory together.
            RedisUnreachableError: if Redis does not answer.
            OSError: if a socket or the spool cannot be opened.
        """
        config = self._config
        self._notify.status("loading engines")
        maker = Maker(self._keys, config.redis, config.cameras)
        self._spool = Spool(config.spool.path, max_bytes=config.spool.max_bytes, fsync=config.spool.fsync)
        self.publisher = Publisher(self._client, self._keys, config.redis, maker, self._spool, self._health)
        self.ledger = Ledger(self.publisher)
        self._start_stations()
        self._notify.status("waiting for Redis")
        wait_for(self._client, config.redis.startup_timeout_s, self._stop)
        if self._stop.is_set():  # told to stop while it waited: run() returns at once
            return
        books = [
            CameraBook(
                name, deadline_ns=int(camera.deadline_ms * 1e6), max_gap=camera.max_gap, first_seq=camera.first_seq
            )
            for name, camera in config.cameras.items()
        ]
        recover(self._client, self._keys, self._spool, maker, books)
        for book in books:
            self.ledger.register(book)
        queues = {camera: self._queue_of(camera) for camera in config.cameras}
        self.intake = Intake(config.sockets, config.limits, self.ledger, queues.get, self._context)
        self._spawn("timer", self.ledger.run_timer)
        self._spawn("publisher", self.publisher.run)
        self._spawn("intake", self.intake.run)
        self._start_swapper()
        self.state = "Ready"
        self._notify.ready()
        log.info("ready", line=config.line.name, cameras=len(config.cameras), engines=list(self._stations))

    def run(self) -> None:
        """Watch the line until a signal or :meth:`request_stop`, then stop."""
        try:
            while not self._stop.wait(TICK_S):
                stuck = self.stuck()
                if stuck:
                    self._enter("Error", stuck=stuck)
                    continue
                self._enter("ContinuousExecution" if self.ledger.counts["parts"] else "Ready")
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
        if self.state == "Halted":
            return
        self._notify.stopping()
        if self._swapper is not None:
            self._swapper.stop()
        if self._threads:
            self._drain()
        for station in self._stations.values():
            station.stop()
        self._client.close()
        if self._command_client is not None:
            self._command_client.close()
        if self._spool is not None:
            self._spool.close()
        self._context.term()
        self.state = "Halted"
        log.info("stopped", **self.counts())

    def counts(self) -> dict[str, int]:
        """Every counter of the line by name."""
        total: Counter[str] = Counter()
        if hasattr(self, "ledger"):
            total.update(self.ledger.counts)
            total.update(self.publisher.counts)
            total["open"] = self.ledger.open
        if hasattr(self, "intake"):
            total.update(self.intake.counts)
        for station in self._stations.values():
            total.update(station.counts)
        return dict(total)

    def stuck(self) -> str:
        """Name the thread that no longer makes progress, or say nothing."""
        now = time.monotonic_ns()
        slack = int((STUCK_S + self._config.engine.timeout_ms / 1000) * 1e9)
        beats = {"timer": self.ledger.beat, "publisher": self.publisher.beat, "intake": self.intake.beat}
        beats.update({f"lanes of {name}": station.oldest_beat() for name, station in self._stations.items()})
        # Where no lane recovers, only a new process may help: a failed kernel poisons a CUDA context for good.
        beats.update({f"all lanes of {name}": station.last_healthy() for name, station in self._stations.items()})
        return next((name for name, beat in beats.items() if beat and now - beat > slack), "")

    def _start_stations(self) -> None:
        config = self._config
        trust = signing.load_trust(config.engine.trusted_keys, required=config.engine.require_signature)
        self._store = Store(config.engine.store, trust)
        bundles = {reference: self._store.resolve(reference) for reference in config.engines()}
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
                swap=config.swap,
                alarm=self._alarm,
            )
            station.start()
            self._stations[reference] = station

    def _check_memory(self, bundles: list[Bundle]) -> None:
        budget.check(bundles, self._target, self._config.engine.memory_mib)

    def _start_swapper(self) -> None:
        config = self._config
        commands = None
        if config.swap.commands:
            self._command_client = connect(config.redis.url, config.redis.timeout_ms)
            commands = Commands(self._command_client, self._keys)
            with suppress(redis.RedisError):  # where Redis is away again, the swapper opens it
                commands.open()
        self._swapper = Swapper(
            self._store, self._stations, config.swap.watch_s, self._check_memory, commands, self._alarm
        )
        self._spawn("swapper", self._swapper.run)

    def _queue_of(self, camera: str) -> RecipeQueue:
        """The queue of a camera: it leads to the engine of each of its recipes."""
        recipes = self._config.cameras[camera].recipes or {}
        queues = {recipe: self._stations[engine].scheduler for recipe, engine in recipes.items()}
        return RecipeQueue(self._stations[self._config.engine_of(camera)].scheduler, queues, self.ledger)

    def _spawn(self, name: str, body: object) -> None:
        thread = threading.Thread(target=body, name=name, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _drain(self) -> None:
        self.intake.stop()
        end = time.monotonic() + self._config.line.drain_timeout_s
        while self.ledger.open and time.monotonic() < end:
            time.sleep(0.01)
        self.ledger.close()
        self.publisher.stop()
        for thread in self._threads:
            thread.join(self._config.line.drain_timeout_s + 5)

    def _enter(self, state: str, **why: str) -> None:
        if state != self.state:
            (log.error if state == "Error" else log.info)("state", state=state, **why)
            self.state = state
            self._notify.status(state)

    def _health(self) -> dict[str, str] | None:
        """The heartbeat's fields; None while the line is stuck."""
        if self.state in {"Preoperational", "Error"}:
            return None
        counts = self.ledger.counts
        change = latest(self._stations.values())
        return {
            "v": "1",
            "state": self.state,
            "engines": ",".join(station.bundle.label for station in self._stations.values()),
            "lanes": str(sum(station.healthy_lanes() for station in self._stations.values())),
            "open": str(self.ledger.open),
            "parts": str(counts["parts"]),
            **{verdict.lower(): str(counts[verdict]) for verdict in Verdict},
            "refused": str(self.intake.counts.total() + sum(counts[name] for name in REFUSALS)),
            "lost": str(self.publisher.counts["lost"]),
            "spool_bytes": str(self._spool.size if self._spool else 0),
            "swap": change.state,
            "swap_engine": change.engine,
            "swap_detail": change.detail,
        }
