"""The only module that knows pycuda: one primary context a process, streams, events and mirrored buffers.

Three rules of pycuda decide the shape of everything here:

* A context is current per thread: whoever uses a GPU object has :func:`attached` first.
* Objects are freed when Python drops them, and only while the very Context *object* that they were made under is
  current; otherwise pycuda warns and leaks. So there is one such object for all threads, and every wrapper below
  has a ``close`` that drops the last reference in its owner's thread, before the context is popped.
* An exception's traceback keeps the local variables of every frame that it has passed. So raw objects live in the
  wrappers' attributes alone, where ``close`` reaches them, and never in a local variable or an argument: a lane is
  closed while the fault that ended it is still being handled.

The context is kept for as long as an engine or a thread needs it, and given back by the last one. pycuda would do so
only at the process's end, by a call that is wrong for a primary context, and complain.

The engine runs on the first visible device; ``CUDA_VISIBLE_DEVICES`` chooses another. ``pycuda.autoinit`` is never
used: it makes a second context, which TensorRT does not see.

Written from pycuda's source and tested against a simulated driver; NOT yet run on real GPU hardware.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engines.build import BuildError

NON_BLOCKING: Final = 1
"""CU_STREAM_NON_BLOCKING, which pycuda does not name: never waits for the default stream."""


def driver() -> Any:
    """Return ``pycuda.driver``.

    Raises:
        BuildError: if pycuda or NVIDIA's driver library is missing.
    """
    try:
        return importlib.import_module("pycuda.driver")
    except ImportError as error:
        msg = (
            f"TensorRT engines need pycuda and NVIDIA's driver ({error}): check that nvidia-smi works, then"
            " pip install 'dmdd-line[tensorrt]'"
        )
        raise BuildError(msg) from error


class Primary:
    """The process's one Context object of the device's primary context, and how many need it."""

    def __init__(self) -> None:
        # Of one lock: to pycuda two objects are two contexts, so nobody may retain while another does, or gives back.
        self._lock = threading.Lock()
        self._context: Any = None
        self._users = 0

    def take(self) -> Any:
        """Return the Context object, which is kept until :meth:`give`; retaining it does not push it.

        Raises:
            BuildError: if there is no pycuda, no driver or no device.
        """
        with self._lock:
            if self._context is None:
                self._context = _retain()
            self._users += 1
            return self._context

    def give(self) -> None:
        """Need it no more; whoever is the last gives it back to the driver."""
        with self._lock:
            self._users -= 1
            if not self._users:
                context, self._context = self._context, None
                _detach(context)


_primary = Primary()


class Hold:
    """Keeps the primary context while no thread has it pushed: what an engine needs between its lanes."""

    def __init__(self) -> None:
        self._primary: Primary | None = _primary
        self._primary.take()

    def release(self) -> None:
        """Let it go: at once if nobody else needs it, else when the last one that does is done.

        A thread that is stuck on the device needs it. Called again, it does nothing.
        """
        primary, self._primary = self._primary, None
        if primary is not None:
            primary.give()


def _retain() -> Any:
    cuda = driver()
    try:
        cuda.init()
        return cuda.Device(0).retain_primary_context()
    except cuda.Error as error:
        msg = (
            f"no usable NVIDIA GPU ({error}): check that nvidia-smi lists one, or run this engine with target openvino"
        )
        raise BuildError(msg) from error


def _detach(context: Any) -> None:
    """Give a context back that no thread has pushed.

    pycuda does so only where it is current, and leaves it on the driver's stack of that thread, from which a primary
    context is never popped by itself. So a thread of its own does it, and takes its stack with it.
    """

    def work() -> None:
        with suppress(driver().Error):  # a device that is lost: pycuda then forgets the context and releases nothing
            context.push()
        context.detach()

    thread = threading.Thread(target=work, name="cuda-release")
    thread.start()
    thread.join()


@contextmanager
def attached() -> Iterator[None]:
    """Make the primary context current in the calling thread until the block ends.

    Raises:
        BuildError: if there is no pycuda, no driver or no device.
    """
    primary = _primary
    context = primary.take()
    try:
        context.push()
    except BaseException:
        primary.give()
        raise
    try:
        yield
    finally:
        context.pop()
        primary.give()  # not where the pop has failed: this thread has it still


@contextmanager
def raising(kind: type[Exception], doing: str) -> Iterator[None]:
    """Let every CUDA error of the block come out as a ``kind``."""
    cuda_error = driver().Error
    try:
        yield
    except cuda_error as error:
        msg = f"{doing}: {error}"
        raise kind(msg) from error


class Stream:
    """A queue of work on the device, in order within itself and independent of all others."""

    def __init__(self) -> None:
        self.raw: Any = driver().Stream(flags=NON_BLOCKING)

    @property
    def handle(self) -> int:
        """The CUstream, as other libraries take it."""
        return int(self.raw.handle)

    def synchronize(self) -> None:
        """Wait until the queue is empty, however long that takes."""
        self.raw.synchronize()

    def close(self) -> None:
        """Free the stream."""
        self.raw = None


class Event:
    """Tells when a stream has come to a point.

    Timing is off, which makes it cheap; a thread that synchronises with it sleeps instead of spinning.
    """

    def __init__(self) -> None:
        flags = driver().event_flags
        self._raw: Any = driver().Event(int(flags.DISABLE_TIMING) | int(flags.BLOCKING_SYNC))

    def record(self, stream: Stream) -> None:
        """Mark the stream's end as it is now."""
        self._raw.record(stream.raw)

    def done(self) -> bool:
        """Whether the stream has come to the recorded point. An event that was never recorded says yes."""
        return bool(self._raw.query())

    def close(self) -> None:
        """Free the event."""
        self._raw = None


class Mirror:
    """A page-locked host array and a device buffer of the same size.

    Copies of pageable memory would block the caller; this memory is locked, in every context.

    Args:
        shape: The first dimension is the one that copies are limited in.
        dtype: Type of an element.

    Attributes:
        host: The array. Views of it keep its memory: one that outlives :meth:`close` is never left dangling, but
            its memory is then leaked rather than freed.
    """

    host: NDArray[Any]

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._driver = driver()
        self._device: Any = None
        self.host = self._driver.pagelocked_empty(shape, dtype, mem_flags=self._driver.host_alloc_flags.PORTABLE)
        try:
            self._device = self._driver.mem_alloc(self.host.nbytes)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> int:
        """Where the buffer is on the device."""
        return int(self._device)

    def upload(self, count: int, stream: Stream) -> None:
        """Queue the copy of the first ``count`` items to the device."""
        self._driver.memcpy_htod_async(self._device, self.host[:count], stream.raw)

    def download(self, count: int, stream: Stream) -> None:
        """Queue the copy of the first ``count`` items from the device."""
        self._driver.memcpy_dtoh_async(self.host[:count], self._device, stream.raw)

    def close(self) -> None:
        """Free both, once no copy is queued any more."""
        self.host = np.empty(0, self.host.dtype)
        if self._device is not None:
            self._device.free()
            self._device = None
