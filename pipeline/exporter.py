"""The metrics as Prometheus reads them: made of the line's counters when it asks, not before."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from pipeline.drift import Cause
from pipeline.health import Condition, State
from pipeline.metrics import BOUNDS_S, FAMILIES, Histogram
from pipeline.vitals import Vitals

Samples = Iterable[tuple[tuple[str, ...], Any]]

KINDS = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
BOUNDS = [*(f"{bound:g}" for bound in BOUNDS_S), "+Inf"]


class LineCollector(Collector):
    """Reads the line at every scrape.

    Args:
        vitals: The line's vital signs.
    """

    def __init__(self, vitals: Vitals) -> None:
        self._vitals = vitals

    def collect(self) -> Iterator[Metric]:
        """Yield every family of ``pipeline.metrics.FAMILIES``, up to date."""
        self._vitals.organs.observer.turn()
        samples = {**self._counters(), **self._gauges(), **self._histograms()}
        for name in FAMILIES:
            yield _family(name, samples[name])

    def _counters(self) -> dict[str, Samples]:
        organs = self._vitals.organs
        published = {
            f"dmdd_{name}_total": [((), organs.publisher.counts[name])]
            for name in ("published", "spooled", "lost", "redis_failures", "heartbeats")
        }
        by_engine = {
            f"dmdd_{name}_total": [((engine,), station.counts[name]) for engine, station in organs.stations.items()]
            for name in ("batches", "inspected", "lane_faults")
        }
        return {
            "dmdd_parts_total": list(organs.observer.meter.parts.items()),
            "dmdd_refused_total": [
                ((name.removeprefix("refused_"),), count) for name, count in organs.refused().items()
            ],
            "dmdd_late_total": [((), organs.ledger.counts["late_results"])],
            **published,
            **by_engine,
        }

    def _gauges(self) -> dict[str, Samples]:
        vitals, organs = self._vitals, self._vitals.organs
        stations = organs.stations
        return {
            "dmdd_open_parts": [((), organs.ledger.open)],
            "dmdd_queue_parts": [((name,), station.scheduler.waiting) for name, station in stations.items()],
            "dmdd_lanes": [((name,), station.healthy_lanes()) for name, station in stations.items()],
            "dmdd_spool_bytes": [((), organs.spool.size)],
            "dmdd_state": [((state.value,), state is vitals.state) for state in State],
            "dmdd_degraded": [((condition.value,), condition in vitals.degraded) for condition in Condition],
            "dmdd_drift": list(_drift(organs.observer.meter.arrivals, organs.observer.causes)),
        }

    def _histograms(self) -> dict[str, Samples]:
        meter = self._vitals.organs.observer.meter
        return {
            "dmdd_stage_seconds": [
                ((stage, camera, engine), found)
                for engine, stages in list(meter.stages.items())
                for (stage, camera), found in list(stages.items())
            ],
            "dmdd_verdict_seconds": [((camera,), found) for camera, found in list(meter.verdicts.items())],
        }


def _drift(cameras: Iterable[str], causes: Mapping[str, list[str]]) -> Iterator[tuple[tuple[str, ...], bool]]:
    for camera in list(cameras):
        for cause in Cause:
            yield (camera, cause.value), cause.value in causes.get(camera, [])


def _family(name: str, samples: Samples) -> Metric:
    family = FAMILIES[name]
    made: Any = KINDS[family.kind](name, family.help, labels=family.labels)
    for labels, value in samples:
        if isinstance(value, Histogram):
            buckets = list(zip(BOUNDS, accumulate(value.counts), strict=True))
            made.add_metric(labels, buckets, value.total_ns / 1e9)
        else:
            made.add_metric(labels, float(value))
    found: Metric = made
    return found


class Exporter:
    """Serves the metrics of a line over HTTP until :meth:`stop`.

    Args:
        vitals: The line's vital signs.
        address: ``host:port``; port 0 takes a free one.

    Attributes:
        address: Host and port that it listens on.

    Raises:
        OSError: if the address cannot be listened on; the message names the setting.
    """

    def __init__(self, vitals: Vitals, address: str) -> None:
        host, _, port = address.rpartition(":")
        registry = CollectorRegistry()
        registry.register(LineCollector(vitals))
        try:
            self._server: WSGIServer
            self._thread: threading.Thread
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except (OSError, OverflowError) as error:
            msg = f"metrics.address = {address!r}: cannot listen there: {error}; is it in use, is it one of this box?"
            raise OSError(msg) from error
        self.address: tuple[str, int] = self._server.server_address[:2]  # type: ignore[assignment]

    def stop(self) -> None:
        """Serve no longer, and give the port free."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
