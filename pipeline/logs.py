"""structlog, as JSON lines or for people, always on standard error."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

import structlog

from pipeline.config import Logging


class Stream:
    """Writes to a stream, and never fails: a full disk or a closed pipe behind the log stops no part.

    Args:
        stream: Where lines go while it takes them.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand on what is buffered, if it is taken."""
        with suppress(OSError, ValueError):
            self._stream.flush()


def configure(settings: Logging, stream: TextIO | None = None) -> None:
    """Set up logging for the process."""
    renderer: Any = structlog.processors.JSONRenderer()
    if settings.format == "console":
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=cast("TextIO", Stream(stream or sys.stderr))),
        cache_logger_on_first_use=True,
    )
