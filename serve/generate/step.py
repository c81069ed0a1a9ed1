"""What one step of the engine does: the scheduler's decision, which the runner carries out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.errors import ServeError
    from serve.generate.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `tokens` tokens' keys and values of slot `source` are to be those of slot `target` too."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a sequence that are read in one run, from its `cached`-th on."""

    sequence: Sequence
    count: int

    @property
    def complete(self) -> bool:
        """Whether nothing of the sequence is left to read: its next token can be chosen."""
        return self.count == self.sequence.pending


@dataclass(slots=True)
class Step:
    """What to do now, in this order.

    Attributes:
        dropped: sequences that end without another token, with the error that answers each.
        released: slots whose memory is no longer needed.
        copies: to be made one after the other, before anything runs.
        decode: sequences with one token to read, all in one run.
        prefill: chunks of prompts, a run each.
    """

    dropped: list[tuple[Sequence, ServeError]] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)

    @property
    def runs(self) -> bool:
        """Whether the graph has anything to read."""
        return bool(self.decode or self.prefill)

    @property
    def tokens(self) -> int:
        """How many tokens it reads."""
        return len(self.decode) + sum(chunk.count for chunk in self.prefill)
