"""How a model generates: what its config.pbtxt says in `parameters`, checked."""

from __future__ import annotations

from dataclasses import dataclass


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
