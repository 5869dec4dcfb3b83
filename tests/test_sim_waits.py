"""The lane's waits on the simulated driver: each is there, and its absence is seen, whatever the timing was."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import cuda
from engines.lane import LaneFault
from engines.store import Store
from engines.tensorrt_lane import Execution, TensorRtEngine, TensorRtLane
from tests.sim import trt
from tests.sim.isolation import isolated, missing
from tests.support.engine import make_store

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

MAX_BATCH = 4
BATCHES = 12
Mutate = Callable[[Any], None]


def nothing(*_: object) -> None:
    """Stand in for a wait."""


def no_wait(patch: Any) -> None:
    """The lane does not wait for its batch."""
    patch.setattr(TensorRtLane, "_await", nothing)


def sleep_instead(patch: Any) -> None:
    """The lane sleeps until the batch is surely done, and does not ask: the results are right, by luck."""
    patch.setattr(TensorRtLane, "_await", lambda *_: time.sleep(0.02))


def no_event(patch: Any) -> None:
    """The event is asked, but was never recorded."""
    patch.setattr(cuda.Event, "record", nothing)


def early_event(patch: Any) -> None:
    """The event is recorded before the results are queued: it tells of the input alone."""
    upload, record = cuda.Mirror.upload, cuda.Event.record
    lanes: list[Any] = []
    bind = TensorRtLane._prepare

    def prepare(self: Any, size: int) -> None:
        lanes.append(self)
        bind(self, size)

    def upload_and_record(self: Any, count: int, stream: cuda.Stream) -> None:
        upload(self, count, stream)
        record(lanes[-1]._done, stream)

    patch.setattr(TensorRtLane, "_prepare", prepare)
    patch.setattr(cuda.Mirror, "upload", upload_and_record)
    patch.setattr(cuda.Event, "record", nothing)


def apart(method: str) -> Mutate:
    """Make a mutation that queues one kind of copy on a stream of its own, without an event between the two."""

    def mutate(patch: Any) -> None:
        queue = getattr(cuda.Mirror, method)
        streams: dict[int, cuda.Stream] = {}

        def queue_apart(self: Any, count: int, stream: cuda.Stream) -> None:
            queue(self, count, streams.setdefault(stream.handle, cuda.Stream()))

        patch.setattr(cuda.Mirror, method, queue_apart)

    return mutate


def kernel_apart(patch: Any) -> None:
    """The network runs on a stream of its own."""
    run = trt.IExecutionContext.execute_async_v3
    other: list[cuda.Stream] = []

    def run_elsewhere(self: Any, stream_handle: int) -> bool:
        other.extend([] if other else [cuda.Stream()])
        return run(self, other[0].handle)

    patch.setattr(trt.IExecutionContext, "execute_async_v3", run_elsewhere)


def rewritten_input(patch: Any) -> None:
    """The next frames are written as soon as the batch is queued."""
    submit = TensorRtLane.submit

    def submit_and_write(self: Any, count: int) -> None:
        submit(self, count)
        self.frames[:count] = 255

    patch.setattr(TensorRtLane, "submit", submit_and_write)


def submitted_twice(patch: Any) -> None:
    """A second batch is queued while the first runs."""
    submit = TensorRtLane.submit

    def submit_again(self: Any, count: int) -> None:
        submit(self, count)
        self._running = False
        submit(self, count)

    patch.setattr(TensorRtLane, "submit", submit_again)


def closed_at_once(patch: Any) -> None:
    """A lane is closed without waiting for what it has queued."""
    patch.setattr(cuda.Stream, "synchronize", nothing)


def profile_apart(patch: Any) -> None:
    """The optimisation profile is changed on a stream of its own."""
    choose = trt.IExecutionContext.set_optimization_profile_async
    other: list[cuda.Stream] = []

    def choose_elsewhere(self: Any, profile_index: int, stream_handle: int) -> bool:
        other.extend([] if other else [cuda.Stream()])
        return bool(choose(self, profile_index, other[0].handle))

    patch.setattr(trt.IExecutionContext, "set_optimization_profile_async", choose_elsewhere)


def shape_first(patch: Any) -> None:
    """The shape is set before the profile is changed, and forgotten with it."""
    resize = Execution.resize

    def resize_twice(self: Any, shape: tuple[int, ...], stream: cuda.Stream) -> None:
        profile = self._profile
        resize(self, shape, stream)
        if profile not in {None, self._profile}:
            self._choose(self._profile, stream)

    patch.setattr(Execution, "resize", resize_twice)


def profile_stays(patch: Any) -> None:
    """The profile is chosen once and never changed."""
    choose = Execution._choose
    seen: set[int] = set()

    def choose_once(self: Any, profile: int, stream: cuda.Stream) -> None:
        if id(self) not in seen:
            choose(self, 1, stream)
        seen.add(id(self))
        self._profile = profile

    patch.setattr(Execution, "_choose", choose_once)


MUTATIONS: dict[str, tuple[Mutate, set[str]]] = {
    "no wait": (no_wait, {"violations"}),
    "sleep instead of wait": (sleep_instead, {"violations"}),
    "no event": (no_event, {"violations"}),
    "early event": (early_event, {"violations"}),
    "upload on another stream": (apart("upload"), {"races"}),
    "download on another stream": (apart("download"), {"races"}),
    "run on another stream": (kernel_apart, {"races"}),
    "input rewritten": (rewritten_input, {"violations"}),
    "submitted twice": (submitted_twice, {"violations"}),
    "closed at once": (closed_at_once, {"hazards"}),
    "profile on another stream": (profile_apart, {"races"}),
    "shape before profile": (shape_first, {"void"}),
    "profile stays": (profile_stays, {"void"}),
}
"""Each wait that is taken away, and what has to be seen of it."""


def seen(folder: Path, *, copies_us: float) -> set[str]:
    """Run a lane for some batches, close it with one in flight, and name everything that went wrong."""
    sim = trt.install().sim
    sim.reset()
    bundle = (Store(folder / "store") if (folder / "store").exists() else make_store(folder)).resolve("bright")
    sim.configure(guard=True, htod_us=copies_us, dtoh_us=copies_us, launch_us=copies_us)
    engine = TensorRtEngine(bundle, max_batch=MAX_BATCH, precision="fp32", exact_batches=(1, 3))
    wrong = set()
    try:
        lane = engine.make_lane()
    except LaneFault:
        wrong.add("void")
    else:
        wrong |= _live(lane)
    engine.close()
    return wrong | set(sim.counts().faults())


def _live(lane: TensorRtLane) -> set[str]:
    wrong = set()
    try:
        wrong |= _work(lane)
    except LaneFault:
        wrong.add("void")
    with suppress(LaneFault):
        lane.submit(MAX_BATCH)
    lane.close()
    return wrong


def _work(lane: TensorRtLane) -> set[str]:
    random = np.random.default_rng(0)
    wrong = set()
    for _ in range(BATCHES):
        count = int(random.integers(1, MAX_BATCH + 1))
        levels = random.integers(0, 256, count)
        lane.frames[:count] = levels[:, None, None, None]
        lane.submit(count)
        lane.wait(10)
        if not np.allclose(lane.scores[:count], levels / 255, atol=1e-5):
            wrong.add("wrong")
    return wrong


class TestWaits:
    """Every wait of the lane is needed, and its absence is seen whatever the timing."""

    @pytest.mark.parametrize("copies_us", [0.0, 3000.0], ids=["fast", "slow"])
    @isolated
    def test_all_are_there(self, tmp_path: Path, copies_us: float) -> None:
        """As it is, the lane gives right results; nothing is raced, touched too early or freed too early."""
        assert seen(tmp_path, copies_us=copies_us) == set()

    @pytest.mark.parametrize("name", MUTATIONS)
    @isolated
    def test_one_is_missing(self, tmp_path: Path, name: str) -> None:
        """Without it the simulator says what is wrong, fast or slow; a control in the same process says nothing."""
        mutate, expected = MUTATIONS[name]
        for copies_us in (0.0, 1000.0):
            assert seen(tmp_path, copies_us=copies_us) == set()
            with pytest.MonkeyPatch.context() as patch:
                mutate(patch)
                found = seen(tmp_path, copies_us=copies_us)
            assert expected <= found, found
