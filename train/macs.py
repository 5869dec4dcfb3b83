"""Multiply-accumulates of an ONNX graph, the usual measure of what an engine costs on any machine."""

from __future__ import annotations

from math import prod
from pathlib import Path

import onnx
from onnx import ModelProto, NodeProto, shape_inference

Shapes = dict[str, list[int]]


def graph_macs(path: Path) -> int:
    """Multiply-accumulates of one frame, counted in convolutions and matrix products; the rest is small beside them.

    Args:
        path: An ONNX graph whose inputs have a dynamic batch, or a batch of one, and are fixed otherwise.

    Raises:
        ValueError: if a shape that is needed cannot be inferred.
    """
    model = onnx.load(str(path))
    for entry in model.graph.input:
        entry.type.tensor_type.shape.dim[0].dim_value = 1
    # Shapes that the exporter left behind name the batch: infer all of them anew, for a batch of one.
    del model.graph.value_info[:]
    for entry in model.graph.output:
        entry.type.tensor_type.ClearField("shape")
    shapes = _shapes(shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))
    return sum(_macs(node, shapes) for node in model.graph.node)


def _shapes(model: ModelProto) -> Shapes:
    graph = model.graph
    known = {
        entry.name: [d.dim_value for d in entry.type.tensor_type.shape.dim]
        for entry in (*graph.input, *graph.value_info, *graph.output)
    }
    return {**known, **{tensor.name: list(tensor.dims) for tensor in graph.initializer}}


def _macs(node: NodeProto, shapes: Shapes) -> int:
    if node.op_type == "Conv":  # each output looks at one kernel of (channels in / groups) x kernel
        return _size(node.output[0], shapes) * prod(shapes[node.input[1]][1:])
    if node.op_type == "ConvTranspose":  # each input is spread over one kernel of (channels out / groups) x kernel
        return _size(node.input[0], shapes) * prod(shapes[node.input[1]][1:])
    if node.op_type in {"MatMul", "Gemm"}:
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        _size(node.input[0], shapes)
        return _size(node.output[0], shapes) * shapes[node.input[0]][0 if transposed else -1]
    return 0


def _size(name: str, shapes: Shapes) -> int:
    shape = shapes.get(name)
    if not shape or not all(shape):
        msg = f"{name}: its shape, {shape}, is not known"
        raise ValueError(msg)
    return prod(shape)
