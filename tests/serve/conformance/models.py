"""The models that the table asks, as graphs on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import GraphProto, TensorProto, helper

from tests.graphs import ONNX_TYPES, addition, gather, identity, info, multiplication, scaled, write_model

if TYPE_CHECKING:
    from pathlib import Path

_BATCHER = "max_batch_size: 1 instance_group { count: 1 kind: KIND_CPU } dynamic_batching { %s }"

QUEUES = {
    "queue_size": "default_queue_policy { max_queue_size: 1 }",
    "queue_reject": "default_queue_policy { default_timeout_microseconds: 1000 }",
    "queue_delay": "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1000 }",
    "queue_override": "default_queue_policy { default_timeout_microseconds: 60000000 "
    "allow_timeout_override: true }",
    "queue_fixed": "default_queue_policy { default_timeout_microseconds: 60000000 }",
    "queue_priority": "priority_levels: 2 default_priority_level: 2",
}

_SEQUENCES = """
max_batch_size: %d
instance_group { count: 1 kind: KIND_CPU }
sequence_batching {
  max_sequence_idle_microseconds: %d
  %s
  control_input { name: "start" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } }
  control_input { name: "end" control { kind: CONTROL_SEQUENCE_END int32_false_true: [0, 1] } }
  control_input { name: "id" control { kind: CONTROL_SEQUENCE_CORRID data_type: %s } }
  state { input_name: "state" output_name: "next" data_type: TYPE_FP32 dims: [1] }
}
"""
_MINUTES = 600_000_000
_DIRECT, _OLDEST = "direct {}", "oldest { max_candidate_sequences: %d }"


def running_sum(id_type: int) -> GraphProto:
    """y = x + the sum so far; who, first and last are what the server says of the sequence."""
    nodes = [
        helper.make_node("Add", ["x", "state"], ["y"]),
        helper.make_node("Identity", ["y"], ["next"]),
        helper.make_node("Identity", ["start"], ["first"]),
        helper.make_node("Identity", ["end"], ["last"]),
        helper.make_node("Identity", ["id"], ["who"]),
    ]
    shape: list[int | str | None] = ["b", 1]
    floats = {name: info(name, shape) for name in ("x", "state", "y", "next")}
    flags = {name: info(name, shape, TensorProto.INT32) for name in ("start", "end", "first", "last")}
    ids = {name: info(name, shape, id_type) for name in ("id", "who")}
    tensors = floats | flags | ids
    inputs, outputs = ("x", "state", "start", "end", "id"), ("y", "next", "first", "last", "who")
    return helper.make_graph(nodes, "sum", [tensors[i] for i in inputs], [tensors[o] for o in outputs])


_COUNTER = "model_transaction_policy { decoupled: true }" + "".join(
    f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
    for key, value in {
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
        "context_length": "200000",
    }.items()
)
_COUNTS_TO = 16


def counter() -> GraphProto:
    """A decoder whose every next token is one more than the last, and 0 after 15."""
    nodes = [
        helper.make_node("Add", ["input_ids", "one"], ["more"]),
        helper.make_node("Mod", ["more", "depth"], ["next"]),
        helper.make_node("OneHot", ["next", "depth", "scores"], ["logits"]),
        helper.make_node("Unsqueeze", ["input_ids", "axes"], ["wide"]),
        helper.make_node("Cast", ["wide"], ["read"], to=TensorProto.FLOAT),
    ]
    past, present = [], []
    for part in ("key", "value"):
        names = (f"past_key_values.0.{part}", f"present.0.{part}")
        nodes.append(helper.make_node("Concat", [names[0], "read"], [names[1]], axis=2))
        past.append(info(names[0], ["batch", 1, "past", 1]))
        present.append(info(names[1], ["batch", 1, "total", 1]))
    constants = [
        helper.make_tensor("one", TensorProto.INT64, [], [1]),
        helper.make_tensor("depth", TensorProto.INT64, [], [_COUNTS_TO]),
        helper.make_tensor("scores", TensorProto.FLOAT, [2], [0, 1000]),
        helper.make_tensor("axes", TensorProto.INT64, [2], [1, 3]),
    ]
    ids = info("input_ids", ["batch", "time"], TensorProto.INT64)
    logits = info("logits", ["batch", "time", _COUNTS_TO])
    return helper.make_graph(nodes, "counter", [ids, *past], [logits, *present], constants)


def slow() -> GraphProto:
    """y = n, after n multiplications of a 128 × 128 matrix by itself, 10 to 100 µs each; one row."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Squeeze", ["n"], ["times"]),
        helper.make_node("Loop", ["times", "", "zeros"], ["product"], body=multiplication()),
        helper.make_node("Cast", ["product"], ["whole"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["whole"], ["zero"], keepdims=0),
        helper.make_node("Add", ["n", "zero"], ["y"]),
    ]
    shape = helper.make_tensor("shape", TensorProto.INT64, [2], [128, 128])
    tensors = [info(name, ["b", 1], TensorProto.INT64) for name in ("n", "y")]
    return helper.make_graph(nodes, "slow", tensors[:1], tensors[1:], [shape])


def _write(
    root: Path, name: str, graph: GraphProto, config: str = "", versions: tuple[int, ...] = (1,)
) -> None:
    for version in versions:
        write_model(root / name, graph, version)
    if config:
        (root / name / "config.pbtxt").write_text(config)


def write_served(root: Path) -> Path:
    """The models of the server that loads all it finds."""
    for name, onnx_type in ONNX_TYPES.items():
        _write(root, f"identity_{name.lower()}", identity(["n", "m"], onnx_type))
    _write(root, "fixed", identity([1, 3]))
    _write(root, "reshaped", identity(["n"]), (
        'input { name: "x" data_type: TYPE_FP32 dims: [1] reshape { shape: [] } } '
        'output { name: "y" data_type: TYPE_FP32 dims: [1] reshape { shape: [] } } max_batch_size: 4'
    ))  # fmt: skip
    _write(root, "batched", addition(), "max_batch_size: 4")
    _write(root, "counted", addition(), "max_batch_size: 4")
    labelled = 'output { name: "y" data_type: TYPE_FP32 dims: [3] label_filename: "labels.txt" }'
    _write(root, "labelled", identity(["n", 3]), f"max_batch_size: 8 {labelled}")
    (root / "labelled" / "labels.txt").write_text("cat\ndog\n")
    _write(root, "unlabelled", identity([3]))
    _write(root, "gather", gather())
    for version in (2, 9, 10):
        write_model(root / "latest", scaled(version), version)
        write_model(root / "all", scaled(version), version)
        write_model(root / "specific", scaled(version), version)
    (root / "all" / "config.pbtxt").write_text("version_policy { all {} }")
    (root / "specific" / "config.pbtxt").write_text("version_policy { specific { versions: [2, 9] } }")
    _write(root, "slow", slow(), "max_batch_size: 1 instance_group { count: 1 kind: KIND_CPU }")
    for name, policy in QUEUES.items():
        _write(root, name, slow(), _BATCHER % policy)
    _write(root, "counter", counter(), _COUNTER)
    _write_sequences(root)
    return root


def _write_sequences(root: Path) -> None:
    numbered = running_sum(TensorProto.UINT64)
    _write(root, "sum", numbered, _SEQUENCES % (4, _MINUTES, _DIRECT, "TYPE_UINT64"))
    _write(root, "sum_oldest", numbered, _SEQUENCES % (4, _MINUTES, _OLDEST % 4, "TYPE_UINT64"))
    _write(root, "sum_named", running_sum(TensorProto.STRING),
           _SEQUENCES % (4, _MINUTES, _DIRECT, "TYPE_STRING"))  # fmt: skip
    _write(root, "sum_one_slot", numbered, _SEQUENCES % (1, 300_000, _DIRECT, "TYPE_UINT64"))


def write_controlled(root: Path) -> Path:
    """The models of the server that loads what it is told to."""
    _write(root, "loadable", scaled(1), versions=(1, 2))
    _write(root, "kept", scaled(1))
    _write(root, "slow", slow(), "max_batch_size: 1 instance_group { count: 1 kind: KIND_CPU }")
    _write(root, "decoupled", scaled(1), "model_transaction_policy { decoupled: true }")
    (root / "broken" / "1").mkdir(parents=True)
    (root / "broken" / "1" / "model.onnx").write_bytes(b"no graph")
    return root
