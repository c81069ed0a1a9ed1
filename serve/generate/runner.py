"""Carries a step out on the graph: what the scheduler decided becomes tensors, a run, and logits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from serve.errors import ModelLoadError
from serve.generate.growing_cache import GrowingCache
from serve.generate.shared_cache import SharedCache

if TYPE_CHECKING:
    from collections.abc import Sequence as Several

    import numpy as np

    from serve.generate.decoder_graph import DecoderGraph
    from serve.generate.sequence import Sequence
    from serve.generate.settings import GenerationSettings
    from serve.generate.step import Step
    from serve.runtime.session import Session


class Cache(Protocol):
    """Keys and values of all slots, and the runs that use them."""

    adjacent_rows: bool

    def decode(self, slots: Several[int], tokens: Several[int], past: Several[int]) -> list[np.ndarray]:
        """Read one token behind the first `past` of each slot; FP32 [vocabulary] of each."""

    def read(self, slot: int, past: int, tokens: Several[int]) -> np.ndarray:
        """Read several tokens behind the first `past` of a slot; FP32 [vocabulary] after the last."""

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a slot the first tokens of another."""

    def release(self, slot: int) -> None:
        """Forget what a slot holds, and give its memory back."""

    def close(self) -> None:
        """Give all memory back."""


class Runner:
    """Runs the steps of one model. Only one thread may use it.

    Attributes:
        graph: the tensors' names and shapes.
        cache: keys and values.
        vocabulary: tokens that the graph scores.
        context_length: tokens that a slot may hold.
        slots: how many there are.
        most_rows: how many rows may share a run.

    Raises:
        ModelLoadError: the cache that the settings ask for can't be had.
    """

    def __init__(self, session: Session, graph: DecoderGraph, settings: GenerationSettings) -> None:
        self.context_length = settings.context_length
        self.slots = settings.max_num_seqs
        self.graph = graph
        self.cache = self._cache(session)
        if not graph.logits.vocabulary:
            vocabulary = len(self.cache.read(0, 0, [0]))
            self.cache.close()
            self.graph = replace(graph, logits=replace(graph.logits, vocabulary=vocabulary))
            self.cache = self._cache(session)
        self.vocabulary = self.graph.logits.vocabulary
        self.most_rows = 1 if graph.one_row else self.slots

    def _cache(self, session: Session) -> Cache:
        if not self.graph.in_place:
            return GrowingCache(session, self.graph, self.slots, self.context_length)
        length = self.graph.cache_length or self.context_length
        if length < self.context_length:
            raise ModelLoadError(
                f"config.pbtxt: parameter 'context_length' is {self.context_length}, but the graph's cache "
                f"'{self.graph.cache.past[0]}' holds {length} tokens"
            )
        return SharedCache(session, self.graph, self.slots, length)

    @property
    def adjacent_rows(self) -> bool:
        """Whether the rows of a decode run must be neighbouring slots."""
        return self.cache.adjacent_rows

    @property
    def bytes_per_token(self) -> int:
        """Of a token's keys and values in all layers."""
        return self.graph.bytes_per_token

    def run(self, step: Step) -> list[tuple[Sequence, np.ndarray]]:
        """Release, copy, decode, read: in this order.

        Returns:
            FP32 [vocabulary] of each decoded sequence and of each chunk that completes what its sequence has
            to read; they are good until the next step.

        Raises:
            InternalError: the graph failed; what it was to read has to be read again.
        """
        for slot in step.released:
            self.cache.release(slot)
        for copy in step.copies:
            self.cache.copy(copy.source, copy.target, copy.tokens)
        answers = self._decode(step.decode)
        for chunk in step.prefill:
            sequence = chunk.sequence
            start = sequence.cached
            logits = self.cache.read(sequence.place, start, sequence.ids[start : start + chunk.count])
            if chunk.complete:
                answers.append((sequence, logits))
        return answers

    def _decode(self, sequences: list[Sequence]) -> list[tuple[Sequence, np.ndarray]]:
        answers: list[tuple[Sequence, np.ndarray]] = []
        for start in range(0, len(sequences), self.most_rows):
            rows = sequences[start : start + self.most_rows]
            logits = self.cache.decode(
                [sequence.place for sequence in rows],
                [sequence.ids[sequence.cached] for sequence in rows],
                [sequence.cached for sequence in rows],
            )
            answers += zip(rows, logits, strict=True)
        return answers

    def close(self) -> None:
        """Give the cache's memory back; nothing can run after it."""
        self.cache.close()
