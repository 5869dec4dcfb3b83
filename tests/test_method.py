"""The registry of methods: found by themselves, a third one is one file, options are text that is checked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train import method, methods
from train.errors import TrainingError
from train.method import Recipe, check_options, make, names, recipe_of
from train.methods.adps import AdpsOptions
from train.methods.dmdd import DmddOptions

TEACHER: Any = SimpleNamespace(widths=[8, 8, 8])
THIRD = '''
"""A method that finds everything that is bright."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from train.method import Recipe


@dataclass(frozen=True)
class BrightOptions:
    """How bright."""

    level: float = 0.5
    steps: int = 3
    invert: bool = False
    mode: Literal["max", "mean"] = "max"


class Bright(nn.Module):
    """The method."""

    recipe = Recipe(rate=0.5, schedule="cycle", steps=7, steps_few=5)

    def __init__(self, teacher, size, options):
        super().__init__()
        self.teacher_widths, self.size, self.options = teacher.widths, size, options


METHOD = Bright
OPTIONS = BrightOptions
'''


@pytest.fixture
def third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A method in a file of its own."""
    (tmp_path / "bright.py").write_text(THIRD)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield "bright"
    sys.modules.pop("train.methods.bright", None)
    if hasattr(methods, "bright"):
        del methods.bright


def test_both_methods_are_found() -> None:
    """By their files alone; sorted by name."""
    assert names() == ["adps", "dmdd"]


@pytest.mark.parametrize(("name", "kind"), [("dmdd", DmddOptions), ("adps", AdpsOptions)])
def test_every_method_says_what_it_is(name: str, kind: type) -> None:
    """A module has a method and its options, each of which has a default; the defaults are allowed."""
    module = method._module(name)
    assert module.OPTIONS is kind
    assert isinstance(kind(), kind)
    assert issubclass(module.METHOD, torch.nn.Module)
    check_options(name, {})
    recipe = recipe_of(name)
    assert isinstance(recipe, Recipe)
    assert recipe.schedule in {"cycle", "steps"}
    assert 0 < recipe.steps_few <= recipe.steps
    assert 0 < recipe.rate < 1


def test_a_third_method_is_one_file(third: str) -> None:
    """Put beside the others it is found, has its recipe, and is made with teacher, size and options."""
    assert names() == ["adps", third, "dmdd"]
    assert recipe_of(third).steps == 7
    made: Any = make(third, TEACHER, (64, 96), {"level": 0.75})
    assert (made.teacher_widths, made.size, made.options.level) == ([8, 8, 8], (64, 96), 0.75)
    assert made.options.mode == "max"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"level": "0.25"}, 0.25),
        ({"steps": "12"}, 12),
        ({"invert": "true"}, True),
        ({"invert": "false"}, False),
        ({"mode": "mean"}, "mean"),
        ({"steps": 4}, 4),
    ],
    ids=str,
)
def test_text_becomes_what_the_option_is(third: str, given: dict[str, Any], expected: object) -> None:
    """A command line knows only text: numbers, switches and words are read as their types say."""
    made: Any = make(third, TEACHER, (64, 64), given)
    (name,) = given
    value = getattr(made.options, name)
    assert value == expected
    assert type(value) is type(expected)


def test_an_unknown_option_is_refused_with_those_that_there_are(third: str) -> None:
    """All that are unknown, and all that are known, sorted; the same before training as when made."""
    told = r"bright has no option colour, size: it has invert, level, mode, steps"
    with pytest.raises(TrainingError, match=told):
        check_options(third, {"size": 3, "colour": "red", "level": 1})
    with pytest.raises(TrainingError, match=told):
        make(third, TEACHER, (64, 64), {"size": 3, "colour": "red"})


@pytest.mark.parametrize(
    "given", [{"level": "high"}, {"steps": "1.5"}, {"invert": "maybe"}, {"mode": "median"}, {"steps": None}], ids=str
)
def test_a_value_that_cannot_be_is_refused(third: str, given: dict[str, Any]) -> None:
    """The message names the method and the option, so that it can be mended."""
    (option,) = given
    with pytest.raises(TrainingError, match=rf"bright: .*{option}"):
        check_options(third, given)


def test_a_value_that_a_method_itself_refuses_is_told_in_its_words() -> None:
    """Options may check themselves: what there is comes with the refusal."""
    with pytest.raises(TrainingError, match="adps: k 3: one of 1, 2, 4, 8, 16"):
        check_options("adps", {"k": "3"})


@pytest.mark.parametrize("name", ["magic", "", "dmdd.student", "../dmdd", "__init__"])
def test_an_unknown_method_is_refused_with_those_that_there_are(name: str) -> None:
    """Whatever is asked of it; nothing outside the folder of methods is imported."""
    for ask in (lambda: recipe_of(name), lambda: check_options(name, {}), lambda: make(name, TEACHER, (64, 64), {})):
        with pytest.raises(TrainingError, match="one of adps, dmdd"):
            ask()
