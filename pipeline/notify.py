"""systemd's notification protocol, sd_notify(3): one datagram per message, nothing where there is no systemd."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Final

PERIOD_S: Final = 1.0
"""By how much at least a start is extended at a time: a build tells of thousands of steps."""


class Notifier:
    """Tells systemd about the service. Does nothing unless ``NOTIFY_SOCKET`` is set."""

    def __init__(self) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._last_status = ""
        self._until = 0.0

    def ready(self) -> None:
        """The service takes frames."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The service is going down."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """The service has made progress."""
        self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> bool:
        """The start goes on and may take so much longer, whatever ``TimeoutStartSec`` says; from any thread.

        Only before :meth:`ready`: later it would put the watchdog off as well. And a start sends no
        ``WATCHDOG=1``: that arms the watchdog there and then, which otherwise begins with ``READY=1``
        (systemd, ``service_reset_watchdog``), and the next silence of ``WatchdogSec`` would be the end.

        Returns:
            Whether it was sent: not if it would add less than :data:`PERIOD_S` to what was sent before.
        """
        until = time.monotonic() + seconds
        if until < self._until + PERIOD_S:  # two threads may both get past it: one message more
            return False
        self._until = until
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")
        return True

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        if text != self._last_status:
            self._last_status = text
            self._send(f"STATUS={text}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        # A service manager that is gone is no reason to stop inspecting parts.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as channel,
        ):
            channel.sendto(message.encode(), self._address)
