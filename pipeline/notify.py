"""systemd's notification protocol, sd_notify(3): one datagram per message, nothing where there is no systemd."""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """Tells systemd about the service. Does nothing unless ``NOTIFY_SOCKET`` is set."""

    def __init__(self) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._last_status = ""

    def ready(self) -> None:
        """The service takes frames."""
        self._send("READY=1")

    def stopping(self) -> None:
        """The service is going down."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """The service has made progress."""
        self._send("WATCHDOG=1")

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
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
        ):
            channel.sendto(message.encode(), self._address)
