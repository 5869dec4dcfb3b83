"""structlog, as JSON lines or for people, always on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog

from pipeline.config import Logging


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
        logger_factory=structlog.PrintLoggerFactory(file=stream or sys.stderr),
        cache_logger_on_first_use=True,
    )
