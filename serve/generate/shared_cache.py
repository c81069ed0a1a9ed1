"""A cache that the graph writes in place: one buffer per layer and part, in which each sequence has a slot.

onnxruntime's GroupQueryAttention writes new keys and values behind the past ones when both of its buffers are
the same memory; nothing of the past is copied. A run covers neighbouring slots, because a tensor's rows are
neighbours in memory:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnxruntime import OrtValue

from serve.generate.binding import bind_input, constant_values
from serve.generate.cache_memory import CacheMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.generate.decoder_graph import DecoderGraph
    from serve.runtime.session import Session

_MOST_BINDINGS = 128  # 0.1 MB each at 12 layers


class SharedCache:
    """The cache of all slots, and the runs on it.

    A row between two others that has nothing to read reads some token anyway, behind those that it holds:
    whatever the slot is to hold next overwrites it.

    Attributes:
        adjacent_rows: the rows of a decode run cover all slots from the first to the last.
        memory: the keys and values.
        length: tokens that a slot has room for.
    """

    adjacent_rows = True

    def __init__(self, session: Session, graph: DecoderGraph, slots: int, length: int) -> None:
        self._session = session
        self._graph = graph
        self.length = length
        self.memory = CacheMemory(len(graph.cache.past), graph.cache.shape(slots, length), graph.cache.dtype)
        self._constants = constant_values(graph)
        # A row per slot: the token that a decode run reads, and how many others the slot holds.
        self._ids = np.zeros((slots, 1), graph.input_ids.dtype)
        self._filled = np.zeros((slots, 1), np.int64)
        self._places = {
            feed.name: self._filled if feed.dtype == np.int64 else np.zeros((slots, 1), feed.dtype)
            for feed in (graph.past_length, graph.position_ids)
            if feed
        }
        self._flat_ids = self._ids.reshape(-1)
        others = [places for places in self._places.values() if places is not self._filled]
        self._flat_places = [places.reshape(-1) for places in (self._filled, *others)]
        self._logits: np.ndarray | None = None
        self._scores: list[np.ndarray] = []  # a view of the logits per slot
        self._bindings: dict[tuple[int, int, bool], Any] = {}

    def decode(self, slots: Sequence[int], tokens: Sequence[int], past: Sequence[int]) -> list[np.ndarray]:
        """Read one token in each of several slots.

        Args:
            slots: different ones.
            tokens: for each slot, the token.
            past: for each slot, how many tokens it holds.

        Returns:
            FP32 [vocabulary] of each, good until the next call.
        """
        first, end = min(slots), max(slots) + 1
        binding = self._binding(first, end, reading=False)
        # One by one: a run drives everything else out of the processor's caches, and numpy's ways for whole
        # arrays take four times as long then (35 µs a token at 1 row).
        for slot, token, held in zip(slots, tokens, past, strict=True):
            self._flat_ids[slot] = token
            self._hold(slot, held)
        if self._graph.attention_mask:
            bind_input(binding, self._graph.attention_mask, _mask(self._filled[first:end] + 1))
        self._session.run_bound(binding)
        for slot, held in zip(slots, past, strict=True):
            self._hold(slot, held + 1)
        return [self._scores[slot].astype(np.float32, copy=False) for slot in slots]

    def read(self, slot: int, past: int, tokens: Sequence[int]) -> np.ndarray:
        """Read several tokens behind the first `past` of a slot.

        Returns:
            FP32 [vocabulary] after the last of them.
        """
        count = len(tokens)
        graph = self._graph
        binding = self._binding(slot, slot + 1, reading=True)
        bind_input(binding, graph.input_ids, np.array([tokens]))
        if graph.past_length:
            bind_input(binding, graph.past_length, np.array([[past]]))
        if graph.position_ids:
            bind_input(binding, graph.position_ids, np.arange(past, past + count)[None])
        if graph.attention_mask:
            bind_input(binding, graph.attention_mask, np.ones((1, past + count)))
        self._session.run_bound(binding)
        self._hold(slot, past + count)
        logits: np.ndarray = binding.get_outputs_as_ortvaluevector()[0].numpy()
        binding.bind_output(graph.logits.name)  # or the binding would keep this memory, and expect this shape
        last: np.ndarray = logits.reshape(-1, logits.shape[-1])[-1]
        return last.astype(np.float32, copy=False)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a slot the first tokens of another."""
        for tensor in self.memory.tensors:
            tensor[target, :, :tokens] = tensor[source, :, :tokens]
        self._hold(target, tokens)

    def release(self, slot: int) -> None:
        """Forget what a slot holds, and give its memory back."""
        self.memory.release(slot)
        self._hold(slot, 0)

    def close(self) -> None:
        """Give all memory back."""
        self._bindings.clear()
        self.memory.close()

    def _hold(self, slot: int, tokens: int) -> None:
        """Remember where a slot goes on, or where a run may write that has nothing to read there."""
        place = min(tokens, self.length - 1)
        for places in self._flat_places:
            places[slot] = place

    def _binding(self, first: int, end: int, *, reading: bool) -> Any:
        """Of the slots from `first` to before `end`; made once."""
        key = (first, end, reading)
        binding = self._bindings.get(key)
        if binding is None:
            if len(self._bindings) >= _MOST_BINDINGS:
                del self._bindings[next(iter(self._bindings))]
            binding = self._bindings[key] = self._bind(first, end, reading=reading)
        return binding

    def _bind(self, first: int, end: int, *, reading: bool) -> Any:
        binding = self._session.binding()
        if reading:
            binding.bind_output(self._graph.logits.name)
        else:
            self._bind_rows(binding, first, end)
        cache = self._graph.cache
        for past, present, tensor in zip(cache.past, cache.present, self.memory.tensors, strict=True):
            value = OrtValue.ortvalue_from_numpy(tensor[first:end])
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        for name, value in self._constants.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _bind_rows(self, binding: Any, first: int, end: int) -> None:
        """What a decode run reads and writes besides the cache: memory that stays where it is."""
        logits = self._graph.logits
        if self._logits is None:
            self._logits = np.empty(logits.shape(len(self._ids)), logits.dtype)
            self._scores = [row.reshape(-1) for row in self._logits]
        binding.bind_ortvalue_output(logits.name, OrtValue.ortvalue_from_numpy(self._logits[first:end]))
        for name, array in {self._graph.input_ids.name: self._ids, **self._places}.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array[first:end]))


def _mask(lengths: np.ndarray) -> np.ndarray:
    """BOOL [rows, longest], true where a row of lengths INT64 [rows, 1] has a token."""
    mask: np.ndarray = np.arange(lengths.max()) < lengths
    return mask
