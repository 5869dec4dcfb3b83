"""The log never stops the line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from pipeline import logs
from pipeline.config import Logging


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Whatever a test configures is gone after it."""
    yield
    structlog.reset_defaults()


def test_lines_are_json_from_a_level_on() -> None:
    """One object a line, with its event and level; what is below the level is not written."""
    stream = io.StringIO()
    logs.configure(Logging(level="warning"), stream)
    log = structlog.get_logger("a")
    log.info("unimportant")
    log.warning("lane_fault", engine="e@1")
    (line,) = stream.getvalue().splitlines()
    assert {key: json.loads(line)[key] for key in ("event", "level", "engine")} == {
        "event": "lane_fault", "level": "warning", "engine": "e@1",
    }  # fmt: skip


@pytest.mark.parametrize("wrong", ["closed", "full"])
def test_a_log_that_cannot_be_written_is_no_fault(wrong: str) -> None:
    """A closed pipe or a full disk behind the log raises nothing in whoever logs."""
    stream = Path("/dev/full").open("w") if wrong == "full" else io.StringIO()  # noqa: SIM115
    if wrong == "closed":
        stream.close()
    logs.configure(Logging(), stream)
    structlog.get_logger("b").error("redis_lost", error="x" * 100_000)
    if wrong == "full":
        with pytest.raises(OSError, match="space"):
            stream.close()
