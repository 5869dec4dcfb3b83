"""The simulated driver as tests see it: load it, tell it how to behave, ask what happened.

Call :func:`load` before ``pycuda.driver`` is imported: pycuda then finds ``libcuda.so.1`` loaded, whatever the search
path is. The library is the process's for good, so what uses it belongs into a process of its own:
:func:`tests.sim.isolation.isolated`.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tests.sim.build import driver_library

LAUNCH_FAILED: Final = 719
OUT_OF_MEMORY: Final = 2
ECC_UNCORRECTABLE: Final = 214
HANG: Final = -1

Stage = Literal["run:htod", "run:dtoh", "run:dtod", "run:memset", "run:launch", "run:record", "run:wait"]
"""Queued work at the moment that its stream comes to it; everything else that can fail is a call, as "cuMemAlloc"."""

Range = tuple[int, int]
"""Address on the device and size in bytes."""

_Kernel = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class DriverError(Exception):
    """The simulated driver refused a call of this module.

    Attributes:
        code: The CUresult.
    """

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call}: CUDA error {code}")
        self.code = code


class Engine(IntEnum):
    """What takes turns on the device."""

    UPLOAD = 0
    DOWNLOAD = 1
    COMPUTE = 2


@dataclass(frozen=True)
class Counts:
    """What happened since the last reset, and what is alive now.

    Attributes:
        races: Pairs of conflicting accesses that no wait puts in order.
        violations: Touches by the host of pinned memory that a copy not yet waited for uses.
        hazards: Frees of memory with work on it that the host had not waited for.
        device: Allocations of device memory alive.
        pinned: Allocations of pinned memory alive.
        contexts: Contexts alive.
        pushed: Contexts on the stacks of all threads, as far as they are alive.
        streams: Streams alive.
        events: Events alive.
        device_bytes: Sum of the device allocations alive, in bytes.
    """

    races: int
    violations: int
    hazards: int
    device: int
    pinned: int
    contexts: int
    pushed: int
    streams: int
    events: int
    device_bytes: int

    def faults(self) -> dict[str, int]:
        """Every kind of missing wait that was seen."""
        return {name: getattr(self, name) for name in ("races", "violations", "hazards") if getattr(self, name)}

    def alive(self) -> dict[str, int]:
        """Everything that is not freed, the context aside, which is kept while an engine is open."""
        names = ("device", "pinned", "pushed", "streams", "events")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


@dataclass(frozen=True)
class Span:
    """A piece of work on the timeline.

    Attributes:
        engine: Where it ran.
        stream: Number of its stream.
        begin: In seconds, on the clock of ``time.monotonic``.
        end: In seconds.
        size: Bytes copied; 0 for a kernel.
    """

    engine: Engine
    stream: int
    begin: float
    end: float
    size: int


class _Counts(ctypes.Structure):
    _fields_ = [(f.name, ctypes.c_int64 if f.name == "device_bytes" else ctypes.c_int) for f in fields(Counts)]


class _Span(ctypes.Structure):
    _fields_ = [
        ("begin", ctypes.c_double),
        ("end", ctypes.c_double),
        ("size", ctypes.c_int64),
        ("engine", ctypes.c_int),
        ("stream", ctypes.c_int),
    ]


@functools.cache
def load() -> Simulator:
    """Load the simulated driver into this process, building it if need be; every call returns the same.

    Raises:
        Unavailable: if it cannot be built here.
    """
    return Simulator(ctypes.CDLL(str(driver_library()), ctypes.RTLD_GLOBAL))


class Simulator:
    """The one simulated driver of this process.

    Args:
        library: The library, loaded.

    Attributes:
        library: For calls of CUDA itself, by ctypes.
        errors: What kernels raised, oldest first, until the next :meth:`reset`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.errors: list[BaseException] = []
        self._kernels: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count(1)
        self._entry = _Kernel(self._run_kernel)  # one for all: a callback must not be freed while it runs
        self._room = 0
        library.simcuda_set.argtypes = [ctypes.c_char_p, ctypes.c_double]
        library.simcuda_report.restype = ctypes.c_char_p
        library.simcuda_inject.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
        library.simcuda_calls.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
        library.simcuda_trace.argtypes = [ctypes.c_size_t]
        library.simcuda_spans.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        library.simcuda_spans.restype = ctypes.c_size_t
        library.simcuda_store.argtypes = [ctypes.c_uint64, ctypes.c_size_t]
        library.simcuda_store.restype = ctypes.c_void_p
        pointer, count = ctypes.c_void_p, ctypes.c_int
        library.simcuda_launch.argtypes = [pointer, _Kernel, pointer, pointer, count, count]

    def configure(
        self,
        *,
        htod_us: float | None = None,
        dtoh_us: float | None = None,
        dtod_us: float | None = None,
        launch_us: float | None = None,
        gbps: float | None = None,
        jitter_us: float | None = None,
        seed: int | None = None,
        memory: int | None = None,
        devices: int | None = None,
        guard: bool | None = None,
        race: bool | None = None,
    ) -> None:
        """Change settings; what is not named stays.

        Args:
            htod_us: Time of every copy to the device on top of what it takes anyway, in microseconds.
            dtoh_us: The same from the device.
            dtod_us: The same within the device.
            launch_us: The same for kernels.
            gbps: Bandwidth of copies to and from the device in GB/s, on top of the above; 0 for no limit.
            jitter_us: Every copy and kernel takes up to this much longer, at random, in microseconds.
            seed: Of the jitter, for streams made from now on.
            memory: Size of the device memory in bytes.
            devices: How many devices there are; 0 for none.
            guard: Whether to count the host's touches of pinned memory in use. Applies to copies from now on.
            race: Whether to look for races.
        """
        given = {name: value for name, value in locals().items() if name != "self" and value is not None}
        for name, value in given.items():
            if self.library.simcuda_set(name.encode(), float(value)):
                msg = f"the library has no setting {name}"
                raise ValueError(msg)

    def reset(self) -> None:
        """Go back to the usual settings; let go what hangs; forget reports, faults, calls, injected errors, spans.

        A broken context is whole again. What is alive stays alive and counted.
        """
        self.library.simcuda_reset()
        self.errors.clear()

    def counts(self) -> Counts:
        """Return what happened since the last reset, and what is alive now."""
        raw = _Counts()
        self.library.simcuda_counts(ctypes.byref(raw))
        return Counts(**{field.name: getattr(raw, field.name) for field in fields(Counts)})

    def reports(self) -> list[str]:
        """Return a sentence for each race, violation and hazard, the first 64 of them."""
        texts = iter(self.library.simcuda_report(index) for index in itertools.count())
        return [text.decode() for text in itertools.takewhile(lambda text: text is not None, texts)]

    def calls(self) -> dict[str, int]:
        """Return how often each call was made, and each :data:`Stage` come to, since the last reset."""
        found: dict[str, int] = {}
        name = ctypes.c_char_p()
        for index in itertools.count():
            count = self.library.simcuda_calls(index, ctypes.byref(name))
            if count < 0:
                return {key: value for key, value in found.items() if value}
            found[(name.value or b"").decode()] = count
        raise AssertionError

    def fail(self, call: str, *, nth: int = 1, code: int = LAUNCH_FAILED, times: int = 1) -> None:
        """Let a call fail.

        Args:
            call: A call of the driver without its version, as "cuMemAlloc", or a :data:`Stage`; at a stage, the work
                does not run and the context is broken: every call on it fails from then on.
            nth: From which such call on, counted from now.
            code: The CUresult.
            times: How many calls in a row.
        """
        self._inject(call, nth, times, code)

    def hang(self, stage: Stage, *, nth: int = 1) -> None:
        """Let the ``nth`` such work from now hang until :meth:`release`: nothing after it on its stream is done."""
        if stage not in get_args(Stage):
            msg = f"{stage} is no stage; those that hang are {get_args(Stage)}"
            raise ValueError(msg)
        self._inject(stage, nth, 1, HANG)

    def _inject(self, name: str, nth: int, times: int, trouble: int) -> None:
        if not name.startswith("run:") and not any(hasattr(self.library, name + version) for version in ("", "_v2")):
            msg = f"the driver has no call {name}"
            raise ValueError(msg)
        self.library.simcuda_inject(name.encode(), nth, times, trouble)

    def hanging(self) -> int:
        """Return how many streams hang."""
        return int(self.library.simcuda_hanging())

    def wait_hanging(self, timeout: float = 10.0) -> None:
        """Wait until something hangs.

        Raises:
            TimeoutError: if nothing does within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not self.hanging():
            if time.monotonic() > deadline:
                msg = f"nothing hangs after {timeout:.0f} s"
                raise TimeoutError(msg)
            time.sleep(0.0005)

    def release(self) -> None:
        """Let everything that hangs go on, and call off the hangs that have not come yet."""
        self.library.simcuda_release()

    def trace(self, room: int = 100_000) -> None:
        """Begin a timeline of at most ``room`` spans; 0 ends it."""
        self.library.simcuda_trace(room)
        self._room = room

    def spans(self) -> list[Span]:
        """Return the timeline so far, in the order in which the work ended.

        Times are the simulated device's own: durations as set, plus what the work itself took. A host that is
        woken late sees the end of work later than it is here.
        """
        raw = (_Span * max(1, self._room))()
        count = self.library.simcuda_spans(ctypes.byref(raw), len(raw))
        return [Span(Engine(s.engine), s.stream, s.begin, s.end, s.size) for s in itertools.islice(raw, count)]

    def view(self, address: int, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Return device memory as an array, for kernels and for tests. It must not be used once the memory is freed.

        Raises:
            DriverError: if that is not all one allocation's memory.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        store = self.library.simcuda_store(address, size)
        if not store:
            raise DriverError("simcuda_store", 700)
        block: Any = (ctypes.c_char * size).from_address(store)
        return np.asarray(np.frombuffer(block, np.dtype(dtype)).reshape(shape))

    def launch(
        self, stream: int, kernel: Callable[[], None], *, reads: Sequence[Range] = (), writes: Sequence[Range] = ()
    ) -> None:
        """Queue a Python function as a kernel.

        It runs in the stream's thread and may make no CUDA calls. If it raises, the context is broken as by a failed
        kernel, and :attr:`errors` has the reason.

        Args:
            stream: The CUstream.
            kernel: What to do; uses :meth:`view`.
            reads: Device memory that it reads, for the race check.
            writes: Device memory that it writes.

        Raises:
            DriverError: if the driver refuses, as a real launch would be refused.
        """
        number = next(self._numbers)
        self._kernels[number] = kernel
        ranges = np.array([*reads, *writes], np.uint64).reshape(-1, 2)
        code = self.library.simcuda_launch(stream, self._entry, number, ranges.ctypes.data, len(reads), len(writes))
        if code:
            del self._kernels[number]
            raise DriverError("simcuda_launch", code)

    def _run_kernel(self, number: int) -> int:
        try:
            self._kernels.pop(number)()
        except BaseException as error:  # noqa: BLE001 - the stream's thread has nobody to raise it to
            self.errors.append(error)
            return 1
        return 0
