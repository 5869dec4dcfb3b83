"""A small service manager for the line, as systemd is: READY=1, watchdog, restart; and a witness of what it does."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import msgspec

from pipeline.soak.history import Event, Lost, Recorder, now

POLL_S: Final = 0.02
SAMPLE_S: Final = 1.0
ABORT_S: Final = 0.5
"""How long a line that is aborted has to die before it is killed; a stopped process needs the kill."""
START_S: Final = 60.0


class Sample(NamedTuple):
    """What the line holds.

    Attributes:
        life: Number of the process, from 1.
        t: Monotonic nanoseconds.
        rss_kib: Resident memory.
        fds, threads: Open file descriptors, threads.
    """

    life: int
    t: int
    rss_kib: int
    fds: int
    threads: int


class Supervisor:
    """Keeps one process running.

    Args:
        command: What to run.
        environment: Its environment; ``NOTIFY_SOCKET`` is added.
        folder: Where its log and the notify socket lie.
        recorder: Where its life is written down.
        watchdog_s: Longest time without ``WATCHDOG=1`` after ``READY=1``.
        restart_s: Pause before it is started again.

    Attributes:
        counts: ``started``, ``ready``, ``watchdog``, ``stopping``, ``exited``.
        samples: What it held, once a second.
        log: Its latest events, with the time at which each was read.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        recorder: Recorder,
        *,
        watchdog_s: float = 3.0,
        restart_s: float = 0.2,
    ) -> None:
        self._command, self._folder, self._recorder = list(command), folder, recorder
        self._watchdog_s, self._restart_s = watchdog_s, restart_s
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._notify.bind(str(folder / "notify"))
        self._notify.settimeout(POLL_S)
        self._environment = {**environment, "NOTIFY_SOCKET": str(folder / "notify")}
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._is_ready = False
        self._heard = 0.0
        self.counts: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self.log: deque[tuple[int, dict[str, Any]]] = deque(maxlen=20_000)
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Start the process and keep it running."""
        self._thread.start()

    @property
    def exit_status(self) -> int:
        """Of the last process, or 0 while it runs."""
        return (self._process.returncode or 0) if self._process is not None else 0

    @property
    def pid(self) -> int:
        """Of the running process; 0 while there is none."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else 0

    @property
    def ready(self) -> bool:
        """Whether the running process has said that it is ready."""
        return self._is_ready and self.pid != 0

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if there is one."""
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(number)

    def restart(self) -> None:
        """Stop the process with SIGTERM, as ``systemctl restart`` does; it is started again when it has ended."""
        self._record("stopping")
        self.signal(signal.SIGTERM)

    def stop(self, timeout: float = 30.0) -> int:
        """Stop for good; return the exit status of the last process."""
        if self._stopping:
            return self.exit_status
        self._stopping = True
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.signal(signal.SIGKILL)
            self._thread.join(10)
        self._notify.close()
        return self.exit_status

    def seen(self, event: str, since: int) -> bool:
        """Whether the line has logged an event since then."""
        return any(entry.get("event") == event for at, entry in list(self.log) if at >= since)

    def _run(self) -> None:
        while not self._stopping:
            self._live()
            if not self._stopping:
                time.sleep(self._restart_s)

    def _live(self) -> None:
        """One life of the process."""
        self._is_ready = False
        self._record("started")
        process = subprocess.Popen(self._command, env=self._environment, stderr=subprocess.PIPE)
        self._process = process
        if self._stopping:  # told so while it was being started
            process.terminate()
        assert process.stderr is not None  # noqa: S101 - it is a pipe
        reader = threading.Thread(target=self._read_log, args=(process.stderr,), name="line-log", daemon=True)
        reader.start()
        self._heard = time.monotonic() + START_S - self._watchdog_s
        next_sample = time.monotonic()
        while process.poll() is None:
            self._listen()
            if time.monotonic() - self._heard > self._watchdog_s:
                self._abort(process)
            if time.monotonic() >= next_sample:
                next_sample += SAMPLE_S
                self._sample(process.pid)
        reader.join(5)
        self._record("exited", str(process.returncode))

    def _listen(self) -> None:
        try:
            message = self._notify.recv(4096).decode()
        except TimeoutError:
            return
        if message == "READY=1":
            self._is_ready = True
            self._record("ready")
        if message in {"READY=1", "WATCHDOG=1"}:
            self._heard = time.monotonic()
        if message == "STOPPING=1":  # the watchdog is off from here on, as with systemd
            self._heard, self._is_ready = time.monotonic() + START_S, False

    def _abort(self, process: subprocess.Popen[bytes]) -> None:
        self._record("watchdog")
        process.send_signal(signal.SIGABRT)
        try:
            process.wait(ABORT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _record(self, what: str, detail: str = "") -> None:
        self.counts[what] += 1
        self._recorder.add(Event(what, now(), detail))

    def _read_log(self, stream: IO[bytes]) -> None:
        with stream, (self._folder / "line.log").open("ab", buffering=0) as copy:
            for line in stream:
                copy.write(line)
                try:
                    entry = msgspec.json.decode(line)
                except msgspec.DecodeError:  # a traceback, or the last words of a library
                    continue
                if isinstance(entry, dict):
                    self._note(entry)

    def _note(self, entry: dict[str, Any]) -> None:
        at, event = now(), str(entry.get("event", ""))
        self.log.append((at, entry))
        if event == "records_lost":
            self._recorder.add(Lost(int(entry.get("count", 0)), at))

    def _sample(self, pid: int) -> None:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            fds = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        except OSError:  # it has just ended
            return
        fields = dict(line.split(":", 1) for line in status.splitlines())
        if "VmRSS" in fields and self._is_ready:
            rss, threads = int(fields["VmRSS"].split()[0]), int(fields["Threads"])
            self.samples.append(Sample(self.counts["started"], now(), rss, fds, threads))
