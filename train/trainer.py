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
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engines.frames import Pixels
from train.errors import TrainingError
from train.features import CleanMaps, FrozenTeacher
from train.method import Pairs
from train.synthesis import Synthesizer

CHECKPOINT_EVERY: Final = 250
VALIDATIONS: Final = 10
"""How often a training is validated."""
VALIDATION_PAIRS: Final = 32
VALIDATION_SEED: Final = 1 << 21
"""Apart from the numbers of training steps."""
Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        steps: Optimiser steps.
        batch: Pairs a step.
        rate: Peak learning rate.
        kind: ``cycle``: AdamW and one cycle; ``steps``: Adam, its rate times 0.2 after 0.8 and 0.9 of the steps.
        weight_decay: AdamW's.
        clip: Largest norm of the gradient.
        seed: Of everything random.
        patience: Stop after so many validations without a lower loss; 0 for never. A schedule that ends with a small
            rate gains most at its end, so that stopping early is for runs that have gone wrong.
    """

    steps: int = 3000
    batch: int = 8
    rate: float = 4e-3
    kind: str = "cycle"
    weight_decay: float = 1e-4
    clip: float = 5.0
    seed: int = 0
    patience: int = 0


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
        validation: Makes pairs of held-out good images, on which nothing is trained.
        schedule: How long and how fast.
        device: Where to train.
        checkpoint: Where to keep the state, and to go on from.
        fingerprint: What else must be equal for a checkpoint to be taken up, e.g. the data's digest.
        clean: The teacher's maps of the synthesizer's images.

    Attributes:
        start: Steps that an earlier run has done.
        curves: Of each validation: step, training losses and validation losses by name.
    """

    def __init__(
        self,
        method: nn.Module,
        teacher: FrozenTeacher,
        synthesizer: Synthesizer,
        validation: Synthesizer,
        schedule: Schedule,
        device: torch.device,
        checkpoint: Path,
        fingerprint: str,
        clean: CleanMaps,
    ) -> None:
        self._method, self._teacher, self._synthesizer = method, teacher, synthesizer
        self._schedule, self._device, self._validation, self._clean = schedule, device, validation, clean
        self._checkpoint = checkpoint
        self._identity = f"{fingerprint} {sorted(asdict(schedule).items())}"
        self._optimizer, self._cycle = _optimizer(method, schedule)
        losses: Any = method.losses
        # On a GPU a step is bound by the launch of many small kernels, which compilation fuses.
        self._losses = torch.compile(losses) if device.type == "cuda" else losses
        self.curves: list[dict[str, float]] = []
        self.start = self._resume()

    def run(self, report: Report) -> None:
        """Train to the end of the schedule, or until validation has not improved for its patience.

        Args:
            report: Called after every step with its number, from 1, and its losses.

        Raises:
            TrainingError: if a loss is not finite.
        """
        self._method.train()
        every = max(1, self._schedule.steps // VALIDATIONS)
        for step, pair in enumerate(pairs(self._synthesizer, self._schedule, self.start), self.start + 1):
            losses = self._step(pair)
            report(step, losses)
            if step % every == 0:
                self.curves.append({"step": step, **losses, **self._validate()})
            if step % CHECKPOINT_EVERY == 0 or step == self._schedule.steps:
                self._save(step)
            if self._is_stuck():
                self._save(step)
                return

    def _step(self, pair: Pair) -> dict[str, float]:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            losses: dict[str, Tensor] = self._losses(self._seen(pair, self._clean[pair.indices]))
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

    def _seen(self, pair: Pair, clean: list[Tensor]) -> Pairs:
        mask = torch.from_numpy(pair.masks).to(self._device).unsqueeze(1).float()
        return Pairs(clean, self._teacher(pair.twins), self._teacher.images(pair.twins), mask)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Losses on the same few pairs of held-out images each time."""
        totals: dict[str, float] = {}
        batches = range(VALIDATION_PAIRS // self._schedule.batch)
        self._method.eval()
        for batch in batches:
            pair = _draw(self._validation, self._schedule, VALIDATION_SEED + batch)
            clean = self._teacher(self._validation.images[pair.indices])
            for name, loss in self._losses(self._seen(pair, clean)).items():
                totals[f"val_{name}"] = totals.get(f"val_{name}", 0.0) + loss.item() / len(batches)
        self._method.train()
        return totals

    def _is_stuck(self) -> bool:
        patience = self._schedule.patience
        if not patience or len(self.curves) <= patience:
            return False
        totals = [sum(v for name, v in row.items() if name.startswith("val_")) for row in self.curves]
        return min(totals[-patience:]) >= min(totals[:-patience])

    def _save(self, step: int) -> None:
        state = {
            "identity": self._identity,
            "step": step,
            "method": self._method.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "cycle": self._cycle.state_dict(),
            "curves": self.curves,
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
        self.curves = state["curves"]
        return int(state["step"])


def _optimizer(method: nn.Module, schedule: Schedule) -> tuple[torch.optim.Optimizer, Any]:
    parameters = [p for p in method.parameters() if p.requires_grad]
    if schedule.kind == "steps":
        adam = torch.optim.Adam(parameters, schedule.rate)
        marks = [round(schedule.steps * share) for share in (0.8, 0.9)]
        return adam, torch.optim.lr_scheduler.MultiStepLR(adam, marks, 0.2)
    adamw = torch.optim.AdamW(parameters, schedule.rate, weight_decay=schedule.weight_decay)
    return adamw, torch.optim.lr_scheduler.OneCycleLR(
        adamw, schedule.rate, total_steps=schedule.steps, pct_start=min(0.5, max(0.1, 2 / schedule.steps))
    )
