"""Lanes on the CPU: one OpenVINO infer request each, over buffers made once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.frames import Pixels
from engines.lane import LaneFault, check_scores
from engines.openvino_runtime import ov

PRECISIONS: Final = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""OpenVINO's hint for each. In int8 the graph says what is int8, and the hint is for the rest."""


class OpenVinoEngine:
    """A bundle compiled for the CPU.

    Args:
        bundle: A verified bundle.
        max_batch: Largest batch that a lane takes.
        lanes: How many lanes will run at once; the compiled model gets as many streams.
        threads: CPU threads for all lanes together; 0 for all cores this process may use.
        precision: ``fp32``, ``bf16`` or ``int8``. Always given to OpenVINO, which else takes bf16 by itself.
        graph: The graph, where it is not the bundle's own: a quantised one for ``int8``.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_batch: int,
        lanes: int,
        threads: int = 0,
        precision: str = "fp32",
        graph: Path | None = None,
    ) -> None:
        self.manifest = bundle.manifest
        self.max_batch = max_batch
        spec = self.manifest.input
        core = ov.Core()
        model = core.read_model(graph or bundle.model)
        model.reshape(ov.PartialShape([ov.Dimension(1, max_batch), *spec.shape]))
        self._compiled: ov.CompiledModel | None = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
                "NUM_STREAMS": str(lanes),
                "INFERENCE_NUM_THREADS": str(threads or len(os.sched_getaffinity(0))),
                "ENABLE_CPU_PINNING": "NO",
            },
        )

    def make_lane(self) -> OpenVinoLane:
        """Make one more lane."""
        if self._compiled is None:
            msg = "the engine is closed"
            raise LaneFault(msg)
        return OpenVinoLane(self._compiled, self)

    def close(self) -> None:
        """Drop the compiled model."""
        self._compiled = None


class OpenVinoLane:
    """One infer request. Input and output tensors share the lane's own arrays, one view a batch size."""

    def __init__(self, compiled: ov.CompiledModel, engine: OpenVinoEngine) -> None:
        spec, output = engine.manifest.input, engine.manifest.output
        size = engine.max_batch
        self.frames: Pixels = np.zeros((size, *spec.shape), np.uint8)
        self.scores: NDArray[np.float32] = np.zeros(size, np.float32)
        self.heatmaps: Pixels = np.zeros((size, output.height, output.width), np.uint8)
        self._request: ov.InferRequest | None = compiled.create_infer_request()
        self._views = [self._tensors(count) for count in range(1, size + 1)]
        self._count = 0

    def _tensors(self, count: int) -> tuple[ov.Tensor, ov.Tensor, ov.Tensor]:
        arrays = self.frames[:count], self.scores[:count], self.heatmaps[:count]
        frames, scores, heatmaps = (ov.Tensor(array, shared_memory=True) for array in arrays)
        return frames, scores, heatmaps

    def submit(self, count: int) -> None:
        """Start inference of the first ``count`` frames."""
        request = self._open()
        self.scores[:count] = np.nan  # what is not overwritten is no result
        frames, scores, heatmaps = self._views[count - 1]
        self._count = count
        try:
            request.set_input_tensor(frames)
            request.set_tensor("score", scores)
            request.set_tensor("heatmap", heatmaps)
            request.start_async()
        except RuntimeError as error:
            msg = f"OpenVINO refused a batch of {count}: {error}"
            raise LaneFault(msg) from error

    def ready(self) -> bool:
        """Whether the submitted batch is done."""
        return bool(self._open().wait_for(0))

    def wait(self, timeout: float) -> None:
        """Wait for the batch, at most ``timeout`` seconds; raise :class:`LaneFault` if it failed."""
        try:
            done = self._open().wait_for(int(timeout * 1000))
        except RuntimeError as error:
            msg = f"OpenVINO: {error}"
            raise LaneFault(msg) from error
        if not done:
            msg = f"no result after {timeout:.1f} s"
            raise LaneFault(msg)
        check_scores(self.scores[: self._count])

    def close(self) -> None:
        """Cancel what still runs and drop the request."""
        if self._request is not None:
            self._request.cancel()
            self._request = None

    def _open(self) -> ov.InferRequest:
        if self._request is None:
            msg = "the lane is closed"
            raise LaneFault(msg)
        return self._request
