"""``pycuda.driver`` over a simulated GPU, as strict as the real one where strictness is what tests are for.

* Work is queued: copies and kernels take effect only once the stream is waited for or an event is found done.
* Whatever touches the GPU needs the context pushed in the calling thread.
* An object is freed when Python drops it, and leaks unless its own Context object is current there and then.
* A kernel that fails breaks the context: every later call repeats the error.

Names and signatures are those of pycuda; anything else is an AttributeError.
"""

from __future__ import annotations

import enum
import functools
import itertools
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class Error(Exception):
    """``pycuda.driver.Error``."""


class LogicError(Error):
    """``pycuda.driver.LogicError``: misuse, such as no current context."""


class LaunchError(Error):
    """``pycuda.driver.LaunchError``: a kernel failed."""


class CudaMemoryError(Error, MemoryError):
    """``pycuda.driver.MemoryError``."""


class CudaRuntimeError(Error):
    """``pycuda.driver.RuntimeError``, which is not Python's RuntimeError."""


class EventFlags(enum.IntEnum):
    DEFAULT = 0
    BLOCKING_SYNC = 1
    DISABLE_TIMING = 2


class HostAllocFlags:
    PORTABLE = 1
    DEVICEMAP = 2
    WRITECOMBINED = 4


def native(function: Callable[..., Any]) -> Callable[..., Any]:
    """Leave no arguments in an error's traceback: the real functions are compiled and have no frames in it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (Error, RuntimeError) as error:
            failure = error.with_traceback(None)
        args, kwargs = (), {}
        try:
            raise failure
        finally:
            del failure

    return call


class Gpu:
    """The state of the simulated GPU, and the knobs that tests turn.

    Attributes:
        calls: How often each function was called.
        log: Every copy and launch as ``(what, bytes or batch)``, in the order of queueing.
        live: Kind of every object that is not freed yet, by serial number.
        freed: ``(kind, thread)`` of every freed object, in order.
        strays: What must never happen: leaks, copies of freed memory and the like. Empty at the end of a test.
        failing: Error to raise, by the name of the function.
        polls: How many queries say "not yet" before a recorded event is done.
        hung: While set, no event is ever done, though a wait without timeout still comes back.
        broken: The error of the kernel that broke the context.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.log: list[tuple[str, int]] = []
        self.live: dict[int, str] = {}
        self.freed: list[tuple[str, int]] = []
        self.strays: list[str] = []
        self.failing: dict[str, Exception] = {}
        self.polls = 0
        self.hung = False
        self.broken: Error | None = None
        self.contexts: list[Context] = []
        self.detached: list[Context] = []
        self.pushed: list[Context] = []
        self.flags: dict[str, set[int]] = {}
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.queues: dict[int, deque[Callable[[], None]]] = {}
        self._numbers = itertools.count(1)
        self._local = threading.local()
        self._stacks: list[list[Context]] = []

    def number(self) -> int:
        """A number that was not used before."""
        return next(self._numbers)

    def stack(self) -> list[Context]:
        """The calling thread's context stack."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
            self._stacks.append(self._local.stack)
        return self._local.stack

    def current(self) -> Context | None:
        """The calling thread's current context."""
        return self.stack()[-1] if self.stack() else None

    def enter(self, name: str, *, needs_context: bool = True) -> None:
        """What every function begins with."""
        self.calls[name] += 1
        if needs_context and self.current() is None:
            msg = f"{name} failed: invalid device context"
            raise LogicError(msg)
        if name in self.failing:
            raise self.failing[name]
        if needs_context and self.broken is not None:
            raise type(self.broken)(f"{name} failed: {self.broken}")

    def drain(self, queue: deque[Callable[[], None]], until: Callable[[], bool] = lambda: False) -> None:
        """Run queued work, until ``until`` or the end."""
        while queue and not until():
            try:
                queue.popleft()()
            except Error as error:
                queue.clear()
                self.broken = error
                raise

    def residue(self) -> list[str]:
        """Everything that is left behind: nothing, after a test in which all was closed."""
        stacks = [f"a context still pushed {len(stack)} times" for stack in self._stacks if stack]
        kept = ["a context never given back" for context in self.contexts if context not in self.detached]
        return [*self.strays, *(f"{kind} never freed" for kind in self.live.values()), *stacks, *kept]


class Resource:
    """Something on the GPU, freed when dropped."""

    kind = ""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.context, self.serial, self.valid = gpu, gpu.current(), gpu.number(), True
        gpu.live[self.serial] = self.kind

    def release(self) -> None:
        """Free it, or leak it as pycuda does where its Context object is not current."""
        self.valid = False
        if self.gpu.current() is not self.context:
            self.gpu.strays.append(f"{self.kind} freed while its context was not current")
        del self.gpu.live[self.serial]
        self.gpu.freed.append((self.kind, threading.get_ident()))

    def __del__(self) -> None:
        if getattr(self, "valid", False):
            self.release()


class Context:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        gpu.contexts.append(self)

    def push(self) -> None:
        self._gpu.enter("push", needs_context=False)
        assert self not in self._gpu.detached, "pushed after it was given back"
        self._gpu.stack().append(self)
        self._gpu.pushed.append(self)

    def pop(self) -> None:
        self._gpu.enter("pop", needs_context=False)
        if not self._gpu.stack():
            raise LogicError("cannot pop context from empty stack")
        self._gpu.stack().pop()

    def detach(self) -> None:
        self._gpu.enter("detach", needs_context=False)
        if self in self._gpu.detached:
            raise LogicError("context::detach failed: cannot detach from invalid context")
        if self._gpu.current() is not self:
            self._gpu.strays.append("a context detached where it was not current, and so not given back")
        self._gpu.detached.append(self)
        self._gpu.stack().clear()  # what pycuda does; the driver's own stack keeps it until the thread ends


class Device:
    def __init__(self, gpu: Gpu, ordinal: int) -> None:
        gpu.enter("Device", needs_context=False)
        self._gpu, self.ordinal = gpu, ordinal

    def name(self) -> str:
        return "Simulated GPU"

    def compute_capability(self) -> tuple[int, int]:
        return 8, 9

    def retain_primary_context(self) -> Context:
        self._gpu.enter("retain_primary_context", needs_context=False)
        time.sleep(0.01)  # long enough for another thread to come in between, if it may
        return Context(self._gpu)


class Stream(Resource):
    kind = "stream"

    @native
    def __init__(self, gpu: Gpu, flags: int = 0) -> None:
        gpu.enter("Stream")
        super().__init__(gpu)
        gpu.flags.setdefault("Stream", set()).add(flags)
        self.handle = 0x5000 + self.serial
        gpu.queues[self.handle] = deque()

    @native
    def synchronize(self) -> None:
        self.gpu.enter("Stream.synchronize")
        self.gpu.drain(self.gpu.queues[self.handle])

    @native
    def is_done(self) -> bool:
        self.gpu.enter("Stream.is_done")
        return not self.gpu.queues[self.handle]

    def release(self) -> None:
        if self.gpu.queues.pop(self.handle):
            self.gpu.strays.append("stream freed with work in it")
        super().release()


class Event(Resource):
    kind = "event"

    @native
    def __init__(self, gpu: Gpu, flags: int = 0) -> None:
        gpu.enter("Event")
        super().__init__(gpu)
        gpu.flags.setdefault("Event", set()).add(flags)
        self._state = SimpleNamespace(recorded=0, completed=0, polls=0)
        self._handle = 0

    @native
    def record(self, stream: Stream | None = None) -> Event:
        self.gpu.enter("Event.record")
        assert stream is not None, "recorded on the default stream"
        state, self._handle = self._state, stream.handle
        state.recorded += 1
        state.polls = self.gpu.polls
        generation = state.recorded
        self.gpu.queues[stream.handle].append(lambda: setattr(state, "completed", generation))
        return self

    @native
    def query(self) -> bool:
        self.gpu.enter("Event.query")
        if self._state.recorded == self._state.completed:
            return True  # also where it was never recorded
        if self.gpu.hung:
            return False
        if self._state.polls:
            self._state.polls -= 1
            return False
        self._finish()
        return True

    @native
    def synchronize(self) -> Event:
        self.gpu.enter("Event.synchronize")
        self._finish()
        return self

    def _finish(self) -> None:
        state = self._state
        self.gpu.drain(self.gpu.queues[self._handle], lambda: state.completed == state.recorded)


class DeviceAllocation(Resource):
    kind = "device memory"

    def __init__(self, gpu: Gpu, size: int) -> None:
        super().__init__(gpu)
        self._address = 0x10_0000 * self.serial
        gpu.memory[self._address] = np.full(size, 0xAB, np.uint8)

    def __int__(self) -> int:
        return self._address

    @native
    def free(self) -> None:
        if not self.valid:
            raise LogicError("device_allocation::free failed: invalid resource handle")
        self.release()

    def release(self) -> None:
        del self.gpu.memory[self._address]
        super().release()


class PagelockedHostAllocation(Resource):
    kind = "pinned memory"

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: Any) -> None:
        super().__init__(gpu)
        self.block = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xCD, np.uint8)
        gpu.pinned[self.serial] = self.block
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(shape),
            "typestr": np.dtype(dtype).str,
            "data": (self.block.ctypes.data, False),
        }

    def release(self) -> None:
        del self.gpu.pinned[self.serial]
        super().release()


def _pinned_span(array: np.ndarray) -> tuple[int, int, int]:
    """Serial, offset and bytes of a contiguous part of page-locked memory."""
    assert array.flags.c_contiguous, "a copy of memory with gaps"
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, PagelockedHostAllocation), "an asynchronous copy of pageable memory"
    return base.serial, array.ctypes.data - base.block.ctypes.data, array.nbytes


class Driver(ModuleType):
    """The module ``pycuda.driver`` of one simulated GPU."""

    Error, LogicError, LaunchError = Error, LogicError, LaunchError
    MemoryError, RuntimeError = CudaMemoryError, CudaRuntimeError
    event_flags, host_alloc_flags = EventFlags, HostAllocFlags

    def __init__(self, gpu: Gpu) -> None:
        super().__init__("pycuda.driver")
        self._gpu = gpu
        self.Device = functools.partial(Device, gpu)
        self.Stream = functools.partial(Stream, gpu)
        self.Event = functools.partial(Event, gpu)

    @native
    def init(self, flags: int = 0) -> None:
        self._gpu.enter("init", needs_context=False)

    def get_driver_version(self) -> int:
        return 13000

    @native
    def mem_alloc(self, size: int) -> DeviceAllocation:
        self._gpu.enter("mem_alloc")
        return DeviceAllocation(self._gpu, size)

    @native
    def pagelocked_empty(self, shape: tuple[int, ...], dtype: Any, order: str = "C", mem_flags: int = 0) -> np.ndarray:
        self._gpu.enter("pagelocked_empty")
        self._gpu.flags.setdefault("pagelocked_empty", set()).add(mem_flags)
        return np.asarray(PagelockedHostAllocation(self._gpu, shape, dtype))

    @native
    def memcpy_htod_async(self, dest: DeviceAllocation, src: np.ndarray, stream: Stream | None = None) -> None:
        self._copy("memcpy_htod_async", dest, src, stream, to_device=True)

    @native
    def memcpy_dtoh_async(self, dest: np.ndarray, src: DeviceAllocation, stream: Stream | None = None) -> None:
        self._copy("memcpy_dtoh_async", src, dest, stream, to_device=False)

    def _copy(
        self, name: str, device: DeviceAllocation, host: np.ndarray, stream: Stream | None, *, to_device: bool
    ) -> None:
        gpu = self._gpu
        gpu.enter(name)
        assert stream is not None, "a copy on the default stream"
        serial, offset, size = _pinned_span(host)
        address = int(device)
        assert size <= len(gpu.memory[address]), "a copy past the end of the buffer"

        def copy() -> None:
            if serial not in gpu.pinned or address not in gpu.memory:
                gpu.strays.append(f"{name} of freed memory")
                return
            on_host, on_device = gpu.pinned[serial][offset : offset + size], gpu.memory[address][:size]
            if to_device:
                on_device[:] = on_host
            else:
                on_host[:] = on_device

        gpu.log.append((name, size))
        gpu.queues[stream.handle].append(copy)


def install(monkeypatch: Any) -> Gpu:
    """Let ``import pycuda.driver`` find a new simulated GPU until the test ends."""
    gpu = Gpu()
    package = ModuleType("pycuda")
    package.driver = Driver(gpu)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", package.driver)
    return gpu
