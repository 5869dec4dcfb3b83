"""What a check of ``dmdd doctor`` says: how it stands, what was found, and what to do."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Level(StrEnum):
    """How a check came out: fit, fit with a reservation, or not fit to run the line."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


class Check(msgspec.Struct, frozen=True):
    """One line of the doctor's report.

    Attributes:
        name: What was looked at.
        level: How it came out.
        found: What was found.
        remedy: What to do; empty where nothing is to be done.
    """

    name: str
    level: Level
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    """Fit."""
    return Check(name, Level.OK, found)


def warn(name: str, found: str, remedy: str) -> Check:
    """Fit, but."""
    return Check(name, Level.WARN, found, remedy)


def fail(name: str, found: str, remedy: str) -> Check:
    """Not fit."""
    return Check(name, Level.FAIL, found, remedy)


def lacking(name: str, found: str, remedy: str, *, needed: bool) -> Check:
    """Something is not there: a failure only where this line needs it."""
    return fail(name, found, remedy) if needed else warn(name, f"{found}; this line does not need it", remedy)
