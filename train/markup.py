"""HTML and SVG as trees of elements: text and attributes are escaped where the tree becomes a page."""

from __future__ import annotations

from typing import Final
from xml.etree.ElementTree import Element, tostring

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a browser may load for the page: its own style and its own pictures, nothing else."""


def tag(name: str, /, *children: Element | str, **attributes: str | float) -> Element:
    """An element with children in order.

    Args:
        name: The element's name.
        children: Elements, and strings as text.
        attributes: A trailing ``_`` is dropped (``class_``), any other becomes a hyphen (``stroke_width``).
    """
    element = Element(name, {_attribute(key): _number(value) for key, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            element.append(child)
        elif len(element):
            element[-1].tail = (element[-1].tail or "") + child
        else:
            element.text = (element.text or "") + child
    return element


def page(title: str, style: str, body: Element) -> str:
    """A whole HTML document that loads nothing from anywhere."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style),
    )
    return "<!DOCTYPE html>\n" + tostring(tag("html", head, body, lang="en"), encoding="unicode", method="html") + "\n"


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
