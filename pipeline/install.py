"""What ``dmdd install`` puts on a box, and how it is replaced, brought back and taken off again.

All is below a root, so that a package builder or a test needs neither root nor this box. One rule holds for every
file, config and unit alike: one that was changed since it was put there is kept, and the new one lies beside it as
``NAME.new``. What was put there is kept in :data:`STATE`, this version and the one before: the first tells what was
changed, the second is the way back. That folder is root's alone, as root writes units from it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

from pipeline.install_box import Box, InstallError

STATE: Final = "/var/lib/dmdd-install"
PROGRAM: Final = "/opt/dmdd-line"
"""Where the units as they are shipped expect the program."""
CONFIG: Final = "/etc/dmdd"
DATA: Final = (CONFIG, "/var/lib/dmdd", "/var/cache/dmdd")
UNITS: Final = "/etc/systemd/system"
TMPFILES: Final = "/etc/tmpfiles.d/dmdd.conf"
USER: Final = "dmdd"
PLACES: Final = (
    ("deploy/*.service", UNITS),
    ("deploy/sysusers.d/dmdd.conf", "/etc/sysusers.d"),
    ("deploy/tmpfiles.d/dmdd.conf", "/etc/tmpfiles.d"),
    ("deploy/journald.conf.d/dmdd.conf", "/etc/systemd/journald.conf.d"),
    ("deploy/cameras/*.env", f"{CONFIG}/cameras"),
    ("config.toml", CONFIG),
)
"""What in the source goes into which folder."""
ABSOLUTE: Final = (
    ('store = "store"', 'store = "/var/lib/dmdd/store"'),
    ('path = "spool"', 'path = "/var/lib/dmdd/spool"'),
)
"""Relative paths of the config would mean ``/etc/dmdd``, where a service does not write."""
HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108  what units do not see
Files = dict[str, bytes]


def source() -> Path:
    """Where the files of this installation lie: a checkout, or ``share/dmdd`` of the environment (from the wheel).

    Raises:
        InstallError: if neither has them.
    """
    places = (Path(__file__).parents[1], Path(sys.prefix) / "share/dmdd")
    for place in places:
        if (place / "deploy/dmdd-line.service").is_file():
            return place
    msg = f"no unit files in {' or '.join(map(str, places))}; give a checkout of the project with --from"
    raise InstallError(msg)


def wanted(origin: Path, program: str) -> Files:
    """The files that belong on a box, by their path there.

    Args:
        origin: A folder with ``config.toml`` and ``deploy``.
        program: The virtual environment that the units start, as the box sees it.

    Raises:
        InstallError: if a file is missing, or services cannot see the program.
    """
    if not re.fullmatch(r"(/[\w.+-]+)+", program) or program.startswith(tuple(f"{place}/" for place in HIDDEN)):
        msg = f"{program}: services cannot start a program there; make its environment in {PROGRAM}, see --program"
        raise InstallError(msg)
    files: Files = {}
    for pattern, place in PLACES:
        found = sorted(origin.glob(pattern))
        if not found:
            msg = f"{origin / pattern}: not there; give a whole checkout with --from"
            raise InstallError(msg)
        for file in found:
            text = file.read_text().replace(PROGRAM, program)
            files[f"{place}/{file.name}"] = (adapted(text) if place == CONFIG else text).encode()
    return files


def adapted(config: str) -> str:
    """The config with its writable folders in ``/var/lib/dmdd``.

    Raises:
        InstallError: if it does not have their settings, once each.
    """
    for relative, absolute in ABSOLUTE:
        if config.count(f"\n{relative}\n") != 1:
            msg = f"config.toml: no single line {relative!r}; take the file of the project with --from"
            raise InstallError(msg)
        config = config.replace(f"\n{relative}\n", f"\n{absolute}\n")
    return config


def install(box: Box, files: Files) -> None:
    """Put these files on the box, with their user and folders. A second time it changes nothing.

    Args:
        box: The box.
        files: As :func:`wanted` gives them.

    Raises:
        InstallError: if a step fails; what was done until then stays, and the next run goes on.
    """
    installed = box.tree(f"{STATE}/current")
    # The user comes before the folders and files that are its, and by a file.
    for path in sorted(files, key=lambda path: (not path.startswith("/etc/sysusers.d/"), path)):
        if path.startswith(CONFIG):
            continue
        _put(box, path, files[path], installed.get(path))
        if path.startswith("/etc/sysusers.d/"):
            box.user(USER, path)
    for path, mode, user, group in folders(files):
        box.folder(path, mode, user, group)
    for path in sorted(path for path in files if path.startswith(CONFIG)):
        _put(box, path, files[path], installed.get(path))
    for path in sorted(set(installed) - set(files)):
        _take(box, path, installed[path])
    if files != installed:
        box.remember(STATE, files)
    if box.changed:
        box.reload()


def rollback(box: Box) -> None:
    """Put the files of the version before on the box again; doing it twice goes forward.

    Raises:
        InstallError: if there was no version before.
    """
    before = box.tree(f"{STATE}/previous")
    if not before:
        msg = f"{box.at(STATE)}: no version before this one; nothing was changed"
        raise InstallError(msg)
    install(box, before)


def uninstall(box: Box, *, purge: bool) -> None:
    """Stop and remove the units and what belongs to them; config and data stay.

    Args:
        box: The box.
        purge: Whether config, keys, engines, spool and changed files go, too. The user stays: files elsewhere may
            be its.

    Raises:
        InstallError: if a step fails.
    """
    installed = box.tree(f"{STATE}/current")
    if not installed:
        box.say("nothing is installed")
    units = sorted(Path(path).name for path in installed if path.startswith(UNITS))
    box.stop([unit.replace("@.", "@*.") for unit in units])
    for link in box.links(UNITS, units):
        box.remove(link)
    for path in sorted(installed):
        if purge or not path.startswith(CONFIG):
            _take(box, path, box.read(path) if purge else installed[path])
            box.remove(f"{path}.new")
    for path in (*DATA, STATE) if purge else (STATE,):
        box.remove_tree(path)
    if box.changed:
        box.reload()


def folders(files: Files) -> list[tuple[str, int, str, str]]:
    """Path, mode, user and group of each folder that the tmpfiles.d file among these declares."""
    lines = (line.split() for line in files.get(TMPFILES, b"").decode().splitlines() if line.startswith("d "))
    return [(path, int(mode, 8), user, group) for _, path, mode, user, group, *_ in lines]


def _put(box: Box, path: str, data: bytes, before: bytes | None) -> None:
    """Write a file, unless it is someone's own by now."""
    there = box.read(path)
    mode, group = (0o640, USER) if path.startswith(CONFIG) else (0o644, "root")
    if there in {None, before, data}:
        box.write(path, data, mode, group)
        box.remove(f"{path}.new")
    elif before == data:
        box.say(f"kept {path}: changed by you")
    else:
        box.say(f"kept {path}: changed by you; compare it with {path}.new")
        box.write(f"{path}.new", data, mode, group)


def _take(box: Box, path: str, before: bytes | None) -> None:
    """Remove a file, unless it is someone's own by now."""
    if box.read(path) in {None, before}:
        box.remove(path)
    else:
        box.say(f"kept {path}: changed by you")
