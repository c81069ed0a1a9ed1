"""A cache that the graph returns longer by what it read: the outputs of a run are the inputs of the next.

Rows that are decoded together stay one tensor from run to run. Shorter rows are padded on the left, the mask
hides the padding, and positions say where in its text a token is, as Hugging Face's `generate` does. A graph
without one of these inputs can't be told so: only rows of equal length share a run there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from onnxruntime import OrtValue

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from serve.generate.decoder_graph import DecoderGraph, Feed
    from serve.runtime.session import Session


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """What several slots hold, in one tensor per layer and part.

    Attributes:
        values: OrtValues [rows, heads, tokens, head size], or [2, rows, heads, tokens, head size].
        slots: of each row.
        padding: for each row, how many tokens of it come before its own.
        tokens: the tensors' length.
    """

    values: list[Any]
    slots: list[int]
    padding: list[int]
    tokens: int


class GrowingCache:
    """The cache of all slots, and the runs on it.

    Attributes:
        adjacent_rows: any slots can share a run.
        equal_lengths: only rows of equal length share a run.
    """

    adjacent_rows = False

    def __init__(self, session: Session, graph: DecoderGraph) -> None:
        self._session = session
        self._graph = graph
        self._outputs = (graph.logits.name, *graph.cache.present)
        self._constants = {
            name: OrtValue.ortvalue_from_numpy(array) for name, array in graph.constants.items()
        }
        self._held: dict[int, tuple[_Rows, int]] = {}
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
        next_of = dict(zip(slots, zip(tokens, past, strict=True), strict=True))
        # By slot, or by length first: the order must be the same in the next step, for the tensors to stay.
        order = sorted(next_of, key=lambda slot: (next_of[slot][1] if self.equal_lengths else 0, slot))
        logits: dict[int, np.ndarray] = {}
        for _, group in groupby(order, lambda slot: next_of[slot][1] if self.equal_lengths else 0):
            members = list(group)
            rows = self._together(members, [next_of[slot][1] for slot in members])
            ids = np.array([next_of[slot][:1] for slot in members])
            scores = self._run(rows, ids)
            logits |= {slot: scores[row, -1] for row, slot in enumerate(members)}
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
        held, row = self._held[source]
        if len(held.slots) == 1 and held.tokens == tokens and not held.padding[0]:
            values = held.values  # nobody writes to them
        else:
            values = self._gather([(held, row)], [tokens], tokens)
        self._held[target] = (_Rows(values, [target], [0], tokens), 0)

    def release(self, slot: int) -> None:
        """Forget what a slot holds. Its memory is free when no other row shares it."""
        self._held.pop(slot, None)

    def close(self) -> None:
        """Give all memory back."""
        self._held.clear()

    def _run(self, rows: _Rows, ids: np.ndarray) -> np.ndarray:
        """Read ids INT64 [rows, time] and keep what comes out; FP32 [rows, 1 or time, vocabulary]."""
        graph = self._graph
        time = ids.shape[1]
        padding = np.array(rows.padding)[:, None]
        feeds = {graph.input_ids.name: _value(graph.input_ids, ids), **self._constants}
        if graph.attention_mask:
            mask = np.arange(rows.tokens + time) >= padding
            feeds[graph.attention_mask.name] = _value(graph.attention_mask, mask)
        if graph.position_ids:
            positions = np.arange(rows.tokens, rows.tokens + time) - padding
            feeds[graph.position_ids.name] = _value(graph.position_ids, positions)
        feeds.update(zip(graph.cache.past, rows.values, strict=True))
        logits, *values = self._session.run_values(feeds, self._outputs)
        grown = _Rows(values, rows.slots, rows.padding, rows.tokens + time)
        for row, slot in enumerate(rows.slots):
            self._held[slot] = (grown, row)
        scores: np.ndarray = logits.numpy()
        return scores.reshape(len(ids), -1, scores.shape[-1]).astype(np.float32, copy=False)

    def _together(self, slots: list[int], past: list[int]) -> _Rows:
        """The first `past` tokens of each slot in one tensor per layer and part; as they are, if so."""
        held = [self._held.get(slot) if tokens else None for slot, tokens in zip(slots, past, strict=True)]
        first = held[0][0] if held[0] else None
        if (
            first is not None
            and first.slots == slots
            and all(of is not None and of[0] is first for of in held)
            and [first.tokens - padding for padding in first.padding] == past
        ):
            return first
        tokens = max(past)
        values = self._gather(held, past, tokens)
        self._keep_the_others(slots)
        return _Rows(values, slots, [tokens - own for own in past], tokens)

    def _gather(
        self, held: Sequence[tuple[_Rows, int] | None], past: Sequence[int], tokens: int
    ) -> list[Any]:
        """New tensors of the first `past` tokens of each row, padded on the left to `tokens`."""
        cache = self._graph.cache
        values = []
        for part in range(len(cache.past)):
            array = np.empty(cache.shape(len(held), tokens), cache.dtype)
            for row, (of, own) in enumerate(zip(held, past, strict=True)):
                array[..., row, :, : tokens - own, :] = 0  # hidden, but NaN would get through
                if of is not None:
                    rows, index = of
                    start = rows.padding[index]
                    source = rows.values[part].numpy()[..., index, :, start : start + own, :]
                    array[..., row, :, tokens - own :, :] = source
            values.append(OrtValue.ortvalue_from_numpy(array))
        return values

    def _keep_the_others(self, slots: Iterable[int]) -> None:
        """Give rows that these slots leave behind tensors of their own, so that the old ones can go."""
        left = [self._held.pop(slot)[0] for slot in slots if slot in self._held]
        for rows in dict.fromkeys(left):
            for row, slot in enumerate(rows.slots):
                if self._held.get(slot, (None, 0))[0] is rows:
                    own = rows.tokens - rows.padding[row]
                    values = self._gather([(rows, row)], [own], own)
                    self._held[slot] = (_Rows(values, [slot], [0], own), 0)


def _value(feed: Feed, array: np.ndarray) -> Any:
    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array, feed.dtype))
