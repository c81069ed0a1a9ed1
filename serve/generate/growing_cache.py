"""A cache that the graph returns longer by what it read: the outputs of a run are the inputs of the next.

Rows that are decoded together stay one tensor from run to run. Shorter rows are padded on the left, the mask
hides the padding, and positions say where in its text a token is, as Hugging Face's `generate` does. A graph
without one of these inputs can't be told so: only rows of equal length share a run there.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.errors import InternalError
from serve.generate.binding import bind_input, constant_values
from serve.generate.growing_rows import Rows, TwoHalves

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from serve.generate.decoder_graph import DecoderGraph
    from serve.runtime.session import Session

    Held = tuple[Rows, int]  # a row of some


class GrowingCache:
    """The cache of all slots, and the runs on it.

    Attributes:
        adjacent_rows: any slots can share a run.
        equal_lengths: only rows of equal length share a run.
    """

    adjacent_rows = False

    def __init__(self, session: Session, graph: DecoderGraph, slots: int, length: int) -> None:
        self._session = session
        self._graph = graph
        self._slots = slots
        self._length = length
        self._constants = constant_values(graph)
        self._held: dict[int, Held] = {}
        self.equal_lengths = not (graph.attention_mask and graph.position_ids)

    def decode(self, slots: Sequence[int], tokens: Sequence[int], past: Sequence[int]) -> list[np.ndarray]:
        """Read one token in each of several slots.

        Args:
            slots: different ones.
            tokens: for each slot, the token.
            past: for each slot, how many tokens it holds.

        Returns:
            FP32 [vocabulary] of each.
        """
        token_of = dict(zip(slots, tokens, strict=True))
        past_of = dict(zip(slots, past, strict=True))
        # Always in the order of slots, or the tensors would have to be made anew.
        groups = [sorted(slots)]
        if self.equal_lengths:
            order = sorted(slots, key=lambda slot: (past_of[slot], slot))
            groups = [list(group) for _, group in groupby(order, past_of.__getitem__)]
        logits: dict[int, np.ndarray] = {}
        for group in groups:
            rows = self._together(group, [past_of[slot] for slot in group])
            scores = self._run(rows, np.array([[token_of[slot]] for slot in group]))
            logits |= zip(group, scores[:, -1], strict=True)
        return [logits[slot] for slot in slots]

    def read(self, slot: int, past: int, tokens: Sequence[int]) -> np.ndarray:
        """Read several tokens behind the first `past` of a slot.

        Returns:
            FP32 [vocabulary] after the last of them.
        """
        logits: np.ndarray = self._run(self._together([slot], [past]), np.array([tokens]))[0, -1]
        return logits

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Give a slot the first tokens of another."""
        held = self._held.get(source)
        self._held.pop(target, None)  # others may use that memory
        self._held[target] = (self._gather([target], [held], [tokens]), 0)

    def fill(self, slot: int, tokens: int) -> None:
        """Give a slot zeros, as if they were so many tokens."""
        memory = TwoHalves(self._graph.cache, 1, self._length)
        self._held[slot] = (Rows(memory, 0, memory.values(0, 1, tokens), [slot], [0], tokens), 0)

    def release(self, slot: int) -> None:
        """Forget what a slot holds; its memory is free when the rows that it is tied to go on without it."""
        self._held.pop(slot, None)

    def close(self) -> None:
        """Give all memory back."""
        self._held.clear()

    def _run(self, rows: Rows, ids: np.ndarray) -> np.ndarray:
        """Read ids INT64 [rows, time] and keep what comes out; FP32 [rows, 1 or time, vocabulary]."""
        graph = self._graph
        tokens = rows.tokens + ids.shape[1]
        values = rows.memory.values(1 - rows.half, len(rows.slots), tokens)
        binding = self._session.binding()
        binding.bind_output(graph.logits.name)
        for name, value in zip(graph.cache.present, values, strict=True):
            binding.bind_ortvalue_output(name, value)
        for name, value in zip(graph.cache.past, rows.values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name, value in self._constants.items():
            binding.bind_ortvalue_input(name, value)
        self._bind_texts(binding, ids, np.array(rows.padding)[:, None], tokens)
        self._session.run_bound(binding)
        grown = Rows(rows.memory, 1 - rows.half, values, rows.slots, rows.padding, tokens)
        self._held |= {slot: (grown, row) for row, slot in enumerate(rows.slots)}
        scores: np.ndarray = binding.get_outputs_as_ortvaluevector()[0].numpy()
        return scores.reshape(len(ids), -1, scores.shape[-1]).astype(np.float32, copy=False)

    def _bind_texts(self, binding: Any, ids: np.ndarray, padding: np.ndarray, tokens: int) -> None:
        """Bind ids INT64 [rows, time], with padding INT64 [rows, 1]: what is new of texts of `tokens`."""
        graph = self._graph
        places = np.arange(tokens)
        bind_input(binding, graph.input_ids, ids)
        if graph.attention_mask:
            bind_input(binding, graph.attention_mask, places >= padding)
        if graph.position_ids:
            bind_input(binding, graph.position_ids, places[-ids.shape[1] :] - padding)

    def _together(self, slots: list[int], past: list[int]) -> Rows:
        """The first `past` tokens of each slot in one tensor per layer and part; as they are, if so."""
        held = [self._held.get(slot) for slot in slots]
        first = held[0][0] if held[0] else None
        if (
            first is not None
            and first.slots == slots
            and all(of is not None and of[0] is first for of in held)
            and [first.tokens - padding for padding in first.padding] == past
        ):
            return first
        rows = self._gather(slots, held, past)
        self._keep_the_others(slots)
        rows.memory.trim(len(slots), rows.tokens)
        return rows

    def _gather(self, slots: list[int], held: Sequence[Held | None], past: Sequence[int]) -> Rows:
        """The first `past` tokens of each row, padded on the left, in memory that was free."""
        for slot, of, own in zip(slots, held, past, strict=True):
            if own and (of is None or own > of[0].length(of[1])):
                raise InternalError(f"slot {slot} of the cache doesn't hold {own} tokens, as it should")
        tokens = max(past)
        memory, half = self._free_half(slots)
        values = memory.values(half, len(slots), tokens)
        for part, value in enumerate(values):
            array = value.numpy()
            for row, (of, own) in enumerate(zip(held, past, strict=True)):
                array[..., row, :, : tokens - own, :] = 0  # it is hidden, but not if it were NaN
                if of and own:
                    start = of[0].padding[of[1]]
                    source = of[0].values[part].numpy()[..., of[1], :, start : start + own, :]
                    array[..., row, :, tokens - own :, :] = source
        return Rows(memory, half, values, slots, [tokens - own for own in past], tokens)

    def _free_half(self, slots: Iterable[int]) -> tuple[TwoHalves, int]:
        """Of the largest memory that these slots leave, or of a new one."""
        wanted = len(list(slots))
        left = [self._held[slot][0] for slot in slots if slot in self._held]
        rows = max(left, key=lambda rows: rows.memory.rows, default=None)
        if rows is not None and rows.memory.rows >= wanted:
            return rows.memory, 1 - rows.half
        return TwoHalves(self._graph.cache, 1 if wanted == 1 else self._slots, self._length), 0

    def _keep_the_others(self, slots: Iterable[int]) -> None:
        """Give rows that these slots leave behind memory of their own, so that the old one is free."""
        left = [self._held.pop(slot)[0] for slot in slots if slot in self._held]
        for rows in dict.fromkeys(left):
            for row, slot in enumerate(rows.slots):
                if self._held.get(slot, (None, 0))[0] is rows:
                    del self._held[slot]
                    own = self._gather([slot], [(rows, row)], [rows.length(row)])
                    self._held[slot] = (own, 0)
