"""The engine store: numbered versions of named engines, one of them active, with a way back.

Layout: ``<root>/<name>/<version>/`` holds a bundle; ``<root>/<name>/history`` lists activated versions,
the last line being the active one. Every change is one atomic rename.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final

from engines import bundle
from engines.bundle import Bundle, BundleError, sync_folder

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
HISTORY: Final = "history"


class StoreError(ValueError):
    """An engine that the store does not have, or a name it cannot take."""


class Store:
    """Engines under one folder. Several processes may read; one at a time should write."""

    def __init__(self, root: Path) -> None:
        self.root = root

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
            BundleError: if the bundle fails verification.
        """
        version = version or self.active(name)
        if version is None or version not in self.versions(name):
            have = ", ".join(self.versions(name)) or "none"
            msg = f"engine {name!r}: no {'active version' if version is None else f'version {version}'} in {self.root}"
            raise StoreError(f"{msg} (versions: {have}; engines: {', '.join(self.names()) or 'none'})")
        return bundle.load(self._folder(name) / version, version)

    def resolve(self, reference: str) -> Bundle:
        """Load ``name``, ``name@version`` or the path of a bundle's folder.

        Raises:
            StoreError: if it is none of these.
            BundleError: if the bundle fails verification.
        """
        path = Path(reference)
        if (path / bundle.MANIFEST).is_file():
            return bundle.load(path)
        name, _, version = reference.partition("@")
        return self.get(name, version or None)

    def add(self, source: Path, name: str) -> Bundle:
        """Copy the bundle in ``source`` into the store as the next version of ``name``; it is not yet active.

        Raises:
            BundleError: if the source fails verification.
        """
        bundle.load(source)
        folder = self._folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        version = str(max((int(v) for v in self.versions(name)), default=0) + 1)
        staging = Path(tempfile.mkdtemp(prefix=".incoming-", dir=folder))
        try:
            shutil.copytree(source, staging, dirs_exist_ok=True)
            staging.chmod(0o755)
            copied = bundle.load(staging)
            staging.rename(folder / version)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync_folder(folder)
        return Bundle(folder / version, copied.manifest, copied.digest, version)

    def activate(self, name: str, version: str) -> None:
        """Make ``version`` the active one, if it is not. The caller has passed it through the parity gate.

        Raises:
            StoreError: if there is no such version.
        """
        if version not in self.versions(name):
            msg = f"engine {name!r} has no version {version} (versions: {', '.join(self.versions(name)) or 'none'})"
            raise StoreError(msg)
        if version != self.active(name):
            self._write_history(name, [*self.history(name), version])

    def rollback(self, name: str) -> str:
        """Go back to the version that was active before; return it.

        Raises:
            StoreError: if there is none.
        """
        history = self.history(name)
        if len(history) < 2:
            msg = f"engine {name!r}: nothing to roll back to"
            raise StoreError(msg)
        self._write_history(name, history[:-1])
        return history[-2]

    def _write_history(self, name: str, versions: list[str]) -> None:
        folder = self._folder(name)
        handle, temporary = tempfile.mkstemp(prefix=".history-", dir=folder)
        with os.fdopen(handle, "w") as stream:
            stream.write("".join(f"{version}\n" for version in versions))
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)
            os.fsync(stream.fileno())
        Path(temporary).replace(folder / HISTORY)
        sync_folder(folder)

    def _folder(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            msg = f"engine name {name!r}: letters, digits, '_', '.', '-' only, at most 64, not starting with a sign"
            raise StoreError(msg)
        return self.root / name


__all__ = ["BundleError", "Store", "StoreError"]
