"""Options that are written alike in several commands, as text to values."""

from __future__ import annotations

import typer


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of ``WIDTHxHEIGHT`` or of one number.

    Raises:
        BadParameter: if it is neither.
    """
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: WIDTHxHEIGHT, e.g. 320x240", param_hint="--size") from None


def parse_assignment(text: str) -> tuple[str, str]:
    """Name and value of ``NAME=VALUE``.

    Raises:
        BadParameter: if there is no equals sign.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r}: NAME=VALUE, e.g. statistics=places", param_hint="--option")
    return name, value
