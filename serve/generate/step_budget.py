"""How many tokens of prompts a step may read while others stream. Pure.

A prompt that is read in one go stalls every stream for as long as that takes, so it is read in chunks, one
beside each run of the streams (Agrawal et al., "Sarathi-Serve", 2024). The larger the chunk, the sooner the
prompt is read and the longer the streams wait for their next token.
"""

from __future__ import annotations

from collections import deque

import numpy as np

# What a step with a chunk may take, in steps without. The streams' inter-token latency is to stay within 2.5
# times of what it is while nobody reads; the rest is for runs that take longer than the estimate.
_SLOWDOWN = 1.8
# A chunk is a pass over all weights, which costs as much as 3 to 5 of its tokens: shorter ones would mostly
# pay for passes. With fewer than 8 streams this is what decides, and steps take longer than the above allows
# (4 streams: 2.2 times, 1: 3.3 times).
_LEAST_CHUNK = 8
# Where nobody streams there is nobody to stall; a prompt that was cancelled is still given up within a step.
# Larger ones cost no less per token (0.52 ms at 128, 0.53 at 256: 4 bits, 12 layers of 768, two cores).
_LARGEST_CHUNK = 128

_KEPT_STEPS = 64
# Of a pass over the weights, another row of a decode run and another token of a chunk: how they compare to
# each other before anything was observed (4 bits, 12 layers of 768, two cores: 1.6, 0.7 and 0.5 ms).
_START = np.array([1.0, 0.45, 0.3])
# How many steps' observations the start values are worth: where what was seen leaves a cost open (all steps
# alike, say), they decide.
_START_WEIGHT = 0.1
_LEAST_COST = 0.05


class StepBudget:
    """Chunk sizes that keep those who stream fluent, from how long recent steps took.

    The model is `seconds = passes × a + rows × b + tokens × c`, where a step's decode run is a pass and each
    chunk is another. It is fitted to the last steps by least squares of the relative error: a step that was
    disturbed and took ten times as long weighs a hundredth, so that no step has to be left out by hand.
    """

    def __init__(self, limit: int) -> None:
        """Start; `limit` is the tokens that a step may read, decode rows included, 0: adapt."""
        self._limit = limit
        self._steps: deque[tuple[int, int, int, float]] = deque(maxlen=_KEPT_STEPS)
        self._costs: np.ndarray | None = _START

    def ran(self, rows: int, runs: int, tokens: int, seconds: float) -> None:
        """A step took so many seconds: a decode run of `rows` and `runs` chunks of `tokens` in all.

        Steps without rows say little (their chunks are of another size) and are left out.
        """
        if rows and seconds > 0 and not self._limit:
            self._steps.append((1 + runs, rows, tokens, seconds))
            self._costs = None

    def room(self, rows: int, runs: int = 0, tokens: int = 0) -> int:
        """Tokens that another chunk of a step may hold, 0: let there be none; never 0 for the first.

        Args:
            rows: of the step's decode run; 0: it has none.
            runs: chunks that the step has already.
            tokens: how many tokens these hold together.
        """
        if self._limit:
            room, least = self._limit - rows - tokens, 1
        elif not rows:
            room, least = _LARGEST_CHUNK - tokens, _LEAST_CHUNK
        else:
            room, least = min(self._fluent(rows, runs, tokens), _LARGEST_CHUNK - tokens), _LEAST_CHUNK
        if not runs:
            return max(room, least)
        return room if room >= _LEAST_CHUNK else 0

    def _fluent(self, rows: int, runs: int, tokens: int) -> int:
        """Tokens that fit into what such a step may take."""
        a_pass, a_row, a_token = self._fitted()
        spare = (_SLOWDOWN - 1) * (a_pass + rows * a_row) - runs * a_pass - tokens * a_token
        return int((spare - a_pass) / a_token)

    def _fitted(self) -> tuple[float, float, float]:
        """Seconds of a pass, a row and a token, in any unit before the first observation."""
        if self._costs is None:
            seen = np.array(self._steps)
            seconds = seen[:, 3]
            # In units of the start values, scaled to the steps' time: what is to be found are three ones.
            expected = seen[:, :3] * _START
            scaled = expected * float(np.median(seconds / expected.sum(axis=1))) / seconds[:, None]
            squares = scaled.T @ scaled + _START_WEIGHT * np.eye(len(_START))
            ratios = np.linalg.solve(squares, scaled.sum(axis=0) + _START_WEIGHT)
            self._costs = _START * np.maximum(ratios, _LEAST_COST)
        a_pass, a_row, a_token = self._costs.tolist()
        return a_pass, a_row, a_token
