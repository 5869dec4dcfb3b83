"""A page of a real line, served in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.config import parse
from pipeline.page.auth import hashed
from pipeline.page.serve import server
from tests.support.line import settings, until
from tests.support.ports import free_port

PASSWORD = "open sesame"  # noqa: S105 - of a test's page
HASH = hashed(PASSWORD)


@contextmanager
def page(folder: Path, url: str, password_hash: str = HASH) -> Iterator[str]:
    """Serve the page; yield its address. Proves that every thread of it has ended."""
    port, before = free_port(), set(threading.enumerate())
    one = server(parse(settings(folder, url)), "127.0.0.1", port, password_hash)
    thread = threading.Thread(target=one.run)
    thread.start()
    until(lambda: one.started)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        one.should_exit = True
        thread.join(20)
    left = {one for one in set(threading.enumerate()) - before if not one.name.startswith(("AnyIO", "ThreadPool"))}
    assert not left, left
