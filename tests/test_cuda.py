"""The CUDA module against a simulated driver: who may use what where, and that nothing is ever left behind."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from types import ModuleType

import numpy as np
import pytest

from engines import cuda
from engines.build import BuildError
from engines.lane import LaneFault
from tests.doubles import forget, simulated
from tests.doubles.cuda_driver import CudaMemoryError, Gpu, LogicError

REMEDY = r"pip install 'dmdd-line\[tensorrt\]'"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A GPU on which nothing may be left at the end of the test."""
    with simulated(monkeypatch) as world:
        yield world.gpu


class TestMissing:
    def test_importing_needs_no_gpu(self) -> None:
        """Importing the GPU modules loads neither pycuda nor TensorRT."""
        code = (
            "import sys; sys.modules.update(dict.fromkeys(['pycuda', 'pycuda.driver', 'tensorrt']));"
            "import engines.cuda, engines.tensorrt_lane, engines.build"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_no_pycuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without pycuda the error names the extra to install."""
        monkeypatch.setitem(sys.modules, "pycuda", None)
        monkeypatch.setitem(sys.modules, "pycuda.driver", None)
        with pytest.raises(BuildError, match=REMEDY):
            cuda.driver()

    def test_no_driver_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without NVIDIA's driver, where importing pycuda fails on its library, the error says what is missing."""

        class Unloadable:
            def find_spec(self, name: str, *_: object) -> None:
                if name.startswith("pycuda"):
                    raise ImportError("libcuda.so.1: cannot open shared object file")

        monkeypatch.setattr(sys, "meta_path", [Unloadable(), *sys.meta_path])
        for name in ("pycuda", "pycuda.driver"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(BuildError, match=r"libcuda\.so\.1.*nvidia-smi"):
            cuda.driver()

    def test_no_device(self, gpu: Gpu) -> None:
        """With a driver but no GPU the error says so, and a later try may succeed."""
        gpu.failing["init"] = LogicError("cuInit failed: no CUDA-capable device is detected")
        with pytest.raises(BuildError, match=r"no CUDA-capable device.*nvidia-smi"), cuda.attached():
            pass
        gpu.failing.clear()
        with cuda.attached():
            assert gpu.current() is not None


class TestContext:
    def test_one_object_for_all_threads(self, gpu: Gpu) -> None:
        """However many threads come at once, the primary context is retained once and that object pushed in each."""
        barrier = threading.Barrier(8, timeout=10)

        def attach() -> None:
            barrier.wait()
            with cuda.attached():
                barrier.wait()

        threads = [threading.Thread(target=attach) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert gpu.calls["retain_primary_context"] == 1
        assert len(gpu.pushed) == 8 + 1  # the last one gives it back, in a thread of its own
        assert set(gpu.pushed) == set(gpu.contexts)
        assert len(gpu.contexts) == 1

    def test_holding_does_not_push(self, gpu: Gpu) -> None:
        """A thread that only keeps the context has none current."""
        hold = cuda.Hold()
        assert gpu.calls["retain_primary_context"] == 1
        assert gpu.current() is None
        hold.release()

    def test_popped_after_an_error(self, gpu: Gpu) -> None:
        """The context is popped however the block ends."""
        with pytest.raises(ZeroDivisionError), cuda.attached():
            raise ZeroDivisionError
        assert gpu.calls["pop"] == 1

    def test_never_autoinit(self, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
        """No second context is ever made behind TensorRT's back."""
        monkeypatch.setitem(sys.modules, "pycuda.autoinit", ModuleType("pycuda.autoinit"))
        with cuda.attached():
            pass
        assert [call for call in gpu.calls if "context" in call] == ["retain_primary_context"]

    def test_unattached_threads_are_refused(self, gpu: Gpu) -> None:
        """Whoever forgets to attach gets an error, not somebody else's context."""
        with pytest.raises(LaneFault, match="invalid device context"), cuda.raising(LaneFault, "test"):
            cuda.Stream()


class TestRelease:
    def test_the_last_one_gives_it_back(self, gpu: Gpu) -> None:
        """The context stays while a thread or an engine needs it, and is given back once, when nobody does."""
        hold = cuda.Hold()
        for _ in range(2):
            with cuda.attached():
                pass
        assert gpu.detached == []
        with cuda.attached():
            hold.release()
            assert gpu.detached == []
        assert gpu.detached == gpu.contexts
        assert gpu.calls["retain_primary_context"] == gpu.calls["detach"] == 1

    def test_twice(self, gpu: Gpu) -> None:
        """A hold that is released again takes nothing from another."""
        first, second = cuda.Hold(), cuda.Hold()
        first.release()
        first.release()
        assert gpu.detached == []
        second.release()
        assert gpu.detached == gpu.contexts

    def test_a_later_start(self, gpu: Gpu) -> None:
        """Whoever comes after the context was given back gets a new one."""
        for number in (1, 2):
            with cuda.attached():
                assert gpu.current() is gpu.contexts[-1]
            assert len(gpu.detached) == len(gpu.contexts) == number

    def test_a_thread_that_is_stuck(self, gpu: Gpu) -> None:
        """While a thread is on the device the context is not taken from under it; when it is done, it goes."""
        stuck, answers = threading.Event(), threading.Event()

        def hang() -> None:
            with cuda.attached():
                stuck.set()
                answers.wait(10)

        hold, thread = cuda.Hold(), threading.Thread(target=hang)
        thread.start()
        stuck.wait(10)
        hold.release()
        assert gpu.detached == []
        answers.set()
        thread.join(10)
        assert gpu.detached == gpu.contexts

    def test_a_context_that_cannot_be_popped(self, gpu: Gpu) -> None:
        """Where the pop fails the thread still has the context: it is kept."""
        gpu.failing["pop"] = LogicError("cuCtxPopCurrent failed: device lost")
        with pytest.raises(LogicError), cuda.attached():
            pass
        gpu.failing.clear()
        assert gpu.detached == []
        gpu.stack().pop()
        cuda._primary.give()

    def test_a_lost_device(self, gpu: Gpu) -> None:
        """A device on which nothing can be done any more does not keep the process from its end."""
        hold = cuda.Hold()
        gpu.failing["push"] = LogicError("cuCtxPushCurrent failed: device lost")
        hold.release()
        assert gpu.detached == gpu.contexts
        assert gpu.strays == ["a context detached where it was not current, and so not given back"]
        gpu.strays.clear()


class TestObjects:
    def test_flags(self, gpu: Gpu) -> None:
        """Streams ignore the default stream, events carry no timing and let waiters sleep, memory is locked for all."""
        with cuda.attached():
            for item in (cuda.Stream(), cuda.Event(), cuda.Mirror((1, 2), np.uint8)):
                item.close()
        assert gpu.flags == {"Stream": {1}, "Event": {1 | 2}, "pagelocked_empty": {1}}

    def test_close_frees_at_once(self, gpu: Gpu) -> None:
        """Every wrapper frees its object when it is closed, and may be closed again."""
        with cuda.attached():
            items = [cuda.Stream(), cuda.Event(), cuda.Mirror((1, 2), np.uint8)]
            for item in items:
                item.close()
            assert gpu.live == {}
            for item in items:
                item.close()
        assert [kind for kind, _ in gpu.freed] == ["stream", "event", "pinned memory", "device memory"]

    def test_nothing_left_by_half_a_mirror(self, gpu: Gpu) -> None:
        """Where the device has no room, the host's half is freed too, although the error is still being handled."""
        gpu.failing["mem_alloc"] = CudaMemoryError("cuMemAlloc failed: out of memory")
        with cuda.attached():
            with pytest.raises(CudaMemoryError) as caught:
                cuda.Mirror((4, 2), np.uint8)
            assert gpu.live == {}
        assert caught.value.__traceback__ is not None

    def test_round_trip_is_queued(self, gpu: Gpu) -> None:
        """Copies move the first items only, and take effect no sooner than the stream comes to them."""
        with cuda.attached(), ExitStack() as stack:
            stream, mirror = cuda.Stream(), cuda.Mirror((3, 2), np.uint8)
            stack.callback(stream.close)
            stack.callback(mirror.close)
            mirror.host[:] = 7
            mirror.upload(2, stream)
            assert set(gpu.memory[mirror.address]) == {0xAB}
            stream.synchronize()
            assert list(gpu.memory[mirror.address]) == [7, 7, 7, 7, 0xAB, 0xAB]
            gpu.memory[mirror.address][:] = 9
            mirror.download(1, stream)
            assert mirror.host.tolist() == [[7, 7], [7, 7], [7, 7]]
            stream.synchronize()
            assert mirror.host.tolist() == [[9, 9], [7, 7], [7, 7]]
        assert gpu.log == [("memcpy_htod_async", 4), ("memcpy_dtoh_async", 2)]

    def test_event_tells_when_the_stream_has_come_there(self, gpu: Gpu) -> None:
        """An event is done only once everything that was queued before it is."""
        gpu.polls = 2
        with cuda.attached(), ExitStack() as stack:
            stream, event, mirror = cuda.Stream(), cuda.Event(), cuda.Mirror((1, 1), np.uint8)
            for item in (stream, event, mirror):
                stack.callback(item.close)
            gpu.memory[mirror.address][:] = 5
            mirror.download(1, stream)
            event.record(stream)
            assert [event.done() for _ in range(3)] == [False, False, True]
            assert mirror.host.tolist() == [[5]]

    def test_errors_are_translated(self, gpu: Gpu) -> None:
        """A CUDA error comes out as the wanted kind, with what was going on and the driver's own words."""
        gpu.failing["Stream"] = LogicError("cuStreamCreate failed: unspecified")
        with (
            cuda.attached(),
            pytest.raises(LaneFault, match="making a lane: cuStreamCreate failed"),
            cuda.raising(LaneFault, "making a lane"),
        ):
            cuda.Stream()


class TestDouble:
    """The simulated driver notices what it is there to notice."""

    def test_leak_out_of_context(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An object that outlives its thread's context is reported."""

        def outlive() -> None:
            with cuda.attached():
                stream = cuda.Stream()
            stream.close()

        with pytest.raises(AssertionError, match="context was not current"), simulated(monkeypatch):
            outlive()

    def test_forgotten_object(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An object that is never freed is reported."""
        kept = []
        with pytest.raises(AssertionError, match="event never freed"), simulated(monkeypatch), cuda.attached():
            kept.append(cuda.Event())

    def test_forgotten_context(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A context that a thread leaves pushed, for which pycuda aborts the process, is reported."""
        with pytest.raises(AssertionError, match="still pushed"), simulated(monkeypatch):
            cuda.Primary().take().push()

    def test_forgotten_hold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A context that nobody gives back, of which pycuda complains at the process's end, is reported."""
        with pytest.raises(AssertionError, match="never given back"), simulated(monkeypatch):
            cuda.Hold()

    def test_second_context_object(self, gpu: Gpu) -> None:
        """Freeing under another Context object of the same device is a leak, as it is to pycuda."""
        with cuda.attached():
            stream = cuda.Stream()
            forget()
            with cuda.attached():
                stream.close()
        assert gpu.strays == ["stream freed while its context was not current"]
        gpu.strays.clear()
