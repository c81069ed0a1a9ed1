"""One text that is being generated, and what becomes of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np

    from serve.errors import ServeError
    from serve.request import Call


STOP, LENGTH = "stop", "length"
"""Why a text is complete, by vLLM's names: a stop text or token, or as many tokens as it may have."""


class Sampler(Protocol):
    """Chooses a sequence's next token; has its own random numbers."""

    def next(self, logits: np.ndarray, ids: list[int], prompt_length: int) -> int:
        """A token's id.

        Args:
            logits: FP32 [vocabulary]; may be written to.
            ids: the prompt's tokens and those generated so far.
            prompt_length: how many of `ids` are the prompt's.
        """


class Output(Protocol):
    """Where a sequence's tokens go. Called from the engine's thread, and never waits."""

    def take(self, token: int) -> str | None:
        """A token was generated; `STOP` where it is the last, None: it need not be."""

    def end(self, reason: str) -> None:
        """The text is complete: `STOP` or `LENGTH`."""

    def fail(self, error: ServeError) -> None:
        """There won't be any more: cancelled, too late, or the graph failed."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A text from its prompt to its last token.

    Attributes:
        ids: the prompt's tokens, then the generated ones.
        prompt_length: how many of them are the prompt's, at least 1.
        max_tokens: how many may be generated, at least 1.
        call: the request's deadline and cancellation.
        sampler: chooses the tokens.
        output: where they go.
        slot: its place in the cache; None: it waits for one.
        cached: how many of `ids` have their keys and values in the slot.
        reused: how many of those were another sequence's work.
        token_at: when its latest token was chosen, seconds of `time.monotonic`; 0: none was yet.
    """

    ids: list[int]
    prompt_length: int
    max_tokens: int
    call: Call
    sampler: Sampler
    output: Output
    slot: int | None = None
    cached: int = 0
    reused: int = 0
    token_at: float = 0.0

    @property
    def place(self) -> int:
        """Its slot, which a running sequence has."""
        assert self.slot is not None
        return self.slot

    @property
    def pending(self) -> int:
        """Tokens that the graph has yet to read: 1 while it generates, more while it reads the prompt."""
        return len(self.ids) - self.cached

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.ids) - self.prompt_length

    @property
    def longest(self) -> int:
        """Tokens that its slot may have to hold; the last one generated is never read."""
        return self.prompt_length + self.max_tokens - 1
