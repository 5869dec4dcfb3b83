"""As much of PromQL as a test needs: the tokens of an expression, and its selectors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<string>"(?:[^"\\]|\\.)*")
    |(?P<duration>\d+(?:ms|[smhdwy])\b)
    |(?P<number>\d+(?:\.\d+)?)
    |(?P<word>[A-Za-z_:][A-Za-z0-9_:]*)
    |(?P<operator>=~|!~|!=|==|>=|<=|[-+*/%^=<>,])
    |(?P<bracket>[(){}\[\]])""",
    re.VERBOSE,
)
PAIRS = {")": "(", "}": "{", "]": "["}
FUNCTIONS = {"sum", "max", "rate", "increase", "deriv", "histogram_quantile", "label_values"}
KEYWORDS = {"by", "on", "and"}


class Token(NamedTuple):
    """A token and what it is."""

    kind: str
    text: str


class Selector(NamedTuple):
    """A metric with its matchers: label, operator and value."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]


def tokens(expression: str) -> list[Token]:
    """The tokens of an expression.

    Raises:
        ValueError: for a character that begins none, a bracket without its other, or an unknown function.
    """
    found, opened, at = [], [], 0
    while at < len(expression):
        match = TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"{expression!r}: no token at {expression[at:]!r}")
        at = match.end()
        token = Token(str(match.lastgroup), match[0])
        if token.text in PAIRS.values():
            opened.append(token.text)
        elif token.text in PAIRS and (not opened or opened.pop() != PAIRS[token.text]):
            raise ValueError(f"{expression!r}: {token.text} closes nothing")
        if token.kind != "space":
            found.append(token)
    if opened:
        raise ValueError(f"{expression!r}: {opened[-1]} is not closed")
    for token, following in pairwise(found):
        if following.text == "(" and token.kind == "word" and token.text not in FUNCTIONS | KEYWORDS:
            raise ValueError(f"{expression!r}: no function {token.text}")
    return found


def grouped(expression: str) -> set[str]:
    """The labels that an expression groups or joins by."""
    return {
        label for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in re.split(r",\s*", labels)
    }


def selectors(expression: str) -> Iterator[Selector]:
    """Every metric that an expression reads, with its matchers.

    Raises:
        ValueError: as :func:`tokens`, or for a matcher that is none.
    """
    found = tokens(re.sub(r"\b(by|on) \([^)]*\)", "", expression))
    for at, token in enumerate(found):
        inside = sum(other.text == "{" for other in found[:at]) > sum(other.text == "}" for other in found[:at])
        if token.kind != "word" or inside or token.text in FUNCTIONS | KEYWORDS:
            continue
        matchers: list[tuple[str, str, str]] = []
        if at + 1 < len(found) and found[at + 1].text == "{":
            end = next(place for place in range(at, len(found)) if found[place].text == "}")
            matchers = list(_matchers(expression, found[at + 2 : end]))
        yield Selector(token.text, tuple(matchers))


def _matchers(expression: str, inner: list[Token]) -> Iterator[tuple[str, str, str]]:
    for at in range(0, len(inner), 4):
        shape = [token.kind for token in inner[at : at + 3]]
        if shape != ["word", "operator", "string"] or [token.text for token in inner[at + 3 : at + 4]] not in (
            [],
            [","],
        ):
            raise ValueError(f"{expression!r}: no matcher at {inner[at].text}")
        yield inner[at].text, inner[at + 1].text, inner[at + 2].text[1:-1]
