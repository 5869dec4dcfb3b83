"""The engine of the soak: its score is the mean of the pixels, so that every verdict can be foreseen."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from engines import bundle
from engines.bundle import MODEL, Bundle, Manifest, OutputSpec, Parity, Threshold, Training
from engines.frames import InputSpec
from engines.store import Store
from pipeline.errors import MissingExtraError
from pipeline.soak.frames import SIDE, THRESHOLD

NAME: Final = "soak"
CELL: Final = 8


def graph() -> bytes:
    """ONNX: uint8 ``(n, SIDE, SIDE, 1)`` to score = mean / 255 and a heatmap of cell means.

    Raises:
        MissingExtraError: where the package onnx is not installed.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper  # noqa: PLC0415 - needs the `soak` extra
    except ModuleNotFoundError as error:
        raise MissingExtraError("soak", "onnx") from error
    nodes = [
        helper.make_node("Cast", ["frames"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["image"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["image"], ["cells"], kernel_shape=[CELL, CELL], strides=[CELL, CELL]),
        helper.make_node("Squeeze", ["cells", "channel"], ["plane"]),
        helper.make_node("Cast", ["plane"], ["heatmap"], to=TensorProto.UINT8),
        helper.make_node("ReduceMean", ["plane", "sides"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "white"], ["score"]),
    ]
    constants = {"channel": np.array([1]), "sides": np.array([1, 2]), "white": np.array(255, np.float32)}
    size = SIDE // CELL
    ports = [
        helper.make_tensor_value_info("frames", TensorProto.UINT8, ["n", SIDE, SIDE, 1]),
        helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n"]),
        helper.make_tensor_value_info("heatmap", TensorProto.UINT8, ["n", size, size]),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "mean", ports[:1], ports[1:], tensors)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return bytes(model.SerializeToString())


def write(folder: Path, *, off_by: float = 0.0) -> Bundle:
    """Write the engine as a bundle.

    Args:
        folder: A new one.
        off_by: How far its stored scores are from what its graph gives: then the parity gate has to refuse it.
    """
    frames = np.zeros((4, SIDE, SIDE, 1), np.uint8)
    frames[1], frames[2], frames[3] = 60, 250, 180
    cells = frames[:, ::CELL, ::CELL, 0]
    manifest = Manifest(
        name=NAME,
        created="2026-01-01T00:00:00+00:00",
        input=InputSpec(SIDE, SIDE, 1, "mono"),
        output=OutputSpec(SIDE // CELL, SIDE // CELL, 0.0, 1.0),
        threshold=Threshold(THRESHOLD, 0.01, 4, "mean of the pixels above one half"),
        training=Training("none", "none", "none", 0, "", 0),
    )
    scores = (cells.mean((1, 2)) / 255 + off_by).astype(np.float32)
    return bundle.write(folder, manifest, graph(), Parity(frames, scores, np.ascontiguousarray(cells)))


class Versions:
    """A store of the line with versions to swap to: two good ones, one damaged, one that the gate has to refuse.

    Args:
        root: Folder of the store; made.
    """

    GOOD: Final = ("1", "2")
    DAMAGED: Final = "3"
    UNEQUAL: Final = "4"

    def __init__(self, root: Path) -> None:
        self._store = Store(root)
        good = write(root.parent / "bundle")
        for _ in (*self.GOOD, self.DAMAGED):
            self._store.add(good.folder, NAME)
        self._store.add(write(root.parent / "bundle-unequal", off_by=0.2).folder, NAME)
        self._damage(root / NAME / self.DAMAGED / MODEL)
        self._store.activate(NAME, self.GOOD[0])

    @property
    def active(self) -> str:
        """The active version."""
        return self._store.active(NAME) or ""

    def activate(self, version: str) -> None:
        """Make a version active without a look at it, as a careless hand would."""
        self._store.activate(NAME, version)

    def other(self) -> str:
        """The good version that is not active."""
        return next(version for version in self.GOOD if version != self.active)

    @staticmethod
    def _damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x10
        file.chmod(0o644)
        file.write_bytes(content)
