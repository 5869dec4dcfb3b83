"""``tensorrt`` over the simulated GPU: the part of the API that 10.12 and later and 11 share, and only its names.

The simulated network scores a frame with its mean, 0 to 1, and gives its first channel's corner as heatmap.
Like the real one it says False, or None, instead of raising, and explains itself to the logger alone.
"""

from __future__ import annotations

import enum
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tests.doubles.cuda_driver import Gpu, LaunchError, Resource, native


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    DEBUG = 2
    TF32 = 7


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    UINT8 = 5


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ILogger:
    """The base that a logger has to be made from, by name."""

    Severity = Severity

    def __init__(self) -> None:
        self._made = True


class IProgressMonitor:
    """The base that a monitor has to be made from, by name."""

    def __init__(self) -> None:
        self._made = True


@dataclass
class World:
    """The knobs that tests turn, and what the library was asked for.

    Attributes:
        frame: ``(H, W, C)`` of the network's input.
        heatmap: ``(h, w)`` of its output.
        parse_errors: What the parser complains of.
        unspecified: Inputs whose shapes TensorRT says it is missing.
        refuse: Functions that say no: with False, None or an exception, as the real ones do.
        score: What the network gives instead of the mean.
        crash: Error of the kernel.
        kinds: Type of each input and output.
        asked: Everything that the build was asked for.
        loggers: Every logger that was passed in.
        version: Of TensorRT; a plan loads in the version that built it, and no other.
        timings: Every timing cache that a build was given.
        builds: How many plans were built.
        runs: Batch size and optimisation profile of every run, as it was queued.
    """

    gpu: Gpu
    frame: tuple[int, int, int] = (4, 6, 3)
    heatmap: tuple[int, int] = (2, 3)
    parse_errors: list[str] = field(default_factory=list)
    unspecified: list[str] = field(default_factory=list)
    refuse: set[str] = field(default_factory=set)
    score: float | None = None
    crash: str = ""
    kinds: dict[str, DataType] = field(
        default_factory=lambda: {"frames": DataType.UINT8, "score": DataType.FLOAT, "heatmap": DataType.UINT8}
    )
    asked: dict[str, Any] = field(default_factory=dict)
    loggers: list[Any] = field(default_factory=list)
    version: str = "11.4.0"
    timings: list[bytes] = field(default_factory=list)
    builds: int = 0
    runs: list[tuple[int, int]] = field(default_factory=list)

    def complain(self, text: str, severity: Severity = Severity.ERROR) -> None:
        """Write to the logger, from a thread of TensorRT's own."""
        writer = threading.Thread(target=self.loggers[-1].log, args=(severity, text))
        writer.start()
        writer.join()

    def refuses(self, name: str) -> bool:
        """Whether a function is to say no; if so, the logger hears why."""
        if name in self.refuse:
            self.complain(f"{name}: simulated refusal")
        return name in self.refuse


def _accept(world: World, logger: Any) -> None:
    if not isinstance(logger, ILogger) or not hasattr(logger, "_made"):
        raise TypeError("incompatible constructor arguments: a logger made from ILogger is needed")
    world.loggers.append(logger)


class OptimizationProfile:
    __slots__ = ("_shapes",)

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[Any, ...]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:  # noqa: A002 - TensorRT's names
        if not all(a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
            raise RuntimeError("Shape provided for opt is inconsistent with other shapes.")
        self._shapes[input] = (tuple(min), tuple(opt), tuple(max))

    def get_shape(self, input: str) -> list[Any]:  # noqa: A002 - TensorRT's name
        return list(self._shapes[input])


class TimingCache:
    __slots__ = ("text",)

    def __init__(self, text: bytes) -> None:
        self.text = bytes(text)

    def serialize(self) -> memoryview:
        return memoryview(self.text)


class BuilderConfig:
    __slots__ = ("_flags", "_profiles", "_timings", "_world", "max_aux_streams", "progress_monitor")

    def __init__(self, world: World) -> None:
        self._world, self._flags, self._profiles = world, {BuilderFlag.TF32}, []
        self._timings: TimingCache | None = None
        self.max_aux_streams = -1
        self.progress_monitor: Any = None

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        return TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        known = cache.text in {b"", f"timings of {self._world.version}".encode()}
        self._timings = cache if known or ignore_mismatch else self._timings
        return known or ignore_mismatch

    def get_timing_cache(self) -> TimingCache | None:
        return self._timings

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def get_flag(self, flag: BuilderFlag) -> bool:
        return flag in self._flags

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        if self._world.refuses("add_optimization_profile"):
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1


class Builder:
    __slots__ = ("_world",)

    def __init__(self, world: World, logger: Any) -> None:
        _accept(world, logger)
        if world.refuses("Builder"):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._world = world

    def create_network(self, flags: int = 0) -> Any:
        self._world.asked["network_flags"] = flags
        return None if self._world.refuses("create_network") else object()

    def create_builder_config(self) -> BuilderConfig | None:
        return None if self._world.refuses("create_builder_config") else BuilderConfig(self._world)

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(self, network: Any, config: BuilderConfig) -> memoryview | None:
        world = self._world
        world.gpu.enter("build_serialized_network")
        world.asked["tf32"] = config.get_flag(BuilderFlag.TF32)
        world.asked["max_aux_streams"] = config.max_aux_streams
        world.asked["profiles"] = [profile.get_shape("frames") for profile in config._profiles]
        if config._timings is not None:
            world.timings.append(config._timings.text)
            config._timings.text = f"timings of {world.version}".encode()
        if world.refuses("build_serialized_network") or not _tell(config.progress_monitor):
            return None
        world.builds += 1
        return memoryview(f"plan of {world.version}".encode())


def _tell(monitor: Any) -> bool:
    """Report two steps of a phase, as the real builder does from its own thread; say whether to go on."""
    if monitor is None:
        return True
    assert isinstance(monitor, IProgressMonitor)
    assert hasattr(monitor, "_made")
    monitor.phase_start("Tactics", None, 2)
    going = monitor.step_complete("Tactics", 0) and monitor.step_complete("Tactics", 1)
    monitor.phase_finish("Tactics")
    return going


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser:
    __slots__ = ("_world",)

    def __init__(self, world: World, network: Any, logger: Any) -> None:
        _accept(world, logger)
        self._world = world

    def parse_from_file(self, model: str) -> bool:
        if not isinstance(model, str):
            raise TypeError("parse_from_file(): incompatible function arguments")
        self._world.asked["model"] = Path(model).read_bytes()
        if self._world.parse_errors:
            self._world.complain("parsing failed")
        return not self._world.parse_errors

    @property
    def num_errors(self) -> int:
        return len(self._world.parse_errors)

    def get_error(self, index: int) -> ParserError:
        return ParserError(self._world.parse_errors[index])


class ExecutionContext(Resource):
    kind = "execution context"

    def __init__(self, world: World) -> None:
        super().__init__(world.gpu)
        self._world = world
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] | None = None
        self._stream = self._profile = 0

    @native
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.gpu.calls["set_optimization_profile_async"] += 1
        assert stream_handle in self.gpu.queues, "no such stream"
        if self._world.refuses("set_optimization_profile_async"):
            raise RuntimeError("Error in set optimization profile async.")
        if not 0 <= profile_index < len(self._world.asked["profiles"]):
            return False
        assert not self.gpu.queues[stream_handle], "the profile is changed under a batch that is not done"
        self._stream, self._profile = stream_handle, profile_index
        self._shape = None  # of the last profile; addresses stay
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.gpu.calls["set_tensor_address"] += 1
        if not isinstance(memory, int):
            raise TypeError("set_tensor_address(): incompatible function arguments")
        if self._world.refuses("set_tensor_address") or name not in self._world.kinds:
            return False
        self._addresses[name] = memory
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._world.asked["profiles"][self._profile]
        fits = name == "frames" and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
        if self._world.refuses("set_input_shape") or not fits:
            return False
        self._shape = shape
        return True

    @native
    def infer_shapes(self) -> list[str]:
        if self._world.refuses("infer_shapes"):
            raise RuntimeError("infer_shapes error code: -1")
        return self._world.unspecified if self._shape else ["frames"]

    def get_tensor_shape(self, name: str) -> list[int]:
        count, *frame = self._shape or (-1, *self._world.frame)
        return [count, *{"frames": frame, "score": (), "heatmap": self._world.heatmap}[name]]

    @native
    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu, world = self.gpu, self._world
        complete = self._shape is not None and set(self._addresses) == set(world.kinds)
        if world.refuses("execute_async_v3") or not complete:
            return False
        gpu.enter("execute_async_v3")
        assert stream_handle == self._stream, "one context on two streams, or on the default stream"
        count, addresses = self._shape[0], dict(self._addresses)
        gpu.log.append(("execute_async_v3", count))
        world.runs.append((count, self._profile))
        gpu.queues[stream_handle].append(lambda: _run(world, count, addresses))
        return True


def _run(world: World, count: int, addresses: dict[str, int]) -> None:
    """What the kernel does, once the stream comes to it."""
    memory = world.gpu.memory
    if world.crash or not set(addresses.values()) <= set(memory):
        raise LaunchError(world.crash or "an illegal memory access was encountered")
    size = int(np.prod(world.frame))
    frames = memory[addresses["frames"]][: count * size].reshape(count, *world.frame)
    scores = (frames.reshape(count, -1).mean(1) / 255).astype(np.float32)
    if world.score is not None:
        scores[-1] = world.score
    height, width = world.heatmap
    corners = np.ascontiguousarray(frames[:, :height, :width, 0])
    memory[addresses["score"]][: scores.nbytes] = scores.view(np.uint8)
    memory[addresses["heatmap"]][: corners.size] = corners.reshape(-1)


class Engine(Resource):
    kind = "engine"

    def __init__(self, world: World) -> None:
        super().__init__(world.gpu)
        self._world = world

    @property
    def num_io_tensors(self) -> int:
        return len(self._world.kinds)

    def get_tensor_name(self, index: int) -> str:
        return list(self._world.kinds)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name == "frames" else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._world.kinds[name]

    def create_execution_context(self) -> ExecutionContext | None:
        self.gpu.enter("create_execution_context")
        return None if self._world.refuses("create_execution_context") else ExecutionContext(self._world)


class Runtime:
    __slots__ = ("_world",)

    def __init__(self, world: World, logger: Any) -> None:
        _accept(world, logger)
        self._world = world

    def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
        self._world.gpu.enter("deserialize_cuda_engine")
        foreign = bytes(plan) != f"plan of {self._world.version}".encode()
        if foreign:
            self._world.complain("the plan is of another version of TensorRT")
        return None if self._world.refuses("deserialize_cuda_engine") or foreign else Engine(self._world)


def install(monkeypatch: Any, gpu: Gpu) -> World:
    """Let ``import tensorrt`` find a new simulated library until the test ends."""
    world = World(gpu)
    module: Any = ModuleType("tensorrt")
    module.__version__, module.ILogger, module.IProgressMonitor = world.version, ILogger, IProgressMonitor
    module.NetworkDefinitionCreationFlag = NetworkDefinitionCreationFlag
    module.BuilderFlag, module.TensorIOMode, module.DataType = BuilderFlag, TensorIOMode, DataType
    module.float32, module.uint8 = DataType.FLOAT, DataType.UINT8
    module.Builder = lambda logger: Builder(world, logger)
    module.OnnxParser = lambda network, logger: OnnxParser(world, network, logger)
    module.Runtime = lambda logger: Runtime(world, logger)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return world
