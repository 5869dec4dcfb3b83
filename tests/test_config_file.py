"""The top-level ``config.toml``: valid, complete, and in its comments true to ``pipeline.config``."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import annotated_types
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline import config
from pipeline.config import Config, Socket

FILE = Path(__file__).parent.parent / "config.toml"
TABLE = re.compile(r"#?\[+([a-z0-9_.]+)\]+")
NAMED = re.compile(r"^(cameras|plc\.gates)\.\w+$")
"""Tables of which each bears a name that the user has given."""
SETTING = re.compile(r"#?([a-z_]+) = (.+)")
BOUNDS = {"ge": annotated_types.Ge, "gt": annotated_types.Gt, "le": annotated_types.Le, "lt": annotated_types.Lt}


@dataclass(frozen=True)
class Entry:
    """A setting in the file: the comment above it, its value, and whether it is switched on."""

    comment: str
    value: str
    active: bool


def entries(text: str) -> Iterator[tuple[str, str, Entry]]:
    """Yield table, key and entry of every setting; ``cameras`` and ``plc.gates`` stand for each table in them."""
    table, comment = "", []
    for line in text.splitlines():
        if line == "#" or line.startswith("# "):
            comment.append(line)
        elif found := TABLE.fullmatch(line):
            table, comment = NAMED.sub(r"\1", found[1]), []
        elif found := SETTING.fullmatch(line):
            yield table, found[1], Entry("\n".join(comment), found[2], not line.startswith("#"))
            comment = []
        else:
            assert not line, f"neither a comment, a table, a setting nor empty: {line!r}"
            comment = []


def first_entries() -> dict[tuple[str, str], Entry]:
    """The first entry of every setting: the annotated one."""
    found: dict[tuple[str, str], Entry] = {}
    for table, key, entry in entries(FILE.read_text()):
        found.setdefault((table, key), entry)
    return found


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section inside a type such as ``Line``, ``tuple[Socket, ...]`` or ``dict[Name, Camera]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := section_of(inner))), None)


def sections(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, type[BaseModel]]:
    """Every table of the config with its model, those inside others by their full names."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in model.model_fields.items():
        if (section := section_of(field.annotation)) is not None:
            found |= {prefix + name: section, **sections(section, f"{prefix}{name}.")}
    return found


FIELDS = [
    (table, key, field)
    for table, section in sections().items()
    for key, field in section.model_fields.items()
    if section_of(field.annotation) is None
]
each_field = pytest.mark.parametrize(("table", "key", "field"), FIELDS, ids=[f"{t}.{k}" for t, k, _ in FIELDS])


def bounds(field: FieldInfo) -> list[float]:
    """Every bound of a numeric field, those of a tuple's elements included."""
    annotations = list(field.metadata)
    pending = [field.annotation]
    while pending:
        inner = pending.pop()
        for argument in [*get_args(inner), *getattr(inner, "__metadata__", ())]:
            annotations += argument.metadata if isinstance(argument, FieldInfo) else [argument]
            pending.append(argument)
    return [getattr(a, name) for a in annotations for name, kind in BOUNDS.items() if isinstance(a, kind)]


def choices(field: FieldInfo) -> list[Any]:
    """The allowed values of a field that has a closed set of them."""
    return list(get_args(field.annotation)) if "Literal" in str(field.annotation) else []


def numbers(text: str) -> set[float]:
    """Every number that stands in a text."""
    return {float(word) for word in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", text)}


def test_every_section_is_found() -> None:
    """The walk over the models misses no section, so that no field escapes the tests below."""
    assert sections().keys() >= Config.model_fields.keys() | {"plc.modbus.registers", "plc.gates"}
    assert any(bounds(field) for _, key, field in FIELDS if key == "roi")


def test_the_file_is_valid() -> None:
    """The file as it stands runs a line with one pull socket and one camera."""
    loaded = config.load(FILE)
    assert [socket.kind for socket in loaded.sockets] == ["pull"]
    assert list(loaded.cameras) == ["cam1"]


def test_what_is_switched_off_is_valid() -> None:
    """With every "#" taken away the file is still valid: the examples in it can be used."""
    text = re.sub(r"(?m)^#(?! )", "", FILE.read_text())
    loaded = config.parse(tomllib.loads(text))
    assert [(socket.kind, socket.protocol) for socket in loaded.sockets] == [
        ("pull", "dmdd"),
        ("rep", "imagezmq"),
        ("sub", "dmdd"),
    ]
    assert list(loaded.cameras) == ["cam1", "cam2"]


@each_field
def test_every_field_stands_in_the_file(table: str, key: str, field: FieldInfo) -> None:
    """No setting is left for the user to find in the code."""
    assert (table, key) in first_entries()


def test_nothing_else_stands_in_the_file() -> None:
    """A setting that the code no longer has is not in the file either."""
    known = {(table, key) for table, key, _ in FIELDS}
    assert {(table, key) for table, key, _ in entries(FILE.read_text())} <= known


def test_values_are_the_defaults() -> None:
    """What is switched on changes nothing, cameras aside."""
    loaded = config.parse(tomllib.loads(FILE.read_text()))
    default = Config(cameras=loaded.cameras)
    assert loaded == default
    assert loaded.sockets == (Socket(),)


@each_field
def test_comments_state_the_default(table: str, key: str, field: FieldInfo) -> None:
    """The comment says what the default is, so that it is still known after the value was changed."""
    comment = first_entries()[table, key].comment
    stated = re.search(r"[Dd]efault\s*(.+?)\.?$", comment.replace("\n# ", " "))
    assert stated, f"no default in:\n{comment}"
    default = field.default
    if default is None:
        assert "none" in stated[1]
    elif isinstance(default, int | float) and not isinstance(default, bool):
        assert float(default) in numbers(stated[1])
    else:
        plain = default if isinstance(default, bool) else list(default) if isinstance(default, tuple) else str(default)
        assert stated[1].startswith(json.dumps(plain))


@each_field
def test_comments_state_the_range(table: str, key: str, field: FieldInfo) -> None:
    """Every bound of a number and every choice of a closed set is in the comment."""
    comment = first_entries()[table, key].comment
    assert set(map(float, bounds(field))) <= numbers(comment)
    for choice in choices(field):
        assert (f'"{choice}"' if isinstance(choice, str) else str(choice)) in comment


def test_lines_fit_the_screen() -> None:
    """No line is wider than the code's own."""
    assert max(map(len, FILE.read_text().splitlines())) <= 120
