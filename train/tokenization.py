"""Text to token ids and back without loss, by characters or by byte pairs; kept as `tokenizer.json`.

The tokenizers come from Hugging Face's `tokenizers`, so that whatever reads a checkpoint in any language can
read its `tokenizer.json`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from collections.abc import Sequence

TokenizerKind = Literal["char", "bpe"]
BYTES = 256

# Its threads would compete with torch's, and it warns when a process forks after it has started them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def train_tokenizer(kind: TokenizerKind, texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Make a tokenizer for texts like these; the same texts give the same `tokenizer.json`, byte for byte.

    Args:
        kind: "char" has one token per character that occurs, in the order of their code points. "bpe" joins
            the most frequent pairs of bytes, then of tokens (Sennrich et al. 2016, arXiv:1508.07909), within
            GPT-2's pieces of text (Radford et al. 2019); it takes any text.
        texts: what to learn from.
        vocabulary: number of tokens, of "bpe" only; fewer where the texts are too short for so many pairs.

    Raises:
        ValueError: there is no such kind, the vocabulary has no room for the 256 bytes, or no text has a
            character.
    """
    if kind == "char":
        return _character_tokenizer(texts)
    if kind != "bpe":
        raise ValueError(f"tokenizer {kind!r} is not one of char, bpe")
    if vocabulary < BYTES:
        raise ValueError(f"--vocabulary: expected at least {BYTES}, one per byte, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _character_tokenizer(texts: Sequence[str]) -> Tokenizer:
    alphabet = sorted(set().union(*texts))
    if not alphabet:
        raise ValueError("expected texts to take the characters from, got none")
    # Without a token for the unknown: what a model never saw is refused, see `encode`.
    tokenizer = Tokenizer(models.WordLevel({character: index for index, character in enumerate(alphabet)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def to_json(tokenizer: Tokenizer) -> bytes:
    """The content of `tokenizer.json`."""
    return tokenizer.to_str(pretty=True).encode()


def from_json(content: bytes) -> Tokenizer:
    """The tokenizer that `to_json` wrote."""
    return Tokenizer.from_str(content.decode())


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids INT64 [tokens].

    Raises:
        ValueError: a tokenizer of characters doesn't have one of the text's.
    """
    if isinstance(tokenizer.model, models.WordLevel):
        unknown = sorted(character for character in set(text) if tokenizer.token_to_id(character) is None)
        if unknown:
            shown = ", ".join(repr(character) for character in unknown[:5])
            raise ValueError(
                f"{shown}: not among the {tokenizer.get_vocab_size()} characters that the model was trained "
                "on; leave out what it can't know, or train with --tokenizer bpe, which takes any text"
            )
    return np.array(tokenizer.encode(text).ids, dtype=np.int64)
