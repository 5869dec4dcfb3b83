"""What a method is to the trainer and the exporter: pairs in, losses out; then maps.

A method is one module in :mod:`train.methods`, which says ``METHOD`` and ``OPTIONS``; nothing else names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Final, Protocol, get_args, get_type_hints

import msgspec
from torch import Tensor, nn

from train import methods
from train.errors import TrainingError
from train.teacher import Teacher

Maps = list[Tensor]

FOLDS: Final = 3
"""Into how many folds the training images are divided at most."""


@dataclass(frozen=True)
class Pairs:
    """A batch of normal-anomaly pairs.

    Attributes:
        clean: The teacher's maps of the good originals, ``(n, c_k, H/s_k, W/s_k)``.
        twin: The teacher's maps of their defective twins.
        images: The twins as the teacher saw them: normalised, ``(n, 3, H, W)``.
        mask: Where the twins are defective, ``(n, 1, H, W)``, 0 or 1.
    """

    clean: Maps
    twin: Maps
    images: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Recipe:
    """How a method wants to be trained, where the user does not say.

    Attributes:
        rate: Peak learning rate.
        schedule: ``cycle``: one cycle, AdamW (Smith 2018). ``steps``: Adam, times 0.2 after 0.8 and 0.9 (DRAEM).
        steps: Optimiser steps from 100 good images on; fewer images take ``steps_few``.
        steps_few: See ``steps``.
    """

    rate: float
    schedule: str
    steps: int
    steps_few: int


class Material(Protocol):
    """What a method may look at once more when its training has ended.

    Attributes:
        folds: Into how many folds the training images are divided.
        count: Number of training images.
    """

    folds: int
    count: int

    def good(self, fold: int | None = None) -> Iterator[tuple[int, Tensor, Maps]]:
        """Good training images of a fold or of all, in batches of one fold: fold, normalised images, teacher maps."""
        ...

    def pairs(self, fold: int) -> Iterator[Pairs]:
        """Fresh pairs, never trained on, of a fold's images."""
        ...

    def held(self) -> Iterator[tuple[Tensor, Maps]]:
        """Held-out good images: normalised images, teacher maps."""
        ...


class Method(Protocol):
    """A method; also an ``nn.Module``, made by ``METHOD(teacher, (height, width), options)``.

    Attributes:
        recipe: How it wants to be trained.
        weights: Share of each of its maps in the engine's map.
        score_weights: Share of each in the map whose maximum is the score.
        scales: Unit of each map, None where it is to be measured on held-out good parts.
        headroom: Range of the heatmap above the least value, in units of the engine's map.
    """

    recipe: Recipe
    weights: tuple[float, ...]
    score_weights: tuple[float, ...]
    scales: tuple[float | None, ...]
    headroom: float

    def losses(self, pairs: Pairs) -> dict[str, Tensor]:
        """Named losses of a batch of pairs; their sum is minimised."""
        ...

    def finish(self, material: Material) -> None:
        """Take in what is not learned by gradient steps."""
        ...

    def maps(self, images: Tensor, teacher: Maps) -> Tensor:
        """Anomaly maps ``(n, len(weights), H/4, W/4)``, greater where less normal."""
        ...


def names() -> list[str]:
    """Names of all methods."""
    return sorted(module.name for module in iter_modules(methods.__path__))


def make(name: str, teacher: Teacher, size: tuple[int, int], options: dict[str, Any]) -> nn.Module:
    """Make a method.

    Args:
        name: One of :func:`names`.
        teacher: The frozen teacher.
        size: Height and width of the frames.
        options: Values of the method's options by name; text is converted to what the option is.

    Raises:
        TrainingError: if there is no such method, option or value.
    """
    module = _module(name)
    method: nn.Module = module.METHOD(teacher, size, _options(name, module.OPTIONS, options))
    return method


def recipe_of(name: str) -> Recipe:
    """How the method wants to be trained.

    Raises:
        TrainingError: if there is no such method.
    """
    recipe: Recipe = _module(name).METHOD.recipe
    return recipe


def check_options(name: str, options: dict[str, Any]) -> None:
    """Refuse options that the method does not have, or values that they cannot have.

    Raises:
        TrainingError: naming the options that there are.
    """
    _options(name, _module(name).OPTIONS, options)


def _module(name: str) -> Any:
    if name not in names():
        msg = f"method {name!r}: one of {', '.join(names())}"
        raise TrainingError(msg)
    return import_module(f"train.methods.{name}")


def _options(name: str, kind: type[Any], given: dict[str, Any]) -> Any:
    known = {field.name for field in fields(kind)}
    if unknown := set(given) - known:
        msg = f"{name} has no option {', '.join(sorted(unknown))}: it has {', '.join(sorted(known))}"
        raise TrainingError(msg)
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        hints = get_type_hints(kind)
        may_be = "; ".join(f"{key}: {_values(hints[key])}" for key in sorted(given))
        msg = f"{name}: {error} ({may_be})"
        raise TrainingError(msg) from error


def _values(hint: Any) -> str:
    return ", ".join(map(str, get_args(hint))) or getattr(hint, "__name__", str(hint))
