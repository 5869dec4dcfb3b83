"""Who vouches for a bundle: an Ed25519 signature (RFC 8032) of its manifest, and the keys that are trusted.

The manifest holds the SHA-256 of every other file, so signing its digest signs the whole bundle. The signature lies
beside it, in ``signature.json``, and can be added later: it changes no other file, and not the bundle's digest.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from engines.bundle import SIGNATURE, Bundle, BundleError, sync_folder

ALGORITHM: Final = "ed25519"
CONTEXT: Final = b"dmdd.bundle.v1\0"
"""Stands before what is signed, so that a signature made for anything else is none for a bundle."""
PUBLIC: Final = ".pub"
MAX_BYTES: Final = 4096
"""No key and no signature is larger."""


class SignatureError(BundleError):
    """A signature, or the lack of one, that forbids a bundle's use; or a key that is none."""


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``signature.json``: the algorithm, and public key and signature as hexadecimal digits."""

    algorithm: str
    key: str
    signature: str


@dataclass(frozen=True)
class Trust:
    """Whose bundles may be run.

    Attributes:
        keys: Raw public keys, 32 bytes each. Where there are any, a signature must be by one of them.
        required: Whether a bundle without a signature is refused.
        source: Where the keys come from, for messages.
    """

    keys: frozenset[bytes] = frozenset()
    required: bool = False
    source: str = "engine.trusted_keys"


ANYBODY: Final = Trust()
"""No signature is demanded; one that is there must still be whole."""


def load_trust(folder: Path | None, *, required: bool) -> Trust:
    """Read every public key ``*.pub`` in ``folder``; None for no keys.

    Raises:
        SignatureError: if a file is no public key, or a signature is demanded and there is no key to check it with.
    """
    files = sorted(folder.glob(f"*{PUBLIC}")) if folder is not None else []
    trust = Trust(frozenset(map(read_public_key, files)), required, str(folder or Trust.source))
    if not trust.keys and (required or folder is not None):
        msg = f"{trust.source}: no public keys (*{PUBLIC}) there: copy the public key that `dmdd engines keygen` made"
        raise SignatureError(msg)
    return trust


def key_id(public: bytes) -> str:
    """How a public key is called: the first 16 hexadecimal digits of its SHA-256."""
    return sha256(public).hexdigest()[:16]


def keygen(path: Path) -> str:
    """Write a new private key to ``path``, for its owner only, and its public key beside it; return its id.

    Raises:
        SignatureError: if either file is there: a key is never written over another.
    """
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    try:
        _create(path.with_name(path.name + PUBLIC), public, 0o644)
        _create(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    except FileExistsError as error:
        msg = f"{error.filename} is there: a key is never written over another; choose another name"
        raise SignatureError(msg) from error
    return key_id(_raw(key.public_key()))


def read_public_key(path: Path) -> bytes:
    """The raw 32 bytes of the public key in a PEM file.

    Raises:
        SignatureError: if it is no Ed25519 public key.
    """
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        msg = f"{path}: not a public key: take the *{PUBLIC} file that `dmdd engines keygen` made"
        raise SignatureError(msg) from error
    if not isinstance(key, Ed25519PublicKey):
        msg = f"{path}: a public key, but not of {ALGORITHM}; make one with `dmdd engines keygen`"
        raise SignatureError(msg)
    return _raw(key)


def sign(bundle: Bundle, key_file: Path) -> str:
    """Sign a verified bundle with the private key in ``key_file``; return the key's id.

    The signature is written whole or not at all, and takes the place of an earlier one.

    Raises:
        SignatureError: if the file is no Ed25519 private key, or others may read it.
    """
    key = _private_key(key_file)
    public = _raw(key.public_key())
    signature = Signature(ALGORITHM, public.hex(), key.sign(_signed(bundle)).hex())
    text = msgspec.json.format(msgspec.json.encode(signature), indent=2) + b"\n"
    # Not inside the bundle: a reader would find a file there that the manifest does not name.
    handle, temporary = tempfile.mkstemp(prefix=".signature-", dir=bundle.folder.parent)
    with os.fdopen(handle, "wb") as stream:
        stream.write(text)
        stream.flush()
        os.fchmod(stream.fileno(), 0o644)
        os.fsync(stream.fileno())
    Path(temporary).replace(bundle.folder / SIGNATURE)
    sync_folder(bundle.folder)
    return key_id(public)


def check(bundle: Bundle, trust: Trust = ANYBODY) -> str:
    """Check the signature of a verified bundle; return the id of the key that signed it, empty if none did.

    Raises:
        SignatureError: if there is none and one is demanded, if it is not of this bundle, or if its key is not
            among the trusted ones.
    """
    path = bundle.folder / SIGNATURE
    if not path.exists():
        if trust.required:
            what = f"{bundle.label} is not signed, and the config demands it"
            msg = f"{what}: `dmdd engines sign {bundle.label} --key FILE`, or take a signed one"
            raise SignatureError(msg)
        return ""
    public = _verify(path, bundle)
    if (trust.keys or trust.required) and public not in trust.keys:
        msg = (
            f"{bundle.label} is signed by the unknown key {key_id(public)}: if it may be trusted, put its public key"
            f" into {trust.source}; else do not use this engine"
        )
        raise SignatureError(msg)
    return key_id(public)


def _verify(path: Path, bundle: Bundle) -> bytes:
    """The public key that a signature names and fits."""
    try:
        found = msgspec.json.decode(_read(path), type=Signature)
        if found.algorithm != ALGORITHM:
            msg = f"{path}: algorithm {found.algorithm!r}, this version of dmdd knows {ALGORITHM}: upgrade dmdd"
            raise SignatureError(msg)
        public = bytes.fromhex(found.key)
        Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(found.signature), _signed(bundle))
    except InvalidSignature as error:
        msg = f"{path}: not a signature of this bundle: it was changed after it was signed; copy it, or sign it, again"
        raise SignatureError(msg) from error
    except SignatureError:
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        msg = f"{path}: not a signature ({error}); copy the bundle, or sign it, again"
        raise SignatureError(msg) from error
    return public


def _signed(bundle: Bundle) -> bytes:
    return CONTEXT + bytes.fromhex(bundle.digest)


def _private_key(path: Path) -> Ed25519PrivateKey:
    if path.stat().st_mode & 0o077:
        msg = f"{path}: others may read this private key; `chmod 600 {path}`, and make a new one if they could have"
        raise SignatureError(msg)
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        msg = f"{path}: not a private key without a password; make one with `dmdd engines keygen`"
        raise SignatureError(msg) from error
    if not isinstance(key, Ed25519PrivateKey):
        msg = f"{path}: a private key, but not of {ALGORITHM}; make one with `dmdd engines keygen`"
        raise SignatureError(msg)
    return key


def _raw(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def _read(path: Path) -> bytes:
    with path.open("rb") as stream:
        found = stream.read(MAX_BYTES + 1)
    if len(found) > MAX_BYTES:
        msg = f"larger than {MAX_BYTES} bytes"
        raise ValueError(msg)
    return found


def _create(path: Path, content: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(content)
