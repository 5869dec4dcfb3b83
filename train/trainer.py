"""The training loop: normal-anomaly pairs through a frozen teacher into a method's losses.

The sample of step ``i`` is a function of (seed, i), so that a run that was killed and goes on from its
checkpoint sees what it would have seen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.frames import Pixels
from train.features import CleanMaps, FrozenTeacher
from train.synthesis import Synthesizer

CHECKPOINT_EVERY: Final = 250
Maps = list[Tensor]
Report = Callable[[int, dict[str, float]], None]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why."""


class Method(Protocol):
    """What a method has to give."""

    weights: tuple[float, ...]
    scales: tuple[float | None, ...]

    def losses(self, clean: Maps, twin: Maps, mask: Tensor) -> dict[str, Tensor]:
        """Named losses of a batch of pairs; their sum is minimised."""
        ...

    def observe(self, teacher: Maps) -> None:
        """Look at teacher maps of good parts, after training."""
        ...

    def settle(self) -> None:
        """Make what was observed part of the method."""
        ...

    def maps(self, teacher: Maps) -> Tensor:
        """Anomaly maps ``(n, len(weights), h, w)``, greater where less normal."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: Optimiser steps.
        batch: Pairs a step.
        rate: Peak learning rate of AdamW's one-cycle schedule.
        weight_decay: AdamW's.
        clip: Largest norm of the gradient.
        seed: Of everything random.
    """

    steps: int = 3000
    batch: int = 8
    rate: float = 4e-3
    weight_decay: float = 1e-4
    clip: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """A batch of pairs before the teacher has seen it."""

    indices: NDArray[np.intp]
    twins: Pixels
    masks: NDArray[np.bool_]


def pairs(synthesizer: Synthesizer, schedule: Schedule, start: int) -> Iterator[Pair]:
    """Yield the batches of steps ``start`` .. ``steps - 1``, made ahead by a thread of their own."""
    queue: Queue[Pair | BaseException] = Queue(maxsize=4)
    ended = threading.Event()

    def produce() -> None:
        try:
            for step in range(start, schedule.steps):
                if ended.is_set():
                    return
                queue.put(_draw(synthesizer, schedule, step))
        except BaseException as error:  # noqa: BLE001 - raised again by the consumer
            queue.put(error)

    thread = threading.Thread(target=produce, name="synthesis", daemon=True)
    thread.start()
    try:
        for _ in range(start, schedule.steps):
            item = queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        while thread.is_alive():
            while not queue.empty():
                queue.get_nowait()
            thread.join(0.05)


def _draw(synthesizer: Synthesizer, schedule: Schedule, step: int) -> Pair:
    rng = np.random.default_rng([schedule.seed, step])
    indices = rng.integers(0, len(synthesizer.images), schedule.batch)
    drawn = [synthesizer(int(index), rng) for index in indices]
    return Pair(indices, np.stack([twin for twin, _ in drawn]), np.stack([mask for _, mask in drawn]))


class Trainer:
    """Trains a method.

    Args:
        method: The method's module, on ``device``.
        teacher: The frozen teacher.
        synthesizer: Makes the pairs.
        schedule: How long and how fast.
        device: Where to train.
        checkpoint: Where to keep the state, and to go on from.
        fingerprint: What else must be equal for a checkpoint to be taken up, e.g. the data's digest.
    """

    def __init__(
        self,
        method: nn.Module,
        teacher: FrozenTeacher,
        synthesizer: Synthesizer,
        schedule: Schedule,
        device: torch.device,
        checkpoint: Path,
        fingerprint: str,
    ) -> None:
        self._method, self._teacher, self._synthesizer = method, teacher, synthesizer
        self._schedule, self._device = schedule, device
        self._checkpoint = checkpoint
        self._identity = f"{fingerprint} {sorted(asdict(schedule).items())}"
        self._optimizer = torch.optim.AdamW(method.parameters(), schedule.rate, weight_decay=schedule.weight_decay)
        self._cycle = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer, schedule.rate, total_steps=schedule.steps, pct_start=0.1
        )
        self.start = self._resume()

    def run(self, report: Report) -> None:
        """Train to the end of the schedule.

        Args:
            report: Called after every step with its number, from 1, and its losses.

        Raises:
            TrainingError: if a loss is not finite.
        """
        clean = CleanMaps(self._teacher, self._synthesizer.images)
        self._method.train()
        for step, pair in enumerate(pairs(self._synthesizer, self._schedule, self.start), self.start + 1):
            report(step, self._step(pair, clean))
            if step % CHECKPOINT_EVERY == 0 or step == self._schedule.steps:
                self._save(step)

    def _step(self, pair: Pair, clean: CleanMaps) -> dict[str, float]:
        twin = self._teacher(pair.twins)
        mask = torch.from_numpy(pair.masks).to(self._device).unsqueeze(1).float()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            losses: dict[str, Tensor] = self._method.losses(clean[pair.indices], twin, mask)  # type: ignore[operator]
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            msg = f"loss is not finite ({ {name: loss.item() for name, loss in losses.items()} }): lower --rate"
            raise TrainingError(msg)
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._method.parameters(), self._schedule.clip)
        self._optimizer.step()
        self._cycle.step()
        return {name: loss.item() for name, loss in losses.items()}

    def _save(self, step: int) -> None:
        state = {
            "identity": self._identity,
            "step": step,
            "method": self._method.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "cycle": self._cycle.state_dict(),
        }
        self._checkpoint.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self._checkpoint)

    def _resume(self) -> int:
        """Take up a checkpoint of the same run; return the steps that are done."""
        if not self._checkpoint.is_file():
            return 0
        try:
            state: dict[str, Any] = torch.load(self._checkpoint, map_location=self._device, weights_only=True)
        except Exception:  # noqa: BLE001 - a damaged checkpoint is no reason not to train
            return 0
        if state.get("identity") != self._identity:
            return 0
        self._method.load_state_dict(state["method"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._cycle.load_state_dict(state["cycle"])
        return int(state["step"])
