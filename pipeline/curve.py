"""CURVE keys of line and cameras, and the gate that lets only known cameras in.

CURVE (https://rfc.zeromq.org/spec/26) encrypts a ZeroMQ connection and proves both ends' keys. The line is the server,
whoever binds. The handler of ZAP (https://rfc.zeromq.org/spec/27) says which keys may connect at all; that a key
sends as its own camera only is checked again for every frame, see ``pipeline/intake.py``.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import zmq
from zmq.auth import load_certificate
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from pipeline.wire import CAMERA_ID

DOMAIN: Final = "dmdd"
SERVER: Final = "server"
CAMERAS: Final = "cameras"
PUBLIC, SECRET = ".key", ".key_secret"
USER_ID: Final = "User-Id"
Z85: Final = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
CREDENTIALS: Final = "CREDENTIALS_DIRECTORY"


class CurveError(ValueError):
    """A key that cannot be used; the message names the file and what to do."""


@dataclass(frozen=True, repr=False)
class KeyPair:
    """A Curve25519 key pair, each key 40 characters of Z85."""

    public: bytes
    secret: bytes


@dataclass(frozen=True, repr=False)
class ServerKeys:
    """What a line needs for CURVE.

    Attributes:
        pair: Its own key.
        cameras: The public key that may send as each camera, Z85.
    """

    pair: KeyPair
    cameras: dict[str, str]


def generate(folder: Path, name: str, *, force: bool = False) -> KeyPair:
    """Write a new key pair: ``NAME.key_secret`` for its owner only, and ``NAME.key`` for all.

    Raises:
        CurveError: if there is one already and ``force`` is not set.
    """
    pair = KeyPair(*zmq.curve_keypair())
    secret, public = folder / f"{name}{SECRET}", folder / f"{name}{PUBLIC}"
    if public.exists() and not force:
        raise CurveError(_is_there(public))
    write_private({secret: _certificate(pair, secret=True)}, force=force)
    _write(public, _certificate(pair, secret=False), 0o644)
    return pair


def write_private(files: dict[Path, str], *, force: bool = False) -> None:
    """Write texts to files that only their owner can read.

    Raises:
        CurveError: if one of them is there and ``force`` is not set; then none is written.
    """
    there = next((file for file in files if file.exists()), None)
    if there is not None and not force:
        raise CurveError(_is_there(there))
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, text, 0o600)


def _is_there(file: Path) -> str:
    return f"{file} is there: whoever relies on it would be shut out by another; --force replaces it"


def _certificate(pair: KeyPair, *, secret: bool) -> str:
    """The text of a certificate as zmq.auth reads it."""
    lines = ["# CURVE secret key of DMDD Line: for its owner only." if secret else "# CURVE public key of DMDD Line."]
    lines += ["metadata", "curve", f'    public-key = "{pair.public.decode()}"']
    lines += [f'    secret-key = "{pair.secret.decode()}"'] if secret else []
    return "\n".join(lines) + "\n"


def _write(file: Path, text: str, mode: int) -> None:
    """Write a file whole, in place of another: never readable for more people than it is to be."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
        os.fchmod(stream.fileno(), mode)
        os.fsync(stream.fileno())
    temporary.replace(file)


def locate(file: Path) -> Path:
    """Where a secret lies: among the credentials that systemd hands to the service, else where it was said to be."""
    folder = os.environ.get(CREDENTIALS)
    handed = Path(folder) / file.name if folder else None
    return handed if handed is not None and handed.is_file() else file


def load_pair(file: Path) -> KeyPair:
    """Read a secret key and its public one; a credential of the same name comes first.

    Raises:
        CurveError: if it cannot be read, holds no secret key, its halves do not fit, or others may read it.
    """
    found = locate(file)
    _check_private(found, credential=found != file)
    public, secret = _read(found)
    if secret is None:
        msg = f"{found}: holds no secret key: give the *{SECRET} file that `dmdd keys` made"
        raise CurveError(msg)
    if zmq.curve_public(secret) != public:
        msg = f"{found}: its public key is not that of its secret key: make another with `dmdd keys`"
        raise CurveError(msg)
    return KeyPair(public, secret)


def _check_private(file: Path, *, credential: bool) -> None:
    """Refuse a secret that others may read."""
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
    except OSError as error:
        msg = f"{file}: {error.strerror}: `dmdd keys` makes keys; the config's curve.keys names their folder"
        raise CurveError(msg) from error
    # systemd opens a credential to the service by an ACL, whose mask shows where else the group's rights stand.
    if mode & (0o007 if credential else 0o077):
        msg = f"{file}: others can read it (mode {mode:o}): chmod 600 {file}; make another key if somebody may have"
        raise CurveError(msg)


def _read(file: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = load_certificate(file)
    except (OSError, ValueError) as error:
        msg = f"{file}: no CURVE key: {error}; `dmdd keys` makes keys"
        raise CurveError(msg) from error
    return _checked(public, file), None if secret is None else _checked(secret, file)


def _checked(key: bytes, source: object) -> bytes:
    try:
        if Z85.fullmatch(key) and len(z85.decode(key)) == 32:
            return key
    except (ValueError, OverflowError, zmq.ZMQError):
        pass
    msg = f"{source}: not a CURVE key: 40 characters of Z85, as `dmdd keys` writes them"
    raise CurveError(msg)


def load_public(source: str) -> bytes:
    """A public key: of a ``*.key`` file, or the 40 characters themselves.

    Raises:
        CurveError: if it is neither.
    """
    if Z85.fullmatch(source.encode()) and not Path(source).exists():
        return _checked(source.encode(), source)
    return _read(Path(source))[0]


def load_server(folder: Path) -> ServerKeys:
    """Read the line's key pair, and the public key of each camera, ``cameras/NAME.key``.

    Raises:
        CurveError: if one of them cannot be used, or there is no camera's key.
    """
    pair = load_pair(folder / f"{SERVER}{SECRET}")
    files = sorted((folder / CAMERAS).glob(f"*{PUBLIC}"))
    wrong = next((file for file in files if not CAMERA_ID.fullmatch(file.name.removesuffix(PUBLIC))), None)
    if wrong is not None or not files:
        msg = (
            f"{wrong}: its name is no camera id" if wrong else f"{folder / CAMERAS}: no camera's key (*{PUBLIC}) there"
        )
        raise CurveError(f"{msg}; `dmdd keys camera NAME` makes one")
    return ServerKeys(pair, {file.name.removesuffix(PUBLIC): _read(file)[0].decode() for file in files})


def serve(socket: zmq.Socket[bytes], keys: ServerKeys) -> None:
    """Make a socket the CURVE server of its connections; before it binds or connects."""
    socket.curve_server = True
    socket.curve_secretkey = keys.pair.secret
    socket.zap_domain = DOMAIN.encode()
    # Without a handler that answers nobody gets in; ZeroMQ's own default is to let everybody in then.
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def join(socket: zmq.Socket[bytes], own: KeyPair, server: bytes) -> None:
    """Make a socket a CURVE client of the line with this public key; before it binds or connects."""
    socket.curve_publickey, socket.curve_secretkey = own.public, own.secret
    socket.curve_serverkey = server


class Gate:
    """The ZAP handler: a thread of its own that lets in the cameras' keys and no other.

    Args:
        context: ZeroMQ context of the sockets that it guards.
        keys: Which keys.

    Raises:
        zmq.ZMQError: if the context has a handler already.
    """

    def __init__(self, context: zmq.Context[Any], keys: ServerKeys) -> None:
        self._known = frozenset(key.encode() for key in keys.cameras.values())
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.configure_curve_callback(DOMAIN, self)
        try:
            self._authenticator.start()
        except BaseException:
            self._authenticator.stop()
            raise

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a key, Z85, may connect; called by the handler's thread."""
        return key in self._known

    @property
    def alive(self) -> bool:
        """Whether the handler's thread runs; without it no camera can connect."""
        return self._authenticator.is_alive()

    def stop(self) -> None:
        """End the thread and release its sockets."""
        self._authenticator.stop()


def user_of(frame: zmq.Frame) -> str | None:
    """The public key, Z85, that the connection of a message part was let in with; None for none.

    The handler gives the key as user id, ZeroMQ attaches it to every part that the connection brings.
    """
    try:
        found = frame.get(USER_ID)
    except zmq.ZMQError:
        return None
    return found if isinstance(found, str) and found else None
