"""Lanes overlap copies and inference: on the simulated device's own schedule, and in what the bench writes of it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from benchmarks.gpu_sim import PROMISE, SimulationError, Timeline, Times, chrome_trace, figures, kept, simulate, write
from pipeline import cli_bench
from pipeline.cli import app
from tests.sim.driver import Engine, Span
from tests.sim.isolation import isolated, missing

needs_sim = pytest.mark.skipif(bool(missing()), reason=missing())
ROOT = Path(__file__).parent.parent
TIMES = Times()
BATCHES = 150


def perfect(lanes: int, batches: int, gap: float = 0.0) -> Timeline:
    """A device that never waits, or between two runs ``gap`` seconds: what happened is known."""
    spans = []
    for number in range(batches):
        begin = 10.0 + number * (0.005 + gap)
        stream = 1 + number % lanes
        spans.append(Span(Engine.UPLOAD, stream, begin - 0.002, begin, 96))
        spans.append(Span(Engine.COMPUTE, stream, begin, begin + 0.005, 0))
        spans += [Span(Engine.DOWNLOAD, stream, begin + at, begin + at + 0.0005, 16) for at in (0.005, 0.0055)]
    return Timeline(lanes, TIMES, tuple(sorted(spans, key=lambda span: span.begin)), {})


class TestFigures:
    def test_bound_is_the_slowest_stage(self) -> None:
        """Whichever stage is the slowest sets the bound."""
        assert [t.bound for t in (Times(), Times(copy=8), Times(back=10))] == [200.0, 125.0, 100.0]

    def test_a_device_that_never_waits_is_at_the_bound(self) -> None:
        """Throughput without gaps is the bound, every stage busy for its share of the time."""
        found = figures(perfect(2, 60))
        assert [found["share"], found["best_share"]] == pytest.approx([1.0, 1.0])
        busy = [found[f"busy_{name}"] for name in ("copy_to_the_device", "run", "copy_back")]
        assert busy == pytest.approx([0.4, 1.0, 0.2], abs=0.02)

    def test_gaps_are_counted(self) -> None:
        """A pause of 5 ms after each run of 5 ms halves it, and breaks the promise for two lanes, not for one."""
        assert perfect(2, 60, gap=0.005).share == pytest.approx(0.5)
        assert not kept([perfect(2, 60, gap=0.005)])
        assert kept([perfect(1, 60, gap=0.005), perfect(2, 60)])

    def test_a_missing_wait_breaks_the_promise(self) -> None:
        """However fast it was, a run with a race does not count."""
        fast = perfect(2, 60)
        assert not kept([Timeline(fast.lanes, fast.times, fast.spans, {"races": 1})])

    def test_too_few_batches(self) -> None:
        """What leaves no steady state is refused with the number that would."""
        with pytest.raises(SimulationError, match="at least 14"):
            simulate(3, 13, TIMES)


class TestWrite:
    def test_trace_is_complete(self) -> None:
        """Every span is in the Chrome trace, on its stage's track, under its lane's name, with its times."""
        timeline = perfect(3, 30)
        trace = json.loads(json.dumps(chrome_trace(timeline)))
        events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        assert len(events) == len(timeline.spans) == 4 * 30
        for event, span in zip(events, timeline.spans, strict=True):
            assert (event["tid"], event["name"]) == (span.engine, f"lane {span.stream - 1}")
            assert event["ts"] / 1e6 == pytest.approx(span.begin - timeline.spans[0].begin, abs=1e-6)
            assert event["dur"] / 1e6 == pytest.approx(span.end - span.begin, abs=1e-6)
        tracks = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
        assert tracks == {0: "copy to the device", 1: "copy back", 2: "run"}

    def test_files(self, tmp_path: Path) -> None:
        """The picture is well-formed, has each lane's colour and stays within its frame; the figures are those."""
        timelines = [perfect(1, 30), perfect(2, 30)]
        files = write(timelines, tmp_path / "new")
        assert {file.name for file in files} == {
            "timeline.svg",
            "figures.json",
            "trace-1-lanes.json",
            "trace-2-lanes.json",
        }
        root = ElementTree.fromstring((tmp_path / "new/timeline.svg").read_bytes())  # noqa: S314 - our own
        bars = [bar.attrib for bar in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
        assert {"#1f6fb2", "#e07b00", "#eee"} == {bar["fill"] for bar in bars}
        assert max(float(bar["x"]) + float(bar["width"]) for bar in bars) <= float(root.attrib["width"])
        assert max(float(bar["y"]) + float(bar["height"]) for bar in bars) <= float(root.attrib["height"])
        assert json.loads((tmp_path / "new/figures.json").read_text()) == [figures(t) for t in timelines]


def best(lanes: int, *, turns: bool = False) -> Timeline:
    """The better of up to three runs: a box that is busy for a second is no property of the lanes."""
    timelines = []
    for _ in range(3):
        timelines.append(simulate(lanes, BATCHES, TIMES, turns=turns))
        if timelines[-1].best_share >= PROMISE:
            break
    return max(timelines, key=lambda timeline: timeline.best_share)


@needs_sim
class TestOverlap:
    """Copy 2 ms, run 5 ms, copy back 1 ms, on real lanes, pycuda and threads; by the device's own schedule."""

    @isolated
    def test_two_or_three_lanes_keep_the_device_busy(self) -> None:
        """Two lanes reach 95% of what the run's 5 ms allow, and so do three, without a missing wait."""
        sys.setswitchinterval(0.001)
        for lanes in (2, 3):
            timeline = best(lanes)
            assert timeline.faults == {}
            assert PROMISE <= timeline.best_share <= 1.0, figures(timeline)

    @isolated
    def test_lanes_that_wait_for_each_other_do_not(self) -> None:
        """One lane, or two that take turns, never exceed 5 ms in 8 ms: the measure tells overlap from none."""
        sys.setswitchinterval(0.001)
        for timeline in (simulate(1, BATCHES, TIMES), simulate(2, BATCHES, TIMES, turns=True)):
            assert timeline.best_share <= 5 / 8 + 0.001, figures(timeline)

    @isolated
    def test_spans_are_as_set(self) -> None:
        """Each stage takes its time and one batch at a time; within a lane, stages follow each other."""
        sys.setswitchinterval(0.001)
        timeline = simulate(2, 30, TIMES)
        for engine, seconds, count in (
            (Engine.UPLOAD, 0.002, 30),
            (Engine.COMPUTE, 0.005, 30),
            (Engine.DOWNLOAD, 0.0005, 60),
        ):
            spans = timeline.of(engine)
            assert len(spans) == count
            assert min(span.end - span.begin for span in spans) >= seconds - 1e-9
            assert all(late.begin >= early.end - 1e-9 for early, late in itertools.pairwise(spans))
        for stream in {span.stream for span in timeline.spans}:
            own = [span for span in timeline.spans if span.stream == stream]
            order = [Engine.UPLOAD, Engine.COMPUTE, Engine.DOWNLOAD, Engine.DOWNLOAD]
            assert [span.engine for span in own] == order * (len(own) // 4)
            assert all(late.begin >= early.end - 1e-9 for early, late in itertools.pairwise(own))


class TestCommand:
    @needs_sim
    def test_prints_and_writes(self, tmp_path: Path) -> None:
        """``dmdd bench gpu-sim`` prints a row for each number of lanes and writes what it says, and nothing else."""
        command = [sys.executable, "-m", "pipeline", "bench", "gpu-sim", "--lanes=1,2", "--batches=40", "--out=here"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode in {0, 1}, done.stderr  # 1: on a busy box the promise may not be kept in so few batches
        rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
        assert rows[2:] == ["1", "2"]
        assert sorted(file.name for file in (tmp_path / "here").iterdir()) == [
            "figures.json",
            "timeline.svg",
            "trace-1-lanes.json",
            "trace-2-lanes.json",
        ]
        assert [found["batches"] for found in json.loads((tmp_path / "here/figures.json").read_text())] == [40, 40]

    def test_outside_a_checkout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the repository's tests are not, it says so, says what to do, and ends with 2."""
        monkeypatch.setattr(cli_bench, "ROOT", tmp_path)
        result = CliRunner().invoke(app, ["bench", "gpu-sim"])
        assert result.exit_code == 2
        assert "no checkout: clone" in result.output

    def test_no_compiler(self, tmp_path: Path) -> None:
        """Without a compiler it says so and ends with 2, and writes nothing."""
        environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "benchmarks.gpu_sim", f"--out={tmp_path / 'out'}"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 2
        assert "no cc or gcc on PATH" in done.stderr or "is not installed: pip install" in done.stderr
        assert not (tmp_path / "out").exists()
