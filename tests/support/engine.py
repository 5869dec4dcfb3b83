"""A tiny engine whose score is the mean brightness of the frame: verdicts that a test can foresee."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines import bundle
from engines.bundle import Bundle, Manifest, OutputSpec, Parity, Threshold, Training
from engines.frames import InputSpec
from engines.store import Store

SIDE = 32
CELL = 4
THRESHOLD = 0.5


def brightness_model(side: int = SIDE) -> bytes:
    """ONNX: uint8 ``(n, side, side, 1)`` to score = mean / 255 and a heatmap of cell means."""
    window = {"kernel_shape": [CELL, CELL], "strides": [CELL, CELL]}
    nodes = [
        helper.make_node("Cast", ["frames"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["chw"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["chw"], ["cells"], **window),
        helper.make_node("Squeeze", ["cells", "axis"], ["plane"]),
        helper.make_node("Cast", ["plane"], ["heatmap"], to=TensorProto.UINT8),
        helper.make_node("ReduceMean", ["plane", "sides"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "full"], ["score"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
        numpy_helper.from_array(np.array([1, 2], np.int64), "sides"),
        numpy_helper.from_array(np.array(255, np.float32), "full"),
    ]
    cells = side // CELL
    graph = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info("frames", TensorProto.UINT8, ["n", side, side, 1])],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("heatmap", TensorProto.UINT8, ["n", cells, cells]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model.SerializeToString()


def write_bundle(folder: Path, name: str = "bright", side: int = SIDE) -> Bundle:
    """Write the engine as a bundle."""
    frames = np.zeros((4, side, side, 1), np.uint8)
    frames[1], frames[2], frames[3, : side // 2] = 60, 250, 255
    cells = frames[..., 0].reshape(4, side // CELL, CELL, side // CELL, CELL).mean((2, 4))
    manifest = Manifest(
        name=name,
        created="2026-01-01T00:00:00+00:00",
        input=InputSpec(side, side, 1, "mono"),
        output=OutputSpec(side // CELL, side // CELL, 0.0, 1.0),
        threshold=Threshold(THRESHOLD, 0.01, 4, "mean brightness above one half"),
        training=Training("none", "none", "none", 0, "", 0),
    )
    scores = (cells.mean((1, 2)) / 255).astype(np.float32)
    scores[3] = np.float32(0.5) if scores[3] == THRESHOLD else scores[3]
    return bundle.write(folder, manifest, brightness_model(side), Parity(frames, scores, cells.astype(np.uint8)))


def make_store(root: Path, name: str = "bright") -> Store:
    """A store in which the engine is active."""
    store = Store(root / "store")
    added = store.add(write_bundle(root / f"bundle-{name}", name).folder, name)
    store.activate(name, added.version)
    return store
