"""Signatures: who made an engine can be proved, and what was changed, or signed by somebody else, is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from engines import bundle, signing
from engines.bundle import CALIBRATION, MANIFEST, MODEL, SIGNATURE, Bundle, Evidence
from engines.signing import SignatureError, Trust
from engines.store import Store
from pipeline import config
from pipeline.recovery import RedisUnreachableError
from pipeline.service import Line
from tests.support.engine import make_store, write_bundle
from tests.support.line import settings

NAME = "bright"


@pytest.fixture
def written(tmp_path: Path) -> Bundle:
    """A bundle that nobody has signed."""
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A private key, its public one beside it."""
    (tmp_path / "keys").mkdir()
    signing.keygen(tmp_path / "keys" / "line")
    return tmp_path / "keys" / "line"


def trust_in(*files: Path, required: bool = True) -> Trust:
    """Trust in these private keys' owners."""
    public = (signing.read_public_key(file.with_name(file.name + ".pub")) for file in files)
    return Trust(frozenset(public), required=required, source="keys")


def refusal(found: Bundle, trust: Trust = signing.ANYBODY) -> str:
    """Why a bundle is not trusted."""
    with pytest.raises(SignatureError) as caught:
        signing.check(found, trust)
    return str(caught.value)


def test_a_signed_bundle_is_known_by_its_signer(written: Bundle, key: Path) -> None:
    """The id of the key comes back at every check; the bundle's other files and its digest are as before."""
    signer = signing.sign(written, key)
    again = bundle.load(written.folder)
    assert again == written
    assert signing.check(again) == signing.check(again, trust_in(key)) == signer
    assert signer == signing.key_id(signing.read_public_key(key.with_name("line.pub")))
    assert {path.name for path in written.folder.iterdir()} == {*written.manifest.files, MANIFEST, SIGNATURE}
    assert [path.name for path in written.folder.parent.iterdir() if path.name.startswith(".")] == []


def test_keys_are_made_for_their_owner_alone(key: Path) -> None:
    """The private key is readable by its owner only, whatever the umask; the public one by all."""
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.with_name("line.pub").stat().st_mode & 0o044
    assert "PRIVATE" not in key.with_name("line.pub").read_text()


@pytest.mark.parametrize("there", ["line", "line.pub"])
def test_a_key_is_never_written_over_another(key: Path, there: str) -> None:
    """A lost private key cannot be had again."""
    (key.parent / {"line": "line.pub", "line.pub": "line"}[there]).unlink()
    before = (key.parent / there).read_bytes()
    with pytest.raises(SignatureError, match="never written over"):
        signing.keygen(key)
    assert (key.parent / there).read_bytes() == before


def test_an_unsigned_bundle_is_refused_only_where_a_signature_is_demanded(written: Bundle, key: Path) -> None:
    """The message names the command that signs."""
    assert signing.check(written) == ""
    assert signing.check(written, trust_in(key, required=False)) == ""
    assert "is not signed, and the config demands it: `dmdd engines sign" in refusal(written, trust_in(key))


def test_a_signature_by_an_unknown_key_is_refused(written: Bundle, key: Path, tmp_path: Path) -> None:
    """Wherever any key is trusted, others are not, demanded or not; the unknown key is named."""
    signing.keygen(tmp_path / "other")
    signer = signing.sign(written, tmp_path / "other")
    for required in (True, False):
        assert f"signed by the unknown key {signer}" in refusal(written, trust_in(key, required=required))
    assert signing.check(written, trust_in(key, tmp_path / "other")) == signer
    assert "unknown key" in refusal(written, Trust(required=True))


def test_a_signature_is_of_one_bundle_only(written: Bundle, key: Path, tmp_path: Path) -> None:
    """It cannot be taken to another engine, not even to the same one with another threshold."""
    signing.sign(written, key)
    later = bundle.with_threshold(written, tmp_path / "new", written.manifest.threshold, Evidence((0.5,)))
    assert signing.check(later) == ""
    (later.folder / SIGNATURE).write_bytes((written.folder / SIGNATURE).read_bytes())
    assert "changed after it was signed" in refusal(bundle.load(later.folder))


@pytest.mark.parametrize("name", [MANIFEST, MODEL])
def test_a_change_after_signing_is_noticed(written: Bundle, key: Path, name: str) -> None:
    """Of the manifest by the signature, of any other file by the manifest."""
    signing.sign(written, key)
    path = written.folder / name
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(bundle.BundleError, match=r"changed after it was signed|SHA-256 differs"):
        signing.check(bundle.load(written.folder), trust_in(key))


@pytest.mark.parametrize("at", [0, 31, 63])
def test_one_wrong_bit_of_a_signature_is_noticed(written: Bundle, key: Path, at: int) -> None:
    """In every part of it."""
    signing.sign(written, key)
    path = written.folder / SIGNATURE
    stored = json.loads(path.read_text())
    raw = bytearray.fromhex(stored["signature"])
    raw[at] ^= 1
    path.write_text(json.dumps({**stored, "signature": raw.hex()}))
    assert "not a signature of this bundle" in refusal(written)


def test_what_signs_something_else_signs_no_bundle(written: Bundle, key: Path) -> None:
    """A signature of the bare digest, made for another purpose with the same key, does not count."""
    signing.sign(written, key)
    path = written.folder / SIGNATURE
    bare = signing._private_key(key).sign(bytes.fromhex(written.digest)).hex()
    path.write_text(json.dumps({**json.loads(path.read_text()), "signature": bare}))
    assert "not a signature of this bundle" in refusal(written)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[" * 4000,
        b"x" * 5000,
        b'{"algorithm": "ed25519", "key": "zz", "signature": ""}',
        b'{"algorithm": "ed25519", "key": "00", "signature": "00"}',
        b'{"algorithm": "rsa", "key": "00", "signature": "00"}',
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_a_file_that_is_no_signature_is_refused(written: Bundle, raw: bytes) -> None:
    """Garbage is not taken for "unsigned": somebody meant it to be signed."""
    (written.folder / SIGNATURE).write_bytes(raw)
    assert str(written.folder / SIGNATURE) in refusal(written)


def test_trusted_keys_are_the_public_keys_of_a_folder(written: Bundle, key: Path, tmp_path: Path) -> None:
    """Private keys beside them are not read; no folder trusts nobody in particular; an empty one is a mistake."""
    signing.sign(written, key)
    assert signing.check(written, signing.load_trust(key.parent, required=True))
    assert signing.load_trust(None, required=False) == signing.ANYBODY
    (tmp_path / "empty").mkdir()
    for folder, required in ((tmp_path / "empty", False), (tmp_path / "none", True), (None, True)):
        with pytest.raises(SignatureError, match="no public keys"):
            signing.load_trust(folder, required=required)


def test_keys_of_another_kind_are_refused(written: Bundle, tmp_path: Path) -> None:
    """A key of another algorithm, with a password, or no key at all: the message names the remedy."""
    other = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "ec.pub").write_bytes(other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    private = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (private, b"nonsense", b""):
        (tmp_path / "private").write_bytes(content)
        (tmp_path / "private").chmod(0o600)
        with pytest.raises(SignatureError, match="dmdd engines keygen"):
            signing.sign(written, tmp_path / "private")
    (tmp_path / "text.pub").write_bytes(b"nonsense")
    for name in ("ec.pub", "text.pub"):
        with pytest.raises(SignatureError, match="dmdd engines keygen"):
            signing.read_public_key(tmp_path / name)
    assert not (written.folder / SIGNATURE).exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_private_key_that_others_may_read_is_not_used(written: Bundle, key: Path, mode: int) -> None:
    """What it signs proves nothing."""
    key.chmod(mode)
    with pytest.raises(SignatureError, match="chmod 600"):
        signing.sign(written, key)


def test_the_signature_is_plain_ed25519(written: Bundle, key: Path) -> None:
    """Any other program can check it: RFC 8032 over the documented bytes."""
    signing.sign(written, key)
    stored = json.loads((written.folder / SIGNATURE).read_text())
    public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(stored["key"]))
    public.verify(bytes.fromhex(stored["signature"]), b"dmdd.bundle.v1\0" + bytes.fromhex(written.digest))


class TestStore:
    """A store that trusts somebody."""

    def test_only_trusted_engines_are_loaded(self, written: Bundle, key: Path, tmp_path: Path) -> None:
        """An unsigned version can be added and signed in the store; before that it is not loaded, however asked."""
        store = Store(tmp_path / "store", trust_in(key))
        store.add(written.folder, NAME)
        store.activate(NAME, "1")
        for ask in (
            lambda: store.get(NAME),
            lambda: store.resolve(f"{NAME}@1"),
            lambda: store.resolve(str(written.folder)),
        ):
            with pytest.raises(SignatureError, match="is not signed"):
                ask()
        assert store.sign(NAME, "1", key) == signing.check(store.get(NAME), store.trust)
        assert store.get(NAME).digest == written.digest

    def test_a_signature_comes_along(self, written: Bundle, key: Path, tmp_path: Path) -> None:
        """A bundle that was signed elsewhere is signed in the store; one by an unknown key does not get in."""
        signing.sign(written, key)
        store = Store(tmp_path / "store", trust_in(key))
        assert signing.check(store.add(written.folder, NAME), store.trust)
        signing.keygen(tmp_path / "other")
        signing.sign(written, tmp_path / "other")
        with pytest.raises(SignatureError, match="unknown key"):
            store.add(written.folder, NAME)
        assert store.versions(NAME) == ["1"]

    def test_no_rollback_to_what_is_not_trusted(self, written: Bundle, key: Path, tmp_path: Path) -> None:
        """The line would refuse it: the active version stays."""
        store = Store(tmp_path / "store", trust_in(key))
        for version in ("1", "2"):
            store.add(written.folder, NAME)
            store.activate(NAME, version)
        store.sign(NAME, "2", key)
        with pytest.raises(SignatureError, match="is not signed"):
            store.rollback(NAME)
        assert store.active(NAME) == "2"

    def test_a_damaged_version_is_not_signed(self, written: Bundle, key: Path, tmp_path: Path) -> None:
        """A signature vouches for what was verified."""
        store = Store(tmp_path / "store")
        added = store.add(written.folder, NAME)
        (added.folder / CALIBRATION).write_bytes(b"{}")
        with pytest.raises(bundle.BundleError, match=r"calibration\.json is not named"):
            store.sign(NAME, "1", key)
        assert not (added.folder / SIGNATURE).exists()


class TestLine:
    """A line whose config demands signatures."""

    def test_a_demand_without_keys_is_no_config(self, tmp_path: Path) -> None:
        """Nothing could be checked: the message names the key that is missing."""
        with pytest.raises(config.ConfigError, match="needs trusted_keys"):
            config.parse(settings(tmp_path, "redis://127.0.0.1:1/0", engine={"require_signature": True}))

    def test_keys_lie_beside_the_config(self, tmp_path: Path) -> None:
        """A relative folder is relative to the file, as the store is; by default nobody is trusted in particular."""
        path = tmp_path / "line.toml"
        path.write_text('[engine]\ntrusted_keys = "keys"\n[cameras.cam1]\n')
        assert config.load(path).engine.trusted_keys == tmp_path / "keys"
        path.write_text("[cameras.cam1]\n")
        loaded = config.load(path).engine
        assert (loaded.trusted_keys, loaded.require_signature) == (None, False)

    def test_a_line_does_not_start_with_an_unsigned_engine(self, key: Path, tmp_path: Path) -> None:
        """It is refused before anything of it is compiled, and before Redis is asked for; signed, it gets further."""
        store = make_store(tmp_path)
        engine = {"store": str(store.root), "name": NAME, "trusted_keys": str(key.parent), "require_signature": True}
        wanted = settings(tmp_path, "redis://127.0.0.1:1/0", engine={**engine, "threads": 1, "max_batch": 1})
        wanted["redis"]["startup_timeout_s"] = 0
        for expected in (SignatureError, RedisUnreachableError):
            line = Line(config.parse(wanted))
            with pytest.raises(expected):
                line.start()
            line.stop()
            store.sign(NAME, "1", key)
