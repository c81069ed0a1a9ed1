"""GPT-2's smallest size with random weights: as a repository entry, and as a folder of onnxruntime-genai."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch

from export.graph import export_graph, serialize
from train.decoding import CachedGPT
from train.gpt_serving import decode_graph
from train.transformer import GPT, initialize

if TYPE_CHECKING:
    from pathlib import Path

    from export.passes.weight_only import WeightOnly
    from train.family import ServingGraph

VOCABULARY, LAYERS, HEADS, WIDTH, CONTEXT = 50257, 12, 12, 768, 2048
CACHE_BYTES_PER_TOKEN = LAYERS * 2 * WIDTH * 4
# They read rows of their table, not the whole of it.
LOOKUPS = ("Gather", "GatherBlockQuantized")
CONFIG = f"""
model_transaction_policy {{ decoupled: true }}
parameters {{ key: "past_key_names" value: {{ string_value: "past_key_values.%d.key" }} }}
parameters {{ key: "past_value_names" value: {{ string_value: "past_key_values.%d.value" }} }}
parameters {{ key: "present_key_names" value: {{ string_value: "present.%d.key" }} }}
parameters {{ key: "present_value_names" value: {{ string_value: "present.%d.value" }} }}
parameters {{ key: "past_present_share_buffer" value: {{ string_value: "true" }} }}
parameters {{ key: "context_length" value: {{ string_value: "{CONTEXT}" }} }}
parameters {{ key: "max_num_seqs" value: {{ string_value: "16" }} }}
"""


@dataclass(frozen=True)
class Entry:
    """A model on disk.

    Attributes:
        weight_bytes: what a token reads of the graph: all weights, blocks' scales included, but no tables
            that rows are taken from (the output layer's is read as a product's weight).
        file_bytes: the graph's file.
    """

    weight_bytes: int
    file_bytes: int


def serving_graph() -> ServingGraph:
    """The decode graph before it is exported."""
    torch.manual_seed(0)
    gpt = GPT(
        vocabulary=VOCABULARY, layers=LAYERS, heads=HEADS, width=WIDTH, context=CONTEXT,
        dropout=0.0, channel_dropout=0.0, bias=True,
    ).eval()  # fmt: skip
    initialize(gpt, "gpt2")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 4 * CONTEXT)
    return decode_graph(CachedGPT(gpt).eval(), ids, ids)


def write_entry(serving: ServingGraph, settings: WeightOnly, model: Path, genai: Path) -> Entry:
    """Export, quantize and write both folders."""
    graph = settings.apply(export_graph(serving.module, serving.example)).model
    path = model / "1" / "model.onnx"
    path.parent.mkdir(parents=True)
    path.write_bytes(serialize(graph))
    (model / "config.pbtxt").write_text(CONFIG)
    entry = Entry(weights_read(graph.graph), path.stat().st_size)
    take_mask(graph.graph)
    genai.mkdir(parents=True)
    (genai / "model.onnx").write_bytes(serialize(graph))
    return entry


def weights_read(graph: ir.Graph) -> int:
    """Bytes of the initializers that a run reads from end to end."""
    rows = {v for node in graph if node.op_type in LOOKUPS for v in node.inputs}
    rows |= {node.inputs[0] for node in graph if node.op_type == "Reshape" and node.outputs[0] in rows}
    read = {v for node in graph if node.op_type not in (*LOOKUPS, "Reshape") for v in node.inputs if v}
    return sum(
        value.const_value.nbytes
        for value in graph.initializers.values()
        if value.const_value is not None and (value in read or value not in rows)
    )


def take_mask(graph: ir.Graph) -> None:
    """Compute the past's length from a mask of ones, which is what onnxruntime-genai feeds instead."""
    inputs = {value.name: value for value in graph.inputs}
    integers: Any = ir.TensorType(ir.DataType.INT64)
    mask = ir.Value(name="attention_mask", type=integers, shape=ir.Shape(["batch", "total"]))
    axis = ir.Value(name="mask_axis", type=integers, const_value=ir.tensor(np.array([1]), name="mask_axis"))
    graph.register_initializer(axis)
    total = ir.node("ReduceSum", [mask, axis])
    time = ir.node("Shape", [inputs["input_ids"]], {"start": 1, "end": 2})
    past = ir.node("Sub", [total.outputs[0], time.outputs[0]])
    ir.convenience.replace_all_uses_with(inputs["past_length"], past.outputs[0])
    graph.insert_before(graph[0], [total, time, past])
    graph.inputs[graph.inputs.index(inputs["past_length"])] = mask


def write_genai_config(genai: Path, threads: int) -> None:
    """What onnxruntime-genai's model builder writes for a decoder, with this one's names and sizes."""
    tensors = {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    presents = {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")}
    decoder = {
        "filename": "model.onnx",
        "session_options": {"intra_op_num_threads": threads, "provider_options": []},
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **tensors},
        "outputs": {"logits": "logits", **presents},
        "head_size": WIDTH // HEADS,
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
    }
    end = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), VOCABULARY - 1)
    model = {
        "type": "llama", "context_length": CONTEXT, "vocab_size": VOCABULARY, "decoder": decoder, **end,
    }  # fmt: skip
    search = {"do_sample": False, "max_length": CONTEXT, "num_beams": 1, "past_present_share_buffer": True}
    (genai / "genai_config.json").write_text(json.dumps({"model": model, "search": search}))
