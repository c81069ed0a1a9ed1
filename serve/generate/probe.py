"""Whether a graph generates as it should, found out before it serves: reading in parts, and beside others.

A decoder that is misunderstood (a tensor named wrongly, padding that it doesn't see, a cache that it doesn't
write to) answers all the same. What can be told from its own answers is told here.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from serve.errors import ModelLoadError, ServeError
from serve.generate.growing_cache import GrowingCache
from serve.generate.shared_cache import SharedCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.generate.runner import Runner

# Largest difference between logits, by the largest logit.
# The same numbers in another order of addition: 1e-6 was measured in FP32, 1e-3 in half precision.
_SAME = {4: 1e-4, 2: 2e-2}
# Where a graph rounds activations to 8 bits, a difference of 1e-6 before it becomes 2e-2 at the logits.
_ROUNDED = 0.1
_AS_ROUNDED = 3  # times the difference between two ways of reading one row

_LONG, _SHORT = 24, 7  # tokens of the prompts that are tried
_PARTNERS = 3


def probe(runner: Runner) -> tuple[str, ...]:
    """Try a runner that nobody uses yet, and have it run rows alone where they change each other's answers.

    Returns:
        What was found that costs speed, for the log.

    Raises:
        ModelLoadError: the graph fails, or can't be right: the message says what was tried.
    """
    try:
        return _Probe(runner).run()
    except ServeError as error:
        raise ModelLoadError(f"the graph failed when it was tried as a decoder: {error}") from error
    finally:
        for slot in range(min(runner.slots, 2)):
            runner.cache.release(slot)


class _Probe:
    """One try, on the first two slots."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._cache = runner.cache
        self._same = _SAME[runner.graph.cache.dtype.itemsize]
        ids = np.random.default_rng(0).integers(0, runner.vocabulary, 2 * _LONG).tolist()
        # One token of the context is left for the one that is decoded.
        self._long = ids[: min(_LONG, runner.context_length - 1)]
        self._short = ids[_LONG:][: max(min(_SHORT, len(self._long) // 2), 1)]
        self._next = ids[-1]

    def run(self) -> tuple[str, ...]:
        if isinstance(self._cache, SharedCache):
            self._check_in_place(self._cache)
        noise = self._check_parts()
        self._check_last_place()
        if self._runner.most_rows == 1:
            return ()
        tolerance = max(self._same, _AS_ROUNDED * noise)
        cache = self._cache
        found = ""
        if not (isinstance(cache, GrowingCache) and cache.equal_lengths):
            found = self._beside_others(self._short, tolerance)
            if not found:
                return ()
        if isinstance(cache, GrowingCache):
            cache.equal_lengths = True
            apart = self._beside_others([*reversed(self._long)], tolerance)
            if not apart:
                return (f"only texts of equal length are run together: {found}",) if found else ()
            found = apart
        self._runner.most_rows = 1
        return (f"texts are not run together: {found}",)

    def _check_in_place(self, cache: SharedCache) -> None:
        """Only what was read is in memory afterwards: nothing else was written, copied or cleared."""
        tensors = self._runner.graph.cache
        cache.release(0)
        try:
            cache.read(0, 0, self._long)
        except ServeError as error:
            raise ModelLoadError(
                "the graph can't write its cache in place: remove parameter 'past_present_share_buffer', or "
                f"export the graph with GroupQueryAttention: {error}"
            ) from error
        touched = cache.memory.resident_bytes(0)
        expected = cache.memory.expected_bytes(tensors.heads, len(self._long))
        everything = tensors.bytes_per_token * cache.length
        if expected < everything and not 0 < touched <= expected:
            raise ModelLoadError(
                f"the graph doesn't write its cache in place: {len(self._long)} tokens touched {touched} "
                f"bytes, expected up to {expected}; remove parameter 'past_present_share_buffer', or export "
                "the graph with GroupQueryAttention"
            )

    def _check_parts(self) -> float:
        """How much two ways of reading a text are apart, which is nothing but rounding."""
        text = [*self._long, self._next]
        whole = self._read(text)
        parts = {"in two runs": self._read(text, split=len(text) // 2)}
        self._read(self._long)
        parts["with its last token alone"] = self._decode([self._long], [self._next])[0]
        apart = {how: _apart(whole, logits) for how, logits in parts.items()}
        for how, difference in apart.items():
            if not difference <= _ROUNDED:
                raise ModelLoadError(
                    f"the graph answers differently when a text is read {how} instead of one: logits are "
                    f"{difference:.1e} of the largest apart, expected {_ROUNDED} at most; see that "
                    "config.pbtxt names each present with its past, and the inputs that say how long it is"
                )
        return max(apart.values())

    def _check_last_place(self) -> None:
        length = self._runner.context_length
        self._cache.release(0)
        try:
            if isinstance(self._cache, GrowingCache):
                self._cache.fill(0, length - 1)
            self._cache.read(0, length - 1, [self._next])
        except ServeError as error:
            raise ModelLoadError(
                f"config.pbtxt: parameter 'context_length' is {length}, but the graph can't read a token in "
                f"that place: {error}"
            ) from error
        self._cache.release(0)

    def _beside_others(self, other: list[int], tolerance: float) -> str:
        """What shows that a text's logits depend on another text of the same run, or ""."""
        alone = [self._alone(text) for text in (self._long, other)]
        together = self._together(other, self._next)
        # Others of the same length: the same kernels run, and any difference comes from what the others say.
        for shift in range(1, _PARTNERS + 1):
            stranger = [(token + shift) % self._runner.vocabulary for token in other]
            difference = _apart(together[0], self._together(stranger, self._next)[0])
            if not difference <= self._same:
                return f"what one says changes another's logits by {difference:.1e} of the largest"
        difference = max(itertools.starmap(_apart, zip(alone, together, strict=True)))
        if not difference <= tolerance:
            return (
                f"logits are {difference:.1e} of the largest apart from those of a run alone, expected "
                f"{tolerance:.1e} at most"
            )
        return ""

    def _alone(self, text: list[int]) -> np.ndarray:
        self._read(text)
        return self._decode([text], [self._next])[0]

    def _together(self, other: list[int], last: int) -> list[np.ndarray]:
        self._read(self._long)
        self._read(other, slot=1)
        return self._decode([self._long, other], [self._next, last])

    def _read(self, text: list[int], *, slot: int = 0, split: int = 0) -> np.ndarray:
        """A text's logits, read into an empty slot in one run, or in two."""
        self._cache.release(slot)
        if split:
            self._cache.read(slot, 0, text[:split])
        return self._checked(self._cache.read(slot, split, text[split:]))

    def _decode(self, texts: Sequence[list[int]], tokens: list[int]) -> list[np.ndarray]:
        rows = list(range(len(texts)))
        return [self._checked(row) for row in self._cache.decode(rows, tokens, [len(text) for text in texts])]

    def _checked(self, logits: np.ndarray) -> np.ndarray:
        name = self._runner.graph.logits.name
        if logits.shape != (self._runner.vocabulary,):
            raise ModelLoadError(
                f"output '{name}' (logits): expected {self._runner.vocabulary} numbers per row, got "
                f"{logits.shape}"
            )
        if not np.isfinite(logits).all():
            raise ModelLoadError(f"output '{name}' (logits): expected finite numbers, got some that are not")
        return logits.copy()


def _apart(first: np.ndarray, second: np.ndarray) -> float:
    """The largest difference of FP32 [vocabulary], by the largest number in either."""
    largest = max(float(np.abs(first).max()), float(np.abs(second).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(first - second).max()) / largest
