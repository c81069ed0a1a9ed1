"""An LSTM with random weights as two graphs: one step with its state as input and output, and the whole."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.graphs import info

INPUTS, HIDDEN = 3, 8

CONFIG = """
max_batch_size: %d
sequence_batching {
  max_sequence_idle_microseconds: %d
  %s
  state { input_name: "h" output_name: "h_out" data_type: TYPE_FP32 dims: [1, 8] }
  state { input_name: "c" output_name: "c_out" data_type: TYPE_FP32 dims: [1, 8] }
}
"""


def weights() -> list[onnx.TensorProto]:
    random = np.random.default_rng(7)
    shapes = {"w": (1, 4 * HIDDEN, INPUTS), "r": (1, 4 * HIDDEN, HIDDEN), "b": (1, 8 * HIDDEN)}
    return [
        numpy_helper.from_array(random.normal(0, 0.5, shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]


def step() -> onnx.GraphProto:
    """x [b, 3], h and c [b, 1, 8] → y [b, 8], h_out and c_out [b, 1, 8]: one step of b sequences."""
    axes = {"0": 0, "1": 1}
    constants = [helper.make_tensor(name, TensorProto.INT64, [1], [axis]) for name, axis in axes.items()]
    nodes = [
        helper.make_node("Unsqueeze", ["x", "0"], ["x_steps"]),
        helper.make_node("Transpose", ["h"], ["h_first"], perm=[1, 0, 2]),
        helper.make_node("Transpose", ["c"], ["c_first"], perm=[1, 0, 2]),
        helper.make_node(
            "LSTM",
            ["x_steps", "w", "r", "b", "", "h_first", "c_first"],
            ["", "h_last", "c_last"],
            hidden_size=HIDDEN,
        ),
        helper.make_node("Squeeze", ["h_last", "0"], ["y"]),
        helper.make_node("Transpose", ["h_last"], ["h_out"], perm=[1, 0, 2]),
        helper.make_node("Transpose", ["c_last"], ["c_out"], perm=[1, 0, 2]),
    ]
    state = [1, HIDDEN]
    return helper.make_graph(
        nodes,
        "step",
        [info("x", ["b", INPUTS]), info("h", ["b", *state]), info("c", ["b", *state])],
        [info("y", ["b", HIDDEN]), info("h_out", ["b", *state]), info("c_out", ["b", *state])],
        [*weights(), *constants],
    )


def whole() -> onnx.GraphProto:
    """x [t, 1, 3] → y [t, 1, 1, 8]: all steps of a sequence."""
    node = helper.make_node("LSTM", ["x", "w", "r", "b"], ["y"], hidden_size=HIDDEN)
    return helper.make_graph(
        [node], "whole", [info("x", ["t", 1, INPUTS])], [info("y", ["t", 1, 1, HIDDEN])], weights()
    )
