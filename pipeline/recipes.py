"""Product changeover: which of a camera's resident engines a frame goes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pipeline.ledger import Ledger
from pipeline.part_queue import Drop
from pipeline.parts import UNKNOWN, Part, Reason


class Admission(Protocol):
    """Where parts wait for an engine: its scheduler."""

    def offer(self, part: Part) -> list[Drop]:
        """Queue a part; return those that are given up, itself perhaps, each with its reason."""
        ...


class RecipeQueue:
    """A camera's queue, which picks the engine by the recipe in the frame's header.

    Args:
        default: Queue of the camera's own engine, for frames that name no recipe.
        recipes: Queue of each recipe's engine.
        ledger: Answers parts of a recipe that the camera does not have, and those that are given up.
    """

    def __init__(self, default: Admission, recipes: Mapping[str, Admission], ledger: Ledger) -> None:
        self._default, self._recipes, self._ledger = default, recipes, ledger

    def put(self, part: Part) -> None:
        """Queue a part at its recipe's engine, and answer those that are given up for it.

        An unknown recipe is a product that nobody has chosen an engine for: no other engine may judge it.
        """
        recipe = part.header.recipe
        queue = self._recipes.get(recipe) if recipe else self._default
        if queue is None:
            self._ledger.answer(part, UNKNOWN[Reason.UNKNOWN_RECIPE])
            return
        for dropped, reason in queue.offer(part):
            self._ledger.answer(dropped, UNKNOWN[reason])
