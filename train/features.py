"""The frozen teacher, fast: in OpenVINO on the CPU, in torch on a GPU; and its maps of the good images, kept."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from engines.frames import Pixels
from engines.openvino_runtime import ov
from train.onnx_export import to_onnx
from train.teacher import Teacher

CACHE_BYTES: Final = 4 << 30
Maps = list[Tensor]


class FrozenTeacher:
    """Runs a teacher that is never trained.

    On the CPU, OpenVINO runs it several times as fast as torch.

    Args:
        teacher: The teacher, on ``device``.
        shape: ``(height, width, channels)`` of the frames.
        device: Where training runs.
        exact: Whether to compute in float32 even where the CPU has the faster bfloat16.
    """

    def __init__(
        self, teacher: Teacher, shape: tuple[int, int, int], device: torch.device, *, exact: bool = False
    ) -> None:
        self._teacher, self._device = teacher, device
        self._request: Any = None
        if device.type == "cpu":
            self._request = self._compile(teacher, shape, exact=exact)

    @torch.no_grad()
    def __call__(self, frames: Pixels) -> Maps:
        """Map uint8 ``(n, H, W, C)`` to float32 maps ``(n, c_k, H/s_k, W/s_k)``, channels last."""
        if self._request is None:
            maps = self._teacher(torch.from_numpy(frames).to(self._device))
        else:
            results = self._request.infer([np.ascontiguousarray(frames)])
            maps = [torch.from_numpy(results[k].copy()) for k in range(len(self._teacher.widths))]
        return [m.contiguous(memory_format=torch.channels_last) for m in maps]

    def images(self, frames: Pixels) -> Tensor:
        """Normalised images ``(n, 3, H, W)`` of uint8 ``(n, H, W, C)``, channels last."""
        images = self._teacher.normalised(torch.from_numpy(frames).to(self._device))
        return images.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def _compile(teacher: Teacher, shape: tuple[int, int, int], *, exact: bool) -> Any:
        core = ov.Core()
        fast = not exact and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        hints = {"INFERENCE_PRECISION_HINT": "bf16" if fast else "f32", "PERFORMANCE_HINT": "LATENCY"}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "teacher.onnx"
            path.write_bytes(_graph_of(teacher, shape))
            return core.compile_model(core.read_model(path), "CPU", hints).create_infer_request()


@functools.lru_cache(maxsize=1)
def _graph_of(teacher: Teacher, shape: tuple[int, int, int]) -> bytes:
    """The teacher as ONNX, exported once for both precisions: that takes longer than to compile it."""
    return to_onnx(teacher, shape, [f"map{k}" for k in range(len(teacher.widths))])


class CleanMaps:
    """Teacher maps of the good images: computed once and kept as half floats where they fit into memory.

    Args:
        teacher: The frozen teacher.
        frames: uint8 ``(n, H, W, C)``.
    """

    def __init__(self, teacher: FrozenTeacher, frames: Pixels) -> None:
        self._teacher, self._frames = teacher, frames
        self._kept: Maps | None = None
        first = teacher(frames[:1])
        if 2 * len(frames) * sum(m.numel() for m in first) <= CACHE_BYTES:
            chunks = [[m.half() for m in teacher(frames[at : at + 8])] for at in range(0, len(frames), 8)]
            self._kept = [torch.cat(maps) for maps in zip(*chunks, strict=True)]

    def __getitem__(self, indices: np.ndarray[Any, Any]) -> Maps:
        """Float32 maps of the images named by their indices."""
        if self._kept is None:
            return self._teacher(self._frames[indices])
        chosen = torch.from_numpy(indices)
        return [m[chosen].float().contiguous(memory_format=torch.channels_last) for m in self._kept]
