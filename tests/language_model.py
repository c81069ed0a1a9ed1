"""A small GPT, trained for some seconds, for the tests of its graphs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from train.data.tinyshakespeare import load_sample
from train.tokenization import encode, train_tokenizer
from train.transformer import GPT, initialize

if TYPE_CHECKING:
    import numpy as np

CONTEXT = 256
STEPS = 250


@dataclass(frozen=True)
class LanguageModel:
    """The network in evaluation mode, and a text in its tokens.

    Attributes:
        fitted: ids INT64 [n] that it was trained on.
        test: ids INT64 [m].
    """

    network: GPT
    fitted: np.ndarray
    test: np.ndarray


@cache
def language_model() -> LanguageModel:
    """Two blocks of width 64 over characters, after 250 steps."""
    text = load_sample().train[:60_000]
    ids = encode(train_tokenizer("char", (text,), 0), text)
    fitted, test = ids[:50_000], ids[50_000:]
    torch.manual_seed(0)
    network = GPT(
        vocabulary=int(ids.max()) + 1, layers=2, heads=4, width=64, context=CONTEXT,
        dropout=0.0, channel_dropout=0.0, bias=True,
    )  # fmt: skip
    initialize(network, "gpt2")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other on a busy machine
    try:
        fit(network, torch.from_numpy(fitted))
    finally:
        torch.set_num_threads(threads)
    return LanguageModel(network.eval(), fitted, test)


def fit(network: GPT, ids: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - CONTEXT, (2, 1), generator=generator)
        window = ids[starts + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        functional.cross_entropy(network(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
