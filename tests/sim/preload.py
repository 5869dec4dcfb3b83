"""What the server process of isolated tests loads once: the driver, then pycuda on it, but not ``cuInit``."""

import contextlib

import numpy  # noqa: F401
import pytest  # noqa: F401

from tests.sim.driver import load

load()
with contextlib.suppress(ImportError):
    import pycuda.driver  # noqa: F401
