"""Export: products of stacks of matrices become convolutions, with the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from train.onnx_export import as_convolutions


@pytest.mark.parametrize("half", [False, True])
def test_products_of_stacks_become_grouped_convolutions(half: bool) -> None:
    """The rewritten graph has no matrix product, gives the same sums for any number of rows, and stays as small.

    Nor does it say on whose machine it was made.
    """
    random = np.random.default_rng(0)
    stack = random.normal(size=(5, 6, 7)).astype(np.float16 if half else np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w" if half else "stack"], ["y"], "product")]
    if half:
        nodes.insert(0, helper.make_node("Cast", ["stack"], ["w"], "cast", to=TensorProto.FLOAT))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, "m", 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, "m", 7])
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(stack, "stack")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    size = len(model.SerializeToString())
    graph_note, node_note = model.graph.metadata_props.add(), model.graph.node[-1].metadata_props.add()
    for note in (graph_note, node_note):
        note.key, note.value = "stack_trace", "File /home/somebody/module.py"
    rewritten = as_convolutions(model)
    onnx.checker.check_model(rewritten)
    assert b"/home/somebody" not in rewritten.SerializeToString()
    assert "MatMul" not in {node.op_type for node in rewritten.graph.node}
    assert len(rewritten.SerializeToString()) < size + 1000
    session = onnxruntime.InferenceSession(rewritten.SerializeToString(), providers=["CPUExecutionProvider"])
    for rows in (1, 3):
        given = random.normal(size=(5, rows, 6)).astype(np.float32)
        (found,) = session.run(["y"], {"x": given})
        np.testing.assert_allclose(found, given @ stack.astype(np.float32), rtol=1e-5, atol=1e-5)
