"""The frozen teacher on the CPU: the torch model's maps, and one export for both precisions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train import features
from train.features import FrozenTeacher
from train.onnx_export import to_onnx
from train.teacher import Teacher


def test_the_exact_teacher_is_the_torch_model_and_both_are_exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of the exact one equal torch's; the fast one is compiled from the same export."""
    exports: list[bytes] = []

    def counted(*words: object) -> bytes:
        exports.append(to_onnx(*words))  # type: ignore[arg-type]
        return exports[-1]

    monkeypatch.setattr(features, "to_onnx", counted)
    teacher, shape, device = Teacher(channels=3), (64, 64, 3), torch.device("cpu")
    fast, exact = (FrozenTeacher(teacher, shape, device, exact=exact) for exact in (False, True))
    assert len(exports) == 1
    frames = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    with torch.no_grad():
        expected = teacher(torch.from_numpy(frames))
    for found, wanted in zip(exact(frames), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-3)
    for found, wanted in zip(fast(frames), expected, strict=True):
        assert found.shape == wanted.shape
