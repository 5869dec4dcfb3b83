"""A box as an installer sees it: single steps below a root, each said, and done unless it is a dry run."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path


class InstallError(ValueError):
    """The program cannot be installed so; the message says why, and what to do."""


class Box:
    """The machine below a root.

    A step that finds everything as it should be does and says nothing.

    Args:
        root: ``/``, or the folder that stands for it.
        dry_run: Whether steps are said only.
        say: Takes a line for each step.

    Attributes:
        changed: Steps that changed something, or would.

    Raises:
        InstallError: if the root is ``/`` and the user is not root.
    """

    def __init__(self, root: Path, *, dry_run: bool, say: Callable[[str], None]) -> None:
        self._root, self._dry_run, self.say = root.resolve(), dry_run, say
        self.changed = 0
        self._privileged = os.geteuid() == 0
        self._live = self._root == Path("/") and Path("/run/systemd/system").is_dir()
        if self._root == Path("/") and not self._privileged and not dry_run:
            msg = "only root installs on a box: use sudo, or look first with --dry-run, or try it with --root FOLDER"
            raise InstallError(msg)

    def at(self, path: str) -> Path:
        """Where a path of the box lies here."""
        return self._root / path.lstrip("/")

    def read(self, path: str) -> bytes | None:
        """The bytes of a file, None where there is none."""
        try:
            return self.at(path).read_bytes()
        except FileNotFoundError:
            return None

    def tree(self, path: str) -> dict[str, bytes]:
        """The files below a folder, by their path in it, which begins with a slash."""
        top = self.at(path)
        return {f"/{file.relative_to(top)}": file.read_bytes() for file in sorted(top.rglob("*")) if file.is_file()}

    def write(self, path: str, data: bytes, mode: int, group: str) -> None:
        """Make a file have these bytes, this mode and group; a reader sees the old or the new one, whole."""
        file = self.at(path)
        if self.read(path) != data:
            if self._step(f"write {path}"):
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_name(f".{file.name}.part")
                part.write_bytes(data)
                part.chmod(mode)
                part.replace(file)
        elif stat.S_IMODE(file.stat().st_mode) != mode and self._step(f"mode {mode:04o} {path}"):
            file.chmod(mode)
        self._own(path, "root", group)

    def folder(self, path: str, mode: int, user: str, group: str) -> None:
        """Make a folder with this mode and these owners."""
        place = self.at(path)
        if not place.is_dir():
            if self._step(f"folder {path} {mode:04o}"):
                place.mkdir(parents=True)
                place.chmod(mode)
        elif stat.S_IMODE(place.stat().st_mode) != mode and self._step(f"mode {mode:04o} {path}"):
            place.chmod(mode)
        self._own(path, user, group)

    def user(self, name: str, path: str) -> None:
        """Have systemd make the user that a sysusers.d file declares."""
        if self._id("passwd", name) is not None:
            return
        tool = shutil.which("systemd-sysusers")
        if tool is None or not self._privileged:
            self.say(f"user {name}: left to systemd-sysusers, as root")
        elif self._step(f"user {name}"):
            self._run(tool, f"--root={self._root}", Path(path).name)

    def remove(self, path: str) -> None:
        """Remove a file or link that may be there."""
        file = self.at(path)
        if (file.is_symlink() or file.exists()) and self._step(f"remove {path}"):
            file.unlink()

    def remove_tree(self, path: str) -> None:
        """Remove a folder and all in it.

        Raises:
            InstallError: if it is a link; what it leads to is left alone.
        """
        place = self.at(path)
        if place.is_symlink():
            msg = f"{place} is a link to {place.readlink()}: remove that by hand, then the link, and run this again"
            raise InstallError(msg)
        if place.is_dir() and self._step(f"remove {path}/"):
            shutil.rmtree(place)

    def remember(self, path: str, files: dict[str, bytes]) -> None:
        """Keep these files as the current ones of a folder, and those that were so as the previous ones."""
        if not self._step(f"remember this version, and the one before, in {path}"):
            return
        following, current, previous = (self.at(f"{path}/{name}") for name in ("next", "current", "previous"))
        shutil.rmtree(following, ignore_errors=True)
        for name, data in files.items():
            file = following / name.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        self.at(path).chmod(0o700)
        if current.exists():
            shutil.rmtree(previous, ignore_errors=True)
            current.replace(previous)
        following.replace(current)

    def links(self, path: str, units: Collection[str]) -> list[str]:
        """The links by which these units, or instances of them, are enabled."""
        kinds = {unit.partition("@")[0] + "@" if "@" in unit else unit for unit in units}
        found = (link for link in self.at(path).glob("*.wants/*.service") if link.is_symlink())
        return [
            f"/{link.relative_to(self._root)}"
            for link in sorted(found)
            if (link.name.partition("@")[0] + "@" if "@" in link.name else link.name) in kinds
        ]

    def stop(self, units: Collection[str]) -> None:
        """Stop these units, on a box that runs."""
        if units and self._live and self._step(f"systemctl stop {' '.join(units)}"):
            self._run("systemctl", "stop", *units)

    def reload(self) -> None:
        """Have systemd read its files again, and the log its limits, on a box that runs."""
        if self._live and self._step("systemctl daemon-reload; systemctl restart systemd-journald"):
            self._run("systemctl", "daemon-reload")
            self._run("systemctl", "restart", "systemd-journald")

    def _step(self, text: str) -> bool:
        """Say a change; whether it is to be made."""
        self.changed += 1
        self.say(text)
        return not self._dry_run

    def _own(self, path: str, user: str, group: str) -> None:
        """Give a file or folder to its owners, where this may be done and they exist."""
        place, owners = self.at(path), (self._id("passwd", user), self._id("group", group))
        if not self._privileged or None in owners or not place.exists():
            return
        there = place.lstat()
        if (there.st_uid, there.st_gid) != owners and self._step(f"owner {user}:{group} {path}"):
            os.chown(place, owners[0] or 0, owners[1] or 0, follow_symlinks=False)

    def _id(self, database: str, name: str) -> int | None:
        """The number of a user or group in the root's own passwd or group; root is 0 everywhere."""
        if name == "root":
            return 0
        lines = (self.read(f"/etc/{database}") or b"").decode(errors="replace").splitlines()
        return next((int(line.split(":")[2]) for line in lines if line.startswith(f"{name}:")), None)

    @staticmethod
    def _run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            msg = (
                f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}; mend it, run this again"
            )
            raise InstallError(msg)
