"""On a real GPU: ``pytest -m gpu``. The promises that elsewhere are proven on simulated libraries.

The simulated driver is never taken for a device: it answers to a name that NVIDIA's does not have.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engines import bundle, cuda
from engines.build import parity_gate
from engines.bundle import Bundle
from engines.frames import Pixels
from engines.lane import LaneFault
from engines.tensorrt_lane import PRECISIONS, TensorRtEngine, TensorRtLane
from tests.doubles import forget
from tests.sim.build import driver_library
from tests.sim.isolation import missing

DEMO = Path(__file__).parent.parent / "engines/demo"
MAX_BATCH = 4
SLACK = 8 << 20
"""Bytes by which free memory may differ for reasons of the driver's own."""

PROBE = """
import ctypes
try:
    driver = ctypes.CDLL("libcuda.so.1")
except OSError as error:
    raise SystemExit(f"no NVIDIA driver: {error}")
if hasattr(driver, "simcuda_counts"):
    raise SystemExit("libcuda.so.1 is the simulated driver")
count = ctypes.c_int()
status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
if status or not count.value:
    raise SystemExit(f"no usable GPU: error {status}, {count.value} devices")
import pycuda.driver
import tensorrt
"""


def why_not(**environment: str) -> str:
    """Why there is no real GPU with all that engines need, asked in a process of its own; empty if there is one."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return (done.stderr.strip().splitlines() or ["the probe failed"])[-1] if done.returncode else ""


@functools.cache
def no_gpu() -> str:
    """The same, asked once."""
    return why_not()


@pytest.fixture(scope="module")
def demo() -> Bundle:
    """The demo's engine, a real network."""
    return bundle.load(DEMO)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plans that the tests of this module share: building one takes a minute or more."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture
def engine(demo: Bundle, cache: Path) -> Iterator[TensorRtEngine]:
    """The demo's engine on the GPU, in fp32."""
    forget()
    with closing(TensorRtEngine(demo, max_batch=MAX_BATCH, precision="fp32", cache=cache)) as made:
        yield made


@pytest.fixture
def lane(engine: TensorRtEngine) -> Iterator[TensorRtLane]:
    """A lane of it."""
    with closing(engine.make_lane()) as made:
        yield made


def run(lane: TensorRtLane, frames: Pixels) -> tuple[list[float], bytes]:
    """Scores and heatmaps of a batch."""
    lane.frames[: len(frames)] = frames
    lane.submit(len(frames))
    lane.wait(30)
    return lane.scores[: len(frames)].tolist(), lane.heatmaps[: len(frames)].tobytes()


def free_memory() -> int:
    """Bytes free on the device."""
    with cuda.attached():
        return int(cuda.driver().mem_get_info()[0])


class TestProbe:
    """What counts as a GPU."""

    @pytest.mark.skipif(bool(missing(pycuda=False)), reason=missing(pycuda=False))
    def test_simulated_driver_is_none(self) -> None:
        """Where the simulated driver is found under NVIDIA's name, nothing here runs, and the reason says why."""
        assert why_not(LD_LIBRARY_PATH=str(driver_library().parent)) == "libcuda.so.1 is the simulated driver"

    def test_reason_is_a_sentence(self) -> None:
        """There is a GPU that works, or one line about what is missing."""
        assert "\n" not in no_gpu()
        assert not no_gpu().startswith("Traceback")


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.skipif(bool(no_gpu()), reason=f"needs a real GPU: {no_gpu()}")
class TestRealDevice:
    """Skipped without a real GPU, pycuda and TensorRT."""

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_parity(self, demo: Bundle, cache: Path, precision: str) -> None:
        """In every precision the demo's engine gives the reference's scores, maps and verdicts at all batch sizes."""
        forget()
        with (
            closing(
                TensorRtEngine(demo, max_batch=MAX_BATCH, precision=precision, exact_batches=(1,), cache=cache)
            ) as engine,
            closing(engine.make_lane()) as lane,
        ):
            differences = parity_gate(demo, lane)
        assert len(differences) == MAX_BATCH * len(demo.parity().frames)

    def test_kept_plan_is_loaded(self, demo: Bundle, cache: Path, engine: TensorRtEngine) -> None:
        """A second start builds nothing, and computes the same."""
        steps: list[str] = []
        again = TensorRtEngine(
            demo, max_batch=MAX_BATCH, precision="fp32", cache=cache, progress=lambda phase, *_: steps.append(phase)
        )
        frames = demo.parity().frames[:MAX_BATCH]
        with closing(again), closing(again.make_lane()) as second, closing(engine.make_lane()) as first:
            assert run(first, frames) == run(second, frames)
        assert steps == []

    def test_reuse(self, demo: Bundle, lane: TensorRtLane) -> None:
        """A lane gives the same bits for the same batch however often and whatever ran on it in between."""
        frames = demo.parity().frames[:MAX_BATCH]
        expected = {count: run(lane, frames[:count]) for count in range(1, MAX_BATCH + 1)}
        draw = np.random.default_rng(0)
        for count in draw.integers(1, MAX_BATCH + 1, 300).tolist():
            run(lane, draw.integers(0, 256, (MAX_BATCH, *frames.shape[1:]), np.uint8))
            assert run(lane, frames[:count]) == expected[count]
            assert np.isnan(lane.scores[count:]).all()

    def test_two_lanes_at_once(self, demo: Bundle, engine: TensorRtEngine) -> None:
        """Two lanes in threads of their own, each with its own frames, never see each other's."""
        frames = demo.parity().frames
        halves, together = (frames[:MAX_BATCH], frames[-MAX_BATCH:]), threading.Barrier(2, timeout=120)

        def work(own: Pixels) -> set[tuple[tuple[float, ...], bytes]]:
            with closing(engine.make_lane()) as lane:
                together.wait()
                results = (run(lane, own) for _ in range(300))
                return {(tuple(scores), heatmaps) for scores, heatmaps in results}

        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(work, halves))
        alone = []
        for own in halves:
            with closing(engine.make_lane()) as lane:
                scores, heatmaps = run(lane, own)
                alone.append({(tuple(scores), heatmaps)})
        assert both == alone

    def test_nothing_is_leaked(self, demo: Bundle, engine: TensorRtEngine) -> None:
        """Lanes that are made, used and closed, by many threads, leave no memory taken and no complaint of pycuda."""

        def work(_: int) -> None:
            with closing(engine.make_lane()) as lane:
                run(lane, demo.parity().frames[:MAX_BATCH])

        work(0)  # the libraries' own memory is taken once
        before = free_memory()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(10):
                with ThreadPoolExecutor(2) as pool:
                    list(pool.map(work, range(2)))
        assert abs(free_memory() - before) <= SLACK

    def test_nothing_is_allocated_while_it_runs(self, demo: Bundle, lane: TensorRtLane) -> None:
        """After the first batch of each size, free memory does not move."""
        frames = demo.parity().frames[:MAX_BATCH]
        for count in range(1, MAX_BATCH + 1):
            run(lane, frames[:count])
        before = free_memory()
        for count in range(100):
            run(lane, frames[: 1 + count % MAX_BATCH])
        assert free_memory() == before

    def test_foreign_thread_may_not_close(self, engine: TensorRtEngine, lane: TensorRtLane) -> None:
        """Only the thread that made a lane closes it; the lane then still works."""
        with ThreadPoolExecutor(1) as pool, pytest.raises(LaneFault, match="by the thread that made it"):
            pool.submit(lane.close).result()
        run(lane, np.zeros((1, *lane.frames.shape[1:]), np.uint8))

    def test_impossible_deadline(self, demo: Bundle, engine: TensorRtEngine) -> None:
        """A batch that is not done in time is a fault, the lane is void and closes, and a new one works."""
        lane = engine.make_lane()
        lane.submit(MAX_BATCH)
        with pytest.raises(LaneFault, match="no result after"):
            lane.wait(0.0)
        with pytest.raises(LaneFault, match="void"):
            lane.submit(1)
        lane.close()
        with closing(engine.make_lane()) as again:
            parity_gate(demo, again)
