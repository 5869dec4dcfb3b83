"""What watches the line, as one thing: the observer of its parts, its vital signs, and the metrics that it serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import redis
import structlog

from pipeline.config import Config
from pipeline.errors import MissingExtraError
from pipeline.health import Lifecycle, State
from pipeline.intake import Intake
from pipeline.ledger import Ledger
from pipeline.metrics import Recorder
from pipeline.observer import Observer, calibrations, hashes_in
from pipeline.outlet import Spools
from pipeline.publisher import Publisher
from pipeline.records import Keys
from pipeline.station import Station
from pipeline.trace import Tracer
from pipeline.vitals import Beating, Organs, Vitals

if TYPE_CHECKING:
    from pipeline.exporter import Exporter

log = structlog.get_logger(__name__)


class Monitor:
    """Watches a line that is ready until it has drained.

    Args:
        config: The line's settings.
        life: Its state, which is ``Ready`` from now on.
        client: A Redis client of the observer's own; closed by :meth:`stop`.
        recorder: Where answered parts are.
        stations: The engines.
        ledger, publisher, intake, spool: The other rooms.
        more: Further threads that may not be stuck.
        announce: Tells systemd the state.

    Raises:
        MissingExtraError: if metrics are to be served, and the package for it is not installed.
        OSError: if they cannot be served at the address.
    """

    def __init__(
        self,
        config: Config,
        life: Lifecycle,
        client: redis.Redis,
        recorder: Recorder,
        stations: Mapping[str, Station],
        *,
        ledger: Ledger,
        publisher: Publisher,
        intake: Intake,
        spool: Spools,
        more: Mapping[str, Beating],
        announce: Callable[[str], None],
    ) -> None:
        self._client, self._exporter = client, None
        write = hashes_in(client, Keys(config.line.name).prefix)
        tracer = Tracer(config.metrics.trace_every)
        self._observer = Observer(recorder, config.cameras, config.drift, calibrations(stations), tracer, write)
        threads: dict[str, Beating] = {"timer": ledger, "publisher": publisher, "intake": intake, **more}
        organs = Organs(ledger, publisher, intake, spool, self._observer, stations, threads)
        self._vitals = Vitals(config, life, organs, announce)
        self._exporter = self._serve(config.metrics.address) if config.metrics.address else None
        self._observer.start()
        self._vitals.enter(State.READY)

    def check(self) -> bool:
        """See :meth:`Vitals.check`."""
        return self._vitals.check()

    def heartbeat(self) -> dict[str, str] | None:
        """See :meth:`Vitals.heartbeat`."""
        return self._vitals.heartbeat()

    def rest(self) -> None:
        """See :meth:`Vitals.rest`."""
        self._vitals.rest()

    def stop(self) -> None:
        """Look at the last parts, serve no more metrics, release everything."""
        if self._exporter is not None:
            self._exporter.stop()
        self._observer.stop()
        self._client.close()

    def _serve(self, address: str) -> Exporter:
        try:
            from pipeline.exporter import Exporter  # noqa: PLC0415 - needs an extra, and few lines do
        except ImportError as error:
            raise MissingExtraError("monitor", "prometheus-client") from error
        exporter = Exporter(self._vitals, address)
        log.info("metrics_served", address=":".join(map(str, exporter.address)))
        return exporter
