"""A runner without a graph: a cache whose slots hold tokens, changed exactly as a scheduler's steps say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.generate.scheduler import GenerationScheduler
from serve.generate.sequence import Sequence
from serve.request import Call

if TYPE_CHECKING:
    import numpy as np

    from serve.errors import ServeError
    from serve.generate.settings import GenerationSettings
    from serve.generate.step import Step

DAMAGED = -1


class Unused:
    """Stands where a sequence's sampler and output go: a scheduler calls neither."""

    def next(self, logits: np.ndarray, ids: list[int], prompt_length: int) -> int:
        raise NotImplementedError

    def take(self, token: int) -> str | None:
        raise NotImplementedError

    def end(self, reason: str) -> None:
        raise NotImplementedError

    def fail(self, error: ServeError) -> None:
        raise NotImplementedError


def sequence(prompt: list[int], max_tokens: int = 1, deadline: float | None = None) -> Sequence:
    return Sequence(list(prompt), len(prompt), max_tokens, Call(deadline), Unused(), Unused())


class ScheduledCache:
    """Carries steps out on lists of tokens, and checks that each step can be.

    Attributes:
        holds: of each slot its tokens; None: its memory was released.
    """

    def __init__(self, settings: GenerationSettings, *, adjacent_rows: bool) -> None:
        self.scheduler = GenerationScheduler(settings, adjacent_rows=adjacent_rows)
        self.settings = settings
        self.adjacent_rows = adjacent_rows
        self.holds: list[list[int] | None] = [None] * settings.max_num_seqs

    def run(self, step: Step, seconds: float = 0.01) -> None:
        """Carry a step out in the order that it documents, and tell the scheduler."""
        for slot in step.released:
            self.holds[slot] = None
        for copy in step.copies:
            held = self.holds[copy.source]
            assert copy.source != copy.target
            assert held is not None
            assert 0 < copy.tokens <= len(held)
            self.holds[copy.target] = held[: copy.tokens]
        if self.adjacent_rows and step.decode:
            self._damage_idle_rows(step)
        for row in step.decode:
            self._read(row, 1)
        for chunk in step.prefill:
            self._read(chunk.sequence, chunk.count)
        self.scheduler.ran(step, seconds)
        self.check()

    def fail(self, step: Step) -> list[Sequence]:
        """A step failed halfway: nothing that it was to write can be relied on. Who ends because of it."""
        for slot in step.released:
            self.holds[slot] = None
        for copy in step.copies:
            self.holds[copy.target] = [DAMAGED]
        ended = [*step.decode, *(chunk.sequence for chunk in step.prefill)]
        for each in ended:
            self.scheduler.finish(each)
        for slot in self.scheduler.forget_prefixes():
            self.holds[slot] = None
        self.check()
        return ended

    def check(self) -> None:
        """Each slot holds what the scheduler takes it to hold."""
        self.scheduler.check()
        for each in self.scheduler._running:
            if each.cached:
                assert each.slot is not None
                held = self.holds[each.slot]
                assert held is not None
                assert held[: each.cached] == each.ids[: each.cached]
        for slot, prefix in self.scheduler._slots.retained.items():
            held = self.holds[slot]
            assert held is not None
            assert held[: len(prefix.ids)] == prefix.ids, "a retained prefix was damaged"

    def _read(self, each: Sequence, count: int) -> None:
        assert each.slot is not None
        assert 1 <= count <= each.pending
        past = (self.holds[each.slot] or [])[: each.cached]
        assert past == each.ids[: each.cached]
        assert each.cached + count <= self.settings.context_length
        self.holds[each.slot] = each.ids[: each.cached + count]

    def _damage_idle_rows(self, step: Step) -> None:
        """A run over neighbouring slots writes a token into those in between that have no row."""
        rows = [row.slot for row in step.decode if row.slot is not None]
        assert rows == sorted(set(rows))
        live = {each.slot: each for each in self.scheduler._running}
        for slot in set(range(rows[0], rows[-1])) - set(rows):
            assert slot not in self.scheduler._slots.retained
            held = self.holds[slot]
            if slot in live and held is not None:
                self.holds[slot] = [*held[: live[slot].cached], DAMAGED]
            elif held is not None:
                self.holds[slot] = [DAMAGED]
