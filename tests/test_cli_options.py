"""Options as text: what they become, and what is refused."""

from __future__ import annotations

import pytest
import typer

from pipeline.cli_options import parse_assignment, parse_size


@pytest.mark.parametrize(("text", "size"), [("256", (256, 256)), ("320x240", (320, 240)), ("320X240", (320, 240))])
def test_a_size_is_one_number_or_two(text: str, size: tuple[int, int]) -> None:
    """One number is a square; two are width and height."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "axb", "1x2x3", "25.6"])
def test_what_is_no_size_is_refused(text: str) -> None:
    """The message shows how to write one."""
    with pytest.raises(typer.BadParameter, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_an_assignment_is_split_at_the_first_equals_sign() -> None:
    """A value may hold an equals sign; what has none is refused with an example."""
    assert parse_assignment("map=head") == ("map", "head")
    assert parse_assignment("a=b=c") == ("a", "b=c")
    with pytest.raises(typer.BadParameter, match="NAME=VALUE"):
        parse_assignment("map")
