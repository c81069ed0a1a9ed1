"""What a request says about how to generate: one value a field, from three places and in many spellings.

As Triton's vLLM backend takes them: request parameters, the JSON in `sampling_parameters` (where clients
write numbers as strings, too), which may be either, and here each field also as an input of its own.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.errors import InvalidArgumentError
from serve.generate.stop_strings import MAX_STOP_BYTES, MAX_STOPS
from serve.generate.tensors import SAMPLING_PARAMETERS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from serve.request import Parameter, Tensor

_LONGEST_JSON = 64 << 10
_INTEGER = re.compile("[+-]?[0-9]{1,31}")  # Python reads other scripts' digits as well, and 1_0 as 10
_OF_NUMBERS = frozenset("0123456789+-.eE")
_RANGE = range(-(2**63), 2**64)  # INT64, and UINT64 for seeds
_SWITCHES = {"true": True, "1": True, "false": False, "0": False}
_INTEGERS = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
_NUMBERS = ("FP16", "FP32", "FP64", *_INTEGERS)


def integer(what: str, value: Any) -> int:
    """A whole number, also one written as text; `what` names it in an error."""
    try:
        if isinstance(value, str) and _INTEGER.fullmatch(value):
            value = int(value)
        elif isinstance(value, float):
            value = int(value) if value == int(value) else value
    except (ValueError, OverflowError):  # not a number, or infinite
        value = str(value)
    if isinstance(value, bool) or not isinstance(value, int) or value not in _RANGE:
        raise _wrong(what, "a whole number", value)
    return value


def count(what: str, value: Any) -> int:
    """A whole number of 1 or more."""
    found = integer(what, value)
    if found < 1:
        raise InvalidArgumentError(f"{what} is {found}, expected 1 or more")
    return found


def number(what: str, value: Any) -> float:
    """A finite number, also one written as text."""
    try:
        right = _OF_NUMBERS.issuperset(value) if isinstance(value, str) else isinstance(value, (int, float))
        if not right or isinstance(value, bool):
            raise _wrong(what, "a number", value)
        found = float(value)
    except (ValueError, OverflowError) as error:
        raise _wrong(what, "a number", value) from error
    if not math.isfinite(found):
        raise _wrong(what, "a finite number", value)
    return found


def switch(what: str, value: Any) -> bool:
    """True or false, also 1 and 0, and these as text."""
    found = _SWITCHES.get(str(value).lower())
    if found is None or isinstance(value, float):
        raise _wrong(what, "true or false", value)
    return found


def texts(what: str, value: Any) -> tuple[str, ...]:
    """One text, or a list of them; at most `MAX_STOPS`, none of them empty."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(text, str) for text in found):
        raise _wrong(what, "a text or a list of texts", value)
    if len(found) > MAX_STOPS:
        raise InvalidArgumentError(f"{what}: expected {MAX_STOPS} texts at most, got {len(found)}")
    for text in found:
        size = len(text.encode(errors="surrogatepass"))  # JSON can spell half a pair
        if not 1 <= size <= MAX_STOP_BYTES:
            raise InvalidArgumentError(
                f"{what}: expected texts of 1 to {MAX_STOP_BYTES} bytes, got one of {size}"
            )
    return tuple(found)


def _wrong(what: str, expected: str, value: Any) -> InvalidArgumentError:
    return InvalidArgumentError(f"{what}: expected {expected}, got {str(value)[:100]!r}")


_SAMPLING_KINDS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": count,
    "min_tokens": integer,
    "temperature": number,
    "top_k": integer,
    "top_p": number,
    "min_p": number,
    "repetition_penalty": number,
    "presence_penalty": number,
    "frequency_penalty": number,
    "seed": integer,
    "random_seed": integer,
    "stop": texts,
    "stop_words": texts,
    "include_stop_str_in_output": switch,
    "ignore_eos": switch,
}
_KINDS: dict[str, Callable[[str, Any], Any]] = {
    **_SAMPLING_KINDS,
    "stream": switch,
    "exclude_input_in_output": switch,
    "return_finish_reason": switch,
    "return_num_input_tokens": switch,
    "return_num_output_tokens": switch,
}
_ALIASES = {"random_seed": "seed", "stop_words": "stop"}

# vLLM's sampling parameters that are not implemented, with the value that asks for nothing.
_UNSUPPORTED: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "logprobs": None,
    "prompt_logprobs": None,
    "flat_logprobs": False,
    "stop_token_ids": None,
    "bad_words": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "logits_processors": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "guided_decoding": None,
    "structured_outputs": None,
    "extra_args": None,
    "lora_name": None,
}


def values_of(tensors: Mapping[str, Tensor], parameters: Mapping[str, Parameter]) -> dict[str, Any]:
    """The fields that a request gives, by name; an input outdoes the JSON, and that a request parameter.

    JSON in an input outdoes that in a request parameter, key by key.

    Args:
        tensors: the request's inputs by name, all of them known.
        parameters: the request's; those of other names are left alone.

    Raises:
        InvalidArgumentError: a value is not of its field's type, a field is given under two names at once,
            the JSON has an unknown key, or a sampling parameter of vLLM's is not supported here.
    """
    values: dict[str, Any] = {}
    if parameters:
        _take(values, "request parameter", parameters, _KINDS)
        if SAMPLING_PARAMETERS in parameters:
            _take_json(values, "request parameter", parameters[SAMPLING_PARAMETERS])
    if SAMPLING_PARAMETERS in tensors:
        _take_json(values, "input", one_text(tensors[SAMPLING_PARAMETERS]))
    given = {name: tensor for name, tensor in tensors.items() if name in _KINDS}
    _take(values, "input", {name: _from_tensor(tensor) for name, tensor in given.items()}, _KINDS)
    return values


def _take(
    values: dict[str, Any], source: str, given: Mapping[str, Any], kinds: Mapping[str, Callable[..., Any]]
) -> None:
    """Put one source's values over those that are there."""
    for name, value in given.items():
        if value is None:
            continue
        if name in _UNSUPPORTED:
            _check_neutral(f"{source} '{name}'", value, _UNSUPPORTED[name])
        elif name in kinds:
            field = _ALIASES.get(name, name)
            if field != name and given.get(field) is not None:
                raise InvalidArgumentError(f"{source}: '{field}' and '{name}' are the same, give one of them")
            values[field] = kinds[name](f"{source} '{name}'", value)


def _check_neutral(what: str, value: Any, neutral: Any) -> None:
    asks = value not in ([], {}, "") if neutral is None else str(value).lower() not in _spellings(neutral)
    if asks:
        raise InvalidArgumentError(f"{what} is not supported by this server: leave it out")


def _spellings(neutral: bool | float) -> set[str]:  # noqa: FBT001 - any value that means nothing
    """How clients write a value: 1, 1.0, true; 0, 0.0, false."""
    return {str(neutral).lower(), str(int(neutral)), str(float(neutral))}


def _take_json(values: dict[str, Any], source: str, text: Any) -> None:
    """Put the values of `sampling_parameters` over those that are there."""
    what = f"{source} '{SAMPLING_PARAMETERS}'"
    if not isinstance(text, str):
        raise _wrong(what, "JSON in a text", text)
    if len(text) > _LONGEST_JSON:
        raise InvalidArgumentError(f"{what}: expected {_LONGEST_JSON} characters at most, got {len(text)}")
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{what}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise _wrong(what, "a JSON object", text)
    for key in found:
        if key not in _SAMPLING_KINDS and key not in _UNSUPPORTED:
            raise InvalidArgumentError(
                f"{what}: unknown key {key[:100]!r}, expected some of {list(_SAMPLING_KINDS)}"
            )
    _take(values, SAMPLING_PARAMETERS, found, _SAMPLING_KINDS)


def _from_tensor(tensor: Tensor) -> Any:
    """A field's own input: one element, or several texts."""
    kind = _KINDS[tensor.name]
    if kind is texts:
        _expect(tensor, "BYTES")
        return [_decode(tensor.name, element) for element in _row(tensor)]
    _expect(tensor, *(_INTEGERS if kind in (integer, count) else _NUMBERS if kind is number else ("BOOL",)))
    return _one_element(tensor).item()


def one_text(tensor: Tensor) -> str:
    """The text of a BYTES tensor that has one element.

    Raises:
        InvalidArgumentError: it has another datatype or number of elements, or is no UTF-8.
    """
    _expect(tensor, "BYTES")
    return _decode(tensor.name, _one_element(tensor).item())


def token_ids(tensor: Tensor, vocabulary: int, most: int) -> list[int]:
    """The token ids of an integer tensor [tokens] or [1, tokens].

    Args:
        tensor: the client's.
        vocabulary: how many tokens there are.
        most: how many ids are looked at; of more, the first suffice to refuse the prompt.

    Raises:
        InvalidArgumentError: it has another datatype or shape, or an id is not in the vocabulary.
    """
    _expect(tensor, *_INTEGERS)
    ids = _row(tensor)[:most]
    wrong = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if wrong.size:
        raise InvalidArgumentError(
            f"input '{tensor.name}': token {wrong[0]} is {ids[wrong[0]]}, expected 0 to {vocabulary - 1}, "
            "the model's vocabulary"
        )
    found: list[int] = ids.tolist()
    return found


def _expect(tensor: Tensor, *datatypes: str) -> None:
    if tensor.datatype.name not in datatypes:
        raise InvalidArgumentError(
            f"input '{tensor.name}': expected datatype {' or '.join(datatypes)}, got {tensor.datatype.name}"
        )


def _one_element(tensor: Tensor) -> np.ndarray:
    if tensor.array.shape not in ((1,), (), (1, 1)):
        raise InvalidArgumentError(
            f"input '{tensor.name}': expected one element, shape [1], got shape {list(tensor.array.shape)}"
        )
    return tensor.array


def _row(tensor: Tensor) -> np.ndarray:
    """The elements of one request's tensor, with or without a batch of 1 around them."""
    shape = tensor.array.shape
    if len(shape) > 1 and shape[:-1] != (1,):
        raise InvalidArgumentError(
            f"input '{tensor.name}': expected shape [-1], for one prompt a request, got {list(shape)}"
        )
    return tensor.array.reshape(-1)


def _decode(name: str, element: bytes) -> str:
    """An element of a BYTES tensor as text."""
    try:
        return element.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"input '{name}': expected UTF-8: {error}") from error
