"""A process of its own for every test that loads the simulated driver.

The driver is the process's for good, under the name of NVIDIA's; other tests put doubles of pycuda in its place, and
libraries such as torch would take it for a GPU. So each such test is run in a fork of a clean server process, which
has the driver and pycuda loaded already: milliseconds, and the driver as new every time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import multiprocessing
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.sim.build import Unavailable, driver_library

TIMEOUT_S = 60.0


@functools.cache
def missing(*, pycuda: bool = True) -> str:
    """Why tests on the simulated driver cannot run here, for a skip; empty if they can.

    Args:
        pycuda: Whether they need pycuda as well.
    """
    try:
        driver_library()
        if pycuda:
            importlib.metadata.version("pycuda")
    except Unavailable as error:
        return f"no simulated CUDA driver: {error}"
    except importlib.metadata.PackageNotFoundError:
        return "pycuda is not installed: python -m tests.sim.build"
    return ""


def isolated_within(timeout: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a decorator as :func:`isolated` that allows a test ``timeout`` seconds."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            code, text = run_apart(test.__module__, test.__qualname__, args, kwargs, timeout)
            if code or text:
                raise AssertionError(text or f"the process ended with {code}")

        return run

    return decorate


def isolated(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test function or method in a process of its own, in which the driver is loaded and new.

    Its arguments are sent there, so fixtures have to be things that can be, such as ``tmp_path``; what it or one of its
    threads raises, and a crash or a hang, is the caller's AssertionError.
    """
    return isolated_within(TIMEOUT_S)(test)


def run_apart(
    module: str, name: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, timeout: float = TIMEOUT_S
) -> tuple[int, str]:
    """Run a module's function in a process of its own.

    Args:
        module: The module's name.
        name: The function's qualified name; an isolated function is run itself.
        args: Its arguments, which pickle must know.
        kwargs: The same.
        timeout: In seconds; then the process is killed.

    Returns:
        The process's exit code, 0 if it ended well, and the traceback or complaint, empty if there is none.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.sim.preload"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, module, name, args, kwargs or {}), daemon=True)
    process.start()
    sender.close()
    with receiver:
        text = _answer(receiver, timeout)
    if text is None:
        text = f"{name} did not end within {timeout:.0f} s"
        process.kill()
    process.join()
    code = process.exitcode or 0
    process.close()
    return code, text


def _answer(receiver: Connection, timeout: float) -> str | None:
    """What the process sends: nothing if it crashed, None if it takes too long."""
    if not receiver.poll(timeout):
        return None
    try:
        return str(receiver.recv())
    except EOFError:
        return ""


def _child(sender: Connection, module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    failures: list[str] = []
    threading.excepthook = lambda hook: failures.extend(
        traceback.format_exception(hook.exc_type, hook.exc_value, hook.exc_traceback)
    )
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        getattr(found, "__wrapped__", found)(*args, **kwargs)
    except BaseException:  # noqa: BLE001 - the parent raises it again
        failures.append(traceback.format_exc())
    sender.send("".join(failures))
    sender.close()
