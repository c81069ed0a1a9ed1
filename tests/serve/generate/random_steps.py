"""Steps at random: sequences join and leave, prompts are read in chunks of any size, prefixes are reused.

It decides as loosely as a runner allows, where a scheduler follows a policy.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from serve.generate.sequence import Sequence
from serve.generate.step import Chunk, Copy, Step
from serve.request import Call

if TYPE_CHECKING:
    import numpy as np

    from serve.errors import ServeError
    from serve.generate.runner import Runner


class Nobody:
    """Takes tokens for a sequence that nobody waits for; greedy."""

    def next(self, logits: np.ndarray, ids: list[int], prompt_length: int) -> int:
        del ids, prompt_length
        return int(logits.argmax())

    def take(self, token: int) -> str | None:
        del token
        return None

    def end(self, reason: str) -> None:
        pass

    def fail(self, error: ServeError) -> None:
        raise error


def sequence(prompt: list[int], max_tokens: int, slot: int | None = None) -> Sequence:
    nobody = Nobody()
    return Sequence(list(prompt), len(prompt), max_tokens, Call(), nobody, nobody, slot)


def advance(runner: Runner, step: Step) -> None:
    """Run a step and do what the engine does afterwards."""
    answers = runner.run(step)
    expected = [*step.decode, *(chunk.sequence for chunk in step.prefill if chunk.complete)]
    assert [of for of, _ in answers] == expected
    for row in step.decode:
        row.cached += 1
    for chunk in step.prefill:
        chunk.sequence.cached += chunk.count
    for row, logits in answers:
        row.ids.append(row.sampler.next(logits, row.ids, row.prompt_length))


class RandomSteps:
    """Generates texts together, in an order that a seed decides.

    Attributes:
        done: the sequences that are complete.
        steps: how many were run.
        most_rows: of one decode run.
        reused: tokens that were not read, because another had read them.
    """

    def __init__(self, runner: Runner, seed: int) -> None:
        self._runner = runner
        self._random = random.Random(seed)  # noqa: S311 - a schedule
        self._free = list(range(runner.slots))
        self._prefixes: dict[int, list[int]] = {}
        self.running: list[Sequence] = []
        self.done: list[Sequence] = []
        self.steps = self.most_rows = self.reused = 0

    def generate(self, waiting: list[Sequence]) -> None:
        """Until all are done."""
        waiting = list(waiting)
        while waiting or self.running:
            step = Step()
            while waiting and self._free and (not self.running or self._random.random() < 0.3):
                self._admit(waiting.pop(0), step)
            self._choose(step)
            advance(self._runner, step)
            self.steps += 1
            self.most_rows = max(self.most_rows, len(step.decode))
            self._finish()

    def _admit(self, new: Sequence, step: Step) -> None:
        new.slot = self._free.pop(self._random.randrange(len(self._free)))
        kept = self._prefixes.pop(new.slot, None)
        if self._random.random() < 0.5:
            step.released.append(new.slot)
        elif kept is not None:
            new.cached = common(kept, new.ids)
        sources = [(of.slot, of.ids[: of.cached]) for of in self.running if of.slot is not None]
        for slot, ids in (*sources, *self._prefixes.items()):
            shared = common(ids, new.ids)
            if shared > new.cached:
                step.copies.append(Copy(slot, new.slot, shared))
                new.cached = shared
        self.reused += new.cached
        self.running.append(new)

    def _choose(self, step: Step) -> None:
        for row in self.running:
            if row.pending == 1 and self._random.random() < 0.95:
                step.decode.append(row)
            elif row.pending > 1:
                step.prefill.append(Chunk(row, self._random.randint(1, row.pending)))
        if step.decode and self._runner.adjacent_rows:
            slots = [row.slot for row in step.decode if row.slot is not None]
            for slot in set(self._prefixes) & set(range(min(slots), max(slots))):
                del self._prefixes[slot]

    def _finish(self) -> None:
        for row in [row for row in self.running if row.generated == row.max_tokens]:
            assert row.slot is not None
            self.running.remove(row)
            self.done.append(row)
            self._free.append(row.slot)
            self._prefixes[row.slot] = row.ids[: row.cached]


def common(first: list[int], second: list[int]) -> int:
    """Tokens that two texts begin with alike; at least one of the second is left to be read."""
    count = 0
    while count < min(len(first), len(second) - 1) and first[count] == second[count]:
        count += 1
    return count
