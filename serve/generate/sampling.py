"""The next token from logits: the likeliest, or one by chance; the parameters are those of vLLM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.errors import InternalError, InvalidArgumentError
from serve.generate.penalties import Penalties
from serve.generate.ranking import RunningTotals, index_of, largest, with_ties

if TYPE_CHECKING:
    from collections.abc import Collection

    from serve.generate.sequence import Sampler

# Below this, dividing by the temperature would overflow FP32: the likeliest token has all the probability.
_COLDEST = 1e-5
# A trained model's nucleus is nearly always among so many tokens; finding them takes a third of sorting all.
_USUAL_NUCLEUS = 1024
# FP32's numbers of full precision; the texts are these, rounded inwards.
_ABOVE_ZERO = float(np.finfo(np.float32).tiny)
_FINITE = float(np.finfo(np.float32).max)
_LEAST, _MOST = "1.2e-38", "3.4e38"

# Of each parameter: the type, the least, the most, and both in words.
_RANGES: dict[str, tuple[type, float, float, str]] = {
    "temperature": (Real, 0, _FINITE, f"a number from 0 (the likeliest token) to {_MOST}"),
    "top_k": (Integral, -1, _FINITE, "a whole number of 1 or more, or 0 or -1 for all tokens"),
    "top_p": (Real, _ABOVE_ZERO, 1, f"a number from {_LEAST} to 1 (all tokens)"),
    "min_p": (Real, 0, 1, "a number from 0 (all tokens) to 1"),
    "repetition_penalty": (Real, _ABOVE_ZERO, _FINITE, f"a number from {_LEAST} to {_MOST}; 1 is no penalty"),
    "presence_penalty": (Real, -2, 2, "a number from -2 to 2; 0 is no penalty"),
    "frequency_penalty": (Real, -2, 2, "a number from -2 to 2; 0 is no penalty"),
    "seed": (Integral, -1, 2**64 - 1, "a whole number from 0 to 2^64 - 1, or -1 for none"),
    "min_tokens": (Integral, 0, _FINITE, "a whole number of 0 or more"),
}


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the tokens of a text are chosen. Names and meanings are vLLM's, applied in the order below.

    Attributes:
        repetition_penalty: logits of tokens of the prompt and the text are divided by it where they are
            positive, else multiplied (Keskar et al. 2019, arXiv:1909.05858).
        frequency_penalty: is taken off the logits of a token as often as it was generated.
        presence_penalty: is taken off once if it was generated.
        min_tokens: no token ends the text before so many were generated.
        temperature: logits are divided by it; below 0.00001 the likeliest token is taken.
        top_k: only so many of the likeliest tokens, and what ties with the last of them; 0 or -1: all.
        top_p: only the likeliest tokens that together reach this probability (Holtzman et al. 2019,
            arXiv:1904.09751); of those that tie at its edge, the lowest ids.
        min_p: only tokens with at least this part of the likeliest one's probability (Nguyen et al. 2024,
            arXiv:2407.01082).
        seed: gives the same tokens every time, whatever else is generated meanwhile; None or -1: any.

    Raises:
        InvalidArgumentError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        """Check each value."""
        for name, (kind, least, most, expected) in _RANGES.items():
            value: Any = getattr(self, name)
            if name == "seed" and value is None:
                continue
            right = isinstance(value, kind) and not isinstance(value, bool)
            if not right or not least <= value <= most:
                raise InvalidArgumentError(f"{name}: expected {expected}, got {repr(value)[:40]}")

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there before are treated differently."""
        return self.repetition_penalty != 1 or bool(self.presence_penalty or self.frequency_penalty)


def sampler(parameters: SamplingParameters, eos_token_ids: Collection[int] = ()) -> Sampler:
    """What chooses the tokens of one sequence.

    Args:
        parameters: how.
        eos_token_ids: what `min_tokens` holds back.
    """
    return _Sampler(parameters, eos_token_ids)


class _Sampler:
    """See `Sampler`. Its random numbers are its own, one for each token."""

    def __init__(self, parameters: SamplingParameters, eos_token_ids: Collection[int]) -> None:
        self._parameters = p = parameters
        self._greedy = p.temperature < _COLDEST
        self._scale = np.float32(0 if self._greedy else max(1 / p.temperature, _ABOVE_ZERO))
        self._penalties = (
            Penalties(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) if p.penalizes else None
        )
        self._eos = np.array(sorted(eos_token_ids), np.int64)
        self._random = np.random.default_rng(None if p.seed == -1 else p.seed)

    def next(self, logits: np.ndarray, ids: list[int], prompt_length: int) -> int:
        """See `Sampler.next`.

        Raises:
            InternalError: a logit is not a number, or none is finite.
        """
        if self._penalties is not None:
            self._penalties.apply(logits, ids, prompt_length)
        if self._parameters.min_tokens > len(ids) - prompt_length:
            logits[self._eos[self._eos < logits.size]] = -np.inf
        likeliest = int(logits.argmax())  # where a NaN is, if there is one
        top = logits.item(likeliest)
        if not math.isfinite(top):
            raise InternalError(f"logits: expected numbers, got {top} as the largest, of token {likeliest}")
        if self._greedy:
            return likeliest
        with np.errstate(over="ignore"):  # of what is hopelessly unlikely
            logits -= top
            logits *= self._scale
        return self._choose(logits)

    def _choose(self, logits: np.ndarray) -> int:
        """A token by chance; the largest of the logits is 0. Other arrays as large would cost more time."""
        p = self._parameters
        if 0 < p.top_k < logits.size:
            ranked = with_ties(largest(logits, p.top_k), logits)
            return index_of(logits, ranked, self._draw(_kept(np.exp(ranked), p)))
        weights = np.exp(logits, out=logits)
        if p.top_p < 1 or p.min_p > 0:
            ranked = _kept(weights, p)
            return index_of(weights, ranked, self._draw(ranked))
        return self._draw(weights)

    def _draw(self, weights: np.ndarray) -> int:
        """An index by chance, in proportion to weights FP32 [n]."""
        totals = RunningTotals(weights)
        return totals.place(self._random.random() * totals.total, "right")


def _kept(weights: np.ndarray, parameters: SamplingParameters) -> np.ndarray:
    """What top-p and min-p leave of FP32 [n], the largest of which is 1; descending, if either applies."""
    if parameters.top_p < 1:
        weights = _nucleus(weights, parameters.top_p)
    if parameters.min_p > 0:
        weights = largest(weights, int(np.count_nonzero(weights >= parameters.min_p)))
    return weights


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest of FP32 [n] that together are `top_p` of all, descending."""
    mark = top_p * float(weights.sum(dtype=np.float64))
    ranked = largest(weights, _USUAL_NUCLEUS)
    totals = RunningTotals(ranked)
    if totals.total < mark and ranked.size < weights.size:
        ranked = largest(weights, weights.size)
        totals = RunningTotals(ranked)
    return ranked[: totals.place(mark, "left") + 1]
