"""The tensors that a generation model's clients see, whatever those of its graph are.

Names and semantics are those of Triton's generate models (its vLLM and TensorRT-LLM backends).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.errors import ModelLoadError
from serve.model.model_config import ModelConfig, TensorSpec, complete_config
from serve.pb import model_config_pb2 as pb
from serve.protocol.datatypes import DATATYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any


def _specs(*rows: tuple[str, str, int]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, DATATYPES[datatype], (size,)) for name, datatype, size in rows}


TEXT_INPUT, INPUT_IDS = "text_input", "input_ids"
TEXT_OUTPUT, OUTPUT_IDS, FINISH_REASON = "text_output", "output_ids", "finish_reason"
NUM_INPUT_TOKENS, NUM_OUTPUT_TOKENS = "num_input_tokens", "num_output_tokens"
SAMPLING_PARAMETERS = "sampling_parameters"

_INPUTS = _specs(
    (TEXT_INPUT, "BYTES", 1),
    (INPUT_IDS, "INT64", -1),
    ("max_tokens", "INT32", 1),
    ("min_tokens", "INT32", 1),
    ("temperature", "FP32", 1),
    ("top_k", "INT32", 1),
    ("top_p", "FP32", 1),
    ("min_p", "FP32", 1),
    ("repetition_penalty", "FP32", 1),
    ("presence_penalty", "FP32", 1),
    ("frequency_penalty", "FP32", 1),
    ("seed", "UINT64", 1),
    ("random_seed", "UINT64", 1),
    ("stop", "BYTES", -1),
    ("stop_words", "BYTES", -1),
    ("stream", "BOOL", 1),
    ("ignore_eos", "BOOL", 1),
    ("exclude_input_in_output", "BOOL", 1),
    (SAMPLING_PARAMETERS, "BYTES", 1),
    ("return_finish_reason", "BOOL", 1),
    ("return_num_input_tokens", "BOOL", 1),
    ("return_num_output_tokens", "BOOL", 1),
)
_OUTPUTS = _specs(
    (TEXT_OUTPUT, "BYTES", -1),
    (OUTPUT_IDS, "INT64", -1),
    (FINISH_REASON, "BYTES", -1),
    (NUM_INPUT_TOKENS, "UINT32", 1),
    (NUM_OUTPUT_TOKENS, "UINT32", -1),
)
_OF_TEXT = (TEXT_INPUT, TEXT_OUTPUT, "stop", "stop_words")


def input_specs(*, has_tokenizer: bool) -> dict[str, TensorSpec]:
    """The inputs by name; those of text only where there is a tokenizer."""
    return _with_text(_INPUTS, has_tokenizer=has_tokenizer)


def output_specs(*, has_tokenizer: bool) -> dict[str, TensorSpec]:
    """The outputs by name, in the order in which they are answered."""
    return _with_text(_OUTPUTS, has_tokenizer=has_tokenizer)


def _with_text(specs: Mapping[str, TensorSpec], *, has_tokenizer: bool) -> dict[str, TensorSpec]:
    return {name: spec for name, spec in specs.items() if has_tokenizer or name not in _OF_TEXT}


def generation_model_config(message: pb.ModelConfig, name: str, *, has_tokenizer: bool) -> ModelConfig:
    """A generation model's config, or its twin's, completed: `serve.model.model_config.resolve` for those.

    Args:
        message: what `read_config` returned.
        name: the model's name.
        has_tokenizer: whether the model takes and gives text.

    Raises:
        ModelLoadError: the config states a tensor that a generation model doesn't have, or of another type.
    """
    inputs, outputs = input_specs(has_tokenizer=has_tokenizer), output_specs(has_tokenizer=has_tokenizer)
    for role, stated, specs in (("input", message.input, inputs), ("output", message.output, outputs)):
        _check_stated(role, stated, specs, has_tokenizer=has_tokenizer)
    completed = complete_config(message, name, inputs, outputs)
    for field in completed.input:
        # With a tokenizer a prompt may come in either form, so that none of them is always there.
        field.optional = has_tokenizer or field.name != INPUT_IDS
    return ModelConfig(name, 0, inputs, outputs, completed)


def _check_stated(
    role: str, stated: Iterable[Any], specs: Mapping[str, TensorSpec], *, has_tokenizer: bool
) -> None:
    seen: set[str] = set()
    for field in stated:
        spec = specs.get(field.name)
        if spec is None:
            advice = "" if has_tokenizer else "; tensors of text need a tokenizer beside the graph"
            raise ModelLoadError(
                f"config.pbtxt: a generation model has no {role} '{field.name}', it has {list(specs)}{advice}"
            )
        if field.name in seen:
            raise ModelLoadError(f"config.pbtxt: {role} '{field.name}' is there twice: remove one")
        seen.add(field.name)
        datatype = pb.DataType.Name(field.data_type)
        if field.data_type and datatype != spec.datatype.config:
            raise ModelLoadError(
                f"config.pbtxt: {role} '{field.name}' is {datatype}, expected {spec.datatype.config}"
            )
        dims = list(field.dims)
        if dims not in ([], [1], [-1]):
            raise ModelLoadError(
                f"config.pbtxt: {role} '{field.name}' has dims {dims}, expected {list(spec.shape)}"
            )
