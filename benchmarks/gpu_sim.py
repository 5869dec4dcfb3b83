"""How well lanes overlap copies and inference, on the simulated CUDA driver: no GPU is needed, and none is measured.

Real :class:`engines.tensorrt_lane.TensorRtLane` objects, each in a thread of its own as in the line, run over the real
pycuda on a driver whose copies and kernels take set times. Results are read off the device's own schedule. They say how
well the lanes keep the device busy, not how fast any GPU is.

    python -m benchmarks.gpu_sim [--lanes 1,2,3] [--batches 300] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from engines.build import parity_gate
from engines.bundle import Bundle
from engines.tensorrt_lane import TensorRtEngine
from tests.doubles import forget
from tests.sim.driver import Engine, Range, Simulator, Span, load
from tests.sim.isolation import missing

MAX_BATCH: Final = 4
PROMISE: Final = 0.95
"""Share of the bound that two or more lanes have to reach."""
WINDOW: Final = 50
"""Successive batches that the best stretch is made of."""
SHOWN_S: Final = 0.05
"""Length of the picture."""
DOWNLOADS: Final = 2
"""Copies back of a batch: scores and heatmaps."""
NAMES: Final = {Engine.UPLOAD: "copy to the device", Engine.COMPUTE: "run", Engine.DOWNLOAD: "copy back"}
COLOURS: Final = ("#1f6fb2", "#e07b00", "#2c9155", "#b4325a", "#6b55b5", "#7a6a4f")


class SimulationError(RuntimeError):
    """The bench cannot run here, or a lane failed in it."""


@dataclass(frozen=True)
class Times:
    """What one batch takes in each stage, in milliseconds.

    Attributes:
        copy: To the device.
        run: The inference.
        back: From the device, scores and heatmaps together.
    """

    copy: float = 2.0
    run: float = 5.0
    back: float = 1.0

    @property
    def bound(self) -> float:
        """Batches a second that no number of lanes can exceed: each stage takes one batch at a time."""
        return 1e3 / max(self.copy, self.run, self.back)


@dataclass(frozen=True)
class Timeline:
    """What the device did.

    Attributes:
        lanes: How many there were.
        times: What was set.
        spans: All work on the device, by when it began.
        faults: Races, guard violations and hazards that the driver counted.
    """

    lanes: int
    times: Times
    spans: tuple[Span, ...]
    faults: dict[str, int]

    def of(self, engine: Engine) -> list[Span]:
        """The work of one stage."""
        return [span for span in self.spans if span.engine is engine]

    def steady(self) -> list[float]:
        """When batches were through the inference, without those at the start and at the end, in seconds."""
        ends, edge = sorted(span.end for span in self.of(Engine.COMPUTE)), 2 * self.lanes
        return ends[edge : len(ends) - edge]

    @property
    def throughput(self) -> float:
        """Batches a second in the steady state, all of it."""
        ends = self.steady()
        return (len(ends) - 1) / (ends[-1] - ends[0])

    @property
    def best(self) -> float:
        """Batches a second in the best stretch of :data:`WINDOW` batches: other programs on the box disturb it less."""
        ends = self.steady()
        width = min(WINDOW, len(ends) - 1)
        return max(width / (late - early) for early, late in zip(ends, ends[width:], strict=False))

    @property
    def share(self) -> float:
        """:attr:`throughput` as a share of the bound that the slowest stage sets."""
        return self.throughput / self.times.bound

    @property
    def best_share(self) -> float:
        """:attr:`best` as a share of that bound."""
        return self.best / self.times.bound

    def lane_of(self, span: Span) -> int:
        """Which lane a span belongs to, from 0."""
        return sorted({known.stream for known in self.spans}).index(span.stream)


def simulate(lanes: int, batches: int, times: Times, *, turns: bool = False) -> Timeline:
    """Run full batches through lanes and return the timeline. The driver stays loaded in this process for good.

    Args:
        lanes: Number of lanes, a thread each.
        batches: Of all lanes together, at least ``4 * lanes + 2``.
        times: Of the simulated device.
        turns: Whether the lanes wait for each other, each holding the device until it has its results: the worst case,
            for comparison.

    Raises:
        SimulationError: if there is no simulated driver here, or a lane fails.
    """
    if batches < 4 * lanes + 2:
        msg = f"{batches} batches are too few for {lanes} lanes: give at least {4 * lanes + 2}"
        raise SimulationError(msg)
    if reason := missing() or ("" if find_spec("onnxruntime") else "no onnxruntime: pip install 'dmdd-line[quantize]'"):
        msg = f"{reason}; see docs/gpu.md"
        raise SimulationError(msg)
    with _engine() as (library, bundle, engine):
        crew = _Crew(library, bundle, engine, lanes, batches, times, threading.Lock() if turns else None)
        spans = sorted(crew.run(), key=lambda span: span.begin)
        timeline = Timeline(lanes, times, tuple(spans), load().counts().faults())
    if len(timeline.of(Engine.COMPUTE)) != batches:
        msg = f"{len(timeline.of(Engine.COMPUTE))} batches came through, not {batches}"
        raise SimulationError(msg)
    return timeline


@contextmanager
def _engine() -> Iterator[tuple[Any, Bundle, TensorRtEngine]]:
    """The double of TensorRT and a tiny engine of its own on the simulated device."""
    sim = load()  # before anything imports pycuda
    from tests.sim import trt  # noqa: PLC0415 - needs onnxruntime
    from tests.support.engine import write_bundle  # noqa: PLC0415

    sim.reset()
    library = trt.install()
    forget()
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder))
        engine = TensorRtEngine(bundle, max_batch=MAX_BATCH, precision="fp32")
        try:
            yield library, bundle, engine
        finally:
            engine.close()


class _Idle:
    """Stands between the double and the driver: kernels take their set time, but compute nothing.

    On a busy box the double's own computing would take longer than what is set. The results of the last real batch,
    the parity gate's, stay where they are.
    """

    def __init__(self, sim: Simulator) -> None:
        self._sim = sim

    def launch(self, stream: int, kernel: Callable[[], None], **ranges: Sequence[Range]) -> None:  # noqa: ARG002
        """Queue a kernel that does nothing, with the memory that the real one declares."""
        self._sim.launch(stream, _nothing, **ranges)


def _nothing() -> None:
    pass


class _Crew:
    """Lanes in threads of their own, which make them, validate them, run them and close them, as in the line."""

    def __init__(
        self,
        library: Any,
        bundle: Bundle,
        engine: TensorRtEngine,
        lanes: int,
        batches: int,
        times: Times,
        turn: threading.Lock | None,
    ) -> None:
        self._library, self._sim, self._bundle, self._engine = library, library.sim, bundle, engine
        self._times, self._turn = times, turn
        self._left = iter(range(batches))  # next() on it is atomic
        self._room = (2 + DOWNLOADS) * batches
        self._ready = threading.Barrier(lanes, action=self._begin)
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._lane, name=f"lane-{number}") for number in range(lanes)]

    def run(self) -> list[Span]:
        """Run all batches; return what the device did."""
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        if self._failures:
            msg = f"a lane failed: {self._failures[0]}"
            raise SimulationError(msg) from self._failures[0]
        spans: list[Span] = self._sim.spans()
        return spans

    def _begin(self) -> None:
        """All lanes are made and idle: from here on, times are those that were asked for."""
        times = self._times
        self._library.sim = _Idle(self._sim)
        self._sim.configure(
            htod_us=times.copy * 1e3, launch_us=times.run * 1e3, dtoh_us=times.back * 1e3 / DOWNLOADS, guard=True
        )
        self._sim.trace(self._room)

    def _lane(self) -> None:
        try:
            lane = self._engine.make_lane()
            try:
                parity_gate(self._bundle, lane)
                self._ready.wait(60)
                for number in self._left:
                    self._batch(lane, number)
            finally:
                lane.close()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            self._failures.append(error)
            self._ready.abort()

    def _batch(self, lane: Any, number: int) -> None:
        lane.frames[:] = number % 256
        if self._turn is None:
            lane.submit(MAX_BATCH)
            lane.wait(60)
            return
        with self._turn:
            lane.submit(MAX_BATCH)
            lane.wait(60)


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """The timeline as a Chrome trace, for https://ui.perfetto.dev or chrome://tracing; microseconds from its begin.

    Each stage is a track; each span is named after its lane.
    """
    zero = timeline.spans[0].begin
    tracks = [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": int(engine), "args": {"name": name}}
        for engine, name in NAMES.items()
    ]
    device = f"simulated device, {timeline.lanes} lane(s)"
    work = [
        {
            "ph": "X",
            "name": f"lane {timeline.lane_of(span)}",
            "cat": NAMES[span.engine],
            "pid": 1,
            "tid": int(span.engine),
            "ts": (span.begin - zero) * 1e6,
            "dur": (span.end - span.begin) * 1e6,
            "args": {"bytes": span.size},
        }
        for span in timeline.spans
    ]
    process = {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": device}}
    return {"displayTimeUnit": "ms", "traceEvents": [process, *tracks, *work]}


LEFT, WIDTH, ROW, GAP, HEAD, FOOT = 150, 1000, 22, 46, 56, 30
"""Sizes in the picture, in pixels."""


def picture(timelines: Sequence[Timeline]) -> str:
    """Draw a stretch of the steady state of each timeline as SVG, one below the other, a colour for each lane."""
    block = len(NAMES) * ROW + GAP
    height = HEAD + len(timelines) * block + FOOT
    size = f'width="{LEFT + WIDTH + 20}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="100%" height="{height}" fill="#fff"/>',
        '<text x="10" y="20" font-size="15" font-weight="bold">Simulated device: copies and inference by lane</text>',
    ]
    most = max(timeline.lanes for timeline in timelines)
    for lane in range(most):
        x = LEFT + lane * 90
        lines.append(f'<rect x="{x}" y="30" width="12" height="12" fill="{_colour(lane)}"/>')
        lines.append(f'<text x="{x + 18}" y="40">lane {lane}</text>')
    for number, timeline in enumerate(timelines):
        lines += _block(timeline, HEAD + number * block)
    lines += _axis(height - FOOT)
    return "\n".join([*lines, "</svg>\n"])


def _colour(lane: int) -> str:
    return COLOURS[lane % len(COLOURS)]


def _block(timeline: Timeline, top: int) -> Iterator[str]:
    """One timeline: a title, and a row for each stage."""
    begin = timeline.steady()[0]
    end = begin + SHOWN_S
    title = f"{timeline.lanes} lane{'s' * (timeline.lanes > 1)}: {timeline.share:.1%} of the bound"
    yield f'<text x="{LEFT}" y="{top + 16}" font-weight="bold">{title}</text>'
    for row, (engine, name) in enumerate(NAMES.items()):
        y = top + 24 + row * ROW
        yield f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{name}</text>'
        yield f'<rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{ROW - 3}" fill="#eee"/>'
        for span in timeline.of(engine):
            if begin <= span.end and span.begin <= end:
                yield _bar(max(span.begin, begin) - begin, min(span.end, end) - begin, y, timeline.lane_of(span))


def _bar(begin: float, end: float, y: int, lane: int) -> str:
    left, width = LEFT + begin / SHOWN_S * WIDTH, (end - begin) / SHOWN_S * WIDTH
    shown = max(width - 0.6, 0.4)  # a hairline between one piece of work and the next
    return f'<rect x="{left:.1f}" y="{y}" width="{shown:.1f}" height="{ROW - 3}" fill="{_colour(lane)}"/>'


def _axis(y: int) -> Iterator[str]:
    for tick in range(11):
        x = LEFT + tick * WIDTH / 10
        yield f'<text x="{x:.0f}" y="{y + 12}" text-anchor="middle">{tick * SHOWN_S * 100:.0f}</text>'
    yield f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">ms</text>'


def figures(timeline: Timeline) -> dict[str, Any]:
    """The figures of a timeline."""
    return {
        "lanes": timeline.lanes,
        "batches": len(timeline.of(Engine.COMPUTE)),
        "batches_per_s": timeline.throughput,
        "bound_per_s": timeline.times.bound,
        "share": timeline.share,
        "best_share": timeline.best_share,
        **{f"busy_{name.replace(' ', '_')}": _busy(timeline, engine) for engine, name in NAMES.items()},
        "faults": sum(timeline.faults.values()),
    }


def _busy(timeline: Timeline, engine: Engine) -> float:
    """Share of the steady state in which a stage was at work."""
    ends = timeline.steady()
    work = sum(max(0.0, min(span.end, ends[-1]) - max(span.begin, ends[0])) for span in timeline.of(engine))
    return work / (ends[-1] - ends[0])


def write(timelines: Sequence[Timeline], out: Path) -> list[Path]:
    """Write the picture, a Chrome trace of each timeline, and the figures; return the files."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"timeline.svg": picture(timelines)}
    texts["figures.json"] = json.dumps([figures(timeline) for timeline in timelines], indent=1) + "\n"
    texts |= {f"trace-{t.lanes}-lanes.json": json.dumps(chrome_trace(t)) + "\n" for t in timelines}
    for name, text in texts.items():
        (out / name).write_text(text)
    return [out / name for name in texts]


def table(timelines: Sequence[Timeline]) -> str:
    """The figures as a table in Markdown."""
    lines = [
        "| lanes | batches/s | bound | share of the bound | best stretch | copy busy | run busy | copy back busy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for timeline in timelines:
        busy = " | ".join(f"{_busy(timeline, engine):.0%}" for engine in NAMES)
        lines.append(
            f"| {timeline.lanes} | {timeline.throughput:.1f} | {timeline.times.bound:.1f} | {timeline.share:.1%} |"
            f" {timeline.best_share:.1%} | {busy} |"
        )
    return "\n".join(lines)


def kept(timelines: Sequence[Timeline]) -> bool:
    """Whether two or more lanes reach :data:`PROMISE` of the bound in their best stretch, without a missing wait."""
    return all(not t.faults and (t.lanes < 2 or t.best_share >= PROMISE) for t in timelines)


def main() -> int:
    """Simulate, print and write; 0 if the promise is kept, 1 if not, 2 if this cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", default="1,2,3", help="numbers of lanes, separated by commas")
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("gpu-sim"))
    for name, default in (("copy", 2.0), ("run", 5.0), ("back", 1.0)):
        parser.add_argument(f"--{name}-ms", type=float, default=default)
    given = parser.parse_args()
    sys.setswitchinterval(0.001)  # as `dmdd run` does
    times = Times(given.copy_ms, given.run_ms, given.back_ms)
    try:
        timelines = [simulate(int(lanes), given.batches, times) for lanes in given.lanes.split(",")]
    except SimulationError as error:
        sys.stderr.write(f"dmdd bench gpu-sim: {error}\n")
        return 2
    files = ", ".join(map(str, write(timelines, given.out)))
    sys.stdout.write(f"{table(timelines)}\n\n{files}\n")
    if not kept(timelines):
        sys.stderr.write(f"less than {PROMISE:.0%} of the bound with two or more lanes, or a missing wait\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
