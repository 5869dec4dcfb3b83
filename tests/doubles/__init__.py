"""Simulated libraries for what this machine has not got: a CUDA driver behind pycuda's API, and TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from engines import cuda, plan
from tests.doubles import cuda_driver, trt


@contextmanager
def simulated(monkeypatch: Any) -> Iterator[trt.World]:
    """Put both in place of the real ones, and prove at the end that nothing is left on the GPU."""
    forget()
    world = trt.install(monkeypatch, cuda_driver.install(monkeypatch))
    try:
        yield world
        if residue := world.gpu.residue():
            raise AssertionError("; ".join(residue))
    finally:
        forget()


def forget() -> None:
    """Forget what the engine keeps for the process's lifetime."""
    cuda._primary = cuda.Primary()
    plan._toolkit.cache_clear()
