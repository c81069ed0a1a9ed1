"""Which inputs and outputs a decoder's graph has for its tokens and its cache, as config.pbtxt names them.

Two kinds of caches are known:

- written in place: past and present are one buffer of fixed length, a row's tokens begin at its start, and
  the graph writes behind them (onnxruntime's GroupQueryAttention);
- growing: present is past and the new tokens behind it, as Hugging Face's exporters write it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import ModelLoadError
from serve.generate.cache_tensors import FLOATS, find_cache, missing

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from serve.generate.cache_tensors import CacheTensors
    from serve.pb import model_config_pb2 as pb
    from serve.runtime.session import GraphTensor

PARAMETERS = (
    "input_ids", "attention_mask", "position_ids", "past_length", "logits", "past_key_names",
    "past_value_names", "present_key_names", "present_value_names", "past_names", "present_names",
    "num_key_value_heads", "head_size", "past_present_share_buffer",
)  # fmt: skip
"""What is read here of a config's parameters."""

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
"""How a parameter says yes and no."""

_INTEGERS: Mapping[str, np.dtype] = {"tensor(int64)": np.dtype(np.int64), "tensor(int32)": np.dtype(np.int32)}
_BOOLEANS: Mapping[str, np.dtype] = {"tensor(bool)": np.dtype(np.bool_)}
_LAST_ROW, _ALL_ROWS = 2, 3  # ranks of the logits
_ALWAYS_TRUE = "use_cache_branch"  # of graphs by optimum that work with a cache and without


@dataclass(frozen=True, slots=True)
class Feed:
    """An input that the server fills: its name, and the type of its numbers."""

    name: str
    dtype: np.dtype


@dataclass(frozen=True, slots=True)
class Logits:
    """The output that scores the next token.

    Attributes:
        name: the output's.
        dtype: FP32 or FP16.
        vocabulary: its last dimension; 0: the graph doesn't say.
        rank: 3: [batch, time or 1, vocabulary]; 2: [batch, vocabulary].
    """

    name: str
    dtype: np.dtype
    vocabulary: int
    rank: int

    def shape(self, rows: int) -> tuple[int, ...]:
        """After one token in each row."""
        return (rows, self.vocabulary) if self.rank == _LAST_ROW else (rows, 1, self.vocabulary)


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """The tensors of a decoder's graph.

    Attributes:
        input_ids: [batch, time], the tokens to read.
        attention_mask: [batch, past and new tokens], 1 where a token is; None: the graph has no such input.
        position_ids: [batch, time], each token's place in its text; None: the graph has no such input.
        past_length: [batch, 1], tokens that each row's cache holds; None: the graph has no such input.
        constants: what every run takes besides.
        logits: the output.
        cache: keys and values.
        in_place: present is written into the memory of past; if not, it is longer by the new tokens.
        one_row: the graph takes no more than one row.
    """

    input_ids: Feed
    attention_mask: Feed | None
    position_ids: Feed | None
    past_length: Feed | None
    constants: Mapping[str, np.ndarray]
    logits: Logits
    cache: CacheTensors
    in_place: bool
    one_row: bool

    @property
    def bytes_per_token(self) -> int:
        """Of a token's keys and values in all layers."""
        return self.cache.bytes_per_token

    @property
    def cache_length(self) -> int | None:
        """Tokens that the cache holds, where the graph fixes it; None: any number."""
        return self.cache.length

    @staticmethod
    def from_config(
        message: pb.ModelConfig, inputs: Sequence[GraphTensor], outputs: Sequence[GraphTensor]
    ) -> DecoderGraph:
        """Find the tensors, and check that they can be filled.

        Args:
            message: as config.pbtxt has it; `PARAMETERS` are read.
            inputs: the graph's.
            outputs: the graph's.

        Raises:
            ModelLoadError: a tensor is missing, has an unexpected type or shape, or nothing is known to fill
                it with.
        """
        parameters = {name: value.string_value.strip() for name, value in message.parameters.items()}
        by_name = {tensor.name: tensor for tensor in inputs}
        return _read(parameters, by_name, {tensor.name: tensor for tensor in outputs})


def _read(
    parameters: Mapping[str, str], inputs: Mapping[str, GraphTensor], outputs: Mapping[str, GraphTensor]
) -> DecoderGraph:
    ids = _feed("input_ids", parameters, inputs, _INTEGERS)
    if ids is None:
        raise missing("input_ids", "input_ids", "input", inputs)
    mask = _feed("attention_mask", parameters, inputs, {**_INTEGERS, **FLOATS, **_BOOLEANS})
    positions = _feed("position_ids", parameters, inputs, _INTEGERS)
    length = _feed("past_length", parameters, inputs, _INTEGERS, width=1)
    cache = find_cache(parameters, inputs, outputs)
    return DecoderGraph(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_length=length,
        constants=_constants(inputs, {f.name for f in (ids, mask, positions, length) if f}, cache),
        logits=_logits(parameters, outputs),
        cache=cache,
        in_place=_in_place(parameters, mask, length, cache),
        one_row=cache.one_row or inputs[ids.name].shape[0] == 1,
    )


def _feed(
    parameter: str,
    parameters: Mapping[str, str],
    inputs: Mapping[str, GraphTensor],
    types: Mapping[str, np.dtype],
    width: int = -1,
) -> Feed | None:
    """The input [batch, width] that a parameter names, or that is called like it."""
    name = parameters.get(parameter, parameter)
    if name not in inputs:
        if parameter in parameters:
            raise missing(parameter, name, "input", inputs)
        return None
    tensor = inputs[name]
    _check_type(tensor, "input", types)
    if tensor.shape not in {(rows, columns) for rows in (-1, 1) for columns in (-1, width)}:
        raise ModelLoadError(
            f"input '{name}' ({parameter}): expected shape {[-1, width]}, where -1 is any size, got "
            f"{list(tensor.shape)}"
        )
    return Feed(name, types[tensor.onnx_type])


def _logits(parameters: Mapping[str, str], outputs: Mapping[str, GraphTensor]) -> Logits:
    name = parameters.get("logits", "logits")
    if name not in outputs:
        raise missing("logits", name, "output", outputs)
    tensor = outputs[name]
    _check_type(tensor, "output", FLOATS)
    if len(tensor.shape) not in (_LAST_ROW, _ALL_ROWS):
        raise ModelLoadError(
            f"output '{name}' (logits): expected shape [batch, time, vocabulary] or [batch, vocabulary], got "
            f"{list(tensor.shape)}"
        )
    return Logits(name, FLOATS[tensor.onnx_type], max(tensor.shape[-1], 0), len(tensor.shape))


def _check_type(tensor: GraphTensor, kind: str, types: Iterable[str]) -> None:
    if tensor.onnx_type not in types:
        expected = " or ".join(types)
        raise ModelLoadError(f"{kind} '{tensor.name}': expected {expected}, got {tensor.onnx_type}")


def _in_place(
    parameters: Mapping[str, str], mask: Feed | None, length: Feed | None, cache: CacheTensors
) -> bool:
    stated = parameters.get("past_present_share_buffer", "false")
    if stated.lower() not in BOOLEANS:
        raise ModelLoadError(
            f"config.pbtxt: parameter 'past_present_share_buffer' is {stated!r}, expected true or false"
        )
    in_place = length is not None or BOOLEANS[stated.lower()]
    if in_place and cache.combined:
        raise ModelLoadError(
            f"input '{cache.past[0]}' holds keys and values of a layer in one tensor, which can't be written "
            "in place row by row: remove parameter 'past_present_share_buffer', or export them apart"
        )
    if in_place and mask is None and length is None:
        raise ModelLoadError(
            "config.pbtxt: parameter 'past_present_share_buffer' is true, but the graph has neither an input "
            "'attention_mask' nor 'past_length': nothing tells it how many tokens the cache holds"
        )
    if not in_place and cache.length is not None:
        raise ModelLoadError(
            f"input '{cache.past[0]}' of the cache: expected any number of tokens, got {cache.length}; where "
            "the graph writes into the cache in place, set parameter 'past_present_share_buffer' to true"
        )
    return in_place


def _constants(
    inputs: Mapping[str, GraphTensor], filled: Collection[str], cache: CacheTensors
) -> dict[str, np.ndarray]:
    """What else the graph takes; an error where nobody knows what that could be."""
    constants = {}
    for name in inputs.keys() - {*filled, *cache.past}:
        tensor = inputs[name]
        if name != _ALWAYS_TRUE or tensor.onnx_type not in _BOOLEANS:
            raise ModelLoadError(
                f"input '{name}' of the graph ({tensor.onnx_type}, {list(tensor.shape)}) is needed at every "
                "run, and token generation has nothing to put there: expected "
                f"{', '.join(sorted(filled))} and the cache, no more"
            )
        constants[name] = np.ones([max(size, 1) for size in tensor.shape], np.bool_)
    return constants
