"""``dmdd demo``: the whole product on one box, judged by reading Redis, not by trusting the line."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import redis
from rich.console import Console
from rich.live import Live
from rich.table import Table

from engines.store import Store
from pipeline.embedded import redis_server
from pipeline.records import Fields, Keys
from pipeline.tally import Tally

LINE: Final = "demo"
CAMERAS: Final = {"cam1": "washer", "cam2": "cap"}
ENGINE: Final = Path(__file__).parent.parent / "engines" / "demo"
READY_S: Final = 60.0
END_S: Final = 20.0
CONFIG: Final = """\
[line]
name = "{line}"
[[sockets]]
address = "{address}"
[engine]
store = "{store}"
name = "demo"
[redis]
url = "{url}"
heatmaps = "sampled"
frames = "sampled"
[spool]
path = "spool"
[cameras.cam1]
deadline_ms = 1000
[cameras.cam2]
deadline_ms = 1000
"""


class DemoError(RuntimeError):
    """The demo could not be run; the message shows what a process said."""


def run_demo(*, seconds: float, rate: float, json_file: Path | None = None) -> int:
    """Run the demo and print the summary.

    Args:
        seconds: How long the cameras send.
        rate: Parts a second of each camera.
        json_file: Where to write the figures.

    Returns:
        0 if every part that the cameras sent was answered exactly once, else 1.
    """
    console = Console()
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="dmdd-demo-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        url = stack.enter_context(redis_server(folder / "redis"))
        client = redis.Redis.from_url(url, socket_timeout=2)
        stack.callback(client.close)
        _clear(client)
        address = f"tcp://127.0.0.1:{_free_port()}"
        config = _prepare(folder, url, address)
        line = stack.enter_context(_process(folder / "line.log", "run", "--config", str(config)))
        _wait_ready(client, line, folder / "line.log")
        page = _show_page(stack, config, folder)
        _say_how_to_look(console, url, page)
        started = time.monotonic()
        cameras = [
            stack.enter_context(_process(folder / f"{name}.log", *_camera(name, product, address, seconds, rate)))
            for name, product in CAMERAS.items()
        ]
        tally = _watch(console, client, cameras, seconds + END_S)
        elapsed = time.monotonic() - started
    return _summary(console, tally, elapsed, json_file)


def _prepare(folder: Path, url: str, address: str) -> Path:
    """Put the demo engine into a store of its own and write a config."""
    store = Store(folder / "store")
    added = store.add(ENGINE, "demo")
    store.activate("demo", added.version)
    config = folder / "config.toml"
    config.write_text(CONFIG.format(line=LINE, address=address, store=store.root, url=url))
    return config


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _camera(name: str, product: str, address: str, seconds: float, rate: float) -> list[str]:
    seed = str(sum(name.encode()))
    return [
        "camera", f"sim:{product}", "--id", name, "--address", address, "--rate", str(rate), "--count",
        str(max(1, round(seconds * rate))), "--size", "256x256", "--seed", seed, "--defects", "0.15",
    ]  # fmt: skip


@contextmanager
def _process(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-m", "pipeline", *arguments], stdout=stream, stderr=stream)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _clear(client: redis.Redis) -> None:
    """Forget an earlier demo in the same Redis."""
    keys = list(client.scan_iter("dmdd:\\{" + LINE + "\\}:*", count=1000))
    if keys:
        client.delete(*keys)


def _wait_ready(client: redis.Redis, line: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + READY_S
    while not client.exists(Keys(LINE).heartbeat):
        if line.poll() is not None or time.monotonic() > end:
            msg = f"the line did not start:\n{log.read_text(errors='replace')[-3000:]}"
            raise DemoError(msg)
        time.sleep(0.05)


def _show_page(stack: ExitStack, config: Path, folder: Path) -> str:
    """Start the monitor page if its extra is installed; return its address, or nothing."""
    if find_spec("uvicorn") is None:
        return ""
    port = _free_port()
    listen = ("monitor", "--config", str(config), "--listen", f"127.0.0.1:{port}")
    stack.enter_context(_process(folder / "page.log", *listen))
    return f"http://127.0.0.1:{port}/"


def _say_how_to_look(console: Console, url: str, page: str) -> None:
    keys, shell = Keys(LINE), f"redis-cli -u {url}"
    if page:
        console.print(f"The line runs. Look at it in a browser: [bold]{page}[/]\n", highlight=False)
    console.print("Or from another terminal while it runs:\n", highlight=False)
    for command, what in (
        (f"{shell} XREVRANGE '{keys.rejects}' + - COUNT 3", "the last rejects, as a PLC gateway reads them"),
        (f"{shell} SUBSCRIBE '{keys.rejects}'", "rejects as they happen"),
        (f"{shell} HGETALL '{keys.latest('cam1')}'", "the last verdict of a camera"),
        (f"{shell} HGETALL '{keys.heartbeat}'", "the heartbeat; it goes away when the line dies"),
        (f"dmdd rejects --follow --line {LINE} --redis {url}", "the same with sequence and heartbeat checks"),
    ):
        console.print(f"  {command}\n      {what}", highlight=False, soft_wrap=True, markup=False)
    console.print()


def _watch(console: Console, client: redis.Redis, cameras: list[subprocess.Popen[bytes]], limit: float) -> Tally:
    """Read verdicts as they come until every camera's end of stream is confirmed."""
    keys = Keys(LINE)
    tally = Tally()
    positions: dict[Any, Any] = {keys.verdicts(name): "0" for name in CAMERAS}
    recent: list[Fields] = []
    end = time.monotonic() + limit
    with Live(console=console, refresh_per_second=4) as live:
        while time.monotonic() < end:
            _note_ends(client, tally)  # before reading, so that what was confirmed by then is read now
            replies: Any = client.xread(positions, count=1000, block=200)
            for key, records in replies or ():
                for identifier, raw in records:
                    positions[key.decode()] = identifier.decode()
                    fields = {name.decode(): value.decode() for name, value in raw.items()}
                    tally.add(fields)
                    recent = [*recent[-9:], fields]
            live.update(_table(recent, tally))
            ended = all(camera.poll() is not None for camera in cameras)
            if ended and len(tally.expected) == len(CAMERAS) and not replies:
                break
    tally.camera_failures = sum(bool(camera.poll()) for camera in cameras)
    return tally


def _note_ends(client: redis.Redis, tally: Tally) -> None:
    for name in CAMERAS:
        confirmed: Any = client.hgetall(Keys(LINE).eos(name))
        if confirmed:
            tally.expect(name, confirmed[b"session"].decode(), int(confirmed[b"parts"]))


def _table(recent: list[Fields], tally: Tally) -> Table:
    style = {"OK": "green", "NG": "red", "UNKNOWN": "yellow"}
    counts = "  ".join(f"{name} {tally.verdicts[name]}" for name in style)
    table = Table(title=f"{tally.parts} parts   {counts}", title_justify="left")
    for column in ("camera", "part", "verdict", "reason", "score", "threshold", "ms", "truth"):
        table.add_column(column, justify="right" if column in {"score", "threshold", "ms"} else "left")
    for fields in recent:
        verdict = fields["verdict"]
        table.add_row(
            fields["camera"],
            fields["part"],
            f"[{style[verdict]}]{verdict}[/]",
            fields["reason"],
            fields["score"],
            fields["threshold"],
            f"{int(fields['latency_us']) / 1000:.1f}",
            fields["truth"],
        )
    return table


def _summary(console: Console, tally: Tally, elapsed: float, json_file: Path | None) -> int:
    figures = {**tally.figures(), "seconds": round(elapsed, 2)}
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    table = Table(title="Summary, counted from the streams in Redis", show_header=False, title_justify="left")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), str(value))
    console.print(table)
    failed = tally.failures() + ([] if len(tally.expected) == len(CAMERAS) else ["a camera's end was not confirmed"])
    for failure in failed:
        console.print(f"[red]FAILED[/]: {failure}")
    if not failed:
        console.print("[green]Every part was answered exactly once.[/]")
    return 1 if failed else 0
