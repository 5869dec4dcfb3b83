"""A small network with every kind of scope that an engine's graph has, and a bundle of it: no training, no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from engines import bundle
from engines.bundle import Bundle, Manifest, OutputSpec, Parity, Threshold, Tolerance, Training
from engines.frames import InputSpec

SIDE = 32
WIDTH = 8


def network(*, fragile: bool = False) -> bytes:
    """ONNX: two convolutions of a teacher, a head, a fusion's convolution that is statistics, then score and heatmap.

    Args:
        fragile: Whether the head takes the small difference of large numbers, which no short type holds.
    """
    random = np.random.default_rng(5)
    shapes = {"teacher.net.conv_stem": (WIDTH, 3, 3, 3), "teacher.net.blocks.0.0.conv": (WIDTH, WIDTH, 3, 3)}
    shapes |= {"method.head.exit.0": (4, WIDTH, 1, 1), "method.fusion.layers.0": (1, 4, 1, 1)}
    constants = []
    for name, shape in shapes.items():
        weight = random.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)
        if fragile and name.startswith("method.head"):
            weight[0, 0], weight[1, 0] = 3000.0, -3000.0
        if fragile and name.startswith("method.fusion"):
            weight[:, 1] = weight[:, 0]
        bias = random.normal(0, 0.1, shape[0]).astype(np.float32)
        constants += [numpy_helper.from_array(weight, f"{name}.weight"), numpy_helper.from_array(bias, f"{name}.bias")]
    stem, block, head, fusion = shapes
    nodes = [
        helper.make_node("Cast", ["frames"], ["f"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["chw"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["chw", "unit"], ["x"], "normalise"),
        _conv("x", stem, "a", strides=[4, 4], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["ar"], "relu"),
        _conv("ar", block, "b", pads=[1, 1, 1, 1]),
        _conv("b", head, "c", pads=[0, 0, 0, 0]),
        _conv("c", fusion, "d", pads=[0, 0, 0, 0]),
        helper.make_node("Sigmoid", ["d"], ["e"], "sigmoid"),
        helper.make_node("ReduceMax", ["e", "sides"], ["score"], "max", keepdims=0),
        helper.make_node("Squeeze", ["e", "axis"], ["plane"], "squeeze"),
        helper.make_node("Mul", ["plane", "full"], ["level"], "scale"),
        helper.make_node("Cast", ["level"], ["heatmap"], "byte", to=TensorProto.UINT8),
    ]
    constants += [
        numpy_helper.from_array(np.array(1 / 255, np.float32), "unit"),
        numpy_helper.from_array(np.array([1, 2, 3], np.int64), "sides"),
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
        numpy_helper.from_array(np.array(255, np.float32), "full"),
    ]
    ports = [("frames", TensorProto.UINT8, ["n", SIDE, SIDE, 3]), ("score", TensorProto.FLOAT, ["n"])]
    ports += [("heatmap", TensorProto.UINT8, ["n", SIDE // 4, SIDE // 4])]
    frames, *outputs = [helper.make_tensor_value_info(*port) for port in ports]
    graph = helper.make_graph(nodes, "network", [frames], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _conv(source: str, scope: str, target: str, **settings: list[int]) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, f"{scope}.weight", f"{scope}.bias"], [target], scope, **settings)


def write_network(folder: Path, tolerance: Tolerance = Tolerance(), *, fragile: bool = False) -> Bundle:
    """Write the network as a bundle, with its own results as the reference."""
    model = network(fragile=fragile)
    frames = np.random.default_rng(1).integers(0, 256, (6, SIDE // 4, SIDE // 4, 3), np.uint8)
    frames = np.ascontiguousarray(frames.repeat(4, 1).repeat(4, 2))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    scores, heatmaps = session.run(["score", "heatmap"], {"frames": frames})
    manifest = Manifest(
        name="network",
        created="2026-01-01T00:00:00+00:00",
        input=InputSpec(SIDE, SIDE, 3, "bgr"),
        output=OutputSpec(SIDE // 4, SIDE // 4, 0.0, 1.0),
        threshold=Threshold(float(np.median(scores)), 0.01, 4, ""),
        training=Training("none", "none", "none", 0, "", 0),
        tolerance=tolerance,
    )
    return bundle.write(folder, manifest, model, Parity(frames, scores, heatmaps))
