"""Which parts of an evaluation are worth a look: the worst errors, and some at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from train.evaluate import Evaluation

FALSE_REJECTS: Final = 8
MISSES: Final = 12
RANDOM_GOOD: Final = 4
RANDOM_DEFECTIVE: Final = 8
SEED: Final = 0


@dataclass(frozen=True)
class Choice:
    """Parts to show, as indices of samples.

    Attributes:
        title: What they have in common.
        remark: What to know about the choice.
        indices: Which ones, in the order in which to show them.
    """

    title: str
    remark: str
    indices: list[int]


def choices(evaluation: Evaluation) -> list[Choice]:
    """False rejects with the highest scores, misses with the lowest, and random parts of both sides.

    Where there is no error of a kind, the parts that came nearest to one are shown in its place.
    """
    scores = evaluation.inspection.scores
    defective = np.array([sample.defective for sample in evaluation.samples])
    highest, lowest = np.argsort(-scores, kind="stable"), np.argsort(scores, kind="stable")
    above = scores > evaluation.threshold
    good, bad = [int(k) for k in highest if not defective[k]], [int(k) for k in lowest if defective[k]]
    found = [
        _errors("False rejects", "the highest score first", good, above, FALSE_REJECTS),
        _errors("Missed defects", "the lowest score first", bad, ~above, MISSES),
        Choice("Good parts at random", "Drawn blindly: how a usual one looks.", _drawn(good, RANDOM_GOOD)),
        Choice("Defective parts at random", "Drawn blindly from every kind in turn.", _of_every_kind(evaluation, bad)),
    ]
    return [choice for choice in found if choice.indices]


def _errors(title: str, order: str, parts: list[int], wrong: NDArray[np.bool_], limit: int) -> Choice:
    errors = [k for k in parts if wrong[k]]
    if errors:
        shown = f"All {len(errors)}" if len(errors) <= limit else f"{limit} of {len(errors)}"
        return Choice(title, f"{shown}, {order}." if len(errors) > 1 else "The only one.", errors[:limit])
    return Choice(f"{title}: none", f"Those that came nearest, {order}.", parts[: limit // 2])


def _drawn(parts: list[int], count: int) -> list[int]:
    if not parts:
        return []
    drawn = np.random.default_rng(SEED).permutation(sorted(parts))
    return [int(k) for k in drawn[:count]]


def _of_every_kind(evaluation: Evaluation, parts: list[int]) -> list[int]:
    """Random parts, one of each kind in turn until there are enough."""
    kinds: dict[str, list[int]] = {}
    for k in _drawn(parts, len(parts)):
        kinds.setdefault(evaluation.samples[k].label, []).append(k)
    rounds = (kinds[label][turn] for turn in range(len(parts)) for label in sorted(kinds) if turn < len(kinds[label]))
    return [k for k, _ in zip(rounds, range(RANDOM_DEFECTIVE), strict=False)]
