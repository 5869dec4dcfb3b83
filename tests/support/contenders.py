"""Methods that know their result, to prove a comparison without training anything."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.frames import InputSpec, Pixels
from train.cell import Facts


class Brightness:
    """Finds what is brighter than good parts were, with some noise by the seed.

    Args:
        spec: The images.
        seed: Of the noise.
        noise: Its size, in gray levels.
        trace: A file to which each fit appends the process's id; empty for none.
        hold: A file whose absence holds up every fit; empty for none.
        fail_seed: The seed with which fitting fails.
        **others: What every method is told, of no use here.
    """

    def __init__(
        self,
        spec: InputSpec,
        seed: int,
        *,
        noise: float | str = 0.0,
        trace: str = "",
        hold: str = "",
        fail_seed: int | str = -1,
        **others: Any,
    ) -> None:
        self._rng, self._noise = np.random.default_rng(seed), float(noise)
        self._trace, self._hold = trace, hold
        self._fails = seed == int(fail_seed)
        self._spec, self._others = spec, others
        self._usual = np.zeros(spec.shape[:2])

    def fit(self, good: Pixels) -> None:
        """Remember the usual gray level of every place."""
        if self._trace:
            with Path(self._trace).open("a") as stream:
                stream.write(f"{os.getpid()}\n")
        while self._hold and not Path(self._hold).exists():
            time.sleep(0.02)
        if self._fails:
            raise RuntimeError("the lamp | is broken")
        self._usual = good.astype(float).mean((0, 3))

    def predict(self, frames: Pixels) -> tuple[NDArray[Any], NDArray[Any]]:
        """Brighter than usual by how much: everywhere, and at most."""
        maps = frames.astype(float).mean(3) - self._usual
        maps += self._rng.normal(0, self._noise, maps.shape)
        return maps.max((1, 2)), maps

    def facts(self) -> Facts:
        """What it was given to work with."""
        threads = os.environ["OMP_NUM_THREADS"]
        about = {"affinity": sorted(os.sched_getaffinity(0)), "threads": threads, "told": self._others}
        return Facts(gmacs=0.25, megabytes=1.5, about=about)
