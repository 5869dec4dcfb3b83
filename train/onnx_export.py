"""From a torch module over uint8 frames to ONNX bytes with a dynamic batch."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
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
        return bytes(as_convolutions(onnx.load(path)).SerializeToString())


def as_convolutions(model: ModelProto) -> ModelProto:
    """Write products of stacks of matrices with constant ones as grouped 1x1 convolutions, which are the same sums.

    TensorRT has no float32 matrix product for every GPU (compute capability 7.5), but has the convolution; on a CPU
    the convolution is no slower. Constants keep their type: half floats stay half floats in the file.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    nodes: list[NodeProto] = []
    for node in graph.node:
        cast = makers.get(node.input[1]) if node.op_type == "MatMul" else None
        source = cast.input[0] if cast is not None and cast.op_type == "Cast" else ""
        name = source or (node.input[1] if node.op_type == "MatMul" else "")
        stack = constants.get(name)
        if stack is None or len(stack.dims) != 3:
            nodes.append(node)
        else:
            added, tensors = _convolution(node, numpy_helper.to_array(stack), cast=bool(source))
            nodes += added
            graph.initializer.extend(tensors)
    del graph.node[:]
    graph.node.extend(nodes)
    return _without_waste(model)


def _convolution(node: NodeProto, stack: np.ndarray, *, cast: bool) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes and constants that multiply ``(b, m, k)`` by ``stack`` ``(b, k, n)``."""
    groups, inner, outer = stack.shape
    kernel = np.ascontiguousarray(stack.transpose(0, 2, 1)).reshape(groups * outer, inner, 1, 1)
    own = [f"{node.name}_{part}" for part in ("rows", "image", "weight", "kernel", "products", "stack")]
    rows, image, weight, kernel_name, products, split = own
    tensors = [
        numpy_helper.from_array(kernel, weight),
        numpy_helper.from_array(np.array([1, groups * inner, -1, 1], np.int64), f"{image}_shape"),
        numpy_helper.from_array(np.array([groups, outer, -1], np.int64), f"{split}_shape"),
    ]
    used = kernel_name if cast else weight
    nodes = [
        helper.make_node("Transpose", [node.input[0]], [rows], f"{rows}_node", perm=[0, 2, 1]),
        helper.make_node("Reshape", [rows, f"{image}_shape"], [image], f"{image}_node"),
        helper.make_node("Conv", [image, used], [products], f"{products}_node", group=groups, kernel_shape=[1, 1]),
        helper.make_node("Reshape", [products, f"{split}_shape"], [split], f"{split}_node"),
        helper.make_node("Transpose", [split], list(node.output), node.name, perm=[0, 2, 1]),
    ]
    if cast:
        nodes.insert(2, helper.make_node("Cast", [weight], [used], f"{used}_node", to=TensorProto.FLOAT))
    return nodes, tensors


def _without_waste(model: ModelProto) -> ModelProto:
    """Drop casts and constants that nothing reads any more, and the exporter's notes on who called what from where."""
    graph = model.graph
    del graph.metadata_props[:], model.metadata_props[:]
    for entry in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        entry.doc_string = ""
        del entry.metadata_props[:]
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    nodes = [node for node in graph.node if read & set(node.output)]
    read = {name for node in nodes for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    return model
