"""The decoder-only transformer of the GPT family.

Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018; Radford et al., "Language
Models are Unsupervised Multitask Learners", 2019: norms before the sublayers, learned positions.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from train.initialization import xavier_uniform

Initialization = Literal["gpt2", "xavier"]


class GPT(nn.Module):
    """Token ids INT64 [batch, time] to logits FP32 [batch, time, vocabulary]; time is at most `context`."""

    def __init__(
        self,
        *,
        vocabulary: int,
        layers: int,
        heads: int,
        width: int,
        context: int,
        dropout: float,
        channel_dropout: float,
        bias: bool,
    ) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Sequential(nn.Dropout(dropout), ChannelDropout(channel_dropout))
        self.blocks = nn.Sequential(
            *(Block(width, heads, dropout, channel_dropout, bias=bias) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width, bias=bias)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """FP32 [batch, time, width], of which each position has seen the tokens up to it and none after."""
        positions = self.positions(torch.arange(ids.shape[1], device=ids.device))
        states: torch.Tensor = self.norm(self.blocks(self.dropout(self.tokens(ids) + positions)))
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the next token, by the embeddings themselves (Press, Wolf 2017, arXiv:1608.05859)."""
        return functional.linear(hidden, self.tokens.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits FP32 [batch, time, vocabulary]."""
        return self.logits(self.hidden(ids))


class Block(nn.Module):
    """Attention and a perceptron four times as wide, each after a norm and added to what went in."""

    def __init__(self, width: int, heads: int, dropout: float, channel_dropout: float, *, bias: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=bias)
        self.attention = CausalSelfAttention(width, heads, dropout, bias=bias)
        self.perceptron_norm = nn.LayerNorm(width, bias=bias)
        self.expansion = nn.Linear(width, 4 * width, bias=bias)
        self.projection = nn.Linear(4 * width, width, bias=bias)
        self.dropout = nn.Sequential(nn.Dropout(dropout), ChannelDropout(channel_dropout))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """FP32 [batch, time, width] to the same."""
        return self.feed_forward(states + self.dropout(self.attention(self.attention_norm(states))))

    def feed_forward(self, states: torch.Tensor) -> torch.Tensor:
        """The perceptron's half: FP32 [batch, time, width] to the same."""
        expanded = functional.gelu(self.expansion(self.perceptron_norm(states)))
        projected: torch.Tensor = self.dropout(self.projection(expanded))
        return states + projected


class ChannelDropout(nn.Module):
    """Drop the same channels at every position of a text: Gal, Ghahramani, NIPS 2016, arXiv:1512.05287.

    On a CPU a mask of its own for every position, and for every attention weight, takes as long as the rest
    of a training step; these masks are free.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """FP32 [batch, time, width] to the same."""
        if not self.training or not self.probability:
            return states
        kept = torch.rand(len(states), 1, states.shape[2], device=states.device) >= self.probability
        return states * (kept.to(states.dtype) / (1 - self.probability))


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and those before it."""

    def __init__(self, width: int, heads: int, dropout: float, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=bias)
        self.projection = nn.Linear(width, width, bias=bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """FP32 [batch, time, width] to the same."""
        parts = self.queries_keys_values(states).unflatten(2, (3, self.heads, -1))
        queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind(0)
        attended = causal_attention(queries, keys, values, self.dropout if self.training else 0.0)
        projected: torch.Tensor = self.projection(attended.transpose(1, 2).flatten(2))
        return projected


def causal_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, dropout: float
) -> torch.Tensor:
    """Scaled dot-product attention to the positions up to each one's own.

    Written out for 16 bits on a CPU: torch's fused kernel takes four times as long there, most of it in the
    backward pass (33 ms against 7 ms for 32 x 4 heads of 128 x 32), half of a training step.

    Args:
        queries: [batch, heads, time, head width]; keys and values are the same.
        keys: as queries.
        values: as queries.
        dropout: probability that a weight is dropped.

    Returns:
        [batch, heads, time, head width], of the queries' type.
    """
    if queries.device.type != "cpu" or queries.dtype == torch.float32:
        return functional.scaled_dot_product_attention(
            queries, keys, values, dropout_p=dropout, is_causal=True
        )
    scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])
    future = torch.full(scores.shape[-2:], -math.inf, dtype=scores.dtype).triu(1)
    return functional.dropout((scores + future).softmax(dim=-1), dropout) @ values


def initialize(model: GPT, initialization: Initialization) -> None:
    """GPT-2's: normal of deviation 0.02, less where blocks add up; or Xavier's for all but the embeddings."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    if initialization == "xavier":
        xavier_uniform(model)
        return
    for module in model.modules():
        if isinstance(module, Block | CausalSelfAttention):
            nn.init.normal_(module.projection.weight, std=0.02 / math.sqrt(2 * len(model.blocks)))
