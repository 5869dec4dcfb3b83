"""From an ONNX graph to a TensorRT plan, strongly typed; built on the box that runs it, and kept for the next start.

Precision lies in the graph (:mod:`engines.precision`), never in a flag of the builder. A plan is executable code for
one version of TensorRT, one GPU and one driver: it is kept under all that it depends on, in a folder that only this
user may write to, and built anew where it does not load.

Written for the API that TensorRT 10.12 and later and 11 have in common; NOT yet run on real GPU hardware.
"""

from __future__ import annotations

import functools
import importlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from engines import cuda
from engines.build import BuildError, Progress
from engines.precision import write_atomically

FRAMES: Final = "frames"
FLAGS: Final = ("strongly-typed", "no-tf32", "no-aux-streams")
"""What a plan is always built with."""

Shape = tuple[int, int, int]

log = structlog.get_logger(__name__)
_preparing: Final = threading.Lock()


class Journal:
    """The last warnings and errors that TensorRT has logged."""

    def __init__(self) -> None:
        self._lines: tuple[str, ...] = ()

    def add(self, severity: str, text: str) -> None:
        """Keep a message if it matters. Called from whichever thread TensorRT runs."""
        if severity in {"INTERNAL_ERROR", "ERROR", "WARNING"}:
            # Replaced as a whole: readers need no lock, which a message from inside a reader could deadlock on.
            self._lines = (*self._lines, f"{severity}: {text}")[-20:]

    def clear(self) -> None:
        """Forget everything."""
        self._lines = ()

    def __str__(self) -> str:
        return "; ".join(self._lines) or "nothing logged"


@dataclass(frozen=True)
class Toolkit:
    """TensorRT and the process's one logger: TensorRT keeps the first that it is given and ignores others."""

    trt: Any
    logger: Any
    journal: Journal


def toolkit() -> Toolkit:
    """Return the process's TensorRT; raise :class:`BuildError` if it is not installed."""
    with _preparing:  # as a cache alone may call twice at once
        return _toolkit()


@functools.cache
def _toolkit() -> Toolkit:
    try:
        trt = importlib.import_module("tensorrt")
    except ImportError as error:
        msg = f"TensorRT engines need the tensorrt package ({error}): pip install 'dmdd-line[tensorrt]'"
        raise BuildError(msg) from error
    return kit_of(trt)


def kit_of(trt: Any) -> Toolkit:
    """A toolkit of any library with TensorRT's API, with a logger of its own."""
    journal = Journal()

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants the base named, not super()

        def log(self, severity: Any, msg: str) -> None:
            journal.add(severity.name, msg)

    return Toolkit(trt, Logger(), journal)


class Profile(msgspec.Struct, frozen=True):
    """Batch sizes that one optimisation profile takes, and the one that it is fastest for."""

    least: int
    best: int
    most: int


def profiles_for(max_batch: int, exact: tuple[int, ...] = ()) -> tuple[Profile, ...]:
    """One profile for any batch up to ``max_batch``, fastest when full, then one for each batch size in ``exact``.

    Sizes that no batch has are left out, as is a second profile for batches of one alone.
    """
    first = Profile(1, max_batch, max_batch)
    sizes = (Profile(size, size, size) for size in dict.fromkeys(exact) if size <= max_batch)
    return (first, *(profile for profile in sizes if profile != first))


class PlanKey(msgspec.Struct, frozen=True):
    """All that a plan depends on.

    Attributes:
        graph: SHA-256 of the ONNX file.
        tensorrt: Version of TensorRT.
        gpu: Name of the GPU.
        capability: Its compute capability, as ``8.9``.
        driver: CUDA version of the driver.
        precision: Of the graph, in words.
        frame: ``(H, W, C)``.
        profiles: Optimisation profiles in order.
        flags: :data:`FLAGS`.
    """

    graph: str
    tensorrt: str
    gpu: str
    capability: str
    driver: str
    precision: str
    frame: Shape
    profiles: tuple[Profile, ...]
    flags: tuple[str, ...] = FLAGS

    @property
    def name(self) -> str:
        """The name of the plan's files."""
        return sha256(msgspec.json.encode(self)).hexdigest()[:32]

    @property
    def timing(self) -> str:
        """The name of the timing cache, which graphs of one box share."""
        return sha256("/".join((self.tensorrt, self.gpu, self.capability, self.driver)).encode()).hexdigest()[:32]


class PlanRecord(msgspec.Struct, frozen=True):
    """What stands beside a kept plan: what it was built for, and its SHA-256."""

    key: PlanKey
    sha256: str


def key_of(kit: Toolkit, graph: Path, precision: str, frame: Shape, profiles: tuple[Profile, ...]) -> PlanKey:
    """What a plan for this box's GPU depends on."""
    driver = cuda.driver()
    device = driver.Device(0)
    capability = ".".join(map(str, device.compute_capability()))
    digest = sha256(graph.read_bytes()).hexdigest()
    version = str(kit.trt.__version__)
    return PlanKey(
        digest, version, device.name(), capability, str(driver.get_driver_version()), precision, frame, profiles
    )


class PlanCache:
    """Plans and timing caches in a folder of this user's own.

    Args:
        folder: Made if it is missing.

    Raises:
        BuildError: if others may write to the folder: a plan is code that the GPU's driver runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
        if state.st_uid != os.geteuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            msg = f"{folder}: other users may write to it, and plans are code: chown it to the line's user, chmod 700"
            raise BuildError(msg)

    def load(self, key: PlanKey) -> bytes | None:
        """The kept plan, or None if there is none, or it is not the file that was recorded."""
        path = self.folder / f"{key.name}.plan"
        try:
            record = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=PlanRecord)
            plan = path.read_bytes()
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("plan_unreadable", plan=str(path), reason=str(error))
            return None
        if record != PlanRecord(key, sha256(plan).hexdigest()):
            log.warning("plan_altered", plan=str(path), reason="not the file that was recorded; it is built anew")
            return None
        return plan

    def keep(self, key: PlanKey, plan: bytes) -> None:
        """Keep a plan that has been loaded."""
        path = self.folder / f"{key.name}.plan"
        write_atomically(path, plan)
        record = msgspec.json.encode(PlanRecord(key, sha256(plan).hexdigest()))
        write_atomically(path.with_suffix(".json"), msgspec.json.format(record) + b"\n")

    def timings(self, key: PlanKey) -> bytes:
        """What earlier builds on this box have measured; empty if there is nothing."""
        try:
            return (self.folder / f"{key.timing}.timings").read_bytes()
        except FileNotFoundError:
            return b""

    def keep_timings(self, key: PlanKey, timings: bytes) -> None:
        """Keep what a build has measured."""
        write_atomically(self.folder / f"{key.timing}.timings", timings)


def load_engine(
    kit: Toolkit, runtime: Any, graph: Path, key: PlanKey, cache: PlanCache | None, progress: Progress | None = None
) -> Any:
    """Load the kept plan of ``key``; where there is none or it does not load, build it, load it and keep it.

    Args:
        kit: TensorRT.
        runtime: An ``IRuntime``, which has to outlive the engine.
        graph: The ONNX file.
        key: What the plan depends on.
        cache: Where plans are kept; None to build anew.
        progress: Told how far a build is.

    Returns:
        An ``ICudaEngine``.

    Raises:
        BuildError: if the graph cannot be compiled, or the new plan does not load.
    """
    kept = cache.load(key) if cache is not None else None
    if kept is not None:
        engine = runtime.deserialize_cuda_engine(kept)
        if engine is not None:
            return engine
        log.warning("plan_rebuilt", plan=key.name, gpu=key.gpu, tensorrt=key.tensorrt, reason=str(kit.journal))
    plan = build_plan(kit, graph, key, cache, progress)
    engine = runtime.deserialize_cuda_engine(plan)
    require(engine is not None, "cannot load the plan that it has just built", kit.journal)
    if cache is not None:
        cache.keep(key, bytes(plan))
    return engine


def build_plan(
    kit: Toolkit,
    graph: Path,
    key: PlanKey,
    cache: PlanCache | None = None,
    progress: Progress | None = None,
    configure: Callable[[Any], None] | None = None,
) -> Any:
    """Compile a graph for the profiles of ``key``; return the plan's buffer.

    Args:
        kit: TensorRT.
        graph: The ONNX file.
        key: What is built.
        cache: Where timings are kept.
        progress: Told how far the build is; what it raises ends the build and is raised here.
        configure: Gets the ``IBuilderConfig`` before the build, to name another GPU than this box's.

    Raises:
        BuildError: with TensorRT's reasons, if the graph cannot be compiled.
    """
    trt, journal = kit.trt, kit.journal
    journal.clear()
    builder = trt.Builder(kit.logger)
    # Version 11 knows no other kind of network; 10 has to be told.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    require(network is not None, "cannot make a network", journal)
    _parse(kit, network, graph)
    config = builder.create_builder_config()
    require(config is not None, "cannot make a configuration", journal)
    config.max_aux_streams = 0  # lanes run side by side already; further streams would only blur the latency
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and not the precision that was validated
    for profile in key.profiles:
        _add_profile(builder, config, key.frame, profile, journal)
    if configure is not None:
        configure(config)
    with _timed(config, key, cache), _watched(kit, config, progress):
        plan = builder.build_serialized_network(network, config)
    require(plan is not None, f"cannot compile {graph}", journal)
    return plan


def _add_profile(builder: Any, config: Any, frame: Shape, profile: Profile, journal: Journal) -> None:
    added = builder.create_optimization_profile()
    added.set_shape(FRAMES, (profile.least, *frame), (profile.best, *frame), (profile.most, *frame))
    sizes = f"batches of {profile.least} to {profile.most}"
    require(config.add_optimization_profile(added) >= 0, f"refuses {sizes}", journal)


def _parse(kit: Toolkit, network: Any, graph: Path) -> None:
    parser = kit.trt.OnnxParser(network, kit.logger)
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
        msg = f"TensorRT cannot read {graph}: {errors or 'no reason given'}. Its log: {kit.journal}"
        raise BuildError(msg)


@contextmanager
def _timed(config: Any, key: PlanKey, cache: PlanCache | None) -> Iterator[None]:
    """Build with what earlier builds have measured, and keep what this one measures."""
    if cache is None:
        yield
        return
    timings = config.create_timing_cache(cache.timings(key))
    if timings is None or not config.set_timing_cache(timings, False):
        log.warning("timings_refused", reason="of another TensorRT or GPU; measured anew")
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    yield
    measured = config.get_timing_cache()
    if measured is not None:
        cache.keep_timings(key, bytes(measured.serialize()))


@contextmanager
def _watched(kit: Toolkit, config: Any, progress: Progress | None) -> Iterator[None]:
    """Tell ``progress`` how far the build is; what it raises ends the build, and is raised after it."""
    if progress is None:
        yield
        return
    monitor = _monitor(kit.trt, progress)
    config.progress_monitor = monitor
    yield
    if monitor.raised is not None:
        raise monitor.raised


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.raised: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._tell(phase_name, step + 1)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._steps.pop(phase_name, 0))

        def _tell(self, phase: str, done: int) -> bool:
            try:
                progress(phase, done, self._steps.get(phase, done))
            except BaseException as error:  # noqa: BLE001 - must not pass through TensorRT; raised after the build
                self.raised = self.raised or error
            return self.raised is None

    return Monitor()


def require(met: bool, complaint: str, journal: Journal) -> None:
    """Raise a BuildError with TensorRT's log unless ``met``."""
    if not met:
        msg = f"TensorRT {complaint}. Its log: {journal}"
        raise BuildError(msg)


@contextmanager
def explaining(journal: Journal) -> Iterator[None]:
    """Let what TensorRT's bindings raise come out as a BuildError with the log beside it."""
    try:
        yield
    except BuildError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # TypeError: the native object could not be made
        msg = f"TensorRT: {error}. Its log: {journal}"
        raise BuildError(msg) from error
