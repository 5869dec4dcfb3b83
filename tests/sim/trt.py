"""``tensorrt`` on the simulated driver: its names, ONNX Runtime's numbers, and the caller's stream and memory.

An engine is an ONNX model. :meth:`IExecutionContext.execute_async_v3` queues its run on the stream that it is given,
where it reads and writes device memory like any kernel, with the ranges declared to the race check. Like the real
library it takes device memory of its own, for weights with an engine and for activations with a context, and says
False or None where others raise; the logger hears why.

:func:`install` puts it in place of the real one for the rest of the process, which has to be an isolated test's.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime

from tests.doubles.cuda_driver import native
from tests.doubles.trt import (
    BuilderFlag,
    DataType,
    ILogger,
    IProgressMonitor,
    NetworkDefinitionCreationFlag,
    ParserError,
    Severity,
    TensorIOMode,
)
from tests.doubles.trt import OptimizationProfile as IOptimizationProfile
from tests.sim.driver import DriverError, Range, Simulator, load
from tests.sim.programs import Calls

VERSION: Final = "11.4.0"
SCRATCH: Final = 1 << 16
"""Bytes of device memory that a context takes for its activations."""
TYPES: Final = {
    "tensor(uint8)": (DataType.UINT8, np.uint8),
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
}

Shape = tuple[int, ...]
Profile = dict[str, list[list[int]]]
"""Least, best and most shape of every input."""


class Library:
    """What the whole double shares, and the knobs that tests turn.

    Attributes:
        sim: The driver that it runs on.
        logger: The first logger that it was given: as the real library, it keeps to that one.
        refusals: How many of the next calls of each function are refused.
    """

    def __init__(self, sim: Simulator) -> None:
        self.sim = sim
        self.logger: Any = None
        self.refusals: Counter[str] = Counter()

    def accept(self, logger: Any) -> None:
        """Take a logger, which has to be made from the base class."""
        if not isinstance(logger, ILogger) or not hasattr(logger, "_made"):
            msg = "incompatible constructor arguments: a logger made from ILogger is needed"
            raise TypeError(msg)
        self.logger = self.logger or logger

    def complain(self, text: str) -> None:
        """Tell the logger why something is refused."""
        self.logger.log(Severity.ERROR, text)

    def refuses(self, name: str) -> bool:
        """Whether this call is to be refused; if so, the logger hears it."""
        if not self.refusals[name]:
            return False
        self.refusals[name] -= 1
        self.complain(f"{name}: simulated refusal")
        return True


class Memory:
    """Device memory of the library's own; freed as a GPU's is: never while work on it is queued, or it is reported."""

    def __init__(self, sim: Simulator, size: int) -> None:
        self._call, self.size = Calls(sim), size
        self.address = self._call.made("cuMemAlloc_v2", ctypes.c_size_t(size))

    @property
    def range(self) -> Range:
        """All of it."""
        return self.address, self.size

    def __del__(self) -> None:
        if hasattr(self, "address"):  # where it fails it is leaked, and counted as alive
            with suppress(DriverError):
                self._call("cuMemFree_v2", ctypes.c_void_p(self.address))


class IHostMemory(bytes):
    """A plan."""


class ITimingCache:
    """What builds have measured."""

    def __init__(self, text: bytes) -> None:
        self._text = bytes(text)

    def serialize(self) -> memoryview:
        return memoryview(self._text)


class IBuilderConfig:
    """How to build."""

    def __init__(self) -> None:
        self.max_aux_streams = -1
        self.progress_monitor: Any = None
        self._flags = {BuilderFlag.TF32}
        self._profiles: list[IOptimizationProfile] = []
        self._timings: ITimingCache | None = None

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache or VERSION.encode())

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        fits = ignore_mismatch or bytes(cache.serialize()) == VERSION.encode()
        self._timings = cache if fits else None
        return fits

    def get_timing_cache(self) -> ITimingCache | None:
        return self._timings

    def clear_flag(self, flag: BuilderFlag) -> None:
        self._flags.discard(flag)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1


class INetworkDefinition:
    """A graph, once a parser has read one."""

    def __init__(self, *, strongly_typed: bool) -> None:
        self._strongly_typed = strongly_typed
        self._graph = b""


class Builder:
    """Makes plans, which are the graph and its profiles."""

    def __init__(self, library: Library, logger: Any) -> None:
        library.accept(logger)
        self._library = library

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return INetworkDefinition(strongly_typed=bool(flags >> NetworkDefinitionCreationFlag.STRONGLY_TYPED & 1))

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        session = _session(network._graph)
        names = [port.name for port in session.get_inputs()]
        try:
            profiles = [{name: profile.get_shape(name) for name in names} for profile in config._profiles]
        except KeyError:
            profiles = []
        if not profiles or not network._strongly_typed:
            self._library.complain("dynamic inputs without an optimization profile, or a weakly typed network")
            return None
        if not _tell(config.progress_monitor):
            self._library.complain("the build was cancelled")
            return None
        header = json.dumps({"version": VERSION, "profiles": profiles}).encode()
        return IHostMemory(header + b"\n" + network._graph)


def _tell(monitor: Any) -> bool:
    """Report a phase of one step; say whether to go on."""
    if monitor is None:
        return True
    monitor.phase_start("Building", None, 1)
    going = bool(monitor.step_complete("Building", 0))
    monitor.phase_finish("Building")
    return going


class OnnxParser:
    """Reads a graph, and checks it as ONNX and ONNX Runtime do."""

    def __init__(self, library: Library, network: INetworkDefinition, logger: Any) -> None:
        library.accept(logger)
        self._network = network
        self._errors: list[ParserError] = []

    def parse_from_file(self, model: str) -> bool:
        graph = Path(model).read_bytes()
        try:
            onnx.checker.check_model(graph)
            ports = _session(graph)
            unknown = {port.type for port in (*ports.get_inputs(), *ports.get_outputs())} - set(TYPES)
            if unknown:
                self._errors.append(ParserError(f"types {unknown} are not supported"))
        except Exception as error:  # noqa: BLE001 - a family of their own without a common base
            self._errors.append(ParserError(str(error)))
        self._network._graph = graph
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class Runtime:
    """Loads plans, of its own version alone."""

    def __init__(self, library: Library, logger: Any) -> None:
        library.accept(logger)
        self._library = library

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        header, _, graph = bytes(serialized_engine).partition(b"\n")
        found = json.loads(header)
        if found["version"] != VERSION:
            self._library.complain(f"the plan is of version {found['version']}")
            return None
        try:
            return ICudaEngine(self._library, graph, found["profiles"])
        except DriverError as error:
            self._library.complain(str(error))
            return None


class ICudaEngine:
    """A model, and device memory for its weights."""

    def __init__(self, library: Library, graph: bytes, profiles: list[Profile]) -> None:
        self._library, self._profiles = library, profiles
        self._session = _session(graph)
        self._inputs = {port.name: port for port in self._session.get_inputs()}
        self._outputs = {port.name: port for port in self._session.get_outputs()}
        self._ports = {**self._inputs, **self._outputs}
        self._weights = Memory(library.sim, len(graph))

    @property
    def num_io_tensors(self) -> int:
        return len(self._ports)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self._ports)[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[self._ports[name].type][0]

    def create_execution_context(self) -> IExecutionContext | None:
        if self._library.refuses("create_execution_context"):
            return None
        try:
            return IExecutionContext(self)
        except DriverError as error:
            self._library.complain(f"no memory for activations: {error}")
            return None


class IExecutionContext:
    """A run of an engine: one at a time, as its activations are in memory of the context's own."""

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._library = engine, engine._library
        self._scratch = Memory(engine._library.sim, SCRATCH)
        self._profile: Profile | None = None
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}

    @native
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if self._library.refuses("set_optimization_profile_async"):
            msg = "Error in set optimization profile async."
            raise RuntimeError(msg)
        if not 0 <= profile_index < len(self._engine._profiles):
            return False
        try:  # the real one may queue copies into its own memory
            self._library.sim.launch(stream_handle, lambda: None, writes=[self._scratch.range])
        except DriverError as error:
            self._library.complain(str(error))
            return False
        self._profile = self._engine._profiles[profile_index]
        self._shapes.clear()  # of the last profile; addresses stay
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._library.refuses("set_tensor_address") or name not in self._engine._ports:
            return False
        self._addresses[name] = int(memory)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._library.refuses("set_input_shape") or self._profile is None or name not in self._profile:
            return False
        low, _, high = self._profile[name]
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self._library.complain(f"shape {shape} of {name} is not within {low} to {high}")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        if name in self._shapes:
            return self._shapes[name]
        batch = next(iter(self._shapes.values()), (-1,))[0]
        return tuple(size if isinstance(size, int) else batch for size in self._engine._ports[name].shape)

    @native
    def infer_shapes(self) -> list[str]:
        if self._library.refuses("infer_shapes"):
            msg = "infer_shapes error code: -1"
            raise RuntimeError(msg)
        return self._unshaped()

    def _unshaped(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._shapes]

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, library = self._engine, self._library
        homeless = [name for name in engine._ports if name not in self._addresses]
        if library.refuses("execute_async_v3"):
            return False
        if homeless or self._unshaped():
            library.complain(f"no address of {homeless}, no shape of {self._unshaped()}")
            return False
        run = _Run(library.sim, engine, dict(self._addresses), {n: self.get_tensor_shape(n) for n in engine._ports})
        reads, writes = [engine._weights.range], [self._scratch.range]
        reads += [run.range(name) for name in engine._inputs]
        writes += [run.range(name) for name in engine._outputs]
        try:
            library.sim.launch(stream_handle, run, reads=reads, writes=writes)
        except DriverError as error:
            library.complain(f"cannot launch: {error}")
            return False
        return True


class _Run:
    """One queued run, with addresses and shapes as they were when it was queued."""

    def __init__(
        self, sim: Simulator, engine: ICudaEngine, addresses: dict[str, int], shapes: dict[str, Shape]
    ) -> None:
        self._sim, self._addresses, self._shapes = sim, addresses, shapes
        # Not the engine: a queued kernel keeps no engine alive.
        self._session, self._inputs, self._outputs = engine._session, list(engine._inputs), list(engine._outputs)
        self._types = {name: TYPES[port.type][1] for name, port in engine._ports.items()}

    def range(self, name: str) -> Range:
        """The device memory of a tensor."""
        return self._addresses[name], int(np.prod(self._shapes[name])) * np.dtype(self._types[name]).itemsize

    def __call__(self) -> None:
        """What the kernel does, in the stream's thread."""
        results = self._session.run(self._outputs, {name: self._view(name) for name in self._inputs})
        for name, result in zip(self._outputs, results, strict=True):
            view = self._view(name)
            assert view.shape == result.shape, f"{name} is {result.shape}, not {view.shape}"
            view[...] = result

    def _view(self, name: str) -> np.ndarray:
        return self._sim.view(self._addresses[name], self._shapes[name], self._types[name])


def _session(graph: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


CLASSES: Final = (
    *(Builder, IBuilderConfig, ICudaEngine, IExecutionContext, IHostMemory, ILogger, INetworkDefinition),
    *(IOptimizationProfile, IProgressMonitor, ITimingCache, OnnxParser, ParserError, Runtime),
)
"""The classes that stand in for real ones. Shared ones from :mod:`tests.doubles.trt` lack the I of the real name."""


def real_name(double: type) -> str:
    """What the real library calls a class."""
    return "IOptimizationProfile" if double is IOptimizationProfile else double.__name__


def install() -> Library:
    """Let ``import tensorrt`` find the double in this process; each call gives a new one."""
    library = Library(load())
    module: Any = ModuleType("tensorrt")
    module.__version__ = VERSION
    for double in CLASSES:
        setattr(module, real_name(double), double)
    module.NetworkDefinitionCreationFlag, module.BuilderFlag = NetworkDefinitionCreationFlag, BuilderFlag
    module.TensorIOMode, module.DataType = TensorIOMode, DataType
    module.float32, module.uint8 = DataType.FLOAT, DataType.UINT8
    module.Builder = lambda logger: Builder(library, logger)
    module.OnnxParser = lambda network, logger: OnnxParser(library, network, logger)
    module.Runtime = lambda logger: Runtime(library, logger)
    sys.modules["tensorrt"] = module
    return library
