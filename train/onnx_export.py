"""From a torch module over uint8 frames to ONNX bytes with a dynamic batch."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn


def to_onnx(module: nn.Module, shape: tuple[int, int, int], outputs: Sequence[str]) -> bytes:
    """Export ``module`` in evaluation mode.

    Args:
        module: Takes uint8 frames ``(n, H, W, C)``.
        shape: ``(H, W, C)``, fixed in the graph; ``n`` stays open.
        outputs: Names of the outputs in order.
    """
    device = next(module.buffers()).device
    example = torch.zeros((2, *shape), dtype=torch.uint8, device=device)
    # The exporter narrates through warnings and logging; what matters is raised.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            module.eval(),
            (example,),
            path,
            input_names=["frames"],
            output_names=list(outputs),
            dynamic_shapes=({0: torch.export.Dim("n", min=1, max=1024)},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        return path.read_bytes()
