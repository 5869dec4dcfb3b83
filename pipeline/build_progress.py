"""How far the making of an engine is: for the log, and for systemd, which would end a start that takes too long."""

from __future__ import annotations

import time
from typing import Final

import structlog

from pipeline.notify import Notifier

log = structlog.get_logger(__name__)

LOG_S: Final = 5.0
"""Least time between two lines of the log."""
STEP_S: Final = 120.0
"""Longest time that a start may take from one step of a build to the next: on a GPU, a step measures one layer."""


class BuildProgress:
    """Told by whatever makes an engine how far it is: an :data:`engines.build.Progress`, for any thread.

    Args:
        engine: ``name@version``.
        notify: Told about it while the line starts. None while it runs: the line then shows by itself that it is
            alive, and putting systemd's watchdog off would hide that it is not.
    """

    def __init__(self, engine: str, notify: Notifier | None = None) -> None:
        self._engine, self._notify = engine, notify
        self._logged = time.monotonic()  # what is over within that time needs no line

    def __call__(self, phase: str, done: int, steps: int) -> None:
        """Say that ``done`` of ``steps`` steps of ``phase`` are done."""
        percent = 100 * done // max(steps, 1)
        if self._notify is not None and self._notify.extend(STEP_S):
            self._notify.status(f"making {self._engine}: {phase}, {percent} %")
        now = time.monotonic()
        if now - self._logged >= LOG_S:
            self._logged = now
            log.info("engine_building", engine=self._engine, phase=phase, percent=percent)
