"""The engine store: numbered versions of named engines, one of them active, with a way back.

Layout: ``<root>/<name>/<version>/`` holds a bundle; ``<root>/<name>/history`` lists activated versions,
the last line being the active one; ``<root>/<name>/<version>.gate-*.json`` are reports about a version.
Every change is one atomic rename, so a reader needs no lock, and a writer that is killed leaves the old state.
Writers, one at a time, hold a lock on ``<root>/.lock``; the system lets go of it when they die.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from engines import bundle, signing
from engines.bundle import Bundle, BundleError, sync_folder
from engines.signing import ANYBODY, Trust

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
HISTORY: Final = "history"
LOCK: Final = ".lock"
UNFINISHED: Final = (".incoming-*", ".history-*", ".removing-*", ".signature-*", ".gate-*")
"""What a writer that was killed leaves behind; whoever has the lock may remove it."""
POLL_S: Final = 0.02


class StoreError(ValueError):
    """An engine that the store does not have, or a name it cannot take."""


class Superseded(StoreError):
    """The active version is not the one that the caller went by: somebody has chosen another meanwhile."""


class Store:
    """Engines under one folder. Any number of processes may read and write.

    Args:
        root: The folder.
        trust: Whose engines may be loaded from it.
        wait_s: How long to wait for another writer.
    """

    def __init__(self, root: Path, trust: Trust = ANYBODY, *, wait_s: float = 60.0) -> None:
        self.root = root
        self.trust = trust
        self._wait_s = wait_s

    def names(self) -> list[str]:
        """Names of all engines in the store."""
        if not self.root.is_dir():
            return []
        return sorted(child.name for child in self.root.iterdir() if child.is_dir() and NAME.fullmatch(child.name))

    def versions(self, name: str) -> list[str]:
        """Versions of one engine, oldest first."""
        folder = self._folder(name)
        found = (child.name for child in folder.iterdir() if child.name.isdigit()) if folder.is_dir() else ()
        return sorted(found, key=int)

    def history(self, name: str) -> list[str]:
        """Versions in the order in which they were activated; the last one is active."""
        try:
            return (self._folder(name) / HISTORY).read_text().split()
        except FileNotFoundError:
            return []

    def active(self, name: str) -> str | None:
        """The active version of an engine, or None."""
        history = self.history(name)
        return history[-1] if history else None

    def get(self, name: str, version: str | None = None) -> Bundle:
        """Load and verify a version, the active one where none is named.

        Raises:
            StoreError: if there is no such engine or version.
            BundleError: if the bundle fails verification, or is not signed by whom the store trusts.
        """
        version = version or self.active(name)
        if version is None or version not in self.versions(name):
            have = ", ".join(self.versions(name)) or "none"
            msg = f"engine {name!r}: no {'active version' if version is None else f'version {version}'} in {self.root}"
            raise StoreError(f"{msg} (versions: {have}; engines: {', '.join(self.names()) or 'none'})")
        return self._trusted(bundle.load(self._folder(name) / version, version, name))

    def resolve(self, reference: str) -> Bundle:
        """Load ``name``, ``name@version`` or the path of a bundle's folder.

        Raises:
            StoreError: if it is none of these.
            BundleError: if the bundle fails verification, or is not signed by whom the store trusts.
        """
        path = Path(reference)
        if (path / bundle.MANIFEST).is_file():
            return self._trusted(bundle.load(path))
        name, _, version = reference.partition("@")
        return self.get(name, version or None)

    def add(self, source: Path, name: str) -> Bundle:
        """Copy the bundle in ``source`` into the store as the next version of ``name``; it is not yet active.

        It may still lack a signature, even where one is demanded: only what is loaded needs it.

        Raises:
            BundleError: if the source fails verification, or is signed by a key that the store does not trust.
            StoreError: if another writer does not come to an end.
        """
        folder = self._folder(name)
        signing.check(bundle.load(source), Trust(self.trust.keys, source=self.trust.source))
        self.root.mkdir(parents=True, exist_ok=True)
        with self._writing():
            folder.mkdir(exist_ok=True)
            self._sweep(folder)
            version = str(max((int(v) for v in self.versions(name)), default=0) + 1)
            staging = Path(tempfile.mkdtemp(prefix=".incoming-", dir=folder))
            try:
                shutil.copytree(source, staging, dirs_exist_ok=True)
                staging.chmod(0o755)
                copied = bundle.load(staging)
                for path in staging.iterdir():
                    _sync_file(path)
                sync_folder(staging)
                staging.rename(folder / version)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            sync_folder(folder)
        return Bundle(folder / version, copied.manifest, copied.digest, version, name)

    def activate(self, name: str, version: str, *, expected: str | None = None) -> None:
        """Make ``version`` the active one, if it is not. The caller has passed it through the parity gate.

        Args:
            name: The engine.
            version: The version.
            expected: Only if this version is active; None for whichever is.

        Raises:
            Superseded: if another version than ``expected`` is active; nothing has changed then.
            StoreError: if there is no such version, or another writer does not come to an end.
        """
        self._folder(name)
        with self._writing():
            self._expect(name, expected)
            if version not in self.versions(name):
                have = ", ".join(self.versions(name)) or "none"
                msg = f"engine {name!r} has no version {version} (versions: {have})"
                raise StoreError(msg)
            if version != self.active(name):
                self._write_history(name, [*self.history(name), version])

    def rollback(self, name: str, *, expected: str | None = None, to: str | None = None) -> str:
        """Take the active version out of the history, so that the one before is active again; return that one.

        Args:
            name: The engine.
            expected: Only if this version is active; None for whichever is.
            to: The version to go back to, where it need not be the one before: it is then put in place of the active
                one. None for the one before.

        Raises:
            Superseded: if another version than ``expected`` is active; nothing has changed then.
            StoreError: if there is none to go back to, or another writer does not come to an end.
            BundleError: if it fails verification; the active one stays.
        """
        self._folder(name)
        with self._writing():
            self._expect(name, expected)
            left = self.history(name)[:-1]
            if not left and to is None:
                msg = f"engine {name!r}: nothing to roll back to"
                raise StoreError(msg)
            back = to or left[-1]
            self.get(name, back)
            self._write_history(name, left if left[-1:] == [back] else [*left, back])
            return back

    def sign(self, name: str, version: str, key_file: Path) -> str:
        """Sign a version with a private key; return the key's id. A signature that is there is replaced.

        Raises:
            StoreError: if there is no such version, or another writer does not come to an end.
            BundleError: if it fails verification, or the key is none.
        """
        self._folder(name)
        with self._writing():
            return signing.sign(Store(self.root).get(name, version), key_file)

    def prune(self, name: str, keep: int, pinned: Collection[str] = (), *, dry_run: bool = False) -> list[str]:
        """Remove all but the newest ``keep`` versions, the active one, the one before it and ``pinned`` ones.

        Args:
            name: The engine.
            keep: How many of the newest versions stay, at least 1: so a number is never given twice.
            pinned: Versions that stay, whatever else.
            dry_run: Remove nothing.

        Returns:
            The versions that are removed, oldest first.

        Raises:
            StoreError: if ``keep`` is less than 1, or another writer does not come to an end.
        """
        folder = self._folder(name)
        if keep < 1:
            msg = f"keep {keep}: at least the newest version stays"
            raise StoreError(msg)
        with self._writing():
            if folder.is_dir() and not dry_run:
                self._sweep(folder)
            versions, history = self.versions(name), self.history(name)
            stay = {*versions[-keep:], *history[-2:], *pinned}
            gone = [version for version in versions if version not in stay]
            if gone and not dry_run:
                # History first: killed in between, the line has no way back to a version that is only half there.
                self._write_history(name, _without(history, gone))
                for version in gone:
                    self._remove(folder, version)
            return gone

    def keep_report(self, bundle_: Bundle, kind: str, content: bytes) -> Path | None:
        """Keep a report about a version beside it, in place of an earlier one of the same kind.

        Args:
            bundle_: The version, as it was loaded from this store.
            kind: What it is about, such as ``openvino-fp32``.
            content: The file's bytes.

        Returns:
            The file; None for a bundle that does not lie in this store.
        """
        folder = self.root / bundle_.name
        if not bundle_.name or bundle_.folder != folder / bundle_.version:
            return None
        path = folder / f"{bundle_.version}.gate-{kind}.json"
        with self._writing():
            write_whole(path, content, prefix=".gate-")
        return path

    def reports(self, name: str, version: str) -> list[Path]:
        """The reports that are kept about a version."""
        return sorted(self._folder(name).glob(f"{version}.gate-*.json"))

    def _expect(self, name: str, version: str | None) -> None:
        """Compare, under the lock, before anything is set."""
        active = self.active(name)
        if version is not None and active != version:
            msg = f"engine {name!r}: version {active or 'none'} is active, no longer {version}; nothing was changed"
            raise Superseded(msg)

    def _trusted(self, found: Bundle) -> Bundle:
        signing.check(found, self.trust)
        return found

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Be the only writer."""
        if not self.root.is_dir():
            msg = f"{self.root} is no engine store: `dmdd train` and `dmdd engines add` make one; else see --store"
            raise StoreError(msg)
        with (self.root / LOCK).open("a") as handle:
            end = time.monotonic() + self._wait_s
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        msg = f"{self.root}: another process has been writing for {self._wait_s:g} s; try again later"
                        raise StoreError(msg) from None
                    time.sleep(POLL_S)
            yield

    @staticmethod
    def _sweep(folder: Path) -> None:
        """Remove what writers that were killed have left; nobody else writes now."""
        for pattern in UNFINISHED:
            for left in folder.glob(pattern):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)

    def _remove(self, folder: Path, version: str) -> None:
        """Remove a version at once for all readers, then from the disk."""
        going = folder / f".removing-{version}"
        shutil.rmtree(going, ignore_errors=True)
        (folder / version).rename(going)
        for report in self.reports(folder.name, version):
            report.unlink()
        sync_folder(folder)
        shutil.rmtree(going)

    def _write_history(self, name: str, versions: list[str]) -> None:
        text = "".join(f"{version}\n" for version in versions)
        write_whole(self._folder(name) / HISTORY, text.encode(), prefix=".history-")

    def _folder(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            msg = f"engine name {name!r}: letters, digits, '_', '.', '-' only, at most 64, not starting with a sign"
            raise StoreError(msg)
        return self.root / name


def _without(history: list[str], gone: list[str]) -> list[str]:
    """A history without some versions, each other one once in a row: a roll-back always gives another version."""
    left: list[str] = []
    for version in history:
        if version not in gone and left[-1:] != [version]:
            left.append(version)
    return left


def write_whole(path: Path, content: bytes, prefix: str) -> None:
    """Write a file that all may read, whole or not at all, and surviving a power cut.

    Raises:
        OSError: if the disk does not take it; the file is as it was then.
    """
    handle, temporary = tempfile.mkstemp(prefix=prefix, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


__all__ = ["BundleError", "Store", "StoreError", "Superseded", "write_whole"]
