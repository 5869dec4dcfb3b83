"""The table of bad input in ``docs/contracts.md``, out of the cases that are tested.

``python -m tests.bad_input_table`` says whether the document is up to date; with ``--write`` it makes it so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from tests.support.bad_input import rows

DOCUMENT: Final = Path(__file__).parent.parent / "docs/contracts.md"
BEGIN, END = "<!-- bad input: made by `python -m tests.bad_input_table --write` -->", "<!-- end of bad input -->"


def updated(text: str) -> str:
    """The document with the table as it has to be.

    Raises:
        ValueError: if the document has no place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        msg = f"{DOCUMENT.name}: put {BEGIN!r} and {END!r} where the table belongs"
        raise ValueError(msg)
    return "\n".join([before + BEGIN, "", *rows(), "", END + after])


def main(arguments: list[str]) -> int:
    """Compare or write; 1 where the document is out of date."""
    text = DOCUMENT.read_text()
    if "--write" in arguments:
        DOCUMENT.write_text(updated(text))
        return 0
    return int(updated(text) != text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
