"""Config and bundles under fuzzing: whatever stands in the files, one documented error comes of it, at little cost."""

from __future__ import annotations

import io
import json
import shutil
import tomllib
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines import bundle, signing
from engines.bundle import MANIFEST, PARITY, SIGNATURE, BundleError
from pipeline import config
from pipeline.config import ConfigError
from tests.support.engine import write_bundle
from tests.test_fuzz_wire import mutated

ROOT = Path(__file__).parent.parent
CONFIG: Final = (ROOT / "config.toml").read_bytes()
PEAK: Final = 64 << 20
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail where more is taken at once than any good file of this size asks for."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < PEAK
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good bundle, of which nothing is changed."""
    return write_bundle(tmp_path_factory.mktemp("good") / "bundle").folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files that are bad."""
    return tmp_path_factory.mktemp("work")


class TestConfig:
    """``config.load`` and ``config.parse``: a Config, or a ConfigError."""

    @settings(max_examples=150)
    @given(raw=mutated(CONFIG) | st.binary(max_size=200))
    @example(raw=b"x = " + b"[" * 20_000)
    @example(raw=b"[line]\nname = " + b"9" * 5000)
    def test_any_file(self, raw: bytes, work: Path) -> None:
        """Damaged text, text that is none, nesting without end."""
        (work / "config.toml").write_bytes(raw)
        with little_memory(), suppress(ConfigError):
            config.load(work / "config.toml")

    @settings(max_examples=150)
    @given(data=st.data())
    def test_any_value(self, data: st.DataObject) -> None:
        """A value of any kind in any place of a good config."""
        raw = tomllib.loads(CONFIG.decode())
        place: Any = raw
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
                break
            place = inner
        place[key] = data.draw(values)
        with little_memory(), suppress(ConfigError):
            config.parse(raw)


class TestBundles:
    """``bundle.load`` and all that reads a bundle's files: a bundle, or a BundleError."""

    @settings(max_examples=80)
    @given(data=st.data())
    def test_any_manifest(self, data: st.DataObject, good: Path, work: Path) -> None:
        """Damaged bytes, or a value of any kind in any place."""
        text = (good / MANIFEST).read_bytes()
        if data.draw(st.booleans()):
            manifest = json.loads(text)
            place = manifest
            while True:
                inner = place[key := data.draw(st.sampled_from(sorted(place)))]
                if not isinstance(inner, dict) or not inner or data.draw(st.booleans()):
                    break
                place = inner
            place[key] = data.draw(values)
            text = json.dumps(manifest).encode()
        else:
            text = data.draw(mutated(text))
        folder = fresh(good, work)
        (folder / MANIFEST).write_bytes(text)
        with little_memory():
            read(folder)

    @settings(max_examples=100)
    @given(data=st.data())
    def test_any_parity_file(self, data: st.DataObject, good: Path, work: Path) -> None:
        """Stored frames of any bytes, with a manifest that vouches for them: an attacker can compute a digest too."""
        with little_memory():
            read(forged(good, work, data.draw(mutated((good / PARITY).read_bytes()))))

    @pytest.mark.parametrize("shape", ["(1000000000000,)", "(65536, 65536, 64)", "(-1,)", "(" * 500, "(2, 2"])
    def test_frames_that_promise_too_much(self, good: Path, work: Path, shape: str) -> None:
        """An array whose head says terabytes, or nothing sensible, takes no memory."""
        with little_memory():
            read(forged(good, work, archive(shape)))

    def test_a_zip_bomb_is_not_unpacked(self, good: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A small file that unpacks to more than any stored frames is refused before it does."""
        packed = io.BytesIO()
        np.savez_compressed(packed, frames=np.zeros(100 << 20, np.uint8), scores=0, heatmaps=0)
        assert packed.tell() < 1 << 20
        folder = forged(good, work, packed.getvalue())
        monkeypatch.setattr(bundle, "MAX_PARITY_BYTES", 99 << 20)
        with little_memory(), pytest.raises(BundleError, match="unpack"):
            bundle.load(folder).parity()

    @settings(max_examples=100)
    @given(
        raw=st.binary(max_size=300) | mutated(b'{"algorithm": "ed25519", "key": "' + b"0" * 64 + b'", "signature": ""}')
    )
    def test_any_signature(self, raw: bytes, good: Path, work: Path) -> None:
        """A signature file of any bytes."""
        folder = fresh(good, work)
        (folder / SIGNATURE).write_bytes(raw)
        with little_memory():
            read(folder)


def fresh(good: Path, work: Path) -> Path:
    """A copy of the good bundle."""
    folder = work / "bundle"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(good, folder))


def forged(good: Path, work: Path, parity: bytes) -> Path:
    """A bundle with other stored frames, and their digest in its manifest."""
    folder = fresh(good, work)
    (folder / PARITY).write_bytes(parity)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["files"][PARITY] = bundle._digest(folder / PARITY)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def archive(shape: str) -> bytes:
    """Stored frames whose head says this shape."""
    packed = io.BytesIO()
    head = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    with zipfile.ZipFile(packed, "w") as made:
        for name in ("frames.npy", "scores.npy", "heatmaps.npy"):
            made.writestr(name, b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(100))
    return packed.getvalue()


def read(folder: Path) -> None:
    """Read everything that a bundle has; the one documented error is right too."""
    with suppress(BundleError, signing.SignatureError):
        found = bundle.load(folder)
        signing.check(found, signing.ANYBODY)
        found.evidence()
        found.parity()
