"""A graph's tensors that hold keys and values: found by the names in config.pbtxt, and checked.

Names are those of onnxruntime-genai's genai_config.json, with %d for a layer's number.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serve.runtime.session import GraphTensor

FLOATS: Mapping[str, np.dtype] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
"""The types that caches and logits may have."""
# The parameter and the default of an input, and those of the output that it becomes.
_KEYS_AND_VALUES = tuple(
    (f"past_{part}_names", f"past_key_values.%d.{part}", f"present_{part}_names", f"present.%d.{part}")
    for part in ("key", "value")
)
_COMBINED = (("past_names", "past_%d", "present_names", "present_%d"),)
_LONGEST_NUMBER = 9  # digits


@dataclass(frozen=True, slots=True)
class CacheTensors:
    """Where a graph takes and gives keys and values.

    Attributes:
        past: inputs, key and value of each layer in turn.
        present: the outputs that are the same after the run, in the same order.
        combined: keys and values of a layer are one tensor [2, batch, heads, tokens, head size]; if not, each
            is [batch, heads, tokens, head size].
        heads: of a layer's keys.
        head_size: numbers of a head's key.
        dtype: of those numbers.
        length: tokens that past holds, where the graph fixes it; None: any number.
        one_row: the batch is fixed at 1.
    """

    past: tuple[str, ...]
    present: tuple[str, ...]
    combined: bool
    heads: int
    head_size: int
    dtype: np.dtype
    length: int | None
    one_row: bool

    @property
    def bytes_per_token(self) -> int:
        """Of a token's keys and values in all layers."""
        parts = len(self.past) * (2 if self.combined else 1)
        return parts * self.heads * self.head_size * self.dtype.itemsize

    def shape(self, rows: int, tokens: int) -> tuple[int, ...]:
        """Of each of the tensors."""
        shape = (rows, self.heads, tokens, self.head_size)
        return (2, *shape) if self.combined else shape


def find_cache(
    parameters: Mapping[str, str], inputs: Mapping[str, GraphTensor], outputs: Mapping[str, GraphTensor]
) -> CacheTensors:
    """Find the cache's tensors by name.

    Args:
        parameters: config.pbtxt's.
        inputs: the graph's, by name.
        outputs: the graph's, by name.

    Raises:
        ModelLoadError: one is missing or doesn't fit the others, or nothing says how large a key is.
    """
    combined = "past_names" in parameters
    past, present = _names(parameters, inputs, outputs, combined=combined)
    tensors = [("input", inputs[name]) for name in past] + [("output", outputs[name]) for name in present]
    shape = _common_shape(tensors, combined=combined)
    if shape[-4] not in (-1, 1):
        raise ModelLoadError(f"input '{past[0]}': expected a batch of any size or of 1, got {shape}")
    return CacheTensors(
        past=past,
        present=present,
        combined=combined,
        heads=_size(shape[-3], parameters, "num_key_value_heads", past[0]),
        head_size=_size(shape[-1], parameters, "head_size", past[0]),
        dtype=FLOATS[inputs[past[0]].onnx_type],
        length=shape[-2] if shape[-2] != -1 else None,
        one_row=shape[-4] == 1,
    )


def missing(parameter: str, name: str, kind: str, tensors: Mapping[str, GraphTensor]) -> ModelLoadError:
    """The error for an input or output that a parameter, or its default, names."""
    return ModelLoadError(
        f"the graph has no {kind} '{name}', which parameter '{parameter}' of config.pbtxt names or defaults "
        f"to; it has {', '.join(sorted(tensors))}"
    )


def _names(
    parameters: Mapping[str, str],
    inputs: Mapping[str, GraphTensor],
    outputs: Mapping[str, GraphTensor],
    *,
    combined: bool,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of past and of present, layer by layer."""
    past, present = [], []
    for past_parameter, past_default, present_parameter, present_default in (
        _COMBINED if combined else _KEYS_AND_VALUES
    ):
        past.append(_layers(parameters, past_parameter, past_default, "input", inputs))
        present.append(_layers(parameters, present_parameter, present_default, "output", outputs))
    if len({len(names) for names in (*past, *present)}) > 1:
        counts = ", ".join(f"{len(names)} from '{names[0]}' on" for names in (*past, *present))
        raise ModelLoadError(f"the graph's cache has not as many layers in each of its parts: {counts}")
    return _in_turn(past), _in_turn(present)


def _in_turn(parts: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(itertools.chain.from_iterable(zip(*parts, strict=True)))


def _layers(
    parameters: Mapping[str, str], parameter: str, default: str, kind: str, tensors: Mapping[str, GraphTensor]
) -> list[str]:
    template = parameters.get(parameter, default)
    if template.count("%d") != 1:
        raise ModelLoadError(
            f"config.pbtxt: parameter '{parameter}' is {template!r}, expected a name with one %d, where the "
            "layer's number goes"
        )
    numbered = (template.replace("%d", str(layer)) for layer in itertools.count())
    names = list(itertools.takewhile(tensors.__contains__, numbered))
    if not names:
        raise missing(parameter, template.replace("%d", "0"), kind, tensors)
    return names


def _common_shape(tensors: Sequence[tuple[str, GraphTensor]], *, combined: bool) -> list[int]:
    """The shape that all of them have, with -1 for what none fixes."""
    dimensions = ["batch", "heads", "tokens", "head size"]
    shape = [-1] * len(dimensions)
    if combined:
        dimensions, shape = ["2", *dimensions], [2, *shape]
    expected_type = tensors[0][1].onnx_type
    for kind, tensor in tensors:
        if tensor.onnx_type not in FLOATS or tensor.onnx_type != expected_type:
            expected = expected_type if expected_type in FLOATS else " or ".join(FLOATS)
            raise ModelLoadError(
                f"{kind} '{tensor.name}' of the cache: expected {expected}, got {tensor.onnx_type}"
            )
        fits = len(tensor.shape) == len(shape) and all(
            size == -1 or want in (-1, size) for size, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            raise ModelLoadError(
                f"{kind} '{tensor.name}' of the cache: expected [{', '.join(dimensions)}], of which {shape} "
                f"is known, got {list(tensor.shape)}"
            )
        shape = [max(pair) for pair in zip(tensor.shape, shape, strict=True)]
    return shape


def _size(size: int, parameters: Mapping[str, str], parameter: str, name: str) -> int:
    """A dimension that the graph fixes, or else a parameter states."""
    if parameter not in parameters:
        if size == -1:
            raise ModelLoadError(
                f"config.pbtxt: parameter '{parameter}' is missing, and input '{name}' of the graph doesn't "
                "say it"
            )
        return size
    text = parameters[parameter]
    stated = int(text) if text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER else 0
    if not stated or size not in (-1, stated):
        expected = "a number above 0" if size == -1 else f"{size} as in input '{name}' of the graph"
        raise ModelLoadError(f"config.pbtxt: parameter '{parameter}' is {text!r}, expected {expected}")
    return stated
