"""From a bundle to a running engine: compile it for a target, then let it pass the parity gate."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from engines.bundle import Bundle, Parity
from engines.lane import Engine, Lane


class BuildError(RuntimeError):
    """An engine cannot be built here; the message names the remedy."""


class ParityError(RuntimeError):
    """A compiled engine does not reproduce its reference; it must not be activated."""


class Target(msgspec.Struct, frozen=True):
    """Where and how an engine runs.

    Attributes:
        kind: ``openvino`` (CPU) or ``tensorrt`` (NVIDIA GPU).
        precision: ``fp32`` or ``bf16`` for OpenVINO; ``fp32`` for TensorRT.
        lanes: Number of lanes.
        max_batch: Largest batch of a lane.
        threads: CPU threads for all OpenVINO lanes together, 0 for all.
    """

    kind: str = "openvino"
    precision: str = "fp32"
    lanes: int = 2
    max_batch: int = 8
    threads: int = 0


def compile_engine(bundle: Bundle, target: Target) -> Engine:
    """Compile ``bundle`` for ``target``.

    Raises:
        BuildError: if the target's packages or devices are missing.
    """
    if target.kind == "tensorrt":
        from engines.tensorrt_lane import TensorRtEngine  # noqa: PLC0415 - needs the `tensorrt` extra

        return TensorRtEngine(bundle, max_batch=target.max_batch, precision=target.precision)
    if target.kind == "openvino":
        from engines.openvino_lane import PRECISIONS, OpenVinoEngine  # noqa: PLC0415 - half a second to import

        if target.precision not in PRECISIONS:
            msg = f"precision {target.precision!r}: OpenVINO engines run in {' or '.join(PRECISIONS)}"
            raise BuildError(msg)
        return OpenVinoEngine(
            bundle,
            max_batch=target.max_batch,
            lanes=target.lanes,
            threads=target.threads,
            precision=target.precision,
        )
    msg = f"target {target.kind!r}: openvino or tensorrt"
    raise BuildError(msg)


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
        raise ParityError(msg)
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
