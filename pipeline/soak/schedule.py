"""Which faults come when: drawn from a seed, each kind once before any comes again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from pipeline.soak.fault import Fault

REST_S: Final = (0.2, 1.0)
"""Shortest and longest time between the end of a fault, recovery included, and the next one."""
PAIRS: Final = 0.3
"""Share of the slots in which two faults are at work at once."""


class Slot(NamedTuple):
    """What happens at one time.

    Attributes:
        faults: One fault, or two of different groups.
        camera: The camera that they concern, if they concern one.
        seconds: How long they last.
        rest_s: How long it is quiet afterwards.
    """

    faults: tuple[Fault, ...]
    camera: str
    seconds: float
    rest_s: float


def schedule(faults: Sequence[Fault], cameras: Sequence[str], rng: np.random.Generator) -> Iterator[Slot]:
    """Slots without end; the same for the same faults, cameras and seed.

    Args:
        faults: The kinds; where there are none, there are no slots.
        cameras: The cameras.
        rng: Source of everything that is random.
    """
    deck: list[Fault] = []
    while faults:
        if not deck:
            deck = [faults[at] for at in rng.permutation(len(faults))]
        together = [deck.pop()]
        partner = _partner(together[0], deck) if rng.random() < PAIRS else None
        if partner is not None:
            deck.remove(partner)
            together.append(partner)
        seconds = max(float(rng.uniform(*fault.seconds)) for fault in together)
        camera = cameras[int(rng.integers(len(cameras)))]
        yield Slot(tuple(together), camera, seconds, float(rng.uniform(*REST_S)))


def _partner(first: Fault, deck: Sequence[Fault]) -> Fault | None:
    """The next fault of the deck that may be beside ``first``."""
    if first.alone:
        return None
    return next((fault for fault in reversed(deck) if not fault.alone and fault.group != first.group), None)
