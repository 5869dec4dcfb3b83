"""Whether all engines fit in memory together, before one more is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from engines.build import Target
from engines.bundle import Bundle
from pipeline.config import ConfigError

MIB: Final = 1 << 20


def cost(bundle: Bundle, target: Target) -> int:
    """Bytes that an engine takes, about: for each lane its weights and its buffers.

    The weights are shared by the lanes; what a lane needs for intermediate results is of the same order and known
    to the accelerator's library alone, so that the size of the model stands for it.
    """
    inputs, output = bundle.manifest.input, bundle.manifest.output
    frame = inputs.height * inputs.width * inputs.channels
    buffers = target.max_batch * (frame + output.height * output.width + 4)
    return target.lanes * (bundle.model.stat().st_size + buffers)


def check(bundles: Iterable[Bundle], target: Target, limit_mib: int) -> None:
    """Refuse engines that do not fit in the budget together.

    Args:
        bundles: All that would be in memory at once.
        target: How each is run.
        limit_mib: ``engine.memory_mib``; 0 for no limit.

    Raises:
        ConfigError: with the size of each engine and what to do.
    """
    costs = [(bundle.label, cost(bundle, target)) for bundle in bundles]
    total = sum(size for _, size in costs)
    if limit_mib and total > limit_mib * MIB:
        each = ", ".join(f"{label} {size / MIB:.1f}" for label, size in costs)
        msg = (
            f"engine.memory_mib = {limit_mib}: the engines in memory at once would take about {total / MIB:.1f} MiB"
            f" ({each}); raise it, or use fewer recipes, fewer lanes or a smaller max_batch"
        )
        raise ConfigError(msg)
