"""How a model generates: what its config.pbtxt says in `parameters`, checked."""

from __future__ import annotations

from dataclasses import dataclass

from serve.errors import ModelLoadError

_LEAST_VALUES = {
    "context_length": 2,
    "max_prompt_length": 1,
    "default_max_tokens": 1,
    "max_num_seqs": 1,
    "cache_tokens": 0,
    "max_num_batched_tokens": 0,
    "max_queue_size": 0,
}
# Each step looks at all slots, each look at the queue at all that wait.
_LARGEST_VALUES = {"max_num_seqs": 1024, "max_queue_size": 65536}


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """Limits of one model's generation.

    Attributes:
        context_length: tokens of a prompt and what follows it, at most.
        max_prompt_length: tokens of a prompt, at most; below `context_length`.
        default_max_tokens: tokens to generate where a request doesn't say.
        max_num_seqs: sequences that are generated at once: the cache's slots.
        cache_tokens: tokens that all slots together may hold.
        max_num_batched_tokens: tokens that one step may read; 0: as many as keep those that stream fluent.
        max_queue_size: sequences that may wait for a slot.
        enable_prefix_caching: keep what was read, for prompts that begin with the same tokens.
        eos_token_ids: tokens that end a text.

    Raises:
        ModelLoadError: a limit is out of its range.
    """

    context_length: int
    max_prompt_length: int
    default_max_tokens: int = 16
    max_num_seqs: int = 16
    cache_tokens: int = 0
    max_num_batched_tokens: int = 0
    max_queue_size: int = 128
    enable_prefix_caching: bool = True
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in _LEAST_VALUES.items():
            value = getattr(self, name)
            if value < least:
                raise ModelLoadError(f"config.pbtxt: parameter '{name}' is {value}, expected {least} or more")
        for name, most in _LARGEST_VALUES.items():
            value = getattr(self, name)
            if value > most:
                raise ModelLoadError(f"config.pbtxt: parameter '{name}' is {value}, expected {most} at most")
        if self.max_prompt_length >= self.context_length:
            raise ModelLoadError(
                f"config.pbtxt: parameter 'max_prompt_length' is {self.max_prompt_length}, expected less "
                f"than context_length, {self.context_length}: a token must fit behind the longest prompt"
            )
