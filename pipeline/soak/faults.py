"""Every kind of fault of a soak, by name."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from pipeline.soak.camera_faults import CAMERA
from pipeline.soak.fault import Fault
from pipeline.soak.line_faults import BOX, ENGINE, LINE
from pipeline.soak.redis_faults import NETWORK, REDIS

FAULTS: Final = {fault.name: fault for fault in (*CAMERA, *NETWORK, *REDIS, *ENGINE, *LINE, *BOX)}
GROUPS: Final = ("camera", "network", "redis", "engine", "line", "box")


class UnknownFaultError(ValueError):
    """A name that no fault or group has; the message lists those that there are."""


def chosen(text: str) -> list[Fault]:
    """The faults that a comma-separated list of names and groups means; ``all`` and ``none`` too.

    Raises:
        UnknownFaultError: if there is no such name.
    """
    found: dict[str, Fault] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        members = [fault for fault in FAULTS.values() if word in {fault.name, fault.group, "all"}]
        if not members and word != "none":
            msg = f"no fault {word!r}; there are: all, none, {', '.join(GROUPS)}, {', '.join(FAULTS)}"
            raise UnknownFaultError(msg)
        found.update((fault.name, fault) for fault in members)
    return list(found.values())


def as_table(faults: Collection[Fault]) -> str:
    """A Markdown table of faults."""
    rows = [f"| `{fault.name}` | {fault.group} | {fault.what} | {fault.effect} |" for fault in faults]
    return "\n".join(["| fault | of | what goes wrong | seen by |", "|---|---|---|---|", *rows])
