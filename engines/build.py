"""From a bundle to a running engine: compile it for a target, then let it pass the parity gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from engines.bundle import Bundle, Parity
from engines.lane import Engine, Lane
from engines.precision import PrecisionError, cache_folder, graph_of

Progress = Callable[[str, int, int], None]
"""Called with a phase of the build, the steps done and all its steps; from whichever thread builds. May be slow.
What it raises ends the build."""


class BuildError(RuntimeError):
    """An engine cannot be built here; the message names the remedy."""


class ParityError(RuntimeError):
    """A compiled engine does not reproduce its reference; it must not be activated.

    Attributes:
        differences: Of every frame at every batch size.
    """

    def __init__(self, message: str, differences: Sequence[FrameDifference] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class Target(msgspec.Struct, frozen=True):
    """Where and how an engine runs.

    Attributes:
        kind: ``openvino`` (CPU) or ``tensorrt`` (NVIDIA GPU).
        precision: ``fp32``, ``bf16`` or ``int8`` for OpenVINO; ``fp32``, ``fp16`` or ``int8`` for TensorRT.
        lanes: Number of lanes.
        max_batch: Largest batch of a lane.
        threads: CPU threads for all OpenVINO lanes together, 0 for all.
        cache: Folder of rewritten graphs and TensorRT plans; empty for the user's cache.
        exact_batches: Batch sizes that TensorRT optimises for on their own, beside the largest.
    """

    kind: str = "openvino"
    precision: str = "fp32"
    lanes: int = 2
    max_batch: int = 8
    threads: int = 0
    cache: str = ""
    exact_batches: tuple[int, ...] = (1,)

    @property
    def cache_folder(self) -> Path:
        """Where derived files are kept."""
        return Path(self.cache) if self.cache else cache_folder()


def compile_engine(bundle: Bundle, target: Target, progress: Progress | None = None) -> Engine:
    """Compile ``bundle`` for ``target``.

    Args:
        bundle: A verified bundle.
        target: Where and how it is to run.
        progress: Told how far a build of TensorRT is. OpenVINO compiles within seconds and tells nothing.

    Raises:
        BuildError: if the target's packages or devices are missing, or the precision cannot be had.
    """
    if target.kind == "tensorrt":
        from engines.tensorrt_lane import TensorRtEngine  # noqa: PLC0415 - needs the `tensorrt` extra

        return TensorRtEngine(
            bundle,
            max_batch=target.max_batch,
            precision=target.precision,
            exact_batches=target.exact_batches,
            cache=target.cache_folder,
            progress=progress,
        )
    if target.kind == "openvino":
        return _openvino_engine(bundle, target)
    msg = f"target {target.kind!r}: openvino or tensorrt"
    raise BuildError(msg)


def _openvino_engine(bundle: Bundle, target: Target) -> Engine:
    from engines.openvino_lane import PRECISIONS, OpenVinoEngine  # noqa: PLC0415 - half a second to import

    if target.precision not in PRECISIONS:
        msg = f"precision {target.precision!r}: OpenVINO engines run in {' or '.join(PRECISIONS)}"
        raise BuildError(msg)
    try:
        graph = graph_of(bundle, target.precision, target.cache_folder)
    except PrecisionError as error:
        raise BuildError(str(error)) from error
    return OpenVinoEngine(
        bundle,
        graph=graph,
        max_batch=target.max_batch,
        lanes=target.lanes,
        threads=target.threads,
        precision=target.precision,
    )


@dataclass(frozen=True)
class FrameDifference:
    """How one stored frame came out at one batch size, beside the reference."""

    frame: int
    batch: int
    score: float
    expected: float
    heatmap_mean: float
    verdict_agrees: bool


def parity_gate(bundle: Bundle, lane: Lane, timeout: float = 30.0) -> list[FrameDifference]:
    """Run the stored frames through ``lane`` at every batch size and compare with the reference.

    Returns:
        The difference of every frame at every batch size.

    Raises:
        ParityError: if a score, a heatmap or a verdict is out of tolerance.
        LaneFault: if the lane fails.
    """
    parity = bundle.parity()
    differences = [
        difference
        for batch in range(1, len(lane.frames) + 1)
        for difference in _run_batches(bundle, lane, parity, batch, timeout)
    ]
    tolerance = bundle.manifest.tolerance
    failed = [
        d
        for d in differences
        if abs(d.score - d.expected) > tolerance.score
        or d.heatmap_mean > tolerance.heatmap_mean
        or not d.verdict_agrees
    ]
    if failed:
        worst = max(failed, key=lambda d: abs(d.score - d.expected))
        msg = (
            f"{bundle.label}: {len(failed)} of {len(differences)} results differ from the reference; worst: frame"
            f" {worst.frame} in a batch of {worst.batch}: score {worst.score:.4f}, expected {worst.expected:.4f},"
            f" heatmap {worst.heatmap_mean:.2f} levels off, verdict {'same' if worst.verdict_agrees else 'DIFFERENT'}."
            " The engine is refused; rebuild it, or choose a higher precision"
        )
        raise ParityError(msg, differences)
    return differences


def _run_batches(bundle: Bundle, lane: Lane, parity: Parity, batch: int, timeout: float) -> list[FrameDifference]:
    threshold, tolerance = bundle.manifest.threshold.value, bundle.manifest.tolerance.score
    found = []
    for start in range(0, len(parity.frames), batch):
        chosen = range(start, min(start + batch, len(parity.frames)))
        lane.frames[: len(chosen)] = parity.frames[chosen.start : chosen.stop]
        lane.submit(len(chosen))
        lane.wait(timeout)
        for slot, frame in enumerate(chosen):
            score, expected = float(lane.scores[slot]), float(parity.scores[frame])
            off = np.abs(lane.heatmaps[slot].astype(np.int16) - parity.heatmaps[frame]).mean()
            # A frame whose reference lies within tolerance of the threshold has no verdict to reproduce.
            agrees = (score > threshold) == (expected > threshold) or abs(expected - threshold) <= tolerance
            found.append(FrameDifference(frame, batch, score, expected, float(off), agrees))
    return found
