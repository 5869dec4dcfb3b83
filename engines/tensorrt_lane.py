"""Lanes on an NVIDIA GPU: one TensorRT execution context, CUDA stream and set of buffers each.

The ONNX graph is compiled on the box that runs it, strongly typed and without TF32, so that what runs computes in
the precision that was validated. Every buffer is made with the lane, none while a batch runs.

TensorRT is isolated here and pycuda in :mod:`engines.cuda`. Written for the API that TensorRT 10.12 and later and
11 have in common and tested against simulated libraries; NOT yet run on real GPU hardware.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from engines import cuda
from engines.build import BuildError, Progress
from engines.bundle import Bundle
from engines.frames import Pixels
from engines.lane import LaneFault, check_scores
from engines.plan import FRAMES, PlanCache, Toolkit, explaining, key_of, load_engine, profiles_for, toolkit
from engines.precision import PrecisionError, cache_folder, graph_of

PRECISIONS: Final = ("fp32", "fp16", "int8")
SCORE: Final = "score"
HEATMAP: Final = "heatmap"
POLL_S: Final = 0.0002
"""How often a waiting lane asks the device, and so about the latency that waiting adds at most."""


class TensorRtEngine:
    """A bundle compiled for the GPU of this box.

    Args:
        bundle: A verified bundle.
        max_batch: Largest batch that a lane takes, and the one that TensorRT optimises for.
        precision: ``fp32``, ``fp16`` or ``int8``; what the graph computes in (:mod:`engines.precision`).
        exact_batches: Batch sizes that get an optimisation profile of their own.
        cache: Folder of plans and rewritten graphs. None builds the plan anew, and rewrites in the user's cache.
        progress: Told how far a build is; may feed a watchdog.

    Attributes:
        compiled: The ``ICudaEngine``, None once the engine is closed. Lanes look it up here and keep no reference
            of their own, so that :meth:`close` frees it.
        profiles: Its optimisation profiles. Lanes share them: as many contexts as one likes may have the same one
            active since TensorRT 10 (before, one context each, unless PROFILE_SHARING_0806 was asked for).

    Raises:
        BuildError: if pycuda, TensorRT or a GPU is missing, or the graph cannot be compiled.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_batch: int,
        precision: str,
        exact_batches: tuple[int, ...] = (),
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            msg = f"precision {precision!r}: TensorRT engines run in {' or '.join(PRECISIONS)}"
            raise BuildError(msg)
        self.manifest = bundle.manifest
        self.max_batch = max_batch
        self.profiles = profiles_for(max_batch, exact_batches)
        self._making = threading.Lock()
        self._hold: cuda.Hold | None = None
        self._runtime: Any = None
        self.compiled: Any = None
        kit = toolkit()
        graph = _graph(bundle, precision, cache)
        with cuda.raising(BuildError, f"CUDA, building {bundle.label}"), cuda.attached(), explaining(kit.journal):
            try:
                self._hold = cuda.Hold()
                key = key_of(kit, graph, precision, bundle.manifest.input.shape, self.profiles)
                plans = PlanCache(cache / "plans") if cache else None
                self._runtime = kit.trt.Runtime(kit.logger)
                self.compiled = load_engine(kit, self._runtime, graph, key, plans, progress)
                self._check(kit)
            except BaseException:
                self._release()
                raise

    def _check(self, kit: Toolkit) -> None:
        modes, byte, real = kit.trt.TensorIOMode, kit.trt.uint8, kit.trt.float32
        expected = {FRAMES: (modes.INPUT, byte), SCORE: (modes.OUTPUT, real), HEATMAP: (modes.OUTPUT, byte)}
        names = [self.compiled.get_tensor_name(index) for index in range(self.compiled.num_io_tensors)]
        found = {name: (self.compiled.get_tensor_mode(name), self.compiled.get_tensor_dtype(name)) for name in names}
        if found != expected:  # shapes are known once a batch size is: every lane checks them
            msg = f"the graph's inputs and outputs are {found}, a bundle's are {expected}: build the bundle again"
            raise BuildError(msg)

    def make_lane(self) -> TensorRtLane:
        """Make one more lane, owned by the calling thread: it alone may use and close it.

        Raises:
            LaneFault: if the engine is closed or the device has no room for another lane.
        """
        with self._making:  # TensorRT does not promise that one engine makes two contexts at once
            if self.compiled is None:
                msg = "the engine is closed"
                raise LaneFault(msg)
            return TensorRtLane(self)

    def close(self) -> None:
        """Drop the compiled model; with the last engine and the last lane the device is let go."""
        if self.compiled is not None:
            with suppress(cuda.driver().Error), cuda.attached():
                self._release()

    def _release(self) -> None:
        self.compiled = self._runtime = None
        if self._hold is not None:
            self._hold.release()


class TensorRtLane:
    """One execution slot on the GPU.

    After any fault the lane is void: it answers every further call with a fault until it is closed.

    Args:
        engine: Whose lane this is.
    """

    frames: Pixels
    scores: NDArray[np.float32]
    heatmaps: Pixels

    def __init__(self, engine: TensorRtEngine) -> None:
        spec, output = engine.manifest.input, engine.manifest.output
        size = engine.max_batch
        self._owner = threading.current_thread()
        self._frame_shape = spec.shape
        self._count = 0
        self._running = False
        self._void = ""
        with cuda.raising(LaneFault, "CUDA, making a lane"), ExitStack() as stack:
            stack.enter_context(cuda.attached())
            self._stream = cuda.Stream()
            stack.callback(self._stream.close)
            self._done = cuda.Event()
            stack.callback(self._done.close)
            self._input = _mirror(stack, (size, *spec.shape), np.uint8)
            self._score = _mirror(stack, (size,), np.float32)
            self._heatmap = _mirror(stack, (size, output.height, output.width), np.uint8)
            self._execution = Execution(engine)
            stack.callback(self._execution.close)
            # Released first, that is. A device that never answers holds the thread here: its beat stops, and the
            # watchdog restarts the process. Freeing memory that a queued copy still writes to would be worse.
            stack.callback(self._stream.synchronize)
            self._prepare(size)
            self._resources: ExitStack | None = stack.pop_all()
        # Last, as these must not outlive the mirrors in the traceback of a failure above.
        self.frames, self.scores, self.heatmaps = self._input.host, self._score.host, self._heatmap.host
        self.frames.fill(0)
        self.heatmaps.fill(0)
        self.scores.fill(np.nan)

    def _prepare(self, size: int) -> None:
        """Bind the buffers for good and make sure that the largest results fit into them."""
        buffers = {FRAMES: self._input, SCORE: self._score, HEATMAP: self._heatmap}
        self._execution.bind({name: buffer.address for name, buffer in buffers.items()})
        self._execution.resize((size, *self._frame_shape), self._stream)
        self._execution.check_shapes({name: buffer.host.shape for name, buffer in buffers.items()})

    def submit(self, count: int) -> None:
        """Queue copy, inference and copy-back of the first ``count`` frames."""
        with self._voiding():
            if self._running:
                msg = "a batch was submitted before the last one was waited for"
                raise LaneFault(msg)
            self._count = 0
            self.scores.fill(np.nan)  # what is not overwritten is no result
            self._execution.resize((count, *self._frame_shape), self._stream)
            self._running = True
            self._input.upload(count, self._stream)
            self._execution.run(self._stream)
            self._score.download(count, self._stream)
            self._heatmap.download(count, self._stream)
            self._done.record(self._stream)
            self._count = count

    def ready(self) -> bool:
        """Whether the submitted batch is done."""
        with self._voiding():
            return self._count > 0 and self._done.done()

    def wait(self, timeout: float) -> None:
        """Wait for the batch, at most ``timeout`` seconds; raise :class:`LaneFault` if it failed."""
        with self._voiding():
            if not self._count:
                msg = "nothing was submitted"
                raise LaneFault(msg)
            self._await(timeout)
            self._running = False
            # A copy: a view in the fault's traceback would keep the pinned memory past the lane's end.
            check_scores(self.scores[: self._count].copy())

    def _await(self, timeout: float) -> None:
        # cuEventSynchronize, and so pycuda's Event.synchronize, takes no timeout: a hung kernel would hold this
        # thread, and the batch's parts, for ever. Hence the event is asked again and again until the deadline.
        deadline = time.monotonic() + timeout
        while not self._done.done():
            if time.monotonic() >= deadline:
                msg = f"no result after {timeout:.1f} s"
                raise LaneFault(msg)
            time.sleep(POLL_S)

    def close(self) -> None:
        """Wait for what still runs, then free everything and detach from the device.

        Raises:
            LaneFault: if called by another thread than the one that made the lane; nothing is freed then.
        """
        if self._resources is None:
            return
        if threading.current_thread() is not self._owner:
            msg = "a lane is closed by the thread that made it"
            raise LaneFault(msg)
        resources, self._resources = self._resources, None
        self._void = "the lane is closed"
        self.frames, self.heatmaps = self.frames[:0].copy(), self.heatmaps[:0].copy()
        self.scores = self.scores[:0].copy()
        with suppress(cuda.driver().Error):  # from a device that failed before; the rest is freed all the same
            resources.close()

    @contextmanager
    def _voiding(self) -> Iterator[None]:
        """Let every CUDA error come out as a fault, and no result come after a fault."""
        if self._void:
            raise LaneFault(self._void)
        try:
            with cuda.raising(LaneFault, "CUDA"):
                yield
        except LaneFault as error:
            self._void = f"the lane is void, as it failed before: {error}"
            raise


class Execution:
    """An ``IExecutionContext`` of which every answer is checked: TensorRT says False where others raise.

    Of the engine's optimisation profiles, the first takes every batch and each other one a single size, which it is
    faster for. Changing the profile forgets the input's shape, keeps the addresses, and makes TensorRT set its layers
    up anew at the next run (``setOptimizationProfileAsync`` in NvInferRuntime.h): it is changed only when it has to be.

    Args:
        engine: Whose execution this is.

    Raises:
        LaneFault: here and from every method, if TensorRT refuses.
    """

    def __init__(self, engine: TensorRtEngine) -> None:
        self._journal = toolkit().journal
        self._raw: Any = engine.compiled.create_execution_context()
        self._check(self._raw is not None, "an execution context")
        self._exact = {profile.best: number for number, profile in enumerate(engine.profiles) if number}
        self._profile: int | None = None

    def bind(self, addresses: dict[str, int]) -> None:
        """Tell where each input and output lies on the device."""
        for name, address in addresses.items():
            self._check(self._raw.set_tensor_address(name, address), f"the address of {name}")

    def resize(self, shape: tuple[int, ...], stream: cuda.Stream) -> None:
        """Say how large the next batch is, which ``stream`` will run; the last one has to be done."""
        profile = self._exact.get(shape[0], 0)
        if profile != self._profile:
            self._choose(profile, stream)
        self._check(self._raw.set_input_shape(FRAMES, shape), f"frames of shape {shape}")

    def _choose(self, profile: int, stream: cuda.Stream) -> None:
        with self._checking("the optimisation profile"):
            # May queue copies, which the lane's own stream orders before its next batch.
            accepted = self._raw.set_optimization_profile_async(profile, stream.handle)
        self._check(accepted, f"optimisation profile {profile}")
        self._profile = profile

    def check_shapes(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Make sure that every input and output has the shape that its buffer was made for."""
        with self._checking("the inputs' shapes"):
            missing = self._raw.infer_shapes()
        self._check(not missing, f"to infer shapes without {missing}")
        found = {name: tuple(self._raw.get_tensor_shape(name)) for name in expected}
        if found != expected:
            msg = f"the compiled shapes {found} are not the manifest's {expected}: build the bundle again"
            raise LaneFault(msg)

    def run(self, stream: cuda.Stream) -> None:
        """Queue the inference."""
        self._check(self._raw.execute_async_v3(stream.handle), "to run the batch")

    def close(self) -> None:
        """Free the context, once it no longer runs."""
        self._raw = None

    def _check(self, accepted: bool, what: str) -> None:
        if not accepted:
            msg = f"TensorRT refused {what}: {self._journal}"
            raise LaneFault(msg)

    @contextmanager
    def _checking(self, what: str) -> Iterator[None]:
        """For the few calls whose binding raises instead of saying False."""
        try:
            yield
        except RuntimeError as error:
            msg = f"TensorRT refused {what} ({error}): {self._journal}"
            raise LaneFault(msg) from error


def _mirror(stack: ExitStack, shape: tuple[int, ...], dtype: type[np.generic]) -> cuda.Mirror:
    mirror = cuda.Mirror(shape, dtype)
    stack.callback(mirror.close)
    return mirror


def _graph(bundle: Bundle, precision: str, cache: Path | None) -> Path:
    try:
        return graph_of(bundle, precision, cache or cache_folder())
    except PrecisionError as error:
        raise BuildError(str(error)) from error
