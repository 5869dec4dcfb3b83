"""Container images as their files describe them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
IMAGES = {
    "dmdd-line:cpu": ROOT / "deploy/container/Containerfile",
    "dmdd-line:tensorrt": ROOT / "deploy/container/Containerfile.tensorrt",
}
PROGRAM = "/opt/dmdd-line/bin/dmdd"


class Instruction(NamedTuple):
    """One line of a Containerfile, continued lines joined."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """Its words: of the JSON form, or of the shell's."""
        found: list[str] = json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)
        return found


def instructions(file: Path) -> list[Instruction]:
    """The instructions of a Containerfile, in their order."""
    lines = (line for line in file.read_text().splitlines() if not line.lstrip().startswith("#"))
    joined = "\n".join(lines).replace("\\\n", " ")
    return [Instruction(*re.split(r"\s+", line.strip(), maxsplit=1)) for line in joined.splitlines() if line.strip()]


def last(file: Path, name: str) -> Instruction:
    """The instruction of this name that counts."""
    return [one for one in instructions(file) if one.name == name][-1]
