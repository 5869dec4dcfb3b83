"""A Redis ACL file from its template: the line's name, and a new password for each user, hashed."""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path
from typing import Final

from pipeline.curve import CurveError, write_private

LINE, SHA256 = "@LINE@", "@SHA256@"
USER: Final = re.compile(r"user (\S+) ")
PASSWORD_BYTES: Final = 32
FILE: Final = "users.acl"
SUFFIX: Final = ".password"


def fill(template: Path, line: str, folder: Path, *, force: bool = False) -> list[Path]:
    """Write ``users.acl``, and ``NAME.password`` for each user that has one, for their owner only.

    Args:
        template: The file with ``@LINE@`` and ``@SHA256@``; its comments are left out.
        line: Name of the line.
        folder: Where the files go.
        force: Whether files that are there are replaced.

    Returns:
        The files, ``users.acl`` first.

    Raises:
        CurveError: if files are there already and ``force`` is not set, or the template cannot be read or has no
            placeholder for a password.
    """
    try:
        rules = [text for text in template.read_text().splitlines() if text.startswith("user ")]
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{template}: {error}: give the ACL template, deploy/redis/users.acl of the project"
        raise CurveError(msg) from error
    if not any(SHA256 in rule for rule in rules):
        raise CurveError(f"{template}: no {SHA256} in it: give the template, not a file that was made from it")
    files = {folder / FILE: ""}
    for rule in rules:
        named = rule.replace(LINE, line)
        user = USER.match(named)
        if user is not None and SHA256 in named:
            password = secrets.token_urlsafe(PASSWORD_BYTES)
            files[folder / f"{user[1]}{SUFFIX}"] = password + "\n"
            named = named.replace(SHA256, hashlib.sha256(password.encode()).hexdigest())
        files[folder / FILE] += named + "\n"
    write_private(files, force=force)
    return list(files)
