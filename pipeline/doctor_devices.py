"""The doctor's look at what engines run on: NVIDIA's driver, pycuda, TensorRT, OpenVINO and the CPU."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from typing import Any, Final

from pipeline.checks import Check, fail, lacking, ok

LIBCUDA: Final = "libcuda.so.1"
EXTRA: Final = "pip install 'dmdd-line[tensorrt]'"
OLDEST_TENSORRT: Final = 10


def check_driver(*, needed: bool, library: str = LIBCUDA) -> Iterator[Check]:
    """NVIDIA's driver and its first device, asked through the driver's own C interface.

    Args:
        needed: Whether the config's target is a GPU.
        library: The driver's library.
    """
    remedy = "install NVIDIA's driver and see that `nvidia-smi` lists the GPU, or set engine.target = 'openvino'"
    try:
        driver = ctypes.CDLL(library)
    except OSError as error:
        yield lacking("driver", f"no {library} ({error})", remedy, needed=needed)
        return
    count, version, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(128)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        found = f"{library} is there, but no usable GPU (error {status}, {count.value} devices)"
        yield lacking("driver", found, remedy, needed=needed)
        return
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetName(name, len(name), 0)
    cuda = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    yield ok("driver", f"{count.value} GPU(s), first {name.value.decode(errors='replace')}, driver for {cuda}")


def check_pycuda(*, needed: bool) -> Iterator[Check]:
    """Whether pycuda can be imported, which needs the driver's library too."""
    module = _import("pycuda.driver")
    if isinstance(module, Exception):
        yield lacking("pycuda", f"cannot be imported ({module})", EXTRA, needed=needed)
        return
    yield ok("pycuda", f"version {importlib.import_module('pycuda').VERSION_TEXT}")


def check_tensorrt(*, needed: bool) -> Iterator[Check]:
    """Whether TensorRT can be imported, and is new enough for the lanes."""
    module = _import("tensorrt")
    if isinstance(module, Exception):
        yield lacking("tensorrt", f"cannot be imported ({module})", EXTRA, needed=needed)
    elif int(module.__version__.split(".")[0]) < OLDEST_TENSORRT:
        found = f"version {module.__version__}, older than {OLDEST_TENSORRT}"
        yield lacking("tensorrt", found, f"{EXTRA} --upgrade", needed=needed)
    else:
        yield ok("tensorrt", f"version {module.__version__}")


def check_openvino(precision: str, *, needed: bool) -> Iterator[Check]:
    """OpenVINO, and whether the CPU computes in the precision that is asked for, not in one of its own choice."""
    runtime = _import("engines.openvino_runtime")
    if isinstance(runtime, Exception):
        yield lacking("openvino", f"cannot be imported ({runtime})", "pip install dmdd-line", needed=needed)
        return
    core = runtime.ov.Core()
    cpu, can = core.get_property("CPU", "FULL_DEVICE_NAME"), core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    yield ok("openvino", f"version {runtime.ov.get_version().split('-')[0]} on {cpu.strip()}")
    yield _check_precision(runtime.ov, core, precision if needed else "fp32", set(can))


def _check_precision(ov: Any, core: Any, precision: str, can: set[str]) -> Check:
    """Compile a small graph and read back what OpenVINO will compute in."""
    from engines.openvino_lane import PRECISIONS  # noqa: PLC0415 - half a second to import

    if precision == "bf16" and "BF16" not in can:
        return fail("precision", "bf16 is configured, but this CPU does not have it", "engine.precision = 'fp32'")
    asked = PRECISIONS[precision]
    got = _compiled_precision(ov, core, {"INFERENCE_PRECISION_HINT": asked})
    alone = _compiled_precision(ov, core, {})
    if got != asked:
        found = f"{precision} is configured, but OpenVINO takes {got} on this CPU"
        return fail("precision", found, "set engine.precision to what it takes, then `dmdd engines verify`")
    return ok("precision", f"{asked}, as configured; left alone, OpenVINO would take {alone} on this CPU")


def _compiled_precision(ov: Any, core: Any, hints: dict[str, str]) -> str:
    ops = importlib.import_module("openvino.opset13")
    frames = ops.parameter([1, 8], ov.Type.f32)
    model = ov.Model([ops.relu(frames)], [frames])
    return str(core.compile_model(model, "CPU", hints).get_property("INFERENCE_PRECISION_HINT").get_type_name())


def _import(name: str) -> Any:
    """The module, or the error that its import ended in."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        return error
