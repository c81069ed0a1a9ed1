"""GPT with a key-value cache: each new token costs one position's work, not that of all before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from train.transformer import GPT, Block


@torch.library.custom_op("onnxedge::cached_attention", mutates_args=())
def cached_attention(
    packed: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    last: torch.Tensor,
    longest: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put new tokens into a cache and attend from each to those before it and to itself.

    Arguments and results are those of onnxruntime's GroupQueryAttention, as which it is exported:
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

    Args:
        packed: queries, keys and values side by side, FP32 [batch, time, 3 * heads * head width].
        past_key: FP32 [batch, heads, cache, head width]; row r holds `last[r] + 1 - time` tokens.
        past_value: as `past_key`.
        last: INT32 [batch], place of the last new token in the row's cache.
        longest: INT32 [], the largest of `last` plus one; it tells onnxruntime whether all caches are empty.

    Returns:
        FP32 [batch, time, heads * head width]; and the caches with the new tokens, zero after them. (The
        operator leaves what stands there when it writes into the cache in place.)
    """
    del longest
    time = packed.shape[1]
    _, heads, cache, width = past_key.shape
    queries, keys, values = packed.view(-1, time, 3, heads, width).permute(2, 0, 3, 1, 4)
    positions = last[:, None].to(torch.int64) - torch.arange(time - 1, -1, -1)
    index = positions[:, None, :, None].expand_as(keys)
    places = torch.arange(cache)
    filled = (places <= last[:, None])[:, None, :, None]
    present_key = past_key.scatter(2, index, keys) * filled
    present_value = past_value.scatter(2, index, values) * filled
    visible = (places <= positions[:, :, None])[:, None]
    attended = functional.scaled_dot_product_attention(queries, present_key, present_value, attn_mask=visible)
    return attended.transpose(1, 2).flatten(2), present_key, present_value


@cached_attention.register_fake
def _(
    packed: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    last: torch.Tensor,  # noqa: ARG001 - shapes don't depend on it
    longest: torch.Tensor,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The shapes, for tracing."""
    attended = packed.new_empty((packed.shape[0], packed.shape[1], packed.shape[2] // 3))
    return attended, torch.empty_like(past_key), torch.empty_like(past_value)


class CachedGPT(nn.Module):
    """A language model that reads on where it stopped; on the CPU, in evaluation mode.

    Each row of a batch is a text of its own, at a length of its own; past length plus `time` stays within
    `cache`, and `cache` within the model's context. Only the last token's logits are computed: nobody asks
    for those of a prompt's other tokens, which took 40 % of a chunk's time (256 tokens, 12 layers of 768,
    4 bits).

    onnxruntime's operator takes several rows of several tokens only where all caches are empty: read a
    prompt's later chunks row by row. (One token each, and one row alone, it takes at any past length.)
    """

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def names(self, stem: str) -> tuple[str, ...]:
        """Of the caches in their order: STEM.0.key, STEM.0.value, STEM.1.key, ..."""
        layers = range(len(self.gpt.blocks))
        return tuple(f"{stem}.{layer}.{part}" for layer in layers for part in ("key", "value"))

    def empty_cache(self, batch: int, cache: int) -> tuple[torch.Tensor, ...]:
        """Zeros, two of FP32 [batch, heads, cache, head width] per layer."""
        first = cast("Block", self.gpt.blocks[0])
        heads = first.attention.heads
        shape = (batch, heads, cache, self.gpt.tokens.embedding_dim // heads)
        return tuple(torch.zeros(shape) for _ in self.names(""))

    def hidden(
        self, ids: torch.Tensor, past_length: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """FP32 [batch, time, width] before the output layer, and the caches; arguments as of `forward`."""
        gpt = self.gpt
        positions = past_length + torch.arange(ids.shape[1])
        last = positions[:, -1].to(torch.int32)
        longest = last.max() + 1
        states = gpt.tokens(ids) + gpt.positions(positions)
        present: list[torch.Tensor] = []
        for layer, key, value in zip(gpt.blocks, past[::2], past[1::2], strict=True):
            block = cast("Block", layer)
            attention = block.attention
            packed = attention.queries_keys_values(block.attention_norm(states))
            attended, *caches = cached_attention(packed, key, value, last, longest)
            present += caches
            states = block.feed_forward(states + attention.projection(attended))
        return gpt.norm(states), *present

    def forward(
        self, ids: torch.Tensor, past_length: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Read on.

        Args:
            ids: new tokens INT64 [batch, time].
            past_length: INT64 [batch, 1], how many tokens of each row the cache holds.
            past: key and value of each layer, FP32 [batch, heads, cache, head width]; what stands after the
                past length doesn't matter.

        Returns:
            Logits FP32 [batch, 1, vocabulary] of what follows the last token, and the caches with the new
            tokens.
        """
        states, *present = self.hidden(ids, past_length, *past)
        return self.gpt.logits(states[:, -1:]), *present
