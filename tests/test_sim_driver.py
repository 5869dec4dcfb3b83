"""The simulated CUDA driver under the real pycuda: it behaves as a GPU does where the product could be wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import cuda
from engines.build import BuildError
from tests.sim.build import cache
from tests.sim.driver import ECC_UNCORRECTABLE, OUT_OF_MEMORY, DriverError, Engine, Simulator, load
from tests.sim.isolation import isolated, missing, run_apart

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

MB = 1 << 20
SLOW_US = 50_000.0
SLOW_S = SLOW_US * 1e-6

CALLS = {
    "making": ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent"),
    "working": (
        *("cuStreamCreate", "cuEventCreate", "cuMemHostAlloc", "cuMemAlloc"),
        *("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuEventRecord", "cuEventQuery", "cuStreamSynchronize"),
    ),
    "freeing": ("cuMemFree", "cuMemFreeHost", "cuStreamDestroy", "cuEventDestroy"),
}
"""Every call of the driver that engines/cuda.py makes, besides cuCtxPopCurrent and cuDevicePrimaryCtxRelease."""


@contextmanager
def gpu() -> Iterator[Simulator]:
    """The simulated driver with the context attached; at the end nothing may be alive but what the test allows."""
    sim = load()
    with cuda.attached():
        yield sim


def parts(stack: ExitStack, *shape: int) -> tuple[cuda.Stream, cuda.Event, cuda.Mirror]:
    """A stream, an event and a mirrored buffer, closed with the stack, the stream waited for first."""
    stream, event, mirror = cuda.Stream(), cuda.Event(), cuda.Mirror(shape or (1, MB), np.uint8)
    for item in (mirror, event, stream):
        stack.callback(item.close)
    stack.callback(stream.synchronize)
    return stream, event, mirror


def seconds(work: Callable[[], Any]) -> float:
    """How long that takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


class TestTime:
    """Work is asynchronous, and what can overlap does."""

    @isolated
    def test_copies_are_asynchronous(self) -> None:
        """A copy is queued at once and done later; until then nothing has arrived and the event says so."""
        with gpu() as sim, ExitStack() as stack:
            stream, event, mirror = parts(stack)
            sim.hang("run:htod")
            mirror.host[:] = 7
            mirror.upload(1, stream)
            event.record(stream)
            arrived = sim.view(mirror.address, (1, MB), np.uint8)
            assert not event.done()
            assert (arrived == 0xFF).all()
            sim.release()
            stream.synchronize()
            assert event.done()
            assert (arrived == 7).all()

    @isolated
    def test_copies_one_way_take_turns_and_opposite_ones_overlap(self) -> None:
        """There is one copy engine for each direction, as the timeline shows."""
        with gpu() as sim, ExitStack() as stack:
            (one, _, first), (two, _, second) = parts(stack), parts(stack)
            sim.configure(htod_us=SLOW_US, dtoh_us=SLOW_US)
            sim.trace()
            for mirror, stream in ((first, one), (second, two)):
                mirror.upload(1, stream)
                mirror.download(1, stream)
            one.synchronize()
            two.synchronize()
            up, down = ([s for s in sim.spans() if s.engine is engine] for engine in (Engine.UPLOAD, Engine.DOWNLOAD))
            assert len({span.stream for span in up}) == 2
            assert up[0].end <= up[1].begin
            assert all(span.size == MB and span.end - span.begin >= SLOW_S for span in (*up, *down))
            assert down[0].stream == up[0].stream
            assert up[0].end <= down[0].begin < up[1].end

    @isolated
    def test_kernels_take_turns(self) -> None:
        """Kernels of two streams do not run at once: a network fills the device."""
        with gpu() as sim, ExitStack() as stack:
            streams = [parts(stack)[0] for _ in range(2)]
            sim.configure(launch_us=SLOW_US)
            sim.trace()
            for stream in streams:
                sim.launch(stream.handle, lambda: None)
            for stream in streams:
                stream.synchronize()
            first, second = sim.spans()
            assert first.engine is second.engine is Engine.COMPUTE
            assert first.end <= second.begin

    @isolated
    def test_bandwidth_and_jitter(self) -> None:
        """A copy takes its size by the bandwidth, and with jitter another time each."""
        with gpu() as sim, ExitStack() as stack:
            sim.configure(seed=5)
            stream, _, mirror = parts(stack)
            sim.configure(gbps=0.1)
            sim.trace()
            mirror.upload(1, stream)
            stream.synchronize()
            (plain,) = sim.spans()
            assert plain.end - plain.begin >= MB / 0.1e9
            sim.configure(gbps=0, jitter_us=SLOW_US)
            sim.trace()
            for _ in range(4):
                mirror.upload(1, stream)
            stream.synchronize()
            assert len({round(span.end - span.begin, 3) for span in sim.spans()}) > 1

    @isolated
    def test_pageable_copies_block(self) -> None:
        """A copy to ordinary memory returns only when it is done; one from it takes the data as they are."""
        driver = cuda.driver()
        with gpu() as sim, ExitStack() as stack:
            stream, _, mirror = parts(stack)
            pageable = np.full((1, MB), 3, np.uint8)
            sim.hang("run:htod")
            driver.memcpy_htod_async(mirror.address, pageable, stream.raw)
            pageable[:] = 4
            sim.release()
            sim.configure(dtoh_us=SLOW_US)
            assert seconds(lambda: driver.memcpy_dtoh_async(pageable, mirror.address, stream.raw)) >= SLOW_S
            assert (pageable == 3).all()


class TestOrder:
    """Streams are independent but for what is said."""

    @isolated
    def test_wait_for_event(self) -> None:
        """A stream that waits for an event runs only after it; the host does not wait."""
        with gpu() as sim, ExitStack() as stack:
            (one, event, mirror), (two, _, result) = parts(stack), parts(stack)
            sim.configure(htod_us=SLOW_US)
            mirror.host[:] = 9
            mirror.upload(1, one)
            event.record(one)
            two.raw.wait_for_event(event._raw)

            def move() -> None:
                sim.view(result.address, (MB,), np.uint8)[:] = sim.view(mirror.address, (MB,), np.uint8)

            sim.launch(two.handle, move, reads=[(mirror.address, MB)], writes=[(result.address, MB)])
            result.download(1, two)
            two.synchronize()
            assert (result.host == 9).all()
            assert sim.counts().faults() == {}

    @isolated
    def test_non_blocking_streams_ignore_the_default_stream(self) -> None:
        """Work on the default stream does not wait for non-blocking streams, but for others."""
        driver = cuda.driver()
        with gpu() as sim, ExitStack() as stack:
            stream, _, _ = parts(stack)
            other = driver.mem_alloc(16)
            sim.hang("run:launch")
            sim.launch(stream.handle, lambda: None)
            driver.memcpy_htod(other, np.zeros(16, np.uint8))  # comes back, although the stream hangs
            sim.release()
            stream.synchronize()
            blocking = driver.Stream()
            sim.configure(launch_us=SLOW_US)
            sim.trace()
            sim.launch(blocking.handle, lambda: None)
            driver.memcpy_htod(other, np.zeros(16, np.uint8))
            kernel, copy = sim.spans()
            assert (kernel.engine, copy.engine) == (Engine.COMPUTE, Engine.UPLOAD)
            assert kernel.end <= copy.begin
            del blocking
            other.free()

    @isolated
    def test_an_event_keeps_to_its_record(self) -> None:
        """A wait holds for the record that was there at the call, whatever is recorded later."""
        with gpu() as sim, ExitStack() as stack:
            (one, event, _), (two, _, _) = parts(stack), parts(stack)
            event.record(one)
            two.raw.wait_for_event(event._raw)
            sim.hang("run:launch")
            sim.launch(one.handle, lambda: None)
            event.record(one)
            two.synchronize()  # comes back, although the first stream hangs
            assert not event.done()
            sim.release()


class TestMemory:
    """Memory is where it is, and no more than there is."""

    def test_device_memory_is_not_the_hosts(self) -> None:
        """Host code that follows a device pointer crashes, as it would with a GPU."""
        code, _ = run_apart(__name__, "follow_a_device_pointer")
        assert code == -11

    @isolated
    def test_freed_memory_is_refused(self) -> None:
        """Neither a copy nor a second free meets freed memory, nor does a newer allocation get its address."""
        driver = cuda.driver()
        with gpu():
            gone = driver.mem_alloc(MB)
            address = int(gone)
            gone.free()
            fresh = driver.mem_alloc(MB)
            assert int(fresh) != address
            with pytest.raises(driver.LogicError, match="invalid argument"):
                driver.memcpy_htod(address, np.zeros(4, np.uint8))
            fresh.free()

    @isolated
    def test_a_copy_past_the_end_is_refused(self) -> None:
        """A copy of one byte more than the allocation has is an error."""
        driver = cuda.driver()
        with gpu():
            memory = driver.mem_alloc(100)
            driver.memcpy_htod(memory, np.zeros(100, np.uint8))
            with pytest.raises(driver.LogicError, match="invalid argument"):
                driver.memcpy_htod(memory, np.zeros(101, np.uint8))
            memory.free()

    @isolated
    def test_out_of_memory(self) -> None:
        """The device has the memory that was set; a lane's half-made buffer leaves nothing behind."""
        driver = cuda.driver()
        with gpu() as sim:
            sim.configure(memory=MB)
            with pytest.raises(driver.MemoryError, match="out of memory"):
                cuda.Mirror((2, MB), np.uint8)
            assert sim.counts().alive() == {"pushed": 1}
            mirror = cuda.Mirror((1, MB), np.uint8)
            assert driver.mem_get_info() == (0, MB)
            mirror.close()
            assert driver.mem_get_info() == (MB, MB)

    @isolated
    def test_a_free_with_work_queued_is_reported(self) -> None:
        """Memory freed under a copy that nobody waited for is a hazard, and the copy still does no harm."""
        with gpu() as sim, ExitStack() as stack:
            stream, mirror = cuda.Stream(), cuda.Mirror((1, MB), np.uint8)
            stack.callback(stream.close)
            sim.configure(htod_us=SLOW_US)
            mirror.upload(1, stream)
            mirror.close()
            assert sim.counts().hazards == 2  # the host's half and the device's
            assert "had not waited for" in sim.reports()[0]
            stream.synchronize()
            assert sim.counts().device == sim.counts().pinned == 0

    @isolated
    def test_kernels_only_reach_what_is_allocated(self) -> None:
        """A kernel on memory that is not all allocated is refused, and so is a view of it."""
        with gpu() as sim, ExitStack() as stack:
            stream, _, mirror = parts(stack)
            for attempt in (
                lambda: sim.launch(stream.handle, lambda: None, reads=[(mirror.address + 1, MB)]),
                lambda: sim.view(mirror.address, (MB + 1,), np.uint8),
            ):
                with pytest.raises(DriverError) as refused:
                    attempt()
                assert refused.value.code == 700


def follow_a_device_pointer() -> None:
    """Read a device pointer as if it were the host's."""
    import ctypes

    with gpu():
        ctypes.string_at(cuda.Mirror((1, 16), np.uint8).address, 1)


class TestGuard:
    """Pinned memory in use by a copy is closed to the host."""

    @pytest.mark.parametrize("write", [True, False])
    @pytest.mark.parametrize("waited", [True, False])
    @isolated
    def test_touching_too_early_is_counted(self, write: bool, waited: bool) -> None:
        """Writing what is being uploaded, or reading what is being downloaded, is seen unless it was waited for."""
        with gpu() as sim, ExitStack() as stack:
            stream, _, mirror = parts(stack)
            sim.configure(guard=True, htod_us=SLOW_US, dtoh_us=SLOW_US)
            (mirror.upload if write else mirror.download)(1, stream)
            if waited:
                stream.synchronize()
            if write:
                mirror.host[0, 5] = 1
            else:
                int(mirror.host[0, 5])
            assert sim.counts().violations == (0 if waited else 1), sim.reports()

    @isolated
    def test_reading_what_is_uploaded_is_allowed(self) -> None:
        """Host and copy may both read, and a neighbour on the same page may be written."""
        with gpu() as sim, ExitStack() as stack:
            stream, _, mirror = parts(stack, 2, 100)
            sim.configure(guard=True, htod_us=SLOW_US)
            mirror.upload(1, stream)
            int(mirror.host[0, 5])
            mirror.host[1, 5] = 1
            assert sim.counts().violations == 0

    @isolated
    def test_a_query_is_a_wait(self) -> None:
        """An event that was asked until it said yes has been waited for."""
        with gpu() as sim, ExitStack() as stack:
            stream, event, mirror = parts(stack)
            sim.configure(guard=True, dtoh_us=SLOW_US)
            mirror.download(1, stream)
            event.record(stream)
            while not event.done():
                time.sleep(0.001)
            int(mirror.host[0, 5])
            assert sim.counts().faults() == {}


class TestContexts:
    """Contexts belong to threads, and objects to contexts."""

    @isolated
    def test_a_thread_without_context_is_refused(self) -> None:
        """What needs a context fails with error 201 in a thread that has attached none."""
        driver = cuda.driver()
        refused = []

        def allocate() -> None:
            try:
                driver.mem_alloc(16)
            except driver.LogicError as error:
                refused.append(str(error))

        with gpu() as sim:
            thread = threading.Thread(target=allocate)
            thread.start()
            thread.join()
            assert sim.counts().alive() == {"pushed": 1}
        assert refused == ["cuMemAlloc failed: invalid device context"]

    @isolated
    def test_threads_share_the_primary_context(self) -> None:
        """Eight threads at work at once get their own data back, and leave nothing behind."""
        wrong = []

        def work(number: int) -> None:
            with gpu(), ExitStack() as stack:
                stream, _, mirror = parts(stack, 1, 1000)
                for turn in range(50):
                    mirror.host[:] = value = (number * 50 + turn) % 251
                    mirror.upload(1, stream)
                    stream.synchronize()
                    mirror.host[:] = 255
                    mirror.download(1, stream)
                    stream.synchronize()
                    wrong.extend([turn] * bool((mirror.host != value).any()))

        load().configure(jitter_us=200, guard=True)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counts = load().counts()
        assert (wrong, counts.faults(), counts.alive(), counts.contexts) == ([], {}, {}, 0)

    @isolated
    def test_no_device(self) -> None:
        """Without a device the driver says so, and the product names the remedy."""
        load().configure(devices=0)
        with pytest.raises(BuildError, match=r"no CUDA-capable device.*nvidia-smi"), cuda.attached():
            pass

    @isolated
    def test_kernels_make_no_calls(self) -> None:
        """A call of the driver inside a kernel is refused, and a kernel that raises breaks the context."""
        driver = cuda.driver()
        with gpu() as sim, ExitStack() as stack:
            stream = cuda.Stream()
            stack.callback(stream.close)
            sim.launch(stream.handle, lambda: driver.mem_alloc(16))
            with pytest.raises(driver.LaunchError, match="launch failure"):
                stream.synchronize()
            assert "not permitted" in str(sim.errors[0])


def round_trip() -> None:
    """Use everything of engines/cuda.py once, in order and closed in order."""
    with gpu() as sim, ExitStack() as stack:
        stream, event, mirror = parts(stack, 1, 100)
        mirror.host[:] = 5
        mirror.upload(1, stream)
        address = mirror.address
        sim.launch(stream.handle, lambda: None, reads=[(address, 100)], writes=[(address, 100)])
        mirror.download(1, stream)
        event.record(stream)
        event.done()


class TestErrors:
    """Every call can be made to fail, hang or break the context."""

    @isolated
    def test_the_calls_are_all_there(self) -> None:
        """The calls that the tests below let fail are those that the product makes, and no others."""
        round_trip()
        made = {name for name in load().calls() if name.startswith("cu")}
        besides = {"cuCtxPopCurrent", "cuDevicePrimaryCtxRelease"}
        assert made == {name for names in CALLS.values() for name in names} | besides

    @pytest.mark.parametrize("call", [*CALLS["making"], *CALLS["working"]])
    @isolated
    def test_a_call_fails(self, call: str) -> None:
        """The failure of any call reaches the caller with the call's name, nothing stays, and the next try works."""
        sim = load()
        sim.fail(call, code=ECC_UNCORRECTABLE)
        with pytest.raises((cuda.driver().Error, BuildError), match=f"{call} failed: uncorrectable ECC error"):
            round_trip()
        assert sim.counts().alive() == {}
        sim.reset()
        round_trip()
        assert (sim.counts().alive(), sim.counts().faults()) == ({}, {})

    @pytest.mark.parametrize(
        ("call", "kind"), [*zip(CALLS["freeing"], ("device", "pinned", "streams", "events"), strict=True)]
    )
    @isolated
    def test_a_failed_free_is_a_leak(self, call: str, kind: str) -> None:
        """What could not be freed is counted as alive, and everything else is freed all the same."""
        sim = load()
        sim.fail(call, code=ECC_UNCORRECTABLE)
        with suppress(cuda.driver().Error):  # pycuda raises from an explicit free, and only warns from the others
            round_trip()
        assert sim.counts().alive() == {kind: 1}

    @isolated
    def test_a_context_is_not_given_back(self) -> None:
        """Where the driver does not take the context back it stays, and the next one to come gets it again."""
        sim = load()
        sim.fail("cuDevicePrimaryCtxRelease", code=ECC_UNCORRECTABLE)
        for turn in (1, 2):
            round_trip()
            # pushed: by each thread that was to give it back, which has taken its stack with it
            assert (sim.counts().contexts, sim.counts().alive()) == (1, {"pushed": turn})

    @isolated
    def test_the_nth_of_several(self) -> None:
        """Errors begin with the n-th call from now and last as many calls as was said."""
        driver = cuda.driver()
        with gpu() as sim:
            sim.fail("cuEventCreate", nth=2, times=2)
            outcomes = []
            for _ in range(5):
                try:
                    cuda.Event().close()
                    outcomes.append(True)
                except driver.LaunchError:
                    outcomes.append(False)
            assert outcomes == [True, False, False, True, True]
            assert sim.calls()["cuEventCreate"] == 5

    @isolated
    def test_pycuda_allocates_twice(self) -> None:
        """Out of memory, pycuda collects garbage and tries again: one injected failure alone is not seen."""
        driver = cuda.driver()
        with gpu() as sim:
            sim.fail("cuMemAlloc", code=OUT_OF_MEMORY)
            driver.mem_alloc(16).free()
            sim.fail("cuMemAlloc", code=OUT_OF_MEMORY, times=2)
            with pytest.raises(driver.MemoryError):
                driver.mem_alloc(16)

    @pytest.mark.parametrize("stage", ["run:htod", "run:launch", "run:dtoh"])
    @isolated
    def test_failed_work_breaks_the_context(self, stage: str) -> None:
        """Work that fails on the device breaks everything that follows, until the context is made anew."""
        sim, driver, hold = load(), cuda.driver(), cuda.Hold()
        sim.fail(stage)
        with pytest.raises(driver.LaunchError, match="unspecified launch failure"):
            round_trip()
        with pytest.raises(driver.LaunchError, match="unspecified launch failure"):
            round_trip()
        assert sim.counts().alive() == {}
        hold.release()
        round_trip()

    @pytest.mark.parametrize("stage", ["run:htod", "run:launch", "run:dtoh", "run:record"])
    @isolated
    def test_a_hang_lasts_until_it_is_released(self, stage: Any) -> None:
        """The event after hung work is never done, other streams go on, and after the release everything is."""
        with gpu() as sim, ExitStack() as stack:
            (stream, event, mirror), (other, _, apart) = parts(stack), parts(stack)
            sim.hang(stage)
            mirror.upload(1, stream)
            sim.launch(stream.handle, lambda: None)
            mirror.download(1, stream)
            event.record(stream)
            sim.wait_hanging()
            assert not event.done()
            apart.upload(1, other)
            sim.launch(other.handle, lambda: None)
            apart.download(1, other)
            other.synchronize()
            sim.release()
            stream.synchronize()
            assert event.done()

    @isolated
    def test_names_are_checked(self) -> None:
        """An error for a call that does not exist is refused, as it would never come."""
        sim = load()
        with pytest.raises(ValueError, match="no call cuMemAloc"):
            sim.fail("cuMemAloc")
        with pytest.raises(ValueError, match="no stage"):
            sim.hang("cuMemAlloc")  # type: ignore[arg-type]


@isolated
def test_what_is_not_simulated_says_so() -> None:
    """A call that the simulated driver lacks is an error, never a silent success."""
    driver = cuda.driver()
    with gpu(), pytest.raises(driver.LogicError, match="operation not supported"):
        driver.managed_empty(4, np.uint8, mem_flags=1)


def test_the_callers_process_stays_clean() -> None:
    """Tests on the simulated driver never load it into the process that runs the others."""
    code, text = run_apart(__name__, "round_trip")
    assert (code, text) == (0, "")
    assert str(cache()) not in Path("/proc/self/maps").read_text()


class TestIsolation:
    """What goes wrong in a test's own process is the test's failure."""

    @pytest.mark.parametrize(
        ("program", "complaint"),
        [("fail", "ZeroDivisionError"), ("fail_in_a_thread", "ZeroDivisionError"), ("sleep", "did not end within 1 s")],
    )
    def test_failures_come_back(self, program: str, complaint: str) -> None:
        """An error in it or one of its threads, and a process that does not end, are reported."""
        _, text = run_apart(__name__, program, timeout=1.0 if program == "sleep" else 60.0)
        assert complaint in text


def fail() -> None:
    """Raise something."""
    raise ZeroDivisionError


def fail_in_a_thread() -> None:
    """Raise something where nobody sees it."""
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


def sleep() -> None:
    """Take too long."""
    time.sleep(30)
