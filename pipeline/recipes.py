"""Product changeover: which of a camera's resident engines a frame goes to."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.intake import Queue
from pipeline.ledger import Ledger
from pipeline.parts import UNKNOWN, Part, Reason


class RecipeQueue:
    """A camera's queue, which picks the engine by the recipe in the frame's header.

    Args:
        default: Queue of the camera's own engine, for frames that name no recipe.
        recipes: Queue of each recipe's engine.
        ledger: Answers parts of a recipe that the camera does not have.
    """

    def __init__(self, default: Queue, recipes: Mapping[str, Queue], ledger: Ledger) -> None:
        self._default, self._recipes, self._ledger = default, recipes, ledger

    def put(self, part: Part) -> list[Part]:
        """Queue a part at its recipe's engine; return those that gave way to it.

        An unknown recipe is a product that nobody has chosen an engine for: no other engine may judge it.
        """
        recipe = part.header.recipe
        queue = self._recipes.get(recipe) if recipe else self._default
        if queue is None:
            self._ledger.answer(part, UNKNOWN[Reason.UNKNOWN_RECIPE])
            return []
        return queue.put(part)
