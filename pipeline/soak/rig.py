"""Everything that a soak runs: cameras, line, two Redis servers, readers, each a process; proxies between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import redis

from pipeline.records import Keys
from pipeline.soak import engine
from pipeline.soak.history import End, History, Recorder, load, now, read
from pipeline.soak.injector import Control
from pipeline.soak.line import CONTROL
from pipeline.soak.proxy import Proxy, free_port
from pipeline.soak.reader import Streams, collect
from pipeline.soak.servers import Servers, until
from pipeline.soak.supervisor import Supervisor
from pipeline.soak.tail import Tail

LINE: Final = "soak"
MAX_GAP: Final = 50
LANES: Final = 2
END_S: Final = 60.0
CONFIG: Final = """\
[line]
name = "{line}"
[[sockets]]
address = "tcp://127.0.0.1:{port}"
[limits]
max_frame_bytes = 65536
[engine]
store = "store"
name = "{engine}"
lanes = {lanes}
max_batch = 4
threads = 1
timeout_ms = 1000
[swap]
watch_s = 0.2
probation_s = 5.0
[redis]
url = "redis://127.0.0.1:{redis}/0"
timeout_ms = 100
heartbeat_ms = 100
verdicts_maxlen = 10000000
rejects_maxlen = 10000000
blob_ttl_s = 60
[spool]
path = "spool"
"""
CAMERA: Final = """\
[cameras.{name}]
deadline_ms = {deadline_ms}
max_gap = {max_gap}
"""


@dataclass(frozen=True)
class Setup:
    """What is run.

    Attributes:
        folder: Where everything lies; made.
        cameras: How many.
        rate: Frames a second of each.
        seed: Of everything that is random.
        deadline_ms: Of every camera.
        watchdog_s: As systemd's ``WatchdogSec``.
    """

    folder: Path
    cameras: int = 4
    rate: float = 20.0
    seed: int = 0
    deadline_ms: float = 800.0
    watchdog_s: float = 3.0

    @property
    def names(self) -> list[str]:
        """The camera ids."""
        return [f"cam{number}" for number in range(1, self.cameras + 1)]


class Mark(NamedTuple):
    """How things stood before a fault began.

    Attributes:
        t: Monotonic nanoseconds.
        counts: Of the supervisor.
        refused, engines: Of the heartbeat.
        net: Counts of all proxies together.
        box: Counts of the rig.
    """

    t: int
    counts: Counter[str]
    refused: int
    engines: str
    net: Counter[str]
    box: Counter[str]


class CameraProcess:
    """One camera that takes orders, in a process of its own; a killed one is followed by another.

    Args:
        name: Camera id.
        port: Where it connects to.
        setup: What is run.
    """

    def __init__(self, name: str, port: int, setup: Setup) -> None:
        self.name, self._port, self._setup = name, port, setup
        self._lives = 0
        self._process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """Start a process: a new session."""
        self._lives += 1
        seed = self._setup.seed * 1_000_003 + sum(self.name.encode()) * 101 + self._lives
        options = {
            "camera": self.name, "address": f"tcp://127.0.0.1:{self._port}", "rate": self._setup.rate, "seed": seed,
            "out": self._setup.folder / f"{self.name}-{self._lives:03}.jsonl",
        }  # fmt: skip
        self._process = subprocess.Popen(_module("camera", options), stdin=subprocess.PIPE)

    def order(self, do: str, n: int = 1) -> None:
        """Tell it to do something."""
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, "n": n}).encode() + b"\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_end(self) -> End | None:
        """The last end of a session that it has written down."""
        files = sorted(self._setup.folder.glob(f"{self.name}-*.jsonl"))
        ends = [item for item in read(files[-1]) if isinstance(item, End)] if files else []
        return ends[-1] if ends else None


class Rig:
    """The whole set-up, running: every camera has been heard of in Redis.

    Args:
        setup: What is run.

    Raises:
        FileExistsError: if the folder is not empty.
        MissingExtraError: where packages of the extra ``soak`` are missing.
        TimeoutError: if the line does not start.

    Attributes:
        counts: What faults count that nobody else does.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.counts = setup, Counter[str]()
        self.exit_status = 0
        setup.folder.mkdir(parents=True, exist_ok=True)
        if any(setup.folder.iterdir()):
            msg = f"{setup.folder} is not empty: give a soak a folder of its own"
            raise FileExistsError(msg)
        self._control_file = setup.folder / "control.json"
        self._control = Control()
        self._control.write(self._control_file)
        with ExitStack() as stack:
            self._build(stack)
            self._stack = stack.pop_all()

    def _build(self, stack: ExitStack) -> None:
        setup, folder = self.setup, self.setup.folder
        self.versions = engine.Versions(folder / "store")
        self.servers = Servers(folder)
        stack.callback(self.servers.close)
        port = free_port()
        self._write_config(port)
        recorder = stack.enter_context(Recorder(folder / "supervisor.jsonl"))
        environment = {
            **os.environ,
            CONTROL: str(self._control_file),
            "OMP_NUM_THREADS": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        command = [sys.executable, "-m", "pipeline.soak.line", "run", "--config", str(folder / "config.toml")]
        self.supervisor = Supervisor(command, environment, folder, recorder, watchdog_s=setup.watchdog_s)
        self.supervisor.start()
        stack.callback(self._stop_line)
        self.streams = Streams(LINE, [*setup.names, *(f"stranger-{name}" for name in setup.names)])
        url = f"redis://127.0.0.1:{self.servers.view.port}/0"
        options = {"url": url, "line": LINE, "cameras": ",".join(self.streams.cameras), "out": folder}
        self._reader = subprocess.Popen(_module("reader", options))
        stack.callback(self._stop_reader)
        self.tail = Tail(folder / "read.jsonl")
        until(lambda: self.supervisor.ready, "the line is ready", 60)
        self.net: dict[str, Proxy] = {}
        self.cameras: dict[str, CameraProcess] = {}
        for name in setup.names:
            self.net[name] = proxy = Proxy(port)
            stack.callback(proxy.close)
            self.cameras[name] = camera = CameraProcess(name, proxy.port, setup)
            stack.callback(camera.close)
        until(lambda: all(self.tail.since(0, name) for name in setup.names), "records of every camera")

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def _write_config(self, port: int) -> None:
        text = CONFIG.format(line=LINE, port=port, lanes=LANES, engine=engine.NAME, redis=self.servers.line.port)
        for name in self.setup.names:
            text += CAMERA.format(name=name, deadline_ms=self.setup.deadline_ms, max_gap=MAX_GAP)
        (self.setup.folder / "config.toml").write_text(text)

    # What faults do.

    def set_engine(self, fault: str = "") -> None:
        """Say what goes wrong in the line's lanes from now on: nothing, or a fault of :class:`Control`."""
        self._control = msgspec.structs.replace(self._control, engine=fault)
        self._control.write(self._control_file)

    def set_clock(self, seconds: float = 0.0) -> None:
        """Say how far the line's wall clock is off from now on."""
        self._control = msgspec.structs.replace(self._control, clock_s=seconds)
        self._control.write(self._control_file)

    def client(self) -> redis.Redis:
        """A patient client of the primary."""
        return redis.Redis(port=self.servers.view.port, socket_timeout=5)

    # What is seen of it.

    def mark(self) -> Mark:
        """How things stand."""
        engines, refused = self.heartbeat().get("engines", ""), self.refused()
        return Mark(now(), self.supervisor.counts.copy(), refused, engines, self._net_counts(), self.counts.copy())

    def heartbeat(self) -> dict[str, str]:
        """The heartbeat; empty where there is none, or no Redis."""
        try:
            with self.client() as client:
                fields: Any = client.hgetall(Keys(LINE).heartbeat)
        except redis.RedisError:
            return {}
        return {name.decode(): value.decode() for name, value in fields.items()}

    def refused(self) -> int:
        """Messages that the line has refused since it started."""
        return int(self.heartbeat().get("refused", 0))

    def grown(self, mark: Mark, name: str) -> int:
        """By how much a count of the proxies has grown."""
        return self._net_counts()[name] - mark.net[name]

    def at_rest(self) -> bool:
        """Whether the line runs with all its lanes and the store's engine, and has nothing spooled."""
        beat = self.heartbeat()
        wanted = {"spool_bytes": "0", "lanes": str(LANES), "engines": f"{engine.NAME}@{self.versions.active}"}
        return self.supervisor.ready and wanted.items() <= beat.items()

    def settle(self, seconds: float = 40.0) -> None:
        """Wait until the line has recovered, and says so by a heartbeat of this moment.

        Raises:
            TimeoutError: if it does not.
        """
        earlier = self.heartbeat().get("counter")
        until(lambda: self.at_rest() and self.heartbeat().get("counter") != earlier, "the line has recovered", seconds)

    def _net_counts(self) -> Counter[str]:
        return sum((proxy.counts for proxy in (*self.net.values(), self.servers.line)), Counter())

    # The end.

    def finish(self) -> bool:
        """Let every camera end its session and wait until all is at rest; say whether that was reached."""
        for camera in self.cameras.values():
            camera.order("finish")
        try:
            until(self._all_ended, "every session is confirmed", END_S)
            until(self._all_written, "everything is written", END_S)
        except TimeoutError:
            return False
        return True

    def shut(self) -> None:
        """End the processes, the line cleanly, and write down what Redis holds."""
        for camera in self.cameras.values():
            camera.close()
        time.sleep(0.5)  # for what the reader has not yet read
        self._stop_line()
        self._stop_reader()
        self.collect()

    def collect(self) -> None:
        """Write down what Redis holds now."""
        with self.client() as client:
            collect(client, self.streams, self.setup.folder)

    def history(self) -> History:
        """All that was recorded, when all is over."""
        return load(self.setup.folder, dict.fromkeys(self.setup.names, self.setup.deadline_ms))

    def history_so_far(self) -> History:
        """All that was recorded until now."""
        began = now()
        self.collect()
        return self.history().before(began)

    def _all_ended(self) -> bool:
        self.tail.refresh()
        ends = [camera.last_end() for camera in self.cameras.values()]
        return all(end is not None and self.tail.ended.get(end.camera) == end.session for end in ends)

    def _all_written(self) -> bool:
        return self.at_rest() and self.heartbeat().get("open") == "0"

    def _stop_line(self) -> None:
        self.exit_status = self.supervisor.stop()

    def _stop_reader(self) -> None:
        self._reader.send_signal(signal.SIGTERM)
        try:
            self._reader.wait(10)
        except subprocess.TimeoutExpired:
            self._reader.kill()
            self._reader.wait()


def _module(name: str, options: dict[str, Any]) -> list[str]:
    given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [sys.executable, "-m", f"pipeline.soak.{name}", *given]
