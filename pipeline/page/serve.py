"""Runs the page under uvicorn until a signal comes."""

from __future__ import annotations

import socket

import structlog
import uvicorn

from pipeline.config import Config
from pipeline.page.app import Page
from pipeline.page.auth import Gatekeeper
from pipeline.page.follower import Follower
from pipeline.records import Keys
from pipeline.redis_client import connect

log = structlog.get_logger(__name__)


class PageServer(uvicorn.Server):
    """A uvicorn server that lets its event streams end when it is told to stop."""

    def __init__(self, config: uvicorn.Config, page: Page) -> None:
        super().__init__(config)
        self._page = page

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; browsers connect again by themselves."""
        self._page.stopping.set()
        await super().shutdown(sockets)


def server(config: Config, host: str, port: int, password_hash: str, *, secure: bool = False) -> PageServer:
    """A server that is not yet started.

    Args:
        config: Of the line.
        host: Address to listen on.
        port: Port to listen on.
        password_hash: See :class:`pipeline.page.auth.Gatekeeper`.
        secure: Whether cookies are for https alone.
    """
    line, cameras = config.line.name, tuple(config.cameras)
    follower = Follower(lambda: connect(config.redis, line, timeout_ms=1000), Keys(line), cameras)
    page = Page(line, follower, Gatekeeper(password_hash), secure=secure)
    settings = uvicorn.Config(
        page.app(), host, port, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=5,
        limit_concurrency=200,
    )  # fmt: skip
    return PageServer(settings, page)


def serve(config: Config, host: str, port: int, password_hash: str, *, secure: bool = False) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Raises:
        OSError: if the address cannot be had.
    """
    with socket.socket() as probe:  # uvicorn would end the process without a word of ours
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            msg = f"cannot listen at {host}:{port}: {error.strerror}; is it in use? choose another with --listen"
            raise OSError(msg) from error
    log.info("page_ready", url=f"http://{host}:{port}/", can_label=bool(password_hash))
    server(config, host, port, password_hash, secure=secure).run()
