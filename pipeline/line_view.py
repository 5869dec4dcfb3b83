"""Which line a tool looks at, from a config or from a Redis address and a name; tools read Redis alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis

from pipeline import config as settings
from pipeline.config import ConfigError
from pipeline.records import Keys
from pipeline.recovery import RedisUnreachableError
from pipeline.redis_client import connect, connect_url
from pipeline.wire import CAMERA_ID

TIMEOUT_MS: Final = 2000


@dataclass(frozen=True)
class LineView:
    """A line in Redis.

    Attributes:
        connect: Makes a patient client.
        keys: Names of the line's keys.
        named: Cameras of the config; empty without one.
    """

    connect: Callable[[], redis.Redis]
    keys: Keys
    named: tuple[str, ...] = ()

    def cameras(self) -> tuple[str, ...]:
        """Cameras of the config; without one, those that have verdicts.

        Raises:
            RedisUnreachableError: if Redis does not answer.
        """
        if self.named:
            return self.named
        prefix = self.keys.verdicts("")
        try:
            with self.connect() as client:
                return tuple(sorted(key.decode()[len(prefix) :] for key in client.scan_iter(f"{prefix}*", count=1000)))
        except redis.RedisError as error:
            raise unreachable(error) from error


def view_of(config: Path | None, url: str, line: str) -> LineView:
    """The line of a config file, else the one with this name at this address.

    Raises:
        ConfigError: if the file, the address or the name cannot be used.
    """
    if config is not None:
        loaded = settings.load(config)
        name, own = loaded.line.name, loaded.redis
        return LineView(lambda: connect(own, name, timeout_ms=TIMEOUT_MS), Keys(name), tuple(loaded.cameras))
    if not CAMERA_ID.fullmatch(line):
        msg = f"--line {line!r}: 1 to 64 letters, digits, '_', '.', '-'"
        raise ConfigError(msg)
    return LineView(lambda: connect_url(url, TIMEOUT_MS), Keys(line))


def unreachable(error: redis.RedisError) -> RedisUnreachableError:
    """What a tool says that Redis does not answer."""
    return RedisUnreachableError(f"Redis does not answer: {error}; start it, or give --config or --redis")
