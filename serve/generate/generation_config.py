"""What a generation model's config.pbtxt says: which models generate, and within which limits.

Tensors of the cache are named as in onnxruntime-genai's genai_config.json, limits as vLLM's engine arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve.errors import ModelLoadError
from serve.generate.decoder_graph import BOOLEANS
from serve.generate.decoder_graph import PARAMETERS as GRAPH_PARAMETERS
from serve.generate.settings import GenerationSettings

if TYPE_CHECKING:
    from serve.pb import model_config_pb2 as pb

GENERATION_MODEL = "generation_model"
CACHE_NAMES = ("past_key_names", "past_names")
MARKS = (*CACHE_NAMES, GENERATION_MODEL)
"""A config with one of these parameters is a generation model's, or its twin's."""

_COUNTS = (
    "context_length", "max_prompt_length", "default_max_tokens", "max_num_seqs", "kv_cache_memory_bytes",
    "max_num_batched_tokens", "max_queue_size",
)  # fmt: skip
_PREFIX_CACHING = "enable_prefix_caching"
_EOS = "eos_token_id"
_CACHE_BYTES = "kv_cache_memory_bytes"

PARAMETERS = (GENERATION_MODEL, *GRAPH_PARAMETERS, *_COUNTS, _PREFIX_CACHING, _EOS)
"""The names of all parameters of a generation model."""

_CACHE_SHARE = 4  # of the memory that the process may use, for a model's cache
_LONGEST_COUNT = 18  # digits, so that it is an int64

_REFUSED_FIELDS = {
    "dynamic_batching": "sequences join and leave the batch at every token",
    "sequence_batching": "the server keeps each text's keys and values, and a text is one request",
    "model_warmup": "the server warms a generation model up by itself",
}


def is_twin(message: pb.ModelConfig) -> bool:
    """Whether a model has no graph of its own but answers with a generation model's, all at once."""
    return GENERATION_MODEL in message.parameters


def is_generation(message: pb.ModelConfig) -> bool:
    """Whether a model's graph keeps keys and values in a cache, so that the server generates with it."""
    return any(name in message.parameters for name in CACHE_NAMES)


def twin_of(message: pb.ModelConfig) -> str:
    """The generation model that a twin answers with; empty: the model is no twin."""
    return message.parameters[GENERATION_MODEL].string_value if is_twin(message) else ""


def check_generation_fields(message: pb.ModelConfig) -> None:
    """Refuse what a generation model's config, or its twin's, can't have.

    Raises:
        ModelLoadError: it batches in another way or has several instances; a twin has settings of its own or
            streams.
    """
    for field, reason in _REFUSED_FIELDS.items():
        if message.HasField(field) if field != "model_warmup" else len(message.model_warmup):
            raise ModelLoadError(f"config.pbtxt: {field} can't go with token generation: {reason}; remove it")
    if message.max_batch_size:
        raise ModelLoadError(
            f"config.pbtxt: max_batch_size is {message.max_batch_size}, expected 0 for a generation model: "
            "requests carry one prompt each and are batched token by token; max_num_seqs says how many"
        )
    for group in message.instance_group:
        if group.count > 1:
            raise ModelLoadError(
                f"config.pbtxt: instance_group.count is {group.count}, expected 1 for a generation model: "
                "all its sequences share one cache and one run"
            )
    if is_twin(message):
        _check_twin(message)


def _check_twin(message: pb.ModelConfig) -> None:
    if not twin_of(message):
        raise _error(message, GENERATION_MODEL, "the name of a generation model")
    own = sorted(set(PARAMETERS[1:]) & set(message.parameters))
    if own:
        raise ModelLoadError(
            f"config.pbtxt: parameter '{own[0]}' can't go with '{GENERATION_MODEL}': a twin has no graph, "
            f"put it into the config of '{twin_of(message)}'"
        )
    if message.model_transaction_policy.decoupled:
        raise ModelLoadError(
            f"config.pbtxt: model_transaction_policy.decoupled can't go with '{GENERATION_MODEL}': a twin "
            f"answers each request once; '{twin_of(message)}' can stream"
        )


def generation_settings(
    message: pb.ModelConfig, *, cache_length: int | None, bytes_per_token: int, memory_limit: int
) -> GenerationSettings:
    """Read a generation model's limits and complete those that aren't given.

    Args:
        message: as config.pbtxt has it.
        cache_length: tokens that the graph's cache can hold; None: any number.
        bytes_per_token: of a token's keys and values in all layers.
        memory_limit: bytes that the process may use; 0: unknown.

    Raises:
        ModelLoadError: a parameter has a value that can't be, `context_length` is missing where the graph
            doesn't say it, or the cache can't hold one sequence of that length.
    """
    counts = {name: _count(message, name) for name in _COUNTS if name in message.parameters}
    budget = counts.pop(_CACHE_BYTES, None)
    context = counts.pop("context_length", None)
    context = _context_length(message, context, cache_length)
    settings: dict[str, Any] = {"context_length": context, "max_prompt_length": context - 1, **counts}
    if _PREFIX_CACHING in message.parameters:
        settings[_PREFIX_CACHING] = _switch(message, _PREFIX_CACHING)
    checked = GenerationSettings(**settings, eos_token_ids=_eos_token_ids(message))
    settings["cache_tokens"] = _cache_tokens(checked, budget, bytes_per_token, memory_limit)
    return GenerationSettings(**settings, eos_token_ids=checked.eos_token_ids)


def _error(message: pb.ModelConfig, name: str, expected: str) -> ModelLoadError:
    text = message.parameters[name].string_value
    return ModelLoadError(f"config.pbtxt: parameter '{name}' is {text!r}, expected {expected}")


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _LONGEST_COUNT


def _count(message: pb.ModelConfig, name: str) -> int:
    text = message.parameters[name].string_value.strip()
    if not _is_count(text):
        what = "bytes as a whole number without a unit" if name == _CACHE_BYTES else "a whole number"
        raise _error(message, name, what)
    return int(text)


def _switch(message: pb.ModelConfig, name: str) -> bool:
    value = BOOLEANS.get(message.parameters[name].string_value.strip().lower())
    if value is None:
        raise _error(message, name, "true or false")
    return value


def _eos_token_ids(message: pb.ModelConfig) -> frozenset[int]:
    if _EOS not in message.parameters:
        return frozenset()
    parts = [part.strip() for part in message.parameters[_EOS].string_value.split(",")]
    if not all(map(_is_count, parts)):
        raise _error(message, _EOS, "a token's id, or several with commas between them")
    return frozenset(map(int, parts))


def _context_length(message: pb.ModelConfig, stated: int | None, cache_length: int | None) -> int:
    if stated is None:
        if cache_length is None:
            raise ModelLoadError(
                "config.pbtxt: parameter 'context_length' is missing, and the graph's cache has no fixed "
                "length that would say it: state how many tokens the model was made for"
            )
        return cache_length
    if cache_length is not None and stated > cache_length:
        raise _error(message, "context_length", f"{cache_length} at most, the length of the graph's cache")
    return stated


def _cache_tokens(
    settings: GenerationSettings, budget: int | None, bytes_per_token: int, memory_limit: int
) -> int:
    """Tokens that the cache may hold: as many as the budget's bytes, or as all slots can ever need."""
    everything = settings.max_num_seqs * settings.context_length
    one = settings.context_length * bytes_per_token
    needs = f"one sequence of context_length, {settings.context_length} tokens, takes {one} bytes"
    if budget is not None:
        if budget < one:
            raise ModelLoadError(
                f"config.pbtxt: parameter '{_CACHE_BYTES}' is {budget}, but {needs}: give as much, or lower "
                "context_length"
            )
        return min(everything, budget // bytes_per_token)
    if not memory_limit:
        return everything
    share = memory_limit // _CACHE_SHARE
    if share < one:
        raise ModelLoadError(
            f"config.pbtxt: {needs}, and a quarter of the memory that the server may use is {share}: lower "
            f"context_length, or give parameter '{_CACHE_BYTES}'"
        )
    return min(everything, share // bytes_per_token)
