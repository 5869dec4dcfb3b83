"""The TensorRT lane against simulated libraries: no result before its time, none after a fault, nothing left behind."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from engines.build import BuildError, Target, compile_engine
from engines.bundle import Bundle
from engines.lane import Lane, LaneFault
from engines.tensorrt_lane import TensorRtEngine, TensorRtLane
from tests.doubles import simulated
from tests.doubles.cuda_driver import CudaMemoryError, LogicError
from tests.doubles.trt import DataType, World
from tests.support.gpu import FRAME, FRAME_BYTES, MAP_BYTES, MAX_BATCH, elsewhere, engine_of, fill, simulated_bundle


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Simulated libraries; nothing may be left on the GPU at the end of the test."""
    with simulated(monkeypatch) as world:
        yield world


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle for the simulated network."""
    return simulated_bundle(tmp_path)


@pytest.fixture
def lane(world: World, bundle: Bundle) -> Iterator[TensorRtLane]:
    """A lane of this thread's own."""
    with engine_of(bundle) as engine:
        lane = engine.make_lane()
        try:
            yield lane
        finally:
            lane.close()


class TestEngine:
    def test_reached_through_the_target(self, world: World, bundle: Bundle, tmp_path: Path) -> None:
        """The configured target ``tensorrt`` gives this engine, and its lanes are lanes."""
        engine = compile_engine(bundle, Target(kind="tensorrt", max_batch=2, cache=str(tmp_path / "cache")))
        assert isinstance(engine, TensorRtEngine)
        lane = engine.make_lane()
        assert isinstance(lane, Lane)
        assert (lane.frames.shape, lane.scores.shape, lane.heatmaps.shape) == ((2, *FRAME), (2,), (2, 2, 3))
        assert (lane.frames.dtype, lane.scores.dtype, lane.heatmaps.dtype) == (np.uint8, np.float32, np.uint8)
        lane.close()
        engine.close()

    def test_other_precisions_are_refused(self, world: World, bundle: Bundle) -> None:
        """A precision that is not offered is refused by name, before anything is built."""
        with pytest.raises(BuildError, match=r"'bf16'.*fp32 or fp16 or int8"):
            TensorRtEngine(bundle, max_batch=1, precision="bf16")
        assert world.asked == {}

    def test_no_pycuda(self, world: World, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without pycuda the error names the extra to install."""
        monkeypatch.setitem(sys.modules, "pycuda.driver", None)
        with pytest.raises(BuildError, match=r"pip install 'dmdd-line\[tensorrt\]'"):
            TensorRtEngine(bundle, max_batch=1, precision="fp32")

    def test_cuda_error(self, world: World, bundle: Bundle) -> None:
        """A CUDA error while building is a BuildError that names the bundle."""
        world.gpu.failing["push"] = LogicError("cuCtxPushCurrent failed")
        with pytest.raises(BuildError, match=r"caps@7.*cuCtxPushCurrent"):
            TensorRtEngine(bundle, max_batch=1, precision="fp32")
        assert world.gpu.strays == ["a context detached where it was not current, and so not given back"]
        world.gpu.strays.clear()

    def test_foreign_graph(self, world: World, bundle: Bundle) -> None:
        """A plan with other inputs, outputs or types is refused, and freed although the error is being handled."""
        world.kinds["heatmap"] = DataType.FLOAT
        with pytest.raises(BuildError, match="build the bundle again"):
            TensorRtEngine(bundle, max_batch=1, precision="fp32")
        assert world.gpu.live == {}

    def test_closed_engine(self, world: World, bundle: Bundle) -> None:
        """A closed engine is freed, may be closed again and makes no more lanes."""
        with engine_of(bundle) as engine:
            engine.close()
            assert world.gpu.live == {}
            with pytest.raises(LaneFault, match="closed"):
                engine.make_lane()


class TestMakeLane:
    @pytest.mark.parametrize(
        "refusal",
        [
            "create_execution_context",
            "set_optimization_profile_async",
            "set_tensor_address",
            "set_input_shape",
            "infer_shapes",
        ],
    )
    def test_refusals(self, world: World, bundle: Bundle, refusal: str) -> None:
        """A lane that TensorRT refuses is a fault with the log's text, and leaves nothing behind."""
        with engine_of(bundle) as engine:
            world.refuse = {refusal}
            with pytest.raises(LaneFault, match=f"{refusal}: simulated refusal"):
                engine.make_lane()
            assert list(world.gpu.live.values()) == ["engine"]
            assert world.gpu.current() is None

    @pytest.mark.parametrize("call", ["Stream", "Event", "pagelocked_empty", "mem_alloc"])
    def test_no_room(self, world: World, bundle: Bundle, call: str) -> None:
        """A lane for which the device has no room is a fault, leaves nothing behind and can be made later."""
        with engine_of(bundle) as engine:
            world.gpu.failing[call] = CudaMemoryError("out of memory")
            with pytest.raises(LaneFault, match="out of memory"):
                engine.make_lane()
            assert list(world.gpu.live.values()) == ["engine"]
            world.gpu.failing.clear()
            engine.make_lane().close()

    def test_larger_results_than_promised(self, world: World, bundle: Bundle) -> None:
        """A plan whose heatmap is not of the manifest's size is refused: its results would not fit."""
        world.heatmap = (3, 3)
        with engine_of(bundle) as engine, pytest.raises(LaneFault, match="build the bundle again"):
            engine.make_lane()

    def test_unspecified_shapes(self, world: World, bundle: Bundle) -> None:
        """A plan that wants more shapes than that of the frames is refused."""
        world.unspecified = ["mask"]
        with engine_of(bundle) as engine, pytest.raises(LaneFault, match="mask"):
            engine.make_lane()

    def test_addresses_are_set_once(self, world: World, lane: TensorRtLane) -> None:
        """Buffers are bound when the lane is made; a batch allocates and binds nothing."""
        before = dict(world.gpu.calls)
        for _ in range(3):
            lane.submit(2)
            lane.wait(1)
        for name in ("set_tensor_address", "mem_alloc", "pagelocked_empty", "Stream", "Event"):
            assert world.gpu.calls[name] == before[name]


class TestResults:
    def test_each_frame_gets_its_own(self, lane: TensorRtLane) -> None:
        """After wait, each slot holds its frame's score and heatmap, at every batch size."""
        for count in range(1, MAX_BATCH + 1):
            levels = [20 * count + slot for slot in range(count)]
            fill(lane, *levels)
            lane.submit(count)
            lane.wait(1)
            assert lane.scores[:count].tolist() == pytest.approx([level / 255 for level in levels])
            assert [set(heatmap.ravel()) for heatmap in lane.heatmaps[:count]] == [{level} for level in levels]

    def test_never_before_the_device_is_done(self, world: World, lane: TensorRtLane) -> None:
        """Until the device is done there is no result to read, not even the last batch's."""
        fill(lane, 10, 20, 30, 40)
        lane.submit(4)
        lane.wait(1)
        fill(lane, 50, 60, 70, 80)
        world.gpu.polls = 3
        lane.submit(2)
        assert np.isnan(lane.scores).all()
        assert not lane.ready()
        assert np.isnan(lane.scores).all()
        lane.wait(1)
        assert lane.ready()
        assert lane.scores[:2].tolist() == pytest.approx([50 / 255, 60 / 255])
        assert np.isnan(lane.scores[2:]).all()

    def test_submit_returns_at_once(self, world: World, lane: TensorRtLane) -> None:
        """Submitting queues and never waits."""
        world.gpu.hung = True
        waits = world.gpu.calls["Event.synchronize"] + world.gpu.calls["Stream.synchronize"]
        lane.submit(MAX_BATCH)
        assert world.gpu.calls["Event.synchronize"] + world.gpu.calls["Stream.synchronize"] == waits
        assert world.gpu.calls["Event.query"] == 0

    def test_only_the_batch_is_copied(self, world: World, lane: TensorRtLane) -> None:
        """Only the submitted frames go to the device and only their results come back, in the stream's order."""
        fill(lane, 1, 2, 3, 4)
        lane.heatmaps[:] = 99
        lane.submit(2)
        lane.wait(1)
        assert world.gpu.log == [
            ("memcpy_htod_async", 2 * FRAME_BYTES),
            ("execute_async_v3", 2),
            ("memcpy_dtoh_async", 2 * 4),
            ("memcpy_dtoh_async", 2 * MAP_BYTES),
        ]
        assert (lane.heatmaps[2:] == 99).all()

    def test_batch_sizes_change_freely(self, lane: TensorRtLane) -> None:
        """A small batch after a large one sees nothing of it."""
        for count in (4, 1, 3, 1, 4):
            fill(lane, *(50 + count + slot for slot in range(count)))
            lane.submit(count)
            lane.wait(1)
            assert lane.scores[:count].tolist() == pytest.approx([(50 + count + slot) / 255 for slot in range(count)])
            assert np.isnan(lane.scores[count:]).all()

    def test_waiting_again(self, lane: TensorRtLane) -> None:
        """The same batch may be waited for twice: its results stay."""
        fill(lane, 255)
        lane.submit(1)
        lane.wait(1)
        lane.wait(0)
        assert lane.scores[0] == 1

    def test_ready_before_anything(self, lane: TensorRtLane) -> None:
        """Where nothing was submitted nothing is ready, although CUDA calls an unrecorded event done."""
        assert not lane.ready()


class TestProfiles:
    """Batch sizes with an optimisation profile of their own."""

    @staticmethod
    def run(lane: TensorRtLane, *counts: int) -> None:
        """Run batches of these sizes and see that each frame gets its own score."""
        for number, count in enumerate(counts):
            fill(lane, *(10 * number + slot for slot in range(count)))
            lane.submit(count)
            lane.wait(1)
            assert lane.scores[:count].tolist() == pytest.approx([(10 * number + slot) / 255 for slot in range(count)])

    @pytest.fixture
    def lane(self, world: World, bundle: Bundle) -> Iterator[TensorRtLane]:
        """A lane with profiles for batches of one and three, beside the one for all."""
        with engine_of(bundle, exact_batches=(1, 3)) as engine:
            lane = engine.make_lane()
            try:
                yield lane
            finally:
                lane.close()

    def test_each_batch_runs_under_its_own(self, world: World, lane: TensorRtLane) -> None:
        """A size with a profile of its own runs under it, every other under the first; the results are as always."""
        self.run(lane, 4, 1, 3, 2, 1, 1, 4)
        assert world.runs == [(4, 0), (1, 1), (3, 2), (2, 0), (1, 1), (1, 1), (4, 0)]

    def test_changed_only_when_it_has_to_be(self, world: World, lane: TensorRtLane) -> None:
        """Batches under one profile change nothing: a change makes TensorRT set its layers up anew."""
        self.run(lane, 1)
        changes = world.gpu.calls["set_optimization_profile_async"]
        self.run(lane, 1, 1, 1)
        assert world.gpu.calls["set_optimization_profile_async"] == changes
        self.run(lane, 2, 4, 1)
        assert world.gpu.calls["set_optimization_profile_async"] == changes + 2

    def test_addresses_are_kept(self, world: World, lane: TensorRtLane) -> None:
        """Tensors are named, not numbered by profile: a change binds nothing anew."""
        bound = world.gpu.calls["set_tensor_address"]
        self.run(lane, 1, 2, 3, 4)
        assert world.gpu.calls["set_tensor_address"] == bound

    def test_lanes_share_them(self, world: World, bundle: Bundle) -> None:
        """Two lanes may run under the same profile at once, and under different ones."""
        with engine_of(bundle, exact_batches=(1,)) as engine:
            lanes = engine.make_lane(), engine.make_lane()
            for counts in ((1, 1), (1, 2), (2, 1)):
                for lane, count in zip(lanes, counts, strict=True):
                    lane.submit(count)
                for lane in lanes:
                    lane.wait(1)
            for lane in reversed(lanes):
                lane.close()
        assert world.runs == [(1, 1), (1, 1), (1, 1), (2, 0), (2, 0), (1, 1)]

    def test_a_refused_change_is_a_fault(self, world: World, lane: TensorRtLane) -> None:
        """A profile that TensorRT does not take voids the lane; nothing is run under another."""
        world.refuse = {"set_optimization_profile_async"}
        with pytest.raises(LaneFault, match=r"optimisation profile.*simulated refusal"):
            lane.submit(1)
        assert world.gpu.log == []

    def test_an_unknown_profile_is_a_fault(self, world: World, lane: TensorRtLane) -> None:
        """So does a False: a plan without the profile, as one that was built for others."""
        del world.asked["profiles"][1:]
        with pytest.raises(LaneFault, match="refused optimisation profile 1"):
            lane.submit(1)

    @pytest.mark.parametrize("forget", ["shape", "way back"])
    def test_forgetting_one_is_noticed(self, lane: TensorRtLane, forget: str) -> None:
        """The double refuses a run whose shape was set before the change, and a shape that the profile has not."""
        execution, stream = lane._execution, lane._stream
        if forget == "shape":
            execution._choose(1, stream)
            with pytest.raises(LaneFault, match="to run the batch"):
                execution.run(stream)
        else:
            execution.resize((1, *FRAME), stream)
            with pytest.raises(LaneFault, match="frames of shape"):
                execution._check(execution._raw.set_input_shape("frames", (2, *FRAME)), "frames of shape")

    def test_through_the_target(self, world: World, bundle: Bundle, tmp_path: Path) -> None:
        """A target's sizes come down to the plan; those that no batch has are left out."""
        target = Target("tensorrt", max_batch=2, cache=str(tmp_path / "cache"), exact_batches=(1, 2, 4, 1))
        compile_engine(bundle, target).close()
        assert [[shape[0] for shape in one] for one in world.asked["profiles"]] == [[1, 2, 2], [1, 1, 1], [2, 2, 2]]
        compile_engine(bundle, Target("tensorrt", max_batch=1, cache=str(tmp_path / "cache"))).close()
        assert [[shape[0] for shape in one] for one in world.asked["profiles"]] == [[1, 1, 1]]


class TestFaults:
    @pytest.mark.parametrize("refusal", ["set_input_shape", "execute_async_v3"])
    def test_refusals(self, world: World, lane: TensorRtLane, refusal: str) -> None:
        """What TensorRT refuses with False is a fault with the log's text."""
        world.refuse = {refusal}
        with pytest.raises(LaneFault, match=f"{refusal}: simulated refusal"):
            lane.submit(1)
        assert np.isnan(lane.scores).all()

    @pytest.mark.parametrize("count", [0, MAX_BATCH + 1, -1])
    def test_impossible_batch(self, world: World, lane: TensorRtLane, count: int) -> None:
        """A batch outside 1 to max_batch is a fault, and nothing of it reaches the device."""
        with pytest.raises(LaneFault, match="frames of shape"):
            lane.submit(count)
        assert world.gpu.log == []

    @pytest.mark.parametrize("call", ["memcpy_htod_async", "memcpy_dtoh_async", "Event.record"])
    def test_device_error_in_submit(self, world: World, lane: TensorRtLane, call: str) -> None:
        """A CUDA error while queueing is a fault with the driver's words."""
        world.gpu.failing[call] = LogicError(f"{call} failed: device lost")
        with pytest.raises(LaneFault, match="device lost"):
            lane.submit(1)
        world.gpu.failing.clear()

    @pytest.mark.parametrize("ask", ["wait", "ready"])
    def test_kernel_error(self, world: World, lane: TensorRtLane, ask: str) -> None:
        """A kernel that fails on the device is a fault when the result is asked for."""
        world.crash = "an illegal memory access was encountered"
        lane.submit(1)
        with pytest.raises(LaneFault, match="illegal memory access"):
            _ = lane.wait(1) if ask == "wait" else lane.ready()
        assert np.isnan(lane.scores).all()

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_score_that_is_no_number(self, world: World, lane: TensorRtLane, value: float) -> None:
        """A score that is not a finite number is a fault that names its slot."""
        world.score = value
        lane.submit(3)
        with pytest.raises(LaneFault, match="slot 2"):
            lane.wait(1)

    def test_timeout(self, world: World, lane: TensorRtLane) -> None:
        """A device that does not answer in time is a fault, within the time given, and nobody waits without end."""
        world.gpu.hung = True
        lane.submit(1)
        with pytest.raises(LaneFault, match=r"no result after 0\.1 s"):
            lane.wait(0.05)
        assert world.gpu.calls["Event.synchronize"] == 0

    def test_no_late_result_after_a_timeout(self, world: World, lane: TensorRtLane) -> None:
        """What comes after a timeout is not passed off as a result, nor is the lane used again."""
        world.gpu.hung = True
        lane.submit(1)
        with pytest.raises(LaneFault):
            lane.wait(0)
        world.gpu.hung = False
        for call in (lambda: lane.wait(1), lane.ready, lambda: lane.submit(1)):
            with pytest.raises(LaneFault, match="failed before: no result"):
                call()

    def test_void_after_a_bad_score(self, world: World, lane: TensorRtLane) -> None:
        """After a void batch, a further wait does not return."""
        world.score = np.nan
        lane.submit(1)
        for _ in range(2):
            with pytest.raises(LaneFault, match="not a finite number"):
                lane.wait(1)

    def test_nothing_submitted(self, lane: TensorRtLane) -> None:
        """Waiting for nothing is a fault and never yesterday's result."""
        with pytest.raises(LaneFault, match="nothing was submitted"):
            lane.wait(1)

    def test_submitting_twice(self, lane: TensorRtLane) -> None:
        """A second batch over one that still runs is a fault: both would share the buffers."""
        lane.submit(1)
        with pytest.raises(LaneFault, match="before the last one"):
            lane.submit(1)

    def test_another_thread(self, world: World, lane: TensorRtLane) -> None:
        """A lane works in its owner's thread only: elsewhere no context is current."""
        fault = elsewhere(lambda: lane.submit(1))
        assert isinstance(fault, LaneFault)
        assert "invalid device context" in str(fault)


class TestClose:
    def test_everything_goes_in_the_owners_thread(self, world: World, bundle: Bundle) -> None:
        """Closing frees every object where it was made, execution first and stream last, and then pops the context."""
        with engine_of(bundle) as engine:

            def live_and_die() -> None:
                lane = engine.make_lane()
                lane.submit(2)
                lane.wait(1)
                owner.append(threading.get_ident())
                lane.close()
                assert world.gpu.current() is None

            owner: list[int] = []
            assert elsewhere(live_and_die) is None
            assert list(world.gpu.live.values()) == ["engine"]
            kinds = [kind for kind, _ in world.gpu.freed]
            assert kinds[0] == "execution context"
            assert sorted(kinds[1:7]) == ["device memory"] * 3 + ["pinned memory"] * 3
            assert kinds[7:] == ["event", "stream"]
            assert {thread for _, thread in world.gpu.freed} == set(owner)

    def test_twice(self, world: World, lane: TensorRtLane) -> None:
        """Closing again does nothing, from whichever thread."""
        lane.close()
        freed = list(world.gpu.freed)
        lane.close()
        assert elsewhere(lane.close) is None
        assert world.gpu.freed == freed

    def test_from_another_thread(self, world: World, lane: TensorRtLane) -> None:
        """Another thread cannot close a lane, which would leak it: it is told so and the lane works on."""
        fault = elsewhere(lane.close)
        assert isinstance(fault, LaneFault)
        assert "thread that made it" in str(fault)
        assert world.gpu.freed == []
        lane.submit(1)
        lane.wait(1)

    def test_with_work_in_flight(self, world: World, lane: TensorRtLane) -> None:
        """Closing waits for queued work, so that no copy writes to freed memory."""
        world.gpu.hung = True
        lane.submit(2)
        lane.close()
        assert world.gpu.strays == []
        assert world.gpu.queues == {}

    @pytest.mark.parametrize("fault", ["kernel", "refused", "queueing", "score", "timeout"])
    def test_while_the_fault_is_handled(self, world: World, bundle: Bundle, fault: str) -> None:
        """A lane is freed completely even while its fault's traceback is alive, which keeps what it has seen."""
        with engine_of(bundle) as engine:
            lane = engine.make_lane()
            self._arrange(world, fault)
            with pytest.raises(LaneFault) as caught:
                self._run(lane)
            lane.close()
            assert list(world.gpu.live.values()) == ["engine"]
            assert caught.value.__traceback__ is not None

    @staticmethod
    def _run(lane: TensorRtLane) -> None:
        lane.submit(2)
        lane.wait(0.01)

    @staticmethod
    def _arrange(world: World, fault: str) -> None:
        if fault == "kernel":
            world.crash = "an illegal memory access was encountered"
        if fault == "refused":
            world.refuse = {"execute_async_v3"}
        if fault == "queueing":
            world.gpu.failing["memcpy_dtoh_async"] = LogicError("device lost")
        if fault == "score":
            world.score = np.nan
        world.gpu.hung = fault == "timeout"

    def test_results_that_somebody_kept(self, world: World, bundle: Bundle) -> None:
        """Memory that somebody still looks at is not taken from under them."""
        with engine_of(bundle) as engine:
            lane = engine.make_lane()
            fill(lane, 8)
            lane.submit(1)
            lane.wait(1)
            kept = lane.heatmaps[0]
            lane.close()
            assert set(kept.ravel()) == {8}
            assert list(world.gpu.live.values()) == ["engine", "pinned memory"]
            del kept
        assert world.gpu.strays == ["pinned memory freed while its context was not current"]
        world.gpu.strays.clear()

    def test_closed_lane(self, lane: TensorRtLane) -> None:
        """A closed lane answers with faults and has no frames to write to."""
        lane.close()
        assert len(lane.frames) == len(lane.scores) == len(lane.heatmaps) == 0
        for call in (lambda: lane.submit(1), lambda: lane.wait(0), lane.ready):
            with pytest.raises(LaneFault, match="closed"):
                call()


class TestTwoLanes:
    def test_one_context_object(self, world: World, bundle: Bundle) -> None:
        """Lanes on two threads push the one Context object and share nothing else."""
        barrier = threading.Barrier(2, timeout=10)
        scores: dict[int, list[float]] = {}

        def work(level: int) -> None:
            lane = engine.make_lane()
            barrier.wait()
            for _ in range(20):
                fill(lane, level, level + 1)
                lane.submit(2)
                lane.wait(5)
                scores.setdefault(level, []).extend(lane.scores[:2].tolist())
            barrier.wait()
            lane.close()

        with engine_of(bundle) as engine:
            world.gpu.polls = 2
            threads = [threading.Thread(target=work, args=(level,)) for level in (50, 150)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            assert list(world.gpu.live.values()) == ["engine"]
        assert scores == {level: pytest.approx([level / 255, (level + 1) / 255] * 20) for level in (50, 150)}
        assert len(world.gpu.contexts) == 1
        assert {id(context) for context in world.gpu.pushed} == {id(world.gpu.contexts[0])}
        assert world.gpu.calls["Stream"] == world.gpu.calls["create_execution_context"] == 2

    def test_a_fault_stays_in_its_lane(self, world: World, bundle: Bundle) -> None:
        """One lane's timeout does not keep another from its results."""
        with engine_of(bundle) as engine:
            first, second = engine.make_lane(), engine.make_lane()
            world.gpu.hung = True
            first.submit(1)
            with suppress(LaneFault):
                first.wait(0)
            world.gpu.hung = False
            fill(second, 51)
            second.submit(1)
            second.wait(1)
            assert second.scores[0] == pytest.approx(0.2)
            second.close()
            first.close()
