"""The line at a glance, in a terminal: what the monitor page shows, as tables."""

from __future__ import annotations

import time
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.page.follower import Follower
from pipeline.records import Fields

STYLE: Final = {"OK": "green", "NG": "bold red", "UNKNOWN": "yellow"}
FIRST_S: Final = 3.0
REFRESH_S: Final = 0.5
COLUMNS: Final = ("camera", "parts/s", "yield", "OK", "NG", "UNKNOWN", "p50 ms", "p99 ms", "last", "score", "drift")


def watch(follower: Follower, name: str, console: Console) -> None:
    """Show the line until Ctrl-C.

    Args:
        follower: Of the line; not started yet.
        name: The line's.
        console: Where to.
    """
    follower.start()
    try:
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                live.update(dashboard(follower.state(), name), refresh=True)
                time.sleep(REFRESH_S)
    except KeyboardInterrupt:
        pass
    finally:
        follower.stop()


def once(follower: Follower, name: str, console: Console) -> bool:
    """Show the line as it is now; return whether it is alive.

    Args:
        follower: Of the line; not started yet.
        name: The line's.
        console: Where to.
    """
    follower.start()
    try:
        state = _settled(follower)
    finally:
        follower.stop()
    console.print(dashboard(state, name))
    return bool(state["alive"])


def _settled(follower: Follower) -> dict[str, Any]:
    """The state once the heartbeat's counter was seen to move, or has had its time to: a key alone proves nothing."""
    first, end = "", time.monotonic() + FIRST_S
    while True:
        state = follower.state()
        beat: Fields = state["heartbeat"]
        counter = beat.get("counter", "")
        if counter and not first:
            first, end = counter, time.monotonic() + 1 + 4 * int(beat.get("period_ms", "500")) / 1000
        if first and counter not in {first, ""}:
            return state
        if time.monotonic() > end:
            return {**state, "alive": False}
        time.sleep(0.05)


def dashboard(state: dict[str, Any], name: str) -> Group:
    """The tables of a state as :meth:`Follower.state` gives it."""
    return Group(_line(state, name), _cameras(state["cameras"]))


def _line(state: dict[str, Any], name: str) -> Table:
    beat: Fields = state["heartbeat"]
    table = Table(title=f"Line {name}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, value in (("state", _state(state)), *_health(beat)):
        table.add_row(label, value)
    return table


def _state(state: dict[str, Any]) -> Text:
    if state["redis"]:
        return Text(f"Redis does not answer: {state['redis']}", "bold red")
    if not state["alive"]:
        return Text("no heartbeat: the line is down or stuck; every part is a reject", "bold red")
    return Text(f"{state['heartbeat']['state']}, alive", "green")


def _health(beat: Fields) -> list[tuple[str, Text]]:
    """What the heartbeat says, in words; nothing without one."""
    if not beat:
        return []
    verdicts = (
        f"{beat['parts']} parts: {beat['ok']} OK, {beat['ng']} NG, {beat['unknown']} UNKNOWN, {beat['open']} open"
    )
    return [
        ("degraded", _alarm(beat.get("degraded", ""))),
        ("drift", _alarm(beat.get("drift", ""))),
        ("engines", Text(f"{beat['engines']}; {beat['lanes']} lanes")),
        ("swap", _swap(beat)),
        ("since start", Text(verdicts)),
        ("refused messages", _count(beat["refused"])),
        ("spool", _count(beat["spool_bytes"], " bytes wait for Redis")),
        ("lost records", _count(beat["lost"])),
    ]


def _alarm(text: str) -> Text:
    return Text(text.replace(",", ", "), "yellow") if text else Text("none", "green")


def _count(text: str, unit: str = "") -> Text:
    return Text("none", "green") if text == "0" else Text(f"{text}{unit}", "yellow")


def _swap(beat: Fields) -> Text:
    swap = beat.get("swap", "none")
    bad = swap in {"refused", "rolled_back"}
    words = " ".join(filter(None, (swap, beat.get("swap_engine", ""), beat.get("swap_detail", ""))))
    return Text(words, "yellow" if bad else "")


def _cameras(cameras: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="The last minute", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in {"camera", "last", "drift"} else "right")
    for name, one in cameras.items():
        last: Fields = one["last"] or {}
        table.add_row(
            name,
            f"{one['rate']:.1f}",
            "" if one["yield"] is None else f"{one['yield']:.1%}",
            *(str(one[verdict]) for verdict in STYLE),
            *("" if one[key] is None else f"{one[key]:.1f}" for key in ("p50", "p99")),
            _last(last),
            last.get("score", ""),
            _alarm(one["drift"].get("causes", "")) if one["drift"] else "",
        )
    return table


def _last(record: Fields) -> Text:
    if not record:
        return Text("no part yet")
    verdict = record["verdict"]
    why = "" if verdict == "OK" else f" {record['reason']}"
    return Text(f"{verdict}{why} {record['part'] or record['seq']}", STYLE.get(verdict, "yellow"))
